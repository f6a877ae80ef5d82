"""The columns of a table: which hold images and labels, and what a cell holds.

image_column, label_columns = find_columns(table.features, "photos.parquet")
images = TableColumn(table, image_column, "photos.parquet")       # bytes or paths, not decoded
labels, class_names, stated = labels_of(table, label_columns)
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..clustering.decoding import MAX_BYTES
from ..runtime.text import one_line
from ..runtime.wording import setting
from .found import NO_OPTIONS, SourceOptions
from .paths import own_file

# `datasets` is imported where it is needed: it costs seconds that an image folder does not need.

logger = logging.getLogger(__name__)

# preferred in this order where several columns hold images; the suffixes are WebDataset's
_IMAGE_COLUMNS = ("image", "img", "images", "photo", "picture", "jpg", "jpeg", "png", "webp")
# what stands beside an image and is none to learn from
_SECONDARY = re.compile("mask|segm|annot|depth|thumb|preview|icon|hash|md5|sha")
# a table of classes up to such a number still costs nothing
_LARGEST_LABEL = 2**16
# `cls` is WebDataset's name
LABEL_COLUMNS = (
    "label",
    "labels",
    "fine_label",
    "cls",
    "class",
    "class_label",
    "target",
    "category",
)


class TableColumn(Sequence[bytes | Path | np.ndarray]):
    """One column of a `datasets.Dataset` as undecoded images.

    Args:
        any_path: read files wherever its cells say; else only those of the data set, see paths.py.

    Attributes:
        others: the table's other columns.
    """

    def __init__(self, table: Any, column: str, dataset: str, *, any_path: bool = False) -> None:
        self.any_path = any_path
        self.dtype = array_dtype(table.features[column])
        self.table = undecoded(table.select_columns([column]), column, table.features)
        self.others = table.remove_columns([column])
        self.column = column
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: Any) -> Any:
        cell = self.table[i][self.column]
        if self.dtype is not None:
            return np.asarray(cell, dtype=self.dtype)
        if self.any_path and isinstance(cell, dict) and cell.get("bytes") is None:
            path = Path(cell.get("path") or "")
            if path.is_file():
                return path
        return stored(cell, self.dataset)


def undecoded(table: Any, column: str, features: Mapping[str, Any]) -> Any:
    """The same table or stream, giving the stored form of `column` instead of a decoded image."""
    import datasets

    if isinstance(features[column], datasets.Image):
        return table.cast_column(column, datasets.Image(decode=False))
    # nested lists of Python's numbers would take a hundred times as long
    if array_dtype(features[column]) is not None:
        return table.with_format("numpy")
    return table


def array_dtype(feature: Any) -> str | None:
    """The type of the numbers of a column of arrays (H, W, C) or (C, H, W); None of any other.

    Such a column is an `Array3D` of `datasets`, or lists of lists of lists of numbers.
    """
    import datasets

    if isinstance(feature, datasets.Array3D):
        return str(feature.dtype)
    for _ in range(3):
        inner = getattr(feature, "feature", None)
        if isinstance(feature, list):
            inner = feature[0]
        if inner is None:
            return None
        feature = inner
    dtype = str(getattr(feature, "dtype", ""))
    return dtype if re.fullmatch("u?int(8|16|32|64)|float(16|32|64)|bool", dtype) else None


def stored(cell: Any, dataset: str) -> bytes | Path | np.ndarray:
    """What a cell holds: an array, raw bytes, or {"bytes", "path"} with one of them None.

    An empty cell gives b"", which is undecodable. ValueError for a path not of this data set.
    """
    if isinstance(cell, np.ndarray):
        return cell
    if not isinstance(cell, dict):
        return cell or b""
    path = cell.get("path")
    if cell.get("bytes") is not None or path is None:
        return cell.get("bytes") or b""
    file = own_file(path, dataset)
    if isinstance(file, Path):
        return file

    # in the data set's repository, or in a zip
    import fsspec

    with fsspec.open(file) as opened:
        encoded: bytes = opened.read(MAX_BYTES)
    return encoded


def find_columns(
    features: Mapping[str, Any], name: str, options: SourceOptions = NO_OPTIONS
) -> tuple[str, list[str]]:
    """The image column, and the columns that may hold the labels, likely ones first.

    Image columns are told by type (images before encoded bytes before arrays), then by name. Of
    several that are left those called like a mask or a thumbnail come last.

    Raises:
        ValueError: listing the columns, if none holds images, or several do and none has a usual
            name; if no label column has a usual name and several could be one; for a column that is
            asked for and is not there, or holds something else.
    """
    image = _image_column(features, name, options.image_column)
    return image, _label_columns(features, name, options.label_column)


def find_labels(features: Mapping[str, Any], name: str, asked: str | None) -> str | None:
    """The likeliest label column of a table that needs no images; raises as `find_columns` does."""
    return next(iter(_label_columns(features, name, asked)), None)


def holds_images(features: Mapping[str, Any]) -> bool:
    """Whether a table has a column of images, encoded bytes or arrays."""
    return any(_columns_of_images(features))


def _columns_of_images(features: Mapping[str, Any]) -> list[list[str]]:
    """The columns of images, those of encoded bytes, and those of arrays."""
    kinds = []
    for holds in (_is_image, _holds_bytes, array_dtype):
        kinds.append([column for column, feature in features.items() if holds(feature)])
    return kinds


def _image_column(features: Mapping[str, Any], name: str, asked: str | None) -> str:
    images, encoded, arrays = _columns_of_images(features)
    if asked is not None:
        if asked not in (*images, *encoded, *arrays):
            raise ValueError(
                f"{setting('image_column', asked)}: {_not_that(features, asked, name)}"
            )
        return asked

    found = images or encoded or arrays
    if not found:
        raise ValueError(
            f"No image column in {name}: its columns are {list(features)}; "
            "one must hold images, encoded bytes or arrays of three axes."
        )
    usual = [column for column in _IMAGE_COLUMNS if column in found]
    main = [column for column in found if not _SECONDARY.search(column.lower())]
    if usual or len(main) == 1:
        return (usual or main)[0]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(map(one_line, found))
    raise ValueError(
        f"{name} has {len(found)} columns that hold images: {shown}; name one by "
        f"{setting('image_column')}"
    )


def _label_columns(features: Mapping[str, Any], name: str, asked: str | None) -> list[str]:
    if asked is not None:
        if asked not in features or not _may_label(features[asked]):
            raise ValueError(
                f"{setting('label_column', asked)}: {_not_that(features, asked, name)}"
            )
        return [asked]

    called = [column for column in LABEL_COLUMNS if column in features]
    named = [column for column in called if _may_label(features[column])]
    if not named:
        for column in called:
            logger.warning(
                "column %s of %s holds %s, no label: the images count as unlabelled",
                column,
                one_line(name),
                one_line(features[column])[:200],
            )

    classes = [column for column in features if states_names(features, column)]
    others = [column for column in classes if column not in named]
    if not named and len(others) > 1:
        shown = ", ".join(map(one_line, others))
        raise ValueError(
            f"{name} has {len(others)} columns that hold classes: {shown}; name one by "
            f"{setting('label_column')}"
        )
    return named + others


def _not_that(features: Mapping[str, Any], column: str, name: str) -> str:
    """Why a column is not what it is asked to be."""
    if column not in features:
        return f"{name} has no such column; it has {', '.join(map(one_line, features))}"
    return f"this column of {name} holds {one_line(features[column])[:200]}"


def _is_image(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Image)


def _holds_bytes(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _may_label(feature: Any) -> bool:
    """Whether a column of this type may hold labels: numbers, words, bool."""
    types = "u?int|string|large_string|bool|float|double"
    return bool(re.match(types, str(getattr(feature, "dtype", ""))))


def labels_of(
    table: Any, columns: Sequence[str]
) -> tuple[np.ndarray | None, list[str] | None, bool]:
    """Labels and class names of the first column that has any, and whether it states the names."""
    for column in columns:
        labels, class_names = table_labels(table, column)
        if labels is not None:
            return labels, class_names, states_names(table.features, column)
    return None, None, False


def table_labels(table: Any, column: str) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels of all rows, without decoding an image, and the names of the classes.

    Texts are numbered in sorted order. A column that names no class of any image counts as none.
    """
    try:
        values = [label_of(value) for value in table.select_columns([column])[:][column]]
    except ValueError as error:
        logger.warning("column %s %s: the images count as unlabelled", column, error)
        return None, None
    labels, class_names = label_values(values)
    if not (labels >= 0).any():
        return None, None
    return labels, getattr(table.features[column], "names", None) or class_names


