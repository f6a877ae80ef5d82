"""Images in: folders, tables, Hub data sets, streams and bundled digits behind one interface, and the order of training.

    from mim_refiner_hf.data import open_images
    images = open_images("photos/")                  # or "digits", "train.parquet", "uoft-cs/cifar10" (with config and split)
    image, label, index = images[0]                  # a PIL image, -1 without a label, the place in the whole data set

Labels are optional everywhere. What becomes of EXIF rotation, transparency, 16 bits and animations: `decoding.py`.

The order is a pure function of (seed, epoch): `BatchSampler` starts at any step, on any number of processes, with the same
sequence of global batches. A `DataLoader` takes it as `batch_sampler`, beside a `mim_refiner_hf.data.views.ViewDataset`.

A broken image met in training is replaced by the sample that comes one batch later in the epoch's order; if that is broken too, by
the one after it, and so on (`read_sample`). So the replacement is a pure function of (seed, epoch, batch size), whatever the number
of workers and processes, and it is not in the batch already (but for an epoch's end, where the order begins again, and neighbours
that are broken both). It brings its own index and label, by which the nearest-neighbour queue keeps it from finding itself, and
views of its own: those of the image it stands in for. It does occur twice in that epoch, which is why every broken image is named
and listed (`broken_images.py`).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..clustering.decoding import decode_image, mode_of
from ..runtime.seeding import random_generator
from .sources import (
    Entries,
    FoundImages,
    digest,
    find_columns,
    find_images,
    load_table,
    stored,
    undecoded,
)

MAX_HELD_OUT = 5000
SHUFFLE_BUFFER = (
    4096  # undecoded examples in the shuffle of a stream: about 0.4 GB of ImageNet JPEGs
)

MAX_BROKEN_IN_A_ROW = 10

Candidate = int | tuple[int, dict[str, Any]]
"""Where a sample is: its position in a data set, or its place in a stream's epoch and the undecoded example."""
Key = tuple[Any, ...]
"""What `BatchSampler` hands to a worker: (epoch, candidate, ...), the sample and those that may stand in for it, in order."""
Broken = dict[str, Any]
"""An image that cannot be read: {"index": place in the whole data set, "path", "reason"}."""


class Sample(NamedTuple):
    """One decoded image; `label` is -1 where there is none, `index` the place in the whole data set, also in a subset."""

    image: Image.Image
    label: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a sample


