"""data2vec 2.0 for images (arXiv 2212.07525): features of the whole image, from its visible parts.

    objective = Data2vec2Objective(recipe, recipe.steps(len(images)))

A momentum copy of the student, the teacher, sees the whole image once. The student sees a fifth of
its patches, in 16 different choices, and a decoder of convolutions predicts the teacher's features
at the others. Those are outputs of the MLPs of the last blocks, each normalised over the patches of
the image, then averaged. The CLS token predicts their mean over the patches.

The student ships, the teacher is saved beside it. The order of a step is fairseq's: its update of
the teacher, at the start of the next step, is here at the end of this one.

Decoder and targets, which nothing else uses, stand here too: so it is longer than the others.
"""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.views import MultiCrop
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.optimisation import freeze, set_learning_rate, update_average
from ..runtime.seeding import random_generator
from ..runtime.wording import setting
from .masks import inverse_blocks
from .objective import Losses, Masks, Objective, micro_batches, plain_crop, rows
from .recipe import PretrainRecipe, PretrainSteps
from .student import embedded_patches, visible_input

logger = logging.getLogger(__name__)

_BETAS = (0.9, 0.95)
_EPSILON = 1e-8

# Shapes below: B images, M masks of each, N patches, V visible and H hidden ones, D width.


class ConvDecoder(nn.Module):
    """Grouped convolutions on the grid of the patches, and a linear layer back to the width.

    Every convolution is followed by a LayerNorm over channels without weights and a GELU, and its
    input is added where it is as wide.
    """

    def __init__(self, recipe: PretrainRecipe, dim: int) -> None:
        super().__init__()
        width = recipe.decoder_size
        kernel = recipe.decoder_kernel
        convolutions = []
        for channels in [dim, *[width] * (recipe.decoder_layers - 1)]:
            convolutions.append(
                nn.Conv2d(
                    channels, width, kernel, padding=kernel // 2, groups=recipe.decoder_groups
                )
            )
        self.layers = nn.ModuleList(convolutions)
        self.project = nn.Linear(width, dim)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches (R, N, D), row by row, to predictions (R, N, D)."""
        image = tokens.transpose(1, 2).unflatten(2, grid)  # (R, D, rows, columns)
        for convolution in self.layers:
            # an even kernel makes one row and one column too many
            output = convolution(image)[:, :, : grid[0], : grid[1]]
            output = output.permute(0, 2, 3, 1)
            output = F.gelu(F.layer_norm(output, output.shape[-1:])).permute(0, 3, 1, 2)
            image = output + image if output.shape == image.shape else output
        return self.project(image.flatten(2).transpose(1, 2))


@contextmanager
def recorded_outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that is filled with the outputs of modules as they run within the block."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Tensor) -> None:
        outputs.append(output)

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def averaged_targets(layers: Sequence[Tensor]) -> Tensor:
    """The targets (B, N, D) in fp32 that are made of several blocks' features (B, N, D).

    Each is normalised over the patches of an image, per channel; their mean over channels.
    """
    normalised = []
    for features in layers:
        by_channel = features.float().transpose(1, 2)  # (B, D, N)
        normalised.append(F.instance_norm(by_channel).transpose(1, 2))
    mean = torch.stack(normalised).mean(dim=0)
    return F.layer_norm(mean, mean.shape[-1:])


def fresh_weights(encoder: MimRefinerModel) -> None:
    """Give an encoder data2vec 2.0's initial weights."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    patch = encoder.embeddings.patch_embeddings
    nn.init.xavier_uniform_(patch.weight.view(len(patch.weight), -1))
    assert patch.bias is not None and encoder.embeddings.cls_token is not None
    bound = 1 / math.sqrt(patch.weight[0].numel())
    nn.init.uniform_(patch.bias, -bound, bound)
    nn.init.normal_(encoder.embeddings.cls_token)


def warn_of_no_blocks(recipe: PretrainRecipe) -> None:
    """Say that the grid is too small for the blocks that are to stay visible."""
    side = recipe.mask_length
    grid = recipe.image_size // recipe.patch_size
    logger.warning(
        "%s: too few of %d x %d patches stay visible for a block of %d x %d, so that single ones "
        "do; take a smaller block, a lower %s, or a smaller %s",
        setting("mask_length", side),
        grid,
        grid,
        side,
        side,
        setting("mask_ratio"),
        setting("patch_size"),
    )


