"""Folders of image files: which part is meant, which files are images, what their labels are.

    listing = list_folder("photos/")
    found = find_in_folder(Path("photos/"), listing, split=None)
    found.sources[0], found.labels            # a path; int64 (N,) or None
    stream = as_stream(found)                 # the same images and labels, as a stream

Labels are those of `metadata.csv`, `metadata.jsonl` or `metadata.parquet`, as `datasets` has them:
a column `file_name`, which counts from the table's folder, and a column of labels. Where there is
no such table, they are the names of the first-level folders.
"""

import io
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..clustering.image_items import LOOKED_FOR, FolderListing, image_files, lines_about_the_rest
from ..runtime.distributed import rank
from ..runtime.text import one_line
from ..runtime.wording import setting
from .columns import find_labels, label_of, label_values, numbered
from .found import Entries, FoundImages, SourceOptions, digest, file_size

# `datasets` and `pyarrow` are imported where they are needed: they cost seconds that most folders
# do not need.

logger = logging.getLogger(__name__)

_NAMED_IN_A_LINE = 5
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# words in names of files and folders -> the split they mean
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
}


def find_in_folder(
    root: Path, listing: FolderListing, split: str | None, options: SourceOptions
) -> FoundImages:
    """The images of a folder, or of the split that is one of its sub-folders.

    Args:
        split: may carry a slice, "train[:10%]".

    Raises:
        ValueError: where there are no images, no such split, or metadata that cannot be read.
    """
    name, rows = split_and_rows(split)
    folder = _split_folder(root, listing.files, name)
    inside = [file for file in listing.files if file.startswith(_with_separator(folder))]
    paths = [Path(path) for path in image_files(inside)]
    tables = _metadata_files(root, folder, listing.files)
    tell_left_aside(root, listing._replace(files=inside), [*map(str, paths), *map(str, tables)])
    if not paths:
        raise ValueError(f"No images in {folder}: {LOOKED_FOR}.")

    found = _metadata_labels(tables, paths, options.label_column)
    labels, class_names = found or _folder_labels(folder, paths)
    about = [f"{path.relative_to(folder).as_posix()} {file_size(path)}" for path in paths]
    # other labels are another data set
    about += [f"{table.name} {digest([table.read_bytes()])}" for table in tables]
    chosen = slice_of(rows, len(paths), split)
    if rows:
        about.append(rows)
        paths = paths[chosen]
        labels = None if labels is None else labels[chosen]
    names: list[Path | str] = [*paths, *tables]
    if rows:
        names.append(f"its split {split}")
    entries = Entries.of(names, about)
    return FoundImages(paths, labels, class_names, str(folder), entries, tables=tables)


def tell_left_aside(root: Path, listing: FolderListing, taken: Sequence[str]) -> None:
    """Say once what of a folder is not read."""
    hint = f"; {setting('follow_links')} enters them"
    for line in lines_about_the_rest(root, listing, taken, hint):
        if rank() == 0:
            logger.warning(line)


def as_stream(found: FoundImages) -> Any:
    """The same images and labels as a `datasets.IterableDataset`, of which nothing is read yet."""
    import datasets

    features = datasets.Features(image=datasets.Image(decode=False))
    # a relative one would count from the folder itself, as in a table
    rows = {"paths": [str(Path(str(path)).absolute()) for path in found.sources]}
    if found.labels is not None:
        names = found.class_names
        features["label"] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
        rows["labels"] = found.labels.tolist()
    return datasets.IterableDataset.from_generator(_examples, features=features, gen_kwargs=rows)


def _examples(paths: list[str], labels: list[int] | None = None) -> Iterator[dict[str, Any]]:
    for place, path in enumerate(paths):
        example: dict[str, Any] = {"image": {"bytes": None, "path": path}}
        if labels is not None:
            example["label"] = labels[place]
        yield example


# --- splits


def split_and_rows(split: str | None) -> tuple[str | None, str]:
    """A split's name and its slice: "train[:10%]" -> ("train", "[:10%]")."""
    if split is None:
        return None, ""
    name, bracket, rows = split.partition("[")
    return name, bracket + rows


def slice_of(rows: str, count: int, split: str | None) -> slice:
    """Which of `count` images a slice means, as `datasets` reads it."""
    if not rows:
        return slice(None)
    import datasets

    try:
        instruction = datasets.ReadInstruction.from_spec(f"all{rows}")
        (absolute,) = instruction.to_absolute({"all": count})
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"{setting('split', split)}: no such part; write train[:10%], train[100:200] or "
            "train[-50:]"
        ) from error
    if absolute.from_ >= absolute.to:
        raise ValueError(f"{setting('split', split)}: holds none of the {count} images")
    return slice(absolute.from_, absolute.to)


def _with_separator(folder: Path) -> str:
    return os.path.join(folder, "")  # noqa: PTH118


def _split_folder(root: Path, files: Sequence[str], split: str | None) -> Path:
    """The sub-folder of a split; `root` where it has none, or where none is asked for.

    Without `split` it is "train" if all sub-folders are splits; beside "bus" it is a class.
    """
    below = (Path(file[len(_with_separator(root)) :]).parts for file in files)
    names = {parts[0] for parts in below if len(parts) > 1}
    splits = {SPLIT_WORDS[name.lower()]: name for name in names if name.lower() in SPLIT_WORDS}
    has_splits = len(splits) == len(names) > 0

    if split is None:
        return root / splits["train"] if has_splits and "train" in splits else root
    if split in names:
        return root / split
    name = SPLIT_WORDS.get(split)
    if name in splits:
        return root / splits[name]
    if split == "train" and not has_splits:
        return root
    known: list[str] | str = sorted(names)[:_NAMED_IN_A_LINE]
    more = len(names) - len(known)
    known = f"{known or 'none: leave split out'}{f' and {more} more' if more else ''}"
    raise ValueError(f"{root} has no split (sub-folder) {split!r}; it has {known}.")


