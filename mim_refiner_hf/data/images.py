"""Images in: folders, tables, Hub data sets, streams and bundled digits behind one interface.

    from mim_refiner_hf.data import open_images
    images = open_images("photos/")        # or "digits", "train.parquet", "uoft-cs/cifar10"
    images = open_images(list_of_images)   # or another object: `objects.py` has the table
    image, label, index = images[0]        # a PIL image; -1 without a label; the place in the set

Labels are optional everywhere. What becomes of EXIF rotation, transparency, 16 bits and animations
is said in `clustering/decoding.py`.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..clustering.channels import Picture, check_channels
from ..clustering.decoding import decode_image
from ..runtime.seeding import random_generator
from ..runtime.wording import setting
from .found import NO_OPTIONS, Entries, FoundImages, SourceOptions, digest
from .objects import find_in_objects
from .sources import find_images, refuse_options

logger = logging.getLogger(__name__)

MAX_HELD_OUT = 5000
MAX_BROKEN_IN_A_ROW = 10

Example = dict[str, Any]
"""A row of a stream, undecoded."""
Candidate = int | tuple[int, Example]
"""Where a sample is: a place in an `ImageDataset`, or a place in a stream and an example."""
Key = tuple[Any, ...]
"""What a worker gets of a `BatchSampler`: (epoch, candidate, those that may stand in for it...)."""


class Broken(TypedDict):
    """An image that cannot be read, as `broken.json` lists it; its place in the whole data set."""

    index: int
    path: str
    reason: str


class Sample(NamedTuple):
    """One decoded image.

    Attributes:
        label: -1 where there is none.
        index: the place in the whole data set, also in a subset.
    """

    image: Picture
    label: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a sample


class ImageDataset(Dataset[Sample]):
    """Images at random places, decoded when asked for.

    Args:
        found: where the images of the whole data set lie.
        num_channels: 3 for RGB, 1 for greyscale, 1 to 16 of other images.
        indices: the chosen places among `found.sources`; None for all.

    Attributes:
        labels: int64 per item, -1 for none; None where the data has none.
        class_names: a name per label; None where the data has none.
        fingerprint: tells two data sets apart without reading pixels.
    """

    def __init__(
        self, found: FoundImages, *, num_channels: int = 3, indices: np.ndarray | None = None
    ) -> None:
        check_channels(num_channels)
        self.found = found
        self.name = found.name
        self.num_channels = num_channels
        self.class_names = found.class_names

        self.fingerprint = found.entries.digest
        if indices is not None:
            self.fingerprint = digest([self.fingerprint, indices.tobytes()])
        self.is_whole = indices is None
        self.indices = np.arange(len(found.sources)) if indices is None else indices
        self.labels = None if found.labels is None else found.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Sample:
        index = int(self.indices[i])
        source = self.found.sources[index]
        name = str(source) if isinstance(source, Path) else self.describe(i)
        label = -1 if self.labels is None else int(self.labels[i])
        return Sample(decode_image(source, self.num_channels, name), label, index)

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without labels."""
        if self.class_names is not None:
            return len(self.class_names)
        if self.labels is None:
            return 0
        return int(self.labels.max(initial=-1)) + 1

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageDataset":
        """The images at `indices` of this set, in that order; each keeps its `Sample.index`."""
        chosen = self.indices[np.asarray(indices, dtype=np.int64)]
        return ImageDataset(self.found, num_channels=self.num_channels, indices=chosen)

    def with_labels(self, numbers: Mapping[int, int], class_names: list[str]) -> "ImageDataset":
        """The same images with other numbers for their classes; one without a number gets -1."""
        assert self.found.labels is not None
        labels = np.full_like(self.found.labels, -1)
        for old, new in numbers.items():
            labels[self.found.labels == old] = new
        found = self.found._replace(labels=labels, class_names=class_names)
        return self._same_images(found, self.num_channels)

    def without_labels(self) -> "ImageDataset":
        """The same images, unlabelled."""
        found = self.found._replace(labels=None, class_names=None)
        return self._same_images(found, self.num_channels)

    def in_channels(self, num_channels: int) -> "ImageDataset":
        """The same images, read in so many channels."""
        return self._same_images(self.found, num_channels)

    def _same_images(self, found: FoundImages, num_channels: int) -> "ImageDataset":
        indices = None if self.is_whole else self.indices
        return ImageDataset(found, num_channels=num_channels, indices=indices)

    def describe(self, i: int) -> str:
        """Where image `i` comes from, for messages: its path, or its row in the data set."""
        index = int(self.indices[i])
        # of a table it is not looked up: that would read the image
        source = self.found.sources[index] if isinstance(self.found.sources, list) else None
        return str(source) if isinstance(source, Path) else f"row {index} of {self.name}"

    def place(self, candidate: Candidate) -> int:
        """`Sample.index` of a candidate."""
        assert isinstance(candidate, int)
        return int(self.indices[candidate])

    def broken(self, candidate: Candidate, error: ValueError) -> Broken:
        """The entry of an image that cannot be read."""
        assert isinstance(candidate, int)
        path = self.describe(candidate)
        return {"index": self.place(candidate), "path": path, "reason": str(error)}


