"""Images on their way into a feature store: in shards of a fixed number, read by loader workers.

    mine = lambda shard: shard % 2 == 0
    sampler = ShardSampler(images, shard_size=8192, batch_size=256, wanted=mine)
    for batch in shard_loader(sampler, processor, num_workers=8, device=encoder.device):
        batch.shard, batch.pixel_values, batch.rows, batch.broken

Shard s holds the images from s * shard_size on, in the data set's or the stream's own order. A
broken image stops nothing.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data.images import Broken, Example, ImageDataset, Sample
from ..data.loading import Processor
from ..data.stream import ImageStream
from .features import Preprocess

SetOrStream = ImageDataset | ImageStream
ShardKey = tuple[int, int, Example | None]
"""(shard, position among the images, undecoded example of a stream)."""


class ShardSampler(Sampler[list[ShardKey]]):
    """Batches of keys, shard by shard, for the shards that are `wanted`; none holds images of two.

    A stream is read from its beginning, for there is no other way to count, but what is not wanted
    is not decoded. `num_images`, None for a stream at first, is known once it ended.
    """

    def __init__(
        self, images: SetOrStream, shard_size: int, batch_size: int, wanted: Callable[[int], bool]
    ) -> None:
        self.images = images
        self.shard_size = shard_size
        self.batch_size = batch_size
        self.wanted = wanted
        self.num_images = len(images) if isinstance(images, ImageDataset) else None

    def __iter__(self) -> Iterator[list[ShardKey]]:
        if isinstance(self.images, ImageStream):
            yield from self._from_stream(self.images.in_order())
            return
        size = self.shard_size
        total = len(self.images)
        for shard in filter(self.wanted, range(math.ceil(total / size))):
            places = range(shard * size, min((shard + 1) * size, total))
            yield from self._batches((shard, place, None) for place in places)

    def _from_stream(self, stream: Iterable[Example]) -> Iterator[list[ShardKey]]:
        examples = enumerate(stream)
        read = 0
        for shard in itertools.count():
            of_shard = itertools.islice(examples, self.shard_size)
            for keys in self._batches((shard, place, example) for place, example in of_shard):
                read += len(keys)
                if self.wanted(shard):
                    yield keys
            if read < (shard + 1) * self.shard_size:
                break
        self.num_images = read

    def _batches(self, keys: Iterator[ShardKey]) -> Iterator[list[ShardKey]]:
        while batch := list(itertools.islice(keys, self.batch_size)):
            yield batch


class ShardItem(NamedTuple):
    """An image and its place in the whole data set; `sample` is None where it could not be read."""

    shard: int
    place: int
    path: str
    sample: Sample | None
    reason: str


class ReadableImages(Dataset[ShardItem]):
    """Key of a `ShardSampler` -> `ShardItem`; a broken image raises nothing."""

    def __init__(self, images: SetOrStream) -> None:
        self.images = images

    def __getitem__(self, key: ShardKey) -> ShardItem:
        shard, position, example = key
        path = self._path(position, example)
        candidate: Any = position if example is None else (position, example)
        try:
            sample = self.images[candidate]
        except ValueError as error:
            return ShardItem(shard, self.images.place(candidate), path, None, str(error))
        return ShardItem(shard, sample.index, path, sample, "")

    def _path(self, position: int, example: Example | None) -> str:
        """Where an image comes from: its path, its key in a tar shard, or its row."""
        if isinstance(self.images, ImageDataset):
            return self.images.describe(position)
        example = example or {}
        cell = example.get(self.images.image_column)
        own = example.get("__key__")
        if not own and isinstance(cell, dict):
            own = cell.get("path")
        return str(own or f"row {position} of {self.images.name}")


class ShardBatch(NamedTuple):
    """Images of one shard: the readable ones preprocessed, and the broken ones.

    Attributes:
        pixel_values: (B, C, H, W), or None when all are broken.
        rows: (index, label, path) of each readable image.
    """

    shard: int
    pixel_values: Tensor | None
    rows: list[tuple[int, int, str]]
    broken: list[Broken]


@dataclass
class CollateShard:
    """Items to a `ShardBatch` inside the loader's workers."""

    processor: Processor

    def __call__(self, items: Sequence[ShardItem]) -> ShardBatch:
        samples = []
        rows = []
        broken: list[Broken] = []
        for item in items:
            if item.sample is None:
                broken.append({"index": item.place, "path": item.path, "reason": item.reason})
                continue
            samples.append(item.sample)
            rows.append((item.place, item.sample.label, item.path))

        pixel_values = None
        if samples:
            pixel_values, _ = Preprocess(self.processor)(samples)
        return ShardBatch(items[0].shard, pixel_values, rows, broken)


def shard_loader(
    sampler: ShardSampler, processor: Processor, num_workers: int, device: torch.device
) -> Iterable[ShardBatch]:
    """The sampler's batches in order, read, preprocessed, and ready to be moved to the device."""
    return DataLoader(
        ReadableImages(sampler.images),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=CollateShard(processor),
        pin_memory=device.type == "cuda",
    )
