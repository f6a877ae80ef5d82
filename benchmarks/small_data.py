"""Does a run with nothing set help on few photos, and does its verdict know when it did not?

    python -m benchmarks.small_data ../shared [--sets imagenette] [--sizes 300 1000 all] [--seeds 0]
    python -m benchmarks.small_data ../shared --sabotage [--sets imagenette sign-digits]

A cell is one run as a user gives it: n photos of a set in a flat folder, without labels, and
`refine(folder, model=...)`; sabotaged runs set what spoils them. What the verdict shipped, and what
was trained, are then measured by labels on images that no run saw: k-NN accuracy with a bank of
training images, cluster accuracy and NMI, each beside the start's, errors paired by image.

Finished cells stay in benchmarks/results/small-data.jsonl, so the same command goes on, on any
machine; every cell writes the table in benchmarks/results/small-data.md anew, out of all cells
there are. With two workers on two cores a cell of 300 photos takes about 8 minutes and one of 1 000
about 15.
"""

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pyarrow import parquet
from scipy.stats import spearmanr

from mim_refiner_hf import load_encoder, refine
from mim_refiner_hf.data.images import ImageDataset, open_images
from mim_refiner_hf.evaluation.evidence import change_between
from mim_refiner_hf.evaluation.report import evaluate_encoder
from mim_refiner_hf.evaluation.scores import Score
from mim_refiner_hf.refinement.auto import Situation, fit
from mim_refiner_hf.refinement.recipe import RefineRecipe
from mim_refiner_hf.runs.comparison import errors_of
from mim_refiner_hf.runtime.device import uses_bf16
from mim_refiner_hf.runtime.files import write_text

SETS = ("imagenette", "sign-digits", "gtsrb", "cifar10", "tiny-imagenet-100", "imagenet-sample")
BANK = 1000
TEST = 500
RESULTS = Path(__file__).parent / "results" / "small-data.md"
CELLS = RESULTS.with_suffix(".jsonl")
# one image a class: groups of its classes cannot be told, those of a set of like photos can
JUDGED_BY = {"imagenet-sample": "imagenette"}
SCORES = ("knn_accuracy", "cluster_accuracy", "nmi")
CRITERIA = {
    "separation": "separation d'",
    "retrieval": "retrieval (MRR)",
    "cluster_stability": "stability of the groups (ARI)",
    "rankme": "RankMe",
}
SABOTAGES = {
    "rate x3": "learning rate x 3",
    "rate x10": "learning rate x 10",
    "rate x30": "learning rate x 30",
    "still": "EMA decay 0.9999",
    "hot": "temperature 2",
    "cold": "temperature 0.01",
    "strangers": "trained on photos of another set, judged on photos of this one",
}
"""What is set to spoil a run, by a short name."""


class Cell(NamedTuple):
    """One run: which photos, how many, which seed, how it is spoiled ("" for not at all), and
    the name of the start's folder.
    """

    data: str
    size: int
    seed: int
    sabotage: str
    start: str

    @property
    def name(self) -> str:
        """A file's name."""
        parts = (str(part).replace(" ", "-") for part in self)
        return "_".join(part for part in parts if part)


# ---- photos


def photos(shared: Path, data: str, size: int, work: Path, first: int = 0) -> Path:
    """A flat folder of `size` photos as they are stored, taken in a fixed random order."""
    folder = work / f"{data}-{first}-{size}"
    if folder.is_dir():
        return folder
    rows = parquet.read_table(shared / f"data/{data}/train.parquet").column("image").to_pylist()
    order = np.random.default_rng(0).permutation(len(rows))[first : first + size]
    # whole or not at all: another worker may be making it too
    unfinished = folder.with_suffix(f".{os.getpid()}")
    unfinished.mkdir()
    for place, row in enumerate(order):
        ending = (Image.open(io.BytesIO(rows[row]["bytes"])).format or "png").lower()
        (unfinished / f"{place:05d}.{ending}").write_bytes(rows[row]["bytes"])
    if not folder.is_dir():
        unfinished.rename(folder)
    return folder


