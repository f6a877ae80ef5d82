"""What a step of a pre-training takes, by trying it on a few images: seconds, and bytes.

    trial = try_step(trainer)
    trial.seconds * trainer.recipe.batch_size / world_size()        # of a step
    trial.held + trial.graph * images_at_a_time                     # bytes at its peak

Nothing is updated, and nothing random is drawn that a step would draw: the run is the same bits.
Under several processes all of them try, together.
"""

import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.batches import batches_of_views
from ..data.views import normalise
from ..runtime.distributed import world_size
from ..runtime.sharding import local
from .loop import Pretrainer
from .objective import rows

# images of a trial: few of a network that is large for what computes it
_IMAGES = 16
_IMAGES_OF_A_LARGE_ONE = 2
_LARGE_ON_THE_CPU = 20e6
# weights, gradients and AdamW's moments are fp32
_FP32 = 4


class Trial(NamedTuple):
    """What a step takes.

    Attributes:
        images: it was tried on, per process.
        seconds: of one image of a process, loading included where no other process loads.
        held: bytes of a process from one step to the next: weights, momentum copies, gradients and
            the optimisers' moments.
        graph: bytes that the backward pass of one image needs, at most.
    """

    images: int
    seconds: float
    held: int
    graph: float


class GraphBytes:
    """Counts the bytes of what autograd keeps, of one graph after the other.

    Args:
        known: tensors that are there anyway.

    Attributes:
        largest: of any graph so far.
    """

    def __init__(self, known: Mapping[str, Tensor]) -> None:
        self.known = {local(tensor).untyped_storage().data_ptr() for tensor in known.values()}
        self.kept: dict[int, int] = {}
        self.is_used = False
        self.largest = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd keeps."""
        if self.is_used:
            # a new graph: the one before has been gone through
            self.kept.clear()
            self.is_used = False
        storage = local(tensor).untyped_storage()
        if storage.data_ptr() not in self.known:
            self.kept[storage.data_ptr()] = storage.nbytes()
        self.largest = max(self.largest, sum(self.kept.values()))
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        """Take one back."""
        self.is_used = True
        return tensor


def held_bytes(objective: nn.Module) -> int:
    """Bytes of this process's weights, and of gradients and moments of those that are trained."""
    weights = sum(local(tensor).numel() for tensor in objective.state_dict().values())
    parameters = [part for part in objective.parameters() if part.requires_grad]
    trained = sum(local(part).numel() for part in parameters)
    return _FP32 * (weights + 3 * trained)


def try_step(trainer: Pretrainer) -> Trial:
    """Forward and backward on a few of the images, twice; the second is measured."""
    objective = trainer.objective
    on_cpu = trainer.accelerator.device.type == "cpu"
    trained = sum(part.numel() for part in objective.parameters() if part.requires_grad)
    count = _IMAGES_OF_A_LARGE_ONE if on_cpu and trained > _LARGE_ON_THE_CPU else _IMAGES
    count = min(count, trainer.recipe.batch_size // world_size())

    batches = batches_of_views(
        trainer.images,
        objective.crops(),
        batch_size=count * world_size(),
        seed=trainer.recipe.seed,
        stop_step=2,
        num_workers=0,
        value_range=trainer.value_range,
    )
    loader = iter(batches)
    # the first one opens files
    next(loader)
    began = time.perf_counter()
    batch = next(loader)
    loading = time.perf_counter() - began

    device = trainer.accelerator.device
    views = batch["global_views"].to(device)
    pixels = normalise(views, trainer.processor.image_mean, trainer.processor.image_std)
    masks = rows(objective.masks(0, batch["index"].tolist()), slice(0, count))
    masks = {name: tensor.to(device) for name, tensor in masks.items()}

    counter = GraphBytes(objective.state_dict())
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, counter.unpack):
        objective.backward(pixels, masks, None)
    began = time.perf_counter()
    losses = objective.backward(pixels, masks, None)
    # waits for a GPU
    losses["loss"].item()
    seconds = time.perf_counter() - began
    objective.zero_grad()

    if not trainer.options.num_workers:
        seconds += loading
    return Trial(count, seconds / count, held_bytes(objective), counter.largest / count)
