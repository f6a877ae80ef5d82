"""Fields of metadata: a value for every image, such as its camera, from a column beside the images.

    fields = find_fields(images, ["camera", "site"], flag="forget", file=None)
    fields[0].values            # int64, by place in the whole data set; -1 where it is missing

A field is a column of the table that the images are in, of a folder's `metadata.csv` (folders.py),
or of a file of its own, `.csv`, `.jsonl` or `.parquet`, whose column `file_name` names the images:
by their paths, or as much of their ends as tells them apart.

Values are compared as texts. Null, NaN and blank text are no value; nor is what an image has no row
for, what its rows contradict each other in, and -1 in a column that states the names of classes.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from ..runtime.distributed import rank
from ..runtime.text import one_line
from ..runtime.wording import setting
from .columns import TableColumn, numbered
from .folders import file_names_of, read_metadata
from .images import ImageDataset
from .split_files import paths_of

logger = logging.getLogger(__name__)

_SUFFIXES = (".csv", ".jsonl", ".parquet")
# of a list of columns in a message
_MOST_CHARACTERS = 300


class Field(NamedTuple):
    """One field of metadata.

    Attributes:
        name: of the column.
        values: numbers of the values by place in the whole data set, int64 (N,); -1 for none.
        num_values: how many there are.
    """

    name: str
    values: np.ndarray
    num_values: int


class _Columns(NamedTuple):
    """Columns by name, and what gives the cells of one, for every image of the data set."""

    where: str
    names: Sequence[str]
    cells: Callable[[str], Sequence[Any]]


def find_fields(
    images: ImageDataset, names: Sequence[str], flag: str, file: str | None = None
) -> list[Field]:
    """The fields `names` of the data set that `images` are of.

    Args:
        flag: the setting that names them, for messages.
        file: of metadata; None for the data set's own columns.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: in one line, for a file that cannot be read or names no image, and for a column
            that is not there or holds no values.
    """
    columns = _own_columns(images) if file is None else _columns_of_file(images, file)
    fields = []
    for name in names:
        asked = setting(flag, name)
        if name not in columns.names:
            has = ", ".join(map(one_line, columns.names))[:_MOST_CHARACTERS] or "none"
            remedy = "name one of these"
            if file is None:
                remedy = f"a CSV file that has it is named by {setting('metadata')}"
            raise ValueError(f"{asked}: {columns.where} has no such column, it has {has}; {remedy}")

        texts = []
        for cell in columns.cells(name):
            if isinstance(cell, dict | list | bytes):
                raise ValueError(
                    f"{asked}: this column of {columns.where} holds a {type(cell).__name__} for "
                    "each image; name one of numbers, words or dates"
                )
            texts.append(_text(cell))
        values = sorted({text for text in texts if text is not None})
        if not values:
            raise ValueError(
                f"{asked}: this column of {columns.where} has no value for any of its "
                f"{len(texts)} images; fill it in, or leave it out"
            )
        fields.append(Field(name, numbered(texts, values), len(values)))
    return fields


def _text(cell: Any) -> str | None:
    """A value as text; None for what is none: null, NaN, blank."""
    if cell is None or cell != cell:
        return None
    return str(cell).strip() or None


# --- the data set's own columns


def _own_columns(images: ImageDataset) -> _Columns:
    """Those of the images' table, or of a folder's metadata; none of other data sets."""
    where = one_line(images.name)
    sources = images.found.sources
    if isinstance(sources, TableColumn):
        table = sources.others
        return _Columns(where, list(table.features), lambda name: _table_cells(table, name))

    files = images.found.tables
    place_of: dict[Path, int] = {}
    if files:
        place_of = {Path(str(source)): place for place, source in enumerate(sources)}
    tables = [(file, read_metadata(file)[0]) for file in files]
    names: dict[str, None] = {}
    for _, table in tables:
        names |= dict.fromkeys(table.column_names)

    def rows(column: str) -> Iterator[tuple[int, Any]]:
        for file, table in tables:
            for name, cell in _rows(table, column):
                # it counts from the table's folder
                place = place_of.get(Path(os.path.normpath(file.parent / name)))
                if place is not None:
                    yield place, cell

    return _Columns(where, list(names), lambda name: _by_place(rows(name), len(sources), name))


def _table_cells(table: Any, name: str) -> list[Any]:
    cells = list(table.select_columns([name])[:][name])
    if getattr(table.features[name], "names", None) is None:
        return cells
    return [None if cell is None or cell < 0 else cell for cell in cells]


def _rows(table: Any, column: str) -> Iterator[tuple[str, Any]]:
    """(file name, cell) of every row of a metadata file; none where it lacks one of the two."""
    names = file_names_of(table)
    if names is not None and column in table.column_names:
        yield from zip(names, table.column(column).to_pylist(), strict=True)


def _by_place(rows: Iterator[tuple[int, Any]], count: int, column: str) -> list[Any]:
    """The cell of every image; None for one without a row, and where rows contradict each other."""
    cells: list[Any] = [None] * count
    torn = set()
    for place, cell in rows:
        if cells[place] is not None and cell is not None and cell != cells[place]:
            torn.add(place)
        cells[place] = cells[place] if cell is None else cell
    for place in torn:
        cells[place] = None
    if torn and rank() == 0:
        logger.warning("%d images have several values of %s, so they have none", len(torn), column)
    return cells


# --- a file of its own


def _columns_of_file(images: ImageDataset, file: str) -> _Columns:
    """The columns of a file whose rows name the images."""
    asked = setting("metadata", file)
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{asked}: no such file; name one with a column file_name")
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{asked}: must end with {', '.join(_SUFFIXES)}")
    table, _ = read_metadata(path)
    names = file_names_of(table)
    if names is None:
        has = one_line(", ".join(table.column_names))[:_MOST_CHARACTERS]
        raise ValueError(f"{asked}: has no column file_name, only {has}")

    place_of = _places(images, names, asked)
    missing = sum(name not in place_of for name in names)
    if missing == len(names):
        raise ValueError(
            f"{asked}: none of its {len(names)} rows names an image of {one_line(images.name)}"
            + (f", such as {one_line(names[0])}" if names else "")
        )
    if missing and rank() == 0:
        logger.warning("%d rows of %s name files that are not there", missing, one_line(file))

    def rows(column: str) -> Iterator[tuple[int, Any]]:
        for name, cell in _rows(table, column):
            if name in place_of:
                yield place_of[name], cell

    count = len(images.found.sources)
    columns = list(table.column_names)
    return _Columns(one_line(file), columns, lambda name: _by_place(rows(name), count, name))


def _places(images: ImageDataset, names: Sequence[str], asked: str) -> dict[str, int]:
    """Which image each name is the path of, or the end of the path of.

    Raises:
        ValueError: for images without paths, and for a name that several end with.
    """
    paths = paths_of(images)
    if not paths or paths[0] is None:
        raise ValueError(
            f"{asked}: the images of {one_line(images.name)} have no file names to be found by; "
            "name one of their own columns"
        )
    parts_of = {name: PurePosixPath(name).parts for name in names}
    depths = {len(parts) for parts in parts_of.values()}
    ends = defaultdict(list)
    for place, path in enumerate(paths):
        parts = PurePosixPath((path or "").replace("\\", "/")).parts
        for depth in depths:
            if 0 < depth <= len(parts):
                ends[parts[-depth:]].append(place)

    place_of = {}
    for name, parts in parts_of.items():
        several = ends.get(parts, [])
        if len(several) > 1:
            raise ValueError(
                f"{asked}: {len(several)} images of {one_line(images.name)} end with "
                f"{one_line(name)}; write more of their paths"
            )
        if several:
            place_of[name] = several[0]
    return place_of
