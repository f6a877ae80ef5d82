"""Each method of pre-training on small images, and refined: python -m benchmarks.pretraining

    python -m benchmarks.pretraining [--data ../shared/data/cifar10] [--methods MAE CAPI] [--seed 0]

A run pre-trains by the small recipe of the method and refines what comes out, measured on images
that no run saw: of the bundled digits 500 with the quickstart's refinement, of CIFAR-10 its test
split with a short one. Beside it stand raw pixels and the same encoder with random weights.

A run that was stopped goes on from its checkpoint in --work; its row, once it is finished, stays in
benchmarks/results/pretraining.jsonl, and the same command goes on with the next. The page beside it
is written anew after every row. Digits take about five minutes a method on one free core, CIFAR-10
a quarter to half an hour.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mim_refiner_hf import MimRefinerModel
from mim_refiner_hf.conversion.preprocessing import image_processor
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.evaluation.report import evaluate_encoder
from mim_refiner_hf.pretraining.recipe import PretrainRecipe
from mim_refiner_hf.refinement.recipe_files import read_fields
from mim_refiner_hf.runs.comparison import errors_of

RESULTS = Path(__file__).parent / "results"
METHODS = {
    "MAE": "pretrain",
    "CAPI": "pretrain-capi",
    "data2vec 2.0": "pretrain-d2v2",
    "ConMIM": "pretrain-conmim",
}
SCORES = ("knn_accuracy", "cluster_accuracy", "nmi")


class Setting(NamedTuple):
    """What differs between the two sets: the end of the recipes' names, and the refinement."""

    name: str
    title: str
    images: str
    count: int
    refine: list[str]


DIGITS = Setting(
    "digits",
    "Digits",
    "500 held-out digits, with the quickstart's refinement",
    500,
    ["--recipe", "quickstart"],
)
# shorter than the recipe, which is for 12 blocks
_SHORT = ["--epochs", "0.75", "--head_epochs", "0.25", "--num_heads", "2"]
# views are whole patches, of which this method has larger ones
_OTHER_VIEWS = {"pretrain-conmim-cifar10": ["--local_size", "16"]}
CIFAR10 = Setting(
    "cifar10",
    "CIFAR-10",
    "the 4 000 test images, with the refinement of `cifar10-tiny` of 0.75 epochs",
    4000,
    ["--recipe", "cifar10-tiny", *_SHORT],
)


def random_weights(recipe: PretrainRecipe, dataset: str) -> dict[str, float]:
    """Scores of the method's encoder before any training."""
    torch.manual_seed(recipe.seed)
    config = recipe.encoder_config()
    encoder = MimRefinerModel(config).eval()
    bank = open_images(dataset, split="train")
    test = open_images(dataset, split="test")
    processor = image_processor(config, {})
    found = errors_of(evaluate_encoder(encoder, processor, bank, test, per_block=False))
    return {name: found[name].value for name in SCORES}


def trained(setting: Setting, name: str, dataset: str, seed: int, folder: Path) -> dict[str, Any]:
    """metrics.json of a run, which is made where there is none."""
    metrics = folder / "metrics.json"
    if not metrics.is_file():
        command = [sys.executable, "training/refine.py", *setting.refine, "--dataset", dataset]
        command += ["--pretrain", name, "--seed", str(seed), "--output_dir", str(folder)]
        command += _OTHER_VIEWS.get(name, [])
        # of whole photos bf16 pays, where the CPU has it
        precision = "auto" if setting is CIFAR10 else "no"
        command += ["--mixed_precision", precision, "--eval_split", "test", "--num_workers", "0"]
        subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads(metrics.read_text())
    return found


