"""Where Lloyd's passes begin: greedy k-means++ on a sample, the best of several, strides, swaps.

    sample, mean, variance = survey(rows, num_clusters, seed, start_size(num_clusters))
    start = good_start(rows, sample, num_clusters, runs=10, seed=0, passes=25)       # (K, D)

This file travels with saved models: it imports only torch and its flat neighbours.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .lloyd import ROUND, highest, means_along, one_pass, scores, stride
from .row_batches import Rows, products

# Shapes below: S sampled rows, D their width, K groups, R runs (restarts).

# Rows among which the starts are chosen, or some per group when that is more: from 4 rows per group
# the inertia ends 3 % higher than from 20, and from 50 no lower (K = 1000).
_SAMPLE = 4096
_PER_GROUP = 40
# of many groups fewer per group, once there are so many rows: for time, and for bounded memory
_FEWER_PER_GROUP = ((20_000, 20), (2**17, 4))
# steps of k-means++ whose candidates are drawn at once
_DRAWN = 16
# Groups up to which there are as many restarts as asked for; with the square of more of them they
# become fewer, 3 of 10 for 50 and 1 for 100. The more groups there are, the longer a restart takes
# and the less one differs from another. Swaps mend what a restart gets wrong, in less time.
_FULL_RUNS = 30
# rows that a centroid may be swapped for, and what that has to gain of a group's mean inertia
_SWAPS = 64
_WORTH_A_SWAP = 0.1
# groups from which on they are first looked for along few directions
_MANY = 100
# the directions along which many groups are looked for hold this share of the variance
_VARIANCE = 0.95
# What is across them may be this share of what the groups leave along them. With more, as where
# rows lie along one direction, groups would slice that one, and Lloyd's passes do not mend it.
_ACROSS = 0.5
# sampled rows that tell it
_ENOUGH = 2048
# Strides end when two of them lower the inertia by less than this share; along a part of the
# directions sooner, as what they find is not yet the end.
_WORTH = 2e-4
_WORTH_ALONG = 3e-3


def start_size(num_clusters: int) -> int:
    """Rows among which the starts are chosen, of more than that many."""
    size = _PER_GROUP * num_clusters
    for rows, per_group in _FEWER_PER_GROUP:
        size = min(size, max(rows, per_group * num_clusters))
    return max(_SAMPLE, size)


def good_start(
    rows: Rows, sample: Tensor, num_clusters: int, *, runs: int, seed: int, passes: int
) -> Tensor:
    """Centroids (K, D) that leave little for Lloyd's passes over all `rows`.

    Of many groups all is done along the directions that hold most of the variance of the sample
    (S, D), where these are few and hold most of what the groups leave too: what the rows are in
    all others is taken for the same, which is mended by Lloyd's passes.

    Args:
        runs: restarts for at most 30 groups, see `kmeans`.
        passes: strides over all rows, at most.
    """
    # of few rows a restart costs less, and one differs more from another
    few_rows = max(_SAMPLE, len(sample)) / len(sample)
    share = few_rows * (_FULL_RUNS / num_clusters) ** 2
    begun = min(runs, max(1, int(runs * share)))
    generator = torch.Generator().manual_seed(seed)
    # until one restart is left
    few = ROUND * begun.bit_length()

    directions = None
    if num_clusters >= _MANY and len(sample) * num_clusters >= sample.shape[1] ** 2 / 2:
        directions = principal_directions(sample)
    if directions is not None:
        low = sample @ directions
        starts = greedy_starts(low, num_clusters, begun, generator)
        start = stride(Rows(low, spherical=False), starts, few, _WORTH_ALONG)
        start = rows.of_first(swapped(low, start, generator))
        if _groups_lie_along(sample, low, start):
            start = stride(rows.along(directions), start[None], passes, _WORTH_ALONG)
            return means_along(rows, directions, start)

    starts = greedy_starts(sample, num_clusters, begun, generator)
    start = stride(Rows(sample, rows.spherical), starts, few, _WORTH)
    if num_clusters > _FULL_RUNS:
        start = rows.of_first(swapped(sample, start, generator))
    return stride(rows, start[None], passes, _WORTH)


def _groups_lie_along(sample: Tensor, low: Tensor, centroids: Tensor) -> bool:
    """Whether what groups (K, d) leave of `low` (S, d) is more than `low` leaves of the sample.

    Else the groups would slice the rows along their longest direction, whatever is across.
    """
    part = low[:: max(1, len(low) // _ENOUGH)]
    left = one_pass(Rows(part, spherical=False), centroids[None])[2] / len(part)
    across = sample.var(0, correction=0).sum() - low.var(0, correction=0).sum()
    return float(across) < _ACROSS * float(left)


def principal_directions(sample: Tensor) -> Tensor | None:
    """The directions (D, d) that hold 95 % of the variance of the sampled rows (S, D).

    None where that takes more than half of them all.
    """
    width = sample.shape[1]
    # of one column it would be a number
    covariance = sample.T.cov(correction=0).view(width, width)
    variances, directions = torch.linalg.eigh(covariance)
    # they ascend: left out are the first, as long as they are 5 % together
    left_out = int((variances.cumsum(0) < (1 - _VARIANCE) * variances.sum()).sum())
    return directions[:, left_out:].contiguous() if 2 * left_out >= width else None


def greedy_starts(
    sample: Tensor, num_clusters: int, runs: int, generator: torch.Generator
) -> Tensor:
    """Greedy k-means++ among the sampled rows (S, D), for each run by itself: (R, K, D).

    Each step draws 2 + ln K candidates with a probability proportional to the squared distance to
    the nearest row chosen so far, and takes the one that lowers the sum of these distances most
    (Arthur & Vassilvitskii 2007, section 5).
    """
    squares = sample.square().sum(1)
    chosen = [_greedy_rows(sample, squares, num_clusters, generator) for _ in range(runs)]
    return sample[torch.stack(chosen)]


def _greedy_rows(
    sample: Tensor, squares: Tensor, num_clusters: int, generator: torch.Generator
) -> Tensor:
    """The numbers (K,) of the sampled rows that one run starts from.

    One matrix product gives the distances of many candidates: they are drawn for the next _DRAWN
    steps at once. When its step comes, a candidate is taken with the probability by which its own
    distance has fallen since, so that it is drawn as if it had been just then (rejection sampling).
    """
    size = len(sample)
    trials = 2 + int(math.log(num_clusters))
    chosen = torch.empty(num_clusters, dtype=torch.int64, device=sample.device)

    def distances(rows: Tensor) -> Tensor:
        """Squared, from the rows numbered `rows` (n,) to all sampled rows (n, S)."""
        cross = torch.addmm(squares, sample[rows], sample.T, alpha=-2)
        return cross.add_(squares[rows, None]).clamp_(min=0)

    chosen[0] = int(torch.rand((), generator=generator) * size)
    nearest = distances(chosen[:1])[0]  # (S,), to the nearest chosen row
    step = 1
    while step < num_clusters:
        drawn = trials * min(_DRAWN, num_clusters - step)
        draws = torch.rand(2, drawn, generator=generator, dtype=torch.float64).to(sample.device)
        mass = nearest.cumsum(0, dtype=torch.float64)
        candidates = torch.searchsorted(mass, draws[0] * mass[-1], right=True)
        candidates = candidates.clamp_(max=size - 1)
        bars = draws[1] * nearest[candidates]
        far = distances(candidates)

        # until fewer are left than a step looks at; the first step finds all of them
        first = 0
        while step < num_clusters:
            taken = (nearest[candidates[first:]] >= bars[first:]).nonzero()[:trials, 0] + first
            if len(taken) < trials:
                break
            lowered = torch.minimum(far[taken], nearest)
            best = lowered.sum(1).argmin()
            nearest = lowered[best]
            chosen[step] = candidates[taken[best]]
            first = int(taken[-1]) + 1
            step += 1
    return chosen


def swapped(sample: Tensor, centroids: Tensor, generator: torch.Generator) -> Tensor:
    """Centroids (K, D) some of which were swapped for sampled rows (S, D) that serve better.

    Where two centroids share a group and another two groups share one, no pass of Lloyd's mends it.
    So rows are drawn as for k-means++, and each takes the place of the centroid whose rows lose
    least by it, where that lowers the inertia (Lattanzi & Sohler 2019).
    """
    centroids = centroids.clone()
    squares = sample.square().sum(1)
    found = zip(*_two_highest(sample, centroids), strict=True)
    best, label, next_best, rival = map(torch.cat, found)
    # squared distances to the nearest centroid, and to the next
    nearest = (squares - 2 * best).clamp_(min=0)
    second = (squares - 2 * next_best).clamp_(min=0)
    worth = _WORTH_A_SWAP * float(nearest.sum()) / len(centroids)

    draws = torch.rand(_SWAPS, generator=generator, dtype=torch.float64).to(sample.device)
    mass = nearest.cumsum(0, dtype=torch.float64)
    drawn = torch.searchsorted(mass, draws * mass[-1], right=True).clamp_(max=len(sample) - 1)
    far = squares + squares[drawn, None] - 2 * products(sample[drawn], sample)
    for row, distances in zip(drawn, far.clamp_(min=0), strict=True):
        # what the rows of each centroid lose without it
        lost = torch.minimum(second, distances) - torch.minimum(nearest, distances)
        losses = lost.new_zeros(len(centroids)).index_add_(0, label, lost)
        out = losses.argmin()
        if (nearest - distances).clamp_(min=0).sum() - losses[out] <= worth:
            continue
        centroids[out] = sample[row]
        # its rows go to the next, and who is next to these is not looked up again
        gone = label == out
        nearest = torch.where(gone, second, nearest)
        label = torch.where(gone, rival, label)
        second = second.masked_fill(gone | (rival == out), torch.inf)
        near = distances < nearest
        second = torch.where(near, nearest, second)
        rival = torch.where(near, label, rival)
        nearest = torch.where(near, distances, nearest)
        label = torch.where(near, out, label)
    return centroids


def _two_highest(
    sample: Tensor, centroids: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """In blocks of rows: the highest score and whose it is, and the next and whose (n,)."""
    for block in scores(sample, centroids):
        best, label = highest(block)
        block.scatter_(1, label[:, None], -torch.inf)
        yield best, label, *highest(block)
