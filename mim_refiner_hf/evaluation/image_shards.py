"""Images on their way into a feature store: in shards of a fixed number, decoded and preprocessed by the loader's workers.

    sampler = ShardSampler(images, shard_size=8192, batch_size=256, wanted=lambda shard: shard % 2 == 0)
    for batch in shard_loader(sampler, processor, num_workers=8, pin_memory=True):
        batch.shard, batch.pixel_values, batch.rows, batch.broken

Shard s holds the images from s * shard_size on, in the data set's or the stream's own order. A broken image stops nothing.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data.images import ImageDataset, ImageStream, Sample
from .features import Preprocess

Images = ImageDataset | ImageStream
Key = tuple[int, int, dict[str, Any] | None]
"""(shard, position among the images, undecoded example of a stream)."""


class ShardSampler(Sampler[list[Key]]):
    """Batches of keys, shard by shard, for the shards that are `wanted`; no batch holds images of two.

    A stream is read from its beginning, for there is no other way to count, but what is not wanted is not decoded. `num_images`,
    None for a stream at first, is known once it ended."""

    def __init__(
        self, images: Images, shard_size: int, batch_size: int, wanted: Callable[[int], bool]
    ) -> None:
        self.images, self.shard_size, self.batch_size, self.wanted = (
            images,
            shard_size,
            batch_size,
            wanted,
        )
        self.num_images = len(images) if isinstance(images, ImageDataset) else None

    def __iter__(self) -> Iterator[list[Key]]:
        if isinstance(self.images, ImageStream):
            yield from self._from_stream(self.images.stream)
            return
        size, total = self.shard_size, len(self.images)
        for shard in filter(self.wanted, range(math.ceil(total / size))):
            yield from self._batches(
                (shard, place, None)
                for place in range(shard * size, min((shard + 1) * size, total))
            )

    def _from_stream(self, stream: Any) -> Iterator[list[Key]]:
        examples, read = enumerate(stream), 0
        for shard in itertools.count():
            of_shard = itertools.islice(examples, self.shard_size)
            for keys in self._batches((shard, place, example) for place, example in of_shard):
                read += len(keys)
                if self.wanted(shard):
                    yield keys
            if read < (shard + 1) * self.shard_size:
                break
        self.num_images = read

    def _batches(self, keys: Iterator[Key]) -> Iterator[list[Key]]:
        while batch := list(itertools.islice(keys, self.batch_size)):
            yield batch


class Item(NamedTuple):
    """An image and its place in the whole data set; where `sample` is None, the reason why it could not be read."""

    shard: int
    place: int
    path: str
    sample: Sample | None
    reason: str


class ReadableImages(Dataset[Item]):
    """Key of a `ShardSampler` -> `Item`; a broken image raises nothing."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, key: Key) -> Item:
        shard, position, example = key
        path, candidate = (
            self.path(position, example),
            position if example is None else (position, example),
        )
        images: Any = self.images  # either takes the candidates that it gives
        try:
            sample = images[candidate]
        except ValueError as error:
            return Item(shard, images.place(candidate), path, None, str(error))
        return Item(shard, sample.index, path, sample, "")

    def path(self, position: int, example: dict[str, Any] | None) -> str:
        """Where an image comes from: its path, its key in a tar shard, or its row."""
        if isinstance(self.images, ImageDataset):
            return self.images.describe(position)
        cell = (example or {}).get(self.images.image_column)
        own = (example or {}).get("__key__") or (
            cell.get("path") if isinstance(cell, dict) else None
        )
        return str(own or f"row {position} of {self.images.name}")


class Batch(NamedTuple):
    """The readable images of one shard's batch, preprocessed, and the others: `rows` are (index, label, path)."""

    shard: int
    pixel_values: Tensor | None
    rows: list[tuple[int, int, str]]
    broken: list[dict[str, Any]]


@dataclass
class Collate:
    """Items to a `Batch` inside the loader's workers; pixel_values (B, C, H, W), or None when all are broken."""

    processor: Any

    def __call__(self, items: Sequence[Item]) -> Batch:
        rows = [
            (item.place, item.sample.label, item.path) for item in items if item.sample is not None
        ]
        broken = [
            {"index": i.place, "path": i.path, "reason": i.reason}
            for i in items
            if i.sample is None
        ]
        samples = [item.sample for item in items if item.sample is not None]
        return Batch(
            items[0].shard,
            Preprocess(self.processor)(samples)[0] if samples else None,
            rows,
            broken,
        )


def shard_loader(
    sampler: ShardSampler, processor: Any, *, num_workers: int, pin_memory: bool
) -> "DataLoader[Any]":
    """The sampler's batches, read and preprocessed: an iterable of `Batch`, in order."""
    return DataLoader(
        ReadableImages(sampler.images),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=Collate(processor),
        pin_memory=pin_memory,
    )


__all__ = ["Batch", "Images", "ShardSampler", "shard_loader"]
