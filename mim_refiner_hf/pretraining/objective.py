"""What a method of pre-training is: its networks, masks, loss and update, behind one face.

    objective = make_objective(recipe)                         # objectives.py
    objective.set_schedules(step)
    losses = objective.backward(pixels, objective.masks(step, index), micro_batch_size=None)
    average_gradients(objective.parameters())
    objective.step_optimizers()

`loop.py` runs the steps of any of them. All state of a method (networks, momentum copies) are
parameters and buffers of the module, so that a checkpoint is its `state_dict()` and the tensors of
its optimisers. What is random in a step is a pure function of seed, step and sample.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..data.views import MultiCrop, Multicrop, view_specs
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.optimisation import parameter_groups, update_average
from .recipe import PretrainRecipe, PretrainSteps

Network = TypeVar("Network", bound=nn.Module)

Masks = Mapping[str, Tensor]
"""Named tensors that say what is hidden; row i of each belongs to image i of this process."""

Losses = dict[str, Tensor]
"""Named losses for the log, without graph; the mean over the processes is the whole batch's.

"loss" is the one that is minimised, or the sum of several.
"""

# Shapes below: b images of this process, V views of each, C channels, S side of a view.


class Objective(nn.Module, ABC):
    """Networks, masks, loss and update of one method of pre-training.

    Args:
        recipe: of the training.
        steps: how many there are.
        encoder: to go on from, its weights are the ones that change; None for fresh ones.

    Attributes:
        encoder: the student.
        optimizers: each is clipped by itself; `set_schedules` gives them their rates.
        momentum: of all momentum copies, after the update of the current step.
        bf16: whether the networks compute in bfloat16; weights and losses stay fp32.
    """

    encoder: MimRefinerModel
    optimizers: list[torch.optim.Optimizer]
    momentum: float = 1.0
    bf16: bool = False

    def __init__(
        self, recipe: PretrainRecipe, steps: PretrainSteps, encoder: MimRefinerModel | None = None
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.steps = steps
        self._copies: list[tuple[nn.Module, nn.Module]] = []
        # fresh weights are a pure function of the seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.build(encoder)

    @abstractmethod
    def build(self, encoder: MimRefinerModel | None) -> None:
        """Make networks and optimisers, once; a ValueError for what the method cannot do.

        Args:
            encoder: to go on from; None for a fresh one.
        """

    def momentum_copy(self, network: Network) -> Network:
        """A copy that is not trained: every update moves it towards the network by `momentum`."""
        average = copy.deepcopy(network).requires_grad_(False)
        self._copies.append((average, network))
        return average

    def crops(self) -> Multicrop:
        """What makes the views of an image: all V of them as "global_views" (V, C, S, S)."""
        return plain_crop(self.recipe)

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

    @abstractmethod
    def set_schedules(self, step: int) -> None:
        """Set what changes with the step: rates, weight decay, momentum."""

    def step_optimizers(self) -> None:
        """Update the weights, then the momentum copies with the weights as they are now."""
        for optimizer in self.optimizers:
            optimizer.step()
        for average, network in self._copies:
            update_average(average, network, self.momentum)

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


def plain_crop(recipe: PretrainRecipe) -> MultiCrop:
    """Random crops of every image, flipped or not, their colours as they are."""
    specs = view_specs(
        global_views=recipe.crops_per_image,
        local_views=0,
        global_size=recipe.image_size,
        local_size=recipe.image_size,
        global_scale=(recipe.scale, 1.0),
        local_scale=(1.0, 1.0),
        colour=False,
        flip=recipe.flip,
    )
    return MultiCrop(specs)


def trained_groups(
    parts: Mapping[str, nn.Module],
    scale_and_decay: Callable[[str, nn.Parameter], tuple[float, float]],
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, of what is trained in the parts of a student.

    Args:
        parts: by name, which is put before the names of the parameters.
        scale_and_decay: of a parameter: the factor of its rate, and its weight decay.
    """
    rows = []
    for place, part in parts.items():
        for name, parameter in part.named_parameters(prefix=place):
            if parameter.requires_grad:
                rows.append((name, parameter, *scale_and_decay(name, parameter)))
    return parameter_groups(rows)


def micro_batches(count: int, size: int | None) -> Iterator[slice]:
    """The images 0 to `count`, at most `size` at a time; all at once for None."""
    size = size or count
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def backward_in_parts(
    encode: Callable[[slice], Tensor],
    parts: Sequence[slice],
    loss_of: Callable[[Tensor], Tensor],
) -> Tensor:
    """The loss of the whole batch, whose gradients are left in the parameters; detached.

    In several parts each is encoded twice: without a graph for the loss, which sees all of them,
    and again for its gradient. The result is that of all at once.

    Args:
        encode: features of some of the images (images, ...).
        loss_of: the loss of the features of all of them.
    """
    if len(parts) == 1:
        loss = loss_of(encode(parts[0]))
        loss.backward()
        return loss.detach()

    with torch.no_grad():
        features = torch.cat([encode(part) for part in parts])
    features.requires_grad_()
    loss = loss_of(features)
    loss.backward()
    assert features.grad is not None
    for part in parts:
        encode(part).backward(features.grad[part])
    return loss.detach()


def rows(masks: Masks, part: slice) -> Masks:
    """The masks of some of the images."""
    return {name: tensor[part] for name, tensor in masks.items()}
