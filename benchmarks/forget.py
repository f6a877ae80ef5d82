"""What `--forget` does to a nuisance that is planted, and to one that is there.

    python -m benchmarks.forget ../shared [--sets cifar10] [--seeds 0 1 2]
    python -m benchmarks.forget ../shared --table

A cell refines the small MAE of the shared folder on 300 unlabelled photos, each taken by one of
four cameras that was drawn whatever its class: one tints, one blurs, one compresses, one leaves a
frame. `plain` sets nothing; `forget` sets `--forget camera`: the same training, and the camera
erased at the end. On images that no cell saw, with cameras of their own: a linear probe of the
camera, which is to fall towards a quarter; k-NN accuracy of the class where every neighbour is of
another camera than the image; and k-NN accuracy of the class.

`gtsrb-tracks` are the signs as they are. A track is one sign, filmed while it comes nearer: it is
what is forgotten, and the probe is a k-NN of the track. Its test images are of other tracks. There
are too many to erase, so that neighbours are looked up among other tracks.

Finished cells stay in benchmarks/results/forget.jsonl, one line each, so the same command goes on,
and several may run at once for different sets or seeds. A cell takes about six minutes of one core,
in a process of its own; at the end, the page beside it is written anew.
"""

import csv
import io
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from mim_refiner_hf import RefineRecipe, load_encoder
from mim_refiner_hf.clustering.channels import Picture
from mim_refiner_hf.data.images import ImageDataset, open_images
from mim_refiner_hf.data.split_files import paths_of
from mim_refiner_hf.evaluation.features import encode_images, own_columns
from mim_refiner_hf.evaluation.knn import knn_accuracy
from mim_refiner_hf.evaluation.low_shot import probe_accuracy
from mim_refiner_hf.model.modeling_mim_refiner import MimRefinerModel

from .claims import QUIET, refined
from .refine_options import Found, Study, main, mean

SETS = ("cifar10", "gtsrb", "gtsrb-tracks")
SIZE = 300
BANK = 1000
TEST = 500
CAMERAS = ("tint", "blur", "jpeg", "frame")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "forget": {"forget": "group"},
}
"""What a cell sets, by its name; "start" trains nothing."""
SCORES = {"group": "probe of it", "across": "k-NN across", "knn": "k-NN"}
RESULTS = Path(__file__).parent / "results" / "forget.md"
CELLS = RESULTS.with_suffix(".jsonl")


# ---- photos


def through(camera: str, image: Image.Image) -> Image.Image:
    """What a camera makes of an image of 32 px."""
    match camera:
        case "tint":
            pixels = np.asarray(image, dtype=np.float64) * [1.25, 1.0, 0.7]
            return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
        case "blur":
            return image.filter(ImageFilter.GaussianBlur(1.2))
        case "jpeg":
            file = io.BytesIO()
            image.save(file, "JPEG", quality=8)
            return Image.open(file).convert("RGB")
    framed = Image.new("RGB", image.size, (20, 20, 20))
    width, height = image.size
    framed.paste(image.crop((3, 3, width - 3, height - 3)), (3, 3))
    return framed


class Photos(NamedTuple):
    """Images with their classes (n,) and their groups: the camera or the track of each (n,)."""

    images: list[Picture]
    classes: np.ndarray
    groups: np.ndarray


def taken(images: ImageDataset, places: np.ndarray, seed: int | None) -> Photos:
    """The images at these places: by cameras that are drawn, or, with seed None, by tracks."""
    samples = [images[int(place)] for place in places]
    pictures = [sample.image for sample in samples]
    classes = np.array([sample.label for sample in samples])
    if seed is None:
        # 00006/00006_00010.jpg: class, track, frame
        tracks = [(path or "").rpartition("_")[0] for path in paths_of(images)]
        _, groups = np.unique(tracks, return_inverse=True)
        return Photos(pictures, classes, groups[places])

    groups = np.random.default_rng(seed).integers(len(CAMERAS), size=len(places))
    pictures = [through(CAMERAS[own], each) for own, each in zip(groups, pictures, strict=True)]
    return Photos(pictures, classes, groups)


def parts(shared: Path, data: str) -> tuple[Photos, Photos, Photos, Photos]:
    """Photos to refine on, a bank, and images to test classes and groups on."""
    name = data.removesuffix("-tracks")
    train = open_images(str(shared / f"data/{name}/train.parquet"))
    test = open_images(str(shared / f"data/{name}/test.parquet"))
    order = np.random.default_rng(0).permutation(len(train))
    bank = np.sort(order[-BANK:])
    first = np.arange(min(TEST, len(test)))
    if data == name:
        tested = taken(test, first, 3)
        return taken(train, order[:SIZE], 1), taken(train, bank, 2), tested, tested
    rest = np.sort(order[SIZE:-BANK])
    photos = taken(train, order[:SIZE], None)
    return photos, taken(train, bank, None), taken(test, first, None), taken(train, rest, None)


