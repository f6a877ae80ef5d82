"""What is hidden from the student: pure functions of the seed, the step and the sample.

noise = mae_noise(seed=0, step=7, batch_size=256, patches=196)         # this process's (b, 196)
masks = inverse_blocks((14, 14), rng, rows=16, visible=39, centres=5, length=3)    # (16, 39)
"""

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..runtime.distributed import rank, world_size
from ..runtime.wording import setting

logger = logging.getLogger(__name__)


def mae_noise(seed: int, step: int, batch_size: int, patches: int) -> Tensor:
    """MAE's uniform numbers (b, N) for this process's images; the smallest stay visible.

    They are drawn for all processes and cut, so their number does not change them.
    """
    generator = np.random.default_rng([seed, step])
    noise = torch.from_numpy(generator.random((batch_size, patches), dtype=np.float32))
    return noise.tensor_split(world_size())[rank()]


def squares(centres: NDArray[np.int64], grid: tuple[int, int], length: int) -> NDArray[np.bool_]:
    """Which patches (R, N) lie in one of the squares around the centres (R, c) of a row.

    A square begins `length` // 2 before its centre; what is outside of the grid is cut off.
    """
    rows, columns = grid
    covered = np.zeros((len(centres), rows, columns), dtype=bool)
    offsets = np.arange(length) - length // 2
    row = (centres // columns)[:, :, None, None] + offsets[:, None]  # (R, c, length, 1)
    column = (centres % columns)[:, :, None, None] + offsets  # (R, c, 1, length)

    number = np.arange(len(centres))[:, None, None, None]
    number, row, column = np.broadcast_arrays(number, row, column)
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    covered[number[inside], row[inside], column[inside]] = True
    return covered.reshape(len(centres), -1)


def exactly(chosen: NDArray[np.bool_], keys: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """`count` places (R, count) of each row, ascending.

    Of more that are chosen (R, N) those with the smallest keys (R, N) are kept; of fewer all, and
    of the others those with the smallest keys are added.
    """
    order = np.argsort(keys + ~chosen, axis=1)
    return np.sort(order[:, :count], axis=1)


def inverse_blocks(
    grid: tuple[int, int],
    rng: np.random.Generator,
    *,
    rows: int,
    visible: int,
    centres: int,
    length: int,
) -> NDArray[np.int64]:
    """data2vec 2.0's masks: the visible patches (rows, visible) of an image, ascending.

    What stays visible are squares of `length` patches around `centres` uniformly drawn places,
    made up to, or cut down to, `visible` patches at random.
    """
    patches = grid[0] * grid[1]
    places = rng.integers(patches, size=(rows, centres))
    return exactly(squares(places, grid, length), rng.random((rows, patches)), visible)


def warn_of_no_blocks(side: int, length: int) -> None:
    """Say that a grid of `side` is too small for the blocks that are to stay visible."""
    logger.warning(
        "%s: too few of %d x %d patches stay visible for a block of %d x %d, so that single ones "
        "do; take a smaller block, a lower %s, or a smaller %s",
        setting("mask_length", length),
        side,
        side,
        length,
        length,
        setting("mask_ratio"),
        setting("patch_size"),
    )