class ImageDataset(Dataset[Sample]):
    """Images at random places, decoded when asked for.

    `labels`: int64 per item, -1 = none; `class_names`: a name per label; both None where the data has none. `fingerprint` tells
    two data sets apart without reading pixels. `indices` are the chosen places among `found.sources`, all by default."""

    def __init__(
        self, found: FoundImages, *, num_channels: int = 3, indices: np.ndarray | None = None
    ) -> None:
        mode_of(num_channels)
        self.found, self.num_channels = found, num_channels
        self.indices = np.arange(len(found.sources)) if indices is None else indices
        self.labels = found.labels if found.labels is None else found.labels[self.indices]
        self.class_names, self.name = found.class_names, found.name
        self.fingerprint = (
            found.entries.digest
            if indices is None
            else digest([found.entries.digest, indices.tobytes()])
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Sample:
        index = int(self.indices[i])
        source = self.found.sources[index]
        image = decode_image(
            source, self.num_channels, str(source) if isinstance(source, Path) else self.describe(i)
        )
        return Sample(image, -1 if self.labels is None else int(self.labels[i]), index)

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without labels."""
        if self.class_names is not None:
            return len(self.class_names)
        return 0 if self.labels is None else int(self.labels.max(initial=-1)) + 1

    def place(self, candidate: Candidate) -> int:
        """`Sample.index` of a candidate."""
        assert isinstance(candidate, int)
        return int(self.indices[candidate])

    def broken(self, candidate: Candidate, error: ValueError) -> Broken:
        """The entry of an image that cannot be read."""
        assert isinstance(candidate, int)
        return {
            "index": self.place(candidate),
            "path": self.describe(candidate),
            "reason": str(error),
        }

    def describe(self, i: int) -> str:
        """Where image `i` comes from, for messages: its path, or its row in the data set."""
        index = int(self.indices[i])
        source = self.found.sources[index] if isinstance(self.found.sources, list) else None
        return str(source) if isinstance(source, Path) else f"row {index} of {self.name}"

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageDataset":
        """The images at `indices` of this set, in that order; each keeps its `Sample.index`."""
        return ImageDataset(
            self.found,
            num_channels=self.num_channels,
            indices=self.indices[np.asarray(indices, dtype=np.int64)],
        )


class ImageStream:
    """Images in the order a stream gives them. Text labels are -1: numbering them would take reading to the end."""

    def __init__(self, stream: Any, *, name: str, num_channels: int = 3) -> None:
        mode_of(num_channels)
        features = stream.features or stream._resolve_features().features
        self.name, self.num_channels = name, num_channels
        self.image_column, self.label_column = find_columns(features, name)
        self.class_names: list[str] | None = getattr(features.get(self.label_column), "names", None)
        kept = [
            column
            for column in (self.image_column, self.label_column, "__key__")
            if column in features
        ]
        self.stream = undecoded(
            stream.select_columns(kept), self.image_column, features
        )  # no other column is decoded either

    def iterate(
        self, seed: int, epoch: int, start: int = 0
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """(position in this epoch, undecoded example) from position `start` on, shuffled by shards and a buffer."""
        shuffle_seed = int(random_generator(seed, "stream", epoch).integers(2**31))
        return itertools.islice(
            enumerate(self.stream.shuffle(seed=shuffle_seed, buffer_size=SHUFFLE_BUFFER)),
            start,
            None,
        )

    def decode(self, example: dict[str, Any]) -> tuple[Image.Image, int]:
        """The image of an example of `iterate`, and its label or -1; ValueError if it is broken."""
        source = stored(example[self.image_column], self.name)
        label = example[self.label_column] if self.label_column else None
        return decode_image(source, self.num_channels, self.describe(example)), label if isinstance(
            label, int
        ) else -1

    def describe(self, example: dict[str, Any]) -> str:
        """What an example is called: its key in a tar shard, or its path; of one without either, the stream."""
        cell = example[self.image_column]
        return str(
            example.get("__key__")
            or (isinstance(cell, dict) and cell.get("path"))
            or f"an image of {self.name}"
        )

    def __getitem__(self, candidate: tuple[int, dict[str, Any]]) -> Sample:
        """The sample of an (index, example) of `iterate`."""
        return Sample(*self.decode(candidate[1]), candidate[0])

    def place(self, candidate: Candidate) -> int:
        """`Sample.index` of a candidate."""
        assert isinstance(candidate, tuple)
        return candidate[0]

    def broken(self, candidate: Candidate, error: ValueError) -> Broken:
        """The entry of an image that cannot be read; of a stream, its index is the place in that epoch."""
        assert isinstance(candidate, tuple)
        return {"index": candidate[0], "path": self.describe(candidate[1]), "reason": str(error)}


def open_images(
    dataset: str, *, config: str | None = None, split: str | None = None, num_channels: int = 3
) -> ImageDataset:
    """Opens what `dataset` names, without decoding anything; `split=None` means "train".

    - "digits": scikit-learn's 1797 handwritten digits (8x8, greyscale, bundled), split "train" (1297) or "test" (500),
      stratified and fixed;
    - a folder of images at any depth, labelled by its first-level sub-folders if every image lies in one, sorted, hidden files
      ignored. `split` names a sub-folder; without it the whole folder is read, or "train" where all sub-folders are splits;
    - a parquet file, a folder with parquet files or tar shards (WebDataset), or a folder written by `datasets`' `save_to_disk`;
    - otherwise a data set on the Hub, with `config` and `split`.

    FileNotFoundError or ValueError says what is missing and what there is; ConnectionError, that the Hub cannot be reached."""
    mode_of(num_channels)
    found = (
        _find_digits(split or "train")
        if dataset == "digits"
        else find_images(dataset, config=config, split=split)
    )
    return ImageDataset(found, num_channels=num_channels)


class Reading(NamedTuple):
    """What `read_sample` gives: a sample, the index of the one that was asked for, and those that were broken on the way."""

    sample: Sample
    asked: int
    broken: list[Broken]


def read_sample(
    source: ImageDataset | ImageStream, key: Key, read: Callable[[Any], Sample] | None = None
) -> Reading:
    """The first readable candidate of a key.

    Args:
        key: of a `BatchSampler`; one without replacements, (epoch, candidate), will do.
        read: candidate to sample, ValueError if it is broken; None for `source[candidate]`.

    Raises:
        ValueError: when all candidates are broken.
    """
    read = read or source.__getitem__
    broken: list[Broken] = []
    for candidate in key[1:]:
        try:
            return Reading(read(candidate), source.place(key[1]), broken)
        except ValueError as error:
            broken.append(source.broken(candidate, error))
    raise ValueError(
        f"{len(broken)} images of {source.name} in a row are broken, first: {broken[0]['reason']} Check the data."
    )


def _find_digits(split: str) -> FoundImages:
    from sklearn.datasets import load_digits  # here: other sources do without scikit-learn

    if split not in ("train", "test"):
        raise ValueError(f"digits has no split {split!r}; it has ['test', 'train'].")
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    train, test = _stratified(labels, 500, random_generator(0, "digits"))
    chosen = train if split == "train" else test
    pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # (N, 8, 8) in 0..16
    names = [str(digit) for digit in range(10)]
    entries = Entries.of(["digits"], [digest([pixels.tobytes()])])
    return FoundImages(
        [Image.fromarray(image) for image in pixels], labels[chosen], names, "digits", entries
    )


def open_stream(
    dataset: str, *, config: str | None = None, split: str | None = None, num_channels: int = 3
) -> ImageStream:
    """As `open_images`, read in passing: Hub data sets, parquet files, tar shards, image folders; not the digits."""
    if dataset == "digits":
        raise ValueError(
            "The digits are 1797 images in memory and are not streamed; open them without streaming."
        )
    return ImageStream(
        load_table(dataset, config=config, split=split, streaming=True),
        name=dataset,
        num_channels=num_channels,
    )


def hold_out(images: ImageDataset, fraction: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """(rest, held out): `fraction` of the images, at most 5000, in the classes' proportions where there are labels.

    A pure function of its arguments. ValueError for a fraction outside (0, 1) and fewer than 2 images."""
    if not 0 < fraction < 1:
        raise ValueError(
            f"The fraction to hold out is {fraction}; it lies between 0 and 1, both excluded."
        )
    if len(images) < 2:
        raise ValueError(f"{images.name} has {len(images)} image; holding out takes at least 2.")
    count = min(max(round(fraction * len(images)), 1), MAX_HELD_OUT, len(images) - 1)
    labels = images.labels if images.labels is not None else np.zeros(len(images), dtype=np.int64)
    rest, held_out = _stratified(labels, count, random_generator(seed, "hold out"))
    return images.subset(rest), images.subset(held_out)


def _stratified(
    labels: np.ndarray, count: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted places of the rest and of `count` chosen ones: each class is shuffled and spread over (0, 1), the lowest win."""
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, first, size = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(first, size)
    order = by_class[np.argsort((rank + 0.5) / np.repeat(size, size), kind="stable")]
    return np.sort(order[count:]), np.sort(order[:count])


def fully_labelled(images: "ImageDataset") -> bool:
    """Whether every image has a label."""
    return images.labels is not None and bool((images.labels >= 0).all())


def evenly_spaced(images: "ImageDataset", limit: int) -> "ImageDataset":
    """At most `limit` of the images, evenly spaced over the data set."""
    if len(images) <= limit:
        return images
    return images.subset([index * len(images) // limit for index in range(limit)])
