"""The refinement step written straight from the method, one module per head.

The peer of the rows in `step.py`. No stacking, no custom gradient: `nn.Sequential` heads, a queue
that is normalised at every lookup, a loop over pairs of views, the whole last block, AdamW
parameter by parameter and an average in a loop. Its gradients equal ours; the rows assert that
first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim_refiner_hf import MimRefinerModel
from mim_refiner_hf.refinement.heads import GroupedLayer
from mim_refiner_hf.refinement.refiner import Refiner


def modules_of(layers: nn.Sequential, head: int) -> nn.Sequential:
    """Linear, batch norm (and GELU) per layer, with the weights of one of the stacked heads."""
    parts: list[nn.Module] = []
    for layer in layers:
        assert isinstance(layer, GroupedLayer)
        linear = nn.Linear(layer.weight.shape[2], layer.weight.shape[1], bias=False)
        linear.weight.data.copy_(layer.weight[head])
        parts += [linear, nn.BatchNorm1d(layer.weight.shape[1])]
        if layer.activation:
            parts.append(nn.GELU())
    return nn.Sequential(*parts)


class PlainQueue:
    """One head's queue of raw rows."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows.clone()
        self.index = torch.full((len(rows),), -1)
        self.pointer = 0

    @torch.no_grad()
    def lookup(self, targets: Tensor, sample_index: Tensor, topk: int, draw: Tensor) -> Tensor:
        """The drawn neighbour of each of one view's targets, (b, E) -> (b, E)."""
        rows = F.normalize(self.rows, dim=-1).to(targets.dtype)
        similarity = F.normalize(targets, dim=-1) @ rows.T
        similarity[sample_index[:, None] == self.index[None]] = -1.0
        positions = similarity.topk(topk, dim=-1).indices
        return self.rows[positions.gather(1, draw[:, None]).squeeze(1)]

    @torch.no_grad()
    def enqueue(self, projected: Tensor, sample_index: Tensor) -> None:
        """Overwrite the oldest rows; the queue's size is a multiple of the batch here."""
        place = slice(self.pointer, self.pointer + len(projected))
        self.rows[place] = projected.to(self.rows.dtype)
        self.index[place] = sample_index
        self.pointer = (self.pointer + len(projected)) % len(self.rows)


def plain_loss(
    targets: Tensor, neighbours: Tensor, predictions: Tensor, temperature: float
) -> Tensor:
    """Eq. 1 of one head, pair by pair: targets, neighbours (G, b, E), predictions (V, b, E)."""
    targets = F.normalize(targets, dim=-1).to(predictions.dtype)
    neighbours = F.normalize(neighbours, dim=-1).to(predictions.dtype)
    predictions = F.normalize(predictions, dim=-1).to(predictions.dtype)
    own = torch.arange(targets.shape[1])
    terms = []
    for i in range(len(targets)):
        for j in range(len(predictions)):
            if j == i:
                continue
            logits = (targets[i] @ predictions[j].T).float() / temperature
            swapped = (neighbours[i] * predictions[j]).sum(dim=-1).float() / temperature
            logits = logits.index_put((own, own), swapped)
            terms.append(F.cross_entropy(logits, own))
    return torch.stack(terms).mean()


class PlainStep:
    """Heads, queues and the loss of a `Refiner`, with copies of its weights."""

    def __init__(self, refiner: Refiner) -> None:
        count = len(refiner.head_blocks)
        self.refiner = refiner
        self.projectors = nn.ModuleList(
            modules_of(refiner.heads.projector, head) for head in range(count)
        )
        self.predictors = nn.ModuleList(
            modules_of(refiner.heads.predictor, head) for head in range(count)
        )
        raw = refiner.queue.rows * refiner.queue.norms.unsqueeze(-1)
        self.queues = [PlainQueue(rows) for rows in raw]

    def align(
        self, features: list[Tensor], sample_index: Tensor, topk: int, draw: Tensor
    ) -> Tensor:
        """The total loss of features (V * b, D) per head."""
        refiner = self.refiner
        losses = []
        for head, rows in enumerate(features):
            with torch.autocast("cpu", torch.bfloat16, enabled=refiner.bf16):
                projected = self.projectors[head](rows)
                predicted = self.predictors[head](projected)
            projected = projected.detach().unflatten(0, (refiner.settings.num_views, -1))
            predicted = predicted.unflatten(0, (refiner.settings.num_views, -1))

            queue = self.queues[head]
            targets = projected[: refiner.settings.num_global]
            found = []
            for view, drawn in zip(targets, draw[head], strict=True):
                found.append(queue.lookup(view, sample_index, topk, drawn))
            losses.append(
                plain_loss(targets, torch.stack(found), predicted, refiner.settings.temperature)
            )
            queue.enqueue(projected[0], sample_index)
        return torch.stack(losses).sum()

    def backward(
        self, views: list[Tensor], sample_index: Tensor, topk: int, draw: Tensor
    ) -> Tensor:
        """One whole step's gradients: every block for every token, all blocks recorded."""
        refiner = self.refiner
        encoder: MimRefinerModel = refiner.encoder
        groups: list[list[Tensor]] = []
        for group in views:
            pixels = group.transpose(0, 1).flatten(0, 1)
            with torch.autocast("cpu", torch.bfloat16, enabled=refiner.bf16):
                outputs = encoder(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
            tokens = [*outputs.hidden_states[1:-1], outputs.last_hidden_state]
            groups.append([encoder.pool(tokens[block]) for block in refiner.head_blocks])
        features = [torch.cat(parts) for parts in zip(*groups, strict=True)]
        loss = self.align(features, sample_index, topk, draw)
        loss.backward()
        return loss.detach()
