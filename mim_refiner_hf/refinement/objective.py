"""Nearest-Neighbour Alignment (paper, eq. 1): every view is drawn to the neighbour of another view of its image.

    weights = pair_weights(num_global=2, num_views=12)
    loss, alignment = nna_loss(targets, neighbours, predictions, weights, temperature=0.2)          # (heads,) each

For a target view i (global) and another view j, `logits = targets_i @ predictions_j.T / tau` over the predictions of all
processes; on the diagonal the target is replaced by its nearest neighbour from the queue, off the diagonal it is not. All pairs
(i, j) of all heads come out of one batched matrix product. The loss is the mean over ordered pairs j != i; heads are summed.

The released code's local loop reads prediction j where it means num_global + j; we compute the intended pairs.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

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
    targets, neighbours = F.normalize(targets.detach(), dim=-1), F.normalize(neighbours.detach(), dim=-1)
    predictions = F.normalize(predictions, dim=-1)
    heads, num_global, batch, _ = targets.shape
    views, columns = predictions.shape[1:3]
    rows = neighbours if swap == "all" else targets
    product = torch.bmm(rows.flatten(1, 2), predictions.flatten(1, 2).transpose(1, 2).to(rows.dtype))
    product = product.to(torch.promote_types(product.dtype, torch.float32))  # the softmax is never taken in bf16
    logits = product.view(heads, num_global, batch, views, columns) / temperature
    diagonal = logits.diagonal(offset=first_row, dim1=2, dim2=4)  # (H, G, V, b), a view into logits
    if swap == "positive":
        own = predictions[:, :, first_row : first_row + batch].to(neighbours.dtype)
        diagonal.copy_(torch.einsum("hgbe,hvbe->hgvb", neighbours, own) / temperature)
    positive = logits.diagonal(offset=first_row, dim1=2, dim2=4)
    log_probability = positive - logits.logsumexp(dim=-1).transpose(2, 3)  # (H, G, V, b)
    pairs = weights.to(logits.device).unsqueeze(-1) / batch
    loss = -(log_probability * pairs).sum(dim=(1, 2, 3))
    alignment = (log_probability.detach().exp() * pairs).sum(dim=(1, 2, 3))
    return loss, alignment


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
        return 1.0 if progress < start else 0.5 * (1 + math.cos(math.pi * (progress - start) / (1 - start)))

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
