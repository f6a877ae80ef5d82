"""Groups of features; this folder travels with every saved model, so it imports only itself.

k-means in memory or from disk (`kmeans`), cluster heads (`train_heads`), the number of groups
(`propose_num_clusters`), the decoder of images, and `pipeline("image-clustering")` over them all.
"""

from .cluster_count import propose_num_clusters
from .cluster_heads import train_heads
from .k_means import Clustering, kmeans, near_duplicates
from .merging import merged
from .row_batches import ArrayBatches, Batches

__all__ = [
    "ArrayBatches",
    "Batches",
    "Clustering",
    "kmeans",
    "merged",
    "near_duplicates",
    "propose_num_clusters",
    "train_heads",
]
