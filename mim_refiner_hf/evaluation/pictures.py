"""Pictures of a run: its groups, how it got there, and its blocks.

    draw_clusters(eval_images, evaluation, Path("out/clusters.png"))
    draw_curves(Path("out/log.jsonl"), before, after, Path("out/curves.png"))
    draw_block_profile(profile, Path("out/blocks.png"), head_blocks=[8, 9, 10, 11])

Every file appears whole or not at all.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from ..clustering.channels import Picture
from ..runtime.files import whole_file
from ..runtime.text import one_line
from .report import Evaluation

if TYPE_CHECKING:
    from ..data.images import ImageDataset
    from .block_analysis import BlockProfile

# of the picture of the groups: groups, images of a group, pixels of an image
MAX_ROWS = 50
TILES = 14
TILE = 64
# inches
ROW_HEIGHT = 0.62

# title of a panel -> name of a line -> field of `BlockProfile`
BLOCK_PANELS = {
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


# --- what all pictures share -----------------------------------------------------------------


def new_figure(
    width: float, height: float, layout: Literal["constrained"] | None = "constrained"
) -> Figure:
    """An empty figure of so many inches, drawn without a display."""
    figure = Figure(figsize=(width, height), dpi=110, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as new:
        figure.savefig(new, format="png")


def square_tile(image: Picture) -> Image.Image:
    """The centre of a photo, or a small image enlarged with its pixels left sharp."""
    small = max(image.size) < TILE
    resample = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return ImageOps.fit(image.convert("RGB"), (TILE, TILE), method=resample)


def mosaic(rows: Sequence[Sequence[Image.Image]], columns: int) -> Image.Image:
    """Tiles of one size in rows, on white.

    One picture draws many times faster than a panel of the figure per tile.
    """
    step = rows[0][0].width + 2
    sheet = Image.new("RGB", (columns * step - 2, len(rows) * step - 2), "white")
    for place, tiles in enumerate(rows):
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (column * step, place * step))
    return sheet


def class_name(images: "ImageDataset", label: int) -> str:
    """What to write for a class: its name, shortened to 18 characters, or its number."""
    # odd bytes and line ends are spelt out: no font has them
    name = one_line(images.class_names[label]) if images.class_names else str(label)
    return name if len(name) <= 18 else name[:17] + "…"


def plot_knn_per_block(axes: Axes, metrics: Mapping[str, Mapping[str, Any] | None]) -> None:
    """k-NN accuracy of every block (paper, Fig. 3b): a line per entry that has `knn_per_block`."""
    for name, measured in metrics.items():
        if measured and "knn_per_block" in measured:
            accuracies = [100 * value for value in measured["knn_per_block"]]
            axes.plot(accuracies, marker="o", label=name)
    axes.set(title="k-NN accuracy per block (%)", xlabel="block (0-based, raw output)")
    axes.legend()


# --- the groups ------------------------------------------------------------------------------


def draw_clusters(eval_images: "ImageDataset", evaluation: Evaluation, path: Path) -> None:
    """Draw the groups: a row per group, largest first, images nearest to its centre first.

    Beside a row stand the group's size and, where labels exist, its majority class and that
    class's share. Of more than 50 groups the 50 largest are drawn.
    """
    groups = evaluation.groups
    labels = evaluation.features.labels
    points = F.normalize(evaluation.features.features, dim=1).numpy()
    distance = np.linalg.norm(points - groups.centroids[groups.assignments], axis=1)  # (N,)
    nearest_first = np.argsort(distance, kind="stable")

    ids, sizes = np.unique(groups.assignments, return_counts=True)
    shown = ids[np.argsort(-sizes, kind="stable")][:MAX_ROWS]

    # the title needs the same room whatever the number of rows
    height = ROW_HEIGHT * len(shown) + 0.75
    figure = new_figure(10.5, height, layout=None)
    rows = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    figure.subplots_adjust(
        left=0.17, right=0.99, top=1 - ROW_HEIGHT / height, bottom=0.08 / height, hspace=0.1
    )
    title = clusters_title(one_line(eval_images.name), len(points), len(ids), labels is not None)
    figure.suptitle(title, fontsize=11, y=1 - 0.12 / height, va="top", parse_math=False)

    for axes, group in zip(rows, shown, strict=True):
        members = nearest_first[groups.assignments[nearest_first] == group]
        tiles = [square_tile(eval_images[int(index)].image) for index in members[:TILES]]
        draw_row(axes, mosaic([tiles], TILES), group_caption(eval_images, labels, members))
    save_figure(figure, path)


def clusters_title(name: str, num_images: int, num_groups: int, labelled: bool) -> str:
    """What is shown, and how the number of groups came about or what stands beside them."""
    title = f"{name}: {num_images} images in {num_groups} groups"
    if num_groups > MAX_ROWS:
        title += f" ({MAX_ROWS} largest shown)"
    if labelled:
        note = "nearest to the group's centre first; left: most frequent class and its share"
        return f"{title}\n{note} of the group"
    return f"{title}\nno labels: the number of groups is a rule of thumb, sqrt(n / 2) up to 20"


def group_caption(images: "ImageDataset", labels: Tensor | None, members: NDArray[np.int64]) -> str:
    """Size of a group and, with labels, its most frequent class and that class's share."""
    size = "1 image" if len(members) == 1 else f"{len(members)} images"
    if labels is None:
        return size
    counts = np.bincount(labels.numpy()[members])
    label = int(counts.argmax())
    return f"{class_name(images, label)}: {100 * counts[label] / len(members):.0f} %\n{size}"


