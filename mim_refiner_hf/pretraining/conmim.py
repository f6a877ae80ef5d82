"""ConMIM (arXiv 2205.09616): tell each masked patch from the other patches of its own image.

    mim-refiner pretrain photos/ --recipe pretrain-conmim-b16 --output_dir outputs/conmim

The student sees a lightly augmented image in which a token stands for the masked patches. A
momentum encoder sees the same crop whole, in harder colours. For every masked patch the student has
to find the momentum encoder's vector of this patch among those of all patches of the image. Both
read their tokens through a projector with batch norm, which runs over all tokens of the batch. The
momentum encoder is what ships.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.paired_views import LightAndHard
from ..data.views import Multicrop
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.arithmetic import full_precision
from ..runtime.distributed import reduced, world_size
from ..runtime.optimisation import parameter_groups, set_learning_rate, update_average
from ..runtime.wording import setting
from .block_masks import (
    Grid,
    block_mask,
    mask_source,
    masked_squares,
    shuffled,
    square_mask,
    squares_of,
)
from .conmim_student import ConmimHead, conmim_start_weights
from .objective import Losses, Masks, Objective, micro_batches
from .recipe import PretrainRecipe, PretrainSteps
from .schedules import WarmupCosine
from .student import replaced_input

# Shapes below: b images of this process, V views of each, N patches, T tokens, D width of the
# encoder, E width of what is contrasted, M masked patches of the batch.

_BETAS = (0.9, 0.98)


def patch_contrast(predicted: Tensor, targets: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """The loss of every masked patch (M,): to be told from all patches of its image.

    Args:
        predicted, targets: unit vectors of student and momentum encoder (b, N, E).
        mask: which patches count (b, N).
    """
    logits = predicted @ targets.transpose(1, 2) / temperature  # (b, N, N)
    own = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return F.cross_entropy(full_precision(logits)[mask], own[mask], reduction="none")


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


def conmim_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups: vectors, biases, CLS and absolute positions do not decay.

    The mask token and tables of relative positions do.
    """
    groups = []
    for name, parameter in named:
        # a batch norm's are stacked, which their number of dimensions does not tell
        is_vector = parameter.ndim <= 1 or ".norm." in name
        exempt = name.endswith((".bias", "cls_token", "position_embeddings"))
        decay = 0.0 if is_vector or exempt else weight_decay
        groups.append((name, parameter, 1.0, decay))
    return parameter_groups(groups)


