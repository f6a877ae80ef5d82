"""k-NN classification of frozen features: the paper's protocol, on CPU or GPU.

    from mim_refiner_hf.evaluation import knn_accuracy
    knn_accuracy(train_x, train_y, test_x, test_y)           # k = 10, temperature 0.07

The features may be those of the last block, or of the last 4 blocks side by side (table 13):

    found = extract_features(encoder, images, processor, blocks=range(20, 24))
    last4 = torch.cat(list(found.blocks.values()), dim=1)    # (N, 4 D)

Features are standardised with the TRAIN mean and unbiased standard deviation, L2-normalised, and
compared by cosine. Each of the k neighbours votes for its class with the weight
`exp(similarity / temperature)`. The authors take k = 10; for plain MAE and data2vec 2.0, which do
better with more neighbours, they tuned k (MIM-Refiner, C.4): `knn_grid` tries up to 200.

`nearest` is the search behind all of it, and behind everything else that asks for neighbours:

    similarity, index = nearest(queries, bank, k=10)         # both (M, 10)
"""

import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.distributed import gather_objects, rank, world_size
from .scores import labelled_rows

logger = logging.getLogger(__name__)

# of the grid
_GRID_NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
_GRID_TEMPERATURES = (0.02, 0.07, 0.2)
# of one tile of the similarity matrix: 128 MiB in fp32
QUERIES_AT_ONCE = 2048
BANK_AT_ONCE = 2**14
# columns of a tile of which only the largest is compared at first
_COLUMNS_OF_BLOCK = 16

Answers = dict[tuple[int, float], Tensor]
"""Predicted classes (M,) int64 by (k, temperature)."""

# Shapes below: N rows of the bank, M queries, D the width of a feature; r rows and c columns of
# one tile of the similarity matrix.

# --- standardisation ------------------------------------------------------------------------------


def finite_rows(rows: Tensor, name: str) -> Tensor:
    """`rows` to compute with: fp32, or fp64 where they are.

    Half precision overflows in a sum of squares, whole numbers have no mean.

    Raises:
        ValueError: for NaN and infinity, and for complex numbers.
    """
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


def channel_statistics(rows: Tensor, correction: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation + 1e-6 of every channel of `rows` (N, D): two tensors (D,).

    `correction` 1 gives the unbiased deviation, 0 that of a batch norm.
    """
    mean = rows.mean(dim=0)
    # several times as fast as `Tensor.std`
    variance = (rows - mean).square_().sum(dim=0) / (len(rows) - correction)
    return mean, variance.sqrt_() + 1e-6


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets (N, D), (M, D) with the TRAIN mean and standard deviation, channel by channel."""
    mean, deviation = channel_statistics(train)
    return (train - mean).div_(deviation), (test - mean).div_(deviation)


# --- the search -----------------------------------------------------------------------------------


def nearest(
    queries: Tensor, bank: Tensor, k: int, *, exclude_self: bool = False
) -> tuple[Tensor, Tensor]:
    """The k most similar rows of the bank for every query, by cosine: exact, in bounded memory.

    It takes a tile of 2048 queries by 16 384 bank rows at a time, one matrix product, whatever the
    sizes: some 200 MB at width 768, beside the features themselves. Of the first tile it sorts a
    few hundred similarities per query (`largest`), of the others only those that are better than
    what it has (`improved`).

    Args:
        queries: (M, D), of any norm; `standardise` them first for the paper's protocol.
        bank: (N, D), of any norm and the dtype of the queries.
        k: between 1 and N, or N - 1 with `exclude_self`.
        exclude_self: the queries are the bank, and no row is a neighbour of itself.

    Returns:
        Cosines (M, k), best first, and the numbers of those rows of the bank (M, k).
    """
    if len(queries) == 0:
        return queries.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=queries.device)
    parts = [F.normalize(rows, dim=1) for rows in queries.split(QUERIES_AT_ONCE)]

    # tiles of equal width, which `improved` can divide into blocks
    tiles = math.ceil(len(bank) / BANK_AT_ONCE)
    width = math.ceil(len(bank) / tiles / _COLUMNS_OF_BLOCK) * _COLUMNS_OF_BLOCK
    tile = bank.new_empty(len(parts[0]), width)
    unit = bank.new_empty(width, bank.shape[1])

    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(bank), width):
        rows = bank[start : start + width]
        norms = rows.norm(dim=1, keepdim=True).clamp_min_(1e-12)
        columns = torch.div(rows, norms, out=unit[: len(rows)]).T
        # the last tile may be narrower than the others
        tile[:, len(rows) :] = -math.inf

        for number, part in enumerate(parts):
            similarity = tile[: len(part)]
            torch.mm(part, columns, out=similarity[:, : len(rows)])
            if exclude_self:
                offset = number * QUERIES_AT_ONCE - start
                similarity.diagonal(offset=offset).fill_(-math.inf)

            if start == 0:
                found.append(largest(similarity[:, : len(rows)], min(k, len(rows))))
            else:
                found[number] = improved(*found[number], similarity, start, k)

    values = torch.cat([similarity for similarity, _ in found])
    return values, torch.cat([index for _, index in found])


