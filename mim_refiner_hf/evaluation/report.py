"""One evaluation of a frozen encoder by k-NN, clustering and RankMe.

    before = evaluate_encoder(encoder, processor, train_images, eval_images)
    ...                                                                 # refine
    after = evaluate_encoder(encoder, processor, train_images, eval_images)
    print(comparison_table(before.metrics, after.metrics))

Without labels only RankMe is measured, and the groups are a rule-of-thumb number of them. The
pictures are in `pictures.py` and `plots.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.images import ImageDataset, evenly_spaced, fully_labelled
from ..data.loading import Loading, Processor
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import rank
from .cluster_scores import KMeansRun, cluster_scores, kmeans_runs, mean_scores, rankme
from .feature_cache import ImageRows, read_rows
from .features import FeatureSet, own_columns, pixel_batches
from .knn import (
    grid_settings,
    knn_accuracy,
    predicted_classes,
    standardised_bank,
    warn_of_known_rows,
)
from .search import nearest

# training images in the k-NN bank of a run, and in that of the blocks' table, at most
BANK_SIZE = 10_000
# neighbours and temperature of the k-NN accuracy
_SETTING = (10, 0.07)
# without labels
_MAX_PICTURE_GROUPS = 20


@dataclass
class Evaluation:
    """What `evaluate_encoder` measured on the evaluation images.

    Attributes:
        metrics: `rankme`, and where both sets have labels also `knn_accuracy`, `cluster_accuracy`,
            `nmi`, `ami`, `ari` (of the k-means run with the lowest inertia),
            `cluster_accuracy_mean`, `nmi_mean` (over all runs) and, when asked for,
            `knn_per_block` (a list, first block first) and `knn` (a list of settings for the last
            block, and for the last 4 side by side). All but `rankme` are fractions of 1.
        features: the last block's features of the evaluation images, and their labels.
        groups: the k-means run behind the clustering metrics and the picture.
        predicted: the k-NN class of each evaluation image (M,), with labels.
        neighbours: the rows of the bank that are nearest to each image (M, up to 10), best first;
            with labels.
    """

    metrics: dict[str, Any]
    features: FeatureSet
    groups: KMeansRun
    predicted: Tensor | None = None
    neighbours: Tensor | None = None

    @property
    def assignments(self) -> NDArray[np.int64]:
        """Group of each evaluation image (M,)."""
        return self.groups.assignments


def evaluate_encoder(
    encoder: MimRefinerModel,
    processor: Processor,
    train_images: ImageDataset,
    eval_images: ImageDataset,
    *,
    seed: int = 0,
    loading: Loading = Loading(),
    per_block: bool = True,
    grid: bool = False,
    bank_size: int | None = BANK_SIZE,
    features: Path | None = None,
) -> Evaluation:
    """Measure a frozen encoder by the paper's k-NN and clustering protocols, and by RankMe.

    Args:
        encoder: the model; comes back in the mode and on the device it came with.
        processor: its image processor.
        train_images: the k-NN bank.
        eval_images: what is classified and clustered. k-means runs 100 times with k = the number of
            its classes.
        seed: of the first k-means run.
        loading: as in `extract_features`.
        per_block: also the k-NN accuracy of every block; without `features`, those of all blocks
            are kept in memory.
        grid: also k-NN for many k and temperatures, on the last block and on the last 4 side by
            side (paper, table 13).
        bank_size: of more training images, so many evenly spaced ones are the bank; None for all,
            but in the table of the blocks, where the bank is at most 10 000 images.
        features: see `read_rows`; broken images are left out there.
    """
    labelled = fully_labelled(train_images) and fully_labelled(eval_images)
    own = own_columns(encoder.config)
    columns = own[-1:]
    if labelled and per_block:
        columns = own
    elif labelled and grid:
        columns = own[-4:]

    read = partial(read_rows, encoder, processor=processor, features=features, loading=loading)
    rows = read(eval_images, columns=columns, desc="evaluation images")
    last = FeatureSet(rows.column(own[-1]), labels=rows.labels)
    if not labelled:
        groups = kmeans_runs(last.features, picture_groups(len(rows.images)), runs=10, seed=seed)
        return Evaluation({"rankme": rankme(last.features)}, last, groups)

    profile = evenly_spaced(train_images, bank_size or BANK_SIZE)
    profile_rows = read(profile, columns=columns, desc="k-NN bank")
    bank_rows = profile_rows
    if bank_size is None and len(profile) < len(train_images):
        places = own[-4:] if grid else own[-1:]
        bank_rows = read(train_images, columns=places, desc="k-NN bank")
    # `labelled` says so
    assert last.labels is not None

    knn = classified(bank_rows, rows, own, grid)
    metrics: dict[str, Any] = {"knn_accuracy": knn.accuracy}
    if grid:
        metrics["knn"] = knn.settings
    groups = kmeans_runs(last.features, len(np.unique(last.labels)), seed=seed)
    metrics |= clustering_metrics(last.labels.numpy(), groups)
    if per_block:
        metrics["knn_per_block"] = knn_of_columns(profile_rows, rows, own)
    metrics["rankme"] = rankme(last.features)
    return Evaluation(metrics, last, groups, knn.predicted, knn.neighbours)


def knn_of_columns(
    bank: ImageRows, rows: ImageRows, columns: Sequence[str], *, say_known: bool = False
) -> list[float]:
    """k-NN accuracy (0 to 1) of every column that both have, by the paper's protocol.

    With `say_known`, it is said of the last column how many images are in the bank too.
    """
    assert bank.labels is not None and rows.labels is not None

    accuracies = []
    for column in columns:
        accuracy = knn_accuracy(
            bank.column(column),
            bank.labels,
            rows.column(column),
            rows.labels,
            shared=True,
            say_known=say_known and column == columns[-1],
        )
        accuracies.append(accuracy)
    return accuracies


def evaluate_pixels(
    processor: Processor,
    train_images: ImageDataset,
    eval_images: ImageDataset,
    *,
    seed: int = 0,
    loading: Loading = Loading(),
) -> dict[str, float]:
    """What the encoder's input gives by itself: the same protocols on the pixels, as one vector.

    Takes readable images with labels and one processor, as `evaluate_encoder`; returns
    `knn_accuracy` and the clustering scores.
    """
    pixels = []
    labels = []
    for images in (evenly_spaced(train_images, BANK_SIZE), eval_images):
        batches = list(pixel_batches(images, processor, loading))
        pixels.append(torch.cat([batch.flatten(1).float() for batch, _ in batches]))
        labels.append(torch.cat([batch for _, batch in batches]))

    bank, evaluated = pixels
    # what is in the bank too has been said of the features
    accuracy = knn_accuracy(bank, labels[0], evaluated, labels[1], say_known=False)
    metrics = {"knn_accuracy": accuracy}
    groups = kmeans_runs(evaluated, len(labels[1].unique()), seed=seed)
    return metrics | clustering_metrics(labels[1].numpy(), groups)


def picture_groups(num_images: int) -> int:
    """How many groups to draw when nothing says how many there are: sqrt(n / 2), at most 20."""
    return min(_MAX_PICTURE_GROUPS, max(1, round(math.sqrt(num_images / 2))))


def clustering_metrics(labels: NDArray[np.int64], groups: KMeansRun) -> dict[str, float]:
    """Scores of the best run, and the mean of accuracy and NMI over all runs."""
    scores = cluster_scores(labels, groups.assignments)
    accuracy_mean, nmi_mean = mean_scores(labels, groups)
    return {
        "cluster_accuracy": scores["accuracy"],
        "nmi": scores["nmi"],
        "ami": scores["ami"],
        "ari": scores["ari"],
        "cluster_accuracy_mean": accuracy_mean,
        "nmi_mean": nmi_mean,
    }


class KnnSetting(TypedDict):
    """The accuracy (0 to 1) of one setting of the grid."""

    k: int
    temperature: float
    accuracy: float


class Classified(NamedTuple):
    """What k-NN makes of M images by the last block, k = 10 and temperature 0.07.

    Attributes:
        predicted: the classes (M,).
        neighbours: their rows in the bank (M, up to 10), best first.
        accuracy: 0 to 1.
        settings: of every setting that was tried, by the blocks whose features it reads.
    """

    predicted: Tensor
    neighbours: Tensor
    accuracy: float
    settings: dict[str, list[KnnSetting]]


def classified(bank: ImageRows, rows: ImageRows, own: Sequence[str], grid: bool) -> Classified:
    """k-NN of the images; the bank is whole in memory only if its features are held there.

    Args:
        own: the column of every block, first block first.
        grid: also by many other settings.
    """
    assert rows.labels is not None and bank.labels is not None
    settings = [_SETTING]
    places = {"last block": own[-1:]}
    if grid:
        settings = grid_settings(len(bank.labels))
        if len(own) > 1:
            places[f"last {len(own[-4:])} blocks"] = own[-4:]

    tried: dict[str, list[KnnSetting]] = {}
    most = max(k for k, _ in settings)
    for place, columns in places.items():
        bank_x, eval_x = standardised_bank(
            bank.side_by_side(columns), rows.side_by_side(columns)[:], shared=True
        )
        similarity, index = nearest(eval_x, bank_x, most, shared=True)
        answers = predicted_classes(similarity, index, bank.labels, settings)
        if place == "last block":
            predicted, neighbours = answers[_SETTING], index[:, : _SETTING[0]]
            if rank() == 0:
                warn_of_known_rows(similarity, index, eval_x, bank_x)

        tried[place] = []
        for (k, temperature), classes in answers.items():
            accuracy = (classes == rows.labels).float().mean().item()
            tried[place].append({"k": k, "temperature": temperature, "accuracy": accuracy})

    accuracy = (predicted == rows.labels).float().mean().item()
    return Classified(predicted, neighbours, accuracy, tried)
