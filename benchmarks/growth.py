"""How costs grow: python -m benchmarks.growth [axis ...]

Times parts of the package at growing sizes, processor time of one thread, medians of 3 calls after
one that is not counted, and fits the exponent p of time ~ size^p. Each axis says in which range p
has to lie, and why. Without names all axes are measured, in about 4 minutes, and
benchmarks/results/growth.md and growth.png are written; with names the tables are printed only.
"""

import argparse
import datetime
import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import matplotlib
import numpy as np
import torch
from threadpoolctl import threadpool_limits

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel
from mim_refiner_hf.clustering.k_means import kmeans
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.data.loading import Loading
from mim_refiner_hf.evaluation.features import encode_images
from mim_refiner_hf.evaluation.knn import knn_predict
from mim_refiner_hf.refinement.heads import IdHeads
from mim_refiner_hf.refinement.queue import NearestNeighbourQueue
from mim_refiner_hf.refinement.refiner import NnaSettings, Refiner
from mim_refiner_hf.runtime.optimisation import freeze

from .__main__ import processor

RESULTS = Path(__file__).parent / "results"
WIDTH = 192
BLOCKS = 6
PATCH = 8
GLOBAL = 2
TOPK = 20
EMBEDDING = 128
ROUNDS = 3


@dataclass(frozen=True)
class Axis:
    """One size that grows.

    Attributes:
        make: sets up a size and returns what is timed.
        sizes: that are timed.
        expected: range of the exponent.
        why: the reason of that range.
        unit: what `work` counts.
        work: turns the size into what the time should be proportional to a power of.
    """

    make: Callable[[int], Callable[[], object]]
    sizes: tuple[int, ...]
    expected: tuple[float, float]
    why: str
    unit: str
    work: Callable[[int], float] = float


def an_encoder(size: int, blocks: int = BLOCKS) -> MimRefinerModel:
    """Random weights, for images of `size` pixels."""
    config = MimRefinerConfig(
        image_size=size,
        patch_size=PATCH,
        hidden_size=WIDTH,
        num_hidden_layers=blocks,
        num_attention_heads=3,
        intermediate_size=4 * WIDTH,
    )
    return MimRefinerModel(config)


def a_refiner(encoder: MimRefinerModel, heads: int, views: int) -> Refiner:
    """With heads on so many of the last blocks."""
    blocks = encoder.config.num_hidden_layers
    refiner = Refiner(
        encoder,
        list(range(blocks - heads, blocks)),
        IdHeads(heads, WIDTH, 512, 1024, EMBEDDING),
        NearestNeighbourQueue(heads, 4096, EMBEDDING),
        NnaSettings(GLOBAL, views, temperature=0.2),
    )
    return refiner.train()


