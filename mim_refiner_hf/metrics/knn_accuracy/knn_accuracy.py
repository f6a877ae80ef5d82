"""k-NN accuracy for `evaluate`: how well the neighbours of features know their class.

    # the folder's path; loads offline
    metric = evaluate.load("mim_refiner_hf/metrics/knn_accuracy")
    metric.compute(
        predictions=test_features,
        references=test_labels,
        train_features=train_features,
        train_labels=train_labels,
    )

The protocol is MIM-Refiner's.
"""

from typing import Any

import datasets
import evaluate
import torch

from mim_refiner_hf.evaluation.knn import knn_accuracy

DESCRIPTION = """
Accuracy of a k-nearest-neighbour classifier on frozen features: features are standardised with the
mean and standard deviation of the training features, compared by cosine, and each of the k
neighbours votes for its class with weight exp(similarity / temperature).
"""

INPUTS = """
Args:
    predictions (`list` of `list` of `float`): features of the items to classify (M, D).
    references (`list` of `int`): their true classes (M,).
    train_features (array or tensor): features of the labelled items (N, D).
    train_labels (array or tensor of `int`): their classes (N,), 0 or more.
    k (`int`): neighbours that vote, at most N. Defaults to 10.
    temperature (`float`): of the votes; infinity counts neighbours. Defaults to 0.07.

Returns:
    knn_accuracy (`float`): from 0 to 1; higher is better.

Examples:

    >>> metric = evaluate.load("mim_refiner_hf/metrics/knn_accuracy")
    >>> metric.compute(
    ...     predictions=[[0.1, 1.0], [1.0, 0.1]],
    ...     references=[0, 1],
    ...     train_features=[[0.0, 1.0], [0.2, 0.9], [1.0, 0.0], [0.9, 0.2]],
    ...     train_labels=[0, 0, 1, 1],
    ...     k=2,
    ... )
    {'knn_accuracy': 1.0}
"""

CITATION = """
@inproceedings{alkin2025mimrefiner,
  title={{MIM-Refiner}: A Contrastive Learning Boost from Intermediate Pre-Trained Representations},
  author={Alkin, Benedikt and Miklautz, Lukas and Hochreiter, Sepp and Brandstetter, Johannes},
  booktitle={International Conference on Learning Representations},
  year={2025}
}
"""


class KnnAccuracy(evaluate.Metric):
    """`predictions`: a feature vector per item, of any width; `references`: a class per item."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Value("int64"),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2402.10093"],
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        train_features: Any,
        train_labels: Any,
        k: int = 10,
        temperature: float = 0.07,
    ) -> dict[str, float]:
        train_x = torch.as_tensor(train_features, dtype=torch.float32)
        train_y = torch.as_tensor(train_labels, dtype=torch.int64)
        test_x = torch.as_tensor(predictions, dtype=torch.float32)
        test_y = torch.as_tensor(references, dtype=torch.int64)
        accuracy = knn_accuracy(train_x, train_y, test_x, test_y, k=k, temperature=temperature)
        return {"knn_accuracy": accuracy}
