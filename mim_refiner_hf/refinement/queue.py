"""The nearest-neighbour queue: the last projections of every head, and for each sample the most similar of them.

    queue = NearestNeighbourQueue(num_heads=8, size=65536, dim=256)
    found = queue.lookup(targets, sample_index, topk=20, draw=draw)       # look up first ...
    queue.enqueue(targets[:, 0], sample_index, labels)                    # ... then enqueue global view 0

Rows are kept as unit vectors and their norms (the product is the projection as it was enqueued), so a lookup normalises nothing
but its own targets. Sample indices, labels and ages are shared by all heads. No step of it waits for the device.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Neighbours(NamedTuple):
    """The result of a lookup, per head, view and sample: unit row (H, V, b, E), its place in the queue and cosine (H, V, b)."""

    rows: Tensor
    positions: Tensor
    similarity: Tensor


class NearestNeighbourQueue(nn.Module):
    """First-in-first-out queue of projections (paper, Sec. 3; NNCLR), one per head, stacked.

    Args:
        num_heads: number of heads H.
        size: rows Q per head (paper: 65536); a batch of all processes must fit in.
        dim: width E of a projection.
        seed: the start rows N(0, 1) are a pure function of the shapes and this seed.
    """

    rows: Tensor
    norms: Tensor
    sample_index: Tensor
    labels: Tensor
    age: Tensor
    pointer: Tensor

    def __init__(self, num_heads: int, size: int, dim: int, seed: int = 0) -> None:
        super().__init__()
        start = torch.randn(num_heads, size, dim, generator=torch.Generator().manual_seed(seed))
        norms = start.norm(dim=-1)
        self.register_buffer("rows", start / norms.unsqueeze(-1))
        self.register_buffer("norms", norms)
        self.register_buffer("sample_index", torch.full((size,), -1))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("age", torch.zeros(size, dtype=torch.long))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def lookup(
        self,
        targets: Tensor,
        sample_index: Tensor,
        *,
        topk: int = 1,
        draw: Tensor | None = None,
        exclude_self: bool = True,
    ) -> Neighbours:
        """The nearest neighbour of every target, or one drawn from its `topk` nearest.

        Args:
            targets: projections of the global views (H, V, b, E), any norm.
            sample_index: data set index of each sample (b,); rows that hold the same index are out (similarity -1).
            draw: which of the `topk` nearest to take, integers (H, V, b) in [0, topk); None takes the nearest.
            exclude_self: False in evaluation, where a sample may find itself.
        """
        heads, views, batch, _ = targets.shape
        unit = F.normalize(targets, dim=-1).flatten(1, 2)
        similarity = torch.bmm(unit, self.rows.transpose(1, 2).to(unit.dtype)).view(
            heads, views, batch, -1
        )
        if exclude_self:
            similarity.masked_fill_(sample_index.unsqueeze(1) == self.sample_index, -1.0)
        values, positions = similarity.topk(topk, dim=-1)  # (H, V, b, topk)
        pick = torch.zeros_like(positions[..., :1]) if draw is None else draw.unsqueeze(-1)
        positions, values = (
            positions.gather(-1, pick).squeeze(-1),
            values.gather(-1, pick).squeeze(-1),
        )
        head = torch.arange(heads, device=targets.device).view(-1, 1, 1)
        return Neighbours(self.rows[head, positions], positions, values)

    @torch.no_grad()
    def enqueue(self, projected: Tensor, sample_index: Tensor, labels: Tensor) -> None:
        """Overwrite the oldest rows with the projections of global view 0 of ALL processes, (H, B, E); wraps around."""
        batch, size = projected.shape[1], self.rows.shape[1]
        places = (self.pointer + torch.arange(batch, device=projected.device)) % size
        projected = projected.to(self.rows.dtype)
        norms = projected.norm(dim=-1)
        self.rows[:, places] = projected / norms.clamp_min(1e-12).unsqueeze(-1)
        self.norms[:, places] = norms
        self.sample_index[places] = sample_index
        self.labels[places] = labels
        self.age += batch
        self.age[places] = batch
        self.pointer.copy_((self.pointer + batch) % size)

    def spread(self, count: int) -> Tensor:
        """How evenly the last `count` projections of each head point in all directions (H,): 1 for evenly, 0 for all in the same one.

        Standard deviation over the projections, mean over the dimensions, times sqrt(E); its fall to 0 is collapse (Chen & He 2021,
        SimSiam, Fig. 2).
        """
        places = (
            self.pointer - count + torch.arange(count, device=self.rows.device)
        ) % self.rows.shape[1]
        return self.rows[:, places].std(dim=1).mean(dim=1) * self.rows.shape[2] ** 0.5


__all__ = ["NearestNeighbourQueue", "Neighbours"]
