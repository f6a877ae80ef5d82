"""Every promise about speed, measured here and now: python -m benchmarks [row ...] [--json]

Prints target, measured, peer, ratio and floor of each row; exits with 1 where a target is missed, with 2 for a row that does not
exist. A row whose peer is not installed, or whose promise is none on this machine, says so and is left out.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable

import torch

from . import evaluation, step
from .rows import LeftOut, Row

ROWS: dict[str, Callable[[], Row]] = {**step.ROWS, **evaluation.ROWS}
"""Every row by name; a file with rows adds its dict here."""


def main(arguments: list[str] | None = None) -> int:
    """Run the rows that are asked for, or all; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="row", help=f"which to run: {', '.join(ROWS)}; all by default")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of the table")
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.rows if name not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    torch.set_flush_denormal(True)
    missed = False
    if not asked.json:
        print(f"{'row':<22} {'target':>8} {'measured':>10} {'peer':>10} {'ratio':>7} {'floor':>10}")
    for name in asked.rows or ROWS:
        try:
            row = ROWS[name]()
        except ModuleNotFoundError as missing:
            print(f"{name}: left out, {missing.name} is not installed", file=sys.stderr)
            continue
        except LeftOut as reason:
            print(f"{name}: left out, {reason}", file=sys.stderr)
            continue
        missed |= not row.holds
        print(
            json.dumps({**dataclasses.asdict(row), "ratio": row.ratio, "holds": row.holds}) if asked.json else line(row),
            flush=True,
        )
    return int(missed)


def line(row: Row) -> str:
    """A row of the table."""
    sign = "<=" if row.at_most else ">="
    numbers = [f"{value:.4f}{row.unit}" if value is not None else "-" for value in (row.measured, row.peer, row.floor)]
    measured, peer, floor = (f"{number:>10}" for number in numbers)
    verdict = "" if row.holds else "  MISSED"
    return f"{row.name:<22} {sign}{row.target:>5.2f}x {measured} {peer} {row.ratio:>6.2f}x {floor}  {row.note}{verdict}"


if __name__ == "__main__":
    raise SystemExit(main())
