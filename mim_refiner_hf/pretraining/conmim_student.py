"""What ConMIM's two networks have beside an encoder, and the encoder's start.

    head = ConmimHead(dim=768, hidden=4096, size=256)
    vectors = head(tokens)          # (b, T, 768) -> (b, T, 256)

The projector reads every token, CLS too; its batch norm runs over all of them, of all processes.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.modeling_mim_refiner import MimRefinerModel
from ..model.positions_mim_refiner import RelativePositionBias
from ..runtime.arithmetic import full_precision
from ..runtime.batch_norm import GroupedBatchNorm

# Shapes below: b images, N patches, T tokens, D width of the encoder, E width of what is
# contrasted, R rows.

_STD = 0.02


class ProjectorLayer(nn.Module):
    """[Linear-BN(-ReLU)] of rows (R, dim_in) -> (R, dim_out), linear without bias."""

    def __init__(self, dim_in: int, dim_out: int, last: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim_out, dim_in))
        nn.init.trunc_normal_(self.weight, std=_STD, a=-_STD, b=_STD)
        self.norm = GroupedBatchNorm(1, dim_out, affine=not last)
        self.last = last

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm(F.linear(tokens, self.weight).T.unsqueeze(0))[0].T
        return normed if self.last else F.relu(normed)


class ConmimHead(nn.Module):
    """What one of the two networks has beside its encoder: a mask token, and the projector.

    Args:
        dim: width of the encoder.
        hidden: width of the projector's hidden layers.
        size: width of what is contrasted.
    """

    def __init__(self, dim: int, hidden: int, size: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.trunc_normal_(self.mask_token, std=_STD, a=-_STD, b=_STD)
        self.projector = nn.Sequential(
            ProjectorLayer(dim, hidden, last=False),
            ProjectorLayer(hidden, hidden, last=False),
            ProjectorLayer(hidden, size, last=True),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Unit vectors (b, T, E) of all tokens (b, T, D), in single precision."""
        rows = self.projector(tokens.flatten(0, 1))
        return F.normalize(full_precision(rows), dim=-1).view(*tokens.shape[:2], -1)


@torch.no_grad()
def conmim_start_weights(encoder: MimRefinerModel) -> None:
    """Give a fresh encoder the authors' initial weights; norms and layer scale have them already.

    Normal with a deviation of 0.02, cut at one deviation; biases and relative positions 0. What
    each block adds is divided by sqrt(2 block), counted from 1.
    """

    def draw(tensor: Tensor) -> None:
        nn.init.trunc_normal_(tensor, std=_STD, a=-_STD, b=_STD)

    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RelativePositionBias):
            nn.init.zeros_(module.table)
    if encoder.embeddings.cls_token is not None:
        draw(encoder.embeddings.cls_token)

    blocks: Any = encoder.layers
    for number, block in enumerate(blocks, start=1):
        block.attention.o_proj.weight /= math.sqrt(2 * number)
        block.mlp.fc2.weight /= math.sqrt(2 * number)
