"""One encoder on one data set, another beside it, and what changed: scores, their errors, verdicts.

    data = open_data("my_images/", num_channels=3)
    before, after = (measure_side(name, encoder, data, ["low_shot"], features=folder, seed=0) for name, encoder in encoders.items())
    changes_of(before, after)["knn_accuracy"].verdict

A change is judged by a paired bootstrap where a score is made of one number per image (`evidence.py`). For mIoU, which is not, the
errors of both sides are taken as independent: too wide an interval rather than too narrow a one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import normalized_mutual_info_score, silhouette_samples

from ..data.images import ImageDataset, evenly_spaced, fully_labelled, hold_out, open_images
from ..data.loading import Loading
from ..evaluation.cluster_scores import cluster_accuracy, matched
from ..evaluation.evidence import Change, Measured, compare, measure
from ..evaluation.feature_cache import (
    evaluation_columns,
    for_altered_images,
    own_columns,
    read_rows,
)
from ..evaluation.fine_tuning import FineTuneRecipe, fine_tuning
from ..evaluation.linear_probe import linear_probe
from ..evaluation.low_shot import low_shot
from ..evaluation.neighbour_agreement import NUM_NEIGHBOURS, global_view, neighbour_agreement
from ..evaluation.report import BANK_SIZE, Evaluation, evaluate_encoder
from ..evaluation.robustness import robustness
from ..evaluation.scores import ProtocolResult, Score
from ..evaluation.segmentation import segmentation_probe
from ..evaluation.segmentation_data import SegmentationDataset, open_segmentation
from ..model.modeling_mim_refiner import MimRefinerModel

HELD_OUT = 0.2  # of the images, where no evaluation images are named
SEGMENTATION_BATCH = 64  # images per pass: the logits of every pixel are in memory
SILHOUETTE_IMAGES = 5000  # at most: it compares all pairs
PROTOCOLS: Mapping[str, Callable[..., ProtocolResult]] = {
    "low_shot": low_shot,
    "linear_probe": linear_probe,
    "linear_probe_fast": partial(linear_probe, augment=False),
    "robustness": robustness,
    "fine_tuning": fine_tuning,
    "segmentation": segmentation_probe,
}
"""What `--protocols` can add. All need labels but the last, which needs masks instead."""


@dataclass(frozen=True)
class Data:
    """Images to learn from (the k-NN bank is taken of them) and to be measured on, and how they were asked for."""

    name: str
    config: str | None
    split: str | None
    eval_split: str | None
    train: Any  # ImageDataset, or SegmentationDataset
    evaluated: Any
    broken: Sequence[dict[str, Any]] = ()  # left out of both

    @property
    def labelled(self) -> bool:
        """Whether every image has a label."""
        return all(
            isinstance(images, ImageDataset) and fully_labelled(images)
            for images in (self.train, self.evaluated)
        )

    @property
    def bank(self) -> ImageDataset:
        """The k-NN bank."""
        return evenly_spaced(self.train, BANK_SIZE)

    def describe(self) -> dict[str, Any]:
        """Which images, told so that someone else can take the same."""
        masks = isinstance(self.train, SegmentationDataset)
        return {
            "name": self.name,
            "config": self.config,
            "split": self.split,
            "bank_images": len(self.train) if masks else len(self.bank),
            "train_images": len(self.train),
            "fingerprint": self.train.fingerprint,
            "eval_name": f"{self.evaluated.name} ({self.eval_split or 'held out'})",
            "eval_images": len(self.evaluated),
            "eval_fingerprint": self.evaluated.fingerprint,
            "num_classes": len(self.evaluated.class_names) if masks else self.evaluated.num_classes,
        }


@dataclass(frozen=True)
class Side:
    """One model of a comparison: every number, the scores whose change can be judged, and the results of the extra protocols."""

    name: str
    metrics: dict[str, Any]
    measured: dict[str, Measured] = field(repr=False)
    extra: dict[str, ProtocolResult]
    evaluation: Evaluation | None = field(default=None, repr=False)


# --- data ---------------------------------------------------------------------------------------------------------------------


def open_data(
    dataset: str,
    *,
    config: str | None = None,
    split: str | None = None,
    eval_dataset: str | None = None,
    eval_split: str | None = None,
    num_channels: int = 3,
    seed: int = 0,
    masks: bool = False,
) -> Data:
    """Images to learn from and to be measured on; a fifth is held out where neither data set nor split is named for the latter.

    Raises:
        ValueError: when both are the same images, and, with `masks`, when none are named; otherwise as `open_images`.
    """
    other: dict[str, Any] = {
        "config": config if eval_dataset is None else None,
        "split": eval_split,
    }
    named = eval_dataset is not None or eval_split is not None
    if masks:
        if not named:
            raise ValueError(
                "--protocols segmentation: name the images to measure on, with --eval_split or --eval_dataset"
            )
        images = open_segmentation(dataset, config=config, split=split)
        evaluated: Any = open_segmentation(eval_dataset or dataset, **other)
    else:
        found = open_images(dataset, config=config, split=split, num_channels=num_channels)
        if not named:
            return Data(dataset, config, split, None, *hold_out(found, HELD_OUT, seed))
        images, evaluated = (
            found,
            open_images(eval_dataset or dataset, num_channels=num_channels, **other),
        )  # type: ignore[assignment]
    if evaluated.fingerprint == images.fingerprint:
        raise ValueError(
            f"--eval_split {eval_split}: these are the images of the k-NN bank; name another split, or leave it out"
        )
    return Data(dataset, config, split, eval_split or "train", images, evaluated)


def readable(
    encoders: Mapping[str, MimRefinerModel], images: ImageDataset, features: Path, loading: Loading
) -> tuple[ImageDataset, list[dict[str, Any]]]:
    """Those of the images that can be read, with the features that all protocols need now in the store; and the others."""
    broken: list[dict[str, Any]] = []
    for encoder in encoders.values():
        rows = read_rows(
            encoder,
            images,
            vars(encoder)["image_processor"],
            evaluation_columns(encoder.config),
            features=features,
            loading=loading,
        )
        images, broken = rows.images, [*broken, *rows.broken]
    return images, broken


# --- one side -----------------------------------------------------------------------------------------------------------------


def measure_side(
    name: str,
    encoder: MimRefinerModel,
    data: Data,
    protocols: Sequence[str],
    *,
    seed: int,
    recipe: FineTuneRecipe | None = None,
    features: Path,
    loading: Loading = Loading(),
) -> Side:
    """Every measurement of one encoder.

    Args:
        data: readable images.
        protocols: names of `PROTOCOLS`; "segmentation" alone, on masks.
        seed: of everything random.
        recipe: a `FineTuneRecipe`, for "fine_tuning".
        features, loading: as in `read_rows`.
    """
    processor = vars(encoder)["image_processor"]
    both: dict[str, Any] = {"encoder": encoder, "processor": processor, "seed": seed}
    extra: dict[str, ProtocolResult] = {}
    measured: dict[str, Measured] = {}
    metrics: dict[str, Any] = {}
    evaluation = None
    if isinstance(data.train, ImageDataset):
        evaluation = evaluate_encoder(
            train_images=data.bank,
            eval_images=data.evaluated,
            grid=data.labelled,
            features=features,
            loading=loading,
            **both,
        )
        measured = (
            errors_of(evaluation)
            if data.labelled
            else label_free(encoder, data.evaluated, evaluation, seed, features, loading)
        )
        values = {name: found.value for name, found in measured.items()}
        metrics = (
            values
            | evaluation.metrics
            | {f"{name}_standard_error": found.error for name, found in measured.items()}
        )
    for protocol in protocols:
        more: dict[str, Any] = {"loading": loading, "features": features}
        if protocol == "fine_tuning":
            more = {"loading": loading, "recipe": recipe}
        elif protocol == "segmentation":
            more = {"loading": replace(loading, batch_size=SEGMENTATION_BATCH)}
        images = {"train_images": data.train, "eval_images": data.evaluated}
        extra[protocol] = PROTOCOLS[protocol](**both, **images, **more)
        measured |= {
            name: errors_of_score(score)
            for name, score in extra[protocol].scores.items()
            if score.per_image is not None
        }
        metrics |= extra[protocol].metrics
    return Side(name, metrics, measured, extra, evaluation)


def errors_of(evaluation: Evaluation) -> dict[str, Measured]:
    """k-NN and cluster accuracy and NMI with their errors over images and, for the latter two, over runs of k-means."""
    assert evaluation.predicted is not None and evaluation.features.labels is not None
    labels, groups = evaluation.features.labels.numpy(), evaluation.assignments
    n, runs = len(labels), evaluation.groups.all_assignments
    right, in_place = (evaluation.predicted.numpy() == labels), matched(labels, groups)
    accuracies = [cluster_accuracy(labels, run) for run in runs]
    nmis = [normalized_mutual_info_score(labels, run) for run in runs]
    return {
        "knn_accuracy": measure(lambda rows: float(right[rows].mean()), n),
        "cluster_accuracy": measure(
            lambda rows: float(in_place[rows].mean()), n, spread=float(np.std(accuracies))
        ),
        "nmi": measure(
            lambda rows: float(normalized_mutual_info_score(labels[rows], groups[rows])),
            n,
            spread=float(np.std(nmis)),
        ),
    }


def errors_of_score(score: Score) -> Measured:
    """A protocol's score, a mean over images, as something to compare."""
    assert score.per_image is not None
    values = score.per_image
    return measure(lambda rows: float(values[rows].mean()), len(values), spread=score.spread)


