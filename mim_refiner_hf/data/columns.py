"""The columns of a table: which hold images and labels, and what a cell holds.

image_column, label_column = find_columns(table.features, "photos.parquet")
images = TableColumn(table, image_column, "photos.parquet")       # bytes or paths, not decoded
labels, class_names = table_labels(table, label_column)
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..clustering.decoding import ImageSource
from .paths import own_file

# `datasets` is imported where it is needed: it costs seconds that an image folder does not need.

logger = logging.getLogger(__name__)

# preferred in this order where several columns hold images
_IMAGE_COLUMNS = ("image", "img")
# `cls` is WebDataset's name
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")


class TableColumn(Sequence[ImageSource | np.ndarray]):
    """One column of a `datasets.Dataset` as undecoded images.

    Args:
        any_path: read files wherever its cells say; else only those of the data set, see paths.py.
    """

    def __init__(self, table: Any, column: str, dataset: str, *, any_path: bool = False) -> None:
        self.any_path = any_path
        self.dtype = array_dtype(table.features[column])
        self.table = undecoded(table.select_columns([column]), column, table.features)
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


def stored(cell: Any, dataset: str) -> ImageSource | np.ndarray:
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
    import datasets

    image: Image.Image = datasets.Image().decode_example({"bytes": None, "path": file})
    return image


def find_columns(features: Mapping[str, Any], name: str) -> tuple[str, str | None]:
    """The image column and the label column (or None), by type and name.

    Raises:
        ValueError: listing the columns, if none holds images.
    """
    images = [column for column, feature in features.items() if _holds_images(feature)]
    if not images:
        images = [column for column, feature in features.items() if array_dtype(feature)]
    if not images:
        raise ValueError(
            f"No image column in {name}: its columns are {list(features)}; "
            "one must hold images, encoded bytes or arrays of three axes."
        )
    labels = [column for column, feature in features.items() if _holds_labels(column, feature)]

    image = next((column for column in _IMAGE_COLUMNS if column in images), images[0])
    by_name = [column for column in LABEL_COLUMNS if column in labels]
    return image, next(iter(by_name + labels), None)


def _holds_images(feature: Any) -> bool:
    import datasets

    if isinstance(feature, dict):
        return "bytes" in feature
    is_binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
    return is_binary or isinstance(feature, datasets.Image)


def _holds_labels(column: str, feature: Any) -> bool:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return True
    dtype = str(getattr(feature, "dtype", ""))
    types = "u?int|string|large_string|bool|float|double"
    return column in LABEL_COLUMNS and bool(re.match(types, dtype))


def table_labels(table: Any, column: str) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels of all rows, without decoding an image, and the names of the classes.

    Texts are numbered in sorted order. A column that names no class of any image counts as none.
    """
    try:
        values = [label_of(value) for value in table.select_columns([column])[:][column]]
    except ValueError as error:
        logger.warning("column %s %s: the images count as unlabelled", column, error)
        return None, None
    class_names = getattr(table.features[column], "names", None)
    if any(isinstance(value, str) for value in values):
        class_names = sorted({value for value in values if isinstance(value, str)})
        labels = numbered(values, class_names)
    else:
        labels = np.array([-1 if value is None else value for value in values], dtype=np.int64)
    if not (labels >= 0).any():
        return None, None
    return labels, class_names


def states_names(features: Mapping[str, Any], column: str | None) -> bool:
    """Whether the table says itself which number each class name has: a `ClassLabel`."""
    return column is not None and getattr(features[column], "names", None) is not None


def label_of(cell: Any) -> int | str | None:
    """A label as a number or a word; None for what means none: null, NaN, -1, empty text.

    ValueError for a number that is not whole.
    """
    if cell is None or cell == "" or cell != cell:
        return None
    if isinstance(cell, str):
        return cell
    if not math.isfinite(cell) or int(cell) != cell:
        raise ValueError(f"has the label {cell}; a label is a whole number, a word or null")
    return int(cell) if cell >= 0 else None


def numbered(names: Sequence[Any], class_names: list[str]) -> np.ndarray:
    """The place of every name among the class names; -1 for None."""
    number = {name: i for i, name in enumerate(class_names)}
    return np.array([number.get(name, -1) for name in names], dtype=np.int64)
