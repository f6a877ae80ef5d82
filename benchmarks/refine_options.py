"""What options of a refinement give, beside the plain one: python -m benchmarks.refine_options

    python -m benchmarks.refine_options ../shared [--sets imagenette] [--seeds 0 1 2]
    python -m benchmarks.refine_options ../shared --table

A cell trains the small MAE of the shared folder on 300 unlabelled photos with nothing set but one
option: none, adapters (`trainable`), or nested widths (`matryoshka`). Measured by labels, on images
that no cell saw: k-NN accuracy of the photos' own set and of the others (what the start could do
besides), each for the whole vector and for its first half, quarter and eighth; and of the training
its minutes of processor time, the share of weights it trained, and its memory: what a process that
makes six updates holds at most, beside what it held after a training by two images an update.

Finished cells stay in benchmarks/results/refine-options.jsonl, one line each, so the same command
goes on, and several may run at once for different sets or seeds. A cell takes about six minutes of
one core, in a process of its own; at the end, the page beside it is written anew.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mim_refiner_hf import RefineRecipe, load_encoder
from mim_refiner_hf.evaluation.features import encode_images, own_columns
from mim_refiner_hf.evaluation.knn import knn_accuracy
from mim_refiner_hf.model.modeling_mim_refiner import MimRefinerModel
from mim_refiner_hf.refinement.memory import encoder_parameters
from mim_refiner_hf.refinement.resolve import resolve

from .claims import QUIET, refined
from .small_data import bank_and_test, photos

SETS = ("cifar10", "imagenette", "sign-digits")
SIZE = 300
MODEL = "models/mae-tiny-cifar10"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora:8": {"trainable": "lora:8"},
    "matryoshka": {"matryoshka": True},
}
"""What a cell sets, by its name; "start" trains nothing."""
# of the vector: the whole, a half, a quarter, an eighth
SHARES = (1, 2, 4, 8)
# what has glibc give back what is free: else its heap decides, not what is held
GIVE_BACK = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
RESULTS = Path(__file__).parent / "results" / "refine-options.md"
CELLS = RESULTS.with_suffix(".jsonl")
Found = dict[tuple[str, str], dict[int, dict[str, Any]]]
"""By (set, option) and seed, what `run_cell` found."""


# ---- one cell


def peak_memory() -> float:
    """The most MiB that this process has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM: this is measured on Linux alone")


def recipe_of(data: str, option: str, seed: int, shared: Path, work: Path) -> RefineRecipe:
    """Of 300 unlabelled photos with nothing set but the option."""
    return RefineRecipe(
        model=str(shared / MODEL),
        dataset=str(photos(shared, data, SIZE, work)),
        output_dir=str(work / f"{data}-{option}-{seed}"),
        seed=seed,
        **QUIET,
        **OPTIONS[option],
    )


def memory_of(*cell: str) -> float:
    """MiB that six updates of a cell's training take, in a process of its own.

    Args:
        cell: what `print_memory` takes.
    """
    code = "import sys; from benchmarks.refine_options import *; print_memory(*sys.argv[1:])"
    environment = {**os.environ, **GIVE_BACK}
    command = [sys.executable, "-c", code, *cell]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def print_memory(data: str, option: str, shared: str, work: str) -> None:
    """The most MiB that this process holds in six updates, beside what it held before."""
    torch.set_num_threads(1)
    recipe = recipe_of(data, option, 0, Path(shared), Path(work))
    recipe = dataclasses.replace(recipe, max_steps=6, output_dir=f"{recipe.output_dir}-memory")
    # the code that a training runs through is read when it first does
    refined(dataclasses.replace(recipe, batch_size=2))

    # from here on the peak is counted anew
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    refined(recipe)
    print(peak_memory() - before)


def accuracies(encoder: MimRefinerModel, processor: Any, shared: Path, data: str) -> list[float]:
    """k-NN accuracy of the first 1/1, 1/2, 1/4, 1/8 of the vector, per cent."""
    column = own_columns(encoder.config)[-1]
    bank, test = bank_and_test(shared, data)
    known, known_labels = encode_images(encoder, bank, processor, [column])
    asked, labels = encode_images(encoder, test, processor, [column])
    found = []
    for share in SHARES:
        width = encoder.config.hidden_size // share
        rows = (known[column][:, :width], known_labels, asked[column][:, :width], labels)
        found.append(100 * knn_accuracy(*rows))
    return found


def run_cell(data: str, option: str, seed: int, shared: Path, work: Path) -> dict[str, Any]:
    """One training and its measurement, as JSON."""
    encoder = load_encoder(str(shared / MODEL))
    processor = encoder.image_processor
    training = {}
    if option != "start":
        recipe = recipe_of(data, option, seed, shared, work)
        began = time.process_time()
        trained = refined(recipe)
        minutes = (time.process_time() - began) / 60
        resolved = resolve(recipe, encoder.config, SIZE)
        frozen, rank = resolved.freeze_blocks, resolved.lora_rank
        weights = encoder_parameters(encoder.config, frozen, rank)
        share = 100 * weights.trained / weights.total
        training = {"minutes": minutes, "trained": share}
        training["memory"] = memory_of(data, option, str(shared), str(work))
        encoder = trained
    knn = {each: accuracies(encoder, processor, shared, each) for each in SETS}
    return {"knn": knn, **training}


# ---- the cells that are there


