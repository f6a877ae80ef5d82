"""Signals end a run between two steps: the step is finished, a checkpoint written.

    with StopSignals() as signals:
        for step in ...:
            ...                                     # a signal arrives somewhere in here
            number = signals.agreed(device)         # the same answer in every process
            if number:
                save(...)
                raise Interrupted(number, "...")

| signal                    | who sends it                                       | exit code |
|---------------------------|----------------------------------------------------|-----------|
| SIGTERM, SIGUSR1, SIGUSR2 | Slurm (`--signal`, preemption), Kubernetes, `kill` | 143       |
| SIGINT                    | Ctrl-C                                             | 130       |

The second signal ends the process at once, as it would have without all this; the last checkpoint
is what is left then. Before and after the steps, and in other commands, there is nothing to finish:
`ended_by_signals` ends them there and then, by an exception, so that what is half-written is
removed, and with the same exit codes.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from .distributed import rank, world_size
from .ending import EarlyEnd

_NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")
# Windows knows no SIGUSR1 and SIGUSR2
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Interrupted(EarlyEnd):
    """A signal ended the run after a checkpoint; the message says where it stands and goes on.

    Attributes:
        exit_code: 130 after Ctrl-C, else 143, as a shell has it for SIGINT and SIGTERM.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 130 if number == signal.SIGINT else 143


class Ended(KeyboardInterrupt):
    """SIGTERM, SIGUSR1 or SIGUSR2 came where Ctrl-C would end the command; the exit code is 143."""

    exit_code = 143


def _in_main_thread() -> bool:
    """Whether this is the only thread in which Python takes signals."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let those of `SIGNALS` that would end the process raise `Ended` inside the block."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(signal.Signals(number).name)

    before: dict[int, Any] = {}
    if _in_main_thread():
        for number in SIGNALS:
            # Ctrl-C raises by itself
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignals:
    """Takes note of the first of `SIGNALS` inside the block; outside the main thread, of none."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if _in_main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

        if rank() == 0:
            name = signal.Signals(number).name
            text = "this step is finished and a checkpoint written; once more stops at once"
            # print is not safe: the signal may have come in the middle of another print
            os.write(2, f"\n{name}: {text}\n".encode())

    def agreed(self, device: torch.device) -> int:
        """The signal that this or any other process received, 0 for none.

        Every process has to ask at the same step.
        """
        if world_size() == 1:
            return self.received
        number = torch.tensor(self.received, device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)


def ignore_stop_signals(worker: int = 0) -> None:
    """Keep a data-loading worker alive under a signal to the whole group (`worker_init_fn`).

    The last batch must not be taken away. Workers end with the process that they work for, as ever.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