def folder_of(photos: Photos, folder: Path) -> Path:
    """The photos as a flat folder, whose metadata.csv names their groups."""
    if folder.is_dir():
        return folder
    # whole or not at all: another process may be making it too
    unfinished = folder.with_suffix(f".{os.getpid()}")
    unfinished.mkdir(parents=True)
    with (unfinished / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file_name", "group"))
        for place, (image, group) in enumerate(zip(photos.images, photos.groups, strict=True)):
            assert isinstance(image, Image.Image)
            image.save(unfinished / f"{place:05d}.png")
            table.writerow((f"{place:05d}.png", f"g{group}"))
    try:
        unfinished.rename(folder)
    except OSError:
        shutil.rmtree(unfinished)
    return folder


# ---- one cell


def accuracy_across(bank: Photos, rows: Tensor, test: Photos, asked: Tensor) -> float:
    """k-NN accuracy of the class, the neighbours of an image being of other groups than its own."""
    right = 0.0
    for group in np.unique(test.groups):
        own = test.groups == group
        others = bank.groups != group
        known = (rows[others], bank.classes[others])
        right += own.sum() * knn_accuracy(*known, asked[own], test.classes[own], say_known=False)
    return right / len(test.groups)


def scores(encoder: MimRefinerModel, processor: Any, shared: Path, data: str) -> dict[str, float]:
    """Of an encoder, in per cent."""
    _, bank, test, of_groups = parts(shared, data)
    column = own_columns(encoder.config)[-1]
    features = []
    for photos in (bank, test, of_groups):
        images = open_images(photos.images)
        features.append(encode_images(encoder, images, processor, [column])[0][column])
    rows, asked, asked_groups = features

    if data.endswith("-tracks"):
        # no track of the bank is among those of the test images
        groups = knn_accuracy(rows, bank.groups, asked_groups, of_groups.groups)
        across = knn_accuracy(rows, bank.classes, asked, test.classes)
    else:
        values = [torch.from_numpy(photos.groups) for photos in (bank, of_groups)]
        groups = probe_accuracy(rows, values[0], asked_groups, values[1])
        across = accuracy_across(bank, rows, test, asked)
    knn = knn_accuracy(rows, bank.classes, asked, test.classes)
    return {"group": 100 * groups, "across": 100 * across, "knn": 100 * knn}


def run_cell(data: str, option: str, seed: int, shared: Path, work: Path) -> dict[str, float]:
    """One training and its scores; and its minutes of processor time."""
    model = str(shared / "models/mae-tiny-cifar10")
    encoder = load_encoder(model)
    processor = encoder.image_processor
    minutes = 0.0
    if option != "start":
        recipe = RefineRecipe(
            model=model,
            dataset=str(folder_of(parts(shared, data)[0], work / data)),
            output_dir=str(work / f"{data}-{option}-{seed}"),
            seed=seed,
            **QUIET,
            **OPTIONS[option],
        )
        began = time.process_time()
        encoder = refined(recipe)
        minutes = (time.process_time() - began) / 60
    return {**scores(encoder, processor, shared, data), "minutes": minutes}


# ---- the cells that are there, and the page


def table_rows(found: Found) -> list[str]:
    """The scores, a line for every set and option."""
    rows = []
    for data in SETS:
        for option in ("start", *OPTIONS):
            cells = list(found.get((data, option), {}).values())
            if cells:
                numbers = [mean([cell[score] for cell in cells]) for score in SCORES]
                rows.append(f"| {data} | `{option}` | {' | '.join(numbers)} | {len(cells)} |")
    return rows


def change_rows(found: Found) -> list[str]:
    """By seed, what `forget` changes from `plain`: a line for every set."""
    rows = []
    for data in SETS:
        forgot = found.get((data, "forget"), {})
        plain = found.get((data, "plain"), {})
        seeds = sorted(forgot.keys() & plain.keys())
        if seeds:
            changes = []
            for score in SCORES:
                apart = [forgot[seed][score] - plain[seed][score] for seed in seeds]
                changes.append(mean(apart, "{:+.1f}"))
            rows.append(f"| {data} | {' | '.join(changes)} | {len(seeds)} |")
    return rows


def write(found: Found) -> None:
    """benchmarks/results/forget.md."""
    head = " | ".join(SCORES.values())
    text = [
        "# What `--forget` does to a nuisance",
        "",
        "```bash",
        "python -m benchmarks.forget ../shared",
        "```",
        "",
        f"`mae-tiny-cifar10` refined on {SIZE} unlabelled photos. What is forgotten is one of four",
        "cameras, planted whatever the class (chance: 25 %), or a sign's own track. Per cent, on",
        f"{TEST} images that no run saw, with a bank of {BANK} and standard errors over seeds; one",
        "core a cell. Across: every neighbour is of another camera or track than the image.",
        "`forget` erases cameras from the features at the end; of tracks, which are too many, it",
        "looks neighbours up among others.",
        "",
        f"| photos | option | {head} | seeds |",
        f"|---|---|{'---:|' * (len(SCORES) + 1)}",
        *table_rows(found),
        "",
        "## What `--forget` changes from `plain`, in points, paired by seed",
        "",
        f"| photos | {head} | seeds |",
        f"|---|{'---:|' * (len(SCORES) + 1)}",
        *change_rows(found),
        "",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {version('torch')}",
    ]
    RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Study("forget", __doc__, SETS, tuple(OPTIONS), CELLS, run_cell, write))
