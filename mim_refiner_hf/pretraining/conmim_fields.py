"""What of a recipe ConMIM alone reads; the defaults are the authors'."""

from dataclasses import dataclass
from typing import Literal

from ..runtime.settings import PositiveFloat, PositiveInt, documented


@dataclass
class ConmimFields:
    """Fields of ConMIM (arXiv 2205.09616)."""

    mask_kind: Literal["squares", "blocks"] = documented(
        "squares",
        'ConMIM: "squares" of pixels (the released recipe), or BEiT\'s "blocks", of which the '
        "authors mask 75 of 196 patches (a mask_ratio of 0.385).",
    )
    mask_square: PositiveInt = documented(
        32, "ConMIM: side of a masked square in pixels; a multiple of patch_size."
    )
    smallest_block: PositiveInt = documented(
        16, "ConMIM: area of the smallest masked block, in patches."
    )
    temperature: PositiveFloat = documented(0.1, "ConMIM: temperature of the contrast.")
    projector_hidden: PositiveInt = documented(
        4096, "ConMIM: width of the projector's hidden layers."
    )
    projector_size: PositiveInt = documented(256, "ConMIM: width of what is contrasted.")


__all__ = ["ConmimFields"]
