"""What ConMIM's student does not see: squares of pixels, or BEiT's blocks.

check_masks_fit(recipe, encoder.config)
mask = image_mask(recipe, (14, 14), step=3, index=17)       # (14, 14), True where masked
"""

import math

import numpy as np

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..runtime.wording import setting
from .block_masks import (
    Grid,
    block_mask,
    mask_source,
    masked_squares,
    shuffled,
    square_mask,
    squares_of,
)
from .recipe import PretrainRecipe


def image_mask(recipe: PretrainRecipe, grid: Grid, step: int, index: int) -> np.ndarray:
    """The mask (rows, columns) of image `index` at a step, True where a patch is masked."""
    source = mask_source(recipe.seed, step, index)
    if recipe.mask_kind == "blocks":
        most = int(math.prod(grid) * recipe.mask_ratio)
        return block_mask(grid, most, recipe.smallest_block, source)
    side = recipe.mask_square // recipe.patch_size
    order = shuffled(math.prod(grid) // side**2, source)
    return square_mask(grid, side, recipe.mask_ratio, order)


def check_masks_fit(recipe: PretrainRecipe, config: MimRefinerConfig) -> None:
    """Refuse masks that do not fit the grid of the encoder's images, and a batch of one.

    Raises:
        ValueError: naming the setting.
    """
    grid: Grid = config.grid
    if recipe.batch_size < 2:
        raise ValueError(
            f"{setting('batch_size', recipe.batch_size)}: ConMIM's batch norm runs over the images "
            "of a batch; give 2 or more"
        )
    if recipe.mask_kind == "blocks":
        # a block is smaller than the grid on both sides
        most = min(int(math.prod(grid) * recipe.mask_ratio), (grid[0] - 1) * (grid[1] - 1))
        if recipe.smallest_block > most:
            raise ValueError(
                f"{setting('smallest_block', recipe.smallest_block)}: at most {most} of the "
                f"{grid[0]} x {grid[1]} patches of an image are masked; take smaller blocks, "
                f"larger images, or a larger {setting('mask_ratio')}"
            )
        return
    if recipe.mask_square % config.patch_size:
        raise ValueError(
            f"{setting('mask_square', recipe.mask_square)}: must be a multiple of "
            f"{setting('patch_size', config.patch_size)}"
        )
    try:
        squares = squares_of(grid, recipe.mask_square // config.patch_size)
    except ValueError as error:
        raise ValueError(f"{setting('mask_square', recipe.mask_square)}: {error}") from error
    try:
        masked_squares(squares, recipe.mask_ratio)
    except ValueError as error:
        raise ValueError(f"{setting('mask_ratio', recipe.mask_ratio)}: {error}") from error
