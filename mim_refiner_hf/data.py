"""Images in: folders, tables, Hub data sets, streams and bundled digits behind one interface, and the order of training.

    from mim_refiner_hf.data import open_images
    images = open_images("photos/")                  # or "digits", "train.parquet", "uoft-cs/cifar10" (with config and split)
    image, label, index = images[0]                  # a PIL image, -1 without a label, the place in the whole data set

Labels are optional everywhere. Pixels: EXIF rotation is applied, transparency lies on white, 16 bits are scaled to 8 (not
clipped), of an animation the first frame counts.

The order is a pure function of (seed, epoch): `BatchSampler` starts at any step, on any number of processes, with the same
sequence of global batches. A `DataLoader` takes it as `batch_sampler`, beside a `mim_refiner_hf.refinement.views.ViewDataset`.
"""

import io
import itertools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset, Sampler

from .data_sources import FoundImages, ImageSource, digest, find_columns, find_images, load_table, stored, undecoded

MAX_HELD_OUT = 5000
SHUFFLE_BUFFER = 4096  # undecoded examples in the shuffle of a stream: about 0.4 GB of ImageNet JPEGs

Key = tuple[int, int] | tuple[int, int, dict[str, Any]]
"""What `BatchSampler` hands to a worker: (epoch, position) in a data set, (epoch, index, undecoded example) of a stream."""


class Sample(NamedTuple):
    """One decoded image; `label` is -1 where there is none, `index` the place in the whole data set, also in a subset."""

    image: Image.Image
    label: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a sample


def decode_image(source: ImageSource, num_channels: int = 3, name: str | None = None) -> Image.Image:
    """An upright 8-bit image of mode "RGB" (`num_channels` 3) or "L" (1) from encoded bytes, a path or a PIL image.

    Transparent pixels show white; 16-bit values are divided by 257, floats in [0, 1] multiplied by 255. ValueError, naming the
    path or `name`, for whatever cannot be decoded."""
    mode = _mode(num_channels)
    try:
        if not isinstance(source, Image.Image):
            image: Image.Image = Image.open(io.BytesIO(source if isinstance(source, bytes) else source.read_bytes()))
        else:
            image = source
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _to_eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image.load()
        return image if image.mode == mode else image.convert(mode)
    except (
        Exception
    ) as error:  # for broken files Pillow raises OSError, SyntaxError, struct.error, zlib.error, DecompressionBombError, ...
        where = name or (str(source) if isinstance(source, Path) else "an image")
        raise ValueError(f"Cannot decode {where}: {error or type(error).__name__}; replace or remove it.") from error


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit integers ("I;16*", "I" with values above 255) or floats ("F") as mode "L"; `convert` alone would clip."""
    values = np.asarray(image, dtype=np.float64)
    top = values.max()
    scale = 1 / 257 if image.mode != "F" and (image.mode != "I" or top > 255) else 1.0
    if image.mode == "F" and top <= 1:
        scale = 255.0
    return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))


def _mode(num_channels: int) -> str:
    if num_channels not in (1, 3):
        raise ValueError(f"num_channels is {num_channels}; images have 3 (RGB) or 1 (greyscale).")
    return "RGB" if num_channels == 3 else "L"


class ImageDataset(Dataset[Sample]):
    """Images at random places, decoded when asked for.

    `labels`: int64 per item, -1 = none; `class_names`: a name per label; both None where the data has none. `fingerprint` tells
    two data sets apart without reading pixels. `indices` are the chosen places among `found.sources`, all by default."""

    def __init__(self, found: FoundImages, *, num_channels: int = 3, indices: np.ndarray | None = None) -> None:
        _mode(num_channels)
        self.found, self.num_channels = found, num_channels
        self.indices = np.arange(len(found.sources)) if indices is None else indices
        self.labels = found.labels if found.labels is None else found.labels[self.indices]
        self.class_names, self.name = found.class_names, found.name
        self.fingerprint = found.fingerprint if indices is None else digest([found.fingerprint, indices.tobytes()])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Sample:
        index = int(self.indices[i])
        source = self.found.sources[index]
        image = decode_image(source, self.num_channels, str(source) if isinstance(source, Path) else self.describe(i))
        return Sample(image, -1 if self.labels is None else int(self.labels[i]), index)

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without labels."""
        if self.class_names is not None:
            return len(self.class_names)
        return 0 if self.labels is None else int(self.labels.max(initial=-1)) + 1

    def describe(self, i: int) -> str:
        """Where image `i` comes from, for messages: its path, or its row in the data set."""
        index = int(self.indices[i])
        source = self.found.sources[index] if isinstance(self.found.sources, list) else None
        return str(source) if isinstance(source, Path) else f"row {index} of {self.name}"

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageDataset":
        """The images at `indices` of this set, in that order; each keeps its `Sample.index`."""
        return ImageDataset(
            self.found, num_channels=self.num_channels, indices=self.indices[np.asarray(indices, dtype=np.int64)]
        )


