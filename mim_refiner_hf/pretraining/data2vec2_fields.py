"""What of a recipe data2vec 2.0 alone reads; the defaults are the authors' for a ViT-B/16."""

from dataclasses import dataclass
from typing import Annotated

from ..runtime.settings import (
    Depth,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Share,
    between,
    documented,
)


@dataclass
class Data2vec2Fields:
    """Fields of data2vec 2.0 (arXiv 2212.07525)."""

    num_masks: Depth = documented(16, "data2vec2: masks of every image in a step.")
    mask_length: Depth = documented(3, "data2vec2: side of a block of patches that stays visible.")
    mask_adjust: Share = documented(
        0.07,
        "data2vec2: share of the patches that blocks are drawn for in excess of what stays "
        "visible, as they overlap (authors: B 0.07, L and H 0.1).",
    )
    mask_noise: NonNegativeFloat = documented(
        0.01, "data2vec2: standard deviation of the decoder's input at masked patches."
    )
    target_layers: PositiveInt = documented(
        10, "data2vec2: last blocks that targets are the mean of (authors: B 10, L 18, H 24)."
    )
    cls_weight: NonNegativeFloat = documented(
        2.56,
        "data2vec2: weight of the CLS token's mean error; the authors' 0.01 times the sum over the "
        "rows of a GPU is 2.56 for B (16 images x 16 masks) and 1.28 for L and H.",
    )
    decoder_kernel: Annotated[int, between(1, 64)] = documented(
        3, "data2vec2: side of the decoder's convolutions (authors: B 3, L and H 5)."
    )
    decoder_groups: PositiveInt = documented(16, "data2vec2: groups of these convolutions.")
    momentum_epochs: PositiveFloat = documented(
        39.968, "data2vec2: epochs in which the momentum goes from start to end (100 000 updates)."
    )
    decay_all: bool = documented(
        True,
        "data2vec2: weight decay on biases and norms too, as the authors' code has it, "
        "although it asks for none there.",
    )
