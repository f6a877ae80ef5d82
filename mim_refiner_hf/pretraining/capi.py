"""CAPI (arXiv 2502.08769): predict which prototypes the hidden patches belong to.

    mim-refiner pretrain photos/ --recipe pretrain-capi-l14 --output_dir outputs/capi

A teacher, the moving average of the student, sees the whole image. A clustering layer shares its
patches out among prototypes. The student sees one rectangle of the image, and a predictor, which
reads the student by cross-attention, names the prototypes of a few of the hidden patches. The
clustering layer learns at the same time, with an optimiser of its own. The teacher is what ships.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import rank, world_size
from ..runtime.optimisation import set_learning_rate
from .block_masks import Grid
from .capi_masks import draw_masks, mask_counts
from .capi_start import check_positions, prototypes_of, start_head, with_predictor
from .capi_student import encode_visible, predicted_logits, start_weights
from .clustering_layer import ClusteringLayer
from .objective import Losses, Masks, Objective, micro_batches, rows, trained_groups
from .schedules import WarmupCosine
from .stochastic_depth import kept_count, kept_images

# Shapes below: b images of this process, V views of each, N patches, P of them predicted, D width
# of the encoder, K prototypes.


def capi_groups(parts: Mapping[str, nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """The parameter groups of the student's parts.

    Biases do not decay, norms a tenth; the patch embedding learns at a fifth of the rate, and the
    frequencies of rope not at all. All else decays, tokens too.
    """

    def scale_and_decay(name: str, parameter: nn.Parameter) -> tuple[float, float]:
        scale = 1.0
        if ".patch_embeddings." in name:
            scale = 0.2
        if ".rope." in name:
            scale = 0.0

        if name.endswith(".bias"):
            return scale, 0.0
        return scale, 0.1 * weight_decay if "norm" in name else weight_decay

    return trained_groups(parts, scale_and_decay)


class CapiObjective(Objective):
    """CAPI's student, teacher and clustering layer.

    An encoder to go on from has stored rope; a predictor of another depth than the recipe's is
    replaced by a fresh one.

    Raises:
        ValueError: for an encoder without stored rope, a grid that is too small for the masks, and
            more prototypes than there are patches to share out.
    """

    def build(self, encoder: MimRefinerModel | None) -> None:
        """Two optimisers: of the student, and of the clustering layer."""
        recipe = self.recipe
        config = recipe.encoder_config() if encoder is None else encoder.config
        check_positions(config)
        self.grid: Grid = config.grid
        self.counts = mask_counts(self.grid, recipe.mask_ratio, recipe.predicted_share)
        prototypes = prototypes_of(recipe, math.prod(self.grid))

        if encoder is None:
            encoder = MimRefinerModel(config)
            start_weights(encoder)
        self.encoder = with_predictor(encoder, recipe.predictor_layers)
        self.head = start_head(encoder, prototypes)
        self.clustering = ClusteringLayer(
            config.hidden_size,
            prototypes,
            positionwise=recipe.positionwise,
            target_temperature=recipe.target_temperature,
            temperature=recipe.clustering_temperature,
            iterations=recipe.sinkhorn_iterations,
        )
        self.teacher = self.momentum_copy(self.encoder)
        self.teacher_head = self.momentum_copy(self.head)

        student = capi_groups({"encoder": self.encoder, "head": self.head}, recipe.weight_decay)
        decay = recipe.clustering_weight_decay
        layer = trained_groups({"clustering": self.clustering}, lambda name, weight: (1.0, decay))
        self.optimizers = [
            torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
            for groups in (student, layer)
        ]

    def masks(self, step: int, sample_index: Sequence[int]) -> Masks:
        """ "visible" (b, V) and "predicted" (b, P) positions, and "kept" of stochastic depth."""
        seed = self.recipe.seed
        visible, predicted = draw_masks(
            self.grid, self.counts, seed, step, sample_index, self.recipe.roll
        )
        masks = {"visible": visible, "predicted": predicted}
        if self.recipe.stochastic_depth:
            branches = 2 * (len(self.encoder.layers) + self.recipe.predictor_layers)
            total = len(sample_index) * world_size()
            kept = kept_images(seed, step, total, branches, self.recipe.stochastic_depth)
            masks["kept"] = kept.tensor_split(world_size())[rank()]
        return masks

    def backward(self, pixels: Tensor, masks: Masks, micro_batch_size: int | None) -> Losses:
        """Gradients of the student and of the clustering layer."""
        images = pixels[:, 0]
        features = self.teacher_patches(images, micro_batch_size)
        targets, clustering_loss = self.clustering.assign(
            features, masks["predicted"], backward=True
        )

        total = len(images) * world_size()
        factor = total / kept_count(total, self.recipe.stochastic_depth)
        loss = torch.zeros((), dtype=torch.float64, device=pixels.device)
        for part in micro_batches(len(images), micro_batch_size):
            with self.autocast(images):
                logits = predicted_logits(
                    self.encoder, self.head, images[part], rows(masks, part), factor
                )
            learnt = F.log_softmax(logits / self.recipe.student_temperature, dim=-1)
            errors = -(targets[part] * learnt).sum(dim=-1)  # (images, P)
            own = errors.double().sum() / targets[..., 0].numel()
            own.backward()
            loss += own.detach()
        return {
            "loss": loss.float() + clustering_loss.float(),
            "prediction_loss": loss.float(),
            "clustering_loss": clustering_loss.float(),
            "target_entropy": torch.special.entr(targets).sum(dim=-1).mean().float(),
        }

    @torch.no_grad()
    def teacher_patches(self, images: Tensor, micro_batch_size: int | None) -> Tensor:
        """What the teacher makes of the patches of whole images (b, N, D)."""
        parts = []
        for part in micro_batches(len(images), micro_batch_size):
            with self.autocast(images):
                output, _ = encode_visible(self.teacher, images[part])
            parts.append(output[:, self.teacher.config.num_register_tokens :])
        return torch.cat(parts)

    def set_schedules(self, step: int) -> None:
        """Both rates, and the teacher's momentum."""
        recipe = self.recipe
        cosine = partial(
            WarmupCosine,
            self.steps.total,
            warmup=self.steps.warmup,
            truncate=recipe.truncated_cosine,
        )

        peaks = (recipe.learning_rate, recipe.clustering_learning_rate)
        for optimizer, peak in zip(self.optimizers, peaks, strict=True):
            rate = cosine(base=peak, final=recipe.end_learning_rate)
            set_learning_rate(optimizer, rate(step))

        momentum = cosine(
            base=recipe.momentum_after_warmup,
            start=recipe.momentum_start,
            final=recipe.momentum_end,
        )
        self.momentum = momentum(step)

    def shipped(self) -> MimRefinerModel:
        """The teacher, with the predictor's first block alone, which `global_repr` reads."""
        encoder = copy.deepcopy(self.teacher).requires_grad_(True)
        assert encoder.predictor is not None
        encoder.predictor.blocks = encoder.predictor.blocks[:1]
        encoder.config.predictor_layers = 1
        return encoder

    def shipped_config(self) -> MimRefinerConfig:
        """With one block of the predictor."""
        config = copy.deepcopy(self.teacher.config)
        config.predictor_layers = 1
        return config
