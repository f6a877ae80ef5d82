"""Cluster heads against k-means, over 5 seeds.

    python -m benchmarks.small_data ../shared --sizes all --work outputs/small-data
    python -m benchmarks.cluster_heads ../shared/data [--work outputs/cluster-heads]

Embeds train and test images of six data sets with the start and with what refining it on their
training images made (the runs of the first command; of the digits, the quickstart's) - once: the
features stay in --work, of a split of more than 4000 images a random 4000. Groups them with as many
groups as classes, and writes the table of benchmarks/results/cluster-heads.md. `--parts` chooses
some cells; finished ones are kept in --work. `--time` times 10^5 rows instead. The settings were
tuned by hand on the cells of TUNED.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from mim_refiner_hf import load_encoder
from mim_refiner_hf.clustering.cluster_heads import TEMPERATURE, nearest_neighbours, train_heads
from mim_refiner_hf.clustering.k_means import kmeans
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.evaluation import FeatureStore, cluster_scores, embed_images

SEEDS = range(5)
T95 = 2.776  # Student's t for 5 seeds
MOST = 4000  # images of a split
SETS = ("imagenette", "sign-digits", "gtsrb", "cifar10", "tiny-imagenet-100")
TUNED = {
    ("digits", "refined"),
    ("imagenette", "start"),
    ("sign-digits", "start"),
    ("gtsrb", "refined"),
    ("tiny-imagenet-100", "refined"),
}
METHODS = (
    "k-means",
    "k-means, standardised",
    "best head",
    "heads, consensus",
    "heads, self-trained",
)
RESULTS = Path(__file__).parent / "results" / "cluster-heads.md"
MARK = "<!-- from here on written by benchmarks/cluster_heads.py -->"
Scores = dict[str, float]


def features(
    model: Path, dataset: str, splits: tuple[str, ...], folder: Path
) -> tuple[Tensor, Tensor]:
    """Features (N, D) as the pipeline clusters them, and classes (N,), of all splits together."""
    stores = []
    encoder = None
    for split in splits:
        if not (folder / split / "broken.json").is_file():
            encoder = encoder or load_encoder(str(model))
            images = open_images(dataset, split=split, num_channels=encoder.config.num_channels)
            if len(images) > MOST:
                chosen = np.random.default_rng(0).choice(len(images), MOST, replace=False)
                images = images.subset(np.sort(chosen))
            embed_images(encoder, images, encoder.image_processor, folder / split)
        stores.append(FeatureStore(folder / split))

    rows = torch.cat([store.features(next(iter(store.columns))) for store in stores])
    return rows, torch.cat([torch.as_tensor(store.labels) for store in stores])


def timed(group: Callable[[], Any]) -> tuple[Any, float]:
    """What `group` returns, and its seconds of processor time."""
    start = time.process_time()
    return group(), time.process_time() - start


def measure(rows: Tensor, classes: Tensor, seed: int) -> dict[str, Scores]:
    """Scores and seconds of every method with as many groups as classes."""
    number = len(classes.unique())
    unit = F.normalize(rows, dim=1)
    standardised = (unit - unit.mean(0)) / (unit.std(0) + 1e-6)
    plain, plain_seconds = timed(lambda: kmeans(rows, number, seed=seed, refits=0))
    control, control_seconds = timed(lambda: kmeans(standardised, number, seed=seed, refits=0))
    heads, seconds = timed(lambda: train_heads(rows, number, seed=seed, refits=0, self_training=0))
    best = heads.heads.only(int(heads.heads.losses.argmin())).assign(unit, TEMPERATURE)[0]
    last, last_seconds = timed(lambda: train_heads(rows, number, seed=seed, refits=0))

    scores = {}
    for method, labels, taken in (
        (METHODS[0], plain.assignments, plain_seconds),
        (METHODS[1], control.assignments, control_seconds),
        (METHODS[2], best, seconds),
        (METHODS[3], heads.assignments, seconds),
        (METHODS[4], last.assignments, last_seconds),
    ):
        counts = {"seconds": taken, "groups": len(labels.unique())}
        scores[method] = {**cluster_scores(classes, labels), **counts}
    return scores


def line(
    dataset: str, encoder: str, runs: list[dict[str, Scores]], shape: tuple[int, int, int]
) -> list[str]:
    """The table's lines for one cell."""
    gain = [run[METHODS[-1]]["accuracy"] - run[METHODS[0]]["accuracy"] for run in runs]
    within = T95 * statistics.stdev(gain) / len(gain) ** 0.5
    low = statistics.mean(gain) - within
    high = statistics.mean(gain) + within
    verdict = "neither"
    if low > 0:
        verdict = "heads"
    elif high < 0:
        verdict = "k-means"

    rows, width, classes = shape
    star = " *" if (dataset, encoder) in TUNED else ""
    # what the cell is stands in its first line, the verdict in its last
    about = dict.fromkeys(METHODS, " | ")
    about[METHODS[0]] = f"{dataset}, {encoder}{star} | {rows} x {width}, {classes}"
    judged = dict.fromkeys(METHODS, "")
    judged[METHODS[-1]] = f"{verdict} ({100 * low:+.1f} to {100 * high:+.1f})"

    lines = []
    for method in METHODS:
        cells = []
        for name in ("accuracy", "nmi", "ari"):
            values = [100 * run[method][name] for run in runs]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
        seconds = statistics.mean(run[method]["seconds"] for run in runs)
        least = min(int(run[method]["groups"]) for run in runs)
        cells += [str(least), f"{seconds:.1f}", judged[method]]
        lines.append(f"| {about[method]} | {method} | {' | '.join(cells)} |")
    return lines


