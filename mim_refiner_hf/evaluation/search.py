"""The nearest rows of a bank, by cosine: exact, in bounded memory, the same to the last bit.

    similarity, index = nearest(queries, bank, k=10)         # both (M, 10)

The bank may be a tensor, or rows that are read from a feature store as they are needed; the
processes of a job may share the work. k-NN, and everything else that asks for neighbours, asks
here.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.distributed import gather_objects, rank, world_size

# of one tile of the similarity matrix: 128 MiB in fp32
QUERIES_AT_ONCE = 2048
BANK_AT_ONCE = 2**14
# columns of a tile of which only the largest is compared at first
_COLUMNS_OF_BLOCK = 16

# Shapes below: N rows of the bank, M queries, D the width of a feature; r rows and c columns of
# one tile of the similarity matrix.


class RowSource(Protocol):
    """Features (N, D) that are read some consecutive rows at a time; a tensor is one such."""

    @property
    def shape(self) -> torch.Size:
        """(N, D)."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, part: slice, /) -> Tensor:
        """The rows of a slice, (n, D)."""


def own_share(count: int, shared: bool) -> range:
    """Which of `count` tiles this process takes: all, or its share of those of the job."""
    process, processes = (rank(), world_size()) if shared else (0, 1)
    return range(process * count // processes, (process + 1) * count // processes)


def nearest(
    queries: Tensor, bank: RowSource, k: int, *, exclude_self: bool = False, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """The k most similar rows of the bank for every query, by cosine: exact, in bounded memory.

    It takes a tile of 2048 queries by 16 384 bank rows at a time, one matrix product, whatever the
    sizes: some 200 MB at width 768, beside the queries, and the bank if that is in memory. Of the
    first tile it sorts a few hundred similarities per query (`largest`), of the others only those
    that are better than what it has (`improved`). Every product is that of the same two tiles
    wherever the bank is and whoever computes it, so the answer is the same to the last bit.

    Args:
        queries: (M, D), of any norm; `standardise` them first for the paper's protocol.
        bank: (N, D), of any norm, and the dtype and device of the queries.
        k: between 1 and N, or N - 1 with `exclude_self`.
        exclude_self: the queries are the bank, and no row is a neighbour of itself.
        shared: all processes of the job make this call with the same rows: they share the tiles of
            the bank, or of the queries where there are more of those, and all get the whole answer.

    Returns:
        Cosines (M, k), best first, and the numbers of those rows of the bank (M, k); of equal ones
        the lower number comes first.
    """
    if len(queries) == 0:
        return queries.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=queries.device)
    count = math.ceil(len(queries) / QUERIES_AT_ONCE)
    # tiles of equal width, which `improved` can divide into blocks
    tiles = math.ceil(len(bank) / BANK_AT_ONCE)
    width = math.ceil(len(bank) / tiles / _COLUMNS_OF_BLOCK) * _COLUMNS_OF_BLOCK

    parts = {}
    for number in own_share(count, shared and tiles < count):
        first = number * QUERIES_AT_ONCE
        parts[number] = F.normalize(queries[first : first + QUERIES_AT_ONCE])
    tile = queries.new_empty(min(QUERIES_AT_ONCE, len(queries)), width)
    unit = queries.new_empty(width, queries.shape[1])

    found: dict[int, tuple[Tensor, Tensor]] = {}
    for start in own_share(tiles, shared and tiles >= count):
        first = start * width
        rows = bank[first : first + width]
        norms = rows.norm(dim=1, keepdim=True).clamp_min_(1e-12)
        columns = torch.div(rows, norms, out=unit[: len(rows)]).T
        # the last tile may be narrower than the others
        tile[:, len(rows) :] = -math.inf

        for number, part in parts.items():
            similarity = tile[: len(part)]
            torch.mm(part, columns, out=similarity[:, : len(rows)])
            if exclude_self:
                similarity.diagonal(offset=number * QUERIES_AT_ONCE - first).fill_(-math.inf)

            if number in found:
                found[number] = improved(*found[number], similarity, first, k)
            else:
                values, places = largest(similarity[:, : len(rows)], min(k, len(rows)))
                found[number] = values, places + first
    if shared:
        found = best_of_all(found, count, k, queries.device)

    values = torch.cat([found[number][0] for number in range(count)])
    return values, torch.cat([found[number][1] for number in range(count)])


def best_of_all(
    found: dict[int, tuple[Tensor, Tensor]], count: int, k: int, device: torch.device
) -> dict[int, tuple[Tensor, Tensor]]:
    """The k best of what every process has found, for each of `count` parts of the queries."""
    best = {}
    for number in range(count):
        own = [tensor.cpu() for tensor in found.get(number, ())]
        told = [pair for pair in gather_objects(own) if pair]
        values, index = (torch.cat(tensors, dim=1) for tensors in zip(*told, strict=True))
        values, index = best_first(values, index, min(k, values.shape[1]))
        best[number] = values.to(device), index.to(device)
    return best


def best_first(values: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of every row of `values` (r, c), and what `index` (r, c) has there.

    Of equal entries those of the lower index come first.
    """
    more = values.topk(min(k + 1, values.shape[1]), dim=1)
    best, places = more.values[:, :k], index.gather(1, more.indices[:, :k])

    # topk gives equal entries in any order: such rows, which are rare, are sorted
    tied = (more.values[:, 1:] == more.values[:, :-1]).any(dim=1)
    if tied.any():
        by_index = index[tied].sort(dim=1)
        ordered = values[tied].gather(1, by_index.indices).sort(dim=1, descending=True, stable=True)
        best[tied] = ordered.values[:, :k]
        places[tied] = by_index.values.gather(1, ordered.indices[:, :k])
    return best, places


def largest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of every row of a tile (r, c), of equal ones the first, and where.

    The columns fall into blocks. The k largest entries of a row lie in the k blocks with the
    largest maxima, for each of those holds one entry that is at least as large as all of any other
    block. So two short searches stand for a long one. One entry more is looked for than is asked:
    it says whether the last one is equal to others, which may be in any block.
    """
    columns = similarity.shape[1]
    more = min(k + 1, columns)
    # makes the two searches equally long
    size = math.isqrt(columns // more)
    if size < 2:
        everywhere = torch.arange(columns, device=similarity.device).expand_as(similarity)
        return best_first(similarity, everywhere, k)

    # block b holds the columns b, b + count, b + 2 count, ...; a few columns are left over
    count = columns // size
    grid = similarity[:, : size * count].unflatten(1, (size, count))
    rest = similarity[:, size * count :]
    blocks = grid.amax(dim=1).topk(more, dim=1, sorted=False).indices

    inside = grid.gather(2, blocks[:, None].expand(-1, size, -1)).flatten(1)
    values, places = torch.cat([inside, rest], dim=1).topk(more, dim=1)

    # from places among the candidates back to columns of the tile
    column = places // more * count + blocks.gather(1, places % more)
    column = torch.where(places < size * more, column, places + size * (count - more))

    tied = (values[:, 1:] == values[:, :-1]).any(dim=1)
    if tied.any():
        ordered = similarity[tied].sort(dim=1, descending=True, stable=True)
        values[tied] = ordered.values[:, :more]
        column[tied] = ordered.indices[:, :more]
    return values[:, :k], column[:, :k]


def improved(
    values: Tensor, index: Tensor, similarity: Tensor, start: int, k: int
) -> tuple[Tensor, Tensor]:
    """The k best of what was found so far and the next tile (r, c), which begins at `start`.

    After the first tile few entries are better than the worst of the k, some k / t of the t-th per
    row. The columns fall into blocks, of which only those are looked into whose maximum is better.

    Args:
        values, index: (r, up to k), best first, of rows before `start`.
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
    return best_first(all_values, all_index, min(k, all_values.shape[1]))
