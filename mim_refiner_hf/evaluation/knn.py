"""k-NN classification of frozen features: the paper's protocol, on CPU or GPU.

    from mim_refiner_hf.evaluation import knn_accuracy
    knn_accuracy(train_x, train_y, test_x, test_y)           # k = 10, temperature 0.07

The features may be those of the last block, or of the last 4 blocks side by side (table 13):

    found = extract_features(encoder, images, processor, blocks=range(20, 24))
    last4 = torch.cat(list(found.blocks.values()), dim=1)    # (N, 4 D)

Features are standardised with the TRAIN mean and unbiased standard deviation, L2-normalised, and
compared by cosine. Each of the k neighbours votes for its class with the weight
`exp(similarity / temperature)`. The authors take k = 10; for plain MAE and data2vec 2.0, which do
better with more neighbours, they tuned k (MIM-Refiner, C.4): `grid_settings` goes up to 200.

The bank may be larger than memory: rows that are read from a feature store, some at a time
(`ImageRows.side_by_side`), and standardised as they come (`standardised_bank`). The search itself
is in search.py.
"""

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..runtime.distributed import gather_objects, rank
from .scores import labelled_rows
from .search import QUERIES_AT_ONCE, RowSource, nearest, own_share

logger = logging.getLogger(__name__)

# of the grid
_GRID_NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
_GRID_TEMPERATURES = (0.02, 0.07, 0.2)
# whose statistics are computed, and put together
_ROWS_AT_ONCE = 2**14
# of the standard deviations of all channels, below which what is added to them decides
_LEAST_SPREAD = 1e-6

Answers = dict[tuple[int, float], Tensor]
"""Predicted classes (M,) int64 by (k, temperature)."""


# Shapes below: N rows of the bank, M queries, D the width of a feature.

# --- standardisation ------------------------------------------------------------------------------


def finite_rows(rows: Tensor | np.ndarray, name: str) -> Tensor:
    """`rows` (N, D) to compute with: fp32, or fp64 where they are.

    Half precision overflows in a sum of squares, whole numbers have no mean.

    Raises:
        ValueError: for another shape, NaN and infinity, and complex numbers.
    """
    rows = torch.as_tensor(rows)
    if rows.dim() != 2:
        raise ValueError(f"{name} must be (N, D), one row an item, not {(*rows.shape,)}")
    if rows.is_complex():
        raise ValueError(f"{name} are {rows.dtype}; features are real numbers")
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()

    if not bool(rows.isfinite().all()):
        wrong = (~rows.isfinite()).reshape(len(rows), -1).any(dim=1)
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: {int(wrong.sum())} of {len(rows)} rows hold NaN or infinity, the first is "
            f"row {first}; check the model that made them"
        )
    return rows


def channel_statistics(
    rows: RowSource, correction: int = 1, *, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation + 1e-6 of every channel of `rows` (N, D): two tensors (D,).

    Tile by tile, and these put together in float64: the same whoever reads which tile.

    Args:
        correction: 1 gives the unbiased deviation, 0 that of a batch norm.
        shared: the processes of the job share the tiles; all get the statistics of all.
    """
    parts: list[tuple[int, Tensor, Tensor]] = []
    for number in own_share(math.ceil(len(rows) / _ROWS_AT_ONCE), shared):
        tile = rows[number * _ROWS_AT_ONCE : (number + 1) * _ROWS_AT_ONCE]
        mean = tile.mean(dim=0)
        # several times as fast as `Tensor.std`
        squares = (tile - mean).square_().sum(dim=0)
        parts.append((len(tile), mean.cpu(), squares.cpu()))
    if shared:
        parts = list(itertools.chain(*gather_objects(parts)))

    counts, means, squares_of = zip(*parts, strict=True)
    count = torch.tensor(counts, dtype=torch.float64)[:, None]
    tile_means = torch.stack(means).double()
    mean = (count * tile_means).sum(dim=0) / len(rows)
    squares = torch.stack(squares_of).double().sum(dim=0)
    squares += (count * (tile_means - mean).square()).sum(dim=0)

    like = rows[:0]
    # one row has no spread
    variance = squares.to(like) / max(1, len(rows) - correction)
    if not bool(variance.isfinite().all()):
        raise ValueError(
            f"features up to {max(float(tile_means.abs().max()), float(squares.max()) ** 0.5):.1e} "
            "are too large to standardise: their squares overflow; divide them by a number"
        )
    deviation = variance.sqrt_()
    if len(rows) > 1 and float(deviation.max()) < _LEAST_SPREAD and rank() == 0:
        logger.warning(
            "the features of the bank hardly differ: no channel has a standard deviation above "
            "%.1e, to which the protocol adds 1e-6; k-NN says little about them",
            float(deviation.max()),
        )
    return mean.to(like), deviation + 1e-6


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets (N, D), (M, D) with the TRAIN mean and standard deviation, channel by channel."""
    mean, deviation = channel_statistics(train)
    return (train - mean).div_(deviation), (test - mean).div_(deviation)


@dataclass(frozen=True)
class StandardisedRows:
    """RowSource (N, D) that are standardised as they are read."""

    rows: RowSource
    mean: Tensor
    deviation: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.rows.shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice, /) -> Tensor:
        return (self.rows[part] - self.mean).div_(self.deviation)


