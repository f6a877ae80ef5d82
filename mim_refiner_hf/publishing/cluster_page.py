"""One web page for a grouped pile of images: it holds everything and needs no server or network.

    order = choose_shown(by_confidence(groups, confidences))
    # tiles and features in that order
    page = render_page("photos", "1200 images in 14 groups", tiles, features, sizes)
    Path("index.html").write_text(page, encoding="utf-8")

Contact sheets by group and confidence, a map of all images, search by example and by name,
corrections that are saved as a CSV file (`corrections.py` reads it), keys for everything. The look
and the behaviour are in `cluster_page.html.jinja`; here is what goes into it. Names reach the page
as JSON and as escaped text only.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..evaluation.feature_map import cosine_components, flat_map
from ..runtime.text import UNSEEN
from .csv_cells import GUARDED

# longest side in pixels: about 3 kB each
THUMBNAIL = 112
# of the features that search by example compares, one byte each
SIMILARITY_DIMENSIONS = 32
# beyond, the page shows an even choice of each group: 80 MB
MAX_TILES = 20_000

MARKS = {name: f"%{name.upper()}%" for name in ("title", "note", "groups", "data")}
"""Where `page_to_fill` has no content yet; that of the data is a text of JSON, with its quotes."""

_TEMPLATE = Path(__file__).with_name("cluster_page.html.jinja")
_MAP_NOTES = {
    "UMAP": "Alike images lie near each other (UMAP).",
    "PCA": "The two main directions (PCA).",
}


@dataclass(frozen=True)
class Tile:
    """One image of the page.

    Attributes:
        name, group, confidence: of the image.
        thumbnail: JPEG bytes.
        link: a relative address of the image itself, or None.
        moved: whether it was put into its group by hand.
    """

    name: str
    group: int
    confidence: float
    thumbnail: bytes
    link: str | None
    moved: bool = False


@dataclass(frozen=True)
class Beside:
    """What a page that can be corrected holds beside its images.

    Attributes:
        names: of the groups.
        hidden: (name, group, moved) of the images that are not among the tiles.
        left_out: names of images that are in no group since an earlier correction.
        broken: (name, error) of the images that could not be read.
        alike: sets of tiles that are nearly the same, by their places.
    """

    names: list[str]
    hidden: list[tuple[str, int, bool]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    alike: list[list[int]] = field(default_factory=list)


def jpeg_thumbnail(image: Image.Image) -> bytes:
    """An image of any size as a small JPEG; one that is smaller stays as it is."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS, reducing_gap=2.0)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=75, optimize=True)
    return file.getvalue()


def by_confidence(groups: Sequence[int], confidences: Sequence[float]) -> list[list[int]]:
    """For each group, from 0 on, the places of its images, most confident first."""
    order = np.argsort(-np.asarray(confidences, dtype=np.float64), kind="stable")
    owners = np.asarray(groups)[order]
    return [order[owners == group].tolist() for group in range(int(owners.max()) + 1)]


def choose_shown(order: Sequence[Sequence[int]]) -> list[int]:
    """The places that the page shows, group after group.

    All of them, or beyond `MAX_TILES` an even choice of each group's.
    """
    total = sum(map(len, order))
    share = min(1.0, MAX_TILES / max(total, 1))
    shown: list[int] = []
    for members in order:
        kept = max(round(share * len(members)), 1)
        ranks = np.linspace(0, len(members) - 1, kept).round().astype(int)
        shown += [members[rank] for rank in ranks]
    return shown


def unit_square(points: Tensor) -> Tensor:
    """Points (N, 2), moved and stretched so that they fill 0 to 1 in both directions."""
    low = points.amin(0)
    high = points.amax(0)
    return (points - low) / (high - low).clamp_min(1e-12)


def compact(features: Tensor) -> str:
    """Features for search by example, in base64.

    `SIMILARITY_DIMENSIONS` components as signed bytes on one scale, row after row.
    """
    components = cosine_components(features, SIMILARITY_DIMENSIONS)
    scaled = components * (127 / components.abs().max().clamp_min(1e-12))
    return base64.b64encode(scaled.round().to(torch.int8).numpy().tobytes()).decode()


def page_data(
    tiles: Sequence[Tile],
    features: Tensor,
    positions: Tensor,
    sizes: Sequence[int],
    beside: Beside | None,
) -> dict[str, Any]:
    """What the page's script reads: one entry per tile, and per group its size and share here."""
    editable = beside is not None
    beside = beside or Beside(default_names(len(sizes)))
    return {
        "name": [tile.name for tile in tiles],
        "group": [tile.group for tile in tiles],
        "score": [round(tile.confidence, 4) for tile in tiles],
        "link": [tile.link for tile in tiles],
        "thumbnail": [base64.b64encode(tile.thumbnail).decode() for tile in tiles],
        # the map and search by example
        "x": [round(x, 4) for x in positions[:, 0].tolist()],
        "y": [round(y, 4) for y in positions[:, 1].tolist()],
        "codes": compact(features),
        "dimensions": SIMILARITY_DIMENSIONS,
        # of each group, all images and those that are among the tiles
        "sizes": list(sizes),
        "shown": np.bincount([tile.group for tile in tiles], minlength=len(sizes)).tolist(),
        # corrections
        "editable": editable,
        "names": beside.names,
        "moved": [tile.moved for tile in tiles],
        "hidden": {
            "name": [name for name, _, _ in beside.hidden],
            "group": [group for _, group, _ in beside.hidden],
            "moved": [moved for _, _, moved in beside.hidden],
        },
        "left_out": beside.left_out,
        "broken": beside.broken,
        "unread_table": "broken.csv",
        "alike": beside.alike,
        # how a text becomes a cell of the CSV file, as `csv_cells.py` does it
        "unseen": UNSEEN.pattern,
        "guarded": GUARDED,
    }


def default_names(number: int) -> list[str]:
    """Of groups that nobody has named."""
    return [f"Group {group}" for group in range(number)]


def render_page(
    title: str,
    note: str,
    tiles: Sequence[Tile],
    features: Tensor,
    sizes: Sequence[int],
    beside: Beside | None = None,
) -> str:
    """The page as HTML.

    Args:
        title: a few words, such as the name of the folder.
        note: a sentence on the groups and their number.
        tiles: N images, by group and falling confidence.
        features: (N, D) of the tiles, for the map and for search by example.
        sizes: images of each group, also of those that are not among the tiles.
        beside: for a page on which the groups can be corrected; None for one to look at.
    """
    points, method = flat_map(features)
    data = page_data(tiles, features, unit_square(points), sizes, beside)
    return _rendered(title, note, len(sizes), data, method)


def page_to_fill() -> str:
    """The page without groups, for a script that writes its own into the marks of `MARKS`."""
    return _rendered(MARKS["title"], MARKS["note"], MARKS["groups"], MARKS["data"], "PCA")


def _rendered(title: str, note: str, groups: int | str, data: object, method: str) -> str:
    """The template, filled in."""
    text = _TEMPLATE.read_text(encoding="utf-8")
    template = jinja2.Template(text, autoescape=True, undefined=jinja2.StrictUndefined)
    return template.render(
        title=title, note=note, groups=groups, data=data, map_note=_MAP_NOTES[method]
    )