def size_of(shared: Path, data: str, asked: int | None) -> int:
    """How many photos a cell has: as many as asked, at most all there are; None for all."""
    rows = parquet.read_metadata(shared / f"data/{data}/train.parquet").num_rows
    return rows if asked is None else min(asked, rows)


def bank_and_test(shared: Path, data: str) -> tuple[ImageDataset, ImageDataset]:
    """Training images from the end of the photos' order, for the k-NN bank, and test images."""
    source = shared / f"data/{JUDGED_BY.get(data, data)}"
    bank = open_images(str(source / "train.parquet"))
    order = np.random.default_rng(0).permutation(len(bank))
    test = open_images(str(source / "test.parquet"))
    return bank.subset(np.sort(order[-BANK:])), test.subset(range(min(TEST, len(test))))


# ---- one cell


def settings_of(cell: Cell, shared: Path, work: Path, model: str) -> dict[str, Any]:
    """What the run is given beside photos and model."""
    if cell.sabotage.startswith("rate"):
        config = load_encoder(model).config
        fitted = fit(RefineRecipe(model=model), Situation(config, cell.size)).recipe
        assert fitted.learning_rate is not None
        rate = float(cell.sabotage.removeprefix("rate x")) * fitted.learning_rate
        return {"learning_rate": rate, "head_learning_rate": fitted.learning_rate}
    if cell.sabotage == "strangers":
        return {"eval_dataset": str(photos(shared, cell.data, 300, work, first=cell.size))}
    settings = {
        "": {},
        "still": {"ema_decay": 0.9999},
        "hot": {"temperature": 2.0},
        "cold": {"temperature": 0.01},
    }
    return settings[cell.sabotage]


def measured(encoder: Any, processor: Any, shared: Path, data: str) -> dict[str, Score]:
    """Scores by labels, with errors over images."""
    bank, test = bank_and_test(shared, data)
    return errors_of(evaluate_encoder(encoder, processor, bank, test, per_block=False))


def run_cell(cell: Cell, shared: Path, work: Path, model: str) -> dict[str, Any]:
    """The run, and its measurement, as JSON."""
    began = time.time()
    data = cell.data
    if cell.sabotage == "strangers":
        data = SETS[(SETS.index(cell.data) + 2) % len(SETS)]
    result = refine(
        photos(shared, data, cell.size, work),
        model=model,
        output_dir=str(work / "runs" / cell.name),
        seed=cell.seed,
        report_to="none",
        num_workers=0,
        **settings_of(cell, shared, work, model),
    )
    assert result is not None
    minutes = (time.time() - began) / 60

    start = load_encoder(model)
    before = measured(start, result.processor, shared, cell.data)
    after = measured(result.refined, result.processor, shared, cell.data)
    changes = {name: change_between(before[name], after[name]) for name in SCORES}
    verdict = result.verdict
    return {
        "minutes": minutes,
        "precision": "bf16" if uses_bf16("auto") else "fp32",
        "outcome": verdict.outcome,
        "weights_change": verdict.weights_change,
        "before": {name: before[name].value for name in SCORES},
        "change": {name: change.difference for name, change in changes.items()},
        "error": {name: change.error for name, change in changes.items()},
        "label_free": [verdict.before, verdict.after],
    }


# ---- the page


def points(found: dict[str, Any], name: str) -> float:
    """The change of a score by the training, shipped or not, in points."""
    return 100 * float(found["change"][name])


def line(cell: Cell, found: dict[str, Any]) -> str:
    """One line of a table."""
    error = 100 * found["error"]["knn_accuracy"]
    shipped = points(found, "knn_accuracy") if found["outcome"] == "better" else 0.0
    parts = [
        cell.data,
        str(cell.size),
        str(cell.seed),
        cell.start,
        SABOTAGES.get(cell.sabotage, "nothing"),
        f"{found['minutes']:.1f} {found.get('precision', 'fp32')}",
        f"{100 * found['before']['knn_accuracy']:.1f}",
        f"{points(found, 'knn_accuracy'):+.1f} ± {error:.1f}",
        f"{points(found, 'cluster_accuracy'):+.1f}",
        f"{points(found, 'nmi'):+.1f}",
        f"{found['weights_change']:.3f}",
        *(
            f"{old[name]:.3g} → {new[name]:.3g}"
            for old, new in [found["label_free"]]
            for name in CRITERIA
        ),
        found["outcome"],
        f"{shipped:+.1f}",
    ]
    return f"| {' | '.join(parts)} |"


