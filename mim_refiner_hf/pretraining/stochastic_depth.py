"""Stochastic depth by batch: each residual branch computes a drawn share of the images only.

    kept = kept_images(seed=0, step=3, batch=64, residuals=24, rate=0.2)     # (64, 24)
    tokens = run_block(block, tokens, coordinates, kept[:, 0:2], factor=64 / 51)

What a branch gives is added to the images it saw, times images of the batch / images drawn (CAPI,
arXiv 2502.08769; DINOv2's). The draw is made for the batch of all processes, so that neither their
number nor micro-batches change it.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..model.modeling_mim_refiner import MimRefinerLayer
from ..runtime.seeding import random_generator

# Shapes below: b images, T tokens, D their width, S tokens that are attended to.


def kept_count(batch: int, rate: float) -> int:
    """How many of a batch's images a branch sees."""
    return max(int(batch * (1 - rate)), 1)


def kept_images(seed: int, step: int, batch: int, residuals: int, rate: float) -> Tensor:
    """Which images every residual branch sees (batch, residuals), boolean; a pure function.

    Args:
        batch: images of all processes.
        residuals: branches, two a block, in the order of the forward pass.
        rate: share of the images that a branch leaves out.
    """
    source = random_generator(seed, "stochastic depth", step)
    kept = np.zeros((batch, residuals), dtype=bool)
    for residual in range(residuals):
        kept[source.permutation(batch)[: kept_count(batch, rate)], residual] = True
    return torch.from_numpy(kept)


def run_block(
    block: MimRefinerLayer,
    tokens: Tensor,
    coordinates: Tensor,
    kept: Tensor,
    factor: float,
    context: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The tokens (b, T, D) after a pre-norm block, whose two branches see some of the images.

    Args:
        coordinates: places of the tokens (b, T, 2).
        kept: which images attention and MLP see (b, 2).
        factor: of what they give.
        context: tokens (b, S, D) to attend to instead, and their places (b, S, 2).
    """
    if block.gradient_checkpointing and block.training:
        again = (block, tokens, coordinates, kept, factor, context)
        return checkpoint(_both_branches, *again, use_reentrant=False)
    return _both_branches(block, tokens, coordinates, kept, factor, context)


def _both_branches(
    block: MimRefinerLayer,
    tokens: Tensor,
    coordinates: Tensor,
    kept: Tensor,
    factor: float,
    context: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Attention, then the MLP; arguments as of `run_block`."""

    def attend(images: Tensor) -> Tensor:
        others = None if context is None else (context[0][images], context[1][images])
        normed = block.norm1(tokens[images])
        attended, _ = block.attention(normed, coordinates=coordinates[images], context=others)
        return block.layer_scale1(attended)

    tokens = _add(tokens, attend, kept[:, 0], factor)

    def think(images: Tensor) -> Tensor:
        return block.layer_scale2(block.mlp(block.norm2(tokens[images])))

    return _add(tokens, think, kept[:, 1], factor)


def _add(tokens: Tensor, branch: Callable[[Tensor], Tensor], kept: Tensor, factor: float) -> Tensor:
    """The tokens and what a branch gives for the images that are kept."""
    images = kept.nonzero().squeeze(1)
    if not len(images):
        # one counts for nothing, so that every parameter has a gradient in every process
        images = images.new_zeros(1)
        factor = 0.0
    given = branch(images) * factor
    return tokens.index_add(0, images, given.to(tokens.dtype))
