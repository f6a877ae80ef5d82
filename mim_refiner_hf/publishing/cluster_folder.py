"""`mim-refiner cluster`: a pile of images as groups in a folder that anyone can open.

    mim-refiner cluster photos/ --model out/model --out groups/                  # number of groups proposed
    mim-refiner cluster photos/ --model facebook/vit-mae-large --num_clusters 12 --method heads --out groups/

| in the folder         | what it is                                                                                |
|-----------------------|-------------------------------------------------------------------------------------------|
| `index.html`          | one self-contained page: contact sheets, map, search by example and by name               |
| `groups.csv`          | path, cluster, confidence, in the order of the images; cluster 0 is the largest           |
| `group-00/`, ...      | links to the images of a group, most confident first (an image out of a table is written) |
| `exemplars/`          | for each group a link to its most typical image                                           |
| `summary.json`        | how many groups and why, their sizes and exemplars, near-duplicates                       |
| `near-duplicates.csv` | path and set of every image that is nearly the same as another; absent when there is none |
| `broken.csv`          | path and error of every image that could not be read; absent when there is none           |
"""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from ..clustering.decoding import decode_image
from ..clustering.k_means import near_duplicates
from ..clustering.pipeline_image_clustering import TASK, ImageClusteringPipeline, check_num_clusters
from ..conversion import load_encoder
from ..data.images import ImageDataset, open_images
from ..runtime.distributed import progress_bar
from ..runtime.files import check_folder, staged_folder, write_json
from .cluster_page import Tile, by_confidence, choose_shown, render_page, thumbnail

NEARLY_SAME = 0.99  # cosine; of features without their mean, which all images share: with it, all digits are nearly the same
COMPARED = 200_000  # images; comparing all pairs of more takes longer than all else
MARKER = "groups.csv"  # by it a folder is known as one that may be replaced


def check_groups_folder(folder: Path) -> Path:
    """`folder`, resolved, if groups can be written there: it is absent, empty or holds groups; else a ValueError."""
    return check_folder(folder, MARKER, "groups")


