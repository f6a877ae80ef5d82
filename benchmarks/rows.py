"""What a row of `python -m benchmarks` is, and how two ways are timed against each other.

    def my_row() -> Row:
        mine, theirs = interleaved(ours, peer)        # seconds of processor time, medians
        return Row("my-row", target=1.15, measured=mine, peer=theirs, floor=least, note="sizes")

A row asserts first that both ways give the same numbers. Timings are processor time of this process
with one thread, both ways in turns, so that what else the machine does hits them alike; what counts
is the ratio. Wall time with two threads stands beside it.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from threadpoolctl import threadpool_limits


class LeftOut(Exception):
    """Raised by a row whose promise is none on this machine.

    The message is the reason, as what follows "left out, ".
    """


class Seconds(float):
    """Seconds of processor time with one thread.

    `wall` are those of the clock with two, None on a machine with one core.
    """

    wall: float | None = None


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: under which `python -m benchmarks` runs it.
        target: the ratio that is promised, peer over measured; where `at_most`, measured over peer.
        measured, peer: seconds (or what `unit` says) of ours and of the named peer.
        floor: the least that any way of doing it could take, in the same unit; None where it is not
            known.
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
    def wall_ratio(self) -> float | None:
        """`ratio` by wall time with two threads; None where that was not taken.

        The target does not apply to it.
        """
        mine, theirs = (getattr(seconds, "wall", None) for seconds in (self.measured, self.peer))
        if not mine or not theirs:
            return None
        return float(mine / theirs if self.at_most else theirs / mine)

    @property
    def holds(self) -> bool:
        """Whether the target is met."""
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target


def interleaved(*ways: Callable[[], object], rounds: int = 7) -> list[Seconds]:
    """Median seconds of each way, in turns, after one call of each that is not timed.

    Of the processor with one thread, and, in half as many rounds, of the clock with two.
    """
    seconds = [
        Seconds(median) for median in _medians(ways, rounds, 1, time.process_time, warm=True)
    ]
    if (os.cpu_count() or 1) > 1:
        walls = _medians(ways, (rounds + 1) // 2, 2, time.perf_counter, warm=False)
        for taken, wall in zip(seconds, walls, strict=True):
            taken.wall = wall
    return seconds


def _medians(
    ways: Sequence[Callable[[], object]],
    rounds: int,
    threads: int,
    clock: Callable[[], float],
    warm: bool,
) -> list[float]:
    taken: list[list[float]] = [[] for _ in ways]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)

    try:
        with threadpool_limits(threads):
            for way in ways if warm else ():
                way()
            for _ in range(rounds):
                for way, times in zip(ways, taken, strict=True):
                    start = clock()
                    way()
                    times.append(clock() - start)
    finally:
        torch.set_num_threads(before)
    return [statistics.median(times) for times in taken]


def products(*shapes: tuple[int, int, int]) -> Callable[[], None]:
    """A floor: one matrix product (m, k) x (k, n) for each (m, k, n).

    The results go into tensors that are there already.
    """
    matrices = [(torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)) for m, k, n in shapes]

    def multiply() -> None:
        for left, right, out in matrices:
            torch.mm(left, right, out=out)

    return multiply


def trained(rows: int, inputs: int, outputs: int) -> list[tuple[int, int, int]]:
    """The three products of a linear layer on so many rows in training.

    Its output, the gradients of its input and those of its weight.
    """
    return [(rows, inputs, outputs), (rows, outputs, inputs), (outputs, rows, inputs)]
