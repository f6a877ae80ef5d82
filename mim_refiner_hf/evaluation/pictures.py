"""Pictures of a run: the groups (`clusters.png`), how it got there (`curves.png`), and its blocks (`blocks.png`).

draw_clusters(eval_images, evaluation, Path("out/clusters.png"))
draw_curves(Path("out/log.jsonl"), before, after, Path("out/curves.png"))
draw_block_profile(profile, Path("out/blocks.png"), head_blocks=[8, 9, 10, 11])
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from ..runtime.files import whole_file
from .report import Evaluation

if TYPE_CHECKING:
    from ..data.images import ImageDataset
    from .block_analysis import BlockProfile

MAX_ROWS, TILES, TILE = 50, 14, 64  # of the groups: rows, images per row, pixels per image


def thumbnail(image: Image.Image) -> Image.Image:
    """A square tile: the centre of a photo, or a small image enlarged with its pixels left sharp."""
    resample = Image.Resampling.NEAREST if max(image.size) < TILE else Image.Resampling.LANCZOS
    return ImageOps.fit(image.convert("RGB"), (TILE, TILE), method=resample)


def mosaic(rows: Sequence[Sequence[Image.Image]], columns: int) -> Image.Image:
    """Tiles of one size in rows, on white; one picture draws many times faster than an axes per tile."""
    step = rows[0][0].width + 2
    sheet = Image.new("RGB", (columns * step - 2, len(rows) * step - 2), "white")
    for place, tiles in enumerate(rows):
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (column * step, place * step))
    return sheet


def class_name(images: "ImageDataset", label: int) -> str:
    """What to write for a class: its name, shortened to 18 characters, or its number."""
    name = str(images.class_names[label]) if images.class_names else str(label)
    return name if len(name) <= 18 else name[:17] + "…"


def group_caption(images: "ImageDataset", labels: Tensor | None, members: NDArray[np.int64]) -> str:
    """Size of a group and, with labels, its most frequent class and that class's share."""
    size = f"{len(members)} image{'s' if len(members) > 1 else ''}"
    if labels is None:
        return size
    counts = np.bincount(labels.numpy()[members])
    label = int(counts.argmax())
    return f"{class_name(images, label)}: {100 * counts[label] / len(members):.0f} %\n{size}"


def draw_row(axes: Axes, strip: Image.Image, caption: str) -> None:
    """One group: its images, the caption to their left."""
    axes.imshow(np.asarray(strip), interpolation="nearest")
    axes.set_axis_off()
    axes.text(
        -10,
        TILE / 2,
        caption,
        ha="right",
        va="center",
        fontsize=9,
        linespacing=1.4,
        parse_math=False,
    )


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
    figure.subplots_adjust(
        left=0.17, right=0.99, top=1 - 0.62 / height, bottom=0.08 / height, hspace=0.1
    )
    figure.suptitle(title, fontsize=11, y=1 - 0.12 / height, va="top", parse_math=False)
    for axes, group in zip(rows, shown, strict=True):
        members = order[groups.assignments[order] == group]
        tiles = [thumbnail(eval_images[int(index)].image) for index in members[:TILES]]
        draw_row(axes, mosaic([tiles], TILES), group_caption(eval_images, labels, members))
    save_figure(figure, path)


def plot_knn_per_block(axes: Axes, metrics: Mapping[str, Mapping[str, Any] | None]) -> None:
    """k-NN accuracy of every block (paper, Fig. 3b), one line per entry of `metrics` that has `knn_per_block`."""
    for name, found in metrics.items():
        if found and "knn_per_block" in found:
            axes.plot([100 * value for value in found["knn_per_block"]], marker="o", label=name)
    axes.set(title="k-NN accuracy per block (%)", xlabel="block (0-based, raw output)")
    axes.legend()


def draw_curves(
    log: Path, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, path: Path
) -> None:
    """Draw a run as a PNG: loss per head, what the nearest neighbours are like per head, and k-NN accuracy per block.

    Args:
        log: `log.jsonl` of the run.
        before, after: metrics of the two evaluations; without `knn_per_block` the third panel is left out.
    """
    lines = [line for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
    heads = [
        key.removesuffix("/loss") for key in (lines[-1] if lines else {}) if key.endswith("/loss")
    ]
    labelled = any(f"{head}/neighbour_accuracy" in line for head in heads for line in lines)
    neighbours = "neighbour_accuracy" if labelled else "neighbour_similarity"
    profiled = any(metrics and "knn_per_block" in metrics for metrics in (before, after))
    figure = Figure(figsize=(4.4 * (3 if profiled else 2), 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3 if profiled else 2, squeeze=False)[0]
    for axes, key, title in (
        (panels[0], "loss", "loss per head"),
        (panels[1], neighbours, f"{neighbours.replace('_', ' ')} per head"),
    ):
        for head in heads:
            points = [
                (line["step"], line[f"{head}/{key}"]) for line in lines if f"{head}/{key}" in line
            ]
            axes.plot(*zip(*points, strict=True), label=head, linewidth=1.2)
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize=7)
    if profiled:
        plot_knn_per_block(panels[2], {"before": before, "after": after})
    save_figure(figure, path)


def draw_block_profile(
    profile: Sequence["BlockProfile"], path: Path, head_blocks: Sequence[int] = ()
) -> None:
    """Draw what was measured per block as a PNG (paper, Fig. 3b, 3d and 6; Table 14); `head_blocks` are shaded.

    Panels and lines that were not measured are left out.
    """
    panels = {
        "features (%)": {
            "k-NN accuracy": "knn_accuracy",
            "neighbour agreement": "neighbour_agreement",
        },
        "relative improvement": {
            "k-NN accuracy": "knn_improvement",
            "reconstruction": "reconstruction_improvement",
        },
        "reconstruction loss": {"masked patches": "reconstruction_loss"},
        "attention distance (px)": {"mean over heads": "attention_distance"},
        "feature variance": {"mean over channels": "feature_variance"},
    }
    measured = {
        title: {name: [getattr(block, field) for block in profile] for name, field in lines.items()}
        for title, lines in panels.items()
        if any(getattr(profile[-1], field) is not None for field in lines.values())
    }
    figure = Figure(figsize=(3.6 * len(measured), 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, lines) in zip(
        figure.subplots(1, len(measured), squeeze=False)[0], measured.items(), strict=True
    ):
        scale = 100 if title.endswith("(%)") else 1
        for name, values in lines.items():
            points = [
                (block.block, scale * value)
                for block, value in zip(profile, values, strict=True)
                if value is not None
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=name
                )
        for block in head_blocks:
            axes.axvspan(block - 0.5, block + 0.5, color="tab:orange", alpha=0.15, linewidth=0)
        axes.set(title=title, xlabel="block (0-based, raw output)")
        axes.legend(fontsize=7)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as new:
        figure.savefig(new, format="png")


__all__ = ["draw_block_profile", "draw_clusters", "draw_curves"]
