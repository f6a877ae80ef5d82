"""k-NN classification of frozen features: the paper's protocol, on CPU or GPU.

    from mim_refiner_hf.evaluation import knn_accuracy
    knn_accuracy(train_x, train_y, test_x, test_y)           # k = 10, temperature 0.07

The features may be those of the last block, or of the last 4 blocks side by side (paper, table 13):

    found = extract_features(encoder, images, processor, blocks=range(20, 24))
    last4 = torch.cat(list(found.blocks.values()), dim=1)    # (N, 4 D)

Features are standardised with the TRAIN mean and unbiased standard deviation, L2-normalised, and compared by cosine; each of
the k neighbours votes for its class with weight `exp(similarity / temperature)`. The authors tuned k = 10 for plain MIM models
(MIM-Refiner, Sec. 5.2; `eval_knn_torchhub.py` of ml-jku/MIM-Refiner).

The search is exact. It takes a tile of 2048 test rows by 16 384 bank rows at a time, one matrix product, whatever the sizes: some
200 MB at width 768, beside the features themselves. Of the first tile it sorts a few hundred similarities per row (`largest`), of
the others only those that are better than what it has (`improved`).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.distributed import gather_objects, rank, world_size

NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)  # of the grid
TEMPERATURES = (0.02, 0.07, 0.2)
ROWS_AT_ONCE, BANK_AT_ONCE = 2048, 2**14  # of one tile of the similarity matrix: 128 MiB in fp32
BLOCK = 16  # columns of a tile of which only the largest is compared at first

Answers = dict[tuple[int, float], Tensor]
"""Predicted classes (M,) int64 by (k, temperature)."""


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets (N, D) and (M, D) with the TRAIN mean and unbiased standard deviation + 1e-6 per channel."""
    mean = train.mean(dim=0)
    centred = train - mean
    std = (
        centred.square().sum(dim=0) / (len(train) - 1)
    ).sqrt_() + 1e-6  # several times as fast as `Tensor.std`
    return centred.div_(std), (test - mean).div_(std)


def check_knn_input(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, k: Sequence[int], temperature: Sequence[float]
) -> None:
    """ValueError, in one sentence, for shapes, neighbours and temperatures that make no sense."""
    if train_x.dim() != 2 or test_x.dim() != 2 or train_x.shape[1] != test_x.shape[1]:
        raise ValueError(
            f"features must be (N, D) and (M, D) of one width, not {(*train_x.shape,)} and {(*test_x.shape,)}"
        )
    if len(train_x) == 0 or len(test_x) == 0:
        raise ValueError(
            f"k-NN needs at least one training and one test row, not {len(train_x)} and {len(test_x)}"
        )
    if train_y.shape != train_x.shape[:1]:
        raise ValueError(
            f"train_y must hold one label per training row ({len(train_x)}), not shape {(*train_y.shape,)}"
        )
    if bool((train_y < 0).any()):
        raise ValueError(
            "train_y has negative labels, but k-NN needs a class (0 or more) for every training row"
        )
    if not k or min(k) < 1 or max(k) > len(train_x):
        raise ValueError(f"k={tuple(k)} must lie between 1 and the {len(train_x)} training rows")
    if not temperature or min(temperature) <= 0:
        raise ValueError(
            f"temperature={tuple(temperature)} must be positive (infinity for uniform votes)"
        )