def judged(cells: dict[Cell, dict[str, Any]]) -> list[str]:
    """How each criterion ranks the runs, and what choosing by its sign alone would have cost."""
    rows = list(cells.values())
    truth = np.array([points(found, "knn_accuracy") for found in rows])
    table = []
    for name, words in CRITERIA.items():
        old, new = (
            np.array([found["label_free"][side][name] for found in rows]) for side in (0, 1)
        )
        # as a share of the start's: sets differ in how far apart their photos are
        rank = spearmanr(new / old - 1, truth).statistic
        chosen = np.where(new > old, truth, 0.0)
        regret = np.maximum(truth, 0) - chosen
        table.append(f"| {words} | {rank:+.2f} | {regret.mean():.2f} | {regret.max():.1f} |")
    shipped = np.where([found["outcome"] == "better" for found in rows], truth, 0.0)
    regret = np.maximum(truth, 0) - shipped
    table.append(f"| **the verdict** | | {regret.mean():.2f} | {regret.max():.1f} |")
    for words, kept in (("always the refined", truth), ("always the start", 0 * truth)):
        regret = np.maximum(truth, 0) - kept
        table.append(f"| {words} | | {regret.mean():.2f} | {regret.max():.1f} |")
    return table


def summary(kind: str, cells: dict[Cell, dict[str, Any]]) -> str:
    """What ships against the start, over all runs of a kind."""
    shipped = []
    worse = 0
    for found in cells.values():
        change = points(found, "knn_accuracy") if found["outcome"] == "better" else 0.0
        shipped.append(change)
        worse += change < -100 * found["error"]["knn_accuracy"]
    return (
        f"{kind}: {len(cells)} runs; what ships is on average {statistics.mean(shipped):+.1f} "
        f"points of k-NN accuracy from the start, at worst {min(shipped):+.1f}; worse by more than "
        f"one standard error in {worse} of {len(cells)}."
    )


