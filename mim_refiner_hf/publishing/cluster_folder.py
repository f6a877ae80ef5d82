"""`mim-refiner cluster`: a pile of images as groups in a folder that anyone can open.

    mim-refiner cluster photos/ --model out/model --out groups/     # number of groups proposed
    mim-refiner cluster photos/ --model facebook/vit-mae-large --num_clusters 12 --out groups/

| in the folder         | what it is                                                               |
|-----------------------|--------------------------------------------------------------------------|
| `index.html`          | one page: contact sheets, map, search by example and by name             |
| `groups.csv`          | path, cluster, confidence of every image; cluster 0 is the largest       |
| `group-00/`, ...      | links to the images of a group, most confident first                     |
|                       | (an image out of a table is written)                                     |
| `exemplars/`          | for each group a link to its most typical image                          |
| `summary.json`        | how many groups and why, their sizes and exemplars, near-duplicates      |
| `near-duplicates.csv` | path and set of every image that is nearly the same as another, if any   |
| `broken.csv`          | path and error of every image that could not be read, if any             |
| `left-out.csv`        | path of every image that a correction leaves out, if any                 |
| `fiftyone/`, `label-studio.*` | for these tools, with `--also` (`annotation_tools.py`)       |

After a correction `groups.csv` also has the name of the group, and "moved" as the state of an image
that was put there by hand.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict
from urllib.parse import quote

from PIL import Image
from torch import Tensor

from ..clustering.channels import as_picture, is_picture
from ..clustering.cluster_count import Entry
from ..clustering.decoding import FORMATS, decode_image
from ..clustering.image_items import ending_of
from ..clustering.k_means import near_duplicates
from ..clustering.pipeline_image_clustering import (
    ImageClusteringPipeline,
    ImageInGroup,
    Summary,
    UnreadImage,
)
from ..data.images import ImageDataset
from ..runtime.distributed import progress_bar
from ..runtime.files import check_folder, write_json, write_text
from ..runtime.text import spelt_out
from .annotation_tools import GroupedImage, write_for_tools
from .cluster_page import (
    Beside,
    Tile,
    by_confidence,
    choose_shown,
    default_names,
    jpeg_thumbnail,
    render_page,
)
from .corrections import MOVED
from .csv_cells import write_table

# Cosine of features without their mean, which all images share: with it, all digits are nearly the
# same.
NEARLY_SAME = 0.99
# images; comparing all pairs of more takes longer than all else
COMPARED = 200_000
# by this file a folder is known as one that may be replaced
GROUPS_TABLE = "groups.csv"
_JPEG = (".jfif", ".jpe", ".jpeg", ".jpg")


def check_groups_folder(folder: Path) -> Path:
    """`folder`, resolved, if groups can be written there; else a ValueError.

    They can where the folder is absent, empty or holds groups.
    """
    return check_folder(folder, GROUPS_TABLE, "groups")


class GroupsSummary(TypedDict):
    """How many groups and why, and what they hold; `summary.json` as a whole.

    Images are named by their places, in `summary.json` by their paths. Of corrected groups there
    are also their `names`, and which images are `left_out` or were not in the correction.
    """

    num_images: int
    sizes: list[int]
    exemplars: Sequence[Sequence[int | str]]
    broken: Sequence[UnreadImage | str]
    num_clusters: int | None
    interval: tuple[int, int] | None
    clear: bool
    reason: str
    evidence: list[Entry]
    images: NotRequired[str]
    near_duplicates: NotRequired[list[list[str]]]
    names: NotRequired[list[str]]
    left_out: NotRequired[list[str]]
    new_images: NotRequired[int]
    note: NotRequired[str]


def begin_summary(summary: Summary) -> GroupsSummary:
    """What the pipeline says of groups, to which the rest is added."""
    return {
        "num_images": summary["num_images"],
        "sizes": summary["sizes"],
        "exemplars": summary["exemplars"],
        "broken": summary["broken"],
        "num_clusters": summary["num_clusters"],
        "interval": summary["interval"],
        "clear": summary["clear"],
        "reason": summary["reason"],
        "evidence": summary["evidence"],
    }


@dataclass(frozen=True)
class Corrected:
    """What a correction says of groups, when they are written.

    Attributes:
        names: of the groups, by their numbers.
        moved: indices of images that were put where they are by hand.
        left_out: indices of images that are in no group.
        new_images: how many images the correction did not name.
        file: where it was read.
    """

    names: list[str]
    moved: frozenset[int]
    left_out: list[int]
    new_images: int
    file: Path

    def tell(self, summary: GroupsSummary, images: ImageDataset) -> None:
        """Put what `summary.json` says of it there."""
        summary["names"] = self.names
        summary["left_out"] = [spelt_out(images.describe(index)) for index in self.left_out]
        summary["new_images"] = self.new_images


def write_groups(
    folder: Path,
    images: ImageDataset,
    entries: Sequence[ImageInGroup],
    pipe: ImageClusteringPipeline,
    corrected: Corrected | None = None,
    also: Sequence[str] = (),
    home: Path | None = None,
) -> GroupsSummary:
    """Write what `pipe` found about `images`, its `entries`, into an empty folder.

    Args:
        corrected: of groups that people have corrected.
        also: tools to write the groups for too, of `choices.TOOLS`.
        home: where the folder will lie when it is whole; None for where it is.

    Returns:
        The summary.
    """
    indices = [entry["index"] for entry in entries]
    groups = [entry["cluster"] for entry in entries]
    scores = [entry["score"] for entry in entries]
    paths = [images.describe(index) for index in indices]
    names = [spelt_out(path) for path in paths]

    _write_groups_table(folder, images, entries, corrected)
    broken = [(images.describe(entry["index"]), entry["error"]) for entry in pipe.summary["broken"]]
    if broken:
        write_table(folder / "broken.csv", ("path", "error"), broken)

    # links to the images, by group and confidence
    order = by_confidence(groups, scores)
    links = write_links(folder, images, [[indices[place] for place in group] for group in order])
    exemplars = pipe.summary["exemplars"]
    typical = [indices[group[0]] for group in exemplars]
    write_exemplars(folder, [links[index] for index in typical if index in links])
    if also:
        named = default_names(len(exemplars)) if corrected is None else corrected.names
        grouped = _grouped_images(home or folder, images, entries, links, named)
        write_for_tools(folder, grouped, named, also)

    alike = _write_near_duplicates(folder, paths, pipe.features)

    title = spelt_out(images.name)
    summary = begin_summary(pipe.summary)
    summary["images"] = title
    summary["exemplars"] = [[names[place] for place in group] for group in exemplars]
    summary["near_duplicates"] = [[names[place] for place in same] for same in alike]
    summary["broken"] = [spelt_out(path) for path, _ in broken]
    if corrected is not None:
        corrected.tell(summary, images)
    note = describe_groups(summary)
    summary["note"] = note
    write_json(folder / "summary.json", summary)

    # the page, of the images that are still there
    shown = [place for place in choose_shown(order) if indices[place] in links]
    if not shown:
        return summary
    tiles = _tiles(images, entries, [(place, links[indices[place]]) for place in shown], corrected)
    beside = _beside(images, entries, shown, corrected)
    tile_of = {place: number for number, place in enumerate(shown)}
    seen = [[tile_of[place] for place in same if place in tile_of] for same in alike]
    beside = replace(beside, broken=broken, alike=[same for same in seen if len(same) > 1])
    title = Path(title).resolve().name
    page = render_page(title, note, tiles, pipe.features[shown], summary["sizes"], beside)
    write_text(folder / "index.html", page)
    return summary


def _write_near_duplicates(folder: Path, paths: Sequence[str], features: Tensor) -> list[list[int]]:
    """`near-duplicates.csv`, if there are any; places in sets."""
    alike: list[list[int]] = []
    if len(paths) <= COMPARED:
        alike = near_duplicates(features - features.mean(0), NEARLY_SAME)

    rows = []
    for number, same in enumerate(alike):
        rows += [(paths[place], number) for place in same]
    if rows:
        write_table(folder / "near-duplicates.csv", ("path", "set"), rows)
    return alike


def _grouped_images(
    home: Path,
    images: ImageDataset,
    entries: Sequence[ImageInGroup],
    links: Mapping[int, str],
    groups: Sequence[str],
) -> list[GroupedImage]:
    """The images that are there, by their own files, or those written for them."""
    grouped = []
    for entry in entries:
        index = entry["index"]
        if index not in links:
            continue
        source = images.found.sources[int(images.indices[index])]
        path = source.resolve() if isinstance(source, Path) else home / links[index]
        grouped.append(GroupedImage(path, groups[entry["cluster"]], float(entry["score"])))
    return grouped


def _tiles(
    images: ImageDataset,
    entries: Sequence[ImageInGroup],
    shown: Sequence[tuple[int, str]],
    corrected: Corrected | None,
) -> list[Tile]:
    """The images of the page; `shown` are their places among the entries, with their links."""
    moved = frozenset() if corrected is None else corrected.moved
    tiles = []
    for place, link in progress_bar(shown, desc="page", unit="image"):
        entry = entries[place]
        index = entry["index"]
        tile = Tile(
            images.describe(index),
            entry["cluster"],
            entry["score"],
            load_thumbnail(images, index),
            quote(os.fsencode(link)),
            index in moved,
        )
        tiles.append(tile)
    return tiles


def _beside(
    images: ImageDataset,
    entries: Sequence[ImageInGroup],
    shown: Sequence[int],
    corrected: Corrected | None,
) -> Beside:
    """The groups' names, and the images that the page does not show but its corrections keep."""
    number = 1 + max(entry["cluster"] for entry in entries)
    moved = frozenset() if corrected is None else corrected.moved
    hidden = []
    for place in sorted(set(range(len(entries))) - set(shown)):
        entry = entries[place]
        index = entry["index"]
        hidden.append((images.describe(index), entry["cluster"], index in moved))
    if corrected is None:
        return Beside(default_names(number), hidden)
    left_out = [images.describe(index) for index in corrected.left_out]
    return Beside(corrected.names, hidden, left_out)


