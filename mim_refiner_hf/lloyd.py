"""The steps of k-means, for all restarts at once and over all processes: what `clustering.kmeans` is made of.

    rows = Rows(features, spherical=True)                             # a tensor (N, D), or `Batches`
    sample, variance = survey(rows, num_clusters, seed=0)
    starts = greedy_starts(sample, num_clusters, runs=10, generator=torch.Generator().manual_seed(0))
    best = best_centroids(Rows(sample, spherical=True), starts, iterations=10, limit=1e-4 * variance)
    centroids = best_centroids(rows, best[None], iterations=50, limit=1e-4 * variance)

This file travels with saved models: it needs torch and numpy only.
"""

import math
import random
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

SCORES = 2**21  # similarities held at once: 8 MB
SAMPLE = 4096  # rows among which the starts are chosen, or 4 per group when that is more
TABLE = 8192  # of up to so many sampled rows all mutual distances are kept: 256 MB
ROUND, SAMPLE_PASSES = 2, 10  # passes after which the worse half of the restarts is dropped; most passes over the sample


class Batches(Protocol):
    """Rows that need not fit into memory: iterating, again and again, gives all of them in one order as tensors (n, D)."""

    def __len__(self) -> int:
        """Number of ROWS, not of batches."""

    def __iter__(self) -> Iterator[Tensor]:
        """From the first batch on, each time. A batch's device is where the work is done."""


class ArrayBatches:
    """`Batches` of anything with a length and slices: a tensor, `np.memmap`, a column of a `datasets.Dataset` in torch format."""

    def __init__(self, array: Any, rows_per_batch: int = 16384) -> None:
        self.array, self.rows_per_batch = array, rows_per_batch

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self), self.rows_per_batch):
            part = self.array[start : start + self.rows_per_batch]
            yield part if isinstance(part, Tensor) else torch.tensor(np.asarray(part))


def prepared(rows: Tensor, spherical: bool) -> Tensor:
    """(n, D) in bf16 or fp32, of length 1 when `spherical`; ValueError for anything but a matrix."""
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"features has shape {tuple(rows.shape)}, but must be (rows, width)")
    rows = rows.detach() if rows.dtype == torch.bfloat16 else rows.detach().float()
    return F.normalize(rows.float(), dim=1).to(rows.dtype) if spherical else rows


def refuse_bad(bad: Tensor, count: int) -> None:
    """ValueError when `bad` of `count` rows are not finite."""
    if bad > 0:
        raise ValueError(f"{int(bad)} of {count} rows hold NaN or infinity; check the model that made them, or leave them out")


def bad_rows(rows: Tensor) -> Tensor:
    """Number of rows with a value that is not finite."""
    return (~rows.isfinite()).any(1).sum()


def sum_of_squares(rows: Tensor) -> Tensor:
    """Of all values of rows (n, D), fp64; by way of the rows' lengths: summing squares in fp64 takes longer than the products with 100 centroids."""
    return torch.linalg.vector_norm(rows.float(), dim=1).double().square().sum()


