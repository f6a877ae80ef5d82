"""Features in few dimensions: a flat map of the images, by UMAP or PCA, and principal components.

    points, method = flat_map(features)             # features (N, D) -> (N, 2) and "UMAP" or "PCA"
    codes = principal_components(features, 32)      # (N, 32)

Features are compared by their cosine. UMAP comes with `pip install "mim_refiner_hf[viz]"` (umap-learn, 210 MB with numba).
"""

import torch.nn.functional as F
from torch import Tensor

from ..clustering import cluster_count

UMAP_FROM = 100  # images; below, a map by neighbourhoods says nothing
NEIGHBOURS, MIN_DIST = 15, 0.1  # UMAP's own defaults, made for looking at


def principal_components(features: Tensor, dimensions: int) -> Tensor:
    """L2-normalised features (N, D), centred, along their `dimensions` directions of largest variance (N, dimensions).

    Directions beyond the D that there are hold zeros.
    """
    rows = F.normalize(features.float(), dim=1)
    found = cluster_count.principal_components(rows - rows.mean(0), dimensions)
    return F.pad(found, (0, dimensions - found.shape[1]))


def flat_map(features: Tensor, seed: int = 0) -> tuple[Tensor, str]:
    """Features (N, D) in two dimensions (N, 2) fp32, and by which method.

    "UMAP" where umap-learn is installed and there are at least `UMAP_FROM` images (McInnes et al., arXiv 1802.03426; the same
    for the same seed), else "PCA".
    """
    if len(features) >= UMAP_FROM:
        rows = F.normalize(features.float(), dim=1)
        points = cluster_count.umap_space(
            rows, 2, neighbours=NEIGHBOURS, min_dist=MIN_DIST, seed=seed
        )
        if points is not None:
            return points, "UMAP"
    return principal_components(features, 2), "PCA"


__all__ = ["flat_map", "principal_components"]
