"""The files of a feature store: its manifest, its shards, and the records of finished shards.

| in the folder          | is                                                                     |
|------------------------|------------------------------------------------------------------------|
| `manifest.json`        | encoder and data with fingerprints, preprocessing, dtype, columns,     |
|                        | shard size, versions, command                                          |
| `shards/00000.parquet` | some images in their order: `index` and `label` (int64, -1 for none),  |
|                        | `path`, and for each column a fixed-size list of float32; a broken     |
|                        | image has no row; odd bytes of a path are spelt out (`runtime/text`)   |
| `records/00000.json`   | of a finished shard: rows, size and sha256 of its file, its broken     |
|                        | images, and that its features are finite: others are never written     |
| `broken.json`          | all images that could not be read: index, path, reason                 |

A store of a whole data set is complete when all its shards are there. One that grows
(`feature_cache.py`) holds what was asked for so far: its manifest names no number of images, and
its shards may differ in their columns.

What reads a whole store is in feature_store.py.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..data.images import Broken
from ..runtime.files import check_kinds, sha256_of, whole_file, write_json
from ..runtime.strangers import parse_json
from ..runtime.text import one_line, spelt_out
from ..runtime.versions import FORMAT_VERSIONS, check_format

_FORMAT = "mim_refiner_hf features, version "
STORE_FORMAT = f"{_FORMAT}{FORMAT_VERSIONS['features']}"
STORE_MANIFEST = "manifest.json"
_SHARDS = "shards"
_RECORDS = "records"
# rows of a row group, which is what a reader holds in memory
_ROWS_OF_GROUP = 1024
# far above what anybody embeds
_MOST_IMAGES = 10**12
_FACTS = {"index": pa.int64(), "label": pa.int64(), "path": pa.string()}


class Identity(TypedDict):
    """What a store is of: `whole` is the fingerprint of the data set that a subset was taken from.

    Of an encoder there is none.
    """

    name: str
    fingerprint: str
    whole: NotRequired[str]


class StoreManifest(TypedDict):
    """`manifest.json`; what the keys mean is said in manifest.py, which makes one."""

    format: str
    encoder: Identity
    dtype: str
    preprocessing: dict[str, Any]
    data: Identity
    num_images: int | None
    class_names: list[str] | None
    columns: dict[str, int]
    own_columns: list[str]
    shard_size: int
    versions: dict[str, str]
    command: str | None


class ShardRecord(TypedDict):
    """The record of a finished shard; earlier versions did not note `finite`."""

    rows: int
    size: int
    sha256: str
    finite: NotRequired[bool]
    broken: list[Broken]


class ShardRows(NamedTuple):
    """The readable images of a shard, and their features by column, (rows, D) float32 each."""

    index: list[int]  # type: ignore[assignment]  # hides tuple.index, which nobody asks of rows
    label: list[int]
    path: list[str]
    columns: dict[str, NDArray[np.float32]]


def read_manifest(folder: Path) -> StoreManifest | None:
    """The manifest of a store; None where there is nothing, hidden files apart.

    Raises:
        ValueError: when `folder` is a file or holds something else, and as `check_kinds`.
        NewerFormatError: for a store of a newer version.
    """
    if not folder.exists():
        return None
    if folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir()):
        return None

    path = folder / STORE_MANIFEST
    manifest = None
    if path.is_file():
        try:
            manifest = parse_json(path.read_text())
        except ValueError:  # not even JSON
            manifest = None
    stated = str(manifest.get("format")) if isinstance(manifest, dict) else ""
    version = re.fullmatch(rf"{_FORMAT}(\d{{1,9}})", stated)
    if version is not None:
        check_format("features", int(version[1]), folder)
    if manifest is None or version is None:
        raise ValueError(
            f"{folder} exists and is not a folder of features, so it is left alone; "
            "name another one"
        )
    _check_manifest(manifest, path)
    check_kinds(folder, (_SHARDS, _RECORDS))
    for part in (_SHARDS, _RECORDS):
        check_kinds(folder / part)
    return manifest


def _check_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    """ValueError for a manifest in which something is missing, of another type or out of range."""

    def is_count(value: Any, least: int) -> bool:
        return type(value) is int and least <= value <= _MOST_IMAGES

    names = manifest.get("class_names") or []
    columns = manifest.get("columns")
    fine = {
        "num_images": manifest.get("num_images") is None or is_count(manifest["num_images"], 0),
        "shard_size": is_count(manifest.get("shard_size"), 1),
        "class_names": isinstance(names, list) and all(isinstance(each, str) for each in names),
        "columns": isinstance(columns, dict) and all(is_count(n, 1) for n in columns.values()),
        "command": isinstance(manifest.get("command"), str | None),
    }
    for field, holds in fine.items():
        if not holds:
            shown = one_line(manifest.get(field))[:80]
            raise ValueError(f"{path} is damaged: its {field} is {shown}; make the features again")


def number_of_shards(manifest: StoreManifest) -> int | None:
    """Shards of a complete store; None for a stream that has not been read to its end."""
    if manifest["num_images"] is None:
        return None
    return math.ceil(manifest["num_images"] / manifest["shard_size"])


def shard_file(folder: Path, shard: int) -> Path:
    """Where a shard is."""
    return folder / _SHARDS / f"{shard:05d}.parquet"


def record_file(folder: Path, shard: int) -> Path:
    """Where the record of a finished shard is."""
    return folder / _RECORDS / f"{shard:05d}.json"


def recorded_shards(folder: Path) -> list[int]:
    """The numbers of all shards with a record, ascending."""
    return sorted(int(path.stem) for path in (folder / _RECORDS).glob("*.json"))


def read_record(folder: Path, shard: int) -> ShardRecord | None:
    """What is known of a finished shard; None if its file is not there in the size written."""
    try:
        record = parse_json(record_file(folder, shard).read_text())
        size = shard_file(folder, shard).stat().st_size
    # ValueError: cut off when the machine went down
    except (FileNotFoundError, ValueError):
        return None
    return record if _is_record(record) and size == record["size"] else None


def images_in(folder: Path) -> int:
    """How many images the finished shards hold, broken ones included."""
    records = [read_record(folder, shard) for shard in recorded_shards(folder)]
    return sum(record["rows"] + len(record["broken"]) for record in records if record)


def _is_record(record: object) -> TypeGuard[ShardRecord]:
    """Whether something has the form of a record."""
    if not isinstance(record, dict) or not isinstance(record.get("sha256"), str):
        return False
    whole = all(isinstance(record.get(name), int) for name in ("rows", "size"))
    return whole and record["rows"] >= 0 and isinstance(record.get("broken"), list)


def shard_is_intact(folder: Path, shard: int) -> bool:
    """Whether a shard is finished, its file, byte for byte, the one written, and all in it finite.

    Earlier versions wrote NaN too, so what they wrote is read.
    """
    record = read_record(folder, shard)
    path = shard_file(folder, shard)
    if record is None or sha256_of(path) != record["sha256"]:
        return False
    return bool(record.get("finite")) or _is_finite(path)


def _is_finite(path: Path) -> bool:
    """Whether the features of a shard are finite; row group by row group."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS_OF_GROUP):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                if name not in _FACTS:
                    values = column.flatten().to_numpy(zero_copy_only=False)
                    if not np.isfinite(values).all():
                        return False
    return True


