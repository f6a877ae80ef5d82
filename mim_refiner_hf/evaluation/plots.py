"""Plots of an evaluation: block profile, groups against classes, a map of the features, neighbours right and wrong.

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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.optimize import linear_sum_assignment
from sklearn.metrics.cluster import contingency_matrix

from .feature_map import flat_map
from .knn import nearest, standardise
from .pictures import class_name, mosaic, plot_knn_per_block, save_figure, thumbnail
from .report import Evaluation

if TYPE_CHECKING:
    from ..data.images import ImageDataset

NEIGHBOURS, EXAMPLES = (
    6,
    6,
)  # of the neighbours' picture: neighbours per image, images right and images wrong
NAMED_CLASSES = 30  # more are numbered: their names would overlap
MAP_IMAGES = 5000


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, drawn without a display."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_profile(metrics: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """`plot_knn_per_block` as a PNG."""
    figure = new_figure(5, 3.6)
    plot_knn_per_block(figure.subplots(), metrics)
    save_figure(figure, path)


def confusion(labels: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Shares (classes, groups) of every class over the groups, in the order that puts each class's own group on the diagonal."""
    counts = contingency_matrix(labels, groups).astype(float)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    own = columns[np.argsort(rows)]
    rest = np.setdiff1d(np.arange(counts.shape[1]), own)
    order = np.concatenate([own, rest]).astype(np.int64)
    shares: NDArray[np.float64] = (counts / counts.sum(axis=1, keepdims=True))[:, order]
    return shares


def draw_confusion(images: "ImageDataset", evaluation: Evaluation, path: Path) -> None:
    """How each class spreads over the groups; the groups are in the order of the best one-to-one match with the classes."""
    assert evaluation.features.labels is not None
    shares = confusion(evaluation.features.labels.numpy(), evaluation.assignments)
    classes = np.unique(evaluation.features.labels.numpy())
    side = min(12.0, 2.5 + 0.28 * len(classes))
    figure = new_figure(side + 0.8, side)
    axes = figure.subplots()
    picture = axes.imshow(
        shares, vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest"
    )
    if len(classes) <= NAMED_CLASSES:
        axes.set_yticks(
            range(len(classes)), [class_name(images, label) for label in classes], parse_math=False
        )
    axes.set(xlabel="group", ylabel="class")
    figure.colorbar(picture, ax=axes, label="share of the class")
    save_figure(figure, path)


def draw_map(images: "ImageDataset", evaluation: Evaluation, path: Path) -> None:
    """The evaluation images as dots in two dimensions, coloured by class or, without labels, by group; at most 5000."""
    labels = evaluation.features.labels
    shown = np.linspace(
        0, len(evaluation.assignments) - 1, min(MAP_IMAGES, len(evaluation.assignments))
    ).astype(int)
    found, method = flat_map(evaluation.features.features[torch.from_numpy(shown)])
    points = found.numpy()
    colours = evaluation.assignments[shown] if labels is None else labels.numpy()[shown]
    figure = new_figure(6.6, 5)
    axes = figure.subplots()
    kinds, size = (
        np.unique(colours),
        min(5 * math.sqrt(MAP_IMAGES / len(shown)), 40),
    )  # dots, in square points
    for place, kind in enumerate(kinds):
        name = f"group {kind}" if labels is None else class_name(images, kind)
        where = colours == kind
        axes.scatter(
            points[where, 0],
            points[where, 1],
            s=size,
            linewidths=0,
            color=f"C{place % 10}",
            label=name,
            alpha=0.7,
        )
    axes.set(
        title=f"{method} of the features, by {'group' if labels is None else 'class'}",
        xticks=[],
        yticks=[],
    )
    if len(kinds) <= NAMED_CLASSES:
        legend = axes.legend(
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            fontsize=7,
            markerscale=math.sqrt(20 / size),
            frameon=False,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    save_figure(figure, path)


def framed(tile: Image.Image, colour: str) -> Image.Image:
    """A tile with a frame of a matplotlib colour."""
    return ImageOps.expand(tile, border=4, fill=tuple(round(255 * part) for part in to_rgb(colour)))


def draw_neighbours(
    images: "ImageDataset", bank_images: "ImageDataset", evaluation: Evaluation, path: Path
) -> None:
    """Evaluation images, some classified right and some wrong, each with its nearest images of the k-NN bank.

    Args:
        bank_images: the images behind `evaluation.bank`, in its order.
    """
    found, bank = evaluation.features, evaluation.bank
    assert (
        bank is not None
        and bank.labels is not None
        and found.labels is not None
        and evaluation.predicted is not None
    )
    right = evaluation.predicted == found.labels
    chosen = [
        kind.nonzero()[:, 0][:: max(1, int(kind.sum()) // EXAMPLES)][:EXAMPLES].tolist()
        for kind in (right, ~right)
    ]
    rows = [*chosen[0], *chosen[1]]
    bank_x, eval_x = standardise(bank.features, found.features[rows])
    _, nearest_rows = nearest(eval_x, bank_x, min(NEIGHBOURS, len(bank_x)))
    sheet = []
    for row, columns in zip(rows, nearest_rows.tolist(), strict=True):
        neighbours = [bank_images[column] for column in columns]
        same = [
            "tab:green" if neighbour.label == int(found.labels[row]) else "tab:red"
            for neighbour in neighbours
        ]
        tiles = [
            thumbnail(images[row].image),
            *(thumbnail(neighbour.image) for neighbour in neighbours),
        ]
        sheet.append(
            [framed(tile, colour) for tile, colour in zip(tiles, ["white", *same], strict=True)]
        )
    figure = new_figure(1 + 0.85 * len(sheet[0]), 0.85 * len(sheet) + 0.5)
    axes = figure.subplots()
    axes.imshow(np.asarray(mosaic(sheet, len(sheet[0]))), interpolation="antialiased")
    axes.set_title("image, then its nearest neighbours; green: its class", fontsize=9)
    step = sheet[0][0].height + 2
    said = ["right" if place < len(chosen[0]) else "wrong" for place in range(len(rows))]
    axes.set_yticks([(place + 0.5) * step for place in range(len(rows))], said, fontsize=8)
    axes.set(xticks=[], frame_on=False)
    axes.tick_params(length=0)
    save_figure(figure, path)


__all__ = ["draw_confusion", "draw_map", "draw_neighbours", "draw_profile"]
