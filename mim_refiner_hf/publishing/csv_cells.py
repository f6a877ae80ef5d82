"""Cells of CSV files that people open in a spreadsheet: harmless there, the same when read back.

    write_table(Path("groups.csv"), ("path", "cluster"), rows)
    text_of(cell_of("=1+1.png")) == "=1+1.png"        # in the file: '=1+1.png

A spreadsheet takes a cell that begins with = + - @ or a tab for a formula, and runs it: such a text
gets an apostrophe in front. Characters that cannot be seen, or that reverse the line, and the bytes
of names that are no valid Unicode, are spelt out as in `runtime/text.py`, so that the file is UTF-8
whatever files are called. The groups' page writes its CSV by the same rules.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..runtime.text import UNSEEN, read_back, spelt_out

GUARDED = "=+-@\t\r\n'＝＋－＠"
"""What no cell may begin with; an apostrophe is put in front."""


def cell_of(text: str) -> str:
    """A text as a cell."""
    seen = spelt_out(text, UNSEEN)
    return f"'{seen}" if seen[:1] and seen[0] in GUARDED else seen


def text_of(cell: str) -> str:
    """The text that a cell was made of."""
    if cell[:1] == "'" and cell[1:2] and cell[1] in GUARDED:
        cell = cell[1:]
    return read_back(cell)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV file with texts made harmless."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            writer.writerow([cell_of(value) if isinstance(value, str) else value for value in row])