class Rows:
    """The prepared rows, batch by batch, and sums over the processes that share them.

    A tensor is this process's alone; `Batches` are this process's share of all rows in its job.
    """

    def __init__(self, features: Tensor | Batches, spherical: bool) -> None:
        self.spherical, self.streamed = spherical, not isinstance(features, Tensor)
        self.batches = ArrayBatches(prepared(features, spherical)) if isinstance(features, Tensor) else features
        job = self.streamed and dist.is_available() and dist.is_initialized()
        self.processes, self.rank = (dist.get_world_size(), dist.get_rank()) if job else (1, 0)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            yield prepared(batch, self.spherical) if self.streamed else batch

    def over_processes(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over the processes."""
        if self.processes > 1:
            dist.all_reduce(tensor)
        return tensor


def survey(rows: Rows, num_clusters: int, seed: int) -> tuple[Tensor, float]:
    """The first pass, with all checks: a sample (S, D) fp32, the same on all processes, and the mean variance of a feature."""
    first = next(iter(rows), None)
    if first is None:
        raise ValueError("there are no rows to cluster; every process needs some")
    device, width = first.device, first.shape[1]
    lengths = torch.zeros(rows.processes, dtype=torch.int64, device=device)
    lengths[rows.rank] = len(rows.batches)
    rows.over_processes(lengths)
    count, position = int(lengths.sum()), int(lengths[: rows.rank].sum())
    if not 1 <= num_clusters <= count:
        raise ValueError(f"num_clusters={num_clusters} must lie between 1 and the {count} rows to cluster")
    size = min(count, max(SAMPLE, 4 * num_clusters))
    picks = torch.tensor(sorted(random.Random(seed).sample(range(count), size)), device=device)
    sample = torch.zeros(size, width, device=device)
    total = torch.zeros(width, dtype=torch.float64, device=device)
    squares, bad, seen = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in rows:
        here = (picks >= position) & (picks < position + len(batch))
        sample[here] = batch[picks[here] - position].float()
        total += batch.sum(0, dtype=torch.float64)
        squares += sum_of_squares(batch)
        bad += bad_rows(batch)
        seen += len(batch)
        position += len(batch)
    for tensor in (bad, seen, total, squares, sample):
        rows.over_processes(tensor)
    refuse_bad(bad, count)
    if int(seen) != count:
        raise ValueError(f"the batches gave {int(seen)} rows, but their length says {count}; the length must count rows")
    variance = (squares / count - (total / count).square().sum()) / width
    return sample, float(variance)


def greedy_starts(sample: Tensor, num_clusters: int, runs: int, generator: torch.Generator) -> Tensor:
    """(runs, K, D): greedy k-means++ among the sampled rows (S, D), all runs step by step together.

    Each step draws 2 + ln K candidates per run with a probability proportional to the squared distance to the nearest row
    chosen so far, and takes the one that lowers the sum of these distances most (Arthur & Vassilvitskii 2007, section 5).
    """
    size, trials = len(sample), 2 + int(math.log(num_clusters))
    squares = sample.square().sum(1)

    def distances(chosen: Tensor) -> Tensor:
        """Squared, from the rows numbered `chosen` (n,) to all sampled rows (n, S)."""
        return torch.addmm(squares, sample[chosen], sample.T, alpha=-2).add_(squares[chosen, None]).clamp_(min=0)

    table = distances(torch.arange(size, device=sample.device)) if size <= TABLE else None
    draws = torch.rand(num_clusters, runs, trials, generator=generator).to(sample.device)
    chosen = torch.empty(runs, num_clusters, dtype=torch.int64, device=sample.device)
    chosen[:, 0] = (draws[0, :, 0] * size).long()
    nearest = distances(chosen[:, 0])  # (runs, S), to the nearest chosen row
    for step in range(1, num_clusters):
        mass = nearest.cumsum(1)
        candidates = torch.searchsorted(mass, draws[step] * mass[:, -1:], right=True).clamp_(max=size - 1)  # (runs, trials)
        far = distances(candidates.flatten()) if table is None else table[candidates.flatten()]
        lowered = torch.minimum(far.view(runs, trials, size), nearest[:, None])
        best = lowered.sum(2).argmin(1, keepdim=True)  # (runs, 1)
        chosen[:, step] = candidates.gather(1, best)[:, 0]
        nearest = lowered.take_along_dim(best[:, :, None], 1)[:, 0]
    return sample[chosen]


def products(rows: Tensor, others: Tensor) -> Tensor:
    """(n, m) fp32: rows (n, D) times others (m, D); on a GPU bf16 rows are multiplied as such, with fp32 sums."""
    if rows.dtype == torch.bfloat16 and rows.is_cuda:
        return torch.mm(rows, others.to(rows.dtype).T, out_dtype=torch.float32)
    return rows.float() @ others.float().T


def scores(rows: Tensor, centroids: Tensor) -> Iterator[Tensor]:
    """Block by block of the rows `x . c - ||c||^2 / 2` (n, K): highest for the nearest centroid."""
    half_squares = centroids.square().sum(1) / 2
    for part in rows.split(max(1, SCORES // len(centroids))):
        yield products(part, centroids).sub_(half_squares)


def best_centroids(rows: Rows, starts: Tensor, iterations: int, limit: float) -> Tensor:
    """Lloyd passes over all `rows` from `starts` (runs, K, D); returns the centroids (K, D) of the run with the lowest inertia.

    After every second pass the worse half of the runs is dropped. The last one stops when its centroids move by no more than
    `limit` (squared, all together), or after `iterations` passes.
    """
    centroids = starts
    for step in range(1, iterations + 1):
        sums, counts, inertia = one_pass(rows, centroids)
        fill_empty(rows, centroids, sums, counts)
        moved = torch.where(counts[..., None] > 0, sums / counts[..., None].clamp_min(1), centroids).float()
        if rows.spherical:
            moved = F.normalize(moved, dim=2)
        shift = (moved - centroids).square().sum((1, 2))
        keep = 1 if step == iterations else -(-len(inertia) // 2) if step % ROUND == 0 else len(inertia)
        best = inertia.argsort()[:keep]
        centroids = moved[best]
        if keep == 1 and float(shift[best]) <= limit:
            break
    return centroids[0]


def one_pass(rows: Rows, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over all rows, fp64: their sum per group (runs, K, D), their number per group (runs, K), the inertia (runs,)."""
    runs, groups, width = centroids.shape
    flat, bins = centroids.flatten(0, 1), runs * groups
    offsets = torch.arange(0, bins, groups, device=flat.device)
    sums = torch.zeros(bins, width, dtype=torch.float64, device=flat.device)
    counts, inertia = sums.new_zeros(bins), sums.new_zeros(runs)
    for batch in rows:
        found = [block.unflatten(1, (runs, groups)).max(2) for block in scores(batch, flat)]
        best = torch.cat([values for values, _ in found])  # (n, runs)
        inertia += sum_of_squares(batch) - 2 * best.sum(0, dtype=torch.float64)
        labels = (
            torch.cat([numbers for _, numbers in found]) + offsets
        ).flatten()  # row 0 in every run, row 1 in every run, ...
        number = labels.bincount(minlength=bins)
        members = labels.argsort() // runs  # row numbers, group by group
        sums += F.embedding_bag(members, batch.float(), number.cumsum(0) - number, mode="sum")
        counts += number
    for tensor in (sums, counts, inertia):
        rows.over_processes(tensor)
    return sums.view(runs, groups, width), counts.view(runs, groups), inertia


def fill_empty(rows: Rows, centroids: Tensor, sums: Tensor, counts: Tensor) -> None:
    """Move into each empty group, in place, one of the rows farthest from their own centroids, as scikit-learn does."""
    for run in (counts == 0).any(1).nonzero().flatten().tolist():
        empty = (counts[run] == 0).nonzero().flatten()
        far = farthest(rows, centroids[run], len(empty))
        for group, row, owner in zip(empty.tolist(), far[:, 2:], far[:, 1].long().tolist(), strict=True):
            sums[run, owner] -= row
            counts[run, owner] -= 1
            sums[run, group] = row
            counts[run, group] = 1


def farthest(rows: Rows, centroids: Tensor, count: int) -> Tensor:
    """(count, 2 + D) fp64, farthest first: squared distance to the own centroid, its group, the row."""
    best = torch.zeros(rows.processes, count, 2 + centroids.shape[1], dtype=torch.float64, device=centroids.device)
    best[rows.rank, :, 0] = -1
    for batch in rows:
        labels, _, distances = membership(batch, centroids, 1.0)
        candidates = torch.cat([best[rows.rank], torch.cat([distances[:, None], labels[:, None], batch], dim=1)])
        best[rows.rank] = candidates[candidates[:, 0].topk(count).indices]
    everything = rows.over_processes(best).flatten(0, 1)
    return everything[everything[:, 0].topk(count).indices]


def own_distances(rows: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of each row to the centroid of its group (n,)."""
    parts = zip(rows.split(SAMPLE), labels.split(SAMPLE), strict=True)
    return torch.cat([(part.float() - centroids[groups]).square().sum(1) for part, groups in parts])


def membership(rows: Tensor, centroids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row (n,): its group, the confidence in it (see `Clustering`), the squared distance to its centroid."""
    labels, confidence = [], []
    for block in scores(rows, centroids):
        best, label = block.max(1)
        labels.append(label)
        confidence.append(1 / block.sub_(best[:, None]).div_(temperature).exp_().sum(1))
    label = torch.cat(labels)
    return label, torch.cat(confidence), own_distances(rows, centroids, label)


def variance_between(sample: Tensor, centroids: Tensor) -> float:
    """Variance per direction of the sampled rows around their own centroids, in the space that the centred centroids span."""
    labels, _, _ = membership(sample, centroids, 1.0)
    _, lengths, directions = torch.linalg.svd(centroids - centroids.mean(0), full_matrices=False)
    spanned = directions[lengths > 1e-5 * lengths[0]]
    if len(spanned) == 0:
        return 1.0  # one group, or all rows equal: nothing to be unsure of
    inside = (sample - centroids[labels]) @ spanned.T
    return max(float(inside.square().mean()), 1e-12)
