"""Signals end a run between two steps: the step is finished, a checkpoint written, and the exit code says why.

    with StopSignals() as signals:
        for step in ...:
            ...                                              # SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C arrives somewhere in here
            if number := signals.agreed(device):             # the same answer in every process
                save(...)
                raise Interrupted(number, "...")

| signal                    | who sends it                                             | exit code |
|---------------------------|----------------------------------------------------------|-----------|
| SIGTERM, SIGUSR1, SIGUSR2 | Slurm (`--signal`, preemption), Kubernetes, `kill`       | 143       |
| SIGINT                    | Ctrl-C                                                   | 130       |

The second signal ends the process at once, as it would have without all this; the last checkpoint is what is left then.
Before and after the steps, and in other commands, there is nothing to finish: `ended_by_signals` ends them there and then, by an
exception, so that what is half-written is removed, and with the same exit codes.
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

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Interrupted(RuntimeError):
    """A signal ended the run after a checkpoint; the message says which, where it stands and how it goes on.

    Attributes:
        exit_code: 130 after Ctrl-C, else 143, as a shell has it for SIGINT and SIGTERM.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


class Ended(KeyboardInterrupt):
    """SIGTERM, SIGUSR1 or SIGUSR2 came where Ctrl-C would end the command; the exit code is 143."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let those of `SIGNALS` that would end the process raise `Ended` inside the block; what they did before, they do after it."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(signal.Signals(number).name)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        ending = [
            number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL
        ]  # Ctrl-C raises by itself
        before = {number: signal.signal(number, end) for number in ending}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignals:
    """Takes note of the first of `SIGNALS` inside the block; outside the main thread, where Python has no signals, of none."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
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
            text = f"\n{name}: this step is finished and a checkpoint written; once more stops at once\n"
            os.write(
                2, text.encode()
            )  # print is not safe here: the signal may have come in the middle of another print

    def agreed(self, device: torch.device) -> int:
        """The signal that this or any other process received, 0 for none; every process has to ask at the same step."""
        if world_size() == 1:
            return self.received
        number = torch.tensor(self.received, device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)


def ignore_stop_signals(worker: int = 0) -> None:
    """For data-loading workers (`worker_init_fn`): a signal to the whole group must not take the last batch away.

    They end with the process that they work for, as always.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


__all__ = ["Ended", "Interrupted", "StopSignals", "ended_by_signals", "ignore_stop_signals"]
