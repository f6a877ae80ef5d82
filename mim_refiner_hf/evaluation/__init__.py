"""How good is a frozen encoder? k-NN, clustering and RankMe (`evaluate_encoder`), slower protocols,
what its blocks do (`block_profile`), and its features on disk (`embed_images`)."""

from .block_analysis import BlockProfile, block_profile, profile_table, propose_head_blocks
from .cluster_scores import (
    KMeansRun,
    cluster_accuracy,
    cluster_scores,
    kmeans_runs,
    mean_scores,
    rankme,
)
from .embed import embed_images
from .feature_store import FeatureStore
from .features import FeatureSet, extract_features, feature_columns
from .knn import knn_accuracy, knn_predict, standardise
from .pictures import draw_block_profile, draw_clusters, draw_curves
from .report import Evaluation, evaluate_encoder, evaluate_pixels
from .tables import comparison_table

__all__ = [
    "BlockProfile",
    "Evaluation",
    "FeatureSet",
    "FeatureStore",
    "KMeansRun",
    "block_profile",
    "cluster_accuracy",
    "cluster_scores",
    "comparison_table",
    "draw_block_profile",
    "draw_clusters",
    "draw_curves",
    "embed_images",
    "evaluate_encoder",
    "evaluate_pixels",
    "extract_features",
    "feature_columns",
    "kmeans_runs",
    "knn_accuracy",
    "knn_predict",
    "mean_scores",
    "profile_table",
    "propose_head_blocks",
    "rankme",
    "standardise",
]