def over_seeds(cells: dict[Cell, dict[str, Any]]) -> list[str]:
    """One line for every start, set and number of photos: what ships, over the runs' seeds."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for cell, found in sorted(cells.items()):
        groups.setdefault((cell.start, cell.data, cell.size), []).append(found)
    lines = []
    for (start, data, size), runs in sorted(groups.items()):
        shipped = [
            points(run, "knn_accuracy") if run["outcome"] == "better" else 0.0 for run in runs
        ]
        # of one run it is not known
        error = "-"
        if len(shipped) > 1:
            error = f"{statistics.stdev(shipped) / len(shipped) ** 0.5:.1f}"
        before = 100 * statistics.mean(run["before"]["knn_accuracy"] for run in runs)
        minutes = max(run["minutes"] for run in runs)
        better = sum(run["outcome"] == "better" for run in runs)
        lines.append(
            f"| {start} | {data} | {size} | {before:.1f} | {statistics.mean(shipped):+.1f} | "
            f"{error} | {min(shipped):+.1f} | {better} of {len(runs)} | {minutes:.1f} |"
        )
    return lines


def write(cells: dict[Cell, dict[str, Any]]) -> None:
    """benchmarks/results/small-data.md."""
    plain = {cell: found for cell, found in cells.items() if not cell.sabotage}
    spoiled = {cell: found for cell, found in cells.items() if cell.sabotage}
    kinds = (("Nothing set", plain), ("Sabotaged", spoiled))
    text = [
        "# Few photos: the default run against its start, and what the verdict knows",
        "",
        "```bash",
        "python -m benchmarks.small_data ../shared",
        "python -m benchmarks.small_data ../shared --sabotage",
        "```",
        "",
        "Scores by labels that no run saw, in points of per cent: k-NN (10 neighbours, bank of",
        f"{BANK} training images) and k-means groups on at most {TEST} test images; the error of a",
        "change is paired by image. `imagenet-sample` has one image a class: its runs are judged",
        "on imagenette. The changes are those of what was trained; `ships` is what a user gets.",
        "d', MRR, ARI and RankMe: start → trained, known without labels. Minutes stand beside what",
        "the processor computed in: bf16 where it can (auto).",
        "",
        *(f"- {summary(kind, part)}" for kind, part in kinds if part),
        "",
        "Nothing set: k-NN of what ships, in points above the start's, mean over seeds and its",
        "standard error; the longest run in minutes.",
        "",
        "| start | photos | n | k-NN before | ships | error | at worst | better | min |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        *over_seeds(plain),
        "",
        "Every run:",
        "",
        "| photos | n | seed | start | set wrong | min | k-NN before | k-NN | ACC | NMI |"
        " weights moved | d' | MRR | ARI | RankMe | verdict | ships |",
        "|---|---:|---:|---|---|---:|---:|---:|---:|---:|---:|---|---|---|---|---|---:|",
        *(line(cell, found) for part in (plain, spoiled) for cell, found in sorted(part.items())),
        "",
        "How the label-free numbers rank these runs by their k-NN change (Spearman, of the change",
        "as a share of the start's), and what it costs, in points, to ship what rises by it:",
        "",
        "| criterion | rank correlation | mean regret | largest |",
        "|---|---:|---:|---:|",
        *judged(cells),
        "",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, one core a run,",
        f"torch {version('torch')}",
    ]
    RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")


# ---- the command


def main(options: argparse.Namespace) -> None:
    """Run what is not finished, and write the page after every cell."""
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    if not (options.shared / "data/imagenette/train.parquet").is_file():
        raise SystemExit(f"{options.shared} has no data/imagenette; name the folder that has data/")
    model = options.model or options.shared / "models/mae-tiny-cifar10"
    if options.cell:
        data, size, seed, sabotage = options.cell
        cell = Cell(data, int(size), int(seed), sabotage, model.name)
        torch.set_num_threads(1)
        found = run_cell(cell, options.shared, work, str(model))
        (work / f"{cell.name}.json").write_text(json.dumps(found))
        return

    kinds = tuple(SABOTAGES) if options.sabotage else ("",)
    asked = []
    for size, kind, seed, data in product(options.sizes, kinds, options.seeds, options.sets):
        asked.append(Cell(data, size_of(options.shared, data, size), seed, kind, model.name))
    cells = finished()
    lock = Lock()

    def work_on(cell: Cell) -> None:
        if cell in cells:
            return
        command = [sys.executable, "-m", "benchmarks.small_data", str(options.shared)]
        command += ["--work", str(work), "--model", str(model), "--cell", *map(str, cell[:4])]
        with (work / f"{cell.name}.log").open("w") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        print(cell.name, "done" if done.returncode == 0 else f"FAILED: {log.name}", flush=True)
        if done.returncode:
            return
        with lock:
            cells[cell] = json.loads((work / f"{cell.name}.json").read_text())
            lines = [json.dumps([cell, found]) for cell, found in sorted(cells.items())]
            write_text(CELLS, "\n".join(lines) + "\n")
            write(cells)

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(work_on, asked))
    write(cells)


def finished() -> dict[Cell, dict[str, Any]]:
    """Every cell that is there."""
    if not CELLS.is_file():
        return {}
    rows = [json.loads(row) for row in CELLS.read_text(encoding="utf-8").splitlines()]
    return {Cell(*cell): found for cell, found in rows}


def number_or_all(text: str) -> int | None:
    """A number of photos; None for "all"."""
    return None if text == "all" else int(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shared", type=Path, help="folder with data/ and models/")
    parser.add_argument("--model", type=Path, help="the start; default: models/mae-tiny-cifar10")
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--sizes", nargs="+", type=number_or_all, default=[300, 1000, None])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--sabotage", action="store_true", help="spoiled runs instead")
    parser.add_argument("--workers", type=int, default=2, help="cells at a time, one core each")
    parser.add_argument("--work", type=Path, default=Path("outputs/small-data"))
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    main(parser.parse_args())
