"""Rows about what people wait for before any work: the start of a command, and the import.

    python -m benchmarks start-help start-import

Seconds of processor time of a process of its own, start to end. The peers are what a program of
this kind imports at the least.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

from .rows import Row

ROUNDS = 5
REPOSITORY = Path(__file__).parents[1]


def seconds(*code: str) -> list[float]:
    """Median seconds of processor time of each script, in turns, after one start that is not
    counted.
    """
    taken: list[list[float]] = [[] for _ in code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    for turn in range(ROUNDS + 1):
        for script, times in zip(code, taken, strict=True):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                [sys.executable, "-c", script],
                env=environment,
                stdout=subprocess.DEVNULL,
                check=True,
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            # the first start reads the disk and compiles
            if turn > 0:
                times.append(spent)
    return [median(times) for times in taken]


def help_of_a_command() -> Row:
    """`mim-refiner refine --help`, which lists every field of a recipe."""
    command = "import mim_refiner_hf.cli as cli; cli.main(['refine', '--help'])"
    mine, theirs, floor = seconds(command, "import torch", "pass")
    note = "mim-refiner refine --help; import torch; floor: a Python that does nothing"
    return Row("start-help", 5.0, mine, theirs, floor, note)


def the_import() -> Row:
    """The package with an Auto class, which is registered then."""
    package = "import mim_refiner_hf; from transformers import AutoModel"
    mine, theirs, floor = seconds(package, "from transformers import AutoModel, Pipeline", "pass")
    note = "import mim_refiner_hf, and AutoModel; AutoModel and Pipeline of transformers alone"
    return Row("start-import", 1.3, mine, theirs, floor, note, at_most=True)


ROWS: dict[str, Callable[[], Row]] = {"start-help": help_of_a_command, "start-import": the_import}
"""The rows of this file by name."""
