"""k-means against scikit-learn's MiniBatchKMeans, per restart, one thread each.

    python -m benchmarks.kmeans

For k groups: max(20 000, 50 k) rows of 192 dimensions in 3 k normal groups of different spread in a
space of 40 dimensions, plus noise in all. Each round times ten restarts of either one after the
other and takes the best inertia of each over all rows. Before, both are started from the same
centroids and must end in the same ones. Writes benchmarks/results/kmeans.md. `python -m benchmarks
kmeans-100 kmeans-1000` are rows on the same data, 20 000 rows of it, with 15 passes at most.
"""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from mim_refiner_hf.clustering.k_means import kmeans

from .rows import Row, interleaved, products

WIDTH = 192
RUNS = 10
# by number of groups; a round of 1000 takes two minutes
ROUNDS = {100: 3, 1000: 1}
# full Lloyd passes at most; 50 is the default
PASSES = (5, 15, 50)
# of the rows of `python -m benchmarks`
ROW_SIZE = 20_000
ROW_PASSES = 15


def size(num_clusters: int) -> int:
    """Number of rows."""
    return max(20_000, 50 * num_clusters)


def features(num_clusters: int) -> Tensor:
    """Rows (N, 192) fp32 with three times as many groups as are asked for."""
    count = size(num_clusters)
    groups = 3 * num_clusters
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(groups, 40, generator=generator)
    spread = 0.3 + torch.rand(groups, 1, generator=generator)
    group = torch.randint(groups, (count,), generator=generator)
    inner = centres[group] + spread[group] * torch.randn(count, 40, generator=generator)
    return inner @ torch.randn(40, WIDTH, generator=generator) / 40**0.5 + 0.1 * torch.randn(
        count, WIDTH, generator=generator
    )


def check(rows: Tensor) -> None:
    """From the same start, scikit-learn's full k-means and ours are one."""
    initial = rows[:50]
    part = rows[:5000]
    expected = KMeans(50, init=initial.numpy(), n_init=1, max_iter=10, algorithm="lloyd").fit(
        part.numpy()
    )
    found = kmeans(part, 50, initial=initial, iterations=10, spherical=False, refits=0)
    assert (found.assignments.numpy() == expected.labels_).mean() > 0.999, (
        "the groups differ from scikit-learn's"
    )
    assert abs(found.inertia / expected.inertia_ - 1) < 1e-4, (
        "the inertia differs from scikit-learn's"
    )


def ours(
    rows: Tensor, num_clusters: int, seed: int, passes: int, runs: int = RUNS
) -> tuple[float, float]:
    """Seconds of processor time per restart, and the inertia of the best."""
    start = time.process_time()
    # without the second clusterings that measure the confidence: scikit-learn has none
    found = kmeans(
        rows,
        num_clusters,
        runs=runs,
        iterations=passes,
        seed=seed,
        spherical=False,
        refits=0,
    )
    return (time.process_time() - start) / runs, found.inertia


def theirs(rows: Tensor, num_clusters: int, seed: int, runs: int = RUNS) -> tuple[float, float]:
    """The same of scikit-learn."""
    start = time.process_time()
    points = rows.numpy()
    inertia = min(
        MiniBatchKMeans(num_clusters, n_init=1, random_state=seed * runs + run).fit(points).inertia_
        for run in range(runs)
    )
    return (time.process_time() - start) / runs, inertia


def row(num_clusters: int, runs: int, rounds: int) -> Row:
    """Restarts of both.

    Every round of both has the same seed, so that the inertias say what the time was spent on.
    """
    rows = features(num_clusters)[:ROW_SIZE]
    check(rows)
    mine: list[float] = []
    others: list[float] = []
    measured, peer, floor = interleaved(
        lambda: mine.append(ours(rows, num_clusters, 0, ROW_PASSES, runs)[1]),
        lambda: others.append(theirs(rows, num_clusters, 0, runs)[1]),
        products(*[(len(rows), WIDTH, num_clusters)] * runs),
        rounds=rounds,
    )
    assert max(mine) <= min(others), (
        f"our inertia is {max(mine) / min(others) - 1:.1%} higher than scikit-learn's"
    )
    note = (
        f"{len(rows)} x {WIDTH}, {runs} restarts, {ROW_PASSES} passes at most; MiniBatchKMeans;"
        " floor: one assignment each"
    )
    return Row(f"kmeans-{num_clusters}", 2.5, measured, peer, floor, note)


ROWS: dict[str, Callable[[], Row]] = {
    "kmeans-100": lambda: row(100, runs=10, rounds=2),
    "kmeans-1000": lambda: row(1000, runs=5, rounds=1),
}
"""The rows of this file by name."""


def table(num_clusters: int, rounds: list[list[tuple[float, float]]]) -> list[str]:
    """Lines of the table.

    Each round has scikit-learn's seconds and inertia, then ours for each of `PASSES`.
    """
    lines = []
    for place, passes in enumerate(PASSES, 1):
        pairs = [(line[0], line[place]) for line in rounds]
        seconds, their_seconds = (
            statistics.median(pair[side][0] for pair in pairs) for side in (1, 0)
        )
        ratio = statistics.median(old[0] / new[0] for old, new in pairs)
        higher = statistics.median(new[1] / old[1] for old, new in pairs) - 1
        lines.append(
            f"| {num_clusters} | {size(num_clusters)} | {len(rounds)} | {passes} |"
            f" {1000 * seconds:.0f} ms | {1000 * their_seconds:.0f} ms | **{ratio:.1f}x** |"
            f" {100 * higher:+.1f} % |"
        )
    return lines


def write_table(lines: list[str]) -> None:
    """benchmarks/results/kmeans.md."""
    text = [
        "# k-means against scikit-learn's MiniBatchKMeans",
        "",
        f"Rows of {WIDTH} dimensions, {RUNS} restarts of each, one thread; processor time per",
        "restart and the best restart's inertia over all rows, medians of the rounds, in which",
        "the two take turns, on a machine that others used too. scikit-learn: `MiniBatchKMeans(k,",
        "n_init=1)`, its defaults otherwise. From a disk:",
        "[kmeans-from-disk.md](kmeans-from-disk.md). Both without a confidence: `kmeans` has by",
        "default second clusterings that calibrate one (`refits`), left out here.",
        "",
        "```bash",
        "python -m benchmarks.kmeans",
        "```",
        "",
        (
            "| k | rows | rounds | passes at most | ours | MiniBatchKMeans | ratio | our inertia is"
            " higher by |"
        ),
        "|---|---|---|---|---|---|---|---|",
        *lines,
        "",
        f"50 passes are the default. {datetime.date.today()}, {platform.machine()}, 1 of",
        f"{os.cpu_count()} CPU cores, torch {version('torch')}, scikit-learn",
        f"{version('scikit-learn')}",
    ]
    (Path(__file__).parent / "results" / "kmeans.md").write_text(
        "\n".join(text) + "\n", encoding="utf-8"
    )


def main() -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    lines = []

    for num_clusters, count in ROUNDS.items():
        rows = features(num_clusters)
        rounds = []
        check(rows)
        for seed in range(count):
            with threadpool_limits(1):
                rounds.append(
                    [
                        theirs(rows, num_clusters, seed),
                        *(ours(rows, num_clusters, seed, passes) for passes in PASSES),
                    ]
                )
            print(num_clusters, rounds[-1], flush=True)
        lines += table(num_clusters, rounds)

    write_table(lines)


if __name__ == "__main__":
    main()
