"""A step whose loss or gradient is not finite: reported before the optimiser can spread it.

    check_step(refiner, result, step=731, sample_index=index)     # NotFiniteError in every process
    error.report                                  # what `failures/step-00000731.json` holds

`runs/replay.py` runs such a step again and watches its parts.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime.distributed import all_gather, finite_everywhere
from ..runtime.ending import EarlyEnd
from ..runtime.sharding import local
from ..runtime.wording import setting
from .refiner import Refiner, StepResult

# Folder of the reports in a run's output folder.
FAILURES = "failures"
# Parameters with a bad gradient that a report names; usually all are bad, or the last few.
_NAMED_PARAMETERS = 20


@dataclass(frozen=True)
class FailureReport:
    """What there is to know of a step that is not finite; as JSON in `failures/`.

    Attributes:
        step: its number, from 0.
        loss, head_losses: of the process in which most of them are not finite.
        gradients, bad_gradients: how many parameters have a gradient, and one that is not finite.
        bad_gradient_names: the first of these parameters.
        largest_weight: the largest absolute weight of encoder and heads.
        bf16: whether encoder and heads computed in bfloat16.
        samples: places in the data set of the images of all processes.
    """

    step: int
    loss: float
    head_losses: dict[str, float]
    gradients: int
    bad_gradients: int
    bad_gradient_names: list[str]
    largest_weight: float
    bf16: bool
    samples: list[int]

    def __str__(self) -> str:
        what = "gradient" if math.isfinite(self.loss) else "loss"
        names = ", ".join(self.bad_gradient_names[:3]) or "none"
        return (
            f"the {what} of step {self.step} is not finite; losses per head: {self.head_losses}; "
            f"gradients that are not: {self.bad_gradients} of {self.gradients} ({names}); "
            f"samples: {self.samples[:8]}...; the weights were not updated. "
            f"Lower {setting('learning_rate')}, or {setting('mixed_precision', 'no')}"
        )


class NotFiniteError(FloatingPointError):
    """A loss or gradient was infinite or not a number; the weights are those before the step.

    Attributes:
        report: what there is to know of the step.
    """

    def __init__(self, report: FailureReport, hint: str = "") -> None:
        super().__init__(f"{report}{hint}")
        self.report = report


def check_step(refiner: Refiner, result: StepResult, *, step: int, sample_index: Tensor) -> None:
    """Raise unless the loss and every gradient are finite, in all processes alike.

    Args:
        refiner: after the backward pass; its gradients are the averages over the processes,
            whole or sharded.
        result: of the step; its loss is this process's own.
        step: number of the step, for the message.
        sample_index: indices in the data set of this process's share of the batch (b,).

    Raises:
        NotFiniteError: what is not finite, and where.
    """
    gradients = [local(p.grad) for p in refiner.parameters() if p.grad is not None]
    if not finite_everywhere(result.loss, torch.nn.utils.get_total_norm(gradients)):
        raise NotFiniteError(describe_failure(refiner, result, step, sample_index))


def describe_failure(
    refiner: Refiner, result: StepResult, step: int, sample_index: Tensor
) -> FailureReport:
    """The report of a step: losses of the worst process, gradients and samples of all."""
    # the losses of all processes, of which the one with most bad numbers tells most
    own = torch.cat([result.loss.detach().float()[None], result.head_losses.float()])
    losses = all_gather(own[None])  # (processes, 1 + heads)
    most_bad = int((~losses.isfinite()).sum(dim=1).argmax())
    loss, *head_losses = losses[most_bad].tolist()

    # a gradient is finite when every process's part of it is
    named = {n: local(p.grad) for n, p in refiner.named_parameters() if p.grad is not None}
    own_finite = torch.stack([gradient.isfinite().all() for gradient in named.values()])
    finite = all_gather(own_finite[None].int()).amin(dim=0).tolist()
    bad = [name for name, is_finite in zip(named, finite, strict=True) if not is_finite]

    weights = [local(parameter).detach() for parameter in refiner.parameters()]
    largest = torch.stack([weight.abs().max() for weight in weights if weight.numel()]).max()

    return FailureReport(
        step=step,
        loss=loss,
        head_losses=dict(zip(refiner.head_names, head_losses, strict=True)),
        gradients=len(named),
        bad_gradients=len(bad),
        bad_gradient_names=bad[:_NAMED_PARAMETERS],
        largest_weight=float(all_gather(largest[None]).max()),
        bf16=refiner.bf16,
        samples=all_gather(sample_index).tolist(),
    )


class NotBetterError(EarlyEnd):
    """A finished run whose result was not judged better, where `fail_if_not_better` was asked for.

    Everything is written before it is raised. The message says why.

    Attributes:
        result: what `refine` would have returned.
    """

    exit_code = 3

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result
