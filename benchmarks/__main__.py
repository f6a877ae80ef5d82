"""Every promise about speed, measured here and now.

    python -m benchmarks [row ...] [--json | --markdown FILE]

Prints target, measured, peer, ratio and floor of each row, and the ratio by wall time with two
threads; exits with 1 where a target is missed, with 2 for a row that does not exist. A row whose
peer is not installed (`pip install -e ".[bench]"`), or whose promise is none on this machine, says
so and is left out. `--markdown benchmarks/results/speed.md` also writes the table, with command,
machine and date; on an idle machine only, and rows that other work disturbed are worth running
again.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from . import evaluation, kmeans, start, step, views
from .rows import LeftOut, Row

ROWS: dict[str, Callable[[], Row]] = {
    **step.ROWS,
    **evaluation.ROWS,
    **views.ROWS,
    **kmeans.ROWS,
    **start.ROWS,
}
"""Every row by name; a file with rows adds its dict here."""


def main(arguments: list[str] | None = None) -> int:
    """Run the rows that are asked for, or all; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "rows", nargs="*", metavar="row", help=f"which to run: {', '.join(ROWS)}; all by default"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per line instead of the table"
    )
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="also write the table there, replacing what it holds",
    )
    asked = parser.parse_args(arguments)
    unknown = [name for name in asked.rows if name not in ROWS]
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if asked.markdown is not None and not asked.markdown.parent.is_dir():
        parser.error(
            f"--markdown {asked.markdown}: there is no folder {asked.markdown.parent}; make it, or"
            " name another"
        )

    torch.set_flush_denormal(True)
    if not asked.json:
        print(aligned("row", ("target", "measured", "peer", "ratio", "wall", "floor")))

    found = []
    left_out = []
    for name in asked.rows or ROWS:
        try:
            row = ROWS[name]()
        except (ModuleNotFoundError, LeftOut) as error:
            reason = str(error)
            if isinstance(error, ModuleNotFoundError):
                reason = f"{error.name} is not installed"
            print(f"{name}: left out, {reason}", file=sys.stderr)
            left_out.append(f"`{name}`: left out, {reason}")
            continue
        found.append(row)
        print(json.dumps(facts(row)) if asked.json else line(row), flush=True)

    if asked.markdown is not None:
        asked.markdown.write_text(markdown(found, left_out, asked.rows), encoding="utf-8")
    return int(not all(row.holds for row in found))


def facts(row: Row) -> dict[str, object]:
    """A row as JSON."""
    return {
        **dataclasses.asdict(row),
        "ratio": row.ratio,
        "wall_ratio": row.wall_ratio,
        "holds": row.holds,
    }


def cells(row: Row) -> list[str]:
    """Target, measured, peer, ratio, ratio by wall time, and floor in words."""
    sign = "<=" if row.at_most else ">="
    floor = "-" if row.floor is None else f"{row.floor:.4f}{row.unit}"
    wall = "-" if row.wall_ratio is None else f"{row.wall_ratio:.2f}x"
    return [
        f"{sign} {row.target:.2f}x",
        f"{row.measured:.4f}{row.unit}",
        f"{row.peer:.4f}{row.unit}",
        f"{row.ratio:.2f}x",
        wall,
        floor,
    ]


def aligned(name: str, numbers: Sequence[str]) -> str:
    """The cells of a line of the table on the terminal, each as wide as its column."""
    widths = (8, 10, 10, 7, 8, 10)
    padded = [number.rjust(width) for number, width in zip(numbers, widths, strict=True)]
    return " ".join([f"{name:<22}", *padded])


def line(row: Row) -> str:
    """A row of the table."""
    missed = "" if row.holds else "  MISSED"
    return f"{aligned(row.name, cells(row))}  {row.note}{missed}"


def markdown(found: list[Row], left_out: list[str], asked: list[str]) -> str:
    """The page of results: how it was measured, the table, the machine."""
    head = (
        "| row | target | measured | peer | ratio | wall, 2 threads | floor | met | sizes; peer |"
    )
    table = []
    for row in found:
        met = "yes" if row.holds else "**no**"
        table.append(f"| {row.name} | {' | '.join(cells(row))} | {met} | {row.note} |")

    text = [
        "# Speed against named peers",
        "",
        "Medians of rounds in which ours and the peer take turns, in processor time of one",
        "thread, after both have given the same numbers. The target applies to that ratio; beside",
        "it stands the one of wall time with two threads. The floor is what the bare matrix",
        "products (for views: decoding) take. Rows are defined in [benchmarks/](..).",
        "",
        "```bash",
        " ".join(["python -m benchmarks", *asked]),
        "```",
        "",
        head,
        "|---|---:|---:|---:|---:|---:|---:|---|---|",
        *table,
        "",
        *left_out,
        *([""] if left_out else []),
        f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores, torch",
        f"{version('torch')}, Python {platform.python_version()}",
    ]
    return "\n".join(text) + "\n"


def processor() -> str:
    """The processor's name, as Linux gives it; elsewhere its kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    for text in lines:
        if text.startswith("model name"):
            return text.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    raise SystemExit(main())
