"""Lists of file names: which labelled images a published split consists of.

    places = listed_places(images, Path("10percent.txt"))       # of `images`, in the list's order

The lists of SimCLR (1 % and 10 % of ImageNet-1K) and of MSN (1, 2 and 5 images per class) have one
file name a line, such as `n01440764_10026.JPEG`, with or without folder and ending. An image is
found by its name without these, in a folder or in a table whose images have a path; the name of the
class that the Hub's ImageNet-1K appends to its names does not count.
"""

import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..runtime.text import one_line
from ..runtime.wording import setting
from .columns import TableColumn

if TYPE_CHECKING:
    from .images import ImageDataset

# n01440764_10026_n01440764 on the Hub, for n01440764_10026
_WITH_CLASS = re.compile(r"(n\d{8}_\d+)_n\d{8}")
# bytes of a list; those of ImageNet-1K have less than 4 MB
_LARGEST_LIST = 2**28


def listed_places(images: "ImageDataset", path: Path) -> NDArray[np.int64]:
    """Where in `images` the images of a list are, in its order.

    Raises:
        FileNotFoundError: when there is no such list.
        ValueError: for a list that is empty, is no text or names an image twice, and for names
            that no image has, that are held out, or that several have.
    """
    asked = setting("split_file", path)
    names = _names_in(path)
    place_of: dict[str, int] = {}
    several = set()
    everywhere = _names_of(images, asked)
    for place, index in enumerate(images.indices):
        name = everywhere[index]
        if name in place_of:
            several.add(name)
        place_of[name] = place

    missing = [name for name in names if name not in place_of]
    if missing:
        # a part of the data set was set aside, and the list was made for all of it
        known = set(everywhere)
        aside = [name for name in missing if name in known]
        if aside:
            raise ValueError(
                f"{asked}: {len(aside)} of its {len(names)} images are among those of "
                f"{images.name} that are held out to be measured on, such as {one_line(aside[0])}; "
                f"name the images to measure on with {setting('eval_split')} or "
                f"{setting('eval_dataset')}"
            )
        raise ValueError(
            f"{asked}: {len(missing)} of its {len(names)} images are not in {images.name}, such as "
            f"{one_line(missing[0])}"
        )
    unclear = [name for name in names if name in several]
    if unclear:
        raise ValueError(
            f"{asked}: {images.name} has several images called {one_line(unclear[0])}; a list "
            "needs names that occur once"
        )
    return np.array([place_of[name] for name in names], dtype=np.int64)


def _names_in(path: Path) -> list[str]:
    """The names of a list, without folders and endings."""
    asked = setting("split_file", path)
    if not path.is_file():
        raise FileNotFoundError(f"{asked}: no such file; name a text file with a name on each line")
    if path.stat().st_size > _LARGEST_LIST:
        raise ValueError(f"{asked}: has more than {_LARGEST_LIST} bytes; it is no list of names")

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{asked}: is no text; name a file with a name on each line") from None

    names = [_bare(line.strip()) for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{asked}: is empty; name a text file with a name on each line")
    twice, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{asked}: names {one_line(twice)} twice; each image may stand there once")
    return names


def _names_of(images: "ImageDataset", asked: str) -> list[str]:
    """The bare name of every image of the sources, without reading it."""
    names = paths_of(images)
    if not names or names[0] is None:
        raise ValueError(
            f"{asked}: the images of {images.name} have no file names to be found by; give a "
            "folder of files"
        )
    return [_bare(name or "") for name in names]


def paths_of(images: "ImageDataset") -> list[str | None]:
    """The path of every image of the sources, none of them read; None for one without."""
    sources = images.found.sources
    if isinstance(sources, TableColumn):
        return _paths_in_table(sources)
    # of anything else an item would be read
    if not isinstance(sources, list):
        return [None]
    return [str(source) if isinstance(source, Path) else None for source in sources]


def _paths_in_table(column: TableColumn) -> list[str | None]:
    """The path of every cell of a column of images; None where it is none of images with paths."""
    table = column.table
    cells = table.data.column(column.column)
    if "path" not in {field.name for field in getattr(cells.type, "fields", [])}:
        return [None]
    if table._indices is not None:
        cells = cells.take(table._indices.column(0))
    paths: list[str | None] = pc.struct_field(cells, "path").to_pylist()
    return paths


def _bare(name: str) -> str:
    """A file's name without folders, ending and the class that the Hub appends."""
    stem = PurePosixPath(name.replace("\\", "/")).stem
    match = _WITH_CLASS.fullmatch(stem)
    return match[1] if match else stem
