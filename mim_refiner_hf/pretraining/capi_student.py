"""The networks of CAPI: what sees the visible patches, predicts others, and names prototypes.

    output, places = encode_visible(encoder, pixels, visible)       # (b, R + V, D), (b, R + V, 2)
    predictions = predict(encoder, output, places, of_predicted)    # (b, P, D)
    logits = PrototypeHead(dim=1024, prototypes=16384)(predictions)

The encoder is a `MimRefinerModel` with stored rope, registers and a predictor.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.modeling_mim_refiner import MimRefinerModel
from ..model.positions_mim_refiner import patch_coordinates
from .objective import Masks
from .stochastic_depth import run_block
from .student import embedded_patches, visible_input

# Shapes below: b images, R registers, N patches, V of them visible, P predicted, D width of the
# encoder, K prototypes.


class PrototypeHead(nn.Module):
    """Unit vectors to logits of prototypes whose lengths are learned apart (weight norm)."""

    def __init__(self, dim: int, prototypes: int) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(prototypes, dim))
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self, predictions: Tensor) -> Tensor:
        """(..., D) -> (..., K), in single precision."""
        with torch.autocast(predictions.device.type, enabled=False):
            lengths = self.weight_v.norm(dim=1, keepdim=True)
            weight = self.weight_v * (self.weight_g / (lengths + 1e-8))
            return F.linear(F.normalize(predictions.to(weight.dtype), dim=-1), weight)


def encode_visible(
    encoder: MimRefinerModel,
    pixels: Tensor,
    visible: Tensor | None = None,
    kept: Tensor | None = None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The encoder's output (b, R + V, D) and the places of its tokens (b, R + V, 2).

    Args:
        pixels: normalised images (b, C, H, W) of the encoder's size.
        visible: positions of the patches that are seen (b, V); None for all, places (R + N, 2).
        kept, factor: of stochastic depth, two columns a block: see `run_block`.
    """
    patches = embedded_patches(encoder, pixels)
    if visible is None:
        tokens = encoder.embeddings.with_prefix(patches)
        places = encoder.places(encoder.config.grid, pixels.device)
    else:
        tokens, places = visible_input(encoder, patches, visible)

    coordinates = places["coordinates"]
    # CAPI's encoder has rope
    assert coordinates is not None
    if kept is None:
        tokens = encoder.encode_tokens(tokens, places)
    else:
        blocks: Any = encoder.layers
        for block, pair in zip(blocks, kept.split(2, dim=1), strict=True):
            tokens = run_block(block, tokens, coordinates, pair, factor)
    return encoder.norm(tokens), coordinates


def predict(
    encoder: MimRefinerModel,
    output: Tensor,
    coordinates: Tensor,
    places: Tensor,
    kept: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """What the predictor gives for places in the image, (b, P, D).

    Args:
        output, coordinates: of `encode_visible`.
        places: where to predict (b, P, 2).
        kept, factor: of stochastic depth, two columns a block: see `run_block`.
    """
    predictor = encoder.predictor
    assert predictor is not None
    if kept is None:
        return predictor(output, coordinates, places)

    tokens = predictor.mask_token.expand(len(output), places.shape[1], -1)
    blocks: Any = predictor.blocks
    for block, pair in zip(blocks, kept.split(2, dim=1), strict=True):
        tokens = run_block(block, tokens, places, pair, factor, (output, coordinates))
    return predictor.norm(tokens)


def predicted_logits(
    encoder: MimRefinerModel,
    head: PrototypeHead,
    pixels: Tensor,
    masks: Masks,
    factor: float = 1.0,
) -> Tensor:
    """The student's logits at the predicted positions (b, P, K).

    Args:
        masks: positions "visible" (b, V) and "predicted" (b, P); with stochastic depth "kept", two
            columns a block, the encoder's first: see `run_block`.
        factor: of stochastic depth.
    """
    of_encoder = of_predictor = None
    if "kept" in masks:
        branches = 2 * len(encoder.layers)
        of_encoder = masks["kept"][:, :branches]
        of_predictor = masks["kept"][:, branches:]

    output, coordinates = encode_visible(encoder, pixels, masks["visible"], of_encoder, factor)
    # a place is one in the whole image, whatever is visible
    places = patch_coordinates(encoder.config.grid, pixels.device)[masks["predicted"]]
    logits: Tensor = head(predict(encoder, output, coordinates, places, of_predictor, factor))
    return logits


@torch.no_grad()
def start_weights(encoder: MimRefinerModel) -> None:
    """Give a fresh encoder the authors' initial weights; norms and rope have them already.

    Xavier-uniform for every linear layer and for the patch embedding, whose bias is torch's
    default; tokens normal with a deviation of 0.02.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)

    embedding = encoder.embeddings.patch_embeddings
    nn.init.xavier_uniform_(embedding.weight.flatten(1))
    if embedding.bias is not None:
        bound = embedding.weight[0].numel() ** -0.5
        nn.init.uniform_(embedding.bias, -bound, bound)

    tokens = [encoder.embeddings.register_tokens]
    if encoder.predictor is not None:
        tokens.append(encoder.predictor.mask_token)
    for token in tokens:
        if token is not None:
            nn.init.normal_(token, std=0.02)
