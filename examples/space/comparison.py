"""What the page shows of a set of images.

Per encoder the groups, the map, the scores and the files to download, as HTML and text.

    found = group_images("after", encoder, collection, num_clusters=None, tell=print)
    html = show_note(found, collection.names) + show_side(found, thumbnails, folder)

All work is done by functions of the package; every name of a file is escaped.
"""

import base64
import io
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mim_refiner_hf import ImageClusteringPipeline
from mim_refiner_hf.clustering.pipeline_image_clustering import TASK
from mim_refiner_hf.data.images import ImageDataset, Sample, fully_labelled
from mim_refiner_hf.data.loading import Loading
from mim_refiner_hf.evaluation import (
    FeatureSet,
    KMeansRun,
    cluster_scores,
    extract_features,
    knn_predict,
    rankme,
    standardise,
)
from mim_refiner_hf.evaluation.neighbour_agreement import (
    NUM_NEIGHBOURS,
    global_view,
    neighbour_agreement,
)
from mim_refiner_hf.evaluation.pictures import group_caption
from mim_refiner_hf.evaluation.plots import draw_map
from mim_refiner_hf.evaluation.report import Evaluation
from mim_refiner_hf.evaluation.scores import as_metrics
from mim_refiner_hf.evaluation.tables import report_table
from mim_refiner_hf.publishing.cluster_folder import describe_groups
from mim_refiner_hf.publishing.cluster_page import Tile, by_confidence, render_page
from mim_refiner_hf.publishing.csv_cells import write_table
from mim_refiner_hf.runs.comparison import Side, changes_of, errors_of
from mim_refiner_hf.runs.verdict import Verdict

SIDES = {"before": "Before refinement", "after": "After refinement"}
SHOWN = 36  # images of a group on the page; the page to download shows all


# --- images ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collection:
    """Images, and what to call each of them on the page.

    File names of users come without the server's folders.
    """

    images: ImageDataset
    names: list[str]

    def without_paths(self, text: str) -> str:
        """A message about these images for the eyes of users.

        Names in place of paths, and no addresses in memory.
        """
        for index, name in enumerate(self.names):
            text = text.replace(self.images.describe(index), name)
        return re.sub(r" <_io\.[^>]*>", "", text)


@dataclass(frozen=True)
class Watched:
    """Images that tell which of them is read."""

    images: ImageDataset
    tell: Callable[[int], object]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Sample:
        self.tell(i)
        return self.images[i]


# --- one side: an encoder's groups of the images ---------------------------------------------


@dataclass(frozen=True)
class Grouping:
    """What one encoder makes of the N readable images.

    Attributes:
        images, names: the readable ones.
        summary: of the pipeline; `summary["broken"]` are the others.
        groups, scores: group and confidence of each image.
        side: scores and their errors.
        evaluation: the measurement behind them, with the features.
    """

    images: ImageDataset
    names: list[str]
    summary: dict[str, Any]
    groups: list[int]
    scores: list[float]
    side: Side
    evaluation: Evaluation

    def broken_of(self, names: Sequence[str]) -> list[str]:
        """Which of all the images, of these names, could not be read."""
        return [names[entry["index"]] for entry in self.summary["broken"]]


def group_images(
    name: str,
    encoder: Any,
    collection: Collection,
    num_clusters: int | None,
    tell: Callable[[int], object],
) -> Grouping:
    """Group the images by `pipeline("image-clustering")`.

    It is made anew each time, as it remembers its last call.
    """
    pipe = ImageClusteringPipeline(
        model=encoder, image_processor=encoder.image_processor, task=TASK
    )
    entries = pipe(Watched(collection.images, tell), num_clusters=num_clusters)
    if len(entries) < 2:
        raise ValueError("Only 1 of these images can be read; give at least 2.")

    kept = [entry["index"] for entry in entries]
    images = collection.images.subset(kept)
    evaluation = measure(pipe, images)
    measured = {} if evaluation.predicted is None else errors_of(evaluation)
    return Grouping(
        images,
        [collection.names[index] for index in kept],
        pipe.summary,
        [entry["cluster"] for entry in entries],
        [entry["score"] for entry in entries],
        Side(name, as_metrics(measured) | evaluation.metrics, measured, {}),
        evaluation,
    )