class Data2vec2Objective(Objective):
    """Student, decoder and teacher of data2vec 2.0.

    Args:
        steps: of the training.
        encoder: trained on from its weights, the teacher as its copy; None for fresh ones.
    """

    def __init__(
        self,
        recipe: PretrainRecipe,
        steps: PretrainSteps,
        encoder: MimRefinerModel | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.steps = steps
        self._counts = (recipe.num_visible, recipe.num_centres)
        if not recipe.num_centres:
            warn_of_no_blocks(recipe)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.encoder = encoder or MimRefinerModel(recipe.encoder_config())
            if encoder is None:
                fresh_weights(self.encoder)
            self.decoder = ConvDecoder(recipe, self.encoder.config.hidden_size)

        freeze(self.encoder, blocks=0)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False).eval()
        self._optimizer = torch.optim.AdamW(
            self._groups(), lr=0.0, betas=_BETAS, eps=_EPSILON, fused=True
        )

    def _groups(self) -> list[dict[str, Any]]:
        """Parameter groups: all that is trained in one, or vectors apart, without weight decay."""
        decay = self.recipe.weight_decay
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.recipe.decay_all:
            return [{"params": trained, "lr_scale": 1.0, "weight_decay": decay}]
        matrices = [parameter for parameter in trained if parameter.ndim > 1]
        vectors = [parameter for parameter in trained if parameter.ndim <= 1]
        return [
            {"params": matrices, "lr_scale": 1.0, "weight_decay": decay},
            {"params": vectors, "lr_scale": 1.0, "weight_decay": 0.0},
        ]

    def train(self, mode: bool = True) -> "Data2vec2Objective":
        """As ever; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def crops(self) -> MultiCrop:
        """One random crop, flipped or not, for both networks."""
        return plain_crop(self.recipe)

    # ---- masks

    def masks(self, step: int, sample_index: Sequence[int]) -> Masks:
        """Visible patches (b, M, V), ascending, and the seed of each image's noise (b,)."""
        recipe = self.recipe
        grid = self.encoder.config.grid
        visible = []
        seeds = []
        for sample in sample_index:
            rng = random_generator(recipe.seed, "data2vec2", step, sample)
            chosen = inverse_blocks(
                grid,
                rng,
                rows=recipe.num_masks,
                visible=self._counts[0],
                centres=self._counts[1],
                length=recipe.mask_length,
            )
            visible.append(chosen)
            seeds.append(int(rng.integers(2**63)))
        return {"visible": torch.from_numpy(np.stack(visible)), "noise_seed": torch.tensor(seeds)}

    def noise(self, masks: Masks, patches: int) -> Tensor:
        """What the decoder reads at the hidden patches of each image (b, M, H, D)."""
        device = self.encoder.device
        count = self.recipe.num_masks
        shape = (count, patches - masks["visible"].shape[2], self.encoder.config.hidden_size)

        drawn = []
        for seed in masks["noise_seed"].tolist():
            generator = torch.Generator(device).manual_seed(seed)
            drawn.append(torch.randn(shape, generator=generator, device=device))
        return self.recipe.mask_noise * torch.stack(drawn)

    # ---- a step

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """The teacher's features of whole images (B, N, D), fp32."""
        layers = self.teacher.layers[-self.recipe.target_layers :]
        with self.autocast(images), recorded_outputs([layer.mlp for layer in layers]) as outputs:
            self.teacher(images)
        prefix = self.teacher.config.num_prefix_tokens
        return averaged_targets([output[:, prefix:] for output in outputs])

    def predictions(self, images: Tensor, masks: Masks) -> tuple[Tensor, Tensor, Tensor]:
        """What student and decoder make of images (B, C, S, S).

        Returns:
            the student's CLS tokens (B, M, D), its predictions at hidden patches (B, M, H, D), and
            which patches those are (B, M, H).
        """
        encoder = self.encoder
        prefix = encoder.config.num_prefix_tokens
        visible = masks["visible"].flatten(0, 1)  # (B * M, V), the masks of an image in a row
        patches = embedded_patches(encoder, images).repeat_interleave(self.recipe.num_masks, dim=0)
        tokens, places = visible_input(encoder, patches, visible)
        output = encoder.norm(encoder.encode_tokens(tokens, places))

        # the student's output at its places, noise at the others
        count, width = patches.shape[1:]
        hidden = patches.new_ones(len(visible), count, dtype=torch.bool).scatter(1, visible, False)
        hidden = hidden.nonzero()[:, 1].view(len(visible), -1)  # (B * M, H)
        noise = self.noise(masks, count).flatten(0, 1).to(output.dtype)
        order = torch.cat([visible, hidden], dim=1).unsqueeze(-1).expand(-1, -1, width)
        grid = torch.cat([output[:, prefix:], noise], dim=1)
        grid = torch.zeros_like(grid).scatter(1, order, grid)

        predicted = self.decoder(grid, encoder.config.grid)
        predicted = predicted.gather(1, hidden.unsqueeze(-1).expand(-1, -1, width))
        shape = masks["visible"].shape[:2]
        return (
            output[:, 0].unflatten(0, shape),
            predicted.unflatten(0, shape),
            hidden.unflatten(0, shape),
        )

    def backward(self, pixels: Tensor, masks: Masks, micro_batch_size: int | None) -> Losses:
        """The gradient of the mean errors; every mask hides as many patches as any other."""
        images = pixels[:, 0]
        sums = torch.zeros(2, device=pixels.device)
        for part in micro_batches(len(images), micro_batch_size):
            targets = self.targets(images[part])
            with self.autocast(pixels):
                cls, predicted, hidden = self.predictions(images[part], rows(masks, part))

            index = hidden.flatten(1).unsqueeze(-1).expand(-1, -1, targets.shape[2])
            expected = targets.gather(1, index).view_as(predicted)
            mean = targets.mean(dim=1).unsqueeze(1)
            share = len(targets) / len(images)
            regression = share * _error(predicted, expected)
            of_cls = share * self.recipe.cls_weight * _error(cls, mean.expand_as(cls))
            (regression + of_cls).backward()
            sums += torch.stack([regression, of_cls]).detach()
        regression, of_cls = sums
        return {"loss": regression + of_cls, "regression": regression, "cls": of_cls}

    # ---- the update

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for student and decoder."""
        return [self._optimizer]

    def set_schedules(self, step: int) -> None:
        """A linear warm-up from 0 and a cosine to 0, and fairseq's epsilon.

        Fairseq adds it before the bias correction of the second moment, torch after it.
        """
        set_learning_rate(self._optimizer, self.learning_rate(step))
        corrected = _EPSILON / math.sqrt(1 - _BETAS[1] ** (step + 1))
        for group in self._optimizer.param_groups:
            group["eps"] = corrected

    def learning_rate(self, step: int) -> float:
        """The rate of an update, from 0 on; the first one is 0 where there is a warm-up."""
        peak = self.recipe.learning_rate
        warmup = self.steps.warmup
        if step < warmup:
            return peak * step / warmup
        progress = (step - warmup) / (self.steps.total - warmup)
        return peak / 2 * (1 + math.cos(math.pi * progress))

    def momentum(self, updates: int) -> float:
        """The teacher's momentum after so many updates: linear, then constant."""
        recipe = self.recipe
        last = round(recipe.momentum_epochs * self.steps.per_epoch)
        if updates >= last:
            return recipe.momentum_end
        return recipe.momentum_start + (recipe.momentum_end - recipe.momentum_start) * (
            updates / last
        )

    def step_optimizers(self, step: int) -> None:
        """Update student and decoder, then the teacher's average of the student."""
        super().step_optimizers(step)
        update_average(self.teacher, self.encoder, self.momentum(step + 1))

    def others(self) -> dict[str, MimRefinerModel]:
        """The teacher."""
        return {"momentum_encoder": self.teacher}


def _error(predicted: Tensor, expected: Tensor) -> Tensor:
    """The squared error of vectors (..., D): their sum over channels / sqrt(D), the mean of all."""
    squares = (predicted.float() - expected).square().sum(dim=-1)
    return squares.mean() / math.sqrt(predicted.shape[-1])


__all__ = [
    "ConvDecoder",
    "Data2vec2Objective",
    "averaged_targets",
    "fresh_weights",
    "recorded_outputs",
]