def label_free(
    encoder: MimRefinerModel,
    images: ImageDataset,
    evaluation: Evaluation,
    seed: int,
    features: Path,
    loading: Loading,
) -> dict[str, Measured]:
    """What can be said without labels, with errors over images.

    `neighbour_agreement` (see neighbour_agreement.py) of the last block, and `silhouette` (-1 to 1) of the groups of `evaluation` among
    at most 5000 images. A silhouette says how separate the groups are in each model's own space, not how good the groups are.
    """
    measured = {}
    column = own_columns(encoder.config)[-1:]
    if len(images) > NUM_NEIGHBOURS:
        view = global_view(vars(encoder)["image_processor"], encoder.config.image_hw[0], 0.5, seed)
        altered = for_altered_images(features)
        seen = read_rows(encoder, images, view, column, features=altered, loading=loading)
        agreement = neighbour_agreement(
            evaluation.features.features, seen.column(column[0])
        ).numpy()
        measured["neighbour_agreement"] = measure(
            lambda rows: float(agreement[rows].mean()), len(agreement)
        )
    rows = np.linspace(0, len(images) - 1, min(len(images), SILHOUETTE_IMAGES)).astype(int)
    groups = evaluation.assignments[rows]
    if 1 < len(np.unique(groups)) < len(groups):
        separate = silhouette_samples(
            evaluation.features.features.numpy()[rows], groups, metric="cosine"
        )
        measured["silhouette"] = measure(
            lambda chosen: float(separate[chosen].mean()), len(separate)
        )
    return measured


# --- two sides ----------------------------------------------------------------------------------------------------------------


def changes_of(before: Side, after: Side) -> dict[str, Change]:
    """The change of every score that both sides have an error for; silhouettes live in two spaces and are not compared."""
    changes = {
        name: compare(before.measured[name], found)
        for name, found in after.measured.items()
        if name in before.measured and name != "silhouette"
    }
    for protocol, result in after.extra.items():
        for name, score in result.scores.items():
            if name not in changes:
                old = before.extra[protocol].scores[name]
                changes[name] = Change(
                    score.value - old.value, math.hypot(score.standard_error, old.standard_error)
                )
    return changes


def describe_change(change: Change) -> dict[str, Any]:
    """A change as JSON: difference, 95 % interval, verdict."""
    low, high = change.interval
    return {"difference": change.difference, "low": low, "high": high, "verdict": change.verdict}


__all__ = [
    "PROTOCOLS",
    "Data",
    "Side",
    "changes_of",
    "describe_change",
    "measure_side",
    "open_data",
    "readable",
]