def step(batch: int = 16, heads: int = 2, local: int = 4, size: int = 64) -> Callable[[], object]:
    """The gradients of one refinement step; local views have half the side of global ones."""
    torch.manual_seed(0)
    encoder = an_encoder(size)
    freeze(encoder, 0)
    refiner = a_refiner(encoder, heads, GLOBAL + local)
    views = [torch.randn(batch, GLOBAL, 3, size, size)]
    if local:
        views.append(torch.randn(batch, local, 3, size // 2, size // 2))
    index = torch.arange(batch)
    draw = torch.randint(TOPK, (heads, GLOBAL, batch))

    def run() -> None:
        refiner.zero_grad()
        refiner.backward(views, index, index, topk=TOPK, draw=draw)

    return run


def align(heads: int) -> Callable[[], object]:
    """Heads, queue and loss alone, forward and backward."""
    torch.manual_seed(0)
    batch = 16
    views = 8
    refiner = a_refiner(an_encoder(16, heads), heads, views)
    features = torch.randn(heads, views * batch, WIDTH, requires_grad=True)
    index = torch.arange(batch)
    draw = torch.randint(TOPK, (heads, GLOBAL, batch))
    return lambda: refiner.align(features, index, index, topk=TOPK, draw=draw).loss.backward()


def lookup(rows: int) -> Callable[[], object]:
    """Neighbours of two views of 64 images for 4 heads."""
    torch.manual_seed(0)
    queue = NearestNeighbourQueue(4, rows, EMBEDDING)
    targets = torch.randn(4, GLOBAL, 64, EMBEDDING)
    index = torch.arange(64)
    draw = torch.randint(TOPK, (4, GLOBAL, 64))
    return lambda: queue.lookup(targets, index, topk=TOPK, draw=draw)


def neighbours(rows: int) -> Callable[[], object]:
    """k-NN of 1000 rows in a bank of so many."""
    torch.manual_seed(0)
    bank = torch.randn(rows, WIDTH)
    classes = torch.randint(100, (rows,))
    asked = torch.randn(1000, WIDTH)
    return lambda: knn_predict(bank, classes, asked)


def groups(rows: int) -> Callable[[], object]:
    """100 groups, 5 strides and at most 5 passes of Lloyd's over all rows."""
    torch.manual_seed(0)
    points = torch.randn(rows, WIDTH)
    return lambda: kmeans(points, 100, iterations=10, tolerance=0.0, refits=0)


def embedding(images: int) -> Callable[[], object]:
    """Features of so many digits, decoding and preprocessing included."""
    torch.manual_seed(0)
    digits = open_images("digits").subset(range(images))
    encoder = an_encoder(32).eval()
    image_processor = MimRefinerImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    column = f"block{BLOCKS - 1}.cls"
    return lambda: encode_images(encoder, digits, image_processor, [column], loading=Loading(64))


def tokens(side: int) -> int:
    """Patches of a view, and CLS."""
    return 1 + (side // PATCH) ** 2


AXES = {
    "batch": Axis(
        lambda n: step(batch=n),
        (8, 16, 32, 64),
        (0.8, 1.1),
        "every image costs the same",
        "images per step",
    ),
    "heads": Axis(
        align,
        (2, 4, 8, 16),
        (0.8, 1.1),
        "every head costs the same; starting operations does not grow",
        "heads",
    ),
    "queue": Axis(
        lookup,
        (4096, 8192, 16384, 32768, 65536),
        (0.8, 1.15),
        "every row is compared once",
        "rows of the queue",
    ),
    "local crops": Axis(
        lambda n: step(local=n),
        (2, 4, 8, 16),
        (0.75, 1.1),
        "tokens cost the same, whatever view they are in; what a step does once, such as the lookup"
        " in the queue, does not grow",
        "tokens per image",
        lambda n: GLOBAL * tokens(64) + n * tokens(32),
    ),
    "image size": Axis(
        lambda n: step(batch=4, size=n),
        (64, 96, 128, 192),
        (0.85, 1.4),
        "linear layers grow with the tokens, attention with their square; at these sizes the layers"
        " are most of it",
        "tokens per image",
        lambda n: GLOBAL * tokens(n) + 4 * tokens(n // 2),
    ),
    "k-NN": Axis(
        neighbours,
        (10_000, 20_000, 40_000, 80_000),
        (0.85, 1.15),
        "every row is compared once",
        "rows of the bank",
    ),
    "k-means": Axis(
        groups,
        (20_000, 40_000, 80_000, 160_000),
        (0.5, 1.05),
        "full passes grow with the rows; the starts are found on a sample of 4096 rows, which does"
        " not grow",
        "rows",
    ),
    "embedding": Axis(
        embedding, (160, 320, 640, 1280), (0.85, 1.1), "every image costs the same", "images"
    ),
}
"""Every axis by name."""


def measure(axis: Axis) -> list[float]:
    """Median processor seconds at every size."""
    found = []
    for size in axis.sizes:
        run = axis.make(size)
        taken = []
        run()
        for _ in range(ROUNDS):
            start = time.process_time()
            run()
            taken.append(time.process_time() - start)
        found.append(statistics.median(taken))
    return found


def exponent(axis: Axis, seconds: list[float]) -> float:
    """The slope of log time over log work, by least squares."""
    works = [axis.work(size) for size in axis.sizes]
    return float(np.polyfit(np.log(works), np.log(seconds), 1)[0])


def table(name: str, axis: Axis, seconds: list[float]) -> list[str]:
    """The part of the page about one axis."""
    low, high = axis.expected
    fitted = exponent(axis, seconds)
    verdict = "as expected"
    if fitted < low:
        verdict = "NOT as expected: less"
    elif fitted > high:
        verdict = "NOT as expected: more"

    works = [f"{axis.work(size):.0f}" for size in axis.sizes]
    times = [f"{1000 * value:.1f}" for value in seconds]
    return [
        f"## {name}",
        "",
        f"Expected exponent {low} to {high}: {axis.why}. Fitted: **{fitted:.2f}**, {verdict}.",
        "",
        f"| {axis.unit} | {' | '.join(works)} |",
        f"|---|{'---:|' * len(works)}",
        f"| milliseconds | {' | '.join(times)} |",
        "",
    ]


def draw(found: dict[str, list[float]], path: Path) -> None:
    """Small panels: measured points, and a line of exponent 1 through the last of them."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # after the backend is chosen

    figure, panels = plt.subplots(2, (len(found) + 1) // 2, figsize=(12, 5.5), layout="constrained")
    for panel, item in itertools.zip_longest(panels.flat, found.items()):
        if item is None:
            panel.set_axis_off()
            continue
        name, seconds = item
        axis = AXES[name]
        works = np.array([axis.work(size) for size in axis.sizes])
        measured = f"measured, {exponent(axis, seconds):.2f}"
        panel.loglog(works, seconds, "o-", color="tab:blue", label=measured)
        panel.loglog(works, seconds[-1] * works / works[-1], ":", color="grey", label="exponent 1")
        panel.set(title=name, xlabel=axis.unit, ylabel="seconds")
        panel.set_xticks(works, [f"{work:.0f}" for work in works], fontsize=8)
        panel.minorticks_off()
        panel.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def main(names: list[str]) -> None:
    """Measure the axes, print their tables, and write the page if all were measured."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    lines = []
    with threadpool_limits(1):
        for name in names or AXES:
            found[name] = measure(AXES[name])
            part = table(name, AXES[name], found[name])
            lines += part
            print("\n".join(part), flush=True)
    if names:
        return
    head = [
        "# How costs grow",
        "",
        "Processor time of one thread, medians of three calls, and the exponent p of time ~",
        "size^p that fits them. Each part says which range is expected, and why; those of heads,",
        "local crops and image size were widened downwards, and the sizes of k-means doubled,",
        "after a first run had shown what does not grow. Encoder: 6 blocks of width 192, random",
        "weights.",
        "",
        "```bash",
        "python -m benchmarks.growth",
        "```",
        "",
        "![eight panels: time over size, and lines of exponent 1](growth.png)",
        "",
    ]
    cores = f"{processor()}, 1 of {os.cpu_count()} cores"
    machine = f"{datetime.date.today()}, {cores}, torch {version('torch')}"
    (RESULTS / "growth.md").write_text("\n".join([*head, *lines, machine]) + "\n", encoding="utf-8")
    draw(found, RESULTS / "growth.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "axes",
        nargs="*",
        metavar="axis",
        help=f"which to measure: {', '.join(AXES)}; all by default",
    )
    chosen = parser.parse_args().axes
    unknown = [name for name in chosen if name not in AXES]
    if unknown:
        parser.error(f"no axis {', '.join(unknown)}; there are {', '.join(AXES)}")
    main(chosen)
