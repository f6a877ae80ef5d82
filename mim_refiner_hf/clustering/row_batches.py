"""Rows of any number, batch by batch, over all processes: what k-means passes over.

    rows = Rows(features, spherical=True)                  # a tensor (N, D), or `Batches`
    sample, mean, variance = survey(rows, num_clusters, seed=0, most=4096)
    low = rows.along(directions)                           # (N, d)

This file travels with saved models: it imports only torch and NumPy.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Shapes below: N rows in all, n rows of a batch, S sampled rows, D their width, d directions.

# values whose squares, and sums of them, have all their bits in fp32
_SMALLEST = 1e-15
_LARGEST = 1e15
# sums of rows that are sums of fp32 values each
_PARTS = 64
# Rows whose mean is farther from 0 than so many times their own length around it lose in fp32 what
# tells them apart: from a thousand times on.
_FAR = 10.0


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
    return _unit(rows.float()).to(rows.dtype)


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1, and of length 0 where they are zero; of any size."""
    lengths = torch.linalg.vector_norm(rows, dim=1)
    # the squares of others leave fp32
    if bool(((lengths < 1e3 * _SMALLEST) | (lengths > _LARGEST)).any()):
        tiny = torch.finfo(rows.dtype).tiny
        rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(tiny)
    return F.normalize(rows, dim=1)


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


def column_sums(rows: Tensor) -> Tensor:
    """Of rows (n, D) those of each column (D,), fp64, by way of 64 sums in fp32 or so.

    Summing all values in fp64 takes six times as long.
    """
    parts = rows.float().chunk(_PARTS)
    return torch.stack([part.sum(0) for part in parts]).sum(0, dtype=torch.float64)


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
        return Rows(self._changed(lambda batch: products(batch, directions.T)), spherical=False)

    def around(self, middle: Tensor) -> "Tensor | Batches":
        """The rows less `middle` (D,), fp32; in memory where these are."""
        return self._changed(lambda batch: batch.float() - middle)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Tensor | Batches":
        changed = _Changed(self, change)
        return changed if self.streamed else torch.cat(list(changed))

    def of_first(self, tensor: Tensor) -> Tensor:
        """What the first process found, on all of them: a GPU may add in another order."""
        return self.over_processes(tensor if self.rank == 0 else torch.zeros_like(tensor))

    def over_processes(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over the processes."""
        if self.processes > 1:
            dist.all_reduce(tensor)
        return tensor


class _Changed:
    """`Batches` of other rows, each batch after a change."""

    def __init__(self, rows: Rows, change: Callable[[Tensor], Tensor]) -> None:
        self.rows = rows
        self.change = change

    def __len__(self) -> int:
        return len(self.rows.batches)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.rows:
            yield self.change(batch)


# --- the first pass -------------------------------------------------------------------------------


def is_far(middle: Tensor, variance: float) -> bool:
    """Whether rows have to be moved to be told apart in fp32.

    Args:
        middle: their mean (D,).
        variance: their squared distance from it, on average.
    """
    return float(middle.double().square().sum()) > _FAR**2 * variance


def survey(rows: Rows, num_clusters: int, seed: int, most: int) -> tuple[Tensor, Tensor, float]:
    """The first pass over the rows, with all checks.

    Returns:
        A random sample (S, D) fp32, of `most` rows if there are so many, the same on all processes;
        the mean row (D,) fp32; and the mean variance of a feature.

    Raises:
        ValueError: for no rows, too few for `num_clusters`, rows that are not finite or too
            large or small to be squared, or a length that does not count them.
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
    # of each process
    peaks = torch.zeros(rows.processes, dtype=torch.float64, device=device)
    for batch in rows:
        here = (picks >= position) & (picks < position + len(batch))
        sample[here] = batch[picks[here] - position].float()
        total += column_sums(batch)
        squares += sum_of_squares(batch)
        # NaN and infinity are among the extremes, which are found 20 times faster than counted
        extreme = torch.stack(batch.aminmax()).abs().amax().double()
        if not bool(extreme.isfinite()):
            bad += bad_rows(batch)
        peaks[rows.rank] = torch.maximum(peaks[rows.rank], extreme)
        seen += len(batch)
        position += len(batch)

    # each process filled in its own rows, so that the sum is the whole sample
    for tensor in (bad, seen, peaks, total, squares, sample):
        rows.over_processes(tensor)
    refuse_bad(bad, count)
    if int(seen) != count:
        raise ValueError(
            f"the batches gave {int(seen)} rows, but their length says {count}; "
            "the length must count rows"
        )
    peak = float(peaks.max())
    if peak > 0 and not _SMALLEST < peak < _LARGEST:
        raise ValueError(
            f"the largest value is {peak:.0e}, whose square is not exact in fp32; bring all "
            f"to values between {_SMALLEST:.0e} and {_LARGEST:.0e} by one factor"
        )
    mean = total / count
    variance = (squares / count - mean.square().sum()) / width
    return sample, mean.float(), float(variance)
