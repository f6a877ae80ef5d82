"""Do fast views refine as well as exact ones?

    python -m benchmarks.views_quality ../shared [--work outputs/views-quality]

Refines a MAE of the digits by the quickstart, and the small MAE of CIFAR-10 by a short form of its
recipe (3 000 images, the first six blocks frozen), over seeds 0, 1, 2, once with `--views exact`
and once with `--views fast`. Both start from the same weights and draw the same views, so that the
difference per seed is what the views' arithmetic makes. Finished cells stay in --work: the same
command goes on. Writes benchmarks/results/views-quality.md; about 40 minutes on one core in all.
"""

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pyarrow import parquet

from mim_refiner_hf import load_encoder
from mim_refiner_hf.data.images import ImageDataset, open_images
from mim_refiner_hf.evaluation.report import evaluate_encoder
from mim_refiner_hf.refinement.recipe_files import read_recipe
from mim_refiner_hf.runs.run import run

SEEDS = (0, 1, 2)
WAYS = ("exact", "fast")
T95 = 4.303  # Student's t for 3 seeds
# of CIFAR-10: to refine on; to test on, and in the k-NN bank
IMAGES = 3000
TEST = 2000
METRICS = {
    "knn_accuracy": "k-NN accuracy",
    "cluster_accuracy": "cluster accuracy",
    "cluster_accuracy_mean": "cluster accuracy, mean of 100 runs",
}
RESULTS = Path(__file__).parent / "results" / "views-quality.md"
# what differs from the recipe cifar10-tiny
SHORT = {"batch_size": 64, "epochs": 1.0, "freeze_blocks": 6}
QUIET = {"eval_split": None, "eval_fraction": 0.0, "report_to": "none", "num_workers": 0}
Scores = dict[str, float]


def digits_start(work: Path) -> str:
    """The MAE that all cells of the digits start from: the quickstart's own, of seed 0."""
    folder = work / "digits"
    if not (folder / "pretrained").is_dir():
        run(read_recipe("quickstart", output_dir=str(folder), stage="warmup", max_steps=1, **QUIET))
    return str(folder / "pretrained")


def cifar_images(shared: Path, work: Path) -> str:
    """A parquet file of the first `IMAGES` training images of CIFAR-10.

    They are shuffled as they are.
    """
    path = work / "cifar10.parquet"
    if not path.is_file():
        whole = parquet.read_table(shared / "data/cifar10/train.parquet")
        parquet.write_table(whole.slice(0, IMAGES), path)
    return str(path)


def start_and_images(data: str, shared: Path, work: Path) -> tuple[str, ImageDataset, ImageDataset]:
    """The model that all cells of this data start from, the k-NN bank, and test images.

    None of the cells has seen the test images.
    """
    if data == "digits":
        train = open_images("digits", split="train", num_channels=3)
        test = open_images("digits", split="test", num_channels=3)
        return digits_start(work), train, test
    train = open_images(cifar_images(shared, work)).subset(range(TEST))
    test = open_images(str(shared / "data/cifar10/test.parquet")).subset(range(TEST))
    return str(shared / "models/mae-tiny-cifar10"), train, test


def cell(data: str, way: str, seed: int, shared: Path, work: Path) -> Scores:
    """The scores of one refined encoder, or, `way` "start", of the one that it is refined from."""
    model, train, test = start_and_images(data, shared, work)
    changes: dict[str, Any] = {
        **QUIET,
        "views": way,
        "seed": seed,
        "output_dir": str(work / f"{data}-{way}-{seed}"),
    }
    encoder: Any
    if way == "start":
        encoder = load_encoder(model)
        processor = encoder.image_processor
    else:
        if data == "digits":
            recipe = read_recipe("quickstart", model=model, pretrain=None, **changes)
        else:
            recipe = read_recipe(
                "cifar10-tiny", model=model, dataset=cifar_images(shared, work), **SHORT, **changes
            )
        result = run(recipe)
        assert result is not None
        # what the views make of it, also where the start would ship
        encoder = result.refined
        processor = result.processor

    found = evaluate_encoder(encoder, processor, train, test, seed=seed, per_block=False).metrics
    return {name: found[name] for name in METRICS}


def lines(data: str, scores: dict[tuple[str, int], Scores]) -> list[str]:
    """The table's lines for one data set, fast beside exact."""
    table = []
    for metric, words in METRICS.items():
        exact, fast = ([100 * scores[way, seed][metric] for seed in SEEDS] for way in WAYS)
        apart = [new - old for new, old in zip(fast, exact, strict=True)]
        mean = statistics.mean(apart)
        error = statistics.stdev(apart) / len(apart) ** 0.5
        cells = [", ".join(f"{value:.1f}" for value in values) for values in (exact, fast)]
        verdict = "no difference shown"
        if abs(mean) > T95 * error:
            verdict = "better" if mean > 0 else "worse"
        start = 100 * scores["start", 0][metric]
        table.append(
            f"| {data} | {words} | {start:.1f} | {cells[0]} | {cells[1]} | {mean:+.2f} ±"
            f" {error:.2f} | {verdict} |"
        )
    return table


def write(table: list[str]) -> None:
    """benchmarks/results/views-quality.md."""
    text = [
        "# Fast views and exact views: the same quality?",
        "",
        "Scores of refined encoders in per cent, seeds 0, 1, 2. Both ways start from the same",
        "weights and make the same draws. The",
        "difference is the mean over seeds with its standard error; a verdict other than "
        '"no difference shown" means that its',
        f"95 % interval (Student's t, {T95} standard errors) leaves out zero. Three seeds can show",
        "large differences only, and one of six intervals does so by chance in a quarter of such",
        "tables.",
        "",
        "```bash",
        "python -m benchmarks.views_quality ../shared",
        "```",
        "",
        "| data | score | start | exact | fast | fast - exact | fast is |",
        "|---|---|---:|---|---|---:|---|",
        *table,
        "",
        "digits: the quickstart (crops only, no colour) from one MAE; CIFAR-10: the recipe",
        f"cifar10-tiny with all colour operations, {IMAGES} images, one epoch, six blocks frozen,",
        f"tested on {TEST} images. {time.strftime('%Y-%m-%d')}, {platform.machine()}, 1 of",
        f"{os.cpu_count()} CPU cores, torch {version('torch')}",
    ]
    RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")


def main(shared: Path, work: Path) -> None:
    """Run what is not finished, one cell after the other, and write the table."""
    if not (shared / "data/cifar10/train.parquet").is_file():
        raise SystemExit(
            f"{shared} has no data/cifar10/train.parquet; name the folder that holds data/ and"
            " models/"
        )

    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    table = []
    for data in ("digits", "CIFAR-10"):
        scores = {}
        for seed in SEEDS:
            # the start has no seed
            for way in (*WAYS, "start") if seed == 0 else WAYS:
                file = work / f"{data}-{way}-{seed}.json"
                if not file.is_file():
                    start = time.process_time()
                    found = cell(data, way, seed, shared, work)
                    file.write_text(json.dumps({**found, "seconds": time.process_time() - start}))
                scores[way, seed] = json.loads(file.read_text())
                print(data, way, seed, scores[way, seed], flush=True)
        table += lines(data, scores)

    write(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "shared", type=Path, help="folder with data/cifar10 and models/mae-tiny-cifar10"
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/views-quality"))
    options = parser.parse_args()
    main(options.shared, options.work)
