"""What a recipe leaves open, filled in once from encoder, data and processes: heads, sizes, temperature, updates per stage."""

import dataclasses
import math
from typing import Literal, NamedTuple

from ..model.configuration_mim_refiner import MimRefinerConfig, Pooling
from ..runtime.settings import spelt
from .recipe import RefineRecipe


def default_head_blocks(num_layers: int) -> list[int]:
    """The last third of the blocks, rounded up to an even number: 8 heads for 24 blocks, 12 for 32 (paper, Sec. 5.1)."""
    heads = min(num_layers, 2 * math.ceil(num_layers / 6))
    return list(range(num_layers - heads, num_layers))


def _resolve_blocks(
    recipe: RefineRecipe, layers: int, pooling: Pooling
) -> list[int] | Literal["auto"]:
    """The blocks with a head, checked against an encoder of `layers` blocks; "auto" stays: `head_choice.py` chooses within them."""
    blocks = recipe.head_blocks
    if isinstance(blocks, str):
        return "auto"
    if recipe.num_heads is not None and recipe.num_heads > layers:
        raise ValueError(f"--num_heads {recipe.num_heads}: the encoder has only {layers} blocks")
    if blocks is None:
        blocks = (
            default_head_blocks(layers)
            if recipe.num_heads is None
            else list(range(layers - recipe.num_heads, layers))
        )
    if blocks[0] < 0 or blocks[-1] >= layers:
        raise ValueError(
            f"--head_blocks {spelt(blocks)}: out of range; the encoder has blocks 0 to {layers - 1}"
        )
    if recipe.freeze_blocks > blocks[0]:
        raise ValueError(
            f"--freeze_blocks {recipe.freeze_blocks}: the head on block {blocks[0]} would train nothing; freeze at most {blocks[0]}"
        )
    if pooling == "global_repr" and blocks[-1] != layers - 1:
        raise ValueError(
            f"--pooling global_repr: only the head on the encoder's output reads it; add block {layers - 1} to --head_blocks "
            f"{spelt(blocks)}, or use mean"
        )
    return blocks


def resolve(
    recipe: RefineRecipe, config: MimRefinerConfig, num_images: int | None, world_size: int = 1
) -> RefineRecipe:
    """The recipe with every None filled in from the encoder, checked against encoder, data and number of processes.

    Args:
        num_images: training images; None for a stream.

    Raises:
        ValueError: naming flag, value and what is allowed.
    """
    layers, patch = config.num_hidden_layers, config.patch_size
    if recipe.freeze_blocks >= layers:
        raise ValueError(
            f"--freeze_blocks {recipe.freeze_blocks}: the encoder has {layers} blocks, at least one must be trained"
        )
    pooling = recipe.pooling or config.pooling
    assert pooling is not None  # the configuration fills it in
    if missing := config.missing_for(pooling):
        raise ValueError(f"--pooling {pooling}: the encoder has {missing}; use mean")
    blocks = _resolve_blocks(recipe, layers, pooling)
    global_size = recipe.global_size or config.image_hw[0]
    local_size = recipe.local_size or max(1, round(config.grid[0] * 3 / 7)) * patch
    for flag, size in (("global_size", global_size), ("local_size", local_size)):
        if size % patch:
            near = max(patch, round(size / patch) * patch)
            raise ValueError(
                f"--{flag} {size}: must be a multiple of the patch size {patch}, for example {near}"
            )
    if num_images is not None and recipe.batch_size > num_images:
        raise ValueError(
            f"--batch_size {recipe.batch_size}: the data set has only {num_images} training images"
        )
    if recipe.batch_size % world_size:
        raise ValueError(
            f"--batch_size {recipe.batch_size}: must be a multiple of the {world_size} processes"
        )
    if (
        isinstance(recipe.micro_batch_size, int)
        and recipe.micro_batch_size > recipe.batch_size // world_size
    ):
        raise ValueError(
            f"--micro_batch_size {recipe.micro_batch_size}: more than the {recipe.batch_size // world_size} images of one process"
        )
    width = config.hidden_size
    return dataclasses.replace(
        recipe,
        head_blocks=blocks,
        num_heads=None,
        temperature=recipe.temperature
        or (0.2 if width <= 1024 else 0.3 if width <= 1280 else 0.35),
        pooling=pooling,
        global_size=global_size,
        local_size=local_size,
    )


class Steps(NamedTuple):
    """Updates of the head warm-up and of the refinement."""

    warmup: int
    refine: int

    @property
    def total(self) -> int:
        """Updates in all."""
        return self.warmup + self.refine


def count_steps(recipe: RefineRecipe, num_images: int | None) -> Steps:
    """Updates per stage: whole batches per epoch times epochs, at most `max_steps`; heads that come along are warm."""
    if num_images is None:
        assert recipe.max_steps is not None
        stages = [recipe.max_steps, recipe.max_steps]
    else:
        stages = [
            round(epochs * (num_images // recipe.batch_size))
            for epochs in (recipe.head_epochs, recipe.epochs)
        ]
    warmup, refine = (min(steps, recipe.max_steps or steps) for steps in stages)
    return Steps(0 if recipe.init_from is not None else warmup, refine)


__all__ = ["Steps", "count_steps", "default_head_blocks", "resolve"]
