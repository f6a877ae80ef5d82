"""RankMe for `evaluate`: the effective rank of features, which needs no labels.

# the folder's path; loads offline
metric = evaluate.load("mim_refiner_hf/metrics/rankme")
metric.compute(predictions=features)          # {"rankme": 37.2}
"""

from typing import Any

import datasets
import evaluate
import torch

from mim_refiner_hf.evaluation.cluster_scores import rankme

DESCRIPTION = """
RankMe is the effective rank of a matrix of features: the exponential of the entropy of its singular
values, taken as shares of their sum. Features that have collapsed to one direction have 1; the most
is the smaller of the number and the width of the features.
"""

INPUTS = """
Args:
    predictions (`list` of `list` of `float`): features (N, D).

Returns:
    rankme (`float`): from 1 to min(N, D); higher means that more directions are in use.

Examples:

    >>> metric = evaluate.load("mim_refiner_hf/metrics/rankme")
    >>> round(metric.compute(predictions=[[1.0, 0.0], [0.0, 1.0]])["rankme"], 3)
    2.0
"""

CITATION = """
@inproceedings{garrido2023rankme,
  title={{R}ank{M}e: Assessing the Downstream Performance of Pretrained Self-Supervised
         Representations by Their Rank},
  author={Garrido, Quentin and Balestriero, Randall and Najman, Laurent and LeCun, Yann},
  booktitle={International Conference on Machine Learning},
  year={2023}
}
"""


class RankMe(evaluate.Metric):
    """`predictions`: one feature vector per item, of any width."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32"))}
            ),
            reference_urls=["https://arxiv.org/abs/2210.02885"],
        )

    def _compute(self, predictions: Any) -> dict[str, float]:
        return {"rankme": rankme(torch.as_tensor(predictions, dtype=torch.float32))}
