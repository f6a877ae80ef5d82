"""One step of the refinement: views -> encoder -> heads <-> queue -> loss -> gradients.

    settings = NnaSettings(num_global=2, num_views=12, temperature=0.2)
    refiner = Refiner(encoder, head_blocks, heads, queue, settings)
    draw = neighbour_draw(seed, step, topk=20, heads=8, views=2, batch=64)
    result = refiner.backward([global_views, local_views], sample_index, labels, topk=20, draw=draw)

The heads read the pooled tokens of their block, as the encoder's `config.pooling` says: raw block
outputs, and for the last block the encoder's OUTPUT, final norm (or CLIP's norm of the pooled
vector) included. With "global_repr" and "attention" the output's head reads CAPI's predictor or the
attention pooling, which were trained on the output and nothing else, and the heads on earlier
blocks the mean of the patches. Targets are the same projector's output on the
global views, detached; there is no momentum encoder. `backward` leaves gradients in the parameters
and does nothing else to them.

With `target_momentum`, as MAE-CT, the targets of the refinement and what is enqueued are from a
copy of the projectors that follows them (`start_momentum`, `follow_projectors`).

The loss is computed from detached features; its gradient at the features then goes back through
the encoder, one size of views after the other. A batch that does not fit does so in micro-batches,
exactly: their features are made without a graph, heads, queue and loss see the whole batch once
(batch norm and negatives included), and each micro-batch passes again for its gradient. The result
is the gradient of the whole batch, at the activation memory of one micro-batch. Both passes see
the same: nothing in the encoder is random (no dropout, no drop path). A last micro-batch that is
smaller than the others changes nothing.

A second forward beside forward (1) and backward (2) is at most 4/3 of the encoder's time. Of few
micro-batches the largest is not computed twice: its graph waits for its gradient
(`keeps_a_graph`). Measured: `python -m benchmarks micro-batches micro-batches-half`.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..model.modeling_mim_refiner import MimRefinerModel, prefix_tokens_only
from ..model.poolings_mim_refiner import LEARNED_POOLINGS
from ..runtime.attention import attend_in_fp32
from ..runtime.distributed import all_gather, all_gather_with_gradient, rank, world_size
from ..runtime.optimisation import update_average
from ..runtime.sharding import synchronise
from .choices import NormViews, Pairs, Swap
from .heads import IdHeads, in_passes
from .loss import nna_loss, pair_weights
from .metadata import Metadata
from .queue import NearestNeighbourQueue, Neighbours

# Shapes below: H heads, G global views, V views, b images of this process, N columns of views
# and images, D width of the encoder, E width of a projection, C channels, S side of a view.


@dataclass(frozen=True)
class StepResult:
    """What a step tells: its loss and, per head (H,), what is worth watching.

    Attributes:
        loss: the weighted sum over the heads, a scalar with a graph.
        head_losses: the loss of every head.
        alignment: the mean softmax probability of the positive.
        neighbour_similarity: the mean cosine between a target and its neighbour.
        neighbour_age: how many samples ago the neighbours were enqueued, on average.
        neighbour_accuracy: the share of neighbours of the target's class; nan without labels.
        without_neighbour: images of this process that metadata left without a neighbour, so that
            their positive is their own other view, a scalar; None without metadata.
    """

    loss: Tensor
    head_losses: Tensor
    alignment: Tensor
    neighbour_similarity: Tensor
    neighbour_age: Tensor
    neighbour_accuracy: Tensor
    without_neighbour: Tensor | None = None


def neighbour_draw(
    seed: int, step: int, topk: int, heads: int, views: int, batch: int
) -> Tensor | None:
    """Which of its `topk` neighbours every target takes (H, G, b); None where it is the nearest.

    A pure function of seed and step. `batch` is this process's share; the draw is made for all
    processes and cut, so their number does not change it.
    """
    if topk == 1:
        return None
    state = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) >> 1
    generator = torch.Generator().manual_seed(state)
    draw = torch.randint(topk, (heads, views, batch * world_size()), generator=generator)
    return draw[:, :, rank() * batch : (rank() + 1) * batch]


def view_major(views: Tensor) -> Tensor:
    """(b, V, C, S, S) -> (V * b, C, S, S): all samples of view 0 first."""
    return views.transpose(0, 1).flatten(0, 1)


# Up to so many micro-batches, one graph is kept. It saves a forward pass of one of them: at 4,
# counted, 3 % of the encoder's work; beyond that it is not worth its memory.
_KEPT_OF = 4


def keeps_a_graph(batch: int, micro: int) -> bool:
    """Whether a step of `batch` images, `micro` at a time, keeps one graph while heads compute."""
    return batch <= _KEPT_OF * micro


class _Pass(NamedTuple):
    """Views of one size that go through the encoder together: which views and images they are."""

    group: Tensor  # (images, views, C, S, S)
    views: slice
    images: slice

    @property
    def pixels(self) -> Tensor:
        return view_major(self.group)


@dataclass(frozen=True)
class NnaSettings:
    """Which views and channels are compared, and how (Nearest-Neighbour Alignment).

    Attributes:
        num_global, num_views: how many global views, and views in all, an image has.
        temperature: of the loss.
        head_temperature: of the loss in the head warm-up; None for the same.
        swap: where the neighbour replaces the target, see `loss.nna_loss`.
        pairs: which views are compared, see `loss.pair_weights`.
        norm_views: whether the heads' batch norms see all views together or each apart.
        target_momentum: of the copy of the projectors that gives the targets of the refinement;
            None for no copy.
        nested_widths: so many first channels of the encoder's output have a head of their own,
            whose other inputs are 0 (Matryoshka Representation Learning, arXiv 2205.13147).
    """

    num_global: int
    num_views: int
    temperature: float
    head_temperature: float | None = None
    swap: Swap = "positive"
    pairs: Pairs = "intended"
    norm_views: NormViews = "together"
    target_momentum: float | None = None
    nested_widths: Sequence[int] = ()


class Refiner(nn.Module):
    """Encoder, heads and queue, and how one batch of views becomes gradients.

    Args:
        encoder: the model to refine.
        head_blocks: 0-based blocks that carry a head, ascending; the last block stands for the
            encoder's output.
        heads, queue: with as many heads as there are head blocks and nested widths.
        bf16: autocast encoder and heads to bfloat16; weights, losses and gradients stay fp32.

    Attributes:
        metadata: which images may be neighbours; None for all.
        target_projector: the copy with `target_momentum`, in training mode as the heads are, never
            trained.
    """

    weights: Tensor

    def __init__(
        self,
        encoder: MimRefinerModel,
        head_blocks: Sequence[int],
        heads: IdHeads,
        queue: NearestNeighbourQueue,
        settings: NnaSettings,
        *,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.metadata: Metadata | None = None
        self.encoder = encoder
        self.heads = heads
        self.queue = queue
        self.head_blocks = list(head_blocks)
        self.settings = settings
        weights = pair_weights(settings.num_global, settings.num_views, settings.pairs)
        self.register_buffer("weights", weights, persistent=False)

        self.target_projector: nn.Module | None = None
        if settings.target_momentum is not None:
            self.target_projector = copy.deepcopy(heads.projector).requires_grad_(False)

        self.bf16 = bf16
        if bf16:
            attend_in_fp32(encoder)

    @property
    def head_names(self) -> list[str]:
        """Names for logs: `block16`, ..., `output`, and `output:96` of its first 96 channels."""
        last = self.encoder.config.num_hidden_layers - 1
        names = ["output" if block == last else f"block{block}" for block in self.head_blocks]
        return names + [f"output:{width}" for width in self.settings.nested_widths]

    def start_momentum(self) -> None:
        """Let the target projectors begin as the projectors are: before the first refinement step.

        Nothing without `target_momentum`.
        """
        self._follow(0.0)

    def follow_projectors(self) -> None:
        """Move the target projectors by the momentum: after a step of the optimiser.

        Statistics of their batch norms are copied. Nothing without `target_momentum`.
        """
        self._follow(self.settings.target_momentum or 0.0)

    def _follow(self, momentum: float) -> None:
        """`target = momentum * target + (1 - momentum) * projector`, of the weights."""
        target = self.target_projector
        if target is None:
            return
        update_average(target, self.heads.projector, momentum)
        for own, buffer in zip(target.buffers(), self.heads.projector.buffers(), strict=True):
            own.copy_(buffer)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pooled features of every head block (H, N, D), of images (N, C, S, S) of any size."""
        last = self.encoder.config.num_hidden_layers - 1
        # hidden state 0 are the embeddings, so the output of block n is hidden state n + 1
        inner = [block + 1 for block in self.head_blocks if block != last]
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            outputs = self.encoder(
                pixels, interpolate_pos_encoding=True, output_hidden_states=inner
            )

        features = [self.encoder.pool(outputs.hidden_states[state]) for state in inner]
        if last in self.head_blocks:
            config = self.encoder.config
            if config.pooling in LEARNED_POOLINGS or config.pooled_norm:
                features.append(outputs.pooler_output)
            else:
                features.append(self.encoder.pool(outputs.last_hidden_state))
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
        refining: bool = True,
    ) -> StepResult:
        """Heads, neighbours, loss and enqueue, for features (H, V * b, D) of this process.

        If not `refining`, it is the head warm-up: the projectors themselves give the targets, and
        the temperature is its own.
        """
        settings = self.settings
        batch = len(sample_index)
        features = self._with_nested(features)
        passes = settings.num_views if settings.norm_views == "apart" else 1
        with torch.autocast(features.device.type, torch.bfloat16, enabled=self.bf16):
            projected, predicted = self.heads(features, passes)
        predicted = predicted.unflatten(1, (settings.num_views, batch))  # (H, V, b, E)

        # neighbours come from the queue as the steps before left it
        own = projected.detach().unflatten(1, (settings.num_views, batch))
        targets = own[:, : settings.num_global]  # (H, G, b, E)
        if refining and self.target_projector is not None:
            targets = self._momentum_targets(self.target_projector, features, batch)
        allowed = None
        if self.metadata is not None:
            allowed = self.metadata.may_be_neighbours(sample_index, self.queue.sample_index)
        neighbours = self.queue.lookup(targets, sample_index, topk=topk, draw=draw, allowed=allowed)

        temperature = settings.temperature
        if not refining and settings.head_temperature is not None:
            temperature = settings.head_temperature
        head_losses, alignment = nna_loss(
            targets,
            neighbours.rows,
            all_gather_with_gradient(predicted, dim=2),
            self.weights,
            temperature=temperature,
            swap=settings.swap,
            first_row=rank() * batch,
        )
        weights = torch.ones_like(head_losses)
        if head_weights is not None:
            weights = head_losses.new_tensor(list(head_weights))

        result = StepResult(
            loss=(head_losses * weights).sum(),
            head_losses=head_losses.detach(),
            alignment=alignment,
            **self._about(neighbours, labels),
        )

        first_views = all_gather(targets[:, 0], dim=1)
        self.queue.enqueue(first_views, all_gather(sample_index), all_gather(labels))
        return result

    def _about(self, neighbours: Neighbours, labels: Tensor) -> dict[str, Tensor]:
        """What a `StepResult` says of the neighbours; of the images that have one."""
        similarity = neighbours.similarity.float()  # (H, G, b)
        age = self.queue.age[neighbours.positions].float()
        # how many are of the target's class, where both have one
        neighbour_labels = self.queue.labels[neighbours.positions]
        known = (labels >= 0) & (neighbour_labels >= 0)

        about = {}
        found = neighbours.found
        if found is not None:
            known &= found
            similarity = similarity.where(found, torch.nan)
            age = age.where(found, torch.nan)
            about["without_neighbour"] = (~found).sum()
        same = (neighbour_labels == labels) & known
        mean = torch.mean if found is None else torch.nanmean
        return {
            "neighbour_similarity": mean(similarity, dim=(1, 2)),
            "neighbour_age": mean(age, dim=(1, 2)),
            "neighbour_accuracy": same.sum(dim=(1, 2)) / known.sum(dim=(1, 2)),
            **about,
        }

    def _with_nested(self, features: Tensor) -> Tensor:
        """Features of the head blocks (H, N, D), and for every nested width those of the output
        with the channels behind it at 0.
        """
        if not self.settings.nested_widths:
            return features
        widths = torch.tensor(self.settings.nested_widths, device=features.device)
        kept = torch.arange(features.shape[2], device=features.device) < widths.unsqueeze(1)
        return torch.cat([features, features[-1] * kept.unsqueeze(1)])

    @torch.no_grad()
    def _momentum_targets(self, projector: nn.Module, features: Tensor, batch: int) -> Tensor:
        """What the target projectors make of the global views (H, G, b, E)."""
        num_global = self.settings.num_global
        columns = features[:, : num_global * batch].transpose(1, 2)
        passes = num_global if self.settings.norm_views == "apart" else 1
        with torch.autocast(features.device.type, torch.bfloat16, enabled=self.bf16):
            targets = in_passes(projector, columns, passes)
        return targets.transpose(1, 2).unflatten(1, (num_global, batch))

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
        """The gradients of one step, left in the parameters.

        Args:
            views: groups of normalised views of one size (b, V, C, S, S), global views first.
            sample_index, labels: place in the data set and label (-1: none) of each sample (b,).
            topk, draw: see `NearestNeighbourQueue.lookup`.
            head_weights: of the loss of every head, see `loss.head_weights`; None weighs all 1.
            train_encoder: False in the head warm-up, where the encoder runs without a graph, see
                also `align`.
            micro_batch_size: images per pass through the encoder; None for all at once.
        """
        batch = len(sample_index)
        passes = _passes(views, micro_batch_size or batch)
        keep = 0
        if train_encoder and micro_batch_size is None:
            keep = len(passes)
        elif train_encoder and keeps_a_graph(batch, micro_batch_size or batch):
            keep = 1

        with prefix_tokens_only(self.encoder):
            # up to the features: heads and loss see the whole batch at once
            features, kept = self._features(passes, batch, keep)
            result = self.align(
                features.requires_grad_(train_encoder).flatten(1, 2),
                sample_index,
                labels,
                topk=topk,
                draw=draw,
                head_weights=head_weights,
                refining=train_encoder,
            )
            result.loss.backward()
            if not train_encoder:
                return result

            # from the features on: one pass after the other
            assert features.grad is not None
            for number, part in enumerate(passes):
                encoded = kept[number] if number < keep else self.encode(part.pixels)
                # in micro-batches sharded gradients are added up whole, and reduced at the end
                last = number == len(passes) - 1
                synchronise(self.encoder, micro_batch_size is None or last)
                encoded.backward(features.grad[:, part.views, part.images].flatten(1, 2))
        return result

    def _features(
        self, passes: Sequence[_Pass], batch: int, keep: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Detached features of every head block (H, V, b, D); those of the first `keep` passes
        also with their graph."""
        width = self.encoder.config.hidden_size
        shape = (len(self.head_blocks), self.settings.num_views, batch, width)
        features = torch.empty(shape, dtype=self.encoder.dtype, device=passes[0].group.device)

        def store(part: _Pass, encoded: Tensor) -> None:
            by_view = encoded.detach().unflatten(1, (-1, len(part.group)))
            features[:, part.views, part.images] = by_view

        # not inference mode: FSDP2 keeps what it gathers weights into for the backward pass
        with torch.no_grad():
            for part in passes[keep:]:
                store(part, self.encode(part.pixels))

        kept = [self.encode(part.pixels) for part in passes[:keep]]
        for part, encoded in zip(passes, kept, strict=False):
            store(part, encoded)
        return features, kept


def _passes(views: Sequence[Tensor], micro: int) -> list[_Pass]:
    """What goes through the encoder together, largest first: at most `micro` images a pass."""
    passes = []
    first = 0
    for group in views:
        images, count = group.shape[:2]
        if count:
            for start in range(0, images, micro):
                part = slice(start, start + micro)
                passes.append(_Pass(group[part], slice(first, first + count), part))
        first += count
    return sorted(passes, key=lambda part: part.group.numel(), reverse=True)
