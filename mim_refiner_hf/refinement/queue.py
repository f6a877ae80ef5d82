"""The nearest-neighbour queue: the last projections of every head, searched for the most similar.

    queue = NearestNeighbourQueue(num_heads=8, size=65536, dim=256)
    found = queue.lookup(targets, sample_index, topk=20, draw=draw)       # look up first,
    queue.enqueue(targets[:, 0], sample_index, labels)                    # then enqueue view 0

Rows are kept as unit vectors and their norms; the product of both is the projection as it was
enqueued. So a lookup normalises nothing but its own targets. Sample indices, labels and ages are
shared by all heads. Nothing here waits for the device.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Shapes below: H heads, V global views, b images of this process, B images of all processes,
# Q rows of the queue, E the width of a projection.


class Neighbours(NamedTuple):
    """What a lookup found for every head, view and sample.

    Attributes:
        rows: the neighbours, unit vectors (H, V, b, E).
        positions: their places in the queue (H, V, b).
        similarity: their cosine to the target (H, V, b).
        found: whether any row was allowed to be the sample's neighbour (b,); where none was,
            `rows` holds the target itself. None where all rows are.
    """

    rows: Tensor
    positions: Tensor
    similarity: Tensor
    found: Tensor | None = None


class NearestNeighbourQueue(nn.Module):
    """First-in-first-out queue of projections, one per head, stacked (paper, Sec. 3; NNCLR).

    Args:
        num_heads: number of heads H.
        size: rows Q of each head (paper: 65536); a batch of all processes has to fit in.
        dim: width E of a projection.
        seed: the start rows N(0, 1) are a pure function of the shapes and this seed.

    Example:
        >>> queue = NearestNeighbourQueue(num_heads=2, size=8, dim=4)
        >>> queue.lookup(torch.randn(2, 1, 3, 4), torch.arange(3)).rows.shape
        torch.Size([2, 1, 3, 4])
    """

    rows: Tensor
    norms: Tensor
    sample_index: Tensor
    labels: Tensor
    age: Tensor
    pointer: Tensor

    def __init__(self, num_heads: int, size: int, dim: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(num_heads, size, dim, generator=generator)
        norms = start.norm(dim=-1)

        # per head
        self.register_buffer("rows", start / norms.unsqueeze(-1))
        self.register_buffer("norms", norms)
        # shared by all heads; -1 marks a start row, which belongs to no sample
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
        allowed: Tensor | None = None,
    ) -> Neighbours:
        """The nearest neighbour of every target, or one drawn from its `topk` nearest.

        Args:
            targets: projections of the global views (H, V, b, E), of any norm.
            sample_index: place of each sample in the data set (b,). A row of the same sample is
                out: its similarity counts as -1.
            topk: how many of the nearest rows to draw from.
            draw: which of them to take, integers (H, V, b) in [0, topk); None takes the nearest.
            exclude_self: False in evaluation, where a sample may find itself.
            allowed: which rows may be the sample's neighbours (b, Q); None for all. Of fewer than
                `topk`, `draw` takes one of those there are.
        """
        heads, views, batch, _ = targets.shape
        unit = F.normalize(targets, dim=-1).flatten(1, 2)
        similarity = torch.bmm(unit, self.rows.transpose(1, 2).to(unit.dtype))
        similarity = similarity.view(heads, views, batch, -1)  # (H, V, b, Q)

        if exclude_self:
            same_sample = sample_index.unsqueeze(1) == self.sample_index  # (b, Q)
            similarity.masked_fill_(same_sample, -1.0)

        if allowed is not None:
            similarity.masked_fill_(~allowed, -torch.inf)

        values, positions = similarity.topk(topk, dim=-1)  # (H, V, b, topk)
        pick = torch.zeros_like(positions[..., :1]) if draw is None else draw.unsqueeze(-1)
        if allowed is not None:
            pick = pick % allowed.sum(dim=1).clamp(1, topk).unsqueeze(-1)
        positions = positions.gather(-1, pick).squeeze(-1)
        values = values.gather(-1, pick).squeeze(-1)

        head = torch.arange(heads, device=targets.device).view(-1, 1, 1)
        rows = self.rows[head, positions]
        if allowed is None:
            return Neighbours(rows, positions, values)
        found = allowed.any(dim=1)
        own = unit.view_as(targets).to(rows.dtype)
        return Neighbours(torch.where(found.unsqueeze(-1), rows, own), positions, values, found)

    @torch.no_grad()
    def enqueue(self, projected: Tensor, sample_index: Tensor, labels: Tensor) -> None:
        """Put a batch in the place of the oldest rows; wraps around at the end.

        Args:
            projected: projections of global view 0 of all processes (H, B, E).
            sample_index: place of each sample in the data set (B,).
            labels: class of each sample (B,), -1 for none.
        """
        batch = projected.shape[1]
        size = self.rows.shape[1]
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
        """How evenly the last `count` projections of each head point in all directions (H,).

        1 for evenly, 0 for all in the same direction: the standard deviation over the
        projections, averaged over the dimensions, times sqrt(E). Its fall to 0 is collapse
        (Chen & He 2021, SimSiam, Fig. 2).
        """
        size = self.rows.shape[1]
        places = (self.pointer - count + torch.arange(count, device=self.rows.device)) % size
        deviation = self.rows[:, places].std(dim=1).mean(dim=1)
        return deviation * self.rows.shape[2] ** 0.5