class ImageStream:
    """Images in the order a stream gives them. Text labels are -1: numbering them would take reading to the end."""

    def __init__(self, stream: Any, *, name: str, num_channels: int = 3) -> None:
        _mode(num_channels)
        features = stream.features or stream._resolve_features().features
        self.name, self.num_channels = name, num_channels
        self.image_column, self.label_column = find_columns(features, name)
        self.class_names: list[str] | None = getattr(features.get(self.label_column), "names", None)
        kept = [column for column in (self.image_column, self.label_column, "__key__") if column in features]
        self.stream = undecoded(stream.select_columns(kept), self.image_column, features)  # no other column is decoded either

    def iterate(self, seed: int, epoch: int, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """(position in this epoch, undecoded example) from position `start` on, shuffled by shards and a buffer."""
        shuffle_seed = int(random_generator(seed, "stream", epoch).integers(2**31))
        return itertools.islice(enumerate(self.stream.shuffle(seed=shuffle_seed, buffer_size=SHUFFLE_BUFFER)), start, None)

    def decode(self, example: dict[str, Any]) -> tuple[Image.Image, int]:
        """The image of an example of `iterate`, and its label or -1; ValueError if it is broken."""
        source = stored(example[self.image_column], self.name)
        label = example[self.label_column] if self.label_column else None
        where = example.get("__key__") or (source if isinstance(source, Path) else f"an image of {self.name}")
        return decode_image(source, self.num_channels, str(where)), label if isinstance(label, int) else -1


def open_images(dataset: str, *, config: str | None = None, split: str | None = None, num_channels: int = 3) -> ImageDataset:
    """Opens what `dataset` names, without decoding anything; `split=None` means "train".

    - "digits": scikit-learn's 1797 handwritten digits (8x8, greyscale, bundled), split "train" (1297) or "test" (500),
      stratified and fixed;
    - a folder of images at any depth, labelled by its first-level sub-folders if every image lies in one, sorted, hidden files
      ignored. `split` names a sub-folder; without it the whole folder is read, or "train" where all sub-folders are splits;
    - a parquet file, a folder with parquet files or tar shards (WebDataset), or a folder written by `datasets`' `save_to_disk`;
    - otherwise a data set on the Hub, with `config` and `split`.

    FileNotFoundError or ValueError says what is missing and what there is; ConnectionError, that the Hub cannot be reached."""
    _mode(num_channels)
    found = _find_digits(split or "train") if dataset == "digits" else find_images(dataset, config=config, split=split)
    return ImageDataset(found, num_channels=num_channels)


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
    return FoundImages(
        [Image.fromarray(image) for image in pixels], labels[chosen], names, "digits", digest([pixels.tobytes()])
    )


def open_stream(dataset: str, *, config: str | None = None, split: str | None = None, num_channels: int = 3) -> ImageStream:
    """As `open_images`, read in passing: Hub data sets, parquet files, tar shards, image folders; not the digits."""
    if dataset == "digits":
        raise ValueError("The digits are 1797 images in memory and are not streamed; open them without streaming.")
    return ImageStream(load_table(dataset, config=config, split=split, streaming=True), name=dataset, num_channels=num_channels)


def hold_out(images: ImageDataset, fraction: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """(rest, held out): `fraction` of the images, at most 5000, in the classes' proportions where there are labels.

    A pure function of its arguments. ValueError for a fraction outside (0, 1) and fewer than 2 images."""
    if not 0 < fraction < 1:
        raise ValueError(f"The fraction to hold out is {fraction}; it lies between 0 and 1, both excluded.")
    if len(images) < 2:
        raise ValueError(f"{images.name} has {len(images)} image; holding out takes at least 2.")
    count = min(max(round(fraction * len(images)), 1), MAX_HELD_OUT, len(images) - 1)
    labels = images.labels if images.labels is not None else np.zeros(len(images), dtype=np.int64)
    rest, held_out = _stratified(labels, count, random_generator(seed, "hold out"))
    return images.subset(rest), images.subset(held_out)


def _stratified(labels: np.ndarray, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sorted places of the rest and of `count` chosen ones: each class is shuffled and spread over (0, 1), the lowest win."""
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, first, size = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(first, size)
    order = by_class[np.argsort((rank + 0.5) / np.repeat(size, size), kind="stable")]
    return np.sort(order[count:]), np.sort(order[:count])


def random_generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A generator that is a pure function of its arguments and independent of those of any other purpose or numbers."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()), *numbers)))


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of `range(length)` in which an epoch meets the images: a pure function of its arguments."""
    return random_generator(seed, "order", epoch).permutation(length)


class BatchSampler(Sampler[list[Key]]):
    """The keys of each step's batch for this process: its contiguous slice of the global batch, `start_step` to `steps` - 1.

    `batch_size` counts the images of all processes together. The last partial batch of an epoch is dropped. Starting later, or
    on more processes, gives exactly the same global batches. Every process reads a whole stream and keeps its slice.

    ValueError for a batch larger than the data set or not divided by `world_size`, and for a data set of one image."""

    def __init__(
        self,
        source: ImageDataset | ImageStream,
        *,
        batch_size: int,
        seed: int,
        steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size {batch_size} counts all processes and must be a positive multiple of their number, {world_size}."
            )
        if isinstance(source, ImageDataset) and len(source) < 2:
            raise ValueError(f"{source.name} has {len(source)} image; contrastive refinement needs at least 2.")
        if isinstance(source, ImageDataset) and batch_size > len(source):
            raise ValueError(f"batch_size {batch_size} is larger than {source.name} with its {len(source)} images; lower it.")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.steps, self.start_step = steps, start_step
        share = batch_size // world_size
        self.share = slice(rank * share, (rank + 1) * share)

    @property
    def steps_per_epoch(self) -> int | None:
        """Whole batches in an epoch; None for a stream, whose epoch ends with it."""
        return len(self.source) // self.batch_size if isinstance(self.source, ImageDataset) else None

    def __len__(self) -> int:
        return max(self.steps - self.start_step, 0)

    def __iter__(self) -> Iterator[list[Key]]:
        return self._from_stream(self.source) if isinstance(self.source, ImageStream) else self._from_dataset(self.source)

    def _from_dataset(self, source: ImageDataset) -> Iterator[list[Key]]:
        per_epoch = len(source) // self.batch_size
        step = self.start_step
        while step < self.steps:
            epoch, first = divmod(step, per_epoch)
            order = epoch_order(len(source), self.seed, epoch)
            for batch in range(first, min(per_epoch, first + self.steps - step)):
                positions = order[batch * self.batch_size : (batch + 1) * self.batch_size]
                yield [(epoch, int(position)) for position in positions[self.share]]
                step += 1

    def _from_stream(self, source: ImageStream) -> Iterator[list[Key]]:
        step = epoch = 0
        while step < self.steps:
            first = step
            examples = source.iterate(self.seed, epoch)
            while step < self.steps and len(batch := list(itertools.islice(examples, self.batch_size))) == self.batch_size:
                if step >= self.start_step:
                    yield [(epoch, index, example) for index, example in batch[self.share]]
                step += 1
            if step == first:
                raise ValueError(f"{source.name} ends before its first batch of {self.batch_size} is full; lower batch_size.")
            unread = max(self.start_step - step, 0) // (
                step - first
            )  # every epoch is as long as this one: whole ones need no reading
            step, epoch = step + unread * (step - first), epoch + 1 + unread
