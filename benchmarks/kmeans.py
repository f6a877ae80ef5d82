"""k-means against faiss and scikit-learn, one thread each.

    python -m benchmarks.kmeans

For k groups: max(20 000, 50 k) rows of 192 dimensions in 3 k normal groups of different spread in a
space of 40 dimensions, plus noise in all. Each round times one call of every way and takes its
inertia over all rows. Before, ours and scikit-learn are started from the same centroids and must
end in the same ones, and on groups that lie apart ours must find at least as many of them as the
others. Writes benchmarks/results/kmeans.md.

    python -m benchmarks kmeans-100 kmeans-100-faiss kmeans-1000 kmeans-1000-faiss

are rows on the same data. faiss is `pip install faiss-cpu`.
"""

import datetime
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from mim_refiner_hf.clustering.k_means import kmeans
from mim_refiner_hf.evaluation.cluster_scores import cluster_accuracy

from .rows import Row, interleaved, products

WIDTH = 192
RESTARTS = 10
# of faiss, of which 25 are the default
FAISS_PASSES = 15
# by number of groups; a round of 1000 takes a minute
ROUNDS = {100: 5, 1000: 3}


class Ending(NamedTuple):
    """What a way took and reached: seconds of processor time, and the inertia over all rows."""

    seconds: float
    inertia: float


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
    turned = inner @ torch.randn(40, WIDTH, generator=generator) / 40**0.5
    return turned + 0.1 * torch.randn(count, WIDTH, generator=generator)


def apart(num_clusters: int) -> tuple[Tensor, Tensor]:
    """Rows (N, 192) in as many groups as are asked for, far from each other; and their groups."""
    generator = torch.Generator().manual_seed(1)
    group = torch.randint(num_clusters, (50 * num_clusters,), generator=generator)
    centres = 2 * torch.randn(num_clusters, WIDTH, generator=generator)
    return centres[group] + torch.randn(len(group), WIDTH, generator=generator), group


# --- the ways ------------------------------------------------------------------------------------


def ours(rows: Tensor, num_clusters: int, seed: int) -> tuple[Tensor, float]:
    """Groups (N,) and inertia, by the defaults.

    Without the second clusterings that measure the confidence: the others have none.
    """
    found = kmeans(rows, num_clusters, seed=seed, spherical=False, refits=0)
    return found.assignments, found.inertia


def by_faiss(rows: Tensor, num_clusters: int, seed: int, restarts: int = 1) -> tuple[Tensor, float]:
    """The same of faiss; its inertia is that of its last centroids, as everybody's here."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    found = faiss.Kmeans(WIDTH, num_clusters, niter=FAISS_PASSES, nredo=restarts, seed=seed + 1)
    found.train(rows.numpy())
    distances, groups = found.index.search(rows.numpy(), 1)
    return torch.from_numpy(groups[:, 0]), float(distances.sum(dtype="float64"))


def by_sklearn(rows: Tensor, num_clusters: int, seed: int) -> tuple[Tensor, float]:
    """The same of scikit-learn's greedy k-means++ and Lloyd, its defaults."""
    found = KMeans(num_clusters, random_state=seed).fit(rows.numpy())
    return torch.from_numpy(found.labels_).long(), float(found.inertia_)


def by_mini_batches(rows: Tensor, num_clusters: int, seed: int) -> tuple[Tensor, float]:
    """The same of scikit-learn's MiniBatchKMeans, its defaults."""
    found = MiniBatchKMeans(num_clusters, n_init=1, random_state=seed).fit(rows.numpy())
    return torch.from_numpy(found.labels_).long(), float(found.inertia_)


def check(rows: Tensor) -> None:
    """From the same start, scikit-learn's full k-means and ours are one; apart is found."""
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

    points, truth = apart(100)
    ways = (ours, by_faiss, by_sklearn)
    mine, *others = [cluster_accuracy(truth, way(points, 100, 0)[0]) for way in ways]
    assert mine >= max(others), f"of groups that lie apart ours finds {mine:.3f}, others {others}"


# --- rows ----------------------------------------------------------------------------------------


def row(
    name: str,
    num_clusters: int,
    target: float,
    our_way: Callable[[Tensor, int, int], tuple[Tensor, float]],
    peer_way: Callable[[Tensor, int, int], tuple[Tensor, float]],
    note: str,
    most: float = 1.0,
) -> Row:
    """One call of each, and no more than `most` times the peer's inertia."""
    rows = features(num_clusters)
    check(rows)
    mine: list[float] = []
    others: list[float] = []
    measured, peer, floor = interleaved(
        lambda: mine.append(our_way(rows, num_clusters, len(mine))[1]),
        lambda: others.append(peer_way(rows, num_clusters, len(others))[1]),
        products((len(rows), WIDTH, num_clusters)),
        rounds=3 if num_clusters < 1000 else 1,
    )
    assert statistics.median(mine) <= most * statistics.median(others), (
        f"our inertia is {statistics.median(mine) / statistics.median(others) - 1:.2%} higher"
    )
    lower = 1 - statistics.median(mine) / statistics.median(others)
    note = f"{len(rows)} x {WIDTH}; {note}; inertia {100 * lower:.1f} % lower; floor: one pass"
    return Row(name, target, measured, peer, floor, note)


