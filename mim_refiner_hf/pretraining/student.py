"""The two ways in which a student sees less than the image: patches left out, or replaced.

tokens, places = visible_input(encoder, embedded_patches(encoder, pixels), visible)
output = encoder.norm(encoder.encode_tokens(tokens, places))           # (B, prefix + V, D)

tokens, places = replaced_input(encoder, pixels, masked, mask_token)
output = encoder.norm(encoder.encode_tokens(tokens, places))           # (B, prefix + N, D)
"""

import torch
from torch import Tensor

from ..model.modeling_mim_refiner import MimRefinerModel, Places

# Shapes below: B images, N patches, V visible ones, D width of the encoder.


def embedded_patches(encoder: MimRefinerModel, pixels: Tensor) -> Tensor:
    """The patches of images of the native size, with their absolute positions (B, N, D)."""
    grid = encoder.check_size(pixels, interpolate_pos_encoding=False)
    return encoder.embeddings.with_positions(encoder.embeddings.patches(pixels), grid)


def visible_input(
    encoder: MimRefinerModel, patches: Tensor, visible: Tensor
) -> tuple[Tensor, Places]:
    """What the blocks read of images of which only some patches are there, and where it is.

    Args:
        patches: of `embedded_patches`.
        visible: which of them there are (B, V).

    Returns:
        CLS, registers and visible patches (B, prefix + V, D), and `encoder.places`.

    Raises:
        ValueError: for an encoder with relative positions.
    """
    index = visible.unsqueeze(-1).expand(-1, -1, patches.shape[2])
    tokens = encoder.embeddings.with_prefix(patches.gather(1, index))
    return tokens, encoder.places(encoder.config.grid, patches.device, visible)


def replaced_input(
    encoder: MimRefinerModel, pixels: Tensor, masked: Tensor, mask_token: Tensor
) -> tuple[Tensor, Places]:
    """What the blocks read of images with a mask token in the place of some patches.

    Args:
        pixels: normalised images of the native size (B, C, H, W).
        masked: which patches are replaced (B, N), bool.
        mask_token: (D,), or any shape that expands to (B, N, D); positions are added to it.

    Returns:
        CLS, registers and all patches (B, prefix + N, D), and `encoder.places`.
    """
    grid = encoder.check_size(pixels, interpolate_pos_encoding=False)
    patches = encoder.embeddings.patches(pixels)
    patches = torch.where(masked.unsqueeze(-1), mask_token.to(patches.dtype), patches)
    tokens = encoder.embeddings.with_prefix(encoder.embeddings.with_positions(patches, grid))
    return tokens, encoder.places(grid, pixels.device)
