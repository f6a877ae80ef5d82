"""ID heads: the projectors and predictors of all head blocks, as one stacked set of parameters.

    heads = IdHeads(8, dim=1024, projector_dim=2048, predictor_dim=4096, embedding_dim=256)
    projected, predicted = heads(features)    # (8, views*batch, 1024) -> 2 x (8, views*batch, 256)

Each head is, as in the paper's released code, a projector [Linear-BN-GELU] x 2, [Linear-BN] and a
predictor [Linear-BN-GELU], [Linear-BN]; linear without bias, batch norm affine. Batch statistics
run over ALL views of ALL processes in one pass. Inside, a feature is a column, (heads, dim,
views*batch): then every layer is one batched matrix product and one batch norm over heads*dim
channels, whatever the number of heads.

MAE-CT's heads have ReLU, no batch norm at the predictor's end, and a pass for each view, so that
batch statistics are those of one view: `heads(features, passes=views)`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.batch_norm import GroupedBatchNorm
from .choices import Activation, HeadInit

# Shapes below: H heads, N columns (views * images of this process).


class GroupedLayer(nn.Module):
    """[Linear(-BN)(-activation)] of every head at once, (H, dim_in, N) -> (H, dim_out, N)."""

    def __init__(
        self,
        heads: int,
        dim_in: int,
        dim_out: int,
        activation: Activation | None,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, dim_out, dim_in))
        self.norm = GroupedBatchNorm(heads, dim_out) if norm else nn.Identity()
        self.activation = activation

    def reset(self, generator: torch.Generator, init: HeadInit) -> None:
        """First weights: U(-a, a), with a by the fans of one head.

        "xavier" is a = sqrt(6 / (fan_in + fan_out)), "kaiming" a = 1 / sqrt(fan_in), which is
        kaiming-uniform with a slope of sqrt(5), the start of torch's linear layers.
        """
        _, fan_out, fan_in = self.weight.shape
        bound = 1 / math.sqrt(fan_in)
        if init == "xavier":
            bound = math.sqrt(6 / (fan_out + fan_in))
        with torch.no_grad():
            self.weight.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.bmm(self.weight, x))
        match self.activation:
            case "gelu":
                return F.gelu(x)
            case "relu":
                return F.relu(x)
        return x


class IdHeads(nn.Module):
    """All instance-discrimination heads (paper, Sec. 3 and Table 10).

    Args:
        num_heads: number of heads H, one per head block.
        dim: width D of the encoder.
        projector_dim, predictor_dim: hidden widths (paper: 2048, 4096).
        embedding_dim: width E of projections and predictions (paper: 256).
        seed: the weights are a pure function of the shapes, `init` and this seed.
        activation: between the layers.
        predictor_norm: whether a predictor ends with a batch norm.
        init: how the weights are drawn, see `GroupedLayer.reset`.

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
        *,
        activation: Activation = "gelu",
        predictor_norm: bool = True,
        init: HeadInit = "xavier",
    ) -> None:
        super().__init__()
        self.projector = nn.Sequential(
            GroupedLayer(num_heads, dim, projector_dim, activation),
            GroupedLayer(num_heads, projector_dim, projector_dim, activation),
            GroupedLayer(num_heads, projector_dim, embedding_dim, None),
        )
        self.predictor = nn.Sequential(
            GroupedLayer(num_heads, embedding_dim, predictor_dim, activation),
            GroupedLayer(num_heads, predictor_dim, embedding_dim, None, predictor_norm),
        )

        generator = torch.Generator().manual_seed(seed)
        for layer in self.modules():
            if isinstance(layer, GroupedLayer):
                layer.reset(generator, init)

    def forward(self, features: Tensor, passes: int = 1) -> tuple[Tensor, Tensor]:
        """features (H, N, D) -> projected, predicted (H, N, E); neither is L2-normalised.

        `passes` is as of `in_passes`.
        """
        projected = in_passes(self.projector, features.transpose(1, 2), passes)
        predicted = in_passes(self.predictor, projected, passes)
        return projected.transpose(1, 2), predicted.transpose(1, 2)


def in_passes(layers: nn.Module, x: Tensor, passes: int) -> Tensor:
    """`layers` of x (H, C, N), its columns in so many equal passes, one after the other.

    With a pass for each view, batch norm sees one view at a time.
    """
    if passes == 1:
        columns: Tensor = layers(x)
        return columns
    return torch.cat([layers(part) for part in x.chunk(passes, dim=2)], dim=2)