def measured(setting: Setting, method: str, dataset: str, seed: int, work: Path) -> dict[str, Any]:
    """The row of a method: its scores per cent, its seconds, and the machine."""
    name = f"{METHODS[method]}-{setting.name}"
    recipe = PretrainRecipe(**read_fields(name, PretrainRecipe, "pretrain"))
    run = trained(setting, name, dataset, seed, work / name)
    sides = {"pixels": run["pixels"], "random": random_weights(recipe, dataset)}
    sides |= {"pretrained": run["before"], "refined": run["after"]}
    scores = {}
    for side, found in sides.items():
        scores[side] = {score: round(100 * found[score], 1) for score in SCORES}
    seconds = {stage: round(value) for stage, value in run["stage_seconds"].items()}
    return {
        "data": setting.name,
        "method": method,
        "recipe": name,
        "epochs": recipe.epochs,
        "seed": seed,
        "scores": scores,
        "seconds": seconds,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, torch {version('torch')}",
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The finished rows."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def section(setting: Setting, rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the page about one set."""
    command = "python -m benchmarks.pretraining"
    if setting is CIFAR10:
        command += " --data ../shared/data/cifar10"
    pixels = rows[0]["scores"]["pixels"]
    raw = " | ".join(f"{pixels[score]:.1f}" for score in SCORES)
    lines = [
        "",
        f"## {setting.title}",
        "",
        "```bash",
        command,
        "```",
        "",
        f"Per cent on {setting.images}: random weights -> pre-trained -> refined; seed "
        f"{rows[0]['seed']}.",
        "",
        "| method | recipe | epochs | k-NN | cluster ACC | NMI | s pre-training | s refinement |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        f"| raw pixels | | | {raw} | | |",
    ]
    for row in rows:
        cells = [f"{row['method']} | `{row['recipe']}` | {row['epochs']}"]
        for score in SCORES:
            sides = [row["scores"][side][score] for side in ("random", "pretrained", "refined")]
            cells.append(" -> ".join(f"{value:.1f}" for value in sides))
        seconds = row["seconds"]
        cells += [str(seconds["pretrain"]), str(seconds["warmup"] + seconds["refine"])]
        lines.append(f"| {' | '.join(cells)} |")

    line = pixels["knn_accuracy"]
    # of one score; two of them are what chance seldom gives
    error = math.sqrt(line * (100 - line) / setting.count)
    for side, words in (("pretrained", "Pre-trained"), ("refined", "Refined")):
        above = [
            row["method"] for row in rows if row["scores"][side]["knn_accuracy"] > line + 2 * error
        ]
        lines += [
            "",
            f"{words}, above the k-NN of raw pixels by more than two standard errors "
            f"({2 * error:.1f} points): {', '.join(above) or 'none'}.",
        ]
    worse = [
        row["method"]
        for row in rows
        if row["scores"]["pretrained"]["knn_accuracy"] < row["scores"]["random"]["knn_accuracy"]
    ]
    if worse:
        lines += ["", f"Pre-trained, below the k-NN of random weights: {', '.join(worse)}."]
    missing = [method for method in METHODS if method not in {row["method"] for row in rows}]
    if missing:
        lines += ["", f"Not run yet: {', '.join(missing)}; the command goes on with them."]
    return lines


def write_page(rows: list[dict[str, Any]]) -> None:
    """benchmarks/results/pretraining.md of all finished rows."""
    lines = [
        "# Methods of pre-training on small images, and refined",
        "",
        "One core a run, beside other work, so that the seconds are no timings. The recipes are",
        "small and short: this shows that each method learns and refines, not which is the better",
        "one.",
    ]
    for setting in (DIGITS, CIFAR10):
        own = [row for row in rows if row["data"] == setting.name]
        own.sort(key=lambda row: list(METHODS).index(row["method"]))
        if own:
            lines += section(setting, own)
    lines += ["", f"{rows[-1]['date']}, {rows[-1]['machine']}"]
    (RESULTS / "pretraining.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(dataset: str, methods: list[str], seed: int, work: Path) -> None:
    """Run what is not finished, and write rows and page."""
    setting = DIGITS if dataset == "digits" else CIFAR10
    path = RESULTS / "pretraining.jsonl"
    for method in methods:
        rows = read_rows(path)
        done = {(row["data"], row["method"], row["seed"]) for row in rows}
        if (setting.name, method, seed) not in done:
            row = measured(setting, method, dataset, seed, work)
            # another process may have written meanwhile
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        write_page(read_rows(path))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="digits, or the folder of CIFAR-10")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("outputs/pretraining"))
    options = parser.parse_args()
    main(options.data, options.methods, options.seed, options.work)
