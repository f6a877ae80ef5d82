"""A folder of features, computed once and read by everything: parquet shards and what they hold.

    from mim_refiner_hf.evaluation import FeatureStore
    store = FeatureStore("features/")         # made by `mim-refiner embed photos/ --out features/`
    store.columns                             # {"block23.cls": 1024}, names as in features.py
    store.features("block23.cls")             # (N, D) fp32
    for rows in store.batches("block23.cls"): # the same, at most 1024 rows at a time, in bounded
        ...                                   # memory
    store.rows("block23.cls", places)         # chosen rows (n, D)
    store.labels, store.indices, store.paths, store.class_names, store.broken
    store.as_dataset("block23.cls")           # a `datasets.Dataset`, to search with faiss

The files in the folder are described in shard_files.py.

Any parquet reader takes the shards, such as pandas, DuckDB, or
`datasets.load_dataset("parquet", data_files="features/shards/*.parquet")`. Features are float32
whatever they were computed in, so what bf16 gave is kept exactly. The bytes that it leaves zero
cost nothing, for each of the four bytes of a number is compressed by itself (byte stream split,
zstd).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.images import Broken
from ..runtime.text import read_back
from .shard_files import (
    STORE_MANIFEST,
    columns_of_shard,
    images_in,
    number_of_shards,
    read_manifest,
    read_record,
    recorded_shards,
    shard_file,
)

if TYPE_CHECKING:
    import datasets


class FeatureStore:
    """A store, opened for reading: N rows, one for each image that could be read.

    The rows are in the order of the shards, which for a store of a data set is the data set's.

    Args:
        folder: where it is.
        shards: of a store that grows, the finished shards to read; None for all of a complete one.

    Attributes:
        manifest: all that is known of encoder, data and computation.
        columns: name -> width D, of those that all shards have.
        class_names: a name per label, or None.
        broken: {"index", "path", "reason"} of each image that has no row.

    Raises:
        FileNotFoundError: `folder` does not exist or is empty.
        ValueError: it holds something else, or shards are not finished. Reading raises it where a
            file is damaged: every page has a checksum.
    """

    def __init__(self, folder: str | Path, shards: Sequence[int] | None = None) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise FileNotFoundError(
                f"{folder} holds no features; make them with mim-refiner embed ... --out {folder}"
            )
        self.manifest = manifest
        self.class_names = manifest["class_names"]
        self.columns = manifest["columns"]
        if shards is None:
            self.shards = self._all_shards()
        else:
            self.shards = shards
            widths = [set(columns_of_shard(self.folder, shard).items()) for shard in shards]
            self.columns = dict(set.intersection(*widths)) if widths else {}

        self.num_rows = 0
        # of each shard, the number of its first row, and how many there are
        self._first: list[int] = []
        self._count: list[int] = []
        self.broken: list[Broken] = []
        for shard in self.shards:
            record = read_record(self.folder, shard)
            assert record is not None  # it is finished
            self._first.append(self.num_rows)
            self._count.append(record["rows"])
            self.num_rows += record["rows"]
            self.broken += record["broken"]

    def _all_shards(self) -> Sequence[int]:
        """The shards of a complete store.

        ValueError if some are not finished, or hold another number of images than it states.
        """
        count = number_of_shards(self.manifest)
        done = len(recorded_shards(self.folder))

        if count is not None and count <= done:
            stated = self.manifest["num_images"]
            records = [read_record(self.folder, shard) for shard in range(count)]
            missing = records.count(None)
            held = images_in(self.folder)
            if missing == 0 and held == stated:
                return range(count)
            if missing == 0:
                raise ValueError(
                    f"{self.folder / STORE_MANIFEST} is damaged: its num_images is {stated}, but "
                    f"its shards hold {held}; make the features again"
                )
            done = count - missing

        raise ValueError(
            f"{self.folder} is not complete, {done} of {count or 'an unknown number of'} shards "
            "are there; run the command that began it again: "
            f"{self.manifest['command'] or 'it goes on from there'}"
        )

    def __len__(self) -> int:
        return self.num_rows

    @cached_property
    def labels(self) -> Tensor:
        """(N,) int64, -1 for an image without one."""
        return self._integers("label")

    @cached_property
    def indices(self) -> Tensor:
        """(N,) int64: the place of each image in the whole data set (`Sample.index`)."""
        return self._integers("index")

    @cached_property
    def paths(self) -> list[str]:
        """Where each image came from: its path, or its row in the data set."""
        paths: list[str] = []
        for _, array in self._read("path"):
            paths += map(read_back, array.to_pylist())
        return paths

    def batches(self, column: str) -> Iterator[Tensor]:
        """The rows of a column in order, (at most 1024, D) fp32 at a time, each let go again.

        ValueError for a column that is not there.
        """
        self._check_column(column)
        for _, array in self._read(column):
            yield self._tensor(column, array)

    def features(self, column: str) -> Tensor:
        """A whole column, (N, D) fp32 on the CPU; beside it 1024 rows are in memory on the way."""
        return self.rows(column, np.arange(len(self)))

    def rows(self, column: str, places: NDArray[np.int64]) -> Tensor:
        """Chosen rows of a column, (n, D) fp32 in the order of `places`; no others are read.

        But for those of the same row groups. ValueError for a column that is not there.
        """
        self._check_column(column)
        values = torch.empty(len(places), self.columns[column])
        order = np.argsort(places, kind="stable")
        ascending = places[order]

        def span(start: int, end: int) -> tuple[int, int]:
            """Where the places from `start` to `end` are among the ascending ones."""
            first, last = np.searchsorted(ascending, [start, end])
            return int(first), int(last)

        for start, array in self._read(column, lambda *edges: len(range(*span(*edges))) > 0):
            batch = self._tensor(column, array)
            first, last = span(start, start + len(batch))
            values[order[first:last]] = batch[ascending[first:last] - start]
        return values

    def as_dataset(self, column: str) -> "datasets.Dataset":
        """The store as a `datasets.Dataset`, mapped from an Arrow copy in that library's cache.

            found = store.as_dataset("block23.cls").add_faiss_index("embedding")
            scores, nearest = found.get_nearest_examples("embedding", query, k=10)  # query: (D,)

        Its columns are `index`, `path`, `label` (a `ClassLabel` where the classes have names) and
        `embedding`, float32 of the column's width. Odd bytes of a path stay spelt out.

        Raises:
            ValueError: for a column that is not there, or a store without a row.
        """
        import datasets

        self._check_column(column)
        if not len(self):
            raise ValueError(f"{self.folder} has no row: none of its images could be read")
        files = [str(shard_file(self.folder, shard)) for shard in self.shards]
        names = ["index", "path", "label", column]
        table = datasets.Dataset.from_parquet(files, columns=names).select_columns(names)
        if self.class_names:
            table = table.cast_column("label", datasets.ClassLabel(names=self.class_names))
        return table.rename_column(column, "embedding")

    def _check_column(self, column: str) -> None:
        if column not in self.columns:
            raise ValueError(
                f"{self.folder} has no column {column!r}; it has {', '.join(self.columns)}"
            )

    def _tensor(self, column: str, array: pa.FixedSizeListArray) -> Tensor:
        values = array.flatten().to_numpy(zero_copy_only=False, writable=True)
        return torch.from_numpy(values.reshape(-1, self.columns[column]))

    def _read(
        self, column: str, wanted: Callable[[int, int], bool] = lambda start, end: True
    ) -> Iterator[tuple[int, pa.Array]]:
        """Each row group of a column that is wanted: the number of its first row, and its rows."""
        for shard, first, count in zip(self.shards, self._first, self._count, strict=True):
            if not wanted(first, first + count):
                continue
            path = shard_file(self.folder, shard)
            start = first
            try:
                # without a buffer: no whole file in memory
                with (
                    path.open("rb") as file,
                    pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as rows,
                ):
                    for group in range(rows.num_row_groups):
                        end = start + rows.metadata.row_group(group).num_rows
                        if wanted(start, end):
                            table = rows.read_row_group(group, columns=[column])
                            yield start, table.column(0).combine_chunks()
                        start = end
            except (OSError, pa.ArrowInvalid) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}); "
                    "embed again into the same folder to repair it"
                ) from error

    def _integers(self, column: str) -> Tensor:
        arrays = [array.to_numpy() for _, array in self._read(column)]
        return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *arrays]))
