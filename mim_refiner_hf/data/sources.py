"""Where images lie: finds the undecoded images and the labels of folders, tables (parquet, tar shards) and Hub data sets.

    from mim_refiner_hf.data.sources import find_images
    found = find_images("photos/", config=None, split=None)
    found.sources[0], found.labels                                # bytes or a path, not decoded; int64 (N,) or None

`mim_refiner_hf.data.open_images` is the public door, and its docstring says what each kind of source means; this file
holds the rules for names, splits, columns and labels, and the sentences for what goes wrong.
"""

import difflib
import hashlib
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..clustering.decoding import ImageSource
from ..runtime.retry import patiently
from .paths import own_file

# `datasets` is imported where it is needed: it costs seconds that an image folder does not need.

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
TRAIN, TEST, VALIDATION = (
    ("train", "training"),
    ("test", "testing"),
    ("validation", "val", "valid", "dev"),
)
SPLIT_WORDS = {word: words[0] for words in (TRAIN, TEST, VALIDATION) for word in words}
IMAGE_COLUMNS = ("image", "img")  # preferred in this order where several columns hold images
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")  # `cls` is WebDataset's name


class Entries(NamedTuple):
    """What a data set consists of, to notice that it changed: names, a 32-bit check of each with its size, and a digest of all."""

    names: Sequence[Any]
    checks: np.ndarray
    digest: str

    @classmethod
    def of(cls, names: Sequence[Any], about: Iterable[str]) -> "Entries":
        """Of names for messages and a line about each, the same wherever the data set lies: relative path and size of a file."""
        lines = [line.encode(errors="surrogateescape") for line in about]
        return cls(
            names, np.array([zlib.crc32(line) for line in lines], dtype=np.uint32), digest(lines)
        )


class FoundImages(NamedTuple):
    """Undecoded images; `labels` is int64 (N,) with -1 for none, and None where nothing is labelled."""

    sources: Sequence[ImageSource]
    labels: np.ndarray | None
    class_names: list[str] | None
    name: str
    entries: Entries


def find_images(dataset: str, *, config: str | None, split: str | None) -> FoundImages:
    """The images `dataset` names, see `mim_refiner_hf.data.open_images`, which raises the same errors."""
    path = Path(dataset).expanduser()
    try:
        if path.is_dir() and not _is_saved(path) and not _table_files(path):
            return _find_in_folder(path, split)
    except OSError as error:  # what is behind it would be missing without a word
        raise ValueError(
            f"{error.filename} cannot be listed ({error.strerror}); make it readable, or move it away."
        ) from error
    table = load_table(dataset, config=config, split=split, streaming=False)
    image_column, label_column = find_columns(table.features, dataset)
    labels, class_names = _table_labels(table, label_column) if label_column else (None, None)
    return FoundImages(
        _Column(table, image_column, dataset),
        labels,
        class_names,
        dataset,
        _table_entries(path, split, table),
    )


def _table_entries(path: Path, split: str | None, table: Any) -> Entries:
    """The files of a local table, with their sizes, and its rows; the table's own fingerprint, of a revision, from the Hub."""
    if not path.exists():
        return Entries.of(["its revision"], [table._fingerprint])
    files = sorted(path.rglob("*.arrow")) if _is_saved(path) else _table_files(path)
    names = [file.name if file == path else str(file.relative_to(path)) for file in files]
    lines = [f"{name} {_size(file)}" for name, file in zip(names, files, strict=True)]
    return Entries.of([*names, f"its split {split}"], [*lines, f"{split} {len(table)}"])


def _find_in_folder(root: Path, split: str | None) -> FoundImages:
    folder = _split_folder(root, split)
    paths = sorted(_image_files(folder, frozenset()))
    if not paths:
        raise ValueError(
            f"No images in {folder}: looked at every depth for {', '.join(sorted(EXTENSIONS))}."
        )
    parts = [path.relative_to(folder).parts for path in paths]
    labels = class_names = None
    if all(len(part) > 1 for part in parts):
        first_level = [part[0] for part in parts]
        class_names = sorted(set(first_level))
        labels = _numbered(first_level, class_names)
    entries = Entries.of(
        paths, (f"{'/'.join(part)} {_size(path)}" for part, path in zip(parts, paths, strict=True))
    )
    return FoundImages(paths, labels, class_names, str(folder), entries)


