"""Plots of an evaluation: block profile, groups against classes, a map, neighbours.

    draw_profile({"before": old.metrics, "after": new.metrics}, Path("out/block_profile.png"))
    draw_confusion(images, evaluation, Path("out/confusion.png"))
    draw_map(images, evaluation, Path("out/map.png"))
    draw_neighbours(images, bank_images, evaluation, Path("out/neighbours.png"))

Every file appears whole or not at all.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.optimize import linear_sum_assignment
from sklearn.metrics.cluster import contingency_matrix

from .feature_map import flat_map
from .knn import nearest, standardise
from .pictures import (
    class_name,
    mosaic,
    new_figure,
    plot_knn_per_block,
    save_figure,
    square_tile,
)
from .report import Evaluation

if TYPE_CHECKING:
    from ..data.images import ImageDataset

# of the picture of neighbours: how many an image has; images that are right, and that are wrong
SHOWN_NEIGHBOURS = 6
EXAMPLES = 6
# more classes are numbered: their names would overlap
NAMED_CLASSES = 30
MAP_IMAGES = 5000


def draw_profile(metrics: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """`plot_knn_per_block` as a PNG."""
    figure = new_figure(5, 3.6)
    plot_knn_per_block(figure.subplots(), metrics)
    save_figure(figure, path)


# --- groups against classes ------------------------------------------------------------------


def class_shares(labels: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of every class that is in each group (classes, groups).

    The groups stand in the order that puts each class's own group on the diagonal: the best
    one-to-one match of both (the Hungarian algorithm).
    """
    counts = contingency_matrix(labels, groups).astype(float)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    own = columns[np.argsort(rows)]
    rest = np.setdiff1d(np.arange(counts.shape[1]), own)
    order = np.concatenate([own, rest]).astype(np.int64)

    shares: NDArray[np.float64] = counts / counts.sum(axis=1, keepdims=True)
    return shares[:, order]


def draw_confusion(images: "ImageDataset", evaluation: Evaluation, path: Path) -> None:
    """How each class spreads over the groups, as a table of shades; see `class_shares`."""
    assert evaluation.features.labels is not None
    labels = evaluation.features.labels.numpy()
    shares = class_shares(labels, evaluation.assignments)
    classes = np.unique(labels)

    side = min(12.0, 2.5 + 0.28 * len(classes))
    figure = new_figure(side + 0.8, side)
    axes = figure.subplots()
    shades: dict[str, Any] = {"vmin": 0, "vmax": 1, "cmap": "Blues", "interpolation": "nearest"}
    picture = axes.imshow(shares, aspect="auto", **shades)
    if len(classes) <= NAMED_CLASSES:
        names = [class_name(images, label) for label in classes]
        axes.set_yticks(range(len(classes)), names, parse_math=False)
    axes.set(xlabel="group", ylabel="class")
    figure.colorbar(picture, ax=axes, label="share of the class")
    save_figure(figure, path)


# --- the map ---------------------------------------------------------------------------------


def draw_map(images: "ImageDataset", evaluation: Evaluation, path: Path) -> None:
    """The evaluation images as dots in two dimensions; at most 5000.

    They are coloured by class or, without labels, by group.
    """
    total = len(evaluation.assignments)
    shown = np.linspace(0, total - 1, min(MAP_IMAGES, total)).astype(int)
    points, method = flat_map(evaluation.features.features[torch.from_numpy(shown)])

    labels = evaluation.features.labels
    if labels is None:
        kinds = evaluation.assignments[shown]
        names = {kind: f"group {kind}" for kind in np.unique(kinds)}
    else:
        kinds = labels.numpy()[shown]
        names = {kind: class_name(images, kind) for kind in np.unique(kinds)}

    figure = new_figure(6.6, 5)
    axes = figure.subplots()
    # in square points: few dots are drawn larger
    size = min(5 * math.sqrt(MAP_IMAGES / len(shown)), 40)
    for place, (kind, name) in enumerate(names.items()):
        x, y = points.numpy()[kinds == kind].T
        axes.scatter(x, y, s=size, linewidths=0, color=f"C{place % 10}", label=name, alpha=0.7)

    by = "group" if labels is None else "class"
    axes.set(title=f"{method} of the features, by {by}", xticks=[], yticks=[])
    if len(names) <= NAMED_CLASSES:
        legend_beside(axes, math.sqrt(20 / size))
    save_figure(figure, path)


def legend_beside(axes: Axes, markerscale: float) -> None:
    """A legend to the right of the dots; a name with a dollar sign is no formula."""
    beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    legend = axes.legend(fontsize=7, markerscale=markerscale, frameon=False, **beside)
    for text in legend.get_texts():
        text.set_parse_math(False)


# --- the neighbours --------------------------------------------------------------------------


def framed(tile: Image.Image, colour: str) -> Image.Image:
    """A tile with a frame of a matplotlib colour."""
    return ImageOps.expand(tile, border=4, fill=tuple(round(255 * part) for part in to_rgb(colour)))


def evenly_chosen(hits: torch.Tensor) -> list[int]:
    """Up to `EXAMPLES` of the places where `hits` (N,) is true."""
    places = hits.nonzero()[:, 0]
    return places[:: max(1, len(places) // EXAMPLES)][:EXAMPLES].tolist()


def draw_neighbours(
    images: "ImageDataset", bank_images: "ImageDataset", evaluation: Evaluation, path: Path
) -> None:
    """Images classified right, and some classified wrong, each with its nearest in the k-NN bank.

    Args:
        bank_images: the images behind `evaluation.bank`, in its order.
    """
    measured = evaluation.features
    bank = evaluation.bank
    assert bank is not None and measured.labels is not None and evaluation.predicted is not None

    is_right = evaluation.predicted == measured.labels
    right = evenly_chosen(is_right)
    wrong = evenly_chosen(~is_right)
    shown = [*right, *wrong]
    bank_x, queries = standardise(bank.features, measured.features[shown])
    _, neighbours = nearest(queries, bank_x, min(SHOWN_NEIGHBOURS, len(bank_x)))

    sheet = []
    for place, columns in zip(shown, neighbours.tolist(), strict=True):
        tiles = [framed(square_tile(images[place].image), "white")]
        for column in columns:
            neighbour = bank_images[column]
            same = neighbour.label == int(measured.labels[place])
            tiles.append(framed(square_tile(neighbour.image), "tab:green" if same else "tab:red"))
        sheet.append(tiles)

    figure = new_figure(1 + 0.85 * len(sheet[0]), 0.85 * len(sheet) + 0.5)
    axes = figure.subplots()
    axes.imshow(np.asarray(mosaic(sheet, len(sheet[0]))), interpolation="antialiased")
    axes.set_title("image, then its nearest neighbours; green: its class", fontsize=9)

    # a word beside the middle of every row
    step = sheet[0][0].height + 2
    middles = [(row + 0.5) * step for row in range(len(sheet))]
    words = ["right"] * len(right) + ["wrong"] * len(wrong)
    axes.set_yticks(middles, words, fontsize=8)
    axes.set(xticks=[], frame_on=False)
    axes.tick_params(length=0)
    save_figure(figure, path)


__all__ = ["draw_confusion", "draw_map", "draw_neighbours", "draw_profile"]
