"""Masks of CAPI and ConMIM: rectangles, blocks, squares, as pure functions of what is drawn.

    source = mask_source(seed=0, step=3, index=17)      # of one image at one step
    draw = draw_rectangle((16, 16), cells=90, source=source)
    masked = ~rectangle_mask((16, 16), 90, draw)        # CAPI: what stays visible is a rectangle

A mask is boolean, (rows, columns) of the grid of patches, True where a patch is masked. What is
random is drawn apart from what is made of it, so that the same draw gives the same mask anywhere.

- `random_mask`: any patches (CAPI calls it uniform);
- `square_mask`: whole squares of pixels (ConMIM's released recipe);
- `block_mask`: rectangles until enough is masked (BEiT; ConMIM's default);
- `rectangle_mask`: one rectangle that may wrap around (CAPI).
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..runtime.seeding import random_generator

Grid = tuple[int, int]
"""(rows, columns) of patches."""


def mask_source(seed: int, step: int, index: int) -> random.Random:
    """The source of the masks of image `index` at a step: a pure function of its arguments."""
    state = random_generator(seed, "masks", step, index).integers(2**63)
    return random.Random(int(state))


def shuffled(count: int, source: random.Random) -> list[int]:
    """The numbers 0 to `count` - 1 in random order."""
    return source.sample(range(count), count)


def random_mask(grid: Grid, masked: int, order: Sequence[int]) -> np.ndarray:
    """Exactly `masked` patches, those with the smallest places in `order`, a permutation (N,)."""
    return (np.asarray(order) < masked).reshape(grid)


# --- squares -------------------------------------------------------------------------------------


def squares_of(grid: Grid, square: int) -> int:
    """How many squares of `square` x `square` patches the grid has.

    Raises:
        ValueError: where they do not fill it, or are fewer than two.
    """
    rows, columns = grid
    if square < 1 or rows % square or columns % square or rows * columns == square * square:
        raise ValueError(
            f"squares of {square} x {square} patches do not divide the grid of {rows} x {columns} "
            "patches into two or more; take another size of the squares, or of the images"
        )
    return (rows // square) * (columns // square)


def masked_squares(squares: int, ratio: float) -> int:
    """How many of the squares are masked: ConMIM rounds up, 37 of 49 for 0.75.

    Raises:
        ValueError: where none would stay visible.
    """
    masked = math.ceil(squares * ratio)
    if masked >= squares:
        raise ValueError(
            f"a share of {ratio} masks all {squares} squares of the grid; take a smaller share or "
            "smaller squares"
        )
    return masked


def square_mask(grid: Grid, square: int, ratio: float, order: Sequence[int]) -> np.ndarray:
    """ConMIM's mask of whole squares: the first of `order`, a permutation of the squares.

    Args:
        square: side of a square in patches.
        ratio: share of the squares that is masked, rounded up.
    """
    squares = squares_of(grid, square)
    mask = np.zeros(squares, dtype=bool)
    mask[np.asarray(order)[: masked_squares(squares, ratio)]] = True
    coarse = mask.reshape(grid[0] // square, grid[1] // square)
    return coarse.repeat(square, axis=0).repeat(square, axis=1)


# --- blocks --------------------------------------------------------------------------------------

_TRIES = 10


def block_mask(
    grid: Grid,
    most: int,
    smallest: int,
    source: random.Random,
    min_aspect: float = 0.3,
    largest: int | None = None,
) -> np.ndarray:
    """BEiT's mask (arXiv 2106.08254): rectangles, one after the other, at most `most` patches.

    It ends early where ten tries find no place for another, so that counts differ by a few.

    Args:
        most: patches that are masked if all goes well.
        smallest: area of the smallest rectangle that is drawn, in patches.
        min_aspect: rows to columns of a rectangle are between this and its inverse.
        largest: patches that one rectangle adds at most; None for what is still to be masked.
    """
    mask = np.zeros(grid, dtype=bool)
    while (left_over := most - int(mask.sum())) > 0:
        allowed = left_over if largest is None else min(left_over, largest)
        if not _add_block(mask, allowed, smallest, source, min_aspect):
            break
    return mask


def _add_block(
    mask: np.ndarray, most: int, smallest: int, source: random.Random, min_aspect: float
) -> bool:
    """Mask one more rectangle, in place; False where ten tries found no place for it."""
    bound = math.log(min_aspect)
    for _ in range(_TRIES):
        area = source.uniform(smallest, most)
        aspect = math.exp(source.uniform(bound, -bound))
        rows = round(math.sqrt(area * aspect))
        columns = round(math.sqrt(area / aspect))
        if rows >= mask.shape[0] or columns >= mask.shape[1]:
            continue

        top = source.randint(0, mask.shape[0] - rows)
        left = source.randint(0, mask.shape[1] - columns)
        block = mask[top : top + rows, left : left + columns]
        new = rows * columns - int(block.sum())
        if 0 < new <= most:
            block[:] = True
            return True
    return False


# --- one rectangle -------------------------------------------------------------------------------

ASPECTS = (0.5, 2.0)


@dataclass(frozen=True)
class RectangleDraw:
    """What is random about one rectangle.

    Attributes:
        log_aspect: logarithm of its rows to columns.
        top, left: its first row and column, before the roll.
        roll: rows and columns by which the grid is rolled afterwards, as a torus; 0 for none.
    """

    log_aspect: float
    top: int
    left: int
    roll: tuple[int, int] = (0, 0)


def aspect_limits(
    grid: Grid, cells: int, aspects: tuple[float, float] = ASPECTS
) -> tuple[float, float]:
    """The logarithms between which the aspect of a rectangle of `cells` patches is drawn.

    Raises:
        ValueError: where no rectangle of these aspects and this area fits into the grid.
    """
    rows, columns = grid
    low = max(math.log(aspects[0]), math.log(cells / columns**2))
    high = min(math.log(aspects[1]), math.log(rows**2 / (cells + 1e-5)))
    if low > high:
        raise ValueError(
            f"no rectangle of {cells} patches, {aspects[0]} to {aspects[1]} times as high as wide, "
            f"fits into a grid of {rows} x {columns} patches; mask more, or take squarer images"
        )
    return low, high


def rectangle_sides(grid: Grid, cells: int, log_aspect: float) -> tuple[int, int]:
    """Rows and columns of the rectangle that `cells` patches fill but for its last row."""
    aspect = math.exp(log_aspect)
    rows = math.ceil(math.sqrt(cells * aspect))
    columns = math.ceil(math.sqrt(cells / aspect))
    # rounding could make it a patch larger than the grid
    return min(rows, grid[0]), min(columns, grid[1])


def draw_rectangle(
    grid: Grid,
    cells: int,
    source: random.Random,
    roll: bool = True,
    aspects: tuple[float, float] = ASPECTS,
) -> RectangleDraw:
    """Draw one rectangle of `cells` patches.

    Raises:
        ValueError: see `aspect_limits`.
    """
    log_aspect = source.uniform(*aspect_limits(grid, cells, aspects))
    rows, columns = rectangle_sides(grid, cells, log_aspect)
    top = source.randint(0, grid[0] - rows)
    left = source.randint(0, grid[1] - columns)
    if not roll:
        return RectangleDraw(log_aspect, top, left)
    down = source.randint(0, grid[0] - 1)
    right = source.randint(0, grid[1] - 1)
    return RectangleDraw(log_aspect, top, left, (down, right))


def rectangle_mask(grid: Grid, cells: int, draw: RectangleDraw) -> np.ndarray:
    """True on exactly `cells` patches: the first ones of the rectangle, row by row, rolled.

    CAPI masks all others (`~rectangle_mask(...)`).
    """
    rows, columns = rectangle_sides(grid, cells, draw.log_aspect)
    inside = np.arange(rows * columns).reshape(rows, columns) < cells
    mask = np.zeros(grid, dtype=bool)
    mask[draw.top : draw.top + rows, draw.left : draw.left + columns] = inside
    return np.roll(mask, draw.roll, axis=(0, 1))


def predicted_positions(mask: np.ndarray, noise: Sequence[float], count: int) -> np.ndarray:
    """The masked positions that CAPI predicts (count,): those of the smallest noise, in its order.

    Args:
        mask: (rows, columns); positions count row by row.
        noise: a number for every masked position, (masked,).
    """
    positions = np.flatnonzero(mask)
    return positions[np.argsort(np.asarray(noise), kind="stable")[:count]]
