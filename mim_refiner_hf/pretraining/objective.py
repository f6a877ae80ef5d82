"""What a method of pre-training is: its networks, masks, loss and update, behind one face.

    objective = make_objective(recipe)                         # objectives.py
    objective.set_schedules(step)
    losses = objective.backward(pixels, objective.masks(step, index), micro_batch_size=None)
    average_gradients(objective.parameters())
    objective.step_optimizers(step)

`loop.py` runs the steps of any of them. All state of a method (networks, momentum copies) are
parameters and buffers of the module, so that a checkpoint is its `state_dict()` and the tensors of
its optimisers. What is random in a step is a pure function of seed, step and sample.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..data.views import MultiCrop, Multicrop, view_specs
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from .recipe import PretrainRecipe

Masks = Mapping[str, Tensor]
"""Named tensors that say what is hidden; row i of each belongs to image i of this process."""

Losses = dict[str, Tensor]
"""Named losses for the log, without graph; the mean over the processes is the whole batch's.

"loss" is the one that is minimised, or the sum of several.
"""

# Shapes below: b images of this process, V views of each, C channels, S side of a view.


class Objective(nn.Module, ABC):
    """Networks, masks, loss and update of one method of pre-training.

    Attributes:
        encoder: the student.
        bf16: whether the networks compute in bfloat16; weights and losses stay fp32.
    """

    encoder: MimRefinerModel
    bf16: bool = False

    @abstractmethod
    def crops(self) -> Multicrop:
        """What makes the views of an image: all V of them as "global_views" (V, C, S, S)."""

    @abstractmethod
    def masks(self, step: int, sample_index: Sequence[int]) -> Masks:
        """What is hidden of these images of this process; a pure function, on the CPU.

        Args:
            step: number of the step, from 0.
            sample_index: places of the images in the data set.
        """

    @abstractmethod
    def backward(self, pixels: Tensor, masks: Masks, micro_batch_size: int | None) -> Losses:
        """Add the gradients of a step to the parameters.

        Their mean over the processes is the gradient of the whole batch, however many images go
        through the networks at a time.

        Args:
            pixels: normalised views of all images of this process (b, V, C, S, S).
            masks: of `masks`, on the device.
            micro_batch_size: images at a time; None for all at once.
        """

    @property
    @abstractmethod
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The same objects at every call, made with the objective; each is clipped by itself."""

    @abstractmethod
    def set_schedules(self, step: int) -> None:
        """Set what changes with the step: rates, weight decay, momentum."""

    def step_optimizers(self, step: int) -> None:
        """Update the weights, and after them what follows them, in the method's order."""
        for optimizer in self.optimizers:
            optimizer.step()

    def shipped(self) -> MimRefinerModel:
        """The encoder that the training is for."""
        return self.encoder

    def shipped_config(self) -> MimRefinerConfig:
        """The configuration of what ships, without making it."""
        return self.encoder.config

    def others(self) -> dict[str, MimRefinerModel]:
        """Further encoders to save beside it, by the name of their folder."""
        return {}

    def autocast(self, pixels: Tensor) -> torch.autocast:
        """The context in which the networks compute, on the device of `pixels`."""
        return torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16)


def plain_crop(recipe: PretrainRecipe, count: int = 1) -> MultiCrop:
    """Random crops of every image, flipped or not, their colours as they are."""
    specs = view_specs(
        global_views=count,
        local_views=0,
        global_size=recipe.image_size,
        local_size=recipe.image_size,
        global_scale=(recipe.scale, 1.0),
        local_scale=(1.0, 1.0),
        colour=False,
        flip=recipe.flip,
    )
    return MultiCrop(specs)


def micro_batches(count: int, size: int | None) -> Iterator[slice]:
    """The images 0 to `count`, at most `size` at a time; all at once for None."""
    size = size or count
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def rows(masks: Masks, part: slice) -> Masks:
    """The masks of some of the images."""
    return {name: tensor[part] for name, tensor in masks.items()}


__all__ = ["Losses", "Masks", "Objective", "micro_batches", "plain_crop", "rows"]
