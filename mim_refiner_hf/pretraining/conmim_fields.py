"""What of a recipe ConMIM alone reads; the defaults are the authors'."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ..runtime.settings import Allowed, PositiveFloat, PositiveInt, Width, documented


@dataclass
class ConmimFields:
    """Fields of ConMIM (arXiv 2205.09616)."""

    mask_kind: Literal["squares", "blocks"] = documented(
        "squares",
        'conmim: "squares" of pixels (the released recipe), or BEiT\'s "blocks", of which the '
        "authors mask 75 of 196 patches (a mask_ratio of 0.385).",
    )
    mask_square: PositiveInt = documented(
        32, "conmim: side of a masked square in pixels; a multiple of patch_size."
    )
    smallest_block: PositiveInt = documented(
        16, "conmim: area of the smallest masked block, in patches."
    )
    layer_scale: Annotated[
        float, Allowed("greater than 0 and at most 100", lambda s: 0 < s <= 100)
    ] = documented(
        0.1, "conmim: start of the factor per channel of each branch (authors: S, B 0.1, L 1e-5)."
    )
    temperature: PositiveFloat = documented(0.1, "conmim: temperature of the contrast.")
    projector_hidden: Width = documented(4096, "conmim: width of the projector's hidden layers.")
    projector_size: Width = documented(256, "conmim: width of what is contrasted.")
