"""Where images lie: the undecoded images and the labels of folders, tables and Hub data sets.

    from mim_refiner_hf.data.sources import find_images
    found = find_images("photos/", config=None, split=None)
    found.sources[0], found.labels            # bytes or a path, not decoded; int64 (N,) or None

`open_images` is the public door, and its docstring says what each kind of source means. This file
holds the rules for names and splits, and the sentences for what goes wrong.
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

from ..clustering.decoding import ARRAY_EXTENSIONS, EXTENSIONS, ImageSource
from ..runtime.retry import patiently
from ..runtime.text import one_line
from ..runtime.wording import setting
from .columns import ANY_COLUMNS, TableColumn, TableColumns, find_columns, labels_of, numbered

# `datasets` is imported where it is needed: it costs seconds that an image folder does not need.

_TABLE_SUFFIXES = (".parquet", ".tar")
# words in names of files and folders -> the split they mean
_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
}


class Entries(NamedTuple):
    """What a data set consists of, to notice that it changed.

    Attributes:
        names: of its files or rows, for messages.
        checks: a 32-bit check of each with its size.
        digest: of all.
    """

    names: Sequence[Any]
    checks: np.ndarray
    digest: str

    @classmethod
    def of(cls, names: Sequence[Any], about: Iterable[str]) -> "Entries":
        """Of names and a line about each, such as relative path and size of a file.

        The lines are the same wherever the data set lies.
        """
        lines = [line.encode(errors="surrogateescape") for line in about]
        checks = np.array([zlib.crc32(line) for line in lines], dtype=np.uint32)
        return cls(names, checks, digest(lines))


class FoundImages(NamedTuple):
    """Undecoded images; `labels` is int64 (N,), -1 for none, and None where nothing is labelled.

    `names_stated`: the data set itself says which number each name has; else it is their order.
    """

    sources: Sequence[ImageSource | np.ndarray]
    labels: np.ndarray | None
    class_names: list[str] | None
    name: str
    entries: Entries
    names_stated: bool = False


def find_images(
    dataset: str, *, config: str | None, split: str | None, columns: TableColumns = ANY_COLUMNS
) -> FoundImages:
    """The images that `dataset` names; see `open_images`, which raises the same errors."""
    path = Path(dataset).expanduser()
    try:
        if path.is_dir() and not _is_saved(path) and not _table_files(path):
            refuse_columns(dataset, columns)
            return _find_in_folder(path, split)
    # what is behind it would be missing without a word
    except OSError as error:
        raise ValueError(
            f"{error.filename} cannot be listed ({error.strerror}); "
            "make it readable, or move it away."
        ) from error

    table = load_table(dataset, config=config, split=split, streaming=False)
    image_column, label_columns = find_columns(table.features, dataset, columns)
    labels, class_names, stated = labels_of(table, label_columns)
    sources = TableColumn(table, image_column, dataset)
    entries = _table_entries(path, split, table)
    return FoundImages(sources, labels, class_names, dataset, entries, stated)


def refuse_columns(dataset: object, columns: TableColumns) -> None:
    """ValueError for columns of what has none."""
    for name, value in zip(("image_column", "label_column"), columns, strict=True):
        if value is not None:
            raise ValueError(f"{setting(name, value)}: {one_line(dataset)} is no table")


def digest(parts: Iterable[str | bytes]) -> str:
    """16 hexadecimal digits that tell two lists of parts apart."""
    total = hashlib.sha256()
    for part in parts:
        line = part.encode() if isinstance(part, str) else part
        total.update(line + b"\n")
    return total.hexdigest()[:16]


# --- image folders


def _find_in_folder(root: Path, split: str | None) -> FoundImages:
    folder = _split_folder(root, split)
    paths = sorted(_image_files(folder, EXTENSIONS))
    paths = paths or sorted(_image_files(folder, ARRAY_EXTENSIONS))
    if not paths:
        suffixes = ", ".join(sorted(EXTENSIONS))
        raise ValueError(f"No images in {folder}: looked at every depth for {suffixes}.")

    # labelled by the first level, if every image lies in a sub-folder
    parts = [path.relative_to(folder).parts for path in paths]
    labels = class_names = None
    if all(len(part) > 1 for part in parts):
        first_level = [part[0] for part in parts]
        class_names = sorted(set(first_level))
        labels = numbered(first_level, class_names)

    about = (f"{'/'.join(part)} {file_size(path)}" for part, path in zip(parts, paths, strict=True))
    return FoundImages(paths, labels, class_names, str(folder), Entries.of(paths, about))


def _image_files(
    folder: Path, endings: frozenset[str], above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[Path]:
    """Everything below a folder that is called an image; links are followed, but not in circles.

    What is no regular file or leads nowhere is among them: it is a broken image, with a reason.

    Args:
        endings: of files, in lower case.
        above: the folders that this one is in, by device and inode.

    Raises:
        OSError: for what cannot be listed.
    """
    status = folder.stat()
    own = (status.st_dev, status.st_ino)
    if own in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = Path(entry.path)
            is_folder = path.is_dir() if entry.is_symlink() else entry.is_dir()
            if is_folder:
                yield from _image_files(path, endings, above | {own})
            elif path.suffix.lower() in endings:
                yield path


def file_size(path: Path) -> int:
    """Bytes of a file; -1 for one that leads nowhere."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _split_folder(root: Path, split: str | None) -> Path:
    """The sub-folder of a split; `root` where it has none, or where none is asked for.

    Without `split` it is "train" if all sub-folders are splits; beside "bus" it is a class.
    """
    folders = {}
    splits = {}
    for folder in root.iterdir():
        if folder.is_dir() and not folder.name.startswith("."):
            folders[folder.name] = folder
            word = folder.name.lower()
            if word in _SPLITS:
                splits[_SPLITS[word]] = folder
    has_splits = len(splits) == len(folders) > 0

    if split is None:
        return splits.get("train", root) if has_splits else root
    if split in folders:
        return folders[split]
    name = _SPLITS.get(split)
    if name in splits:
        return splits[name]
    if split == "train" and not has_splits:
        return root
    known = sorted(folders) or "none: leave split out"
    raise ValueError(f"{root} has no split (sub-folder) {split!r}; it has {known}.")


