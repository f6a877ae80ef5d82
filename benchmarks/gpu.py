"""What a refinement costs on a GPU.

    python -m benchmarks.gpu --images ../shared/data/imagenet-sample/train.parquet
    python -m benchmarks.gpu --images photos/ --size b16,l16

Runs the trainer itself, head warm-up and refinement, on encoders with random weights and real
JPEGs: images per second, MFU, peak memory, how long a step waits for its data, and where its time
goes; L/16 at a batch of 1024 in less than 24 GB; compiled or not; exact or fast views. Then
features of images, k-NN and k-means on the GPU. Writes a markdown page (`--out`) with command,
device and date. `--device cpu --tiny` tries the script in seconds; what it prints then says nothing
about speed.

MFU is useful operations over time and peak. Useful are, with 2 per multiply-add, per image: in
every block of width D, with MLP width M, for the T tokens of a view, 2 T (4 D^2 + 2 D M) + 4 T^2 D;
in the last block 2 T 2 D^2 for keys and values, and the rest for the prefix tokens alone; 2 N 3 p^2
D for N patches of side p; 2 w for the w weights of all heads, per view. Backward is twice forward.
Not counted: queue and loss, and what is computed a second time (micro-batches, activation
checkpointing).
"""

import argparse
import dataclasses
import datetime
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import profile, record_function
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel, RefineRecipe
from mim_refiner_hf.clustering.k_means import kmeans
from mim_refiner_hf.conversion.preprocessing import image_processor
from mim_refiner_hf.data.images import ImageDataset, open_images
from mim_refiner_hf.data.loading import Loading
from mim_refiner_hf.evaluation import extract_features, knn_accuracy
from mim_refiner_hf.model.modeling_mim_refiner import can_leave_patches_out
from mim_refiner_hf.refinement import refiner as refiner_module
from mim_refiner_hf.refinement import trainer as trainer_module
from mim_refiner_hf.refinement.memory import head_parameters
from mim_refiner_hf.refinement.refiner import StepResult
from mim_refiner_hf.refinement.resolve import ResolvedRecipe, Steps, resolve
from mim_refiner_hf.refinement.trainer import Trainer
from mim_refiner_hf.runtime.device import available_memory, check_compile, uses_bf16


class Shape(NamedTuple):
    """Shape of a ViT's encoder; its MLPs are 4 times as wide as it."""

    width: int
    layers: int
    heads: int
    patch: int = 16
    image: int = 224


SIZES = {
    "b16": Shape(768, 12, 12),
    "l16": Shape(1024, 24, 16),
    "h14": Shape(1280, 32, 16, patch=14),
}
TINY = Shape(48, 2, 2, patch=8, image=32)
TINY_RECIPE = {
    "projector_dim": 24,
    "predictor_dim": 32,
    "embedding_dim": 16,
    "queue_size": 64,
    "local_views": 2,
    "topk": 5,
}
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}
"""Operations per second in dense bf16, by what the device's name contains, first match.

From NVIDIA's data sheets."""
SKIPPED = 3
"""Steps of each stage that are not counted: memory is found, kernels are chosen or compiled."""
PARTS = ("encoder forward", "heads", "queue", "loss", "backward", "optimiser", "views")


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of the trainer.

    Attributes:
        size: name of the encoder's size.
        name: what it shows.
        changes: what differs from the default recipe.
    """

    size: str
    name: str
    changes: dict[str, Any]


@dataclasses.dataclass
class Measured:
    """What one stage of a case took.

    Attributes:
        seconds: of each step.
        waited: seconds before each step, for its batch.
        peak: bytes.
        parts: seconds per part of one step.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    waited: list[float] = dataclasses.field(default_factory=list)
    peak: int = 0
    parts: dict[str, float] = dataclasses.field(default_factory=dict)


def encoder_config(size: str, tiny: bool) -> MimRefinerConfig:
    """The configuration of an encoder of a size; the same tiny one for all of them."""
    shape = TINY if tiny else SIZES[size]
    return MimRefinerConfig(
        image_size=shape.image,
        patch_size=shape.patch,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
    )


