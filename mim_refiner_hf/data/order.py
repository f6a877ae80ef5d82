"""The order of training: which images each step's batch holds, a pure function of (seed, epoch).

    sampler = BatchSampler(images, batch_size=1024, seed=0, steps=1000)
    for batch in DataLoader(ViewDataset(images, multicrop, seed=0), batch_sampler=sampler): ...

`BatchSampler` starts at any step, on any number of processes, with the same sequence of global batches.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from ..runtime.seeding import random_generator
from .images import MAX_BROKEN_IN_A_ROW, Candidate, ImageDataset, ImageStream, Key


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
            raise ValueError(
                f"{source.name} has {len(source)} image; contrastive refinement needs at least 2."
            )
        if isinstance(source, ImageDataset) and batch_size > len(source):
            raise ValueError(
                f"batch_size {batch_size} is larger than {source.name} with its {len(source)} images; lower it."
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.steps, self.start_step = steps, start_step
        share = batch_size // world_size
        self.share = slice(rank * share, (rank + 1) * share)

    @property
    def steps_per_epoch(self) -> int | None:
        """Whole batches in an epoch; None for a stream, whose epoch ends with it."""
        return (
            len(self.source) // self.batch_size if isinstance(self.source, ImageDataset) else None
        )

    def __len__(self) -> int:
        return max(self.steps - self.start_step, 0)

    def __iter__(self) -> Iterator[list[Key]]:
        return (
            self._from_stream(self.source)
            if isinstance(self.source, ImageStream)
            else self._from_dataset(self.source)
        )

    def _from_dataset(self, source: ImageDataset) -> Iterator[list[Key]]:
        per_epoch, spares = len(source) // self.batch_size, MAX_BROKEN_IN_A_ROW - 1
        step = self.start_step
        while step < self.steps:
            epoch, first = divmod(step, per_epoch)
            order = epoch_order(len(source), self.seed, epoch)
            for batch in range(first, min(per_epoch, first + self.steps - step)):
                places = np.arange(
                    batch * self.batch_size + self.share.start,
                    batch * self.batch_size + self.share.stop,
                )
                candidates = order[
                    (places[:, None] + [0, *range(self.batch_size, self.batch_size + spares)])
                    % len(order)
                ]
                yield [(epoch, *row) for row in candidates.tolist()]
                step += 1

    def _from_stream(self, source: ImageStream) -> Iterator[list[Key]]:
        step = epoch = 0
        while step < self.steps:
            first = step
            examples = source.iterate(self.seed, epoch)
            batch = list(itertools.islice(examples, self.batch_size))
            while step < self.steps and len(batch) == self.batch_size:
                following = list(itertools.islice(examples, self.batch_size))
                if step >= self.start_step:
                    yield self._stream_keys(epoch, batch, following)
                step, batch = step + 1, following
            if step == first:
                raise ValueError(
                    f"{source.name} ends before its first batch of {self.batch_size} is full; lower batch_size."
                )
            unread = max(self.start_step - step, 0) // (
                step - first
            )  # every epoch is as long as this one: whole ones need no reading
            step, epoch = step + unread * (step - first), epoch + 1 + unread

    def _stream_keys(
        self, epoch: int, batch: Sequence[Candidate], following: Sequence[Candidate]
    ) -> list[Key]:
        """The next batch stands in; where the stream ends in it, this one after it. A worker is handed about twice its share."""
        pool = [*following] if len(following) == self.batch_size else [*following, *batch]
        spares = range(MAX_BROKEN_IN_A_ROW - 1)
        places = range(self.batch_size)[self.share]
        return [
            (epoch, batch[place], *(pool[(place + spare) % len(pool)] for spare in spares))
            for place in places
        ]


__all__ = ["BatchSampler", "epoch_order"]
