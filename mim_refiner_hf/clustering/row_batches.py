"""Rows of any number, batch by batch, over all processes: what k-means passes over.

    rows = Rows(features, spherical=True)                  # a tensor (N, D), or `Batches`
    sample, variance = survey(rows, num_clusters, seed=0, most=4096)
    low = rows.along(directions)                           # (N, d)

This file travels with saved models: it imports only torch and NumPy.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Shapes below: N rows in all, n rows of a batch, S sampled rows, D their width, d directions.


class Batches(Protocol):
    """Rows that need not fit into memory.

    Iterating, again and again, gives all of them in one order as tensors (n, D).
    """

    def __len__(self) -> int:
        """Number of ROWS, not of batches."""

    def __iter__(self) -> Iterator[Tensor]:
        """From the first batch on, each time. A batch's device is where the work is done."""


class ArrayBatches:
    """`Batches` of anything with a length and slices.

    A tensor, `np.memmap`, or a column of a `datasets.Dataset` in torch format.
    """

    def __init__(self, array: Any, rows_per_batch: int = 16384) -> None:
        self.array = array
        self.rows_per_batch = rows_per_batch

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self), self.rows_per_batch):
            part = self.array[start : start + self.rows_per_batch]
            yield part if isinstance(part, Tensor) else torch.tensor(np.asarray(part))


# --- rows ----------------------------------------------------------------------------------------


def prepared(rows: Tensor, spherical: bool) -> Tensor:
    """(n, D) in bf16 or fp32, of length 1 if `spherical`; ValueError for anything but a matrix."""
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"features has shape {tuple(rows.shape)}, but must be (rows, width)")
    rows = rows.detach()
    if rows.dtype != torch.bfloat16:
        rows = rows.float()
    if not spherical:
        return rows
    return F.normalize(rows.float(), dim=1).to(rows.dtype)


def bad_rows(rows: Tensor) -> Tensor:
    """Number of rows with a value that is not finite."""
    return (~rows.isfinite()).any(1).sum()


def refuse_bad(bad: Tensor, count: int) -> None:
    """ValueError when `bad` of `count` rows are not finite."""
    if bad > 0:
        raise ValueError(
            f"{int(bad)} of {count} rows hold NaN or infinity; "
            "check the model that made them, or leave them out"
        )


def sum_of_squares(rows: Tensor) -> Tensor:
    """Of all values of rows (n, D), fp64, by way of the rows' lengths.

    Summing the squares in fp64 takes longer than the products with 100 centroids.
    """
    return torch.linalg.vector_norm(rows.float(), dim=1).double().square().sum()


def products(rows: Tensor, others: Tensor) -> Tensor:
    """Rows (n, D) times others (m, D): (n, m) fp32.

    On a GPU bf16 rows are multiplied as such, with fp32 sums.
    """
    if rows.dtype == torch.bfloat16 and rows.is_cuda:
        return torch.mm(rows, others.to(rows.dtype).T, out_dtype=torch.float32)
    return rows.float() @ others.float().T


class Rows:
    """The prepared rows, batch by batch, and sums over the processes that share them.

    A tensor is this process's alone; `Batches` are this process's share of all rows in its job.
    """

    def __init__(self, features: Tensor | Batches, spherical: bool) -> None:
        self.spherical = spherical
        self.streamed = not isinstance(features, Tensor)
        self.batches: Batches
        if isinstance(features, Tensor):
            self.batches = ArrayBatches(prepared(features, spherical))
        else:
            self.batches = features

        self.processes = 1
        self.rank = 0
        if self.streamed and dist.is_available() and dist.is_initialized():
            self.processes = dist.get_world_size()
            self.rank = dist.get_rank()

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            yield prepared(batch, self.spherical) if self.streamed else batch

    def along(self, directions: Tensor) -> "Rows":
        """The prepared rows projected on directions (D, d); in memory where these are."""
        low = _Projected(self, directions)
        return Rows(low if self.streamed else torch.cat(list(low)), spherical=False)

    def over_processes(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over the processes."""
        if self.processes > 1:
            dist.all_reduce(tensor)
        return tensor


class _Projected:
    """`Batches` of rows along some directions."""

    def __init__(self, rows: Rows, directions: Tensor) -> None:
        self.rows = rows
        self.directions = directions

    def __len__(self) -> int:
        return len(self.rows.batches)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.rows:
            yield products(batch, self.directions.T)


# --- the first pass -------------------------------------------------------------------------------


def survey(rows: Rows, num_clusters: int, seed: int, most: int) -> tuple[Tensor, float]:
    """The first pass over the rows, with all checks.

    Returns:
        A random sample (S, D) fp32, of `most` rows if there are so many, the same on all processes;
        and the mean variance of a feature.

    Raises:
        ValueError: for no rows, too few for `num_clusters`, rows that are not finite, or a length
            that does not count them.
    """
    first = next(iter(rows), None)
    if first is None:
        raise ValueError("there are no rows to cluster; every process needs some")
    device = first.device
    width = first.shape[1]

    # where the rows of this process begin among all
    lengths = torch.zeros(rows.processes, dtype=torch.int64, device=device)
    lengths[rows.rank] = len(rows.batches)
    rows.over_processes(lengths)
    count = int(lengths.sum())
    position = int(lengths[: rows.rank].sum())
    if not 1 <= num_clusters <= count:
        raise ValueError(
            f"num_clusters={num_clusters} must lie between 1 and the {count} rows to cluster"
        )

    size = min(count, most)
    drawn = np.random.default_rng(seed).choice(count, size, replace=False, shuffle=False)
    picks = torch.from_numpy(np.sort(drawn)).to(device)
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

    # each process filled in its own rows, so that the sum is the whole sample
    for tensor in (bad, seen, total, squares, sample):
        rows.over_processes(tensor)
    refuse_bad(bad, count)
    if int(seen) != count:
        raise ValueError(
            f"the batches gave {int(seen)} rows, but their length says {count}; "
            "the length must count rows"
        )
    variance = (squares / count - (total / count).square().sum()) / width
    return sample, float(variance)
