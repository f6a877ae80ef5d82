"""The views of every batch of a pre-training, in the order of its steps."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.images import ImageDataset
from ..data.order import BatchSampler
from ..data.views import Multicrop, ViewDataset
from ..runtime.distributed import rank, world_size
from ..runtime.signals import ignore_stop_signals
from .recipe import PretrainRecipe


def crop_batches(
    recipe: PretrainRecipe,
    crops: Multicrop,
    images: ImageDataset,
    *,
    start_step: int = 0,
    stop_step: int,
    num_workers: int,
) -> DataLoader[dict[str, Tensor]]:
    """This process's share of the views of every batch from `start_step` to `stop_step`.

    Raises:
        ValueError: for a batch larger than the data set.
    """
    sampler = BatchSampler(
        images,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        steps=stop_step,
        start_step=start_step,
        rank=rank(),
        world_size=world_size(),
    )
    return DataLoader(
        ViewDataset(images, crops, recipe.seed),
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_stop_signals,
    )


__all__ = ["crop_batches"]