def _image_files(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """Everything below a folder that is called an image; links are followed, but not back to a folder that they are in.

    What is no regular file or leads nowhere is among them: it is a broken image, with a reason. OSError for what cannot be listed.
    """
    status = folder.stat()
    if (own := (status.st_dev, status.st_ino)) in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = Path(entry.path)
            if path.is_dir() if entry.is_symlink() else entry.is_dir():
                yield from _image_files(path, above | {own})
            elif path.suffix.lower() in EXTENSIONS:
                yield path


def _size(path: Path) -> int:
    """Bytes of a file; -1 for one that leads nowhere."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _split_folder(root: Path, split: str | None) -> Path:
    """The sub-folder of a split. Without `split`: "train" if all sub-folders are splits (beside "bus" it is a class)."""
    folders = {
        folder.name: folder
        for folder in root.iterdir()
        if folder.is_dir() and not folder.name.startswith(".")
    }
    splits = {
        SPLIT_WORDS[name.lower()]: folder
        for name, folder in folders.items()
        if name.lower() in SPLIT_WORDS
    }
    has_splits = len(splits) == len(folders) > 0
    if split is None:
        return splits.get("train", root) if has_splits else root
    if split in folders:
        return folders[split]
    if (name := SPLIT_WORDS.get(split)) in splits:
        return splits[name]
    if split == "train" and not has_splits:
        return root
    raise ValueError(
        f"{root} has no split (sub-folder) {split!r}; it has {sorted(folders) or 'none: leave split out'}."
    )


def load_table(dataset: str, *, config: str | None, split: str | None, streaming: bool) -> Any:
    """A `datasets.Dataset` (`IterableDataset` if `streaming`) of one split, with one clear sentence for what goes wrong."""
    import datasets

    path = Path(dataset).expanduser()
    if not path.exists():
        _refuse_local_looking(dataset, path)
    try:
        if path.exists():
            return _load_local(path, split, streaming=streaming)
        load = partial(
            datasets.load_dataset, dataset, config, split=split or "train", streaming=streaming
        )
        return patiently(load, f"opening {dataset}")
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"No data set {dataset!r}: not a path here, not 'digits', and not on the Hub, or private ({_line(error)})."
        ) from error
    except ConnectionError as error:
        raise ConnectionError(
            f"No path {dataset!r} here, and the Hub cannot be reached to look for it ({_line(error)}); check name and network."
        ) from error
    except ValueError as error:
        raise ValueError(f"Cannot open {dataset!r}: {_line(error)}") from error


def _load_local(path: Path, split: str | None, *, streaming: bool) -> Any:
    import datasets

    if _is_saved(path):
        saved = datasets.load_from_disk(str(path))
        table = (
            saved[_choose_split(saved, split)] if isinstance(saved, datasets.DatasetDict) else saved
        )
        return table.to_iterable_dataset() if streaming else table
    files = _table_files(path)
    if not files:
        folder = str(_split_folder(path, split))
        return datasets.load_dataset(
            "imagefolder", data_dir=folder, split="train", streaming=streaming
        )
    splits = _by_split(files, path)
    name = _choose_split(splits, split)
    rows = "" if split is None else split.partition("[")[1] + split.partition("[")[2]
    builder = "webdataset" if files[0].suffix.lower() == ".tar" else "parquet"
    return datasets.load_dataset(
        builder, data_files={name: splits[name]}, split=name + rows, streaming=streaming
    )


def _refuse_local_looking(dataset: str, path: Path) -> None:
    """A missing path must not end as an opaque answer of the Hub, whose names are `name` or `owner/name`."""
    looks_local = (
        dataset.startswith((".", "/", "~"))
        or dataset.endswith("/")
        or dataset.count("/") > 1
        or "\\" in dataset
    )
    if (
        looks_local
        or not dataset
        or path.suffix.lower() in EXTENSIONS | {".parquet", ".tar", ".zip", ".csv"}
    ):
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, n=1)
        known = "give a folder of images, a .parquet file, 'digits' or the name of a data set on the Hub."
        raise FileNotFoundError(
            f"No file or folder {dataset!r}: {f'did you mean {path.parent / close[0]}?' if close else known}"
        )


def _is_saved(path: Path) -> bool:
    """Written by `datasets`' `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _is_visible(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def _table_files(path: Path) -> list[Path]:
    """The parquet files of a path, or else its tar shards."""
    suffixes = (".parquet", ".tar")
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise ValueError(
                f"{path} is one file and neither .parquet nor .tar; give the folder that holds the images."
            )
        return [path]
    found = [
        sorted(file for file in path.rglob(f"*{suffix}") if _is_visible(file, path))
        for suffix in suffixes
    ]
    return found[0] or found[1]


def _by_split(files: list[Path], root: Path) -> dict[str, list[str]]:
    """Files by the first word of their name (below `root`) that names a split; "train" without such a word."""
    splits: dict[str, list[str]] = {}
    for file in files:
        words = re.findall(
            "[a-z]+", (file.name if file == root else str(file.relative_to(root))).lower()
        )
        splits.setdefault(
            next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train"), []
        ).append(str(file))
    return splits


def _choose_split(splits: Mapping[str, Any], split: str | None) -> str:
    """`split` may carry a slice ("train[:10%]"); without it "train", or the only split there is."""
    if split is None and len(splits) == 1:
        return next(iter(splits))
    name = (split or "train").partition("[")[0]
    name = name if name in splits else SPLIT_WORDS.get(name, name)
    if name not in splits:
        raise ValueError(f"no split {name!r}; it has {sorted(splits)}.")
    return name


class _Column(Sequence[ImageSource]):
    """One column of a `datasets.Dataset` as undecoded images."""

    def __init__(self, table: Any, column: str, dataset: str) -> None:
        self.table, self.column = (
            undecoded(table.select_columns([column]), column, table.features),
            column,
        )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: Any) -> Any:
        return stored(self.table[i][self.column], self.dataset)


