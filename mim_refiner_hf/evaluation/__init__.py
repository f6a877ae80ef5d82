"""How good is a frozen encoder? The paper's k-NN and clustering protocols, and RankMe; `evaluate_encoder` runs them all."""

from .cluster_scores import KMeansRun, cluster_accuracy, cluster_scores, kmeans, mean_scores, rankme
from .features import FeatureSet, extract_features
from .knn import knn_accuracy, knn_predict, standardise
from .pictures import draw_clusters, draw_curves
from .report import Evaluation, comparison_table, evaluate_encoder

__all__ = [
    "Evaluation",
    "FeatureSet",
    "KMeansRun",
    "cluster_accuracy",
    "cluster_scores",
    "comparison_table",
    "draw_clusters",
    "draw_curves",
    "evaluate_encoder",
    "extract_features",
    "kmeans",
    "knn_accuracy",
    "knn_predict",
    "mean_scores",
    "rankme",
    "standardise",
]
