"""CAPI's online clustering: a linear layer that shares the patches out among prototypes, equally.

    layer = ClusteringLayer(dim=1024, prototypes=16384)
    targets, loss = layer.assign(features, predicted, backward=True)    # (b, P, K), a scalar

Sinkhorn's iterations (arXiv 2006.09882) turn the layer's logits into assignments that give every
prototype as much as every other. CAPI does so for every position of the grid on its own, over the
images of the batch; then the position of a patch says nothing about its prototype. Assignments,
logits and losses are in single precision, whatever the encoder computes in.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.distributed import reduced

# Shapes below: b images of this process, B of all, N positions, P of them predicted, D width of
# the encoder, K prototypes.

_EPSILON = 1e-8
# the largest exponent: e^50 is far from the ends of single precision on both sides
_LARGEST = 50.0


@torch.no_grad()
def sinkhorn(logits: Tensor, iterations: int = 3) -> Tensor:
    """Assignments (..., b, K) of logits that are divided by their temperature, (..., b, K).

    Every iteration divides by the sum over the images of all processes, then by the sum over the
    prototypes. A row sums to 1, or to 0 where all of it has underflowed.
    """
    # the shift is per prototype, not per row: it cancels in the first division
    shift = reduced(logits.amax(dim=-2, keepdim=True), "max")
    shares = (logits + _LARGEST - shift).exp()
    for _ in range(iterations):
        shares /= reduced(shares.sum(dim=-2, keepdim=True), "sum") + _EPSILON
        shares /= shares.sum(dim=-1, keepdim=True) + _EPSILON
    return shares


class Clustered(NamedTuple):
    """What the clustering layer makes of a batch.

    Attributes:
        targets: assignments of the predicted patches (b, P, K), detached.
        loss: of the layer, the mean over the patches of this process; detached.
    """

    targets: Tensor
    loss: Tensor


class ClusteringLayer(nn.Module):
    """Prototypes as one linear layer, and how they learn from the teacher's patches.

    Args:
        dim: width of the encoder.
        prototypes: how many there are.
        positionwise: Sinkhorn for every position on its own; False: one over all patches.
        target_temperature: of the logits that are shared out.
        temperature: of the logits that learn from it.
        iterations: of Sinkhorn.
        chunk: positions at a time, if `positionwise`; bounds the memory, changes nothing.

    Example:
        >>> layer = ClusteringLayer(dim=8, prototypes=4)
        >>> layer.assign(torch.randn(6, 9, 8), torch.zeros(6, 2, dtype=torch.long)).targets.shape
        torch.Size([6, 2, 4])
    """

    def __init__(
        self,
        dim: int,
        prototypes: int,
        *,
        positionwise: bool = True,
        target_temperature: float = 0.06,
        temperature: float = 0.12,
        iterations: int = 3,
        chunk: int = 16,
    ) -> None:
        super().__init__()
        self.layer = nn.Linear(dim, prototypes)
        nn.init.normal_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        self.positionwise = positionwise
        self.target_temperature = target_temperature
        self.temperature = temperature
        self.iterations = iterations
        self.chunk = chunk

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (..., K) of features (..., b, D) and their assignments, which have no gradient."""
        logits = self.layer(F.normalize(features.to(self.layer.weight.dtype), dim=-1, eps=1e-7))
        scaled = logits.detach() / self.target_temperature
        if self.positionwise:
            return logits, sinkhorn(scaled, self.iterations)
        rows = sinkhorn(scaled.flatten(0, -2), self.iterations)
        return logits, rows.view_as(logits)

    def assign(self, features: Tensor, predicted: Tensor, *, backward: bool = False) -> Clustered:
        """Targets and the layer's loss, for the teacher's patches (b, N, D).

        Args:
            predicted: positions of which the targets are kept (b, P).
            backward: leave the gradients of the loss in the layer.
        """
        batch, positions, _ = features.shape
        weight = self.layer.weight
        targets = weight.new_empty(*predicted.shape, len(weight))
        loss = weight.new_zeros(())

        # positions are problems of their own, so that they come in chunks; one alone does not
        chunk = self.chunk if self.positionwise else positions
        full = torch.autocast(features.device.type, enabled=False)
        with full, torch.set_grad_enabled(backward):
            for first in range(0, positions, chunk):
                part = features[:, first : first + chunk].transpose(0, 1)  # (n, b, D)
                logits, assigned = self(part)
                learnt = F.log_softmax(logits / self.temperature, dim=-1)
                own = -(assigned * learnt).sum() / (batch * positions)
                if backward:
                    own.backward()
                loss += own.detach()

                inside = (predicted >= first) & (predicted < first + len(part))
                image, place = inside.nonzero(as_tuple=True)
                targets[image, place] = assigned[predicted[image, place] - first, image]
        return Clustered(targets, loss)
