"""Groups as people corrected them, from the CSV file that the page saves (or a spreadsheet).

    corrections = read_corrections(Path("corrected.csv"))
    corrections.names, corrections.group_of, corrections.left_out
    start = match_corrections(corrections, images)       # the same, by places among the images

| column  | is                                                                                  |
|---------|-------------------------------------------------------------------------------------|
| `path`  | of an image, as `groups.csv` has it                                                 |
| `group` | name of its group; `cluster` where there is no such column, as in `groups.csv`      |
| `state` | nothing, `moved` (by hand) or `left out` (in no group); the column may be missing   |

Comma, semicolon and tab are taken, with or without a byte order mark, as spreadsheets save them.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.images import ImageDataset
from ..runtime.text import UNSEEN, one_line
from ..runtime.wording import setting
from .csv_cells import text_of

MOVED = "moved"
LEFT_OUT = "left out"

_STATES = ("", MOVED, LEFT_OUT)
# of a group's name
_MOST_CHARACTERS = 200
_HEADS = {b"PK": "a workbook (.xlsx, .ods)", b"\xd0\xcf": "a workbook (.xls)"}


@dataclass(frozen=True)
class Corrections:
    """What a file says of images, by their paths.

    Attributes:
        file: where it was read.
        names: of the groups, in the order of the file.
        group_of: path -> number of its group in `names`.
        moved: paths that were put where they are by hand.
        left_out: paths of images that shall be in no group.
    """

    file: Path
    names: list[str]
    group_of: dict[str, int]
    moved: frozenset[str]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class StartingGroups:
    """Corrections of n images that are there, by their places.

    Attributes:
        names: of the groups.
        group_of: place -> number of its group in `names`; an image that the file does not name is
            new, and in neither.
        moved, left_out: places.
        gone: paths of the file that are among the images no more.
        file: where it was read.
    """

    names: list[str]
    group_of: dict[int, int]
    moved: frozenset[int]
    left_out: frozenset[int]
    gone: list[str]
    file: Path


# --- the file -------------------------------------------------------------------------------------


def read_corrections(file: Path) -> Corrections:
    """Read and check a file of corrections.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: one line that says what is wrong, in which line of the file.
    """
    named = setting("start", file)
    rows = list(_rows(file, named))
    names: dict[str, int] = {}
    group_of: dict[str, int] = {}
    moved: set[str] = set()
    left_out: list[str] = []
    seen: dict[str, int] = {}
    for row in rows:
        if row.path in seen:
            raise ValueError(
                f"{named}: line {row.line} names {one_line(row.path)}, as line "
                f"{seen[row.path]} does; an image is in one group, so keep one of them"
            )
        seen[row.path] = row.line
        if row.state == LEFT_OUT:
            left_out.append(row.path)
            continue
        group_of[row.path] = names.setdefault(row.group, len(names))
        if row.state == MOVED:
            moved.add(row.path)

    if not names:
        raise ValueError(
            f"{named}: no image is in a group ({len(left_out)} are left out); put at least one "
            "into a group"
        )
    return Corrections(file, list(names), group_of, frozenset(moved), tuple(left_out))


@dataclass(frozen=True)
class _Row:
    """One line of the file: `line` counts from 1, the header being the first."""

    line: int
    path: str
    group: str
    state: str


def _rows(file: Path, named: str) -> Iterable[_Row]:
    """The lines of a file, each checked by itself."""
    text = _text(file, named)
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(header), strict=True)

    try:
        columns = [cell.strip().lower() for cell in next(reader)]
        places = _places(columns, named)

        for cells in reader:
            if not any(cells):
                continue
            if len(cells) != len(columns):
                raise ValueError(
                    f"{named}: line {reader.line_num} has {len(cells)} cells, and the header "
                    f"{len(columns)}; a name with a comma must stand in quotes"
                )
            yield _row(cells, places, reader.line_num, named)
    except csv.Error as error:
        raise ValueError(
            f"{named}: line {reader.line_num} is no line of a CSV file ({error}); save it as CSV "
            "again"
        ) from error


def _text(file: Path, named: str) -> str:
    """The text of a file; earlier versions wrote odd names as their bytes, which are kept."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{named}: no such file; give the CSV file that the page saved (Save corrections)"
        )

    content = file.read_bytes()
    kind = _HEADS.get(content[:2])
    if kind is None and b"\0" in content:
        kind = "no text in UTF-8"
    if kind is not None:
        raise ValueError(f"{named}: is {kind}; save it as CSV (UTF-8)")

    text = content.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")
    if not text.strip():
        raise ValueError(f"{named}: is empty; it needs a line with the columns path and group")
    return text


