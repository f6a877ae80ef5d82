"""The order of training: which images each step's batch holds, a pure function of (seed, epoch).

sampler = BatchSampler(images, batch_size=1024, seed=0, steps=1000)
views = ViewDataset(images, multicrop, seed=0)
for batch in DataLoader(views, batch_sampler=sampler): ...
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from ..runtime.seeding import random_generator
from .images import MAX_BROKEN_IN_A_ROW, Candidate, ImageDataset, Key
from .stream import ImageStream


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of `range(length)` in which an epoch meets the images."""
    return random_generator(seed, "order", epoch).permutation(length)


class BatchSampler(Sampler[list[Key]]):
    """The keys of each step's batch for this process: its contiguous slice of the global batch.

    Starting later, or on more processes, gives exactly the same global batches. The last partial
    batch of an epoch is dropped. Of a stream every process reads all and keeps its slice.

    Args:
        source: where the images are from.
        batch_size: images of all processes together.
        steps: number of the last step + 1, counted from the beginning of the training.
        start_step: the first step to give.
        rank: which process this is.
        world_size: how many processes there are.

    Raises:
        ValueError: for a batch larger than the data set or not divided by `world_size`, and for a
            data set of one image.
    """

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
                f"batch_size {batch_size} counts all processes and must be a positive multiple of "
                f"their number, {world_size}."
            )
        if isinstance(source, ImageDataset) and len(source) < 2:
            raise ValueError(f"{source.name} has {len(source)} image; training needs at least 2.")
        if isinstance(source, ImageDataset) and batch_size > len(source):
            raise ValueError(
                f"batch_size {batch_size} is larger than {source.name} with its {len(source)} "
                "images; lower it."
            )

        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps
        self.start_step = start_step
        share = batch_size // world_size
        self.share = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return max(self.steps - self.start_step, 0)

    def __iter__(self) -> Iterator[list[Key]]:
        if isinstance(self.source, ImageStream):
            return self._from_stream(self.source)
        return self._from_dataset(self.source)

    def _from_dataset(self, source: ImageDataset) -> Iterator[list[Key]]:
        per_epoch = len(source) // self.batch_size
        # what stands in for an image comes 1 batch later in the order, then the one after it, ...
        ahead = [0, *range(self.batch_size, self.batch_size + MAX_BROKEN_IN_A_ROW - 1)]
        in_batch = np.arange(self.share.start, self.share.stop)

        step = self.start_step
        while step < self.steps:
            epoch, first = divmod(step, per_epoch)
            order = epoch_order(len(source), self.seed, epoch)
            for batch in range(first, min(per_epoch, first + self.steps - step)):
                places = batch * self.batch_size + in_batch
                candidates = order[(places[:, None] + ahead) % len(order)]
                yield [(epoch, *row) for row in candidates.tolist()]
                step += 1

    def _from_stream(self, source: ImageStream) -> Iterator[list[Key]]:
        step = 0
        epoch = 0
        while step < self.steps:
            first = step
            examples = source.iterate(self.seed, epoch)
            batch = list(itertools.islice(examples, self.batch_size))
            while step < self.steps and len(batch) == self.batch_size:
                following = list(itertools.islice(examples, self.batch_size))
                if step >= self.start_step:
                    yield self._stream_keys(epoch, batch, following)
                step += 1
                batch = following

            per_epoch = step - first
            if per_epoch == 0:
                raise ValueError(
                    f"{source.name} ends before its first batch of {self.batch_size} is full; "
                    "lower batch_size."
                )
            # every epoch is as long as this one: whole ones before the start need no reading
            unread = max(self.start_step - step, 0) // per_epoch
            step += unread * per_epoch
            epoch += 1 + unread

    def _stream_keys(
        self, epoch: int, batch: Sequence[Candidate], following: Sequence[Candidate]
    ) -> list[Key]:
        """The keys of a batch; the next one stands in, or, where the stream ends in it, both.

        A worker is handed about twice its share.
        """
        pool = [*following]
        if len(following) < self.batch_size:
            pool += batch
        keys = []
        for place in range(self.batch_size)[self.share]:
            spares = range(place, place + MAX_BROKEN_IN_A_ROW - 1)
            keys.append((epoch, batch[place], *(pool[spare % len(pool)] for spare in spares)))
        return keys
