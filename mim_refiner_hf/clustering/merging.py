"""Fewer groups: the most similar ones joined, step by step (Ward 1963).

    from mim_refiner_hf.clustering import kmeans, merged
    coarse = merged(kmeans(features, num_clusters=100), num_clusters=10)

This file travels with saved models: it imports only torch and its flat neighbours.
"""

import torch
from torch import Tensor

from .k_means import Clustering


def merge_tree(clustering: Clustering) -> Tensor:
    """Ward's tree over the K groups, weighted by their counts: (K - 1, 4) fp64.

    Each line joins the two groups whose union adds least to the inertia: their numbers (K + i for
    the union made by line i), the distance sqrt(2 * added inertia), the number of rows in the union
    (Ward 1963). `scipy.cluster.hierarchy` draws such trees.
    """
    centroids = clustering.centroids.double()
    sizes = clustering.counts.double()
    total = len(centroids)
    numbers = torch.arange(total)

    # what the union of two groups would add to the inertia
    exact = "donot_use_mm_for_euclid_dist"
    squares = torch.cdist(centroids, centroids, compute_mode=exact).square()
    added = squares * sizes * sizes[:, None] / (sizes + sizes[:, None]).clamp_min(1)
    added.fill_diagonal_(torch.inf)

    tree = torch.empty(total - 1, 4, dtype=torch.float64)
    for line in range(total - 1):
        # kept < gone: the first of two equal entries
        kept, gone = divmod(int(added.argmin()), total)
        size = sizes[kept] + sizes[gone]
        distance = (2 * float(added[kept, gone])) ** 0.5
        pair = sorted(numbers[[kept, gone]].tolist())
        tree[line] = torch.tensor([*pair, distance, float(size)], dtype=torch.float64)

        # the union takes the place of the first
        weighted = sizes[kept] * centroids[kept] + sizes[gone] * centroids[gone]
        centroids[kept] = weighted / size.clamp_min(1)
        sizes[kept] = size
        numbers[kept] = total + line

        apart = (centroids - centroids[kept]).square().sum(1)
        grown = apart * sizes * size / (sizes + size).clamp_min(1)
        # itself, and groups joined before
        grown[added[kept].isinf()] = torch.inf
        added[kept] = grown
        added[:, kept] = grown
        added[gone] = torch.inf
        added[:, gone] = torch.inf
    return tree


def cut_tree(tree: Tensor, num_clusters: int) -> Tensor:
    """For each old group of a `merge_tree` its new one (K,) int64.

    They are numbered in the order of their first old group.
    """
    total = len(tree) + 1
    # of each old group: the number of the union that it is in
    owner = list(range(total))
    for line, (left, right, *_) in enumerate(tree[: total - num_clusters].tolist()):
        owner = [total + line if number in (left, right) else number for number in owner]
    places = {number: place for place, number in enumerate(dict.fromkeys(owner))}
    return torch.tensor([places[number] for number in owner])


def merged(clustering: Clustering, num_clusters: int) -> Clustering:
    """The same rows in fewer groups: the most similar ones joined as in `merge_tree`.

    They are numbered in the order of their first old group. What becomes of confidence, inertia and
    `assign`: see `Clustering.joined`.

    Raises:
        ValueError: when `num_clusters` is not between 1 and the present number.
    """
    total = len(clustering.centroids)
    if not 1 <= num_clusters <= total:
        raise ValueError(
            f"num_clusters={num_clusters} must lie between 1 and the {total} groups to merge"
        )
    return clustering.joined(cut_tree(merge_tree(clustering), num_clusters))
