"""The evidence of a run: one evaluation of an encoder, the before/after table, and a picture of the groups.

    before = evaluate_encoder(encoder, processor, train_images, eval_images)
    ...                                                               # refine
    after = evaluate_encoder(encoder, processor, train_images, eval_images)
    print(comparison_table(before.metrics, after.metrics))
    draw_clusters(eval_images, after, Path("out/clusters.png"))

Without labels only RankMe is measured, and the picture shows a rule-of-thumb number of groups.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from ..modeling_mim_refiner import MimRefinerModel
from .cluster_scores import KMeansRun, cluster_scores, kmeans, mean_scores, rankme
from .features import FeatureSet, extract_features
from .knn import knn_accuracy

if TYPE_CHECKING:
    from ..data import ImageDataset

BANK_SIZE = 20_000  # training images in the k-NN bank, at most
MAX_PICTURE_GROUPS = 20  # without labels
MAX_ROWS, TILES, TILE = 50, 14, 64  # of the picture: groups, images per group, pixels per image

# Every scalar metric, in the order of the tables: name for readers, and whether it is a fraction of 1
METRICS: dict[str, tuple[str, bool]] = {
    "knn_accuracy": ("k-NN accuracy (k=10)", True),
    "cluster_accuracy": ("cluster accuracy", True),
    "nmi": ("NMI", True),
    "ami": ("AMI", True),
    "ari": ("ARI", True),
    "cluster_accuracy_mean": ("cluster accuracy, mean over runs", True),
    "nmi_mean": ("NMI, mean over runs", True),
    "rankme": ("RankMe (no labels needed)", False),
}


@dataclass
class Evaluation:
    """What `evaluate_encoder` measured on the evaluation images.

    Attributes:
        metrics: `rankme`, and where both sets have labels also `knn_accuracy`, `cluster_accuracy`, `nmi`, `ami`, `ari` (of the
            k-means run with the lowest inertia), `cluster_accuracy_mean`, `nmi_mean` (over all runs) and, when asked for,
            `knn_per_block` (a list, first block first). All but `rankme` are fractions of 1.
        features: the last block's features of the evaluation images, and their labels.
        groups: the k-means run behind the clustering metrics and the picture.
    """

    metrics: dict[str, Any]
    features: FeatureSet
    groups: KMeansRun

    @property
    def assignments(self) -> NDArray[np.int64]:
        """Group of each evaluation image (N,)."""
        return self.groups.assignments


def fully_labelled(images: "ImageDataset") -> bool:
    """Whether every image has a label."""
    return images.labels is not None and bool((images.labels >= 0).all())


def evenly_spaced(images: "ImageDataset", limit: int) -> "ImageDataset":
    """At most `limit` of the images, evenly spaced over the data set."""
    if len(images) <= limit:
        return images
    return images.subset([index * len(images) // limit for index in range(limit)])


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
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    per_block: bool = True,
) -> Evaluation:
    """Measure a frozen encoder by the paper's k-NN and clustering protocols, and by RankMe.

    Args:
        encoder: the model; comes back in the mode and on the device it came with.
        processor: its image processor.
        train_images: the k-NN bank; of more than 20 000 images, 20 000 evenly spaced ones are used.
        eval_images: what is classified and clustered. k-means runs 100 times with k = the number of its classes.
        seed: of the first k-means run.
        batch_size, num_workers, device: as in `extract_features`.
        per_block: also the k-NN accuracy of every block; keeps the features of all blocks in memory.
    """
    labelled = fully_labelled(train_images) and fully_labelled(eval_images)
    settings: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "device": device}
    settings["blocks"] = range(encoder.config.num_hidden_layers) if per_block and labelled else None
    found = extract_features(encoder, eval_images, processor, desc="evaluation images", **settings)
    metrics: dict[str, Any] = {}
    if labelled:
        bank = extract_features(encoder, evenly_spaced(train_images, BANK_SIZE), processor, desc="k-NN bank", **settings)
        assert bank.labels is not None and found.labels is not None  # `labelled` says so
        metrics["knn_accuracy"] = knn_accuracy(bank.features, bank.labels, found.features, found.labels)
        groups = kmeans(found.features, len(np.unique(found.labels)), seed=seed)
        metrics |= clustering_metrics(found.labels.numpy(), groups)
        if per_block:
            metrics["knn_per_block"] = [
                knn_accuracy(bank.blocks[block], bank.labels, found.blocks[block], found.labels) for block in found.blocks
            ]
    else:
        groups = kmeans(found.features, picture_groups(len(eval_images)), runs=10, seed=seed)
    metrics["rankme"] = rankme(found.features)
    return Evaluation(metrics, FeatureSet(found.features, labels=found.labels), groups)


def format_metric(name: str, value: float) -> str:
    """A fraction as a percentage, anything else with one decimal."""
    return f"{100 * value:.1f} %" if METRICS[name][1] else f"{value:.1f}"


def format_change(name: str, before: float, after: float) -> str:
    """The signed difference; percentage points for fractions."""
    return f"{100 * (after - before):+.1f} points" if METRICS[name][1] else f"{after - before:+.1f}"


def comparison_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(name, before, after, change) of every scalar metric that both sides have, as text."""
    rows = []
    for name, (label, _) in METRICS.items():
        if name in before and name in after:
            old, new = before[name], after[name]
            rows.append((label, format_metric(name, old), format_metric(name, new), format_change(name, old, new)))
    return rows