def _write_groups_table(
    folder: Path,
    images: ImageDataset,
    entries: Sequence[ImageInGroup],
    corrected: Corrected | None,
) -> None:
    """`groups.csv`; of corrected groups with their names, and beside it what they leave out."""
    header = ["path", "cluster", "confidence"]
    rows: list[list[object]] = []
    for entry in entries:
        name = images.describe(entry["index"])
        rows.append([name, entry["cluster"], f"{entry['score']:.4f}"])

    if corrected is not None:
        header += ["group", "state"]
        for row, entry in zip(rows, entries, strict=True):
            state = MOVED if entry["index"] in corrected.moved else ""
            row += [corrected.names[entry["cluster"]], state]
    write_table(folder / GROUPS_TABLE, header, rows)

    if corrected is not None and corrected.left_out:
        out = [(images.describe(index),) for index in corrected.left_out]
        write_table(folder / "left-out.csv", ("path",), out)


def write_links(
    folder: Path, images: ImageDataset, order: Sequence[Sequence[int]]
) -> dict[int, str]:
    """One folder per group, in it the images of the group in order.

    Returns:
        By the index of an image its path in `folder`, such as `group-00/0001_name.jpg`; an image
        that is no longer there has none.
    """
    group_digits = max(len(str(len(order) - 1)), 2)
    rank_digits = len(str(max(map(len, order))))

    links: dict[int, str] = {}
    for group, members in enumerate(order):
        name = f"group-{group:0{group_digits}d}"
        (folder / name).mkdir()
        for rank, index in enumerate(members, start=1):
            source = images.found.sources[int(images.indices[index])]
            prefix = f"{name}/{rank:0{rank_digits}d}"
            if isinstance(source, Path) and not source.is_file():
                continue
            if isinstance(source, Path):
                links[index] = f"{prefix}_{_link_name(source)}"
                (folder / links[index]).symlink_to(source.resolve())
            else:
                links[index] = f"{prefix}_{index}.png"
                images[index].image.save(folder / links[index])
    return links


