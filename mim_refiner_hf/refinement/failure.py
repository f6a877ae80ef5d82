"""What there is to know of a step whose loss or gradient is not finite: said before the optimiser can spread it.

    check_finite(refiner, result, step=731, sample_index=index)      # NotFiniteError, in every process, or nothing
    error.report                                                     # what `failures/step-00000731.json` holds

`replay.py` runs such a step again and watches its parts.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..runtime.distributed import all_gather, world_size
from ..runtime.sharding import local
from .refiner import Refiner, StepResult

FAILURES = "failures"  # folder of the reports in the output folder
NAMED_PARAMETERS = 20  # of those with a bad gradient; usually it is all of them or the last few


class NotFiniteError(FloatingPointError):
    """A loss or a gradient was infinite or not a number; the weights are those of before the step.

    Attributes:
        report: step, losses per head, parameters whose gradient is not finite, largest weight, indices of the samples.
    """

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


def check_finite(refiner: Refiner, result: StepResult, *, step: int, sample_index: Tensor) -> None:
    """Raise unless the loss and every gradient are finite, in all processes alike.

    Args:
        refiner: after the backward pass; its gradients are the averages over the processes, whole or sharded.
        result: of the step; its loss is this process's own.
        step: number of the step, for the message.
        sample_index: indices in the data set of this process's share of the batch (b,).

    Raises:
        NotFiniteError: what is not finite, and where.
    """
    gradients = [
        local(parameter.grad) for parameter in refiner.parameters() if parameter.grad is not None
    ]
    norm = torch.nn.utils.get_total_norm(gradients)
    finite = torch.isfinite(result.loss.detach()) & torch.isfinite(norm)
    if world_size() > 1:
        finite = finite.int()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    if finite:
        return
    report = describe_failure(refiner, result, step, sample_index)
    what = "gradient" if math.isfinite(report["loss"]) else "loss"
    raise NotFiniteError(
        f"the {what} of step {step} is not finite; losses per head: {report['head_losses']}; gradients that are not: "
        f"{report['bad_gradients']} of {report['gradients']} ({', '.join(report['bad_gradient_names'][:3]) or 'none'}); samples: "
        f"{report['samples'][:8]}...; the weights were not updated. Lower --learning_rate, or --mixed_precision no",
        report,
    )


def describe_failure(
    refiner: Refiner, result: StepResult, step: int, sample_index: Tensor
) -> dict[str, Any]:
    """The report of a step, with the losses of the worst process, the gradients and the samples of all."""
    named = [
        (name, local(parameter.grad))
        for name, parameter in refiner.named_parameters()
        if parameter.grad is not None
    ]
    finite = all_gather(
        torch.stack([gradient.isfinite().all() for _, gradient in named])[None].int()
    ).amin(dim=0)
    bad = [
        name for (name, _), is_finite in zip(named, finite.tolist(), strict=True) if not is_finite
    ]
    largest = torch.stack(
        [
            weight.abs().max()
            for parameter in refiner.parameters()
            if (weight := local(parameter)).numel()
        ]
    )
    every = all_gather(
        torch.cat([result.loss.detach().float()[None], result.head_losses.float()])[None]
    )  # (processes, 1 + heads)
    worst = every[int((~every.isfinite()).sum(dim=1).argmax())].tolist()
    return {
        "step": step,
        "loss": worst[0],
        "head_losses": dict(zip(refiner.head_names, worst[1:], strict=True)),
        "gradients": len(named),
        "bad_gradients": len(bad),
        "bad_gradient_names": bad[:NAMED_PARAMETERS],
        "largest_weight": float(all_gather(largest.detach().max()[None]).max()),
        "bf16": refiner.bf16,
        "samples": all_gather(sample_index).tolist(),
    }


__all__ = ["FAILURES", "NotFiniteError", "check_finite", "describe_failure"]