def label_values(values: Sequence[int | str | None]) -> tuple[np.ndarray, list[str] | None]:
    """Labels (N,) int64 of what `label_of` gives, -1 for None, and the classes' names if they have.

    Words are numbered in sorted order. So are numbers too large for one to count up to them: they
    are names of their classes, such as those of a catalogue.
    """
    labels = {value for value in values if value is not None}
    numbers = {value for value in labels if isinstance(value, int)}
    if len(numbers) == len(labels) and max(numbers, default=0) < _LARGEST_LABEL:
        return np.array([-1 if value is None else value for value in values], dtype=np.int64), None

    class_names = [*map(str, sorted(numbers)), *sorted(map(str, labels - numbers))]
    words = [None if value is None else str(value) for value in values]
    return numbered(words, class_names), class_names


def states_names(features: Mapping[str, Any], column: str) -> bool:
    """Whether the table says itself which number each class name has: a `ClassLabel`."""
    return getattr(features[column], "names", None) is not None


def label_of(cell: Any) -> int | str | None:
    """A label as a number or a word; None for what means none: null, NaN, -1, empty or blank text.

    ValueError for a number that is not whole.
    """
    if cell is None or cell != cell:
        return None
    if isinstance(cell, str):
        return cell if cell.strip() else None
    if not math.isfinite(cell) or int(cell) != cell:
        raise ValueError(f"has the label {cell}; a label is a whole number, a word or null")
    return int(cell) if cell >= 0 else None


def numbered(names: Sequence[Any], class_names: list[str]) -> np.ndarray:
    """The place of every name among the class names; -1 for None."""
    number = {name: i for i, name in enumerate(class_names)}
    return np.array([number.get(name, -1) for name in names], dtype=np.int64)
