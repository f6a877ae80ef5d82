"""Which grid a table of positions is for, and which of its rows are for CLS and registers.

    settle_positions("bare.pth", placed, image_size=(128, 512), asked=True)

A table (1, rows, D) does not say how many rows the grid has: 256 patches may be 16 x 16 or 8 x 32.
The size of images says it, where the file, its config.json or the caller states one. Else the grid
is taken to be square, which is said; where a square would need a guess at what the first row is
for, the table is refused.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..runtime.files import CheckpointError
from ..runtime.wording import setting
from .layout import (
    ANY_POSITIONS,
    CLS_POSITION,
    CLS_TOKEN,
    POSITIONS,
    REGISTERS,
    EncoderFields,
)
from .shapes import KERNEL

logger = logging.getLogger(__name__)

Size = tuple[int, int]
"""Height and width of images, in pixels."""


def as_size(value: Any) -> Size | None:
    """A size as (height, width): an integer is a square; None for what is no size."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value, value
    if isinstance(value, list | tuple) and len(value) == 2:
        height, width = value
        if all(type(side) is int and side > 0 for side in (height, width)):
            return height, width
    return None


def settle_positions(
    name: str, placed: dict[str, Tensor], image_size: Size | None, asked: bool
) -> Size | None:
    """Give the patches their rows of the table, and CLS and registers theirs; in place.

    Args:
        name: of the source, for messages.
        image_size: that is stated; None where nothing states it.
        asked: the caller states it, so that a table of another size is an error.

    Returns:
        The size of images where the table fits the stated one; None where it is not known.

    Raises:
        CheckpointError: for a size that the table contradicts, or is no whole number of patches,
            and for a table whose grid is not known.
    """
    table = placed.pop(ANY_POSITIONS, None)
    positions = placed.get(POSITIONS)
    kernel = placed.get(KERNEL)
    # what is missing, or misshapen, is said by who checks the shapes
    if kernel is None or kernel.ndim != 4 or not kernel.numel():
        return None
    patch_size = kernel.shape[-1]
    if positions is None or positions.ndim != 3 or positions.shape[2] != len(kernel):
        return image_size if asked else None
    rows = positions.shape[1]
    # rows that are for no patch, if they are in the table
    prefix = 0
    if table is not None:
        registers = placed[REGISTERS].shape[1] if _has_registers(placed) else 0
        prefix = int(CLS_TOKEN in placed) + registers

    if image_size is not None:
        height, width = image_size
        patches = (height // patch_size) * (width // patch_size)
        # transformers and timm cut an image to whole patches
        whole = not asked or height % patch_size == 0 == width % patch_size
        for count in {0, min(prefix, 1), prefix}:
            if whole and rows == patches + count:
                _split(placed, count)
                return image_size
        if asked:
            held = f"positions for {rows}"
            if prefix:
                held += f", or {rows - prefix} beside {prefix} that are none"
            raise CheckpointError(
                f"{name}: {setting('image_size')} {height} x {width} is {patches} patches of "
                f"{patch_size} pixels, but the file has {held}; give "
                f"{_a_size_of(rows, prefix, patch_size)}"
            )

    if table is not None:
        _split(placed, _rows_before_a_square(name, rows, prefix, _has_registers(placed)))
    side = math.isqrt(placed[POSITIONS].shape[1])
    if side**2 == placed[POSITIONS].shape[1]:
        logger.info("%s: positions for %d x %d patches, taken as a square", name, side, side)
    elif image_size is None and table is not None:
        raise CheckpointError(
            f"{name}: {rows} positions are for a grid that is no square; give "
            f"{setting('image_size')}, height and width, {_a_size_of(rows, prefix, patch_size)}"
        )
    return None


def check_stated_size(
    name: str, placed: Mapping[str, Tensor], image_size: Size, shapes: EncoderFields
) -> None:
    """CheckpointError where the size of images is not that of the tables of positions.

    Args:
        name: of the source, for messages.
        shapes: what its tensors tell (`read_shapes`).
    """
    patch_size = shapes["patch_size"]
    height, width = image_size
    patches = (height // patch_size) * (width // patch_size)

    positions = placed.get(POSITIONS)
    side = shapes.get("image_size")
    held = None
    if positions is not None and positions.ndim == 3:
        held = positions.shape[1]
    elif "relative" in shapes["position_encoding"] and isinstance(side, int):
        held = (side // patch_size) ** 2
    if held not in (None, patches):
        size = height if height == width else [height, width]
        raise CheckpointError(
            f"{name}: image_size={size} is {patches} patches, but its weights have positions for "
            f"{held} patches of {patch_size} pixels; correct its configuration, or get it again "
            "with its weights"
        )


def _a_size_of(rows: int, prefix: int, patch_size: int) -> str:
    """A size that a table of so many rows is for: a square's side, else height and width."""
    for count in (rows - prefix, rows - 1, rows):
        if _is_square(count):
            return setting("image_size", math.isqrt(count) * patch_size)
    count = rows - prefix
    high = next(side for side in range(math.isqrt(max(count, 1)), 0, -1) if count % side == 0)
    return f"such as {setting('image_size', [high * patch_size, count // high * patch_size])}"


def _has_registers(placed: Mapping[str, Tensor]) -> bool:
    return REGISTERS in placed and placed[REGISTERS].ndim == 3


def _rows_before_a_square(name: str, rows: int, prefix: int, has_registers: bool) -> int:
    """How many rows stand before those of a square grid."""
    possible = [count for count in {0, 1, prefix} if _is_square(rows - count)]
    # beside registers, and without CLS, timm has rows for patches alone
    is_a_guess = 0 in possible and prefix > 0 and not has_registers
    if rows > 1 and (is_a_guess or len(possible) > 1):
        raise CheckpointError(
            f"{name}: {rows} positions are a square without one for CLS, or CLS and a grid that is "
            f"no square; give {setting('image_size')}, height and width"
        )
    # none is one: the check of the shapes will say it
    return possible[0] if possible else min(prefix, 1)


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _split(placed: dict[str, Tensor], count: int) -> None:
    """The table without its first `count` rows, which go to CLS and the registers; in place."""
    if count == 0:
        return
    positions = placed[POSITIONS]
    placed[POSITIONS] = positions[:, count:]

    first = int(CLS_TOKEN in placed)
    rows = positions[:, first:count]
    fit = REGISTERS in placed and placed[REGISTERS].shape == rows.shape
    if fit:
        placed[REGISTERS] = exact_sum(placed[REGISTERS], rows)
    # of another shape they are wrong, which the check of the shapes will say
    if first or not fit:
        placed[CLS_POSITION] = positions[:, :1]


def shape_as_ours(placed: dict[str, Tensor]) -> None:
    """Positions of a grid in one row, and that of CLS added to its token; in place."""
    if POSITIONS in placed and placed[POSITIONS].ndim == 4:
        placed[POSITIONS] = placed[POSITIONS].flatten(1, -2)
    if CLS_POSITION in placed and CLS_TOKEN in placed:
        token = placed[CLS_TOKEN]
        position = placed.pop(CLS_POSITION)
        # else one of them is wrong, which the check of the shapes will say
        if token.shape == position.shape and token.dtype == position.dtype:
            placed[CLS_TOKEN] = exact_sum(token, position)


def exact_sum(token: Tensor, position: Tensor) -> Tensor:
    """A token with its position: in their dtype, or in float32 where that would round the sum.

    The source adds them when it runs, and in fp32 it does not round.
    """
    total = token + position
    if total.dtype in (torch.float16, torch.bfloat16):
        exact = token.float() + position.float()
        if not torch.equal(total.float(), exact):
            return exact
    return total
