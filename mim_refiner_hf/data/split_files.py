"""Lists of file names: which labelled images a published split consists of.

    places = listed_places(images, Path("10percent.txt"))       # of `images`, in the list's order

The lists of SimCLR (1 % and 10 % of ImageNet-1K) and of MSN (1, 2 and 5 images per class) have one
file name a line, such as `n01440764_10026.JPEG`, with or without folder and ending; what stands
behind the ending, as a label, is not read. An image is found by its name without these, in a folder
or in a table whose images have a path; where several images have a name, by its folder too. The
name of the class that the Hub's ImageNet-1K appends to its names does not count.
"""

import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

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


class _Name(NamedTuple):
    """A file's name without ending and the class that the Hub appends, and the folder it is in."""

    folder: str
    bare: str

    @classmethod
    def of(cls, path: str) -> "_Name":
        """The name that a path, or a line of a list, ends in."""
        as_path = PurePosixPath(path.replace("\\", "/"))
        match = _WITH_CLASS.fullmatch(as_path.stem)
        return cls(as_path.parent.name, match[1] if match else as_path.stem)

    def __str__(self) -> str:
        return one_line("/".join(part for part in self if part))


def listed_places(images: "ImageDataset", path: Path) -> NDArray[np.int64]:
    """Where in `images` the images of a list are, in its order.

    Raises:
        FileNotFoundError: when there is no such list.
        ValueError: for a list that is empty, is no text or names an image twice, and for names
            that no image has, that are held out, or that several have.
    """
    asked = setting("split_file", path)
    names = _names_in(path)
    everywhere = _names_of(images, asked)
    count_of = Counter(name.bare for name in everywhere)

    def key(name: _Name) -> tuple[str, ...]:
        return name if count_of[name.bare] > 1 else (name.bare,)

    keys = [key(name) for name in everywhere]
    unclear = {each for each, count in Counter(keys).items() if count > 1}
    for name in names:
        if key(name) in unclear or (count_of[name.bare] > 1 and not name.folder):
            raise ValueError(
                f"{asked}: {images.name} has several images called {name}; a list needs names that "
                "occur once, or once in a folder that it names"
            )

    place_of = {keys[index]: place for place, index in enumerate(images.indices)}
    missing = [name for name in names if key(name) not in place_of]
    if missing:
        # a part of the data set was set aside, and the list was made for all of it
        known = set(keys)
        aside = [name for name in missing if key(name) in known]
        if aside:
            raise ValueError(
                f"{asked}: {len(aside)} of its {len(names)} images are among those of "
                f"{images.name} that are held out to be measured on, such as {aside[0]}; "
                f"name the images to measure on with {setting('eval_split')} or "
                f"{setting('eval_dataset')}"
            )
        raise ValueError(
            f"{asked}: {len(missing)} of its {len(names)} images are not in {images.name}, such as "
            f"{missing[0]}"
        )

    twice, count = Counter(map(key, names)).most_common(1)[0]
    if count > 1:
        shown = "/".join(map(one_line, twice))
        raise ValueError(f"{asked}: names {shown} twice; each image may stand there once")
    return np.array([place_of[key(name)] for name in names], dtype=np.int64)


def _names_in(path: Path) -> list[_Name]:
    """The names of a list."""
    asked = setting("split_file", path)
    if not path.is_file():
        raise FileNotFoundError(f"{asked}: no such file; name a text file with a name on each line")
    if path.stat().st_size > _LARGEST_LIST:
        raise ValueError(f"{asked}: has more than {_LARGEST_LIST} bytes; it is no list of names")

    try:
        # some editors put a mark before the first line
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{asked}: is no text; name a file with a name on each line") from None

    names = [_Name.of(line.strip()) for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{asked}: is empty; name a text file with a name on each line")
    return names


def _names_of(images: "ImageDataset", asked: str) -> list[_Name]:
    """The name of every image of the sources, without reading it."""
    names = paths_of(images)
    if not names or names[0] is None:
        raise ValueError(
            f"{asked}: the images of {images.name} have no file names to be found by; give a "
            "folder of files"
        )
    return [_Name.of(name or "") for name in names]


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
