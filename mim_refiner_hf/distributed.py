"""What several processes say to each other: gathers, with and without gradient, and the average of the gradients.

With one process every function returns its input. The gradient of a gathered tensor is the SUM over processes, so that after
`average_gradients` two processes with half the batch each hold the gradient of one process with the whole batch.
"""

import os
import signal
import sys
from collections.abc import Iterable
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as run_processes
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

SHUTDOWN_SECONDS = 600  # for a step and a checkpoint of a large model, before the launcher kills its processes


def world_size() -> int:
    """Number of processes in this job."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0-based."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_gather(tensor: Tensor, dim: int = 0) -> Tensor:
    """The tensors of all processes, concatenated along `dim` in rank order; no gradient."""
    if world_size() == 1:
        return tensor
    tensor = tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts, dim=dim)


def wait_for_everyone() -> None:
    """Return once every process has come here."""
    if world_size() > 1:
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """What every process gave, in rank order, on every process."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int) -> Tensor:
        ctx.dim, ctx.length = dim, tensor.shape[dim]
        return all_gather(tensor, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient.narrow(ctx.dim, rank() * ctx.length, ctx.length), None


def all_gather_with_gradient(tensor: Tensor, dim: int = 0) -> Tensor:
    """`all_gather` whose backward returns to each process the summed gradient of its own part."""
    if world_size() == 1:
        return tensor
    gathered: Tensor = _AllGather.apply(tensor, dim)
    return gathered


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes: one flat all-reduce per dtype, after any number of backwards.

    Sharded gradients (`sharding.py`) are means already.
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
        torch._foreach_copy_(
            gradients, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)]
        )


def several_on_the_cpu() -> bool:
    """Whether a launcher started several processes on a machine without a GPU.

    `Accelerator(cpu=several_on_the_cpu())` makes them one job over gloo; without being told, each would train alone.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()


def launched_short() -> int | None:
    """How many processes `accelerate launch --cpu --num_processes N` was asked for when it started only one; else None.

    accelerate (1.15) leaves CPU jobs of several processes to MPI and otherwise starts a single one without a word. What it leaves
    behind is a master address without a world size; the number itself stands only on its command line.
    """
    environment = os.environ
    if (
        environment.get("ACCELERATE_USE_CPU", "").lower() != "true"
        or "MASTER_PORT" not in environment
        or "WORLD_SIZE" in environment
    ):
        return None
    words = psutil.Process().parent().cmdline()
    values = [word.partition("=")[2] or words[i + 1] for i, word in enumerate(words) if word.split("=")[0] == "--num_processes"]
    return int(values[0]) if values and int(values[0]) > 1 else None


def launch_processes(count: int) -> int:
    """Run this very command in `count` processes on this machine, by torch's own launcher; returns the exit code."""
    specification = sys.modules["__main__"].__spec__
    target = [sys.argv[0]] if specification is None else ["-m", specification.name]
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2")  # and passes on
    patience = ["--shutdown_timeout", str(SHUTDOWN_SECONDS)]
    try:
        run_processes(["--standalone", "--nproc_per_node", str(count), *patience, *target, *sys.argv[1:]])
    except SignalException as error:  # the processes had it too, and time to finish their step
        return 128 + (signal.SIGINT if error.sigval == signal.SIGINT else signal.SIGTERM)
    except ChildFailedError as error:  # what went wrong has been said by the process itself
        _, failure = error.get_first_failure()
        return failure.exitcode
    return 0


def progress_bar(iterable: Iterable[Any] | None = None, *, hidden: bool = False, **settings: Any) -> Any:
    """tqdm with an ETA: lively on a terminal, a line every half minute in a log file."""
    return tqdm(iterable, disable=hidden, mininterval=0.5 if sys.stderr.isatty() else 30.0, **settings)


__all__ = [
    "all_gather",
    "all_gather_with_gradient",
    "average_gradients",
    "gather_objects",
    "launch_processes",
    "launched_short",
    "progress_bar",
    "rank",
    "several_on_the_cpu",
    "wait_for_everyone",
    "world_size",
]
