"""What several processes say to each other: gathers, and the average of the gradients.

    predictions = all_gather_with_gradient(own_predictions, dim=2)
    average_gradients(model.parameters())           # after the last backward of a step

    with lost_processes_named():
        ...                          # LostProcessError: process 1 of 2 has given no answer for ...

With one process every function returns its input. The gradient of a gathered tensor is the SUM over
processes, so that after `average_gradients` two processes with half the batch each hold the
gradient of one process with the whole batch.

Who waits for a process that was killed, or hangs, waits no longer than `patience` says: half an
hour, or MIM_REFINER_TIMEOUT seconds. It has to be longer than one process may work alone, such as
on a shard of features more than the others have.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from .ending import CommandFailure
from .ranks import stated_processes

TIMEOUT = "MIM_REFINER_TIMEOUT"
"""Environment variable: seconds that a process waits for the others of its job."""

_PATIENCE = 1800
# that those who are left have to say so to each other
_ROLL_CALL = 5.0
# in what torch says when a process does not answer; gloo has no error class of its own
_NO_ANSWER = re.compile(
    r"gloo|connection (closed|reset)|timed out|socket timeout|nccl|clients joined", re.IGNORECASE
)


class LostProcessError(CommandFailure):
    """Another process of the job was killed, or hangs, so that this one cannot go on."""


def patience() -> timedelta:
    """How long a process waits for the others; ValueError for what is no number of seconds."""
    stated = os.environ.get(TIMEOUT, str(_PATIENCE))
    if not re.fullmatch(r"[1-9]\d{0,7}", stated):
        raise ValueError(f"{TIMEOUT}={stated[:40]!r} must be a whole number of seconds, 1 or more")
    return timedelta(seconds=int(stated))


@contextmanager
def lost_processes_named() -> Iterator[None]:
    """Raise a LostProcessError, which names the process, for what torch says when one is lost."""
    try:
        yield
    except RuntimeError as error:
        is_of_others = isinstance(error, dist.DistError) or _NO_ANSWER.search(str(error))
        several = stated_processes() > 1 or world_size() > 1
        if isinstance(error, LostProcessError) or not (several and is_of_others):
            raise
        raise LostProcessError(_who_is_lost(error)) from error


def _who_is_lost(error: RuntimeError) -> str:
    """The sentence about a lost process: which, for how long, and what to do."""
    remedy = (
        "its own last lines say why, or its machine is out of memory; the same command goes on "
        f"from the last checkpoint. {TIMEOUT}=seconds sets how long the others wait"
    )
    seconds = patience().total_seconds()
    if not _is_job():
        return f"the processes of this job did not find each other within {seconds:.0f} s; {remedy}"

    came = {rank()}
    asking = threading.Thread(target=_call_the_roll, args=(came,), daemon=True)
    asking.start()
    # with the process that keeps the list nobody answers
    asking.join(2 * _ROLL_CALL)
    missing = sorted(set(range(world_size())) - came)
    numbers = ", ".join(map(str, missing)) or "?"
    noun, have, its = "process", "has", "its connection"
    if len(missing) > 1:
        noun, have, its = "processes", "have", "their connections"

    waited = f"{have} ended or lost {its}"
    if re.search("time", str(error), re.IGNORECASE):
        waited = f"{have} given no answer for {seconds:.0f} s"
    return f"{noun} {numbers} of {world_size()} (from 0) {waited}, so this one ends; {remedy}"


def _call_the_roll(came: set[int]) -> None:
    """Add to `came` the processes that have noticed too, and so live."""
    # the store of the job, over which the processes found each other
    store = dist.distributed_c10d._get_default_store()
    others = set(range(world_size())) - came
    # where it is gone with its process, nobody can be asked
    with suppress(RuntimeError):
        store.set(f"{TIMEOUT}/{rank()}", "lives")
        until = time.monotonic() + _ROLL_CALL
        while others - came and time.monotonic() < until:
            came |= {other for other in others - came if store.check([f"{TIMEOUT}/{other}"])}
            time.sleep(0.1)


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


def reduced(tensor: Tensor, how: Literal["sum", "max"]) -> Tensor:
    """Sum or maximum of the tensors of all processes, element by element; no gradient."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    operation = dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX
    dist.all_reduce(total, operation)
    return total


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


def finite_everywhere(*values: Tensor) -> bool:
    """Whether scalars are finite in every process; the same answer in all of them.

    One in trouble stops all: the others would wait for it for ever.
    """
    finite = torch.stack([value.detach().isfinite() for value in values]).all()
    if world_size() > 1:
        finite = finite.int()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite)


def progress_bar(
    iterable: Iterable[Any] | None = None, *, hidden: bool = False, **settings: Any
) -> Any:
    """tqdm with an ETA: lively on a terminal, a line every half minute in a log file.

    It is the main process's; the others show none.
    """
    seconds = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(iterable, disable=hidden or rank() > 0, mininterval=seconds, **settings)
