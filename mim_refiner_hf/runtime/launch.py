"""Several processes on one machine: whether a launcher meant them, and starting them.

accelerator = job_of_processes()
count = launched_short()
if count is not None:
    return launch_processes(count)
"""

import os
import signal
import sys
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser
from torch.distributed.run import main as run_processes

from .distributed import patience
from .ranks import stated_processes

# For a step and a checkpoint of a large model, before the launcher kills its processes.
_SHUTDOWN_SECONDS = 600


def several_on_the_cpu() -> bool:
    """Whether a launcher started several processes on a machine without a GPU.

    `Accelerator(cpu=True)` makes them one job over gloo; each would train alone otherwise.
    """
    return stated_processes() > 1 and not torch.accelerator.is_available()


def job_of_processes(**settings: Any) -> Accelerator:
    """The job that this process belongs to, joined: whoever is waited for has `patience`.

    Args:
        settings: of `Accelerator`.
    """
    waiting = InitProcessGroupKwargs(timeout=patience())
    return Accelerator(cpu=several_on_the_cpu(), kwargs_handlers=[waiting], **settings)


def launched_short() -> int | None:
    """How many processes `accelerate launch --cpu` was asked for and did not start; else None.

    accelerate (1.15) leaves CPU jobs of several processes to MPI and otherwise starts a single one
    without a word. It leaves behind a master address without a world size; the number itself stands
    only on its command line.
    """
    on_the_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if not on_the_cpu or "MASTER_PORT" not in os.environ or "WORLD_SIZE" in os.environ:
        return None

    count = _asked_of_the_launcher("--num_processes")
    return count if count is not None and count > 1 else None


def _asked_of_the_launcher(flag: str) -> int | None:
    """The number behind `flag` on the command line of the process that started this one."""
    words = psutil.Process().parent().cmdline()
    for place, word in enumerate(words):
        name, _, value = word.partition("=")
        # accelerate takes either spelling
        if name.replace("-", "_") == flag.replace("-", "_"):
            return int(value or words[place + 1])
    return None


def take_the_cores() -> None:
    """All cores for a process that `accelerate launch` started alone and nobody gave a number.

    accelerate (1.15) sets OMP_NUM_THREADS to 1 where nobody else did, and a laptop would compute on
    one core. Started otherwise, or with `--num_cpu_threads_per_process`, it stays as it is.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ
    if not by_accelerate or os.environ.get("OMP_NUM_THREADS") != "1":
        return

    # some systems show no process the environment of another: what is set may then be meant
    try:
        launcher = psutil.Process().parent()
        was_set = launcher is None or "OMP_NUM_THREADS" in launcher.environ()
    except psutil.Error:
        was_set = True
    if was_set or _asked_of_the_launcher("--num_cpu_threads_per_process") is not None:
        return

    # those that this process may use, which a container or `taskset` can make fewer
    usable = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    torch.set_num_threads(min(usable, psutil.cpu_count(logical=False) or usable))


def launch_processes(count: int) -> int:
    """Run this very command in `count` processes by torch's launcher; returns the exit code."""
    specification = sys.modules["__main__"].__spec__
    target = [sys.argv[0]] if specification is None else ["-m", specification.name]

    # what the launcher passes on to its processes
    signals = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", signals)
    options = ["--standalone", "--nproc_per_node", str(count)]
    # torch 2.10 does not know it yet, and gives processes 30 seconds
    if "--shutdown_timeout" in get_args_parser().format_help():
        options += ["--shutdown_timeout", str(_SHUTDOWN_SECONDS)]
    try:
        run_processes([*options, *target, *sys.argv[1:]])
    # the processes had it too, and time to finish their step
    except SignalException as error:
        number = signal.SIGINT if error.sigval == signal.SIGINT else signal.SIGTERM
        return 128 + number
    # what went wrong has been said by the process itself
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode
    return 0


def workers_per_process(processes: int) -> int:
    """How many data-loading workers a process has by default: one per core, at most 16."""
    return min(16, (os.cpu_count() or 1) // processes)
