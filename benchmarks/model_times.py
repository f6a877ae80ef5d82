"""How long features and a default refinement take, by the size of the model, on this machine.

    python -m benchmarks.model_times

Random weights of the zoo's shapes: time does not depend on their values. The encoder's forward
pass, and forward and backward of one update's views, are timed on a few images and multiplied by
what `embed` and a default `refine` would do with 1 000 and 10 000 photos. Decoding and heads are
not in it: beside these encoders they are small. Writes benchmarks/results/model-times.md, with the
licences and scores of the zoo's cards; 5 minutes on two cores.
"""

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel, RefineRecipe
from mim_refiner_hf.conversion.zoo import ZOO
from mim_refiner_hf.refinement.auto import Situation
from mim_refiner_hf.refinement.resolve import ResolvedRecipe, resolve

RESULTS = Path(__file__).parent / "results" / "model-times.md"
PHOTOS = (1000, 10_000)
# features to take, and to refine from; of a size the zoo has none of, any ViT of that shape
NAMES = {
    "S/16": ("", "any ViT-S of the Hub"),
    "B/16": ("", "d2v2-b16"),
    "L/16": ("d2v2-refined-l16", "d2v2-l16"),
    "H/14": ("d2v2-refined-h14", "d2v2-h14"),
}


class Shape(NamedTuple):
    """Width, depth, heads and patch side of an encoder for 224 pixels; images that are timed."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    timed: int


SHAPES = {
    "S/16": Shape(384, 12, 6, 16, 16),
    "B/16": Shape(768, 12, 12, 16, 8),
    "L/16": Shape(1024, 24, 16, 16, 4),
    "H/14": Shape(1280, 32, 16, 14, 2),
}


def seconds(call: Callable[[], object]) -> float:
    """The shorter of two runs, after one to warm up."""
    call()
    found = []
    for _ in range(2):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return min(found)


def encoder_of(shape: Shape) -> MimRefinerModel:
    """An encoder with random weights."""
    config = MimRefinerConfig(
        image_size=224,
        patch_size=shape.patch_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        intermediate_size=4 * shape.hidden_size,
    )
    return MimRefinerModel(config)


def default_run(encoder: MimRefinerModel, photos: int) -> ResolvedRecipe:
    """The settings that a run with nothing set would have on this machine."""
    gpu = torch.accelerator.is_available()
    at = Situation(encoder.config, photos, gpu=gpu)
    return resolve(RefineRecipe(model="any"), at.config, photos, gpu=gpu)


def minutes(shape: Shape) -> tuple[list[float], list[float]]:
    """Of `embed`, and of a default `refine`, for each of `PHOTOS`."""
    encoder = encoder_of(shape)
    pixels = torch.randn(shape.timed, 3, 224, 224)

    def forward() -> None:
        with torch.no_grad():
            encoder(pixels)

    features = [seconds(forward) / shape.timed * photos / 60 for photos in PHOTOS]

    runs = [default_run(encoder, photos) for photos in PHOTOS]
    side = runs[0].global_size
    views = torch.randn(shape.timed, 3, side, side)

    def step() -> None:
        encoder(views, interpolate_pos_encoding=True).last_hidden_state.square().mean().backward()
        encoder.zero_grad()

    def head_step() -> None:
        with torch.no_grad():
            encoder(views, interpolate_pos_encoding=True)

    per_view = seconds(step) / shape.timed
    per_warm_view = seconds(head_step) / shape.timed
    refining = []
    for run in runs:
        of_an_update = run.batch_size * run.num_views
        spent = run.steps.refine * per_view + run.steps.warmup * per_warm_view
        refining.append(of_an_update * spent / 60)
    return features, refining


def told(value: float) -> str:
    """Minutes for readers."""
    if value < 100:
        return f"{value:.1f} min" if value < 10 else f"{value:.0f} min"
    return f"{value / 60:.0f} h" if value < 48 * 60 else f"{value / 60 / 24:.0f} days"


def licence_of(name: str) -> str:
    """The licence that the zoo states for a model; "its own" for a model of elsewhere."""
    return (ZOO[name].licence or "none stated") if name in ZOO else "its own"


def main() -> None:
    """Measure and write the page."""
    lines = []
    for size, shape in SHAPES.items():
        ready, start = NAMES[size]
        features, refining = minutes(shape)
        ready_shown = f"`{ready}`" if ready else "-"
        start_shown = f"`{start}` ({licence_of(start)})" if start in ZOO else start
        cells = [size, ready_shown, *map(told, features), start_shown, *map(told, refining)]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)

    device = "a GPU" if torch.accelerator.is_available() else f"{os.cpu_count()} CPU cores"
    text = [
        "# How long features and a default refinement take",
        "",
        "```bash",
        "python -m benchmarks.model_times",
        "```",
        "",
        f"Photos of 224 pixels on {device} ({platform.machine()}), {time.strftime('%Y-%m-%d')},",
        f"torch {version('torch')}, fp32. The encoder is timed on a few images and multiplied:",
        "decoding and heads are not in it, and no whole run of these sizes was made. Refining is",
        "what `mim-refiner refine photos/ --model M` does with nothing set.",
        "",
        "| size | features, ready to use | 1 000 photos | 10 000 photos |"
        " to refine from (licence) | 1 000 photos | 10 000 photos |",
        "|---|---|---:|---:|---|---:|---:|",
        *lines,
    ]
    RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