def standardised_bank(
    bank: RowSource, test: Tensor, *, shared: bool = False
) -> tuple[RowSource, Tensor]:
    """`standardise` without a copy of the bank; `shared` as in `channel_statistics`."""
    mean, deviation = channel_statistics(bank, shared=shared)
    return StandardisedRows(bank, mean, deviation), (test - mean).div_(deviation)


def warn_of_known_rows(similarity: Tensor, index: Tensor, queries: Tensor, bank: RowSource) -> None:
    """Say how many queries the bank has too: their nearest neighbour is themselves.

    A cosine of 1 is the same image, or features that tell no images apart. Of a bank in memory the
    rows themselves are compared, up to the rounding of half precision: of few channels, or where
    one is far larger than the others, a cosine of 1 says little.

    Args:
        similarity, index: of the neighbours (M, k), as `nearest` gives them.
        queries, bank: (M, D) and (N, D).
    """
    alike = (similarity[:, 0] > 1 - 1e-6).nonzero()[:, 0]
    known = len(alike)
    others = _rows_in_memory(bank, index[alike, 0])
    if others is not None:
        own = queries[alike]
        # of a channel, as near zero nothing is relative
        size = queries.abs().mean(dim=0)  # (D,)
        same = (own - others).abs() <= 1e-3 * (own.abs() + size)
        known = int(same.all(dim=1).sum())
    if known:
        logger.warning(
            "%d of %d rows to classify are in the bank too (cosine 1): they find themselves, so "
            "k-NN accuracy says more than it should",
            known,
            len(similarity),
        )


def _rows_in_memory(bank: RowSource, places: Tensor) -> Tensor | None:
    """Rows of the bank by their numbers (n,); None of one that is read from a file."""
    if isinstance(bank, Tensor):
        return bank[places]
    if isinstance(bank, StandardisedRows) and isinstance(bank.rows, Tensor):
        return (bank.rows[places] - bank.mean).div_(bank.deviation)
    return None


# --- the votes ------------------------------------------------------------------------------------


def check_knn_input(
    train_x: RowSource,
    train_y: Tensor,
    test_x: Tensor,
    k: Sequence[int],
    temperature: Sequence[float],
) -> None:
    """ValueError, in one sentence, for shapes, neighbours and temperatures that make no sense."""
    if len(train_x.shape) != 2 or test_x.dim() != 2 or train_x.shape[1] != test_x.shape[1]:
        raise ValueError(
            "features must be (N, D) and (M, D) of one width, not "
            f"{(*train_x.shape,)} and {(*test_x.shape,)}"
        )
    if len(train_x) == 0 or len(test_x) == 0:
        raise ValueError(
            "k-NN needs at least one training and one test row, not "
            f"{len(train_x)} and {len(test_x)}"
        )
    if train_y.shape != train_x.shape[:1]:
        raise ValueError(
            f"train_y must hold one label per training row ({len(train_x)}), "
            f"not shape {(*train_y.shape,)}"
        )

    if train_y.is_floating_point() or train_y.is_complex():
        raise ValueError(f"train_y is {train_y.dtype}; labels are whole numbers")
    if train_y.dtype.is_signed and bool((train_y < 0).any()):
        raise ValueError(
            "train_y has negative labels, but k-NN needs a class (0 or more) for every training row"
        )

    if not k or min(k) < 1 or max(k) > len(train_x):
        raise ValueError(f"k={tuple(k)} must lie between 1 and the {len(train_x)} training rows")
    # nor NaN, which compares with nothing
    if not temperature or not all(tau > 0 for tau in temperature):
        raise ValueError(
            f"temperature={tuple(temperature)} must be positive (infinity for uniform votes)"
        )


def vote(
    similarity: Tensor, classes: Tensor, num_classes: int, settings: Sequence[tuple[int, float]]
) -> Answers:
    """What neighbours of these classes decide; ties go to the lowest class.

    Args:
        similarity: of the neighbours (M, k), best first.
        classes: of the neighbours (M, k).
        settings: pairs (k, temperature).
    """
    answers = {}
    for neighbours, tau in settings:
        # exp(s / tau) would overflow at a small tau: up to a factor per row, which no argmax sees
        votes = ((similarity[:, :neighbours] - similarity[:, :1]) / tau).exp()
        ballot = votes.new_zeros(len(votes), num_classes)
        ballot.scatter_add_(1, classes[:, :neighbours], votes)
        answers[neighbours, tau] = ballot.argmax(dim=1)
    return answers


