"""CAPI (arXiv 2502.08769): predict which prototypes the hidden patches belong to.

    mim-refiner pretrain photos/ --recipe pretrain-capi-l14 --output_dir outputs/capi

A teacher, the moving average of the student, sees the whole image. A clustering layer shares its
patches out among prototypes. The student sees one rectangle of the image, and a predictor, which
reads the student by cross-attention, names the prototypes of a few of the hidden patches. The
clustering layer learns at the same time, with an optimiser of its own. The teacher is what ships.

It is longer than other methods by two optimisers, and by what can be wrong with an encoder, or with
a number of prototypes, to go on from.
"""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.views import Multicrop
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import rank, world_size
from ..runtime.optimisation import parameter_groups, set_learning_rate, update_average
from ..runtime.wording import setting
from .block_masks import Grid
from .capi_masks import draw_masks, mask_counts
from .capi_start import head_beside
from .capi_student import PrototypeHead, encode_visible, predicted_logits, start_weights
from .clustering_layer import ClusteringLayer
from .objective import Losses, Masks, Objective, micro_batches, plain_crop, rows
from .recipe import PretrainRecipe, PretrainSteps
from .schedules import WarmupCosine
from .stochastic_depth import kept_count, kept_images

logger = logging.getLogger(__name__)

# Shapes below: b images of this process, V views of each, N patches, P of them predicted, D width
# of the encoder, K prototypes.

MOST_PROTOTYPES = 16384
_BETAS = (0.9, 0.95)


def prototypes_of(recipe: PretrainRecipe, positions: int) -> int:
    """How many prototypes there are: the recipe's, or as many as the batch can be shared among.

    Args:
        positions: patches of an image.

    Raises:
        ValueError: for more than there are patches to share out, and for a batch of one image.
    """
    batch = recipe.batch_size
    if batch < 2:
        raise ValueError(
            f"{setting('batch_size', batch)}: CAPI shares patches out among the images of a batch; "
            "give 2 or more"
        )
    patches = batch if recipe.positionwise else batch * positions
    asked = recipe.prototypes or MOST_PROTOTYPES
    if asked <= patches:
        return asked

    noise = (
        f"of {asked} the targets would be noise with {setting('batch_size', batch)}, an entropy of "
        f"at least {math.log(asked / patches):.2f} of {math.log(asked):.2f} nats"
    )
    if recipe.prototypes is None:
        logger.warning("CAPI takes %d prototypes: %s", patches, noise)
        return patches
    remedy = "or take a larger batch"
    if recipe.positionwise:
        remedy = f"set {setting('positionwise')} to false, or take a larger batch"
    raise ValueError(f"{setting('prototypes', asked)}: {noise}; give {patches} or fewer, {remedy}")


def capi_groups(parts: Mapping[str, nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """The parameter groups of the student's parts.

    Biases do not decay, norms a tenth; the patch embedding learns at a fifth of the rate, and the
    frequencies of rope not at all. All else decays, tokens too.
    """
    named = [
        (f"{place}.{name}", parameter)
        for place, part in parts.items()
        for name, parameter in part.named_parameters()
    ]
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


def check_positions(config: MimRefinerConfig) -> None:
    """Refuse an encoder that cannot be asked for a place in the image.

    Raises:
        ValueError: for positions other than rope with stored frequencies.
    """
    if config.position_encoding != "rope" or config.rope_theta is not None:
        raise ValueError(
            f"position_encoding={config.position_encoding}: CAPI needs rope with frequencies that "
            "are stored (rope_theta=None), as its own encoders have them"
        )


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
        self, recipe: PretrainRecipe, steps: PretrainSteps, encoder: MimRefinerModel | None = None
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.steps = steps
        config = recipe.encoder_config() if encoder is None else encoder.config
        check_positions(config)
        self.grid: Grid = config.grid
        self.counts = mask_counts(self.grid, recipe.mask_ratio, recipe.predicted_share)
        prototypes = prototypes_of(recipe, math.prod(self.grid))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
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
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.momentum = 1.0
        student = capi_groups({"encoder": self.encoder, "head": self.head}, recipe.weight_decay)
        layer = [
            (name, parameter, 1.0, recipe.clustering_weight_decay)
            for name, parameter in self.clustering.named_parameters()
        ]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, eps=1e-8)
            for groups in (student, parameter_groups(layer))
        ]

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Of the student, and of the clustering layer."""
        return self._optimizers

    def crops(self) -> Multicrop:
        """One view, without colour."""
        return plain_crop(self.recipe)

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

    def shipped_config(self) -> MimRefinerConfig:
        """With one block of the predictor."""
        config = copy.deepcopy(self.teacher.config)
        config.predictor_layers = 1
        return config


def start_head(encoder: MimRefinerModel, prototypes: int) -> PrototypeHead:
    """The head that came with the encoder, if it names as many prototypes, else a fresh one."""
    head = PrototypeHead(encoder.config.hidden_size, prototypes)
    weights = head_beside(encoder)
    if weights and weights["weight_v"].shape == head.weight_v.shape:
        head.load_state_dict(weights)
    elif weights:
        logger.warning(
            "the head that came with the encoder names %d prototypes, not %d: it starts anew",
            len(weights["weight_v"]),
            prototypes,
        )
    return head


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
    "capi_groups",
    "check_positions",
    "prototypes_of",
    "start_head",
    "with_predictor",
]