def cases(sizes: list[str]) -> list[Case]:
    """Every size as it would be run, and what more is asked of some.

    Of the first one compiled and with exact views; of L/16 the paper's batch in 24 GB.
    """
    first = sizes[0]
    found = [Case(size, "fast views", {}) for size in sizes]
    found += [
        Case(first, "exact views", {"views": "exact"}),
        Case(first, "compiled", {"compile": True}),
    ]

    if "l16" in sizes:
        recomputed = {"batch_size": 1024, "micro_batch_size": 64, "gradient_checkpointing": True}
        smaller = {"batch_size": 1024, "micro_batch_size": 16}
        found.append(Case("l16", "24 GB: blocks recomputed", recomputed))
        found.append(Case("l16", "24 GB: smaller micro-batches", smaller))
    return found


def useful_operations(config: MimRefinerConfig, recipe: ResolvedRecipe) -> dict[str, float]:
    """Floating-point operations per image and stage, by the formula above."""
    width = config.hidden_size
    inner = config.intermediate_size
    prefix = config.num_prefix_tokens
    forward = 0.0
    patches_in = 0.0
    for views, size in (
        (recipe.global_views, recipe.global_size),
        (recipe.local_views, recipe.local_size),
    ):
        patches = (size // config.patch_size) ** 2
        tokens = patches + prefix
        block = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width
        last = block
        if can_leave_patches_out(config):
            last = (
                2 * tokens * 2 * width**2
                + 2 * prefix * (2 * width**2 + 2 * width * inner)
                + 4 * prefix * tokens * width
            )
        forward += views * (block * (config.num_hidden_layers - 1) + last)
        patches_in += views * 2 * patches * config.num_channels * config.patch_size**2 * width

    heads = 2.0 * head_parameters(recipe, config) * recipe.num_views
    return {
        "warmup": forward + patches_in + 3 * heads,
        "refine": 3 * forward + 2 * patches_in + 3 * heads,
    }


# ---- running the trainer


def make_trainer(
    case: Case, images: ImageDataset, options: argparse.Namespace, folder: str
) -> Trainer:
    """The trainer of a case, ready for its first step.

    ValueError where the device cannot do what the case asks for.
    """
    config = encoder_config(case.size, options.tiny)
    settings: dict[str, Any] = {
        "batch_size": options.batch_size,
        "micro_batch_size": "auto",
        "views": "fast",
        **case.changes,
    }
    if options.tiny:
        micro = 2 if "24 GB" in case.name else None
        settings |= {**TINY_RECIPE, "batch_size": 8, "micro_batch_size": micro}
    recipe = RefineRecipe(
        model="random weights",
        dataset=str(options.images),
        max_steps=options.steps,
        save_every=0,
        log_every=10**6,
        report_to="none",
        output_dir=folder,
        **settings,
    )
    check_compile(recipe.compile)

    bf16 = options.device == "cuda" and uses_bf16(recipe.mixed_precision)
    resolved = resolve(recipe, config, len(images), bf16=bf16)
    steps = Steps(options.steps, options.steps)
    resolved = dataclasses.replace(resolved, steps=steps, num_workers=options.num_workers)
    accelerator = Accelerator(cpu=options.device == "cpu")
    with accelerator.device:
        encoder = MimRefinerModel(config)
    mean = list(IMAGENET_DEFAULT_MEAN)
    std = list(IMAGENET_DEFAULT_STD)
    trainer = Trainer(resolved, accelerator, images, encoder, mean, std)
    if "micro_batch_size" in resolved.to_measure:
        trainer.choose_micro_batch(available_memory(options.device))
    return trainer


def measure(trainer: Trainer) -> dict[str, Measured]:
    """Both stages through `Trainer.fit`: the time within and between updates.

    The first `SKIPPED` of each are left out; the parts are those of the last update.
    """
    found = {"warmup": Measured(), "refine": Measured()}
    update = trainer.update
    on_gpu = trainer.accelerator.device.type == "cuda"
    left = time.perf_counter()

    def wait() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(step: int, batch: dict[str, Tensor]) -> StepResult:
        nonlocal left
        entered = time.perf_counter()
        stage = found[trainer.stage(step)]
        number = step if step < trainer.steps.warmup else step - trainer.steps.warmup
        if on_gpu and number == 0:
            torch.cuda.reset_peak_memory_stats()
        last = number == trainer.steps.warmup - 1

        if last:
            with labelled(trainer), profile() as profiler:
                result = update(step, batch)
                wait()
            stage.parts = seconds_by_part(profiler, on_gpu)
        else:
            result = update(step, batch)

        now = wait()
        if number >= SKIPPED and not last:
            stage.waited.append(entered - left)
            stage.seconds.append(now - entered)

        stage.peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        left = now
        return result

    with patch.object(trainer, "update", timed):
        trainer.fit(0, trainer.steps.total, extra_state={}, evaluate=dict)
    return found


@contextmanager
def labelled(trainer: Trainer) -> Iterator[None]:
    """Within, the parts of a step carry their names in a profile."""
    refiner = trainer.refiner
    places: list[tuple[Any, str, str]] = [
        (refiner, "encode", "encoder forward"),
        (refiner.heads, "forward", "heads"),
        (refiner.queue, "lookup", "queue"),
        (refiner.queue, "enqueue", "queue"),
        (refiner_module, "nna_loss", "loss"),
        (trainer.optimizer, "step", "optimiser"),
        (trainer_module, "update_average", "optimiser"),
        (trainer_module, "finished_views", "views"),
        (trainer_module, "normalise", "views"),
    ]

    def named(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"part: {part}"):
                return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for target, attribute, part in places:
            function = named(getattr(target, attribute), part)
            stack.enter_context(patch.object(target, attribute, function))
        yield


def seconds_by_part(profiler: profile, on_gpu: bool) -> dict[str, float]:
    """Seconds of the device in every part of `PARTS`, and in none of them ("the rest").

    The profile has to be made under `labelled`.
    """
    found = dict.fromkeys(PARTS, 0.0)
    total = 0.0
    for event in profiler.key_averages():
        # kernels are counted by the operations that launched them
        if event.device_type != DeviceType.CPU:
            continue
        of_it = event.cpu_time_total / 1e6
        own = event.self_cpu_time_total / 1e6
        if on_gpu:
            of_it = event.device_time_total / 1e6
            own = event.self_device_time_total / 1e6
        total += own

        if event.key.startswith("part: "):
            found[event.key.removeprefix("part: ")] += of_it
        elif event.key.startswith("autograd::engine::evaluate_function"):
            found["backward"] += of_it
    return found | {"the rest": max(0.0, total - sum(found.values()))}


# ---- evaluation


def evaluation_rows(images: ImageDataset, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Name and result of each measurement of the evaluation.

    Features per size; k-NN and k-means on random features of the width of a ViT-L.
    """
    for size in options.size:
        config = encoder_config(size, options.tiny)
        precision = torch.bfloat16 if options.device == "cuda" else torch.float32
        with torch.device(options.device):
            encoder = MimRefinerModel(config).to(precision)
        loading = Loading(options.batch_size, options.num_workers, options.device)
        chosen = images.subset(range(8 if options.tiny else 4096))
        processor = image_processor(config, {})
        # the first batch finds memory and kernels
        extract_features(encoder, images.subset(range(8)), processor, loading=loading)
        began = time.perf_counter()
        extract_features(encoder, chosen, processor, loading=loading)
        rate = len(chosen) / (time.perf_counter() - began)
        shown = str(precision).removeprefix("torch.")
        yield f"features, {size}, {shown}", f"{rate:.0f} images/s with decoding"

    rows, width, groups = 100_000, 1024, 1000
    if options.tiny:
        rows, width, groups = 200, 16, 4
    features = torch.randn(rows, width, device=options.device)
    labels = torch.arange(rows, device=options.device) % groups
    bank = rows * 9 // 10
    ways: dict[str, Callable[[], object]] = {
        f"k-NN, {bank} x {width} bank, {rows - bank} rows": lambda: knn_accuracy(
            features[:bank], labels[:bank], features[bank:], labels[bank:]
        ),
        f"k-means, {rows} x {width}, {groups} groups, 10 restarts": lambda: kmeans(
            features, groups, refits=0
        ),
    }

    for name, way in ways.items():
        began = time.perf_counter()
        way()  # both end with numbers on the CPU
        yield name, f"{time.perf_counter() - began:.2f} s"


# ---- the page


def page(images: ImageDataset, options: argparse.Namespace) -> Iterator[str]:
    """The lines of the page, as they are measured."""
    name = "the CPU"
    peak = None
    if options.device == "cuda":
        name = torch.cuda.get_device_name()
        peak = next((value for part, value in PEAKS.items() if part in name), None)
    machine = f"{name}, {options.num_workers} workers, torch {torch.__version__}"
    yield from (
        "# What a refinement costs on a GPU",
        "",
        f"`python -m benchmarks.gpu {shlex.join(sys.argv[1:])}`  ",
        f"{machine}, {datetime.date.today()}; random weights, real JPEGs",
        "",
        "| encoder | case | stage | batch | at a time | images/s | MFU | peak GiB | waiting for"
        " data |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    )

    profiles: dict[str, dict[str, float]] = {}
    for case in cases(options.size):
        # frees the last one's
        trainer = stages = None
        torch.cuda.empty_cache()
        try:
            with tempfile.TemporaryDirectory() as folder:
                trainer = make_trainer(case, images, options, folder)
                stages = measure(trainer)
        except (ValueError, torch.OutOfMemoryError) as error:
            reason = str(error).splitlines()[0]
            yield f"| {case.size} | {case.name} | left out: {reason} |" + " |" * 6
            continue
        for stage, measured in stages.items():
            yield stage_line(case, stage, trainer, measured, peak)
            profiles[f"{case.size}, {case.name}, {stage}"] = measured.parts

    columns = [*PARTS, "the rest"]
    yield from (
        "",
        "Where the time of a step goes, in ms (one step under torch.profiler):",
        "",
        f"| step | {' | '.join(columns)} |",
        "|---|" + "---:|" * len(columns),
    )
    for step, parts in profiles.items():
        cells = [f"{1000 * parts[part]:.1f}" for part in columns]
        yield f"| {step} | {' | '.join(cells)} |"

    yield from ("", "| evaluation | |", "|---|---:|")
    for way, result in evaluation_rows(images, options):
        yield f"| {way} | {result} |"


def stage_line(
    case: Case, stage: str, trainer: Trainer, measured: Measured, peak: float | None
) -> str:
    """One row of the table.

    Rate of a step on its own, MFU, peak memory, and the share of the time that it waits for its
    batch.
    """
    recipe = trainer.recipe
    rate = recipe.batch_size / median(measured.seconds)
    mfu = "unknown"
    if peak and recipe.bf16:
        useful = useful_operations(trainer.encoder.config, recipe)[stage]
        mfu = f"{100 * rate * useful / peak:.0f} %"
    memory = f"{measured.peak / 2**30:.1f}" if measured.peak else "unknown"

    waited = sum(measured.waited)
    share = waited / (waited + sum(measured.seconds))
    data = f"{100 * share:.0f} %"
    if share > 0.1:
        data += ", data-bound"

    micro = recipe.micro_batch_size or "all"
    setting = f"{case.size} | {case.name} | {stage} | {recipe.batch_size} | {micro}"
    return f"| {setting} | {rate:.1f} | {mfu} | {memory} | {data} |"


def main(arguments: list[str] | None = None) -> None:
    """Print the page as it is measured, and write it.

    Exits with 2 for a size or a device that is not there.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        help="parquet file or folder of JPEGs, repeated to 8192 images",
    )
    parser.add_argument(
        "--size",
        type=lambda text: text.split(","),
        default=list(SIZES),
        help="of b16,l16,h14; default: all",
    )
    parser.add_argument(
        "--batch_size", type=int, default=256, help="images per step, but for the cases of 1024"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=12,
        help=f"per stage; the first {SKIPPED} and the last are not timed",
    )
    parser.add_argument("--num_workers", type=int, default=16, help="data-loading workers")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny encoder and batch: tries the script"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/gpu.md"), help="the page"
    )
    options = parser.parse_args(arguments)

    unknown = set(options.size) - set(SIZES)
    if unknown:
        parser.error(f"--size {','.join(sorted(unknown))}: there are {', '.join(SIZES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda: there is no GPU; --device cpu --tiny tries the script without one"
        )
    if options.steps < SKIPPED + 2:
        parser.error(
            f"--steps {options.steps}: at least {SKIPPED + 2}, of which {SKIPPED} and the last are"
            " not timed"
        )

    images = open_images(str(options.images))
    images = images.subset(np.arange(max(8192, len(images))) % len(images))
    lines = []
    for line in page(images, options):
        print(line, flush=True)
        lines.append(line)

    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
