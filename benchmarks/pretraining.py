"""Each method of pre-training on the bundled digits, and refined: python -m benchmarks.pretraining

    python -m benchmarks.pretraining [--seed 0] [--work outputs/pretraining]

A run is the quickstart with another `--pretrain`: the small recipe of the method, then the same
refinement, measured on 500 held-out digits. Beside it stand raw pixels and the same encoder with
random weights. Finished runs stay in --work, so the same command goes on. Writes
benchmarks/results/pretraining.md; about five minutes a method on one core.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from mim_refiner_hf import MimRefinerModel
from mim_refiner_hf.conversion.load import image_processor
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.evaluation.report import evaluate_encoder
from mim_refiner_hf.pretraining.recipe import PretrainRecipe
from mim_refiner_hf.refinement.recipe_files import read_fields
from mim_refiner_hf.runs.comparison import errors_of

METHODS = {
    "MAE": "pretrain-digits",
    "data2vec 2.0": "pretrain-data2vec2-digits",
    "ConMIM": "pretrain-conmim-digits",
    "CAPI": "pretrain-capi-digits",
}
SCORES = ("knn_accuracy", "cluster_accuracy", "nmi")


def random_weights(recipe: PretrainRecipe) -> dict[str, float]:
    """Scores of the method's encoder before any training."""
    torch.manual_seed(recipe.seed)
    config = recipe.encoder_config()
    encoder = MimRefinerModel(config).eval()
    bank = open_images("digits", split="train")
    test = open_images("digits", split="test")
    processor = image_processor(config, {})
    found = errors_of(evaluate_encoder(encoder, processor, bank, test, per_block=False))
    return {name: found[name].value for name in SCORES}


def trained(name: str, seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """metrics.json of a run, which is made where there is none."""
    metrics = folder / "metrics.json"
    if not metrics.is_file():
        command = [sys.executable, "training/refine.py", "--recipe", "quickstart"]
        command += ["--pretrain", name, "--seed", str(seed), "--output_dir", str(folder)]
        subprocess.run(command, check=True)
    found: dict[str, dict[str, float]] = json.loads(metrics.read_text())
    return found


def main(seed: int, work: Path) -> None:
    """Run what is not finished, and write the page."""
    rows = []
    pixels: dict[str, float] = {}
    for method, name in METHODS.items():
        recipe = PretrainRecipe(**read_fields(name, PretrainRecipe, "pretrain"))
        run = trained(name, seed, work / name)
        pixels = run["pixels"]
        sides = (random_weights(recipe), run["before"], run["after"])
        cells = [" -> ".join(f"{100 * side[score]:.1f}" for side in sides) for score in SCORES]
        seconds = run["stage_seconds"]
        cells += [f"{seconds['pretrain']:.0f}", f"{seconds['warmup'] + seconds['refine']:.0f}"]
        rows.append(f"| {method} | `{name}` | {recipe.epochs} | {' | '.join(cells)} |")

    raw = " | ".join(f"{100 * pixels[score]:.1f}" for score in SCORES)
    text = [
        "# Methods of pre-training on digits, and refined",
        "",
        "```bash",
        "python -m benchmarks.pretraining",
        "```",
        "",
        "Per cent on 500 held-out digits: random weights -> pre-trained -> refined, with the",
        f"quickstart's refinement; seed {seed}, one core a run, beside other work, so that the",
        "seconds are no timings. The recipes are small and, but for MAE's, untuned: this shows",
        "that each method learns and refines, not which is the better one.",
        "",
        "| method | recipe | epochs | k-NN | cluster ACC | NMI | s pre-training | s refinement |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        f"| raw pixels | | | {raw} | | |",
        *rows,
        "",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {version('torch')}",
    ]
    page = Path(__file__).parent / "results" / "pretraining.md"
    page.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("outputs/pretraining"))
    options = parser.parse_args()
    main(options.seed, options.work)