def _link_name(source: Path) -> str:
    """The end of a file's name, short enough for a number and a group in front.

    File systems allow 255 bytes.
    """
    return os.fsdecode(os.fsencode(source.name[-80:])[-200:])


def write_exemplars(folder: Path, links: Sequence[str]) -> None:
    """In `exemplars/`, one link per group into its folder."""
    (folder / "exemplars").mkdir()
    for link in links:
        group, _, name = link.partition("/")
        (folder / "exemplars" / f"{group}_{name}").symlink_to(Path("..") / link)


def load_thumbnail(images: ImageDataset, index: int) -> bytes:
    """The thumbnail of an image; a JPEG file is decoded no larger than it takes."""
    source = images.found.sources[int(images.indices[index])]
    if not isinstance(source, Path) or not is_picture(images.num_channels):
        return jpeg_thumbnail(as_picture(images[index].image))
    # the other formats have no smaller versions, and an array is none of Pillow's
    if ending_of(str(source)) not in _JPEG:
        return jpeg_thumbnail(as_picture(decode_image(source)))
    with Image.open(source, formats=FORMATS) as image:
        image.draft("RGB", (256, 256))
        return jpeg_thumbnail(as_picture(decode_image(image, name=str(source))))


def describe_groups(summary: Mapping[str, Any]) -> str:
    """The groups, their number and what is special about them, in a sentence.

    A summary as the pipeline gives it, which knows of no near-duplicates, will do too.
    """
    note = (
        f"{summary['num_images']} images in {summary['num_clusters']} groups ({summary['reason']})"
    )
    if summary["broken"]:
        note += f"; {len(summary['broken'])} could not be read"
    if "names" in summary:
        left_out = len(summary["left_out"])
        note += f"; {left_out} left out, {summary['new_images']} new"

    alike = sum(map(len, summary.get("near_duplicates", ())))
    if alike:
        note += f"; {alike} are nearly the same as another (near-duplicates.csv)"
    if summary["num_images"] > COMPARED:
        note += f"; near-duplicates are not looked for among more than {COMPARED} images"
    return note