def undecoded(table: Any, column: str, features: Mapping[str, Any]) -> Any:
    """The same table or stream, giving the stored form of `column` instead of a decoded image."""
    import datasets

    return (
        table.cast_column(column, datasets.Image(decode=False))
        if isinstance(features[column], datasets.Image)
        else table
    )


def stored(cell: Any, dataset: str) -> ImageSource:
    """What a cell holds: raw bytes, or {"bytes", "path"} with one of them None. An empty cell gives b"" (undecodable).

    ValueError for a path that is not of this data set."""
    if not isinstance(cell, dict):
        return cell or b""
    path = cell.get("path")
    if cell.get("bytes") is not None or path is None:
        return cell.get("bytes") or b""
    file = own_file(path, dataset)
    if isinstance(file, Path):
        return file
    import datasets

    image: Image.Image = datasets.Image().decode_example(
        {"bytes": None, "path": file}
    )  # in its repository, or in a zip
    return image


def find_columns(features: Mapping[str, Any], name: str) -> tuple[str, str | None]:
    """The image column and the label column (or None), by type and name; ValueError lists the columns if none holds images."""
    import datasets

    def holds_images(feature: Any) -> bool:
        is_binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
        return (
            is_binary
            or isinstance(feature, datasets.Image)
            or (isinstance(feature, dict) and "bytes" in feature)
        )

    def holds_labels(column: str) -> bool:
        dtype = str(getattr(features[column], "dtype", ""))
        return isinstance(features[column], datasets.ClassLabel) or (
            column in LABEL_COLUMNS and re.match("u?int|string|large_string", dtype) is not None
        )

    images = [column for column in features if holds_images(features[column])]
    labels = [column for column in features if holds_labels(column)]
    if not images:
        raise ValueError(
            f"No image column in {name}: its columns are {list(features)}; one must hold images or encoded bytes."
        )
    image = next((column for column in IMAGE_COLUMNS if column in images), images[0])
    return image, next(
        (column for column in LABEL_COLUMNS if column in labels), labels[0] if labels else None
    )


def _table_labels(table: Any, column: str) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels of all rows without decoding an image; texts are numbered in sorted order; all null or -1 counts as unlabelled."""
    values = table.select_columns([column])[:][column]
    class_names = getattr(table.features[column], "names", None)
    if any(isinstance(value, str) for value in values):
        class_names = sorted({value for value in values if value is not None})
        labels = _numbered(values, class_names)
    else:
        labels = np.array([-1 if value is None else value for value in values], dtype=np.int64)
    return (labels, class_names) if (labels >= 0).any() else (None, None)


def _numbered(names: Sequence[str | None], class_names: list[str]) -> np.ndarray:
    number = {name: i for i, name in enumerate(class_names)}
    return np.array([-1 if name is None else number[name] for name in names], dtype=np.int64)


def digest(parts: Iterable[str | bytes]) -> str:
    """16 hexadecimal digits that tell two lists of parts apart."""
    total = hashlib.sha256()
    for part in parts:
        total.update((part.encode() if isinstance(part, str) else part) + b"\n")
    return total.hexdigest()[:16]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
