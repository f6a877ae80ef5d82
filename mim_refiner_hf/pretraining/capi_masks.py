"""What CAPI's student sees, and what it predicts: exact counts, one mask an image and step.

counts = mask_counts((16, 16), mask_ratio=0.65, predicted_share=0.05)     # 90, 166, 8
visible, predicted = draw_masks((16, 16), counts, seed=0, step=3, sample_index=[17, 4])
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..runtime.wording import setting
from .block_masks import (
    Grid,
    aspect_limits,
    draw_rectangle,
    mask_source,
    predicted_positions,
    rectangle_mask,
)


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


def draw_masks(
    grid: Grid,
    counts: MaskCounts,
    seed: int,
    step: int,
    sample_index: Sequence[int],
    roll: bool = True,
) -> tuple[Tensor, Tensor]:
    """Positions that are visible (b, visible), ascending, and predicted (b, predicted).

    Args:
        sample_index: places of the b images in the data set.
        roll: whether the visible rectangle may wrap around.
    """
    visible = []
    predicted = []
    for index in sample_index:
        source = mask_source(seed, step, index)
        draw = draw_rectangle(grid, counts.visible, source, roll)
        seen = rectangle_mask(grid, counts.visible, draw)
        noise = [source.random() for _ in range(counts.masked)]
        visible.append(np.flatnonzero(seen))
        predicted.append(predicted_positions(~seen, noise, counts.predicted))
    return torch.from_numpy(np.stack(visible)), torch.from_numpy(np.stack(predicted))
