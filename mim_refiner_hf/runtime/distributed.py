"""What several processes say to each other: gathers, and the average of the gradients.

    predictions = all_gather_with_gradient(own_predictions, dim=2)
    average_gradients(model.parameters())           # after the last backward of a step

With one process every function returns its input. The gradient of a gathered tensor is the SUM over
processes, so that after `average_gradients` two processes with half the batch each hold the
gradient of one process with the whole batch.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm


def _is_job() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes in this job."""
    return dist.get_world_size() if _is_job() else 1


def rank() -> int:
    """This process's number, 0-based."""
    return dist.get_rank() if _is_job() else 0


def wait_for_everyone() -> None:
    """Return once every process has come here."""
    if world_size() > 1:
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """What every process gave, in rank order, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather(tensor: Tensor, dim: int = 0) -> Tensor:
    """The tensors of all processes, concatenated along `dim` in rank order; no gradient."""
    if world_size() == 1:
        return tensor
    tensor = tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts, dim=dim)


def all_gather_with_gradient(tensor: Tensor, dim: int = 0) -> Tensor:
    """`all_gather` whose backward gives each process the summed gradient of its own part."""
    if world_size() == 1:
        return tensor
    gathered: Tensor = _AllGather.apply(tensor, dim)
    return gathered


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        ctx.length = tensor.shape[dim]
        return all_gather(tensor, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient.narrow(ctx.dim, rank() * ctx.length, ctx.length), None


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes; after any number of backwards.

    One flat all-reduce per dtype. Sharded gradients (`sharding.py`) are means already.
    """
    if world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)

    for gradients in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= world_size()

        parts = flat.split([gradient.numel() for gradient in gradients])
        pairs = zip(parts, gradients, strict=True)
        torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in pairs])


def progress_bar(
    iterable: Iterable[Any] | None = None, *, hidden: bool = False, **settings: Any
) -> Any:
    """tqdm with an ETA: lively on a terminal, a line every half minute in a log file."""
    seconds = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(iterable, disable=hidden, mininterval=seconds, **settings)


__all__ = [
    "all_gather",
    "all_gather_with_gradient",
    "average_gradients",
    "gather_objects",
    "progress_bar",
    "rank",
    "wait_for_everyone",
    "world_size",
]
