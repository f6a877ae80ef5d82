"""ConMIM (arXiv 2205.09616): tell each masked patch from the other patches of its own image.

    mim-refiner pretrain photos/ --recipe pretrain-conmim-b16 --output_dir outputs/conmim

The student sees a lightly augmented image in which a token stands for the masked patches. A
momentum encoder sees the same crop whole, in harder colours. For every masked patch the student has
to find the momentum encoder's vector of this patch among those of all patches of the image. Both
read their tokens through a projector with batch norm, which runs over all tokens of the batch. The
momentum encoder is what ships.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.paired_views import LightAndHard
from ..data.views import Multicrop
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.arithmetic import full_precision
from ..runtime.distributed import reduced, world_size
from ..runtime.optimisation import set_learning_rate
from .conmim_masks import check_masks_fit, image_mask
from .conmim_student import ConmimHead, conmim_start_weights
from .objective import (
    Losses,
    Masks,
    Objective,
    backward_in_parts,
    micro_batches,
    trained_groups,
)
from .schedules import WarmupCosine
from .student import replaced_input

# Shapes below: b images of this process, V views of each, N patches, T tokens, D width of the
# encoder, E width of what is contrasted, M masked patches of the batch.


def patch_contrast(predicted: Tensor, targets: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """The loss of every masked patch (M,): to be told from all patches of its image.

    Args:
        predicted, targets: unit vectors of student and momentum encoder (b, N, E).
        mask: which patches count (b, N).
    """
    logits = predicted @ targets.transpose(1, 2) / temperature  # (b, N, N)
    own = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return F.cross_entropy(full_precision(logits)[mask], own[mask], reduction="none")


def conmim_groups(parts: Mapping[str, nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: vectors, biases, CLS and absolute positions do not decay.

    The mask token and tables of relative positions do.
    """

    def scale_and_decay(name: str, parameter: nn.Parameter) -> tuple[float, float]:
        # a batch norm's are stacked, which their number of dimensions does not tell
        is_vector = parameter.ndim <= 1 or ".norm." in name
        exempt = name.endswith((".bias", "cls_token", "position_embeddings"))
        return 1.0, 0.0 if is_vector or exempt else weight_decay

    return trained_groups(parts, scale_and_decay)


class ConmimObjective(Objective):
    """ConMIM's student and momentum encoder.

    Raises:
        ValueError: for masks that do not fit the grid, and for a batch of one image.
    """

    def build(self, encoder: MimRefinerModel | None) -> None:
        """One optimiser for the student and its head."""
        recipe = self.recipe
        config = recipe.encoder_config() if encoder is None else encoder.config
        check_masks_fit(recipe, config)
        if encoder is None:
            encoder = MimRefinerModel(config)
            conmim_start_weights(encoder)
        self.encoder = encoder.requires_grad_(True)
        self.head = ConmimHead(config.hidden_size, recipe.projector_hidden, recipe.projector_size)
        self.teacher = self.momentum_copy(self.encoder)
        self.teacher_head = self.momentum_copy(self.head)
        self._seen: list[Tensor] = []

        student = {"encoder": self.encoder, "head": self.head}
        groups = conmim_groups(student, recipe.weight_decay)
        self.optimizers = [torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-8)]

    def crops(self) -> Multicrop:
        """One crop twice: lightly augmented, and in hard colours."""
        return LightAndHard(self.recipe.image_size, (self.recipe.scale, 1.0), self.recipe.flip)

    def masks(self, step: int, sample_index: Sequence[int]) -> Masks:
        """ "mask" (b, N), True where a patch is masked."""
        masks = [image_mask(self.recipe, self.encoder.config.grid, step, i) for i in sample_index]
        return {"mask": torch.from_numpy(np.stack(masks)).flatten(1)}

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
        set_learning_rate(self.optimizers[0], rate(step))
        self.momentum = momentum(step)

    def step_optimizers(self) -> None:
        """Weights as ever, and now the running statistics too."""
        super().step_optimizers()
        torch._foreach_copy_(list(self.buffers()), self._seen)

    def shipped(self) -> MimRefinerModel:
        """The momentum encoder."""
        return self.teacher