def write(table: list[str]) -> None:
    """Put the table below the mark in the results page; what stands above it is kept."""
    header = (
        "| features | rows x width, classes | method | accuracy | NMI | ARI | groups | seconds |"
        " better |"
    )
    head = "# Cluster heads against k-means\n\n"
    if RESULTS.is_file():
        head = RESULTS.read_text(encoding="utf-8").partition(MARK)[0]
    cores = f"{torch.get_num_threads()} thread on 1 of {os.cpu_count()} CPU cores"
    versions = f"torch {version('torch')}, {cores}"
    text = [MARK, "", header, "|---|---|---|---:|---:|---:|---:|---:|---|", *table, "", versions]
    RESULTS.write_text(head + "\n".join(text) + "\n", encoding="utf-8")


def time_many(rows: int = 100_000, width: int = 384, classes: int = 100) -> None:
    """Print the seconds that a large set takes: random rows, since only their number matters."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator)
    points = centres[torch.randint(classes, (rows,), generator=generator)]
    points += 2 * torch.randn(rows, width, generator=generator)
    ways: dict[str, Callable[[], Any]] = {
        "neighbours alone": lambda: nearest_neighbours(F.normalize(points, dim=1), 50),
        "everything": lambda: train_heads(points, classes, refits=0),
    }
    for name, way in ways.items():
        begin = time.perf_counter()
        _, seconds = timed(way)
        wall = time.perf_counter() - begin
        print(f"{name}: {seconds:.0f} s of processor time, {wall:.0f} s of wall time", flush=True)


def encoder_of(dataset: str, encoder: str, options: argparse.Namespace) -> Path:
    """The folder of a cell's model."""
    folder: Path
    if dataset == "digits":
        folder = options.quickstart
    elif encoder == "start":
        folder = options.start
    else:
        # of the run with the most images, all there are
        runs = options.refined.glob(f"{dataset}_*_0_mae-tiny-cifar10/model")
        sizes = {int(run.parent.name.split("_")[1]): run for run in runs}
        if not sizes:
            raise SystemExit(f"{options.refined} has no run of {dataset}: see --help")
        folder = sizes[max(sizes)]
    return folder


def main(options: argparse.Namespace) -> None:
    """Measure the chosen cells, and write the table of all that are finished."""
    torch.set_num_threads(1)
    disable_progress_bar()
    cells = [("digits", "refined")]
    for name in SETS:
        cells += [(name, "refined"), (name, "start")]

    table = []
    for dataset, encoder in cells:
        file = options.work / f"{encoder}-{dataset}.json"
        is_asked = not options.parts or f"{encoder}-{dataset}" in options.parts
        if not file.is_file() and is_asked:
            source = str(options.data / dataset)
            splits: tuple[str, ...] = ("train", "test")
            if dataset == "digits":
                source = dataset
                splits = ("train",)
            folder = options.work / "features" / encoder / dataset
            model = encoder_of(dataset, encoder, options)
            rows, classes = features(model, source, splits, folder)
            runs = [measure(rows, classes, seed) for seed in SEEDS]
            shape = (*rows.shape, len(classes.unique()))
            file.write_text(json.dumps({"shape": shape, "runs": runs}))
            print(*line(dataset, encoder, runs, shape), sep="\n", flush=True)
        if file.is_file():
            kept = json.loads(file.read_text())
            table += line(dataset, encoder, kept["runs"], tuple(kept["shape"]))
    write(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the data sets (parquet)")
    parser.add_argument(
        "--start", type=Path, default=Path("../shared/models/mae-tiny-cifar10"), help="the MAE"
    )
    parser.add_argument(
        "--refined",
        type=Path,
        default=Path("outputs/small-data/runs"),
        help="the runs of benchmarks.small_data",
    )
    parser.add_argument(
        "--quickstart",
        type=Path,
        default=Path("outputs/quickstart/model"),
        help="the digits' encoder",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("outputs/cluster-heads"),
        help="features and finished cells",
    )
    parser.add_argument(
        "--parts", nargs="+", default=[], help="cells such as refined-gtsrb; default: all"
    )
    parser.add_argument("--time", action="store_true", help="time 10^5 x 384 rows instead")
    chosen = parser.parse_args()
    time_many() if chosen.time else main(chosen)
