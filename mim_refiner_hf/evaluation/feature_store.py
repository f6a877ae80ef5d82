"""A folder of features, computed once and read by everything: parquet shards, what they hold, and what could not be read.

    from mim_refiner_hf.evaluation import FeatureStore, feature_set
    store = FeatureStore("features/")               # made by `mim-refiner embed MODEL --dataset photos/ --out features/`
    store.columns                                   # {"block23.cls": 1024}, names as in features.py
    store.features("block23.cls")                   # (N, D) fp32
    for rows in store.batches("block23.cls"): ...   # the same, at most 1024 rows at a time, in bounded memory
    store.labels, store.indices, store.paths, store.class_names, store.broken
    feature_set(store)                              # what `extract_features` returns, for the protocols

| in the folder          | is                                                                                                 |
|------------------------|----------------------------------------------------------------------------------------------------|
| `manifest.json`        | encoder and data with fingerprints, preprocessing, dtype, columns, shard size, versions, command   |
| `shards/00000.parquet` | `shard_size` images in their order: `index` and `label` (int64, -1 for none), `path`, and for each |
|                        | column a fixed-size list of float32; a broken image has no row                                     |
| `records/00000.json`   | of a finished shard: rows, size and sha256 of its file, and its broken images                      |
| `broken.json`          | all images that could not be read: index, path, reason                                             |

Any parquet reader takes the shards: `datasets.load_dataset("parquet", data_files="features/shards/*.parquet")`, pandas, DuckDB.
Features are float32 whatever they were computed in, so what bf16 gave is kept exactly; the bytes that it leaves zero cost nothing,
for each of the four bytes of a number is compressed by itself (byte stream split, zstd).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..runtime.files import sha256_of, whole_file, write_json
from .features import FeatureSet, check_blocks

FORMAT = "mim_refiner_hf features, version 1"
MANIFEST = "manifest.json"
ROWS_AT_ONCE = 1024  # rows of a row group, which is what a reader holds in memory

# --- the format: manifest, shards, records ------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a store; None where there is nothing, hidden files apart.

    Raises:
        ValueError: when `folder` is a file or holds something else.
    """
    if not folder.exists() or (
        folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())
    ):
        return None
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text()) if path.is_file() else None
    except ValueError:  # not even JSON
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(
            f"{folder} exists and is not a folder of features, so it is left alone; name another one"
        )
    return manifest


def number_of_shards(manifest: Mapping[str, Any]) -> int | None:
    """Shards of a complete store; None for a stream that has not been read to its end."""
    return (
        None
        if manifest["num_images"] is None
        else math.ceil(manifest["num_images"] / manifest["shard_size"])
    )


def shard_file(folder: Path, shard: int) -> Path:
    """Where a shard is."""
    return folder / "shards" / f"{shard:05d}.parquet"


def record_file(folder: Path, shard: int) -> Path:
    """Where the record of a finished shard is."""
    return folder / "records" / f"{shard:05d}.json"


def read_record(folder: Path, shard: int) -> dict[str, Any] | None:
    """What is known of a finished shard; None if it is not finished, or its file is not of the size that was written."""
    try:
        record: dict[str, Any] = json.loads(record_file(folder, shard).read_text())
        return record if shard_file(folder, shard).stat().st_size == record["size"] else None
    except (FileNotFoundError, ValueError):  # ValueError: cut off when the machine went down
        return None


def is_intact(folder: Path, shard: int) -> bool:
    """Whether a shard is finished and its file, byte for byte, the one that was written."""
    record = read_record(folder, shard)
    return record is not None and sha256_of(shard_file(folder, shard)) == record["sha256"]


def write_shard(
    folder: Path, shard: int, rows: Mapping[str, Any], broken: Sequence[Mapping[str, Any]]
) -> None:
    """Write one shard, then its record: whatever happens, a shard with a record is complete and on the disk.

    Args:
        folder: of the store.
        shard: its number.
        rows: `index`, `label`, `path` as lists, every column of features as (rows, D) float32.
        broken: {"index", "path", "reason"} of the images that have no row.
    """
    types = {"index": pa.int64(), "label": pa.int64(), "path": pa.string()}
    columns = {}
    for name, values in rows.items():
        if name in types:
            columns[name] = pa.array(values, types[name])
        else:
            types[name] = pa.list_(
                pa.field("element", pa.float32(), nullable=False), values.shape[1]
            )
            columns[name] = pa.FixedSizeListArray.from_arrays(
                pa.array(values.reshape(-1)), type=types[name]
            )
    schema = pa.schema([pa.field(name, types[name], nullable=False) for name in columns])
    path, record = shard_file(folder, shard), record_file(folder, shard)
    for parent in (path.parent, record.parent):
        parent.mkdir(exist_ok=True)
    with whole_file(path) as new:
        pq.write_table(
            pa.table(list(columns.values()), schema=schema),
            new,
            row_group_size=ROWS_AT_ONCE,
            compression="zstd",
            use_dictionary=["path", "label"],
            use_byte_stream_split=[
                f"{name}.list.element"
                for name in columns
                if pa.types.is_fixed_size_list(types[name])
            ],
            write_page_checksum=True,
        )
        about = {
            "rows": len(rows["index"]),
            "size": new.stat().st_size,
            "sha256": sha256_of(new),
            "broken": broken,
        }
    write_json(record, about)