def largest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`similarity.topk(k, dim=1)` of a tile (r, c); of equal entries at the border any may come.

    The columns fall into blocks. The k largest entries of a row lie in the k blocks with the
    largest maxima, for each of those holds one entry that is at least as large as all of any other
    block. So two short searches stand for a long one.
    """
    columns = similarity.shape[1]
    # makes the two searches equally long
    size = math.isqrt(columns // k)
    if size < 2:
        return similarity.topk(k, dim=1)

    # block b holds the columns b, b + count, b + 2 count, ...; a few columns are left over
    count = columns // size
    grid = similarity[:, : size * count].unflatten(1, (size, count))
    rest = similarity[:, size * count :]
    blocks = grid.amax(dim=1).topk(k, dim=1, sorted=False).indices

    inside = grid.gather(2, blocks[:, None].expand(-1, size, -1)).flatten(1)
    values, places = torch.cat([inside, rest], dim=1).topk(k, dim=1)

    # from places among the candidates back to columns of the tile
    column = places // k * count + blocks.gather(1, places % k)
    return values, torch.where(places < size * k, column, places + size * (count - k))


def improved(
    values: Tensor, index: Tensor, similarity: Tensor, start: int, k: int
) -> tuple[Tensor, Tensor]:
    """The k best of what was found so far and the next tile (r, c), which begins at `start`.

    After the first tile few entries are better than the worst of the k, some k / t of the t-th per
    row. The columns fall into blocks, of which only those are looked into whose maximum is better.

    Args:
        values, index: (r, up to k), best first.
    """
    worst = values.new_full((len(values), 1), -math.inf)
    if values.shape[1] == k:
        worst = values[:, -1:]

    # block b holds the columns b, b + count, b + 2 count, ...
    grid = similarity.unflatten(1, (_COLUMNS_OF_BLOCK, -1))
    row, block = (grid.amax(dim=1) > worst).nonzero(as_tuple=True)
    inside = grid[row, :, block]
    hit, step = (inside > worst[row]).nonzero(as_tuple=True)
    row = row[hit]
    column = block[hit] + step * grid.shape[2]

    # the hits come row by row: each goes into the next free slot behind what its row had
    count = torch.bincount(row, minlength=len(values))
    before = (count.cumsum(0) - count)[row]
    slot = values.shape[1] + torch.arange(len(row), device=row.device) - before
    most = int(count.max())
    all_values = F.pad(values, (0, most), value=-math.inf)
    all_index = F.pad(index, (0, most))
    all_values[row, slot] = inside[hit, step]
    all_index[row, slot] = column + start

    best = all_values.topk(min(k, all_values.shape[1]), dim=1)
    return best.values, all_index.gather(1, best.indices)


def warn_of_known_rows(bank: Tensor, queries: Tensor) -> None:
    """Say how many queries (M, D) the bank (N, D) has too: their nearest neighbour is themselves.

    Both standardised. A cosine of 1 is the same image, or features that tell no images apart.
    """
    similarity, _ = nearest(queries, bank, 1)
    known = int((similarity > 1 - 1e-6).sum())
    if known:
        logger.warning(
            "%d of %d rows to classify are in the bank too (cosine 1): they find themselves, so "
            "k-NN accuracy says more than it should",
            known,
            len(queries),
        )


# --- the votes ------------------------------------------------------------------------------------


def check_knn_input(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, k: Sequence[int], temperature: Sequence[float]
) -> None:
    """ValueError, in one sentence, for shapes, neighbours and temperatures that make no sense."""
    if train_x.dim() != 2 or test_x.dim() != 2 or train_x.shape[1] != test_x.shape[1]:
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
    if not temperature or min(temperature) <= 0:
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


@torch.no_grad()
def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    k: Sequence[int] = (10,),
    temperature: Sequence[float] = (0.07,),
    shared: bool = False,
) -> Answers:
    """Predicted classes for every `k` and `temperature`, from one pass over the similarities.

    Args:
        train_x: bank of features (N, D); standardise first for the paper's protocol.
        train_y: their classes (N,), int64, not negative.
        test_x: features to classify (M, D).
        k: numbers of neighbours, each at most N.
        temperature: softness of the votes; `float("inf")` for one vote per neighbour.
        shared: all processes of the job make this call with the same features: each takes a share
            of the test rows, and all get all answers, the same as one process would.

    Returns:
        {(k, temperature): classes (M,) int64 on the device of `test_x`}; ties go to the lowest.

    Raises:
        ValueError: for shapes, labels, neighbours or temperatures that do not fit.
    """
    check_knn_input(train_x, train_y, test_x, k, temperature)
    train_x, test_x = finite_rows(train_x, "train_x"), finite_rows(test_x, "test_x")
    settings = [(neighbours, tau) for neighbours in k for tau in temperature]
    # as wide as there are classes, however large their numbers
    classes, train_y = train_y.long().unique(return_inverse=True)
    num_classes = len(classes)

    # whole tiles, so that every product is the one that a single process computes
    process, processes = (rank(), world_size()) if shared else (0, 1)
    tiles = math.ceil(len(test_x) / QUERIES_AT_ONCE)
    first, end = (share * tiles // processes for share in (process, process + 1))
    own = test_x[first * QUERIES_AT_ONCE : end * QUERIES_AT_ONCE]
    similarity, index = nearest(own, train_x, max(k))

    # tile by tile, for the ballots are as wide as there are classes
    parts = [
        {
            s: classes[found]
            for s, found in vote(values, train_y[places], num_classes, settings).items()
        }
        for values, places in zip(
            similarity.split(QUERIES_AT_ONCE), index.split(QUERIES_AT_ONCE), strict=True
        )
    ]
    answers = {setting: torch.cat([part[setting] for part in parts]) for setting in settings}
    if processes == 1:
        return answers
    told = gather_objects({setting: classes.cpu() for setting, classes in answers.items()})
    return {
        setting: torch.cat([part[setting] for part in told]).to(test_x.device)
        for setting in settings
    }


def knn_grid(train_x: Tensor, train_y: Tensor, test_x: Tensor, *, shared: bool = False) -> Answers:
    """`knn_predict` for k = 1 to 200, as far as the bank goes, and three temperatures at once.

    Standardise first.
    """
    neighbours = [k for k in _GRID_NEIGHBOURS if k <= len(train_x)]
    return knn_predict(
        train_x, train_y, test_x, k=neighbours, temperature=_GRID_TEMPERATURES, shared=shared
    )


def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    k: int = 10,
    temperature: float = 0.07,
    shared: bool = False,
) -> float:
    """Share (0 to 1) of the test rows that the paper's k-NN protocol classifies correctly.

    Arguments as in `knn_predict`; standardises by itself. Test rows without a label, -1, are left
    out, and counted in a line.
    """
    if test_y.shape != test_x.shape[:1]:
        raise ValueError(
            f"test_y must hold one label per test row ({len(test_x)}), not shape {(*test_y.shape,)}"
        )
    train_x, test_x = finite_rows(train_x, "train_x"), finite_rows(test_x, "test_x")
    has_one = torch.from_numpy(labelled_rows(test_y.cpu().numpy())).to(test_x.device)
    # a copy only where some are left out
    if not has_one.all():
        test_x, test_y = test_x[has_one], test_y[has_one]
    train_x, test_x = standardise(train_x, test_x)
    answers = knn_predict(
        train_x, train_y, test_x, k=(k,), temperature=(temperature,), shared=shared
    )
    return (answers[k, temperature] == test_y).float().mean().item()


__all__ = [
    "channel_statistics",
    "finite_rows",
    "knn_accuracy",
    "knn_grid",
    "knn_predict",
    "nearest",
    "standardise",
    "warn_of_known_rows",
]
