"""Where k-means begins: greedy k-means++ on a sample, several times, and the best of them.

    sample, variance = survey(rows, num_clusters, seed, start_size(num_clusters))
    start = best_start(sample, num_clusters, runs=10, seed=0, ...)       # (K, D)

This file travels with saved models: it imports only torch and its flat neighbours.
"""

import math

import torch
from torch import Tensor

from .lloyd import Rows, best_centroids

# Shapes below: S sampled rows, D their width, K groups, R runs (restarts).

# Rows among which the starts are chosen, or some per group when that is more: from 4 rows per group
# the inertia ends 3 % higher than from 20, and from 50 no lower (K = 1000).
_SAMPLE = 4096
_PER_GROUP = 40
# of many groups fewer per group, once there are so many rows: for time, and for bounded memory
_FEWER_PER_GROUP = ((20_000, 20), (2**17, 4))
# steps of k-means++ whose candidates are drawn at once
_DRAWN = 16
# Groups up to which there are as many restarts as asked for; of more groups as many as take the
# same time, 1 of 10 for 1000. The more groups there are, the less one restart differs from another.
_FULL_RUNS = 100


def start_size(num_clusters: int) -> int:
    """Rows among which the starts are chosen, of more than that many."""
    size = _PER_GROUP * num_clusters
    for rows, per_group in _FEWER_PER_GROUP:
        size = min(size, max(rows, per_group * num_clusters))
    return max(_SAMPLE, size)


def best_start(
    sample: Tensor, num_clusters: int, *, runs: int, seed: int, spherical: bool, limit: float
) -> Tensor:
    """The centroids (K, D) of the best restart among the sampled rows (S, D).

    Args:
        runs: restarts for at most 100 groups, see `kmeans`.
        spherical, limit: as of `Rows` and `best_centroids`.
    """
    begun = min(runs, max(1, runs * _FULL_RUNS // num_clusters))
    starts = greedy_starts(sample, num_clusters, begun, torch.Generator().manual_seed(seed))
    # two for each halving of the restarts, and two for the last one
    passes = 2 * begun.bit_length() + 2
    return best_centroids(Rows(sample, spherical), starts, passes, limit, strides=True)


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