def refuse_not_finite(
    values: NDArray[np.float32], column: str, name_of: Callable[[int], str]
) -> None:
    """ValueError, naming an image, where features (N, D) hold NaN or infinity.

    Args:
        name_of: what the image of a row is called.
    """
    wrong = ~np.isfinite(values).all(axis=1)
    if wrong.any():
        raise ValueError(
            f"the features {column} of {wrong.sum()} of {len(values)} images are not finite, first "
            f"those of {name_of(int(wrong.argmax()))}; check the model: its weights are broken, or "
            "overflow in half precision (then compute in fp32)"
        )


def columns_of_shard(folder: Path, shard: int) -> dict[str, int]:
    """The columns of features in a finished shard: name -> width."""
    # a file, not its path: Arrow takes none that is no valid Unicode
    with shard_file(folder, shard).open("rb") as file:
        schema = pq.read_schema(file)
    return {field.name: field.type.list_size for field in schema if field.name not in _FACTS}


def write_shard(folder: Path, shard: int, rows: ShardRows, broken: list[Broken]) -> None:
    """Write one shard, then its record: a shard with a record is complete and on the disk.

    ValueError, before anything is written, for features that are not finite.

    Args:
        folder: of the store.
        shard: its number.
        rows: of the readable images.
        broken: those images of the shard that have no row.
    """
    for name, values in rows.columns.items():
        refuse_not_finite(values, name, rows.path.__getitem__)

    facts = (rows.index, rows.label, map(spelt_out, rows.path))
    arrays = dict(zip(_FACTS, map(pa.array, facts, _FACTS.values()), strict=True))
    element = pa.field("element", pa.float32(), nullable=False)
    for name, values in rows.columns.items():
        kind = pa.list_(element, values.shape[1])
        arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind)
    fields = [pa.field(name, array.type, nullable=False) for name, array in arrays.items()]

    path = shard_file(folder, shard)
    record = record_file(folder, shard)
    for parent in (path.parent, record.parent):
        parent.mkdir(exist_ok=True)
    with whole_file(path) as new:
        with new.open("wb") as file:
            pq.write_table(
                pa.table(list(arrays.values()), schema=pa.schema(fields)),
                file,
                row_group_size=_ROWS_OF_GROUP,
                compression="zstd",
                use_dictionary=["path", "label"],
                use_byte_stream_split=[f"{name}.list.element" for name in rows.columns],
                write_page_checksum=True,
            )
        about: ShardRecord = {
            "rows": len(rows.index),
            "size": new.stat().st_size,
            "sha256": sha256_of(new),
            "finite": True,
            "broken": broken,
        }

    # the shard must be on the disk before its record
    write_json(record, about)
