"""Cluster accuracy for `evaluate`: the share of items that are in the group of their class.

# the folder's path; loads offline
metric = evaluate.load("mim_refiner_hf/metrics/cluster_accuracy")
metric.compute(predictions=[1, 1, 0, 0], references=[0, 0, 1, 2])     # 0.75
"""

from typing import Any

import datasets
import evaluate

from mim_refiner_hf.evaluation.cluster_scores import cluster_accuracy

DESCRIPTION = """
Cluster accuracy is the share of items that are in the right group, when every group stands for one
class and every class for one group: the one-to-one match that makes most items right is found with
the Hungarian algorithm. Group numbers need not mean anything.
"""

INPUTS = """
Args:
    predictions (`list` of `int`): group of each item.
    references (`list` of `int`): true class of each item.

Returns:
    cluster_accuracy (`float`): from 0 to 1; higher is better.

Examples:

    >>> metric = evaluate.load("mim_refiner_hf/metrics/cluster_accuracy")
    >>> metric.compute(predictions=[1, 1, 0, 0], references=[0, 0, 1, 2])
    {'cluster_accuracy': 0.75}
"""

CITATION = """
@article{kuhn1955hungarian,
  title={The {H}ungarian method for the assignment problem},
  author={Kuhn, Harold W.},
  journal={Naval Research Logistics Quarterly},
  volume={2},
  number={1-2},
  pages={83--97},
  year={1955}
}
"""


class ClusterAccuracy(evaluate.Metric):
    """`predictions` and `references`: one integer per item."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"cluster_accuracy": cluster_accuracy(references, predictions)}
