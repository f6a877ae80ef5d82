"""The loss of every head: Nearest-Neighbour Alignment (paper, eq. 1), and how heads are weighted.

    weights = pair_weights(num_global=2, num_views=12)
    loss, alignment = nna_loss(targets, neighbours, predictions, weights, temperature=0.2)

Every view of an image is drawn towards the nearest neighbour of another view of that image.
For a target view i (global) and another view j, the logits are

    logits = targets_i @ predictions_j.T / temperature

over the predictions of all images of all processes. The positive stands on the diagonal. There
the target is replaced by its nearest neighbour from the queue; off the diagonal it is not.
The loss of a head is the mean over the ordered pairs j != i; the heads are summed.

The released code's local loop reads prediction j where it means num_global + j. The intended pairs
are the default; "released" takes that code's, by which the paper's scores were made.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..runtime.arithmetic import full_precision
from .choices import LossSchedule, Pairs, Swap

# Shapes below: H heads, G global views, V views, b images of this process, B images of all
# processes, E the width of a projection.


def pair_weights(num_global: int, num_views: int, pairs: Pairs = "intended") -> Tensor:
    """The weight of every pair (target view i, other view j), (G, V), sum 1.

    "intended": equal for j != i. "released": the local loop of the authors' code begins at view 0,
    so that of 2 + 10 views 18.2 % of the weight lie on the other global view, 9.1 % on the target's
    own view, 72.7 % on the first 8 local ones. Without local views both are the same.
    """
    others = 1.0 - torch.eye(num_global, num_views)
    weights = others
    if pairs == "released":
        weights = torch.zeros(num_global, num_views)
        weights[:, :num_global] += others[:, :num_global]
        weights[:, : num_views - num_global] += 1
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
    """The loss of every head, and its alignment: the mean softmax probability of the positive.

    Args:
        targets: projections of the global views of this process (H, G, b, E); no gradient.
        neighbours: the nearest neighbours of the targets (H, G, b, E).
        predictions: of all views of all processes (H, V, B, E), gathered with gradient.
        weights: of the pairs, as `pair_weights` gives them (G, V).
        temperature: greater than 0; the logits are divided by it.
        swap: "positive" replaces the target on the diagonal only (NNA), "all" replaces it
            everywhere (NNCLR), "none" nowhere (InfoNCE).
        first_row: which of the B images is the first of this process (rank * b).

    Returns:
        loss (H,) and alignment (H,).
    """
    unit = F.normalize(predictions, dim=-1)
    # the temperature divides the smaller factor of the product
    own = F.normalize(targets, dim=-1).to(unit.dtype) / temperature
    swapped = F.normalize(neighbours, dim=-1).to(unit.dtype) / temperature

    rows = swapped if swap == "all" else own
    diagonal_rows = swapped if swap == "positive" else None
    pairs = weights.to(unit.device) / targets.shape[2]

    loss, alignment = _SoftmaxOverPairs.apply(unit, rows, diagonal_rows, pairs, first_row)
    return loss, alignment


class _SoftmaxOverPairs(torch.autograd.Function):
    """Loss and alignment of rows against unit predictions: all pairs and heads in one product.

    The gradient of a log-softmax is the softmax minus the positive. It is written where the
    logits stood, so that the largest tensor of a step, (H, G * b, V * B), exists only once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,  # (H, V, B, E)
        rows: Tensor,  # (H, G, b, E)
        diagonal_rows: Tensor | None,  # (H, G, b, E), where the diagonal has rows of its own
        pairs: Tensor,  # (G, V)
        first_row: int,
    ) -> tuple[Tensor, Tensor]:
        heads, num_global, batch, _ = rows.shape
        logits = torch.bmm(rows.flatten(1, 2), unit.flatten(1, 2).transpose(1, 2))
        # the softmax is never taken in bf16
        logits = full_precision(logits)
        logits = logits.view(heads, num_global, batch, *unit.shape[1:3])  # (H, G, b, V, B)

        # the positives, a view into the logits: what is written there is written in both
        positives = logits.diagonal(offset=first_row, dim1=2, dim2=4)  # (H, G, V, b)
        if diagonal_rows is not None:
            own = unit.narrow(2, first_row, batch)
            positives.copy_(torch.einsum("hgbe,hvbe->hgvb", diagonal_rows, own))

        # cross-entropy of every pair, then its mean over pairs and images
        total = logits.logsumexp(dim=-1, keepdim=True)
        log_probability = positives - total.squeeze(-1).transpose(2, 3)  # (H, G, V, b)
        loss = -(log_probability * pairs.unsqueeze(-1)).sum(dim=(1, 2, 3))
        alignment = (log_probability.exp() * pairs.unsqueeze(-1)).sum(dim=(1, 2, 3))

        # from here on the memory of the logits holds the gradient: softmax - 1 on the diagonal
        gradient = logits.sub_(total).exp_()
        positives.sub_(1)
        gradient.mul_(pairs.view(num_global, 1, -1, 1))

        # swapped positives belong to other rows, so they leave the big product
        diagonal_gradient = None
        if diagonal_rows is not None:
            diagonal_gradient = positives.to(unit.dtype, copy=True)
            positives.zero_()

        as_matrix = gradient.flatten(3).flatten(1, 2).to(unit.dtype)  # (H, G * b, V * B)
        ctx.save_for_backward(as_matrix, rows, diagonal_gradient, diagonal_rows)
        ctx.first_row = first_row
        ctx.shape = unit.shape
        ctx.mark_non_differentiable(alignment)
        return loss, alignment

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradient, rows, diagonal_gradient, diagonal_rows = ctx.saved_tensors
        scale = of_loss.view(-1, 1, 1, 1).to(rows.dtype)
        scaled_rows = (rows * scale).flatten(1, 2)
        of_unit = torch.bmm(gradient.transpose(1, 2), scaled_rows).view(ctx.shape)

        if diagonal_rows is not None:
            own = of_unit.narrow(2, ctx.first_row, rows.shape[2])
            own += torch.einsum("hgvb,hgbe->hvbe", diagonal_gradient, diagonal_rows * scale)
        return of_unit, None, None, None, None