def _delimiter(header: str) -> str:
    """What separates the columns: what the header has most of."""
    return max(",;\t", key=header.count)


def _places(columns: Sequence[str], named: str) -> dict[str, int | None]:
    """Where the columns are; `state` may be missing, and `cluster` stands in for `group`."""
    group = "group" if "group" in columns else "cluster"
    for name in ("path", group, "state"):
        number = columns.count(name)
        if number > 1 or (number == 0 and name != "state"):
            wanted = "group (or cluster)" if name == group else name
            shown = ", ".join(one_line(column)[:40] for column in columns[:8])
            raise ValueError(
                f"{named}: has {number} columns {wanted}, and needs one; its columns are {shown}"
            )
    state = columns.index("state") if "state" in columns else None
    return {"path": columns.index("path"), "group": columns.index(group), "state": state}


def _row(cells: Sequence[str], places: dict[str, int | None], line: int, named: str) -> _Row:
    """A line of the file, checked."""

    def cell(name: str) -> str:
        place = places[name]
        return "" if place is None else cells[place]

    path = text_of(cell("path"))
    group = text_of(cell("group")).strip()
    state = cell("state").strip().lower()
    if not path:
        raise ValueError(f"{named}: line {line} has no path; remove the line")
    if state not in _STATES:
        raise ValueError(
            f"{named}: line {line} has the state {one_line(state)[:40]}; allowed are "
            f"{MOVED}, {LEFT_OUT}, or nothing"
        )
    if state != LEFT_OUT and not group:
        raise ValueError(
            f"{named}: line {line}, {one_line(path)}, has no group; name one, or put "
            f"'{LEFT_OUT}' into the column state"
        )
    if len(group) > _MOST_CHARACTERS or UNSEEN.search(group) or "\n" in group:
        raise ValueError(
            f"{named}: line {line} has a group of {len(group)} characters, "
            f"{one_line(group)[:40]}...; allowed are up to {_MOST_CHARACTERS} that can be seen"
        )
    return _Row(line, path, group, state)


# --- the images -----------------------------------------------------------------------------------


def match_corrections(corrections: Corrections, images: ImageDataset) -> StartingGroups:
    """The corrections by places among the images.

    A path is that of an image where both are written the same, or lead to the same file.

    Raises:
        ValueError: when no image of any group is there.
    """
    place_of: dict[str, int] = {}
    for place in range(len(images)):
        place_of[images.describe(place)] = place
    absolute = {_absolute(path): place for path, place in place_of.items()}

    def place_named(path: str) -> int | None:
        return place_of.get(path, absolute.get(_absolute(path)))

    group_of: dict[int, int] = {}
    moved: set[int] = set()
    left_out: set[int] = set()
    gone: list[str] = []
    for path, group in corrections.group_of.items():
        found = place_named(path)
        if found is None:
            gone.append(path)
            continue
        group_of[found] = group
        if path in corrections.moved:
            moved.add(found)
    for path in corrections.left_out:
        found = place_named(path)
        if found is None:
            gone.append(path)
            continue
        # the same file by another way of writing its path
        group_of.pop(found, None)
        left_out.add(found)

    if not group_of:
        first = next(iter(corrections.group_of))
        raise ValueError(
            f"{setting('start', corrections.file)}: none of its {len(corrections.group_of)} images "
            f"in groups, such as {one_line(first)}, is among the {len(images)} of {images.name}, "
            f"such as {one_line(images.describe(0))}; name the same images as then"
        )
    return StartingGroups(
        corrections.names,
        group_of,
        frozenset(moved),
        frozenset(left_out),
        gone,
        corrections.file,
    )


def _absolute(path: str) -> str:
    """The path from the root on, without looking at the disk, so that files may be gone."""
    return str(Path(path).expanduser().absolute())