# --- opening


def open_images(
    dataset: Any,
    *,
    config: str | None = None,
    split: str | None = None,
    num_channels: int = 3,
    options: SourceOptions = NO_OPTIONS,
) -> ImageDataset:
    """Open what `dataset` names or is, without decoding it; `split=None` means "train".

    - "digits": scikit-learn's 1797 handwritten digits (8x8, greyscale, bundled), split "train"
      (1297) or "test" (500), stratified and fixed;
    - a folder of images at any depth, sorted, labelled by its `metadata.csv` (folders.py), else by
      its first-level sub-folders if every image lies in one. `split` names a sub-folder; without
      it the whole folder is read, or "train" where all sub-folders are splits. Hidden files are
      ignored; other files, and links to folders, are counted in a warning;
    - a parquet file, a folder with parquet files or tar shards (WebDataset), or a folder written by
      `datasets`' `save_to_disk`;
    - any other text: a data set on the Hub, with `config` and `split`;
    - an `ImageDataset`, or another object that holds images: `objects.py` says which.

    `options` names the columns of a table; else `find_columns` says which are taken.

    Raises:
        FileNotFoundError, ValueError: saying what is missing and what there is.
        ConnectionError: when the Hub cannot be reached.
    """
    check_channels(num_channels)
    if not isinstance(dataset, str | Path):
        return _open_objects(dataset, config, split, num_channels, options)
    if dataset == "digits":
        refuse_options(dataset, options)
        found = _find_digits(split or "train")
    else:
        found = find_images(str(dataset), config=config, split=split, options=options)
    return ImageDataset(found, num_channels=num_channels)


def _open_objects(
    dataset: Any, config: str | None, split: str | None, num_channels: int, options: SourceOptions
) -> ImageDataset:
    """Images that are there already; ValueError for a configuration or a split of them."""
    for name, value in (("dataset_config", config), ("split", split)):
        if value is not None:
            raise ValueError(
                f"{setting(name, value)}: chooses a part of a data set that is named; "
                f"of this {type(dataset).__name__}, give the part itself"
            )
    if not isinstance(dataset, ImageDataset):
        return ImageDataset(find_in_objects(dataset, options), num_channels=num_channels)
    refuse_options("an ImageDataset", options)
    return dataset.in_channels(num_channels)


def _find_digits(split: str) -> FoundImages:
    # imported here: other sources do without scikit-learn
    from sklearn.datasets import load_digits

    if split not in ("train", "test"):
        raise ValueError(f"digits has no split {split!r}; it has ['test', 'train'].")
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    train, test = _stratified(labels, 500, random_generator(0, "digits"))
    chosen = train if split == "train" else test

    # (N, 8, 8) in 0..16
    pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    names = [str(digit) for digit in range(10)]
    entries = Entries.of(["digits"], [digest([pixels.tobytes()])])
    return FoundImages(images, labels[chosen], names, "digits", entries)


# --- choosing among images


def hold_out(images: ImageDataset, fraction: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """(rest, held out): `fraction` of the images, at most 5000, a pure function of the arguments.

    Where there are labels, in the classes' proportions.

    Raises:
        ValueError: for a fraction outside (0, 1) and fewer than 2 images.
    """
    if not 0 < fraction < 1:
        raise ValueError(
            f"The fraction to hold out is {fraction}; it lies between 0 and 1, both excluded."
        )
    if len(images) < 2:
        raise ValueError(f"{images.name} has {len(images)} image; holding out takes at least 2.")

    count = min(max(round(fraction * len(images)), 1), MAX_HELD_OUT, len(images) - 1)
    labels = images.labels
    if labels is None:
        labels = np.zeros(len(images), dtype=np.int64)
    rest, held_out = _stratified(labels, count, random_generator(seed, "hold out"))
    return images.subset(rest), images.subset(held_out)


def _stratified(
    labels: np.ndarray, count: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted places of the rest, and of `count` that are chosen in the classes' proportions.

    Each class is shuffled and spread evenly over (0, 1); the lowest are chosen.
    """
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, first, size = np.unique(labels[by_class], return_index=True, return_counts=True)

    rank_in_class = np.arange(len(labels)) - np.repeat(first, size)
    position = (rank_in_class + 0.5) / np.repeat(size, size)
    order = by_class[np.argsort(position, kind="stable")]
    return np.sort(order[count:]), np.sort(order[:count])


def evenly_spaced(images: ImageDataset, limit: int) -> ImageDataset:
    """At most `limit` of the images, evenly spaced over the data set."""
    if len(images) <= limit:
        return images
    return images.subset(evenly_spaced_places(len(images), limit))


def evenly_spaced_places(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` places, evenly spaced."""
    if count <= limit:
        return list(range(count))
    return [index * count // limit for index in range(limit)]


def fully_labelled(images: ImageDataset) -> bool:
    """Whether every image has a label."""
    return images.labels is not None and bool((images.labels >= 0).all())
