"""CAPI (arXiv 2502.08769): predict which prototypes the hidden patches belong to.

    mim-refiner pretrain photos/ --recipe pretrain-capi-l14 --output_dir outputs/capi

A teacher, the moving average of the student, sees the whole image. A clustering layer shares its
patches out among prototypes. The student sees one rectangle of the image, and a predictor, which
reads the student by cross-attention, names the prototypes of a few of the hidden patches. The
clustering layer learns at the same time, with an optimiser of its own. The teacher is what ships.
"""

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.views import Multicrop, MultiCrop, view_specs
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import rank, world_size
from ..runtime.optimisation import parameter_groups, set_learning_rate, update_average
from ..runtime.wording import setting
from .block_masks import (
    Grid,
    aspect_limits,
    draw_rectangle,
    mask_source,
    predicted_positions,
    rectangle_mask,
)
from .capi_student import PrototypeHead, encode, grid_of, places_of, predict, start_weights
from .clustering_layer import ClusteringLayer
from .objective import Losses, Masks, Objective, micro_batches, rows
from .recipe import PretrainRecipe, Steps
from .schedules import WarmupCosine
from .stochastic_depth import kept_count, kept_images

logger = logging.getLogger(__name__)

# Shapes below: b images of this process, V views of each, N patches, P of them predicted, D width
# of the encoder, K prototypes.

MOST_PROTOTYPES = 16384
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class MaskCounts:
    """How many patches of an image are visible and how many of the masked ones are predicted."""

    visible: int
    masked: int
    predicted: int


def mask_counts(grid: Grid, mask_ratio: float, predicted_share: float) -> MaskCounts:
    """The exact counts of every mask; both shares are rounded down.

    Raises:
        ValueError: for a grid on which nothing is left to see, or to predict, or into which no
            rectangle of this area fits.
    """
    patches = grid[0] * grid[1]
    masked = int(patches * mask_ratio)
    predicted = int(masked * predicted_share)
    if masked == 0 or masked == patches or predicted == 0:
        raise ValueError(
            f"{setting('predicted_share', predicted_share)}: of a grid of {grid[0]} x {grid[1]} "
            f"patches {masked} are masked and {predicted} of them predicted; take larger images, "
            f"smaller patches, or a larger share"
        )
    aspect_limits(grid, patches - masked)
    return MaskCounts(patches - masked, masked, predicted)


def check_prototypes(prototypes: int, batch_size: int, positions: int, positionwise: bool) -> None:
    """Refuse more prototypes than there are patches to share out among them.

    Raises:
        ValueError: naming what the targets would be, and for a batch of one image.
    """
    if batch_size < 2:
        raise ValueError(
            f"{setting('batch_size', batch_size)}: CAPI shares patches out among the images of a "
            "batch; give 2 or more"
        )
    patches = batch_size if positionwise else batch_size * positions
    if prototypes > patches:
        hint = f" or {setting('positionwise')} false," if positionwise else ""
        raise ValueError(
            f"{setting('prototypes', prototypes)}: with "
            f"{setting('batch_size', batch_size)} targets would be noise, an entropy of at least "
            f"{np.log(prototypes / patches):.2f} of {np.log(prototypes):.2f} nats; take "
            f"{patches} or fewer,{hint} or a larger batch"
        )


def capi_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """The student's parameter groups.

    Biases do not decay, norms a tenth; the patch embedding learns at a fifth of the rate, and the
    frequencies of rope not at all. All else decays, tokens too.
    """
    groups = []
    for name, parameter in named:
        scale = 1.0
        if ".patch_embeddings." in name:
            scale = 0.2
        if ".rope." in name:
            scale = 0.0

        decay = weight_decay
        if name.endswith(".bias"):
            decay = 0.0
        elif "norm" in name:
            decay = 0.1 * weight_decay
        groups.append((name, parameter, scale, decay))
    return parameter_groups(groups)


