"""How sure a group is: the share of second clusterings that would put a row into the same group.

    seconds = [labels of the same rows by another seed, labels learnt from other rows, ...]
    shares = agreement(labels, seconds, num_clusters)             # (N,) of each row, 0 to 1
    calibration = fitted(labels, log_odds, shares, num_clusters)  # K + 1 numbers
    calibration.confidence(labels, log_odds)                      # (N,), also of new rows

A posterior probability only says how near a row is to the border of its group as it was drawn. Had
k-means begun elsewhere, or seen other rows, the borders would lie elsewhere. So the rows are
clustered again a few times, and two things are fitted to what comes back (Platt 1999): how much the
distance from the border counts, and for each group how stable it is as a whole.

This file travels with saved models: it imports only torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RESAMPLED = 16384
"""Rows that are clustered again, at most, or 16 per group when that is more."""

Again = Callable[[Tensor, int], Tensor]
"""Clusters rows (n, D) by a seed and gives the groups (S,) of all sampled rows."""

# log odds beyond which a row is as far from a border as can be
_FARTHEST = 40.0
# pull of all groups' mean on the offset of one, as a share of an average group's rows
_PULL = 0.03
_NEWTON_STEPS = 30
# share of the rows that most second clusterings learn from; every fourth takes all of them
_RESAMPLE = 2 / 3
_ALL_ROWS = 4
# keeps the seeds of second clusterings apart from those that people give
_SEEDS = 1_000_003

# Shapes below: S sampled rows, N rows, K groups.


@dataclass(frozen=True, eq=False)
class Calibration:
    """From how far a row is from the border of its group to how sure the group is.

    Attributes:
        slope: what one unit of log odds counts, 0 or more.
        offsets: (K,) fp32 on the CPU, how stable each group is: its log odds of agreement for a row
            that lies on the border.
    """

    slope: float
    offsets: Tensor

    def confidence(self, labels: Tensor, log_odds: Tensor) -> Tensor:
        """In (0, 1) for the group (N,) of each row and the log odds of it (N,) as in `fitted`."""
        offsets = self.offsets.to(labels.device)[labels]
        return (offsets + self.slope * _bounded(log_odds)).sigmoid()

    def joined(self, groups: Tensor, counts: Tensor) -> "Calibration":
        """When group g is called `groups[g]` (K,), -1 for none, from now on: means by `counts`."""
        kept = groups >= 0
        weights = counts[kept].double()
        number = int(groups.max()) + 1
        total = torch.zeros(number, dtype=torch.float64).index_add_(0, groups[kept], weights)
        offsets = weights * self.offsets[kept]
        sums = torch.zeros(number, dtype=torch.float64).index_add_(0, groups[kept], offsets)
        return Calibration(self.slope, (sums / total.clamp_min(1)).float())


def _bounded(log_odds: Tensor) -> Tensor:
    return log_odds.clamp(-_FARTHEST, _FARTHEST)


def second_clusterings(
    sample: Tensor, num_clusters: int, again: Again, refits: int, seed: int, *, resample: bool
) -> list[Tensor]:
    """The groups of the sampled rows (S, D) by `refits` more clusterings.

    Three of four learn from two thirds of the rows; with `resample` all do. Each has a seed of its
    own.
    """
    found = []
    for refit in range(refits):
        own_seed = _SEEDS * (seed + 1) + refit
        rows = sample
        if resample or refit % _ALL_ROWS:
            order = torch.randperm(len(sample), generator=torch.Generator().manual_seed(own_seed))
            size = max(num_clusters, round(_RESAMPLE * len(sample)))
            rows = sample[order[:size].to(sample.device)]
        found.append(again(rows, own_seed))
    return found


def agreement(labels: Tensor, seconds: Sequence[Tensor], num_clusters: int) -> Tensor:
    """Of each row the share (S,) of the second clusterings that leave it in its group (S,)."""
    stays = [renamed(second, labels, num_clusters) == labels for second in seconds]
    return torch.stack(stays).double().mean(0)


def renamed(second: Tensor, first: Tensor, num_clusters: int) -> Tensor:
    """The groups (S,) of a second clustering under the names of the first.

    One to one, those that share the most rows first. The best match of all (Hungarian method) would
    agree by 0.005 more at most on five sets of images, and takes SciPy. A group without a partner
    is -1.
    """
    cells = second * num_clusters + first
    filled, sizes = cells.unique(return_counts=True)
    names = [-1] * num_clusters
    free = [True] * num_clusters
    for cell in filled[sizes.argsort(descending=True, stable=True)].tolist():
        group, name = divmod(cell, num_clusters)
        if names[group] < 0 and free[name]:
            names[group] = name
            free[name] = False
    return torch.tensor(names)[second]


def fitted(labels: Tensor, log_odds: Tensor, shares: Tensor, num_clusters: int) -> Calibration:
    """The calibration under which the confidence of rows is their share of agreement, on average.

    A logistic regression with one slope and an offset per group, which is pulled a little towards
    the mean of all groups. One imagined row of each group lies on its border and stays in every
    second clustering out of two: where all rows are far from any border and stay, the confidence of
    a new row that is not is still low.

    Args:
        labels: the group of each row (S,).
        log_odds: of the posterior probability of that group (S,).
        shares: what `agreement` gives (S,).
    """
    least = 0.5 / len(shares)
    imagined = torch.zeros(num_clusters, dtype=torch.float64)
    target = torch.cat([shares.double().clamp(least, 1 - least), imagined + 0.5])
    odds = torch.cat([_bounded(log_odds).double(), imagined])
    labels = torch.cat([labels, torch.arange(num_clusters)])
    slope, offsets = _regression(labels, odds, target, num_clusters)
    # nearer to the border is never surer
    if not slope >= 0:
        slope, offsets = _regression(labels, torch.zeros_like(odds), target, num_clusters)
        slope = 0.0
    return Calibration(slope, offsets.float())


def _regression(
    labels: Tensor, odds: Tensor, target: Tensor, num_clusters: int
) -> tuple[float, Tensor]:
    """Slope and offsets (K,), by Newton's method in fp64 on standardised log odds."""
    centre = odds.mean()
    scale = odds.std(correction=0).clamp_min(1e-6)
    points = (odds - centre) / scale
    pull = _PULL * len(labels) / num_clusters

    def by_group(values: Tensor) -> Tensor:
        return torch.zeros(num_clusters, dtype=torch.float64).index_add_(0, labels, values)

    def logits(common: Tensor, own: Tensor) -> Tensor:
        return common[0] + own[labels] + common[1] * points

    def loss(common: Tensor, own: Tensor) -> float:
        values = logits(common, own)
        likelihood = F.softplus(values) - target * values
        return float(likelihood.sum() + pull * own.square().sum() / 2)

    common = torch.zeros(2, dtype=torch.float64)  # offset, slope
    own = torch.zeros(num_clusters, dtype=torch.float64)
    lowest = loss(common, own)
    for _ in range(_NEWTON_STEPS):
        expected = logits(common, own).sigmoid()
        error = expected - target
        weight = expected * (1 - expected)

        # the Hessian is diagonal in the groups' own offsets, bordered by the two common numbers
        diagonal = by_group(weight) + pull
        border = torch.stack([by_group(weight), by_group(weight * points)], dim=1)  # (K, 2)
        corner = torch.diag(border.sum(0))
        corner[0, 1] = corner[1, 0] = border[:, 1].sum()
        corner[1, 1] = (weight * points.square()).sum()
        own_slope = by_group(error) + pull * own
        common_slope = torch.stack([error.sum(), (error * points).sum()])

        solved = border / diagonal[:, None]
        reduced = corner - border.T @ solved + 1e-6 * torch.eye(2, dtype=torch.float64)
        common_step = torch.linalg.solve(reduced, common_slope - solved.T @ own_slope)
        own_step = (own_slope - border @ common_step) / diagonal

        # the whole step, or the half, or the half of that: as soon as it leads down
        reached = loss(common - common_step, own - own_step)
        while reached > lowest and float(common_step.abs().max()) > 1e-9:
            common_step = common_step / 2
            own_step = own_step / 2
            reached = loss(common - common_step, own - own_step)
        if reached >= lowest:
            break
        common = common - common_step
        own = own - own_step
        lowest = reached

    slope = common[1] / scale
    return float(slope), common[0] + own - slope * centre


def sample_size(num_clusters: int) -> int:
    """Rows that are clustered again, of more than that many."""
    return max(RESAMPLED, 16 * num_clusters)
