"""Plots of an evaluation: block profile, groups against classes, a map, neighbours.

    draw_profile({"before": old.metrics, "after": new.metrics}, Path("out/block_profile.png"))
    draw_confusion(images, evaluation, Path("out/confusion.png"))
    draw_map(images, evaluation, Path("out/map.png"))
    draw_neighbours(images, bank_images, evaluation, Path("out/neighbours.png"))

Every file appears whole or not at all.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.optimize import linear_sum_assignment
from sklearn.metrics.cluster import contingency_matrix

from .cluster_scores import KMeansRun
from .feature_map import flat_map
from .neighbour_agreement import nearest_others
from .pictures import (
    TILE,
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
# of the pictures of before beside after: photos that are looked up, rows of groups, photos a side
QUERIES = 10
GROUP_ROWS = 12
SIDE_TILES = 5
GROUP_TILES = 7


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
    picture = axes.imshow(
        shares, aspect="auto", vmin=0, vmax=1, cmap="Blues", interpolation="nearest"
    )
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
    legend = axes.legend(
        fontsize=7,
        markerscale=markerscale,
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )
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
        bank_images: the images of the k-NN bank, in its order.
    """
    measured = evaluation.features
    neighbours = evaluation.neighbours
    assert neighbours is not None and measured.labels is not None
    assert evaluation.predicted is not None

    is_right = evaluation.predicted == measured.labels
    right = evenly_chosen(is_right)
    wrong = evenly_chosen(~is_right)
    shown = [*right, *wrong]

    sheet = []
    for place in shown:
        tiles = [framed(square_tile(images[place].image), "white")]
        for row in neighbours[place, :SHOWN_NEIGHBOURS].tolist():
            neighbour = bank_images[row]
            same = neighbour.label == int(measured.labels[place])
            colour = "tab:green" if same else "tab:red"
            tiles.append(framed(square_tile(neighbour.image), colour))
        sheet.append(tiles)

    words = ["right"] * len(right) + ["wrong"] * len(wrong)
    title = "image, then its nearest neighbours; green: its class"
    draw_sheet(sheet, title, words, path)


# --- before beside after ---------------------------------------------------------------------


def draw_neighbours_before_after(
    images: "ImageDataset", before: torch.Tensor, after: torch.Tensor, path: Path
) -> None:
    """Ten photos, and their five nearest others before beside those after, no labels needed.

    Args:
        before, after: features of the images (N, D), at least 2.
    """
    count = min(SIDE_TILES, len(images) - 1)
    queries = np.linspace(0, len(images) - 1, min(QUERIES, len(images))).astype(int)
    old, new = (nearest_others(features, count).numpy() for features in (before, after))

    sheet = []
    for query in queries:
        tiles = [tile_of(images, query), blank_tile()]
        tiles += [tile_of(images, place) for place in old[query]]
        tiles.append(blank_tile())
        tiles += [tile_of(images, place) for place in new[query]]
        sheet.append(tiles)
    title = "a photo; its nearest others before (left) and after (right)"
    draw_sheet(sheet, title, [""] * len(sheet), path)


def draw_groups_before_after(
    images: "ImageDataset",
    before: tuple[torch.Tensor, KMeansRun],
    after: tuple[torch.Tensor, KMeansRun],
    path: Path,
) -> None:
    """The largest groups before, each beside the group after that shares most photos with it.

    A row shows the photos nearest to both centres; groups are matched one to one.

    Args:
        before, after: features of the images (N, D), and their groups.
    """
    was, now = before[1].assignments, after[1].assignments
    counts = contingency_matrix(was, now)
    old_ids, sizes = np.unique(was, return_counts=True)
    new_ids = np.unique(now)
    partner = dict(zip(*linear_sum_assignment(counts, maximize=True), strict=True))
    largest = [place for place in np.argsort(-sizes, kind="stable") if place in partner]

    sheet = []
    words = []
    for place in largest[:GROUP_ROWS]:
        twin = partner[place]
        tiles = exemplar_tiles(images, *before, int(old_ids[place]))
        tiles += [blank_tile(), *exemplar_tiles(images, *after, int(new_ids[twin]))]
        sheet.append(tiles)
        words.append(f"{sizes[place]} / {(now == new_ids[twin]).sum()}")
    title = "groups before (left) and after (right), number of photos before / after"
    draw_sheet(sheet, title, words, path)


def exemplar_tiles(
    images: "ImageDataset", features: torch.Tensor, groups: KMeansRun, group: int
) -> list[Image.Image]:
    """The photos nearest to the centre of a group, then blanks where it has fewer than a row."""
    members = np.flatnonzero(groups.assignments == group)
    points = F.normalize(features[members], dim=1).numpy()
    distance = np.linalg.norm(points - groups.centroids[group], axis=1)
    nearest_first = members[np.argsort(distance, kind="stable")][:GROUP_TILES]

    tiles = [tile_of(images, place) for place in nearest_first]
    return tiles + [blank_tile() for _ in range(GROUP_TILES - len(tiles))]


def tile_of(images: "ImageDataset", place: int) -> Image.Image:
    """An image as a tile."""
    return square_tile(images[int(place)].image)


def blank_tile() -> Image.Image:
    """A white tile."""
    return Image.new("RGB", (TILE, TILE), "white")


def draw_sheet(
    sheet: Sequence[Sequence[Image.Image]], title: str, words: Sequence[str], path: Path
) -> None:
    """Rows of tiles under a title, each with a word beside its middle."""
    figure = new_figure(1 + 0.62 * len(sheet[0]), 0.62 * len(sheet) + 0.5)
    axes = figure.subplots()
    axes.imshow(np.asarray(mosaic(sheet, len(sheet[0]))), interpolation="antialiased")
    axes.set_title(title, fontsize=9)
    step = sheet[0][0].height + 2
    middles = [(row + 0.5) * step for row in range(len(sheet))]
    axes.set_yticks(middles, words, fontsize=8)
    axes.set(xticks=[], frame_on=False)
    axes.tick_params(length=0)
    save_figure(figure, path)