def measure(pipe: ImageClusteringPipeline, images: ImageDataset) -> Evaluation:
    """Scores of the groups that are shown.

    By labels where there are enough of them; else RankMe and the neighbours' agreement.
    """
    features = pipe.features
    found = pipe.clustering
    assignments = found.assignments.numpy()
    groups = KMeansRun(
        assignments, found.centroids.numpy(), found.inertia, assignments[None].astype(np.int32)
    )
    metrics = {"rankme": rankme(features)}
    labels = predicted = None
    if fully_labelled(images) and len(images) > 2 * NUM_NEIGHBOURS:
        labels = torch.from_numpy(images.labels)
        scores = cluster_scores(labels, assignments)
        predicted = knn_by_halves(features, labels)
        metrics |= {"cluster_accuracy": scores["accuracy"], "nmi": scores["nmi"]}
        metrics["knn_accuracy"] = (predicted == labels).float().mean().item()
    elif len(images) > NUM_NEIGHBOURS:
        processor = global_view(pipe.image_processor, pipe.model.config.image_hw[0])
        view = extract_features(pipe.model, images, processor, loading=Loading(32))
        metrics["neighbour_agreement"] = float(neighbour_agreement(features, view.features).mean())
    return Evaluation(metrics, FeatureSet(features, labels=labels), groups, predicted)


def knn_by_halves(features: Tensor, labels: Tensor) -> Tensor:
    """The k-NN class (N,) of each image by the paper's protocol.

    Each half of the images has the other one as its bank.
    """
    # every class in both halves
    order = labels.argsort(stable=True)
    predicted = torch.empty_like(labels)
    for bank, half in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        bank_x, half_x = standardise(features[bank], features[half])
        (predicted[half],) = knn_predict(bank_x, labels[bank], half_x).values()
    return predicted


# --- what is shown ---------------------------------------------------------------------------


