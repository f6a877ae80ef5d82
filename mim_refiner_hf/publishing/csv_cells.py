"""Cells of CSV files that people open in a spreadsheet: harmless there, the same when read back.

    write_table(Path("groups.csv"), ("path", "cluster"), rows)
    text_of(cell_of("=1+1.png")) == "=1+1.png"        # in the file: '=1+1.png

A spreadsheet takes a cell that begins with = + - @ or a tab for a formula, and runs it: such a text
gets an apostrophe in front. Characters that cannot be seen, or that reverse the line, are spelt out
as \\u202e, and a backslash that would read as one of these as \\u005c. The groups' page writes its
CSV by the same rules.
"""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..runtime.text import UNSEEN

GUARDED = "=+-@\t\r\n'＝＋－＠"
"""What no cell may begin with; an apostrophe is put in front."""

# the two ways of spelling a character, and a backslash that looks like one of them
_SPELT = re.compile(r"\\u([0-9a-f]{4})|\\U([0-9a-f]{8})")
_LIKE_SPELT = re.compile(r"\\(?=u[0-9a-f]{4}|U[0-9a-f]{8})")


def cell_of(text: str) -> str:
    """A text as a cell. Bytes that are no Unicode (surrogates) stay for the file to keep."""
    seen = UNSEEN.sub(_spell, _LIKE_SPELT.sub(r"\\u005c", text))
    return f"'{seen}" if seen[:1] and seen[0] in GUARDED else seen


def _spell(found: re.Match[str]) -> str:
    number = ord(found[0])
    if 0xD800 <= number < 0xE000:
        return found[0]
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def text_of(cell: str) -> str:
    """The text that a cell was made of."""
    if cell[:1] == "'" and cell[1:2] and cell[1] in GUARDED:
        cell = cell[1:]
    return _SPELT.sub(_unspell, cell)


def _unspell(found: re.Match[str]) -> str:
    number = int(found[1] or found[2], 16)
    # no character: left as it is written
    return chr(number) if number < 0x110000 else found[0]


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV file with texts made harmless; names that are no valid Unicode keep their bytes."""
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            writer.writerow([cell_of(value) if isinstance(value, str) else value for value in row])


__all__ = ["GUARDED", "cell_of", "text_of", "write_table"]
