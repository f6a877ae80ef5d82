"""Clustering frozen features, and how well the groups match the true classes.

    from mim_refiner_hf.evaluation import cluster_scores, kmeans_runs
    run = kmeans_runs(features, num_clusters=10)             # best of 100 by inertia
    cluster_scores(labels, run.assignments)                  # accuracy, nmi, ami, ari

The protocol is the paper's (MIM-Refiner, Sec. 5.3): mini-batch k-means on L2-normalised features,
100 times with k = number of classes. The run with the lowest inertia is reported, the mean over all
runs beside it. `rankme` needs no labels at all.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    davies_bouldin_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from sklearn.metrics.cluster import contingency_matrix
from threadpoolctl import threadpool_limits
from torch import Tensor

from .knn import finite_rows
from .scores import labelled_rows

# --- how well groups match classes ----------------------------------------------------------------


def check_pair(labels: ArrayLike, assignments: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both as arrays (M,), of the M items that have a label: a number from 0 on, not NaN.

    How many have none is said. ValueError unless both are of one length, and where none has one.
    """
    classes, groups, _ = _labelled_pair(labels, assignments)
    return classes, groups


def _labelled_pair(
    labels: ArrayLike, assignments: ArrayLike
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
    """As `check_pair`, and which of the N items they are (N,)."""
    classes = np.asarray(labels)
    groups = np.asarray(assignments)
    if classes.ndim != 1 or classes.shape != groups.shape or len(classes) == 0:
        raise ValueError(
            "labels and assignments must be two lists of one length, "
            f"not {classes.shape} and {groups.shape}"
        )
    if groups.dtype.kind == "f" and not np.isfinite(groups).all():
        raise ValueError("assignments hold NaN or infinity; a group is a whole number or a word")
    has_one = labelled_rows(classes)
    return classes[has_one], groups[has_one], has_one


def matched(labels: ArrayLike, assignments: ArrayLike) -> NDArray[np.bool_]:
    """Whether each of N items is in the group of its class (N,), groups and classes matched best.

    Items without a label are left out.

    The match is one-to-one and maximises the number of such items (Hungarian algorithm). Where
    there are more groups than classes, or fewer, the items of those left over count as wrong. Ids
    of groups may be any integers.
    """
    classes, groups = check_pair(labels, assignments)
    # (classes, groups), both in ascending order of their ids
    counts = contingency_matrix(classes, groups)
    partner = np.full(len(counts), -1)
    class_places, group_places = linear_sum_assignment(counts, maximize=True)
    partner[class_places] = group_places

    own_class = np.unique(classes, return_inverse=True)[1]
    own_group = np.unique(groups, return_inverse=True)[1]
    right: NDArray[np.bool_] = partner[own_class] == own_group
    return right


def cluster_accuracy(labels: ArrayLike, assignments: ArrayLike) -> float:
    """Share (0 to 1) of the N items that are in the group of their class, as `matched` says."""
    return float(matched(labels, assignments).mean())


def cluster_scores(
    labels: ArrayLike, assignments: ArrayLike, embeddings: ArrayLike | None = None
) -> dict[str, float]:
    """All scores of one clustering of N items.

    Args:
        labels: true classes (N,).
        assignments: group of each item (N,).
        embeddings: features (N, D); adds how separate the TRUE classes lie in them. Silhouette
            compares all pairs.

    Returns:
        `accuracy` (Hungarian), `nmi`, `ami` (both arithmetic) and `ari`; with `embeddings` also
        `silhouette` (-1 to 1, higher is better) and `davies_bouldin` (lower is better), Euclidean.
    """
    classes, groups, has_one = _labelled_pair(labels, assignments)
    scores = {
        "accuracy": cluster_accuracy(classes, groups),
        "nmi": float(normalized_mutual_info_score(classes, groups)),
        "ami": float(adjusted_mutual_info_score(classes, groups)),
        "ari": float(adjusted_rand_score(classes, groups)),
    }

    if embeddings is not None:
        points = np.asarray(embeddings)
        if points.ndim != 2 or len(points) != len(has_one):
            raise ValueError(
                f"embeddings must be {len(has_one)} rows, one for each label, not {points.shape}"
            )
        points = points[has_one]
        scores["silhouette"] = float(silhouette_score(points, classes))
        scores["davies_bouldin"] = float(davies_bouldin_score(points, classes))
    return scores


# --- the clustering -------------------------------------------------------------------------------


@dataclass
class KMeansRun:
    """The best of several k-means runs, and the groups of all of them.

    Attributes:
        assignments: group of each item in the run with the lowest inertia (N,) int64.
        centroids: its centres (K, D) fp32, in the space of the L2-normalised features.
        inertia: its sum of squared distances to the centres, over all N items.
        all_assignments: groups of every run (runs, N) int32, for means over runs.
    """

    assignments: NDArray[np.int64]
    centroids: NDArray[np.float32]
    inertia: float
    all_assignments: NDArray[np.int32]


def kmeans_runs(
    features: Tensor, num_clusters: int, *, runs: int = 100, seed: int = 0
) -> KMeansRun:
    """Mini-batch k-means on L2-normalised `features` (N, D); of `runs`, the lowest inertia wins.

    Each run is scikit-learn's `MiniBatchKMeans` with one k-means++ start (`n_init=1`: the restarts
    are the runs) and its own defaults otherwise: batches of 1024, at most 100 epochs, stopping
    after 10 batches without improvement. Run i is seeded with `seed + i`.

    Raises:
        ValueError: when `num_clusters` is not between 1 and N, `runs` is below 1, or a feature is
            not finite.
    """
    if not 1 <= num_clusters <= len(features):
        raise ValueError(
            f"num_clusters={num_clusters} must lie between 1 and the {len(features)} items to "
            "cluster"
        )
    if runs < 1:
        raise ValueError(f"runs={runs} must be at least 1")
    checked = finite_rows(features.detach().cpu(), "features")
    points = F.normalize(checked.float(), dim=1).numpy()

    best: MiniBatchKMeans | None = None
    groups = np.empty((runs, len(points)), dtype=np.int32)
    # a mini-batch is too small for threads: on busy cores two are four times slower than one
    with threadpool_limits(1):
        for run in range(runs):
            fitted = MiniBatchKMeans(num_clusters, n_init=1, random_state=seed + run).fit(points)
            groups[run] = fitted.labels_
            if best is None or fitted.inertia_ < best.inertia_:
                best = fitted

    assert best is not None  # runs >= 1
    assignments = best.labels_.astype(np.int64)
    return KMeansRun(assignments, best.cluster_centers_, float(best.inertia_), groups)


def mean_scores(labels: ArrayLike, run: KMeansRun) -> tuple[float, float]:
    """Cluster accuracy and NMI, each the mean over all runs."""
    accuracies = [cluster_accuracy(labels, groups) for groups in run.all_assignments]
    nmis = [normalized_mutual_info_score(labels, groups) for groups in run.all_assignments]
    return float(np.mean(accuracies)), float(np.mean(nmis))


# --- without labels -------------------------------------------------------------------------------


def rankme(features: Tensor | NDArray[Any]) -> float:
    """Effective rank of `features` (N, D): 1 for collapsed ones, at most min(N, D).

    The exponential of the entropy of the singular values' distribution,
    `p_k = sigma_k / sum(sigma) + 1e-7` (RankMe, Garrido et al. 2023, arXiv 2210.02885, eq. 1).
    Comparable only for one data set and one N. ValueError for a feature that is not finite, and
    for no features.
    """
    rows = finite_rows(features, "features")
    if rows.numel() == 0:
        raise ValueError(f"features must be at least one row and channel, not {(*rows.shape,)}")
    sigma = torch.linalg.svdvals(rows)
    # all zero are collapsed; however small they are else, their scale says nothing
    p = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))