def data_uri(picture: bytes, kind: str) -> str:
    """A picture as text, so that the page asks nobody for it."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def show_note(found: Grouping, names: Sequence[str]) -> str:
    """How many groups and why, whether that is clear, and which files could not be read."""
    kind = "note" if found.summary["clear"] else "note unclear"
    note = f'<p class="{kind}">{escape(describe_groups(found.summary))}</p>'
    broken = found.broken_of(names)
    if broken:
        text = f"Not read, as they are no images or damaged: {', '.join(broken)}"
        note += f'<p class="note broken">{escape(text)}</p>'
    return note


def show_group(
    found: Grouping, number: int, members: Sequence[int], thumbnails: Sequence[bytes]
) -> str:
    """A group: its caption, and its images, most confident first.

    Those that are not of its most frequent class are marked.
    """
    labels = found.evaluation.features.labels
    caption, _, size = group_caption(found.images, labels, np.asarray(members)).rpartition("\n")
    mostly = f"<b>mostly {escape(caption)}</b>" if caption else ""
    most = None if labels is None else int(labels[members].bincount().argmax())

    tiles = []
    for place in members[:SHOWN]:
        kinds = ["tile"]
        if labels is not None and int(labels[place]) != most:
            kinds.append("odd")
        # its pixels stay sharp
        if max(Image.open(io.BytesIO(thumbnails[place])).size) < 48:
            kinds.append("small")
        share = f"{100 * found.scores[place]:.0f}"
        text = escape(f"{found.names[place]}, confidence {share} %")
        tiles.append(
            f'<span class="{" ".join(kinds)}" title="{text}">'
            f'<img alt="{text}" src="{data_uri(thumbnails[place], "jpeg")}">'
            f'<i style="width:{share}%"></i></span>'
        )

    more = f"<small>and {len(members) - SHOWN} more</small>" if len(members) > SHOWN else ""
    heading = f"<h4>Group {number} <small>{size}</small>{mostly}</h4>"
    return (
        f'<section class="group">{heading}<div class="tiles">{"".join(tiles)}{more}</div></section>'
    )


def show_side(found: Grouping, thumbnails: Sequence[bytes], folder: Path) -> str:
    """One column of the comparison: heading, map, groups."""
    draw_map(found.images, found.evaluation, folder / "map.png")
    picture = data_uri((folder / "map.png").read_bytes(), "png")
    parts = [
        f"<h3>{SIDES[found.side.name]}</h3>",
        f'<img class="map" alt="map of the images" src="{picture}">',
    ]
    for number, members in enumerate(by_confidence(found.groups, found.scores)):
        parts.append(show_group(found, number, members, thumbnails))
    return f'<div class="side">{"".join(parts)}</div>'


def legend(found: Grouping) -> str:
    """What the marks on the images mean."""
    odd = ""
    if found.evaluation.features.labels is not None:
        odd = '<i class="odd"></i> not of the group\'s most frequent class'
    return f'<p class="legend"><i class="bar"></i> confidence, 0 to 100 % of the width {odd}</p>'


def show_scores(sides: Sequence[Side]) -> str:
    """The table of `mim-refiner evaluate`: scores with standard errors.

    Of two sides also the change and a verdict.
    """
    before = sides[0] if len(sides) == 2 else None
    after = sides[-1]
    changes = {} if before is None else changes_of(before, after)
    table = report_table(
        {
            "before": None if before is None else before.metrics,
            "after": after.metrics,
            "changes": {name: change.as_json() for name, change in changes.items()},
            "against": "before",
        }
    )
    return table.replace("this model", "after", 1)


def show_verdict(verdict: Verdict) -> str:
    """Whether a refinement is better than its start, why, and the numbers behind it."""
    reason = f"{verdict.reason[0].upper()}{verdict.reason[1:]}."
    parts = [f"### {verdict.outcome.capitalize()}", reason]
    if verdict.weights_change is not None:
        parts.append(f"The weights moved by {100 * verdict.weights_change:.1f} %.")
    if verdict.ships_start:
        parts.append("So the start is what to use; on the right is what was trained.")
    text = f"{parts[0]}\n\n{' '.join(parts[1:])}"
    if verdict.before is None:
        return text

    table = report_table(
        {"before": verdict.before, "after": verdict.after, "changes": verdict.changes_as_json},
        against="before",
    )
    return f"{text}\n\n{table.replace('this model', 'after', 1)}"


# --- what can be downloaded ------------------------------------------------------------------


def write_downloads(
    folder: Path, sides: Sequence[Grouping], thumbnails: Sequence[bytes]
) -> list[str]:
    """`groups.csv` with every side's group and confidence, and one self-contained page per side.

    Returns the paths.
    """
    header = ["image"]
    columns: list[Sequence[object]] = [sides[-1].names]
    for found in sides:
        header += [f"cluster_{found.side.name}", f"confidence_{found.side.name}"]
        columns += [found.groups, [f"{score:.4f}" for score in found.scores]]

        order = list(itertools.chain(*by_confidence(found.groups, found.scores)))
        tiles = []
        for i in order:
            tile = Tile(found.names[i], found.groups[i], found.scores[i], thumbnails[i], None)
            tiles.append(tile)
        features = found.evaluation.features.features[order]
        page = render_page(
            SIDES[found.side.name],
            describe_groups(found.summary),
            tiles,
            features,
            found.summary["sizes"],
        )
        (folder / f"groups-{found.side.name}.html").write_text(page, encoding="utf-8")

    write_table(folder / "groups.csv", header, zip(*columns, strict=True))
    return sorted(str(path) for path in folder.glob("groups*"))