class CapiObjective(Objective):
    """CAPI's student, teacher and clustering layer.

    Args:
        recipe: of the training.
        steps: how many there are.
        encoder: to go on from; None for fresh weights. It has stored rope; a predictor of another
            depth than the recipe's is replaced by a fresh one.

    Raises:
        ValueError: for an encoder without stored rope, a grid that is too small for the masks, and
            more prototypes than there are patches to share out.
    """

    def __init__(
        self, recipe: PretrainRecipe, steps: Steps, encoder: MimRefinerModel | None = None
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.steps = steps
        config = recipe.encoder_config() if encoder is None else encoder.config
        if config.position_encoding != "rope" or config.rope_theta is not None:
            raise ValueError(
                f"position_encoding={config.position_encoding}: CAPI needs rope with frequencies "
                "that are stored (rope_theta=None)"
            )
        self.grid: Grid = config.grid
        self.counts = mask_counts(self.grid, recipe.mask_ratio, recipe.predicted_share)
        prototypes = recipe.prototypes or min(recipe.batch_size, MOST_PROTOTYPES)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            if encoder is None:
                encoder = MimRefinerModel(config)
                start_weights(encoder)
            self.encoder = with_predictor(encoder, recipe.predictor_layers)
            self.head = PrototypeHead(config.hidden_size, prototypes)
            self.clustering = ClusteringLayer(
                config.hidden_size,
                prototypes,
                positionwise=recipe.positionwise,
                target_temperature=recipe.target_temperature,
                temperature=recipe.clustering_temperature,
                iterations=recipe.sinkhorn_iterations,
            )
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.momentum = 1.0
        self._optimizers = self._make_optimizers()

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        """The student's, and the clustering layer's."""
        named = [("encoder", self.encoder), ("head", self.head)]
        student = [
            (f"{place}.{name}", parameter)
            for place, part in named
            for name, parameter in part.named_parameters()
        ]
        layer = [
            (name, parameter, 1.0, self.recipe.clustering_weight_decay)
            for name, parameter in self.clustering.named_parameters()
        ]
        groups = [capi_groups(student, self.recipe.weight_decay), parameter_groups(layer)]
        return [torch.optim.AdamW(each, lr=0.0, betas=_BETAS, eps=1e-8) for each in groups]

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The student's, and the clustering layer's."""
        return self._optimizers

    def crops(self) -> Multicrop:
        """One view, without colour."""
        size = self.recipe.image_size
        scale = (self.recipe.scale, 1.0)
        return MultiCrop(view_specs(1, 0, size, size, scale, scale, False, self.recipe.flip))

    def masks(self, step: int, sample_index: Sequence[int]) -> Masks:
        """ "visible" (b, V) and "predicted" (b, P) positions, and "kept" of stochastic depth."""
        visible = []
        predicted = []
        for index in sample_index:
            source = mask_source(self.recipe.seed, step, index)
            draw = draw_rectangle(self.grid, self.counts.visible, source, self.recipe.roll)
            seen = rectangle_mask(self.grid, self.counts.visible, draw)
            noise = [source.random() for _ in range(self.counts.masked)]
            visible.append(np.flatnonzero(seen))
            predicted.append(predicted_positions(~seen, noise, self.counts.predicted))

        masks = {
            "visible": torch.from_numpy(np.stack(visible)),
            "predicted": torch.from_numpy(np.stack(predicted)),
        }
        if self.recipe.stochastic_depth:
            batch = len(sample_index)
            branches = 2 * (len(self.encoder.layers) + self.recipe.predictor_layers)
            kept = kept_images(
                self.recipe.seed,
                step,
                batch * world_size(),
                branches,
                self.recipe.stochastic_depth,
            )
            masks["kept"] = kept[rank() * batch : (rank() + 1) * batch]
        return masks

    def backward(self, pixels: Tensor, masks: Masks, micro_batch_size: int | None) -> Losses:
        """Gradients of the student and of the clustering layer."""
        images = pixels[:, 0]
        features = self.teacher_patches(images, micro_batch_size)
        targets, clustering_loss = self.clustering.assign(
            features, masks["predicted"], backward=True
        )

        loss = torch.zeros((), dtype=torch.float64, device=pixels.device)
        for part in micro_batches(len(images), micro_batch_size):
            logits = self.logits(images[part], rows(masks, part), len(images))
            learnt = F.log_softmax(logits / self.recipe.student_temperature, dim=-1)
            errors = -(targets[part] * learnt).sum(dim=-1)  # (images, P)
            own = errors.double().sum() / targets[..., 0].numel()
            own.backward()
            loss += own.detach()
        return {
            "loss": loss + clustering_loss,
            "prediction_loss": loss,
            "clustering_loss": clustering_loss,
            "target_entropy": torch.special.entr(targets).sum(dim=-1).mean(),
        }

    @torch.no_grad()
    def teacher_patches(self, images: Tensor, micro_batch_size: int | None) -> Tensor:
        """What the teacher makes of the patches of whole images (b, N, D)."""
        parts = []
        for part in micro_batches(len(images), micro_batch_size):
            with self.autocast(images):
                output, _ = encode(self.teacher, images[part])
            parts.append(output[:, self.teacher.config.num_register_tokens :].float())
        return torch.cat(parts)

    def logits(self, images: Tensor, masks: Masks, batch: int) -> Tensor:
        """The student's logits at the predicted positions (images, P, K).

        Args:
            batch: images of this process.
        """
        of_encoder = of_predictor = None
        factor = 1.0
        if "kept" in masks:
            branches = 2 * len(self.encoder.layers)
            of_encoder = masks["kept"][:, :branches]
            of_predictor = masks["kept"][:, branches:]
            total = batch * world_size()
            factor = total / kept_count(total, self.recipe.stochastic_depth)

        with self.autocast(images):
            output, coordinates = encode(self.encoder, images, masks["visible"], of_encoder, factor)
            places = places_of(grid_of(self.encoder, images), masks["predicted"])
            predictions = predict(self.encoder, output, coordinates, places, of_predictor, factor)
        logits: Tensor = self.head(predictions)
        return logits

    def set_schedules(self, step: int) -> None:
        """Both rates, and the teacher's momentum."""
        recipe = self.recipe
        peaks = (recipe.learning_rate, recipe.clustering_learning_rate)
        for optimizer, peak in zip(self.optimizers, peaks, strict=True):
            rate = self._schedule(base=peak, final=recipe.end_learning_rate)
            set_learning_rate(optimizer, rate(step))
        momentum = self._schedule(
            base=recipe.momentum_after_warmup,
            final=recipe.momentum_end,
            start=recipe.momentum_start,
        )
        self.momentum = momentum(step)

    def _schedule(self, base: float, final: float, start: float = 0.0) -> WarmupCosine:
        return WarmupCosine(
            self.steps.total, base, final, start, self.steps.warmup, self.recipe.truncated_cosine
        )

    def step_optimizers(self, step: int) -> None:
        """The student, then the teacher with the student as it is now, then the clustering."""
        student, clustering = self.optimizers
        student.step()
        update_average(self.teacher, self.encoder, self.momentum)
        update_average(self.teacher_head, self.head, self.momentum)
        clustering.step()

    def shipped(self) -> MimRefinerModel:
        """The teacher, with the predictor's first block alone, which `global_repr` reads."""
        encoder = copy.deepcopy(self.teacher).requires_grad_(True)
        assert encoder.predictor is not None
        encoder.predictor.blocks = encoder.predictor.blocks[:1]
        encoder.config.predictor_layers = 1
        return encoder


def with_predictor(encoder: MimRefinerModel, blocks: int) -> MimRefinerModel:
    """The encoder itself, trainable, with a predictor of so many blocks; a fresh one if need be."""
    if encoder.config.predictor_layers != blocks:
        encoder.config.predictor_layers = blocks
        fresh = MimRefinerModel(encoder.config)
        start_weights(fresh)
        encoder.predictor = fresh.predictor
        logger.info("the predictor of %d blocks starts from fresh weights", blocks)
    return encoder.requires_grad_(True)


__all__ = [
    "MOST_PROTOTYPES",
    "CapiObjective",
    "MaskCounts",
    "capi_groups",
    "check_prototypes",
    "mask_counts",
    "with_predictor",
]
