"""One step of the refinement: views -> encoder -> heads <-> queue -> objective -> gradients.

    refiner = Refiner(encoder, head_blocks=[16, ..., 23], heads=heads, queue=queue, num_global=2, num_views=12, temperature=0.2)
    result = refiner.backward([global_views, local_views], sample_index, labels, topk=20, draw=draw)

The heads read the pooled tokens of their block, as the encoder's `config.pooling` says: raw block outputs, and for the last block
the encoder's OUTPUT, final norm included. With "global_repr" the output's head reads CAPI's predictor, which was trained on the
output and nothing else, and the heads on earlier blocks the mean of the patches. Targets are the same projector's output on the
global views, detached; there is no momentum encoder. `backward` leaves gradients in the parameters and does nothing else to them.

The loss is computed from detached features; its gradient at the features then goes back through the encoder, one size of views
after the other. A batch that does not fit does so in micro-batches, exactly: their features are made without a graph, heads, queue
and loss see the whole batch once (batch norm and negatives included), and each micro-batch passes again for its gradient. The result
is the gradient of the whole batch, at the activation memory of one micro-batch. Both passes see the same: nothing in the encoder is
random (no dropout, no drop path). A last micro-batch that is smaller than the others changes nothing.

A second forward beside forward (1) and backward (2) is at most 4/3 of the encoder's time. Of few micro-batches the largest is not
computed twice: its graph waits for its gradient (`keeps_a_graph`). Measured: `python -m benchmarks micro-batches micro-batches-half`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..model.last_block import prefix_tokens_only
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import all_gather, all_gather_with_gradient, rank, world_size
from ..runtime.sharding import synchronise
from .heads import IdHeads
from .loss import Swap, nna_loss, pair_weights
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


def neighbour_draw(
    seed: int, step: int, topk: int, heads: int, views: int, batch: int
) -> Tensor | None:
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


KEPT_OF = 4
"""Up to so many micro-batches, one graph is kept: by count 3 % of the encoder's work at 4, not worth its memory beyond."""


def keeps_a_graph(batch: int, micro: int) -> bool:
    """Whether a step of `batch` images, `micro` at a time, keeps a micro-batch's graph while heads and loss are computed."""
    return batch <= KEPT_OF * micro


class _Pass(NamedTuple):
    """Views of one size (images, views, C, S, S) that go through the encoder together: which views, and images, of the batch."""

    group: Tensor
    views: slice
    images: slice

    @property
    def pixels(self) -> Tensor:
        return view_major(self.group)


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
            outputs = self.encoder(
                pixels, interpolate_pos_encoding=True, output_hidden_states=inner
            )
        features = [
            self.encoder.pool(outputs.hidden_states[block + 1])
            for block in self.head_blocks
            if block != last
        ]
        if last in self.head_blocks:
            reads_predictor = self.encoder.config.pooling == "global_repr"
            features.append(
                outputs.pooler_output
                if reads_predictor
                else self.encoder.pool(outputs.last_hidden_state)
            )
        return torch.stack(features)

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
        weights = head_losses.new_tensor(
            [1.0] * len(head_losses) if head_weights is None else list(head_weights)
        )
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
        self.queue.enqueue(
            all_gather(projected[:, 0], dim=1), all_gather(sample_index), all_gather(labels)
        )
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
        batch = len(sample_index)
        passes = self._passes(views, micro_batch_size or batch)
        keep = (
            len(passes) if micro_batch_size is None else int(keeps_a_graph(batch, micro_batch_size))
        )
        with prefix_tokens_only(self.encoder):
            features, kept = self._features(passes, batch, keep * train_encoder)
            result = self.align(
                features.requires_grad_(train_encoder).flatten(1, 2),
                sample_index,
                labels,
                **settings,
            )
            result.loss.backward()
            for number, each in enumerate(passes if train_encoder else []):
                assert features.grad is not None
                encoded = kept[number] if number < keep else self.encode(each.pixels)
                # in micro-batches sharded gradients are added up whole, and reduced after the last one
                synchronise(self.encoder, micro_batch_size is None or number == len(passes) - 1)
                encoded.backward(features.grad[:, each.views, each.images].flatten(1, 2))
        return result

    def _features(
        self, passes: Sequence[_Pass], batch: int, keep: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Pooled features of every head block (heads, views, batch, D), detached, and those of the first `keep` passes with graph."""
        shape = (len(self.head_blocks), self.num_views, batch, self.encoder.config.hidden_size)
        features = torch.empty(shape, dtype=self.encoder.dtype, device=passes[0].group.device)
        with torch.no_grad():  # not inference mode: FSDP2 keeps the tensors that it gathers weights into for the backward pass
            for each in passes[keep:]:
                features[:, each.views, each.images] = self.encode(each.pixels).unflatten(
                    1, (-1, len(each.group))
                )
        kept = [self.encode(each.pixels) for each in passes[:keep]]
        for each, encoded in zip(passes, kept, strict=False):
            features[:, each.views, each.images] = encoded.detach().unflatten(
                1, (-1, len(each.group))
            )
        return features, kept

    @staticmethod
    def _passes(views: Sequence[Tensor], micro: int) -> list[_Pass]:
        """What goes through the encoder together, largest first: views of one size of at most `micro` images."""
        passes, first = [], 0
        for group in views:
            which = slice(first, first := first + group.shape[1])
            starts = range(0, len(group) if group.shape[1] else 0, micro)
            passes += [
                _Pass(group[start : start + micro], which, slice(start, start + micro))
                for start in starts
            ]
        return sorted(passes, key=lambda each: each.group.numel(), reverse=True)


__all__ = ["Refiner", "StepResult", "keeps_a_graph", "neighbour_draw", "view_major"]
