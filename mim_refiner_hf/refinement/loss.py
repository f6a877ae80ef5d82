"""Nearest-Neighbour Alignment (paper, eq. 1): every view is drawn to the neighbour of another view of its image.

    weights = pair_weights(num_global=2, num_views=12)
    loss, alignment = nna_loss(targets, neighbours, predictions, weights, temperature=0.2)          # (heads,) each

For a target view i (global) and another view j, `logits = targets_i @ predictions_j.T / tau` over the predictions of all
processes; on the diagonal the target is replaced by its nearest neighbour from the queue, off the diagonal it is not. All pairs
(i, j) of all heads come out of one batched matrix product. The loss is the mean over ordered pairs j != i; heads are summed.

The released code's local loop reads prediction j where it means num_global + j; we compute the intended pairs.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Swap = Literal["positive", "all", "none"]
LossSchedule = Literal["constant", "uniform_decay", "staggered_decay", "staggered_step", "one_hot"]


def pair_weights(num_global: int, num_views: int) -> Tensor:
    """Weight of every (target view, other view) pair, (num_global, num_views): equal over pairs j != i, summing to 1."""
    weights = 1.0 - torch.eye(num_global, num_views)
    return weights / weights.sum()


def nna_loss(
    targets: Tensor,
    neighbours: Tensor,
    predictions: Tensor,
    weights: Tensor,
    *,
    temperature: float,
    swap: Swap = "positive",
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """The NNA loss of every head, and its alignment (the mean softmax probability of the positive).

    Args:
        targets: projections of the global views of this process (H, G, b, E); they get no gradient.
        neighbours: their nearest neighbours (H, G, b, E).
        predictions: predictions of all views of all processes (H, V, B, E), gathered with gradient.
        weights: `pair_weights` (G, V).
        temperature: tau > 0.
        swap: "positive" replaces the diagonal only (NNA), "all" every target (NNCLR), "none" nothing (InfoNCE).
        first_row: which of the B columns belongs to the first target (rank * b).

    Returns:
        loss (H,) and alignment (H,).
    """
    unit = F.normalize(predictions, dim=-1)
    rows, swapped = (
        F.normalize(given, dim=-1).to(unit.dtype) / temperature for given in (targets, neighbours)
    )
    if swap == "all":
        rows = swapped
    pairs = weights.to(unit.device) / targets.shape[2]
    loss, alignment = _SoftmaxOverPairs.apply(
        unit, rows, swapped if swap == "positive" else None, pairs, first_row
    )
    return loss, alignment


class _SoftmaxOverPairs(torch.autograd.Function):
    """Loss and alignment of rows against unit predictions, all pairs and heads in one product.

    The gradient of a softmax is the softmax: it is written where the logits stood, so that the largest tensor of the step,
    (H, G * b, V * B), exists once. The diagonal has columns of its own where the rows are swapped there (`swapped`).
    """

    @staticmethod
    def forward(
        ctx: Any, unit: Tensor, rows: Tensor, swapped: Tensor | None, pairs: Tensor, first_row: int
    ) -> tuple[Tensor, Tensor]:
        heads, num_global, batch, _ = rows.shape
        logits = torch.bmm(rows.flatten(1, 2), unit.flatten(1, 2).transpose(1, 2))
        logits = logits.to(
            torch.promote_types(logits.dtype, torch.float32)
        )  # the softmax is never taken in bf16
        logits = logits.view(heads, num_global, batch, *unit.shape[1:3])
        diagonal = logits.diagonal(
            offset=first_row, dim1=2, dim2=4
        )  # (H, G, V, b), a view into the logits
        if swapped is not None:
            own = unit.narrow(2, first_row, batch)
            diagonal.copy_(torch.einsum("hgbe,hvbe->hgvb", swapped, own))
        total = logits.logsumexp(dim=-1, keepdim=True)
        log_probability = diagonal - total.squeeze(-1).transpose(2, 3)
        loss = -(log_probability * pairs.unsqueeze(-1)).sum(dim=(1, 2, 3))
        alignment = (log_probability.exp() * pairs.unsqueeze(-1)).sum(dim=(1, 2, 3))
        gradient = logits.sub_(total).exp_()
        diagonal.sub_(1)
        gradient.mul_(pairs.view(num_global, 1, -1, 1))
        on_diagonal = None
        if swapped is not None:
            on_diagonal = diagonal.to(unit.dtype, copy=True)
            diagonal.zero_()
        ctx.save_for_backward(
            gradient.flatten(3).flatten(1, 2).to(unit.dtype), rows, on_diagonal, swapped
        )
        ctx.first_row, ctx.shape = first_row, unit.shape
        ctx.mark_non_differentiable(alignment)
        return loss, alignment

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradient, rows, on_diagonal, swapped = ctx.saved_tensors
        scale = of_loss.view(-1, 1, 1, 1).to(rows.dtype)
        of_unit = torch.bmm(gradient.transpose(1, 2), (rows * scale).flatten(1, 2)).view(ctx.shape)
        if swapped is not None:
            own = of_unit.narrow(2, ctx.first_row, rows.shape[2])
            own += torch.einsum("hgvb,hgbe->hvbe", on_diagonal, swapped * scale)
        return of_unit, None, None, None, None


def head_weights(schedule: LossSchedule, num_heads: int, progress: float) -> list[float]:
    """Loss weight of every head, earliest block first, the output's last (paper, Fig. 7, read off the released recipes).

    The output's head always weighs 1. The n-th earlier head's turn ends at `0.2 + 0.6 * n / (heads - 2)` of the training:
    "staggered_decay" then falls as a cosine to 0, "staggered_step" drops to 0, "one_hot" weighs 0.1 before its turn, 1 during,
    0 after. "uniform_decay" lets all earlier heads fall from 0.2 on.

    Args:
        progress: share of the refinement that is done, in [0, 1].
    """
    earlier = num_heads - 1
    ends = [0.2 + 0.6 * n / max(earlier - 1, 1) for n in range(earlier)]

    def falling(start: float) -> float:
        return (
            1.0
            if progress < start
            else 0.5 * (1 + math.cos(math.pi * (progress - start) / (1 - start)))
        )

    match schedule:
        case "constant":
            weights = [1.0] * earlier
        case "uniform_decay":
            weights = [falling(0.2)] * earlier
        case "staggered_decay":
            weights = [falling(end) for end in ends]
        case "staggered_step":
            weights = [float(progress < end) for end in ends]
        case "one_hot":
            starts = [0.0, *ends[:-1]]
            weights = [
                0.0 if progress >= end else (1.0 if progress >= begin else 0.1)
                for begin, end in zip(starts, ends, strict=False)
            ]
    return [*weights, 1.0]


__all__ = ["LossSchedule", "Swap", "head_weights", "nna_loss", "pair_weights"]
