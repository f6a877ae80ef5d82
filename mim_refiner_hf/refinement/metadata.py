"""Metadata to forget and to keep: which images may be each other's neighbours.

    metadata = Metadata(values, forgotten=[True, False])       # camera to forget, species to keep
    allowed = metadata.may_be_neighbours(sample_index, queue.sample_index)     # (b, Q)

The positive of an image is then a neighbour that differs in all fields to forget and agrees in all
to keep: what it is drawn to cannot be told by the one and can by the other. A missing value is
the same as no other. A start row of the queue belongs to no sample, so nothing is known
of it, and it is no neighbour.

The queue knows its rows by the places of their samples, so values are looked up in one table of the
whole data set: nothing more is enqueued, gathered or kept in a checkpoint.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

# Shapes below: F fields, N images of the whole data set, b images of this process, K others.


class Metadata(nn.Module):
    """The values of every image, and what becomes of each field.

    Args:
        values: numbers of the values (F, N), -1 where one is missing.
        forgotten: by field, True for one to forget, False for one to keep.

    Example:
        >>> metadata = Metadata(np.array([[0, 0, 1]]), [True])
        >>> metadata.may_be_neighbours(torch.tensor([0]), torch.tensor([-1, 1, 2])).tolist()
        [[False, False, True]]
    """

    values: Tensor

    def __init__(self, values: np.ndarray, forgotten: Sequence[bool]) -> None:
        super().__init__()
        table = torch.from_numpy(np.ascontiguousarray(values))
        self.register_buffer("values", table, persistent=False)
        self.forgotten = list(forgotten)

    def may_be_neighbours(self, own: Tensor, others: Tensor) -> Tensor:
        """Whether each of `others` may be the neighbour of each of `own` (b, K).

        Args:
            own: places in the data set (b,).
            others: places in the data set (K,), -1 for rows that belong to no sample. The same
                sample is no neighbour.
        """
        allowed = (own.unsqueeze(1) != others) & (others >= 0)
        for field, forgotten in enumerate(self.forgotten):
            same = self._same(field, own, others)
            allowed &= ~same if forgotten else same
        return allowed

    def _same(self, field: int, own: Tensor, others: Tensor) -> Tensor:
        """Whether both have a value in this field, and it is the same one (b, K)."""
        values = self.values[field]
        mine = values[own].unsqueeze(1)
        return (mine == values[others.clamp_min(0)]) & (mine >= 0)


def have_neighbours(values: np.ndarray, forgotten: Sequence[bool]) -> np.ndarray:
    """Whether any other image may be the neighbour of each (n,), by the rules of `Metadata`.

    Args:
        values: of n images (F, n).
    """
    is_forgotten = np.array(forgotten)
    # images of the same values have the same answer
    kinds, kind_of, count = np.unique(values, axis=1, return_inverse=True, return_counts=True)
    to_forget = kinds[is_forgotten]
    to_keep = kinds[~is_forgotten]
    groups: dict[bytes, list[int]] = {}
    for kind, kept in enumerate(np.ascontiguousarray(to_keep.T)):
        if (kept >= 0).all():
            groups.setdefault(kept.tobytes(), []).append(kind)

    found = np.zeros(kinds.shape[1], dtype=bool)
    for members in groups.values():
        left = np.array(members)
        # after a few others nobody is left, or nobody can be helped
        for other in members:
            own = to_forget[:, left]
            same = ((own == to_forget[:, [other]]) & (own >= 0)).any(axis=0)
            # an image is not its own neighbour, another one of the same values may be
            helped = ~same & ((left != other) | (count[other] > 1))
            found[left[helped]] = True
            left = left[~helped]
            if len(left) == 0:
                break
    return found[kind_of.reshape(-1)]
