"""What data2vec 2.0 has beside the encoder: its decoder, its targets, and its first weights.

with recorded_outputs([layer.mlp for layer in teacher.layers[-10:]]) as outputs:
    teacher(images)
targets = averaged_targets([output[:, 1:] for output in outputs])       # (B, N, D)
predicted = ConvDecoder(recipe, dim=768)(tokens, grid=(14, 14))         # (B, N, D)
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.modeling_mim_refiner import MimRefinerModel
from .recipe import PretrainRecipe

# Shapes below: B images, R of them or of their masks, N patches, D width.


class ConvDecoder(nn.Module):
    """Grouped convolutions on the grid of the patches, and a linear layer back to the width.

    Every convolution is followed by a LayerNorm over channels without weights and a GELU, and its
    input is added where it is as wide.
    """

    def __init__(self, recipe: PretrainRecipe, dim: int) -> None:
        super().__init__()
        width = recipe.decoder_size
        kernel = recipe.decoder_kernel
        convolutions = []
        for channels in [dim, *[width] * (recipe.decoder_layers - 1)]:
            convolutions.append(
                nn.Conv2d(
                    channels, width, kernel, padding=kernel // 2, groups=recipe.decoder_groups
                )
            )
        self.layers = nn.ModuleList(convolutions)
        self.project = nn.Linear(width, dim)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches (R, N, D), row by row, to predictions (R, N, D)."""
        image = tokens.transpose(1, 2).unflatten(2, grid)  # (R, D, rows, columns)
        for convolution in self.layers:
            # an even kernel makes one row and one column too many
            output = convolution(image)[:, :, : grid[0], : grid[1]]
            output = output.permute(0, 2, 3, 1)
            output = F.gelu(F.layer_norm(output, output.shape[-1:])).permute(0, 3, 1, 2)
            image = output + image if output.shape == image.shape else output
        return self.project(image.flatten(2).transpose(1, 2))


@contextmanager
def recorded_outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that is filled with the outputs of modules as they run within the block."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Tensor) -> None:
        outputs.append(output)

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def averaged_targets(layers: Sequence[Tensor]) -> Tensor:
    """The targets (B, N, D) in fp32 that are made of several blocks' features (B, N, D).

    Each is normalised over the patches of an image, per channel; their mean over channels.
    """
    normalised = []
    for features in layers:
        by_channel = features.float().transpose(1, 2)  # (B, D, N)
        normalised.append(F.instance_norm(by_channel).transpose(1, 2))
    mean = torch.stack(normalised).mean(dim=0)
    return F.layer_norm(mean, mean.shape[-1:])


def fresh_weights(encoder: MimRefinerModel) -> None:
    """Give an encoder data2vec 2.0's initial weights."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    patch = encoder.embeddings.patch_embeddings
    nn.init.xavier_uniform_(patch.weight.view(len(patch.weight), -1))
    assert patch.bias is not None and encoder.embeddings.cls_token is not None
    bound = 1 / math.sqrt(patch.weight[0].numel())
    nn.init.uniform_(patch.bias, -bound, bound)
    nn.init.normal_(encoder.embeddings.cls_token)
