"""The views of every batch of a training, in the order of its steps."""

import atexit
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..runtime.distributed import rank, world_size
from ..runtime.signals import ignore_stop_signals
from .images import ImageDataset
from .order import BatchSampler
from .stream import ImageStream
from .views import Multicrop, ViewDataset


class _Batches(DataLoader[dict[str, Tensor]]):
    """A loader whose workers end with the process, though no SIGTERM ends them.

    torch and multiprocessing end those that are left at the exit by SIGTERM, and wait. Some are
    left where an error keeps the frames, and so the loader, until then.
    """

    def __iter__(self) -> Any:
        batches = super().__iter__()
        # of hooks the last one registered is the first to run: this one comes before torch's
        atexit.register(_end_workers, weakref.ref(batches))
        return batches


def _end_workers(batches: weakref.ref[Any]) -> None:
    """Have the workers of a loader end as they do when it is forgotten."""
    end = getattr(batches(), "_shutdown_workers", None)
    if end is not None:
        end()


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

    return _Batches(
        ViewDataset(images, multicrop, seed, value_range),
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_stop_signals,
    )