def head_weights(schedule: LossSchedule, num_heads: int, progress: float) -> list[float]:
    """The loss weight of every head, that of the earliest block first (paper, Fig. 7).

    The last head, on the encoder's output, always weighs 1. Each earlier head n has a turn,
    which ends at `0.2 + 0.6 * n / (heads - 2)` of the refinement (read off the released recipes):

    - "constant": every head weighs 1 throughout;
    - "uniform_decay": all earlier heads fall from 0.2 on, as a cosine, to 0;
    - "staggered_decay": each falls from the end of its turn on, as a cosine, to 0;
    - "staggered_step": each drops to 0 at the end of its turn;
    - "one_hot": each weighs 0.1 before its turn, 1 during it, 0 after it.

    Args:
        progress: share of the refinement that is done, in [0, 1].
    """
    earlier = num_heads - 1
    ends = [0.2 + 0.6 * n / max(earlier - 1, 1) for n in range(earlier)]

    match schedule:
        case "constant":
            weights = [1.0] * earlier
        case "uniform_decay":
            weights = [_cosine_fall(progress, start=0.2)] * earlier
        case "staggered_decay":
            weights = [_cosine_fall(progress, start=end) for end in ends]
        case "staggered_step":
            weights = [float(progress < end) for end in ends]
        case "one_hot":
            begins = [0.0, *ends[:-1]]
            turns = zip(begins, ends, strict=False)
            weights = [_one_hot_weight(progress, begin, end) for begin, end in turns]
    return [*weights, 1.0]


def _cosine_fall(progress: float, start: float) -> float:
    """1 until `start`, then half a cosine down to 0 at the end."""
    if progress < start:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - start) / (1 - start)))


def _one_hot_weight(progress: float, begin: float, end: float) -> float:
    """0.1 before the turn that lasts from `begin` to `end`, 1 during it, 0 after it."""
    if progress < begin:
        return 0.1
    if progress < end:
        return 1.0
    return 0.0