# --- the reader ---------------------------------------------------------------------------------------------------------------


class FeatureStore:
    """A complete store, opened for reading; N rows, one for each image that could be read, in the data set's order.

    Attributes:
        folder: where it is.
        manifest: all that is known of encoder, data and computation.
        columns: name -> width D.
        class_names: a name per label, or None.
        broken: {"index", "path", "reason"} of each image that has no row.

    Raises:
        FileNotFoundError: `folder` does not exist or is empty.
        ValueError: it holds something else, or shards are not finished. Reading raises it where a file is damaged: every page
            has a checksum.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise FileNotFoundError(
                f"{folder} holds no features; make them with mim-refiner embed ... --out {folder}"
            )
        count = number_of_shards(manifest)
        records = [read_record(self.folder, shard) for shard in range(count or 0)]
        finished = [record for record in records if record is not None]
        if count is None or len(finished) < count:
            done = (
                len(list((self.folder / "records").glob("*.json")))
                if count is None
                else len(finished)
            )
            raise ValueError(
                f"{folder} is not complete, {done} of {count or 'an unknown number of'} shards are there; run the command that "
                f"began it again: {manifest['command'] or 'it goes on from there'}"
            )
        self.manifest = manifest
        self.columns: dict[str, int] = manifest["columns"]
        self.class_names: list[str] | None = manifest["class_names"]
        self.rows_of_shards: list[int] = [record["rows"] for record in finished]
        self.broken: list[dict[str, Any]] = [
            image for record in finished for image in record["broken"]
        ]

    def __len__(self) -> int:
        return sum(self.rows_of_shards)

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
        return [path for array in self._read("path") for path in array.to_pylist()]

    def batches(self, column: str) -> Iterator[Tensor]:
        """The rows of a column in order, (at most 1024, D) fp32 at a time; what has been read is not kept.

        ValueError for a column that is not there.
        """
        if column not in self.columns:
            raise ValueError(
                f"{self.folder} has no column {column!r}; it has {', '.join(self.columns)}"
            )
        for array in self._read(column):
            values = array.flatten().to_numpy(zero_copy_only=False, writable=True)
            yield torch.from_numpy(values.reshape(-1, self.columns[column]))

    def features(self, column: str) -> Tensor:
        """A whole column, (N, D) fp32 on the CPU; beside it only 1024 rows are in memory on the way."""
        start, features = 0, torch.empty(len(self), self.columns.get(column, 0))
        for rows in self.batches(column):
            features[start : start + len(rows)] = rows
            start += len(rows)
        return features

    def _read(self, column: str) -> Iterator[Any]:
        """The Arrow arrays of a column, row group by row group."""
        for shard in range(len(self.rows_of_shards)):
            path = shard_file(self.folder, shard)
            try:
                with pq.ParquetFile(
                    path, pre_buffer=False, page_checksum_verification=True
                ) as file:  # no whole file in memory
                    for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[column]):
                        yield batch.column(0)
            except (OSError, pa.ArrowInvalid) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}); embed again into the same folder to repair it"
                ) from error

    def _integers(self, column: str) -> Tensor:
        return torch.from_numpy(
            np.concatenate(
                [np.empty(0, dtype=np.int64), *(a.to_numpy() for a in self._read(column))]
            )
        )


def feature_set(
    store: FeatureStore, blocks: Sequence[int] = (), own_columns: Sequence[str] | None = None
) -> FeatureSet:
    """What `extract_features` gives, read from a store: features of the last block, and of each of `blocks`.

    Row i belongs to image `store.indices[i]`; the two differ only where images were broken.

    Args:
        store: a complete store.
        blocks: 0-based blocks to read beside the last.
        own_columns: the column to read for each block of the encoder; None for the pooling that its configuration asked for.

    Raises:
        ValueError: for a block that the encoder does not have, or a column that the store lacks; it names those it has.
    """
    own: Sequence[str] = own_columns or store.manifest["own_columns"]
    wanted = check_blocks(blocks, len(own))
    features = {
        column: store.features(column) for column in {own[block] for block in (*wanted, -1)}
    }
    return FeatureSet(
        features=features[own[-1]],
        blocks={block: features[own[block]] for block in wanted},
        labels=store.labels if bool((store.labels >= 0).all()) else None,
    )


__all__ = ["FeatureStore", "feature_set"]
