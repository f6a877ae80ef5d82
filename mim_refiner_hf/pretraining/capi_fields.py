"""What of a recipe CAPI alone reads; the defaults are the authors' for a ViT-L/14."""

from dataclasses import dataclass
from typing import Annotated

from ..runtime.settings import (
    Depth,
    NonNegativeFloat,
    PositiveFloat,
    Rate,
    ShareAboveZero,
    ShareBelowOne,
    between,
    documented,
    minimum,
)


@dataclass
class CapiFields:
    """Fields of CAPI (arXiv 2502.08769)."""

    prototypes: Annotated[int, minimum(2)] | None = documented(
        None,
        "capi: prototypes that patches are shared out among. None: as many as there are images in "
        "a batch, at most 16384.",
    )
    positionwise: bool = documented(
        True,
        "capi: share the patches out for every position on its own, over the images of a batch. "
        "False does so over all patches of the batch: for small batches.",
    )
    predicted_share: ShareAboveZero = documented(
        0.05, "capi: share of the masked patches that are predicted."
    )
    registers: Annotated[int, between(0, 4096)] = documented(
        16, "capi: register tokens; a multiple of 4."
    )
    predictor_layers: Depth = documented(12, "capi: blocks of the predictor.")
    roll: bool = documented(True, "capi: whether the visible rectangle may wrap around the image.")
    stochastic_depth: ShareBelowOne = documented(
        0.2, "capi: share of the images that each residual branch of the student leaves out."
    )
    student_temperature: PositiveFloat = documented(0.12, "capi: temperature of the predictions.")
    clustering_temperature: PositiveFloat = documented(
        0.12, "capi: temperature of the logits that the clustering layer learns with."
    )
    target_temperature: PositiveFloat = documented(
        0.06, "capi: temperature of the logits that targets are made of."
    )
    sinkhorn_iterations: Depth = documented(3, "capi: iterations of Sinkhorn.")
    clustering_learning_rate: Rate = documented(
        None, "capi: peak learning rate of the clustering layer. Default: 5e-4."
    )
    clustering_weight_decay: NonNegativeFloat = documented(
        0.01, "capi: weight decay of the clustering layer."
    )
    momentum_after_warmup: ShareAboveZero = documented(
        None, "capi: momentum of the teacher between warm-up and cosine. Default: 0.999."
    )
    truncated_cosine: ShareAboveZero = documented(
        0.8, "capi: share of its half period at which the cosine of rates and momentum is cut off."
    )