def cluster_images(
    images: str,
    model: str,
    out: Path,
    *,
    num_clusters: int | None = None,
    method: str = "kmeans",
    batch_size: int = 32,
    seed: int = 0,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Group images and write the folder described above, all or nothing.

    Args:
        images: a folder, or what else `mim_refiner_hf.data.open_images` takes.
        model: what `load_encoder` takes: a model folder, a Hub name, an original checkpoint.
        out: folder to write; an earlier result there is replaced.
        num_clusters: number of groups; None to have it proposed.
        method: "kmeans" or "heads", see the pipeline.
        batch_size, seed, num_workers: of the pipeline.

    Returns:
        The content of `summary.json`.

    Raises:
        FileNotFoundError, ValueError: for images, a model, a number or a folder that will not do; nothing is written.
    """
    folder, found = check_groups_folder(out), open_images(images)
    origin = Path(images).expanduser().resolve()
    if Path(images).expanduser().exists() and (
        origin == folder or origin in folder.parents or folder in origin.parents
    ):
        raise ValueError(
            f"{out} and the images in {images} lie within each other; name another folder for the groups"
        )
    check_num_clusters(num_clusters, len(found), method)
    encoder = load_encoder(model)
    pipe = ImageClusteringPipeline(
        model=encoder, image_processor=encoder.image_processor, task=TASK
    )
    asked: dict[str, Any] = {"num_clusters": num_clusters, "method": method, "seed": seed}
    entries = pipe(found, **asked, batch_size=batch_size, num_workers=num_workers)
    with staged_folder(folder, check_groups_folder) as new:
        return write_groups(new, found, entries, pipe)


def write_groups(
    folder: Path,
    images: ImageDataset,
    entries: Sequence[dict[str, Any]],
    pipe: ImageClusteringPipeline,
) -> dict[str, Any]:
    """Write what `pipe` found about `images`, its `entries`, into an empty folder; returns the summary."""
    paths = [images.describe(entry["index"]) for entry in entries]
    names = [printable(path) for path in paths]
    groups, scores = [entry["cluster"] for entry in entries], [entry["score"] for entry in entries]
    rows = zip(paths, groups, (f"{score:.4f}" for score in scores), strict=True)
    write_table(folder / MARKER, ("path", "cluster", "confidence"), rows)
    broken = [(images.describe(entry["index"]), entry["error"]) for entry in pipe.summary["broken"]]
    if broken:
        write_table(folder / "broken.csv", ("path", "error"), broken)
    order = by_confidence(groups, scores)
    links = write_links(
        folder, images, [[entries[place]["index"] for place in members] for members in order]
    )
    exemplars = [members[0] for members in pipe.summary["exemplars"]]
    write_exemplars(folder, [links[entries[place]["index"]] for place in exemplars])
    features = pipe.features
    alike = (
        near_duplicates(features - features.mean(0), NEARLY_SAME)
        if len(entries) <= COMPARED
        else []
    )
    if alike:
        twins = [
            (paths[place], number) for number, members in enumerate(alike) for place in members
        ]
        write_table(folder / "near-duplicates.csv", ("path", "set"), twins)
    summary: dict[str, Any] = {
        **pipe.summary,
        "images": printable(images.name),
        "exemplars": [[names[place] for place in members] for members in pipe.summary["exemplars"]],
        "near_duplicates": [[names[place] for place in members] for members in alike],
        "broken": [printable(path) for path, _ in broken],
    }
    summary["note"] = describe(summary)
    write_json(folder / "summary.json", summary)
    shown = choose_shown(order)
    tiles = [
        Tile(
            names[place],
            groups[place],
            scores[place],
            load_thumbnail(images, index),
            quote(os.fsencode(links[index])),
        )
        for place, index in progress_bar(
            [(place, entries[place]["index"]) for place in shown], desc="page", unit="image"
        )
    ]
    page = render_page(
        Path(summary["images"]).resolve().name,
        summary["note"],
        tiles,
        features[shown],
        summary["sizes"],
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    return summary


def printable(name: str) -> str:
    """A file name that is no valid Unicode with its odd bytes spelt out."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV file; names that are no valid Unicode keep their bytes."""
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_links(
    folder: Path, images: ImageDataset, order: Sequence[Sequence[int]]
) -> dict[int, str]:
    """One folder per group; returns by image index the link's path in `folder`, `group-00/0001_name.jpg`."""
    links: dict[int, str] = {}
    digits, width = len(str(len(order) - 1)), len(str(max(map(len, order))))
    for group, members in enumerate(order):
        name = f"group-{group:0{max(digits, 2)}d}"
        (folder / name).mkdir()
        for rank, index in enumerate(members, start=1):
            source = images.found.sources[int(images.indices[index])]
            own = link_name(source) if isinstance(source, Path) else f"{index}.png"
            links[index] = f"{name}/{rank:0{width}d}_{own}"
            if isinstance(source, Path):
                (folder / links[index]).symlink_to(source.resolve())
            else:
                images[index].image.save(folder / links[index])
    return links


def link_name(source: Path) -> str:
    """The end of a file's name, short enough for a number and a group in front: file systems allow 255 bytes."""
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
    if not isinstance(source, Path):
        return thumbnail(images[index].image)
    with Image.open(source) as image:
        image.draft("RGB", (256, 256))
        return thumbnail(decode_image(image, name=str(source)))


def describe(summary: dict[str, Any]) -> str:
    """The groups, their number and what is special in a sentence; of a pipeline's own summary, without near-duplicates, too."""
    more = f"; {len(summary['broken'])} could not be read" if summary["broken"] else ""
    if alike := summary.get("near_duplicates"):
        more += f"; {sum(map(len, alike))} are nearly the same as another (near-duplicates.csv)"
    if summary["num_images"] > COMPARED:
        more += f"; near-duplicates are not looked for among more than {COMPARED} images"
    return f"{summary['num_images']} images in {summary['num_clusters']} groups ({summary['reason']}){more}"


__all__ = ["check_groups_folder", "cluster_images", "write_groups"]