# --- tables


def load_table(dataset: str, *, config: str | None, split: str | None, streaming: bool) -> Any:
    """A `datasets.Dataset` (`IterableDataset` if `streaming`) of one split.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: with one clear sentence for what went wrong.
    """
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
            f"No data set {dataset!r}: not a path here, not 'digits', and not on the Hub, or "
            f"private ({_line(error)})."
        ) from error
    except ConnectionError as error:
        raise ConnectionError(
            f"No path {dataset!r} here, and the Hub cannot be reached to look for it "
            f"({_line(error)}); check name and network."
        ) from error
    except ValueError as error:
        raise ValueError(f"Cannot open {dataset!r}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _refuse_local_looking(dataset: str, path: Path) -> None:
    """Raise a FileNotFoundError for a missing path that cannot be a name on the Hub.

    It must not end as an opaque answer of the Hub, whose names are `name` or `owner/name`.
    """
    suffixes = EXTENSIONS | {".parquet", ".tar", ".zip", ".csv"}
    looks_local = (
        not dataset
        or dataset.startswith((".", "/", "~"))
        or dataset.endswith("/")
        or dataset.count("/") > 1
        or "\\" in dataset
        or path.suffix.lower() in suffixes
    )
    if not looks_local:
        return

    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    hint = (
        "give a folder of images, a .parquet file, 'digits' or the name of a data set on the Hub."
    )
    if close:
        hint = f"did you mean {path.parent / close[0]}?"
    raise FileNotFoundError(f"No file or folder {dataset!r}: {hint}")


def _load_local(path: Path, split: str | None, *, streaming: bool) -> Any:
    import datasets

    if _is_saved(path):
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            saved = saved[_choose_split(saved, split)]
        return saved.to_iterable_dataset() if streaming else saved

    files = _table_files(path)
    if not files:
        folder = str(_split_folder(path, split))
        return datasets.load_dataset(
            "imagefolder", data_dir=folder, split="train", streaming=streaming
        )

    splits = _by_split(files, path)
    name = _choose_split(splits, split)
    rows = "".join((split or "").partition("[")[1:])
    builder = "webdataset" if files[0].suffix.lower() == ".tar" else "parquet"
    return datasets.load_dataset(
        builder, data_files={name: splits[name]}, split=name + rows, streaming=streaming
    )


def _is_saved(path: Path) -> bool:
    """Written by `datasets`' `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _table_files(path: Path) -> list[Path]:
    """The parquet files of a path, or else its tar shards; hidden ones do not count."""
    if path.is_file():
        if path.suffix.lower() not in _TABLE_SUFFIXES:
            raise ValueError(
                f"{path} is one file and neither .parquet nor .tar; "
                "give the folder that holds the images."
            )
        return [path]

    for suffix in _TABLE_SUFFIXES:
        files = [file for file in path.rglob(f"*{suffix}") if _is_visible(file, path)]
        if files:
            return sorted(files)
    return []


def _is_visible(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def _by_split(files: list[Path], root: Path) -> dict[str, list[str]]:
    """Files by the first word of their name below `root` that names a split; else "train"."""
    splits: dict[str, list[str]] = {}
    for file in files:
        name = file.name if file == root else str(file.relative_to(root))
        words = re.findall("[a-z]+", name.lower())
        split = next((_SPLITS[word] for word in words if word in _SPLITS), "train")
        splits.setdefault(split, []).append(str(file))
    return splits


def _choose_split(splits: Mapping[str, Any], split: str | None) -> str:
    """`split` may carry a slice ("train[:10%]"); without it "train", or the only split there is."""
    if split is None and len(splits) == 1:
        return next(iter(splits))
    name = (split or "train").partition("[")[0]
    if name not in splits:
        name = _SPLITS.get(name, name)
    if name not in splits:
        raise ValueError(f"no split {name!r}; it has {sorted(splits)}.")
    return name


def _table_entries(path: Path, split: str | None, table: Any) -> Entries:
    """The files of a local table with their sizes, and its rows; of the Hub's, the revision."""
    if not path.exists():
        return Entries.of(["its revision"], [table._fingerprint])
    files = sorted(path.rglob("*.arrow")) if _is_saved(path) else _table_files(path)
    names = [file.name if file == path else str(file.relative_to(path)) for file in files]
    lines = [f"{name} {file_size(file)}" for name, file in zip(names, files, strict=True)]
    return Entries.of([*names, f"its split {split}"], [*lines, f"{split} {len(table)}"])