# --- labels


def _folder_labels(
    folder: Path, paths: Sequence[Path]
) -> tuple[np.ndarray | None, list[str] | None]:
    """The first level below a folder, if every image lies in one; and the names of the classes."""
    parts = [path.relative_to(folder).parts for path in paths]
    outside = sum(len(part) == 1 for part in parts)
    if outside:
        if outside < len(parts) and rank() == 0:
            logger.warning(
                "%d of %d images in %s lie in no folder of a class: all count as unlabelled",
                outside,
                len(parts),
                folder,
            )
        return None, None

    first_level = [part[0] for part in parts]
    class_names = sorted(set(first_level))
    return numbered(first_level, class_names), class_names


def _metadata_files(root: Path, folder: Path, files: Sequence[str]) -> list[Path]:
    """The tables that may label images of a folder: anywhere in it, or at the top of the root."""
    tables = [Path(file) for file in files if os.path.basename(file) in METADATA]  # noqa: PTH119
    return [table for table in tables if table.is_relative_to(folder) or table.parent == root]


def _metadata_labels(
    tables: Sequence[Path], paths: Sequence[Path], asked: str | None
) -> tuple[np.ndarray, list[str] | None] | None:
    """Labels by the tables' file names; None where no table has labels.

    ValueError for a column that is asked for and that no table has.
    """
    place = {path: i for i, path in enumerate(paths)}
    values: list[int | str | None] = [None] * len(paths)
    labelled: set[int] = set()
    torn: set[int] = set()
    missing = 0
    for table in tables:
        for file, label in _rows_of(table, asked):
            i = place.get(Path(os.path.normpath(table.parent / file)))
            if i is None:
                missing += 1
                continue
            labelled.add(i)
            if label is not None and values[i] not in (None, label):
                torn.add(i)
            values[i] = values[i] if label is None else label
    for i in torn:
        values[i] = None

    if torn and rank() == 0:
        logger.warning(
            "%d images have several labels in %s and count as unlabelled, such as %s",
            len(torn),
            " and ".join(map(str, tables)),
            one_line(paths[min(torn)]),
        )
    if missing and rank() == 0:
        logger.warning(
            "%d rows of %s name files that are not there", missing, " and ".join(map(str, tables))
        )
    if asked is not None and not tables:
        raise ValueError(
            f"{setting('label_column', asked)}: the folder has none of {', '.join(METADATA)}"
        )
    if all(value is None for value in values):
        return None
    if len(labelled) < len(paths) and rank() == 0:
        logger.warning(
            "%d of %d images have no row in %s and count as unlabelled",
            len(paths) - len(labelled),
            len(paths),
            " or ".join(map(str, tables)),
        )
    return label_values(values)


def read_metadata(file: Path) -> tuple[Any, Any]:
    """A metadata file as an Arrow table, and its `datasets.Features`.

    Raises:
        ValueError: for what is no such table.
    """
    import datasets
    import pyarrow as pa

    try:
        table = _readers()[file.suffix](file)
        # of "file_name, label"
        stripped = [name.strip() for name in table.column_names]
        if len(set(stripped)) == len(stripped):
            table = table.rename_columns(stripped)
        return table, datasets.Features.from_arrow_schema(table.schema)
    # each reader has its own for what is no such table
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file} cannot be read: {reason}; repair or remove it.") from error


def file_names_of(table: Any) -> list[str] | None:
    """The file names in a metadata file, with slashes; None where it has no column of them."""
    names = [name for name in table.column_names if re.fullmatch("(.*_)?file_name", name)]
    if not names:
        return None
    return [str(name).replace("\\", "/") for name in table.column(names[0]).to_pylist()]


def _rows_of(file: Path, asked: str | None) -> Iterator[tuple[str, int | str | None]]:
    """(file name, label) of each row of a metadata file; none where it has no labels."""
    table, features = read_metadata(file)
    files = file_names_of(table)
    label = find_labels(features, str(file), asked)
    if files is None:
        if rank() == 0:
            logger.warning("%s has no column file_name and labels nothing", file)
        return
    if label is None:
        if rank() == 0:
            shown = one_line(", ".join(features))[:200]
            logger.warning(
                "%s has no column of labels, only %s; %s names one",
                file,
                shown,
                setting("label_column"),
            )
        return
    class_names = getattr(features[label], "names", None)
    for name, cell in zip(files, table.column(label).to_pylist(), strict=True):
        value = label_of(cell.strip() if isinstance(cell, str) else cell)
        if class_names is not None and isinstance(value, int):
            value = class_names[value]
        yield name, value


def _readers() -> Mapping[str, Callable[[Path], Any]]:
    """How a table of each ending is read."""
    import pyarrow as pa
    from pyarrow import csv, json, parquet

    def read_csv(file: Path) -> Any:
        # of other bytes the reader would make a column that is no text
        content = file.read_text(encoding="utf-8-sig").encode()
        table = csv.read_csv(io.BytesIO(content))
        numbers = [column.name for column in table.schema if pa.types.is_integer(column.type)]
        as_text = csv.ConvertOptions(column_types=dict.fromkeys(numbers, pa.string()))
        texts = csv.read_csv(io.BytesIO(content), convert_options=as_text)
        # 007 and 7 are two words and one number
        for name in set(numbers):
            if len(texts[name].unique()) > len(table[name].unique()):
                table = table.set_column(table.schema.get_field_index(name), name, texts[name])
        return table

    return {".csv": read_csv, ".jsonl": json.read_json, ".parquet": parquet.read_table}
