"""Masked autoencoding (MAE, arXiv 2111.06377): the pixels of the patches that are not seen.

    objective = MaeObjective(recipe, recipe.steps(len(images)))

Three quarters of the patches are taken away, our own encoder sees the rest, and a small decoder,
which is thrown away afterwards, predicts the normalised pixels of the missing ones. The loss is
their mean squared error.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.modeling_mim_refiner import MimRefinerModel, Places
from ..runtime.optimisation import encoder_groups, freeze, learning_rate, set_learning_rate
from .mae_decoder import MaeDecoder, decoder_groups, xavier_uniform
from .masks import mae_noise
from .objective import Losses, Masks, Objective, micro_batches
from .student import embedded_patches, visible_input


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """Images (B, C, H, W) to patches (B, N, patch * patch * C), row by row."""
    batch, channels, height, width = pixels.shape
    grid = pixels.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def visible_tokens(
    encoder: MimRefinerModel, pixels: Tensor, noise: Tensor, mask_ratio: float
) -> tuple[Tensor, Places, Tensor]:
    """What the encoder gets to see: CLS, registers and the patches with the smallest `noise`.

    Args:
        pixels: normalised images (B, C, H, W) of the native size.
        noise: uniform numbers (B, N), one per patch.

    Returns:
        tokens, embedded with their positions (B, prefix + visible, D), their `places`, and the
        place of each patch among visible-then-masked (B, N).
    """
    order = noise.argsort(dim=1)
    keep = int(noise.shape[1] * (1 - mask_ratio))
    patches = embedded_patches(encoder, pixels)
    tokens, places = visible_input(encoder, patches, order[:, :keep])
    return tokens, places, order.argsort(dim=1)


def reconstruction_error(predicted: Tensor, pixels: Tensor, patch: int, masked: Tensor) -> Tensor:
    """Mean squared error on the masked patches, whose pixels are normalised per patch.

    Args:
        predicted: (B, N, p*p*C).
        pixels: normalised images (B, C, H, W).
        masked: which patches count (B, N).
    """
    target = patchify(pixels, patch)
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    normalised = (target - mean) / (variance + 1e-6).sqrt()
    error = (predicted.float() - normalised).square().mean(dim=-1)  # (B, N)
    return error[masked].mean()


def mae_loss(
    encoder: MimRefinerModel, decoder: MaeDecoder, pixels: Tensor, noise: Tensor, mask_ratio: float
) -> Tensor:
    """MAE's loss: the error of what encoder and decoder make of the visible patches.

    Args: see `visible_tokens`.
    """
    prefix = encoder.config.num_prefix_tokens
    tokens, places, restore = visible_tokens(encoder, pixels, noise, mask_ratio)
    masked = restore >= tokens.shape[1] - prefix
    output = encoder.norm(encoder.encode_tokens(tokens, places))
    predicted = decoder(output, restore, prefix)
    return reconstruction_error(predicted, pixels, encoder.config.patch_size, masked)


class MaeObjective(Objective):
    """Encoder and decoder of a masked autoencoding."""

    def build(self, encoder: MimRefinerModel | None) -> None:
        """One optimiser for both; positions stay as they are."""
        recipe = self.recipe
        self.encoder = encoder or MimRefinerModel(recipe.encoder_config())
        self.decoder = MaeDecoder(recipe, self.encoder.config)
        if encoder is None:
            xavier_uniform(self.encoder)
        xavier_uniform(self.decoder)

        freeze(self.encoder, blocks=0)
        groups = encoder_groups(self.encoder, 1.0, recipe.weight_decay)
        groups += decoder_groups(self.decoder, recipe.weight_decay)
        self.optimizers = [torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)]

    def masks(self, step: int, sample_index: Sequence[int]) -> Masks:
        """The noise of all images (b, V * N), drawn at once for the whole batch."""
        patches = math.prod(self.encoder.config.grid) * self.recipe.crops_per_image
        return {"noise": mae_noise(self.recipe.seed, step, self.recipe.batch_size, patches)}

    def backward(self, pixels: Tensor, masks: Masks, micro_batch_size: int | None) -> Losses:
        """The gradient of the mean error; every image has as many masked patches as any other."""
        noise = masks["noise"].unflatten(1, (pixels.shape[1], -1))  # (b, V, N)
        total = torch.zeros((), device=pixels.device)
        for part in micro_batches(len(pixels), micro_batch_size):
            crops = pixels[part].flatten(0, 1)
            of_crops = noise[part].flatten(0, 1)
            with self.autocast(pixels):
                loss = mae_loss(self.encoder, self.decoder, crops, of_crops, self.recipe.mask_ratio)
            loss = loss * (len(pixels[part]) / len(pixels))
            loss.backward()
            total += loss.detach()
        return {"loss": total}

    def set_schedules(self, step: int) -> None:
        """Linear warm-up, then a cosine; the peak grows with the crops of a batch."""
        recipe = self.recipe
        peak = recipe.learning_rate * recipe.batch_size * recipe.crops_per_image / 256
        end = recipe.end_learning_rate
        rate = learning_rate(step, self.steps.warmup, self.steps.total, peak, end)
        set_learning_rate(self.optimizers[0], rate)