def predicted_classes(
    similarity: Tensor, index: Tensor, train_y: Tensor, settings: Sequence[tuple[int, float]]
) -> Answers:
    """What the neighbours decide.

    Args:
        similarity, index: of the neighbours (M, k), as `nearest` gives them.
        train_y: the classes of the bank (N,).
        settings: pairs (k, temperature).
    """
    # as wide as there are classes, however large their numbers
    classes, train_y = train_y.long().unique(return_inverse=True)
    # tile by tile, for the ballots are as wide as there are classes
    tiles = zip(similarity.split(QUERIES_AT_ONCE), index.split(QUERIES_AT_ONCE), strict=True)
    parts = [vote(values, train_y[places], len(classes), settings) for values, places in tiles]

    answers = {}
    for setting in settings:
        answers[setting] = classes[torch.cat([part[setting] for part in parts])]
    return answers


@torch.no_grad()
def knn_predict(
    train_x: RowSource,
    train_y: Tensor,
    test_x: Tensor,
    *,
    k: Sequence[int] = (10,),
    temperature: Sequence[float] = (0.07,),
    shared: bool = False,
    say_known: bool = True,
) -> Answers:
    """Predicted classes for every `k` and `temperature`, from one pass over the similarities.

    Args:
        train_x: bank of features (N, D); standardise first for the paper's protocol. Finite, where
            it is no tensor.
        train_y: their classes (N,), int64, not negative.
        test_x: features to classify (M, D).
        k: numbers of neighbours, each at most N.
        temperature: softness of the votes; `float("inf")` for one vote per neighbour.
        shared: all processes of the job make this call with the same features: they share the
            search, and all get all answers, the same as one process would.
        say_known: count in a line the rows of `test_x` that are in the bank too.

    Returns:
        {(k, temperature): classes (M,) int64 on the device of `test_x`}; ties go to the lowest.

    Raises:
        ValueError: for shapes, labels, neighbours or temperatures that do not fit.
    """
    check_knn_input(train_x, train_y, test_x, k, temperature)
    if isinstance(train_x, Tensor):
        train_x = finite_rows(train_x, "train_x")
    test_x = finite_rows(test_x, "test_x")
    settings = list(itertools.product(k, temperature))
    similarity, index = nearest(test_x, train_x, max(k), shared=shared)
    if say_known and (rank() == 0 or not shared):
        warn_of_known_rows(similarity, index, test_x, train_x)
    return predicted_classes(similarity, index, train_y, settings)


def grid_settings(bank: int) -> list[tuple[int, float]]:
    """Pairs (k, temperature): k = 1 to 200, as far as a bank of so many rows goes, and three."""
    neighbours = [k for k in _GRID_NEIGHBOURS if k <= bank]
    return list(itertools.product(neighbours, _GRID_TEMPERATURES))


def knn_accuracy(
    train_x: RowSource | np.ndarray,
    train_y: Tensor | np.ndarray,
    test_x: Tensor | np.ndarray,
    test_y: Tensor | np.ndarray,
    *,
    k: int = 10,
    temperature: float = 0.07,
    shared: bool = False,
    say_known: bool = True,
) -> float:
    """Share (0 to 1) of the test rows that the paper's k-NN protocol classifies correctly.

    Arguments as in `knn_predict`, or the same as arrays; standardises by itself. Test rows
    without a label, -1, are left out, and counted in a line.
    """
    if isinstance(train_x, Tensor | np.ndarray):
        train_x = finite_rows(train_x, "train_x")
    test_x = finite_rows(test_x, "test_x")
    train_y = torch.as_tensor(train_y)
    test_y = torch.as_tensor(test_y)
    if test_y.shape != test_x.shape[:1]:
        raise ValueError(
            f"test_y must hold one label per test row ({len(test_x)}), not shape {(*test_y.shape,)}"
        )
    check_knn_input(train_x, train_y, test_x, (k,), (temperature,))
    has_one = torch.from_numpy(labelled_rows(test_y.cpu().numpy())).to(test_x.device)
    # a copy only where some are left out
    if not has_one.all():
        test_x, test_y = test_x[has_one], test_y[has_one]
    strangers = int((~torch.isin(test_y.cpu(), train_y.cpu())).sum())
    if strangers and say_known and (rank() == 0 or not shared):
        logger.warning(
            "%d of %d rows to classify are of a class that no row of the bank has: they count as "
            "wrong, whatever the features",
            strangers,
            len(test_y),
        )
    bank, test_x = standardised_bank(train_x, test_x, shared=shared)
    answers = knn_predict(
        bank,
        train_y,
        test_x,
        k=(k,),
        temperature=(temperature,),
        shared=shared,
        say_known=say_known,
    )
    return (answers[k, temperature] == test_y).float().mean().item()