class ConmimObjective(Objective):
    """ConMIM's student and momentum encoder.

    Args:
        recipe: of the training.
        steps: how many there are.
        encoder: to go on from; None for fresh weights.

    Raises:
        ValueError: for masks that do not fit the grid, and for a batch of one image.
    """

    def __init__(
        self, recipe: PretrainRecipe, steps: PretrainSteps, encoder: MimRefinerModel | None = None
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.steps = steps
        config = recipe.encoder_config() if encoder is None else encoder.config
        self.grid: Grid = config.grid
        check_masks_fit(recipe, config)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            if encoder is None:
                encoder = MimRefinerModel(config)
                conmim_start_weights(encoder)
            self.encoder = encoder.requires_grad_(True)
            self.head = ConmimHead(
                config.hidden_size, recipe.projector_hidden, recipe.projector_size
            )
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.momentum = recipe.momentum_start
        self._seen: list[Tensor] = []

        named = [
            (f"{place}.{name}", parameter)
            for place, part in (("encoder", self.encoder), ("head", self.head))
            for name, parameter in part.named_parameters()
        ]
        groups = conmim_groups(named, recipe.weight_decay)
        self._optimizers = [torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, eps=1e-8)]

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The student's."""
        return list(self._optimizers)

    def crops(self) -> Multicrop:
        """One crop twice: lightly augmented, and in hard colours."""
        return LightAndHard(self.recipe.image_size, (self.recipe.scale, 1.0), self.recipe.flip)

    def masks(self, step: int, sample_index: Sequence[int]) -> Masks:
        """ "mask" (b, N), True where a patch is masked."""
        recipe = self.recipe
        rows = []
        for index in sample_index:
            source = mask_source(recipe.seed, step, index)
            if recipe.mask_kind == "blocks":
                most = int(math.prod(self.grid) * recipe.mask_ratio)
                mask = block_mask(self.grid, most, recipe.smallest_block, source)
            else:
                side = recipe.mask_square // recipe.patch_size
                order = shuffled(math.prod(self.grid) // side**2, source)
                mask = square_mask(self.grid, side, recipe.mask_ratio, order)
            rows.append(mask.reshape(-1))
        return {"mask": torch.from_numpy(np.stack(rows))}

    def backward(self, pixels: Tensor, masks: Masks, micro_batch_size: int | None) -> Losses:
        """Gradients of the student; batch norm sees all tokens of all processes at once."""
        light, hard = pixels[:, 0], pixels[:, 1]
        mask = masks["mask"]
        # running statistics are kept until the step is taken: one that is not finite changes none
        before = [buffer.clone() for buffer in self.buffers()]
        parts = list(micro_batches(len(pixels), micro_batch_size))
        # the mean over all processes' masked patches, whose counts may differ
        counted = reduced(mask.sum(), "sum").clamp(min=1) / world_size()
        prefix = self.encoder.config.num_prefix_tokens

        with torch.no_grad(), self.autocast(pixels):
            tokens = [self.teacher(hard[part]).last_hidden_state for part in parts]
            targets = self.teacher_head(torch.cat(tokens))[:, prefix:]

        def encode(part: slice) -> Tensor:
            with self.autocast(pixels):
                tokens, places = replaced_input(
                    self.encoder, light[part], mask[part], self.head.mask_token
                )
                return self.encoder.norm(self.encoder.encode_tokens(tokens, places))

        def loss_of(tokens: Tensor) -> Tensor:
            with self.autocast(pixels):
                predicted = self.head(tokens)[:, prefix:]
                errors = patch_contrast(predicted, targets, mask, self.recipe.temperature)
            return errors.sum() / counted

        loss = backward_in_parts(encode, parts, loss_of)
        self._seen = [buffer.clone() for buffer in self.buffers()]
        torch._foreach_copy_(list(self.buffers()), before)
        return {"loss": loss}

    def set_schedules(self, step: int) -> None:
        """The rate, and the momentum, which has no warm-up."""
        recipe = self.recipe
        rate = WarmupCosine(
            self.steps.total,
            base=recipe.learning_rate,
            final=recipe.end_learning_rate,
            warmup=self.steps.warmup,
        )
        momentum = WarmupCosine(
            self.steps.total, base=recipe.momentum_start, final=recipe.momentum_end
        )
        set_learning_rate(self._optimizers[0], rate(step))
        self.momentum = momentum(step)

    def step_optimizers(self, step: int) -> None:
        """The student, then the momentum encoder with the student as it is now."""
        super().step_optimizers(step)
        torch._foreach_copy_(list(self.buffers()), self._seen)
        update_average(self.teacher, self.encoder, self.momentum)
        update_average(self.teacher_head, self.head, self.momentum)

    def shipped(self) -> MimRefinerModel:
        """The momentum encoder."""
        return self.teacher


def check_masks_fit(recipe: PretrainRecipe, config: MimRefinerConfig) -> None:
    """Refuse masks that do not fit the grid of the encoder's images, and a batch of one.

    Raises:
        ValueError: naming the setting.
    """
    grid: Grid = config.grid
    if recipe.batch_size < 2:
        raise ValueError(
            f"{setting('batch_size', recipe.batch_size)}: ConMIM's batch norm runs over the images "
            "of a batch; give 2 or more"
        )
    if recipe.mask_kind == "blocks":
        # a block is smaller than the grid on both sides
        most = min(int(math.prod(grid) * recipe.mask_ratio), (grid[0] - 1) * (grid[1] - 1))
        if recipe.smallest_block > most:
            raise ValueError(
                f"{setting('smallest_block', recipe.smallest_block)}: at most {most} of the "
                f"{grid[0]} x {grid[1]} patches of an image are masked; take smaller blocks, "
                f"larger images, or a larger {setting('mask_ratio')}"
            )
        return
    if recipe.mask_square % config.patch_size:
        raise ValueError(
            f"{setting('mask_square', recipe.mask_square)}: must be a multiple of "
            f"{setting('patch_size', config.patch_size)}"
        )
    try:
        squares = squares_of(grid, recipe.mask_square // config.patch_size)
    except ValueError as error:
        raise ValueError(f"{setting('mask_square', recipe.mask_square)}: {error}") from error
    try:
        masked_squares(squares, recipe.mask_ratio)
    except ValueError as error:
        raise ValueError(f"{setting('mask_ratio', recipe.mask_ratio)}: {error}") from error


__all__ = [
    "ConmimObjective",
    "backward_in_parts",
    "check_masks_fit",
    "conmim_groups",
    "patch_contrast",
]
