"""The evidence of a run: one evaluation of an encoder, and the before/after table. (The pictures are in `pictures.py`.)

    before = evaluate_encoder(encoder, processor, train_images, eval_images)
    ...                                                               # refine
    after = evaluate_encoder(encoder, processor, train_images, eval_images)
    print(comparison_table(before.metrics, after.metrics))

Without labels only RankMe is measured, and the groups are a rule-of-thumb number of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..data.images import evenly_spaced, fully_labelled
from ..data.loading import Loading
from ..model.modeling_mim_refiner import MimRefinerModel
from .cluster_scores import KMeansRun, cluster_scores, kmeans, mean_scores, rankme
from .feature_cache import Rows, own_columns, read_rows
from .features import FeatureSet
from .knn import knn_accuracy, knn_grid, knn_predict, standardise

if TYPE_CHECKING:
    from ..data.images import ImageDataset

BANK_SIZE = 10_000  # training images in the k-NN bank, at most
MAX_PICTURE_GROUPS = 20  # without labels


@dataclass
class Evaluation:
    """What `evaluate_encoder` measured on the evaluation images.

    Attributes:
        metrics: `rankme`, and where both sets have labels also `knn_accuracy`, `cluster_accuracy`, `nmi`, `ami`, `ari` (of the
            k-means run with the lowest inertia), `cluster_accuracy_mean`, `nmi_mean` (over all runs) and, when asked for,
            `knn_per_block` (a list, first block first) and `knn` (a list of settings for the last block, and for the last 4 side by
            side). All but `rankme` are fractions of 1.
        features: the last block's features of the evaluation images, and their labels.
        groups: the k-means run behind the clustering metrics and the picture.
        predicted: the k-NN class of each evaluation image (M,), with labels.
        bank: the last block's features of the k-NN bank, and their labels; with labels.
    """

    metrics: dict[str, Any]
    features: FeatureSet
    groups: KMeansRun
    predicted: Tensor | None = None
    bank: FeatureSet | None = None

    @property
    def assignments(self) -> NDArray[np.int64]:
        """Group of each evaluation image (N,)."""
        return self.groups.assignments


def picture_groups(num_images: int) -> int:
    """The rule of thumb sqrt(n / 2), at most 20: how many groups to draw when nothing says how many there are."""
    return min(MAX_PICTURE_GROUPS, max(1, round(math.sqrt(num_images / 2))))


def clustering_metrics(labels: NDArray[np.int64], groups: KMeansRun) -> dict[str, float]:
    """Scores of the best run, and the mean of accuracy and NMI over all runs."""
    scores = cluster_scores(labels, groups.assignments)
    accuracy_mean, nmi_mean = mean_scores(labels, groups)
    return {
        "cluster_accuracy": scores["accuracy"],
        **{name: scores[name] for name in ("nmi", "ami", "ari")},
        "cluster_accuracy_mean": accuracy_mean,
        "nmi_mean": nmi_mean,
    }


def evaluate_encoder(
    encoder: MimRefinerModel,
    processor: Any,
    train_images: "ImageDataset",
    eval_images: "ImageDataset",
    *,
    seed: int = 0,
    loading: Loading = Loading(),
    per_block: bool = True,
    grid: bool = False,
    features: Path | None = None,
) -> Evaluation:
    """Measure a frozen encoder by the paper's k-NN and clustering protocols, and by RankMe.

    Args:
        encoder: the model; comes back in the mode and on the device it came with.
        processor: its image processor.
        train_images: the k-NN bank; of more than 10 000 images, 10 000 evenly spaced ones are used.
        eval_images: what is classified and clustered. k-means runs 100 times with k = the number of its classes.
        seed: of the first k-means run.
        loading: as in `extract_features`.
        per_block: also the k-NN accuracy of every block; without `features`, those of all blocks are kept in memory.
        grid: also k-NN for many k and temperatures, on the last block and on the last 4 side by side (paper, table 13).
        features: see `read_rows`; broken images are left out there.
    """
    labelled = fully_labelled(train_images) and fully_labelled(eval_images)
    own = own_columns(encoder.config)
    columns = own if labelled and per_block else own[-4:] if labelled and grid else own[-1:]

    def read(images: "ImageDataset", desc: str) -> Rows:
        return read_rows(
            encoder, images, processor, columns, features=features, loading=loading, desc=desc
        )

    found = read(eval_images, "evaluation images")
    last = FeatureSet(found.column(own[-1]), labels=found.labels)
    metrics: dict[str, Any] = {}
    bank = predicted = None
    if labelled:
        rows = read(evenly_spaced(train_images, BANK_SIZE), "k-NN bank")
        bank = FeatureSet(rows.column(own[-1]), labels=rows.labels)
        assert bank.labels is not None and last.labels is not None  # `labelled` says so
        predicted, metrics = knn_metrics(rows, found, own, grid)
        groups = kmeans(last.features, len(np.unique(last.labels)), seed=seed)
        metrics |= clustering_metrics(last.labels.numpy(), groups)
        if per_block:
            metrics["knn_per_block"] = [
                knn_accuracy(
                    rows.column(column), bank.labels, found.column(column), last.labels, shared=True
                )
                for column in own
            ]
    else:
        groups = kmeans(last.features, picture_groups(len(found.images)), runs=10, seed=seed)
    metrics["rankme"] = rankme(last.features)
    return Evaluation(metrics, last, groups, predicted, bank)


def knn_metrics(
    bank: Rows, found: Rows, own: Sequence[str], grid: bool
) -> tuple[Tensor, dict[str, Any]]:
    """The classes that k = 10 and temperature 0.07 predict from the last block, (M,), their accuracy, and with `grid` all others."""
    assert bank.labels is not None and found.labels is not None
    if not grid:
        (predicted,) = knn_predict(*_standardised(bank, found, own[-1:]), shared=True).values()
        return predicted, {"knn_accuracy": (predicted == found.labels).float().mean().item()}
    places = {"last block": own[-1:]} | (
        {f"last {len(own[-4:])} blocks": own[-4:]} if len(own) > 1 else {}
    )
    answers = {
        place: knn_grid(*_standardised(bank, found, columns), shared=True)
        for place, columns in places.items()
    }
    table = {
        place: [
            {
                "k": k,
                "temperature": tau,
                "accuracy": (classes == found.labels).float().mean().item(),
            }
            for (k, tau), classes in predictions.items()
        ]
        for place, predictions in answers.items()
    }
    predicted = answers["last block"][10, 0.07]
    return predicted, {
        "knn_accuracy": (predicted == found.labels).float().mean().item(),
        "knn": table,
    }


def _standardised(bank: Rows, found: Rows, columns: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """What `knn_predict` takes: bank (N, D), its classes (N,), rows to classify (M, D)."""
    assert bank.labels is not None
    bank_x, eval_x = standardise(bank.side_by_side(columns), found.side_by_side(columns))
    return bank_x, bank.labels, eval_x


__all__ = ["Evaluation", "evaluate_encoder"]