ROWS: dict[str, Callable[[], Row]] = {
    "kmeans-100": lambda: row(
        "kmeans-100",
        100,
        1.0,
        ours,
        lambda rows, number, seed: by_faiss(rows, number, seed, RESTARTS),
        f"our defaults, one restart; faiss, {FAISS_PASSES} passes, 10 restarts",
    ),
    "kmeans-100-faiss": lambda: row(
        "kmeans-100-faiss",
        100,
        1.0,
        ours,
        by_faiss,
        f"our defaults, one restart; faiss, {FAISS_PASSES} passes, one restart",
    ),
    "kmeans-100-sklearn": lambda: row(
        "kmeans-100-sklearn", 100, 1.0, ours, by_sklearn, "our defaults; KMeans, its defaults"
    ),
    "kmeans-1000": lambda: row(
        "kmeans-1000", 1000, 2.5, ours, by_sklearn, "our defaults; KMeans, its defaults", most=1.002
    ),
    "kmeans-1000-faiss": lambda: row(
        "kmeans-1000-faiss",
        1000,
        1.0,
        ours,
        by_faiss,
        f"our defaults; faiss, {FAISS_PASSES} passes, one restart",
    ),
}
"""The rows of this file by name."""


# --- the page ------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Tensor, int, int], tuple[Tensor, float]]] = {
    "ours, its defaults": ours,
    f"faiss, {FAISS_PASSES} passes, 1 restart": by_faiss,
    f"faiss, {FAISS_PASSES} passes, {RESTARTS} restarts": lambda rows, number, seed: by_faiss(
        rows, number, seed, RESTARTS
    ),
    "scikit-learn, `KMeans`": by_sklearn,
    "scikit-learn, `MiniBatchKMeans`": by_mini_batches,
}
"""By the name in the table."""


def timed(way: Callable[[Tensor, int, int], tuple[Tensor, float]], *given: object) -> Ending:
    """One call."""
    start = time.process_time()
    inertia = way(*given)[1]  # type: ignore[arg-type]
    return Ending(time.process_time() - start, inertia)


def table(num_clusters: int, rounds: list[dict[str, Ending]]) -> list[str]:
    """Lines of the table: medians over the rounds, beside those of our defaults."""
    lines = []
    least = statistics.median(each["ours, its defaults"].inertia for each in rounds)
    for name in WAYS:
        seconds = statistics.median(each[name].seconds for each in rounds)
        inertia = statistics.median(each[name].inertia for each in rounds)
        lines.append(
            f"| {num_clusters} | {size(num_clusters)} | {name} | {seconds:.2f} s |"
            f" {inertia:.5g} | {100 * (inertia / least - 1):+.2f} % |"
        )
    return lines


def write_table(lines: list[str]) -> None:
    """benchmarks/results/kmeans.md."""
    from .__main__ import processor

    text = [
        "# k-means against faiss and scikit-learn",
        "",
        f"Rows of {WIDTH} dimensions, one thread, seconds of processor time of one call, medians",
        "of rounds in which the ways take turns and have other seeds, on a machine that others",
        "used too. Ours: `kmeans(rows, k, spherical=False, refits=0)`, which begins so many groups",
        "with one restart, without the second clusterings that calibrate a confidence, which the",
        "others do not have. From a disk: [kmeans-from-disk.md](kmeans-from-disk.md).",
        "",
        "```bash",
        "python -m benchmarks.kmeans",
        "```",
        "",
        "| k | rows | way | seconds | inertia | against our defaults |",
        "|---:|---:|---|---:|---:|---:|",
        *lines,
        "",
        f"{datetime.date.today()}, {processor()}, 1 of {os.cpu_count()} cores, torch",
        f"{version('torch')}, faiss {version('faiss-cpu')}, scikit-learn",
        f"{version('scikit-learn')}; rounds: {', '.join(f'{n} at {k}' for k, n in ROUNDS.items())}",
    ]
    page = Path(__file__).parent / "results" / "kmeans.md"
    page.write_text("\n".join(text) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    lines = []
    for num_clusters, count in ROUNDS.items():
        rows = features(num_clusters)
        check(rows)
        rounds = []
        for seed in range(count):
            endings = {}
            with threadpool_limits(1):
                for name, way in WAYS.items():
                    endings[name] = timed(way, rows, num_clusters, seed)
            rounds.append(endings)
            print(num_clusters, rounds[-1], flush=True)
        lines += table(num_clusters, rounds)

    write_table(lines)


if __name__ == "__main__":
    main()
