"""The views of every batch of a training, in the order of its steps."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..runtime.distributed import rank, world_size
from ..runtime.signals import ignore_stop_signals
from .images import ImageDataset
from .order import BatchSampler
from .stream import ImageStream
from .views import Multicrop, ViewDataset


def batches_of_views(
    images: ImageDataset | ImageStream,
    multicrop: Multicrop,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    stop_step: int,
    num_workers: int,
    value_range: Sequence[float] | None = None,
) -> DataLoader[dict[str, Tensor]]:
    """This process's share of the views of every batch from `start_step` to `stop_step`.

    Args:
        batch_size: images of all processes together.
        value_range: as of `ViewDataset`.

    Raises:
        ValueError: for a batch larger than the data set.
    """
    sampler = BatchSampler(
        images,
        batch_size=batch_size,
        seed=seed,
        steps=stop_step,
        start_step=start_step,
        rank=rank(),
        world_size=world_size(),
    )

    return DataLoader(
        ViewDataset(images, multicrop, seed, value_range),
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_stop_signals,
    )