def comparison_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The metrics of two evaluations as an aligned plain-text table: metric, before, after, change."""
    rows = [("metric", "before", "after", "change"), *comparison_rows(before, after)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    aligned = (str.ljust, str.rjust, str.rjust, str.rjust)
    lines = ["  ".join(align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def thumbnail(image: Image.Image) -> Image.Image:
    """A square tile: the centre of a photo, or a small image enlarged with its pixels left sharp."""
    resample = Image.Resampling.NEAREST if max(image.size) < TILE else Image.Resampling.LANCZOS
    return ImageOps.fit(image.convert("RGB"), (TILE, TILE), method=resample)


def group_strip(images: "ImageDataset", members: NDArray[np.int64]) -> Image.Image:
    """The first images of a group side by side, on white."""
    strip = Image.new("RGB", (TILES * (TILE + 2) - 2, TILE), "white")
    for column, index in enumerate(members[:TILES]):
        strip.paste(thumbnail(images[int(index)].image), (column * (TILE + 2), 0))
    return strip


def group_caption(images: "ImageDataset", labels: Tensor | None, members: NDArray[np.int64]) -> str:
    """Size of a group and, with labels, its most frequent class and that class's share."""
    size = f"{len(members)} image{'s' if len(members) > 1 else ''}"
    if labels is None:
        return size
    counts = np.bincount(labels.numpy()[members])
    label = int(counts.argmax())
    name = str(images.class_names[label]) if images.class_names else str(label)
    name = name if len(name) <= 18 else name[:17] + "…"
    return f"{name}: {100 * counts[label] / len(members):.0f} %\n{size}"


def draw_row(axes: Axes, strip: Image.Image, caption: str) -> None:
    """One group: its images, the caption to their left."""
    axes.imshow(np.asarray(strip), interpolation="nearest")
    axes.set_axis_off()
    axes.text(-10, TILE / 2, caption, ha="right", va="center", fontsize=9, linespacing=1.4, parse_math=False)


def draw_clusters(eval_images: "ImageDataset", evaluation: Evaluation, path: Path) -> None:
    """Draw the groups as a PNG: a row per group, largest first, its images nearest to the centre first.

    Beside a row stand the group's size and, where labels exist, its majority class and that class's share. Of more than 50
    groups the 50 largest are drawn. The file appears whole or not at all.
    """
    groups, labels = evaluation.groups, evaluation.features.labels
    points = F.normalize(evaluation.features.features, dim=1).numpy()
    distance = np.linalg.norm(points - groups.centroids[groups.assignments], axis=1)  # (N,)
    order = np.argsort(distance, kind="stable")
    ids, sizes = np.unique(groups.assignments, return_counts=True)
    shown = ids[np.argsort(-sizes, kind="stable")][:MAX_ROWS]
    title = f"{eval_images.name}: {len(points)} images in {len(ids)} groups"
    if len(shown) < len(ids):
        title += f" ({len(shown)} largest shown)"
    if labels is None:
        title += "\nno labels: the number of groups is a rule of thumb, sqrt(n / 2) up to 20"
    else:
        title += "\nnearest to the group's centre first; left: most frequent class and its share of the group"
    height = 0.62 * len(shown) + 0.75
    figure = Figure(figsize=(10.5, height), dpi=110)
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.17, right=0.99, top=1 - 0.62 / height, bottom=0.08 / height, hspace=0.1)
    figure.suptitle(title, fontsize=11, y=1 - 0.12 / height, va="top", parse_math=False)
    for axes, group in zip(rows, shown, strict=True):
        members = order[groups.assignments[order] == group]
        draw_row(axes, group_strip(eval_images, members), group_caption(eval_images, labels, members))
    temporary = path.with_name(f".tmp-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(temporary, format="png")
    temporary.replace(path)


__all__ = ["Evaluation", "comparison_table", "draw_clusters", "evaluate_encoder"]