def largest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`similarity.topk(k, dim=1)` of a tile (r, c), largest first; of equal entries at the border any may be taken.

    The columns fall into blocks, and the k largest entries of a row lie in the k blocks with the largest maxima, for each of those
    k holds one entry that is at least as large as all of any other block. So two short searches stand for a long one.
    """
    columns = similarity.shape[1]
    size = math.isqrt(columns // k)  # makes the two searches equally long
    if size < 2:
        return similarity.topk(k, dim=1)
    count = columns // size
    grid, rest = (
        similarity[:, : size * count].unflatten(1, (size, count)),
        similarity[:, size * count :],
    )
    blocks = (
        grid.amax(dim=1).topk(k, dim=1, sorted=False).indices
    )  # block b holds the columns b, b + count, b + 2 count, ...
    inside = grid.gather(2, blocks[:, None].expand(-1, size, -1)).flatten(1)
    values, places = torch.cat([inside, rest], dim=1).topk(k, dim=1)
    column = places // k * count + blocks.gather(1, places % k)
    return values, torch.where(places < size * k, column, places + size * (count - k))


def nearest(bank: Tensor, parts: Sequence[Tensor], k: int) -> list[tuple[Tensor, Tensor]]:
    """For each part (r, D) the cosines (r, k) of the k most similar rows of the bank (N, D), best first, and their numbers (r, k)."""
    parts, found = [F.normalize(rows, dim=1) for rows in parts], []
    width = (
        math.ceil(len(bank) / math.ceil(len(bank) / BANK_AT_ONCE) / BLOCK) * BLOCK
    )  # tiles of equal width
    tile, unit = (
        bank.new_empty(max(map(len, parts), default=0), width),
        bank.new_empty(width, bank.shape[1]),
    )
    for start in range(0, len(bank), width):
        part = bank[start : start + width]
        columns = torch.div(
            part, part.norm(dim=1, keepdim=True).clamp_min_(1e-12), out=unit[: len(part)]
        ).T
        tile[:, len(part) :] = -math.inf
        for number, rows in enumerate(parts):
            similarity = tile[: len(rows)]
            torch.mm(rows, columns, out=similarity[:, : len(part)])
            if start == 0:
                found.append(largest(similarity[:, : len(part)], min(k, len(part))))
            else:
                found[number] = improved(*found[number], similarity, start, k)
    return found


def improved(
    values: Tensor, places: Tensor, similarity: Tensor, start: int, k: int
) -> tuple[Tensor, Tensor]:
    """The k largest of `values` (r, up to k), best first, with their `places`, and the next tile (r, c), which begins at `start`.

    After the first tile few entries are better than the worst of the k, some k / t of the t-th per row. The columns fall into blocks,
    of which only those are looked into whose maximum is better.
    """
    worst = values[:, -1:] if values.shape[1] == k else values.new_full((len(values), 1), -math.inf)
    grid = similarity.unflatten(
        1, (BLOCK, -1)
    )  # block b holds the columns b, b + count, b + 2 count, ...
    row, block = (grid.amax(dim=1) > worst).nonzero(as_tuple=True)
    inside = grid[row, :, block]
    hit, step = (inside > worst[row]).nonzero(as_tuple=True)
    row, column = row[hit], block[hit] + step * grid.shape[2]
    count = torch.bincount(row, minlength=len(values))
    slot = (
        values.shape[1] + torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    )  # rows come in order
    both = (
        F.pad(values, (0, int(count.max())), value=-math.inf),
        F.pad(places, (0, int(count.max()))),
    )
    both[0][row, slot], both[1][row, slot] = inside[hit, step], column + start
    best = both[0].topk(min(k, both[0].shape[1]), dim=1)
    return best.values, both[1].gather(1, best.indices)


def vote(
    similarity: Tensor, classes: Tensor, num_classes: int, settings: Sequence[tuple[int, float]]
) -> Answers:
    """What neighbours (r, k), best first, of these classes (r, k) decide; ties go to the lowest class."""
    answers = {}
    for neighbours, tau in settings:
        # exp(s / tau) up to a factor per row, which no argmax sees, and which would overflow at a small tau
        votes = ((similarity[:, :neighbours] - similarity[:, :1]) / tau).exp()
        ballot = votes.new_zeros(len(votes), num_classes).scatter_add_(
            1, classes[:, :neighbours], votes
        )
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
    """Predicted classes for every combination of `k` and `temperature`, from one pass over the similarities.

    Args:
        train_x: bank of features (N, D); standardise first for the paper's protocol. Rows are L2-normalised here.
        train_y: their classes (N,), int64, not negative.
        test_x: features to classify (M, D).
        k: numbers of neighbours, each at most N.
        temperature: softness of the votes; `float("inf")` for one vote per neighbour.
        shared: all processes of the job make this call with the same features: each takes every n-th tile of test rows, and all get
            all answers, the same as one process would.

    Returns:
        {(k, temperature): classes (M,) int64 on the device of `test_x`}; ties go to the lowest class id.

    Raises:
        ValueError: for shapes, labels, neighbours or temperatures that do not fit.
    """
    check_knn_input(train_x, train_y, test_x, k, temperature)
    num_classes, settings = (
        int(train_y.max()) + 1,
        [(neighbours, tau) for neighbours in k for tau in temperature],
    )
    first, processes = (rank(), world_size()) if shared else (0, 1)
    parts = test_x.split(ROWS_AT_ONCE)
    own = [
        vote(similarity, train_y[places], num_classes, settings)
        for similarity, places in nearest(train_x, parts[first::processes], max(k))
    ]
    if processes == 1:
        return {setting: torch.cat([answers[setting] for answers in own]) for setting in settings}
    told = gather_objects(
        [{setting: classes.cpu() for setting, classes in answers.items()} for answers in own]
    )
    everything = [told[part % processes][part // processes] for part in range(len(parts))]
    return {
        setting: torch.cat([answers[setting] for answers in everything]).to(test_x.device)
        for setting in settings
    }


def knn_grid(train_x: Tensor, train_y: Tensor, test_x: Tensor, *, shared: bool = False) -> Answers:
    """`knn_predict` for all of `NEIGHBOURS` that the bank has, and all `TEMPERATURES`, in one pass; standardise first."""
    neighbours = [k for k in NEIGHBOURS if k <= len(train_x)]
    return knn_predict(
        train_x, train_y, test_x, k=neighbours, temperature=TEMPERATURES, shared=shared
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
    """Share (0 to 1) of the test rows that the paper's k-NN protocol classifies correctly; arguments as in `knn_predict`."""
    if test_y.shape != test_x.shape[:1]:
        raise ValueError(
            f"test_y must hold one label per test row ({len(test_x)}), not shape {(*test_y.shape,)}"
        )
    train_x, test_x = standardise(train_x, test_x)
    predicted = knn_predict(
        train_x, train_y, test_x, k=(k,), temperature=(temperature,), shared=shared
    )[k, temperature]
    return (predicted == test_y).float().mean().item()


__all__ = ["knn_accuracy", "knn_grid", "knn_predict", "standardise"]
