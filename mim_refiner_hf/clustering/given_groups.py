"""Groups that people have put together: who is in one stays, all others go to the nearest.

    given = torch.tensor([0, 0, 1, -1, -1])               # (N,), -1: to be assigned
    groups = group_as_given(features, given, num_clusters=2)
    groups.assignments, groups.confidence                 # (N,) each

The centroid of a group is the mean of the rows that it was given. The confidence means what that of
`kmeans` means: the share of second clusterings, each k-means from these centroids over two thirds
of the rows, that would leave a row in its group. So a row that was moved by hand to where the
features would not have it stays there, with a low confidence. This file imports only torch and its
flat neighbours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .confidence import Calibration, agreement, fitted, sample_size, second_clusterings
from .k_means import Clustering, kmeans
from .lloyd import membership, own_distances, scores, variance_between
from .row_batches import bad_rows, prepared, refuse_bad

# Shapes below: N rows, D their width, K groups, S sampled rows.


def group_as_given(
    features: Tensor, given: Tensor, num_clusters: int, *, seed: int = 0, refits: int = 8
) -> Clustering:
    """The given groups as a `Clustering` of all rows; `assign` sorts further rows into them.

    Args:
        features: (N, D); compared by the cosine, as `kmeans` does.
        given: the group (N,) int64 of each row, -1 for a row that is to be assigned; every group
            has at least one row.
        num_clusters: K.
        seed, refits: of the second clusterings, as for `kmeans`.

    Raises:
        ValueError: for rows with NaN or infinity, groups that are not 0 to K - 1, or an empty one.
    """
    rows = prepared(features, spherical=True)
    refuse_bad(bad_rows(rows), len(rows))
    kept = given >= 0
    counts = given[kept].bincount(minlength=num_clusters)
    if given.shape != (len(rows),) or len(counts) != num_clusters or not bool((counts > 0).all()):
        raise ValueError(
            f"given has shape {tuple(given.shape)} and counts {counts.tolist()}, but must hold a "
            f"group from 0 to {num_clusters - 1}, or -1, of each of {len(rows)} rows, none empty"
        )

    # the direction of the mean of its rows
    sums = torch.zeros(num_clusters, rows.shape[1], dtype=torch.float64)
    sums.index_add_(0, given[kept], rows[kept].double())
    centroids = F.normalize(sums, dim=1).float()

    sampled = _sample(len(rows), sample_size(num_clusters), seed)
    temperature = variance_between(rows[sampled], centroids)
    nearest, _, _ = membership(rows, centroids, temperature)
    labels = torch.where(kept, given, nearest)
    log_odds = log_odds_of(rows, centroids, labels, temperature)

    calibration = None
    if refits > 0 and num_clusters > 1:
        calibration = _calibrated(
            rows[sampled], labels[sampled], log_odds[sampled], centroids, refits, seed
        )
    confidence = log_odds.sigmoid()
    if calibration is not None:
        confidence = calibration.confidence(labels, log_odds)
    inertia = float(own_distances(rows, centroids, labels).double().sum())
    return Clustering(
        labels, centroids, confidence, inertia, True, temperature, calibration=calibration
    )


def log_odds_of(rows: Tensor, centroids: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The log odds (N,) of the posterior probability of any group (N,), not only the nearest."""
    found = []
    start = 0
    for block in scores(rows, centroids):
        own = labels[start : start + len(block), None]
        start += len(block)
        rivals = (block - block.gather(1, own)) / temperature
        found.append(-rivals.scatter_(1, own, -torch.inf).logsumexp(1))
    return torch.cat(found)


def _sample(total: int, most: int, seed: int) -> Tensor:
    """Numbers of at most so many rows, ascending."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[:most].sort().values


def _calibrated(
    some: Tensor, labels: Tensor, log_odds: Tensor, centroids: Tensor, refits: int, seed: int
) -> Calibration:
    """What second clusterings, which begin with the given centroids, say of the sampled rows."""
    number = len(centroids)

    def again(part: Tensor, own_seed: int) -> Tensor:
        second = kmeans(part, number, seed=own_seed, initial=centroids, refits=0)
        return membership(some, second.centroids, 1.0)[0]

    seconds = second_clusterings(some, number, again, refits, seed, resample=True)
    return fitted(labels, log_odds, agreement(labels, seconds, number), number)
