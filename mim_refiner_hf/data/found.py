"""What a search for images is told and gives: undecoded images, labels, and what they consist of.

options = SourceOptions(label_column="species", follow_links=True)
found = find_images("photos/", config=None, split=None, options=options)
found.sources[0], found.labels, found.entries.digest
"""

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..clustering.decoding import ImageSource


class SourceOptions(NamedTuple):
    """How a data set that is named is read.

    Attributes:
        image_column, label_column: of a table, or of a folder's metadata; None to find them.
        follow_links: enter links to folders, wherever they lead.
    """

    image_column: str | None = None
    label_column: str | None = None
    follow_links: bool = False

    def of_another_data_set(self) -> "SourceOptions":
        """The options for a data set beside this one: its columns are found."""
        return SourceOptions(follow_links=self.follow_links)


NO_OPTIONS = SourceOptions()


class Part(NamedTuple):
    """Which part of a data set that is named is read, and how.

    Attributes:
        config, split: as of `open_images`.
        streaming: read in passing, nothing downloaded first.
    """

    config: str | None = None
    split: str | None = None
    streaming: bool = False
    options: SourceOptions = NO_OPTIONS


MAIN_PART = Part()


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
    `tables`: the metadata files of a folder.
    """

    sources: Sequence[ImageSource | np.ndarray]
    labels: np.ndarray | None
    class_names: list[str] | None
    name: str
    entries: Entries
    names_stated: bool = False
    tables: Sequence[Path] = ()


def digest(parts: Iterable[str | bytes]) -> str:
    """16 hexadecimal digits that tell two lists of parts apart."""
    total = hashlib.sha256()
    for part in parts:
        # a name may hold bytes that are no Unicode
        line = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        total.update(line + b"\n")
    return total.hexdigest()[:16]


def file_size(path: Path) -> int:
    """Bytes of a file; -1 for one that leads nowhere."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
