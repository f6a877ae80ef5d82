"""What a row of `python -m benchmarks` is, and how two ways of doing the same are timed against each other.

    def my_row() -> Row:
        mine, theirs = interleaved(ours, peer)                     # seconds of processor time, medians
        return Row("my-row", target=1.15, measured=mine, peer=theirs, floor=least, note="what it is measured on")

A row asserts first that both ways give the same numbers. Timings are processor time of this process with one thread, both ways in
turns, so that what else the machine does hits them alike; what counts is the ratio.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from threadpoolctl import threadpool_limits


class LeftOut(Exception):
    """Raised by a row whose promise is none on this machine: the reason, as what follows "left out, "."""


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: under which `python -m benchmarks` runs it.
        target: the ratio, peer over measured, that is promised; where `at_most`, measured over peer.
        measured, peer: seconds (or what `unit` says) of ours and of the named peer.
        floor: the least that any way of doing it could take, in the same unit; None where it is not known.
        note: sizes, and what the peer is.
        at_most: True where ours may cost more than the peer, but at most `target` times as much.
        unit: of `measured`, `peer` and `floor`.
    """

    name: str
    target: float
    measured: float
    peer: float
    floor: float | None
    note: str
    at_most: bool = False
    unit: str = "s"

    @property
    def ratio(self) -> float:
        """How many times better than the peer; where `at_most`, how many times as expensive."""
        return self.measured / self.peer if self.at_most else self.peer / self.measured

    @property
    def holds(self) -> bool:
        """Whether the target is met."""
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target


def interleaved(*ways: Callable[[], object], rounds: int = 7) -> list[float]:
    """Median processor seconds of each way, one thread, in turns, after one call of each that is not timed."""
    seconds: list[list[float]] = [[] for _ in ways]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            for way in ways:
                way()
            for _ in range(rounds):
                for way, taken in zip(ways, seconds, strict=True):
                    start = time.process_time()
                    way()
                    taken.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return [statistics.median(taken) for taken in seconds]


__all__ = ["LeftOut", "Row", "interleaved"]
