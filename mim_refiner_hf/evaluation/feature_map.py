"""Features in few dimensions: a flat map of the images, by UMAP or PCA, and main components.

    points, method = flat_map(features)             # features (N, D) -> (N, 2) and "UMAP" or "PCA"
    codes = cosine_components(features, 32)         # (N, 32)

Features are compared by their cosine. UMAP comes with `pip install "mim_refiner_hf[viz]"`
(umap-learn, 210 MB with numba).
"""

import torch.nn.functional as F
from torch import Tensor

from ..clustering import cluster_count

# with fewer images, a map by neighbourhoods says nothing
UMAP_FROM = 100
# UMAP's own defaults, made for looking at
UMAP_NEIGHBOURS = 15
UMAP_MIN_DIST = 0.1


def cosine_components(features: Tensor, dimensions: int) -> Tensor:
    """The main components of L2-normalised features, (N, D) -> (N, `dimensions`), widest first.

    Directions beyond the D that there are hold zeros.
    """
    rows = F.normalize(features.float(), dim=1)
    components = cluster_count.principal_components(rows - rows.mean(0), dimensions)
    return F.pad(components, (0, dimensions - components.shape[1]))


def flat_map(features: Tensor, seed: int = 0) -> tuple[Tensor, str]:
    """Features (N, D) in two dimensions (N, 2) fp32, and the name of the method.

    "UMAP" where umap-learn is installed and there are at least `UMAP_FROM` images (McInnes et al.,
    arXiv 1802.03426; the same for the same seed), else "PCA".
    """
    if len(features) >= UMAP_FROM:
        rows = F.normalize(features.float(), dim=1)
        points = cluster_count.umap_space(
            rows, 2, neighbours=UMAP_NEIGHBOURS, min_dist=UMAP_MIN_DIST, seed=seed
        )
        if points is not None:
            return points, "UMAP"
    return cosine_components(features, 2), "PCA"
