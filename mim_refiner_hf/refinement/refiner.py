"""One step of the refinement: views -> encoder -> heads <-> queue -> objective -> gradients.

    refiner = Refiner(encoder, head_blocks=[16, ..., 23], heads=heads, queue=queue, num_global=2, num_views=12, temperature=0.2)
    result = refiner.backward([global_views, local_views], sample_index, labels, topk=20, draw=draw)

The heads read the pooled tokens of their block, as the encoder's `config.pooling` says: raw block outputs, and for the last block
the encoder's OUTPUT, final norm included. With "global_repr" the output's head reads CAPI's predictor, which was trained on the
output and nothing else, and the heads on earlier blocks the mean of the patches. Targets are the same projector's output on the
global views, detached; there is no momentum encoder. `backward` leaves gradients in the parameters and does nothing else to them.

A batch that does not fit goes through the encoder in micro-batches, exactly: features of all micro-batches without a graph, then
heads, queue and loss once on the whole batch (batch norm and negatives see all of it), then each micro-batch again with the
gradient of its features. The result is the gradient of the whole batch, at the memory of one micro-batch. Both passes see the same:
nothing in the encoder is random (no dropout, no drop path). A last micro-batch that is smaller than the others changes nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed import all_gather, all_gather_with_gradient, rank, world_size
from ..last_block import prefix_tokens_only
from ..modeling_mim_refiner import MimRefinerModel
from ..sharding import synchronise
from .heads import IdHeads
from .objective import Swap, nna_loss, pair_weights
from .queue import NearestNeighbourQueue


@dataclass(frozen=True)
class StepResult:
    """What a step tells: the total loss (a scalar) and, per head, (heads,) tensors of what is worth watching."""

    loss: Tensor
    head_losses: Tensor
    alignment: Tensor
    neighbour_similarity: Tensor
    neighbour_age: Tensor
    neighbour_accuracy: Tensor  # nan where no sample and neighbour have labels


def neighbour_draw(seed: int, step: int, topk: int, heads: int, views: int, batch: int) -> Tensor | None:
    """Which of the topk neighbours each (head, view, sample of this process) takes; a pure function of seed and step.

    `batch` is this process's share; the draw is made for all processes and sliced, so their number does not change it.
    """
    if topk == 1:
        return None
    state = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
    generator = torch.Generator().manual_seed(state)
    draw = torch.randint(topk, (heads, views, batch * world_size()), generator=generator)
    return draw[:, :, rank() * batch : (rank() + 1) * batch]


def view_major(views: Tensor) -> Tensor:
    """(batch, views, C, S, S) -> (views * batch, C, S, S): all samples of view 0 first."""
    return views.transpose(0, 1).flatten(0, 1)


class Refiner(nn.Module):
    """Encoder, heads and queue, and how one batch of views becomes gradients.

    Args:
        encoder: the model to refine.
        head_blocks: 0-based blocks that carry a head, ascending; the last block stands for the encoder's output.
        heads, queue: `IdHeads` and `NearestNeighbourQueue` with `len(head_blocks)` heads.
        num_global, num_views: how many global views, and views in all, an image has.
        temperature: tau of the objective.
        swap: where the neighbour replaces the target, see `objective.nna_loss`.
        bf16: autocast encoder and heads to bfloat16; weights, losses and gradients stay fp32.
    """

    weights: Tensor

    def __init__(
        self,
        encoder: MimRefinerModel,
        head_blocks: Sequence[int],
        heads: IdHeads,
        queue: NearestNeighbourQueue,
        *,
        num_global: int,
        num_views: int,
        temperature: float,
        swap: Swap = "positive",
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.heads, self.queue = encoder, heads, queue
        self.head_blocks = list(head_blocks)
        self.num_global, self.num_views = num_global, num_views
        self.temperature, self.swap, self.bf16 = temperature, swap, bf16
        self.register_buffer("weights", pair_weights(num_global, num_views), persistent=False)

    @property
    def head_names(self) -> list[str]:
        """Names for logs: `block16`, ..., and `output` for the head on the encoder's output."""
        last = self.encoder.config.num_hidden_layers - 1
        return ["output" if block == last else f"block{block}" for block in self.head_blocks]

    def encode(self, pixels: Tensor) -> Tensor:
        """Pooled features of every head block, (heads, N, D), of images (N, C, S, S) of any size the patch divides."""
        last = self.encoder.config.num_hidden_layers - 1
        inner = [block + 1 for block in self.head_blocks if block != last]
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            outputs = self.encoder(pixels, interpolate_pos_encoding=True, output_hidden_states=inner)
        features = [self.encoder.pool(outputs.hidden_states[block + 1]) for block in self.head_blocks if block != last]
        if last in self.head_blocks:
            reads_predictor = self.encoder.config.pooling == "global_repr"
            features.append(outputs.pooler_output if reads_predictor else self.encoder.pool(outputs.last_hidden_state))
        return torch.stack(features)

    def encode_views(self, views: Sequence[Tensor]) -> Tensor:
        """`encode` for groups of views (batch, views, C, S, S) of one size each: (heads, views * batch, D), view-major."""
        return torch.cat([self.encode(view_major(group)) for group in views if group.shape[1]], dim=1)

    def align(
        self,
        features: Tensor,
        sample_index: Tensor,
        labels: Tensor,
        *,
        topk: int = 1,
        draw: Tensor | None = None,
        head_weights: Sequence[float] | None = None,
    ) -> StepResult:
        """Heads, neighbours, loss and enqueue for features (heads, views * batch, D) of this process's share of the batch."""
        batch = len(sample_index)
        with torch.autocast(features.device.type, torch.bfloat16, enabled=self.bf16):
            projected, predicted = self.heads(features)
        projected = projected.detach().unflatten(1, (self.num_views, batch))  # (H, V, b, E)
        predicted = predicted.unflatten(1, (self.num_views, batch))
        targets = projected[:, : self.num_global]
        found = self.queue.lookup(targets, sample_index, topk=topk, draw=draw)
        head_losses, alignment = nna_loss(
            targets,
            found.rows,
            all_gather_with_gradient(predicted, dim=2),
            self.weights,
            temperature=self.temperature,
            swap=self.swap,
            first_row=rank() * batch,
        )
        weights = head_losses.new_tensor([1.0] * len(head_losses) if head_weights is None else list(head_weights))
        neighbour_labels = self.queue.labels[found.positions]  # (H, G, b)
        known = (labels >= 0) & (neighbour_labels >= 0)
        same = (neighbour_labels == labels) & known
        result = StepResult(
            loss=(head_losses * weights).sum(),
            head_losses=head_losses.detach(),
            alignment=alignment,
            neighbour_similarity=found.similarity.float().mean(dim=(1, 2)),
            neighbour_age=self.queue.age[found.positions].float().mean(dim=(1, 2)),
            neighbour_accuracy=same.sum(dim=(1, 2)) / known.sum(dim=(1, 2)),
        )
        self.queue.enqueue(all_gather(projected[:, 0], dim=1), all_gather(sample_index), all_gather(labels))
        return result

    def backward(
        self,
        views: Sequence[Tensor],
        sample_index: Tensor,
        labels: Tensor,
        *,
        topk: int = 1,
        draw: Tensor | None = None,
        head_weights: Sequence[float] | None = None,
        train_encoder: bool = True,
        micro_batch_size: int | None = None,
    ) -> StepResult:
        """One step's gradients, from groups of normalised views (batch, views, C, S, S), global views first.

        Args:
            sample_index, labels: data set index and label (-1: none) of each sample (batch,).
            topk, draw, head_weights: see `NearestNeighbourQueue.lookup`, `objective.head_weights`.
            train_encoder: False in the head warm-up, where the encoder runs without a graph.
            micro_batch_size: images per pass through the encoder; None for all at once.
        """
        settings: dict[str, Any] = {"topk": topk, "draw": draw, "head_weights": head_weights}
        with prefix_tokens_only(self.encoder):
            if train_encoder and micro_batch_size is None:
                result = self.align(self.encode_views(views), sample_index, labels, **settings)
                result.loss.backward()
                return result
            features = self._features(views, micro_batch_size or len(sample_index), train_encoder)
            result = self.align(features.flatten(1, 2), sample_index, labels, **settings)
            result.loss.backward()
            if train_encoder:
                assert features.grad is not None
                for pixels, which, images in self._micro_batches(views, micro_batch_size or len(sample_index)):
                    # sharded gradients are added up whole, and reduced after the last micro-batch of the last view
                    synchronise(self.encoder, which.stop == self.num_views and images.stop >= len(sample_index))
                    self.encode(pixels).backward(features.grad[:, which, images].flatten(1, 2))
        return result

    def _features(self, views: Sequence[Tensor], micro: int, train_encoder: bool) -> Tensor:
        """Pooled features of every head block, (heads, views, batch, D), without the encoder's graph."""
        shape = (len(self.head_blocks), self.num_views, len(views[0]), self.encoder.config.hidden_size)
        features = torch.empty(shape, dtype=self.encoder.dtype, device=views[0].device)
        with torch.no_grad():  # not inference mode: FSDP2 keeps the tensors that it gathers weights into for the backward pass
            for pixels, which, images in self._micro_batches(views, micro):
                features[:, which, images] = self.encode(pixels).unflatten(1, (which.stop - which.start, -1))
        return features.requires_grad_(train_encoder)

    @staticmethod
    def _micro_batches(views: Sequence[Tensor], micro: int) -> Iterator[tuple[Tensor, slice, slice]]:
        """Views of one size of at most `micro` images at a time: view-major pixels, which views they are, which images."""
        first = 0
        for group in views:
            which = slice(first, first := first + group.shape[1])
            for start in range(0, len(group) if group.shape[1] else 0, micro):
                yield view_major(group[start : start + micro]), which, slice(start, start + micro)


__all__ = ["Refiner", "StepResult", "neighbour_draw", "view_major"]
