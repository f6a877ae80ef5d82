"""data2vec 2.0 for images (arXiv 2212.07525): features of the whole image, from its visible parts.

    objective = Data2vec2Objective(recipe, recipe.steps(len(images)))

A momentum copy of the student, the teacher, sees the whole image once. The student sees a fifth of
its patches, in 16 different choices, and a decoder of convolutions predicts the teacher's features
at the others. Those are outputs of the MLPs of the last blocks, each normalised over the patches of
the image, then averaged. The CLS token predicts their mean over the patches.

The student ships, the teacher is saved beside it. The order of a step is fairseq's: its update of
the teacher, at the start of the next step, is here at the end of this one.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.optimisation import freeze, set_learning_rate
from ..runtime.seeding import random_generator
from .data2vec2_student import ConvDecoder, averaged_targets, fresh_weights, recorded_outputs
from .masks import inverse_blocks, warn_of_no_blocks
from .objective import Losses, Masks, Objective, micro_batches, rows, trained_groups
from .student import embedded_patches, visible_input

_BETAS = (0.9, 0.95)
_EPSILON = 1e-8

# Shapes below: B images, M masks of each, N patches, V visible and H hidden ones, D width.


class Data2vec2Objective(Objective):
    """Student, decoder and teacher of data2vec 2.0."""

    def build(self, encoder: MimRefinerModel | None) -> None:
        """One optimiser for student and decoder; positions stay as they are."""
        recipe = self.recipe
        if not recipe.num_centres:
            warn_of_no_blocks(recipe.image_size // recipe.patch_size, recipe.mask_length)
        self.encoder = encoder or MimRefinerModel(recipe.encoder_config())
        if encoder is None:
            fresh_weights(self.encoder)
        self.decoder = ConvDecoder(recipe, self.encoder.config.hidden_size)
        freeze(self.encoder, blocks=0)
        self.teacher = self.momentum_copy(self.encoder)

        def scale_and_decay(name: str, parameter: nn.Parameter) -> tuple[float, float]:
            decays = recipe.decay_all or parameter.ndim > 1
            return 1.0, recipe.weight_decay if decays else 0.0

        groups = trained_groups({"encoder": self.encoder, "decoder": self.decoder}, scale_and_decay)
        adamw = torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, eps=_EPSILON, fused=True)
        self.optimizers = [adamw]

    def masks(self, step: int, sample_index: Sequence[int]) -> Masks:
        """Visible patches (b, M, V), ascending, and the seed of each image's noise (b,)."""
        recipe = self.recipe
        grid = self.encoder.config.grid
        count = recipe.num_visible
        centres = recipe.num_centres

        visible = []
        seeds = []
        for sample in sample_index:
            rng = random_generator(recipe.seed, "data2vec2", step, sample)
            chosen = inverse_blocks(
                grid,
                rng,
                rows=recipe.num_masks,
                visible=count,
                centres=centres,
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

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """The teacher's features of whole images (B, N, D), fp32."""
        layers = self.teacher.layers[-self.recipe.target_layers :]
        mlps = [layer.get_submodule("mlp") for layer in layers]
        with self.autocast(images), recorded_outputs(mlps) as outputs:
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

    def set_schedules(self, step: int) -> None:
        """Rate and momentum, and fairseq's epsilon.

        Fairseq adds it before the bias correction of the second moment, torch after it.
        """
        (optimizer,) = self.optimizers
        set_learning_rate(optimizer, self.learning_rate(step))
        for group in optimizer.param_groups:
            group["eps"] = _EPSILON / math.sqrt(1 - _BETAS[1] ** (step + 1))
        self.momentum = self.momentum_after(step + 1)

    def learning_rate(self, step: int) -> float:
        """The rate of an update: a line from 0, then a cosine to 0."""
        peak = self.recipe.learning_rate
        warmup = self.steps.warmup
        if step < warmup:
            return peak * step / warmup
        progress = (step - warmup) / (self.steps.total - warmup)
        return peak / 2 * (1 + math.cos(math.pi * progress))

    def momentum_after(self, updates: int) -> float:
        """The teacher's momentum after so many updates: linear, then constant."""
        recipe = self.recipe
        last = round(recipe.momentum_epochs * self.steps.per_epoch)
        if updates >= last:
            return recipe.momentum_end
        rise = recipe.momentum_end - recipe.momentum_start
        return recipe.momentum_start + rise * (updates / last)

    def others(self) -> dict[str, MimRefinerModel]:
        """The teacher."""
        return {"momentum_encoder": self.teacher}


def _error(predicted: Tensor, expected: Tensor) -> Tensor:
    """The squared error of vectors (..., D): their sum over channels / sqrt(D), the mean of all."""
    squares = (predicted.float() - expected).square().sum(dim=-1)
    return squares.mean() / math.sqrt(predicted.shape[-1])