def draw_row(axes: Axes, strip: Image.Image, caption: str) -> None:
    """One group: its images, the caption to their left."""
    axes.imshow(np.asarray(strip), interpolation="nearest")
    axes.set_axis_off()
    text = axes.text(-10, TILE / 2, caption, ha="right", va="center", fontsize=9, linespacing=1.4)
    text.set_parse_math(False)


# --- the run ---------------------------------------------------------------------------------


def draw_curves(
    log: Path, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, path: Path
) -> None:
    """Draw a run: loss per head, its neighbours per head, and k-NN accuracy per block.

    Args:
        log: `log.jsonl` of the run.
        before, after: metrics of the two evaluations; without `knn_per_block` the third panel is
            left out.
    """
    logged = map(json.loads, log.read_text().splitlines())
    lines = [line for line in logged if "loss" in line]
    last = lines[-1] if lines else {}
    heads = [key.removesuffix("/loss") for key in last if key.endswith("/loss")]

    # where there are labels, the share of neighbours of the same class says more
    logged_names = set(itertools.chain(*lines))
    labelled = any(f"{head}/neighbour_accuracy" in logged_names for head in heads)
    neighbours = "neighbour_accuracy" if labelled else "neighbour_similarity"
    titles = {
        "loss": "loss per head",
        neighbours: f"{neighbours.replace('_', ' ')} per head",
    }

    profiled = any(metrics and "knn_per_block" in metrics for metrics in (before, after))
    count = 3 if profiled else 2
    figure = new_figure(4.4 * count, 3.4)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes, (key, title) in zip(panels, titles.items(), strict=False):
        for head in heads:
            name = f"{head}/{key}"
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points, strict=True), label=head, linewidth=1.2)
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize=7)
    if profiled:
        plot_knn_per_block(panels[2], {"before": before, "after": after})
    save_figure(figure, path)


# --- the blocks ------------------------------------------------------------------------------


def draw_block_profile(
    profile: Sequence["BlockProfile"], path: Path, head_blocks: Sequence[int] = ()
) -> None:
    """Draw what was measured per block (paper, Fig. 3b, 3d and 6; Table 14).

    Panels and lines that were not measured are left out; `head_blocks` are shaded.
    """
    measured = []
    for title, lines in BLOCK_PANELS.items():
        if any(getattr(profile[-1], field) is not None for field in lines.values()):
            measured.append(title)

    figure = new_figure(3.6 * len(measured), 3.2)
    panels = figure.subplots(1, len(measured), squeeze=False)[0]
    for axes, title in zip(panels, measured, strict=True):
        scale = 100 if title.endswith("(%)") else 1
        for name, field in BLOCK_PANELS[title].items():
            plot_field(axes, profile, field, scale, name)
        for block in head_blocks:
            axes.axvspan(block - 0.5, block + 0.5, color="tab:orange", alpha=0.15, linewidth=0)
        axes.set(title=title, xlabel="block (0-based, raw output)")
        axes.legend(fontsize=7)
    save_figure(figure, path)


def plot_field(
    axes: Axes, profile: Sequence["BlockProfile"], field: str, scale: float, name: str
) -> None:
    """A line through a field of the blocks that have it; none where no block has."""
    blocks, values = [], []
    for block in profile:
        value = getattr(block, field)
        if value is not None:
            blocks.append(block.block)
            values.append(scale * value)
    if blocks:
        axes.plot(blocks, values, marker="o", markersize=3, linewidth=1.2, label=name)