def finished(cells: Path = CELLS) -> Found:
    """Every cell that is there."""
    found: Found = {}
    if cells.is_file():
        for line in cells.read_text(encoding="utf-8").splitlines():
            data, option, seed, cell = json.loads(line)
            found.setdefault((data, option), {})[seed] = cell
    return found


# ---- the page


def mean(values: Sequence[float], form: str = "{:.1f}") -> str:
    """The mean, and its standard error where there is more than one value."""
    if not values:
        return ""
    text = form.format(statistics.mean(values))
    if len(values) > 1:
        text += f" ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"
    return text


def gains(found: Found, data: str, option: str, judged: Sequence[str]) -> list[float]:
    """By seed, the change of the k-NN accuracy from the start, on average over `judged` sets."""
    before = found[data, "start"][0]["knn"]
    changes = []
    for cell in found.get((data, option), {}).values():
        apart = [cell["knn"][each][0] - before[each][0] for each in judged]
        changes.append(statistics.mean(apart))
    return changes


def adapter_rows(found: Found) -> list[str]:
    """What adapters train, take and give, a line for every set and option."""
    rows = []
    for data in SETS:
        others = [each for each in SETS if each != data]
        if (data, "start") not in found:
            continue
        for option in ("plain", "lora:8"):
            cells = list(found.get((data, option), {}).values())
            if not cells:
                continue
            numbers = [data, f"`{option}`", f"{cells[0]['trained']:.1f}"]
            numbers += [mean([cell[name] for cell in cells]) for name in ("minutes", "memory")]
            numbers.append(mean(gains(found, data, option, [data]), "{:+.1f}"))
            numbers.append(mean(gains(found, data, option, others), "{:+.1f}"))
            rows.append(f"| {' | '.join([*numbers, str(len(cells))])} |")
    return rows


def width_rows(found: Found) -> list[str]:
    """k-NN accuracy of the first channels, a line for every set and option."""
    rows = []
    for data in SETS:
        for option in ("start", "plain", "matryoshka"):
            cells = list(found.get((data, option), {}).values())
            if not cells:
                continue
            numbers = [data, f"`{option}`"]
            for place in range(len(SHARES)):
                numbers.append(mean([cell["knn"][data][place] for cell in cells]))
            rows.append(f"| {' | '.join([*numbers, str(len(cells))])} |")
    return rows


def write(found: Found) -> None:
    """benchmarks/results/refine-options.md."""
    text = [
        "# What options of a refinement give, beside the plain one",
        "",
        "```bash",
        "python -m benchmarks.refine_options ../shared",
        "```",
        "",
        f"`mae-tiny-cifar10` refined on {SIZE} unlabelled photos with nothing set but the option.",
        "k-NN accuracy (10 neighbours, a bank of 1000) on 500 images that no run saw, in per cent",
        "and points, with standard errors over seeds. One core a cell.",
        "",
        "## Adapters: `--trainable lora:8`",
        "",
        "Of the weights in per cent; minutes of processor time; MiB at most, beside those of the",
        "code. Gain on the own set, and what it does to the k-NN accuracy of the two other sets.",
        "",
        "| photos | option | weights trained | min | MiB | k-NN | k-NN of other sets | seeds |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        *adapter_rows(found),
        "",
        "## Nested widths: `--matryoshka true`",
        "",
        "k-NN accuracy of the whole vector and of its first channels.",
        "",
        "| photos | option | whole | half | quarter | eighth | seeds |",
        "|---|---|---:|---:|---:|---:|---:|",
        *width_rows(found),
        "",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {version('torch')}",
    ]
    RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")


# ---- the command


class Study(NamedTuple):
    """Cells of options on sets over seeds, each in a process of its own.

    Attributes:
        name: of the module that has it.
        text: that module's docstring.
        cells: the file of finished cells.
        run_cell: (set, option, seed, shared folder, folder to work in) -> the cell.
        write: the page, of all cells there are.
    """

    name: str
    text: str | None
    sets: Sequence[str]
    options: Sequence[str]
    cells: Path
    run_cell: Callable[[str, str, int, Path, Path], dict[str, Any]]
    write: Callable[[Found], None]


def main(study: Study) -> None:
    """Run what is not finished, one cell after the other, and write the page."""
    parser = argparse.ArgumentParser(
        description=study.text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shared", type=Path, help="folder with data/ and models/")
    parser.add_argument("--sets", nargs="+", default=study.sets, choices=study.sets)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="write the page only")
    parser.add_argument("--work", type=Path, default=Path("outputs") / study.name)
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.cell:
        data, option, seed = asked.cell
        torch.set_num_threads(1)
        cell = study.run_cell(data, option, int(seed), asked.shared, asked.work)
        with study.cells.open("a", encoding="utf-8") as file:
            file.write(json.dumps([data, option, int(seed), cell]) + "\n")
        return

    for data in () if asked.table else asked.sets:
        for option in ("start", *study.options):
            for seed in asked.seeds if option != "start" else [0]:
                if seed in finished(study.cells).get((data, option), {}):
                    continue
                command = [sys.executable, "-m", f"benchmarks.{study.name}", str(asked.shared)]
                command += ["--work", str(asked.work), "--cell", data, option, str(seed)]
                subprocess.run(command, check=True)
    study.write(finished(study.cells))


if __name__ == "__main__":
    main(Study("refine_options", __doc__, SETS, tuple(OPTIONS), CELLS, run_cell, write))
