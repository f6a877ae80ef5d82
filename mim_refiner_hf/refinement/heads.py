"""ID heads: the projectors and predictors of all head blocks, as one stacked set of parameters.

    heads = IdHeads(8, dim=1024, projector_dim=2048, predictor_dim=4096, embedding_dim=256)
    projected, predicted = heads(features)    # (8, views*batch, 1024) -> 2 x (8, views*batch, 256)

Each head is, as in the paper's released code, a projector [Linear-BN-GELU] x 2, [Linear-BN] and a
predictor [Linear-BN-GELU], [Linear-BN]; linear without bias, batch norm affine. Batch statistics
run over ALL views of ALL processes in one pass. Inside, a feature is a column, (heads, dim,
views*batch): then every layer is one batched matrix product and one batch norm over heads*dim
channels, whatever the number of heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.batch_norm import GroupedBatchNorm

# Shapes below: H heads, N columns (views * images of this process).


class GroupedLayer(nn.Module):
    """[Linear-BN(-GELU)] of every head at once, (H, dim_in, N) -> (H, dim_out, N)."""

    def __init__(self, heads: int, dim_in: int, dim_out: int, activation: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, dim_out, dim_in))
        self.norm = GroupedBatchNorm(heads, dim_out)
        self.activation = activation

    def reset(self, generator: torch.Generator) -> None:
        """Xavier-uniform: U(-a, a) with a = sqrt(6 / (fan_in + fan_out)) of one head."""
        bound = math.sqrt(6 / (self.weight.shape[1] + self.weight.shape[2]))
        with torch.no_grad():
            self.weight.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.bmm(self.weight, x))
        return F.gelu(x) if self.activation else x


class IdHeads(nn.Module):
    """All instance-discrimination heads (paper, Sec. 3 and Table 10).

    Args:
        num_heads: number of heads H, one per head block.
        dim: width D of the encoder.
        projector_dim, predictor_dim: hidden widths (paper: 2048, 4096).
        embedding_dim: width E of projections and predictions (paper: 256).
        seed: the weights are a pure function of the shapes and this seed.

    Example:
        >>> heads = IdHeads(2, dim=8, projector_dim=16, predictor_dim=16, embedding_dim=4)
        >>> projected, predicted = heads(torch.randn(2, 6, 8))
        >>> predicted.shape
        torch.Size([2, 6, 4])
    """

    def __init__(
        self,
        num_heads: int,
        dim: int,
        projector_dim: int,
        predictor_dim: int,
        embedding_dim: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.projector = nn.Sequential(
            GroupedLayer(num_heads, dim, projector_dim, activation=True),
            GroupedLayer(num_heads, projector_dim, projector_dim, activation=True),
            GroupedLayer(num_heads, projector_dim, embedding_dim, activation=False),
        )
        self.predictor = nn.Sequential(
            GroupedLayer(num_heads, embedding_dim, predictor_dim, activation=True),
            GroupedLayer(num_heads, predictor_dim, embedding_dim, activation=False),
        )

        generator = torch.Generator().manual_seed(seed)
        for layer in self.modules():
            if isinstance(layer, GroupedLayer):
                layer.reset(generator)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features (H, N, D) -> projected, predicted (H, N, E); neither is L2-normalised."""
        projected = self.projector(features.transpose(1, 2))
        predicted = self.predictor(projected)
        return projected.transpose(1, 2), predicted.transpose(1, 2)


__all__ = ["GroupedLayer", "IdHeads"]
