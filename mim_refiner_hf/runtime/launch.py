"""Several processes on one machine: whether a launcher meant them, and starting them by torch's own."""

import os
import signal
import sys

import psutil
import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as run_processes

SHUTDOWN_SECONDS = (
    600  # for a step and a checkpoint of a large model, before the launcher kills its processes
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
    values = [
        word.partition("=")[2] or words[i + 1]
        for i, word in enumerate(words)
        if word.split("=")[0] == "--num_processes"
    ]
    return int(values[0]) if values and int(values[0]) > 1 else None


def launch_processes(count: int) -> int:
    """Run this very command in `count` processes on this machine, by torch's own launcher; returns the exit code."""
    specification = sys.modules["__main__"].__spec__
    target = [sys.argv[0]] if specification is None else ["-m", specification.name]
    os.environ.setdefault(
        "TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
    )  # and passes on
    patience = ["--shutdown_timeout", str(SHUTDOWN_SECONDS)]
    try:
        run_processes(
            ["--standalone", "--nproc_per_node", str(count), *patience, *target, *sys.argv[1:]]
        )
    except SignalException as error:  # the processes had it too, and time to finish their step
        return 128 + (signal.SIGINT if error.sigval == signal.SIGINT else signal.SIGTERM)
    except ChildFailedError as error:  # what went wrong has been said by the process itself
        _, failure = error.get_first_failure()
        return failure.exitcode
    return 0


def workers_per_process(processes: int) -> int:
    """How many data-loading workers a process has by default: one per core, at most 16."""
    return min(16, (os.cpu_count() or 1) // processes)


__all__ = ["launch_processes", "launched_short", "several_on_the_cpu", "workers_per_process"]
