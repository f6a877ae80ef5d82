"""k-means of more rows than fit into memory, from a float16 file.

    python -m benchmarks.kmeans_from_disk [--rows 10000000]

Writes rows of 300 planted groups chunk by chunk, groups them by `kmeans(ArrayBatches(np.memmap))`,
and measures this process's own memory (RssAnon; pages of the file, which the system may drop at any
time, do not count) and the time of each pass. A part of the rows is grouped from the file and from
memory: the results must be the same. Writes benchmarks/results/kmeans-from-disk.md and removes the
file.
"""

import argparse
import datetime
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim_refiner_hf.clustering import ArrayBatches, kmeans

# that are planted
GROUPS = 300
# rows written at once
CHUNK = 20_000
# rows that are also grouped in memory
PART = 20_000
RUNS = 10
PASSES = 3


class TimedBatches(ArrayBatches):
    """Notes the seconds of each pass over all rows: of the processor and of the clock."""

    def __init__(self, array: NDArray[np.float16]) -> None:
        super().__init__(array)
        self.seconds: list[tuple[float, float]] = []

    def __iter__(self) -> Iterator[Tensor]:
        processor = time.process_time()
        clock = time.perf_counter()
        yield from super().__iter__()
        self.seconds.append((time.process_time() - processor, time.perf_counter() - clock))


class PeakMemory:
    """The most anonymous memory that this process has within `with`.

    In bytes above that at the start, looked at every 10 ms.
    """

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = self.now()
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.watcher.join()
        self.used = self.peak - self.start

    def watch(self) -> None:
        while not self.done.wait(0.01):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        (own,) = (line for line in lines if line.startswith("RssAnon"))
        return 1024 * int(own.split()[1])


def write_rows(path: Path, rows: int, width: int) -> NDArray[np.float16]:
    """A file of float16 rows (rows, width) around `GROUPS` directions, opened for reading."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(GROUPS, width, generator=generator)
    with path.open("wb") as file:
        for start in range(0, rows, CHUNK):
            group = torch.randint(GROUPS, (min(CHUNK, rows - start),), generator=generator)
            noise = torch.randn(len(group), width, generator=generator)
            file.write(noise.add_(centres[group]).half().numpy().tobytes())
    return np.memmap(path, np.float16, "r", shape=(rows, width))


def check(rows: NDArray[np.float16], num_clusters: int) -> None:
    """The first rows give the same groups from the file as from memory."""
    settings = {"runs": RUNS, "iterations": PASSES, "refits": 0}
    stored = kmeans(ArrayBatches(rows[:PART]), num_clusters, **settings)
    loaded = kmeans(torch.tensor(rows[:PART]).float(), num_clusters, **settings)
    assert torch.equal(stored.assignments, loaded.assignments), (
        "the groups differ from those in memory"
    )
    assert abs(stored.inertia / loaded.inertia - 1) < 1e-6, (
        "the inertia differs from that in memory"
    )


def main(rows: int, width: int, num_clusters: int, folder: Path) -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "rows.f16"
        array = write_rows(path, rows, width)
        check(array, num_clusters)
        batches = TimedBatches(array)
        size = path.stat().st_size
        with PeakMemory() as memory:
            kmeans(batches, num_clusters, runs=RUNS, iterations=PASSES, refits=0)

    processor, clock = (statistics.median(kind) for kind in zip(*batches.seconds, strict=True))
    text = [
        "# k-means from a disk",
        "",
        f"{rows} rows of {width} dimensions in float16, {num_clusters} groups, one thread,",
        f"{PASSES} passes of k-means at most, three more for checks, means, groups. Memory is this",
        "process's own (RssAnon) above what it held before; the labels and confidences of all",
        f"rows are {rows * 12 / 1e6:.0f} MB of it. The first {PART} rows gave the same groups from",
        "the file as from memory. Other programs ran on the machine: go by the processor's time.",
        "",
        "```bash",
        (
            f"python -m benchmarks.kmeans_from_disk --rows {rows} --width {width} --num_clusters"
            f" {num_clusters}"
        ),
        "```",
        "",
        "| file | peak memory | passes | processor time per pass | wall time per pass |",
        "|---|---|---|---|---|",
        (
            f"| {size / 1e9:.2f} GB | {memory.used / 1e6:.0f} MB | {len(batches.seconds)} |"
            f" {processor:.1f} s | {clock:.1f} s |"
        ),
        "",
        f"{datetime.date.today()}, {platform.machine()}, 1 of {os.cpu_count()} CPU cores, torch",
        f"{version('torch')}",
    ]
    (Path(__file__).parent / "results" / "kmeans-from-disk.md").write_text(
        "\n".join(text) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--num_clusters", type=int, default=100)
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the file is written; the system's temporary folder when left out",
    )
    arguments = parser.parse_args()
    main(arguments.rows, arguments.width, arguments.num_clusters, arguments.folder)
