"""The views of every batch of a run, in the order of its steps."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.batches import batches_of_views
from ..data.fast_views import FastMultiCrop
from ..data.images import ImageDataset
from ..data.stream import ImageStream
from ..data.views import MultiCrop, view_specs
from .resolve import ResolvedRecipe


def view_batches(
    recipe: ResolvedRecipe,
    images: ImageDataset | ImageStream,
    start_step: int,
    stop_step: int,
    device: torch.device,
    value_range: Sequence[float] | None = None,
) -> DataLoader[dict[str, Tensor]]:
    """This process's share of the views of every batch from `start_step` to `stop_step`.

    Args:
        device: where the views will be used; a GPU finishes fast views itself.
        value_range: as of `ViewDataset`.
    """
    specs = view_specs(
        recipe.global_views,
        recipe.local_views,
        recipe.global_size,
        recipe.local_size,
        recipe.global_scale,
        recipe.local_scale,
        recipe.colour,
        recipe.flip,
    )
    on_gpu = device.type == "cuda"
    multicrop: MultiCrop | FastMultiCrop
    if recipe.views == "exact":
        multicrop = MultiCrop(specs)
    else:
        multicrop = FastMultiCrop(specs, hand_over=on_gpu)

    return batches_of_views(
        images,
        multicrop,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        start_step=start_step,
        stop_step=stop_step,
        num_workers=recipe.num_workers,
        value_range=value_range,
    )
