"""What a run will do, said before it does it: blocks with heads, what is frozen, batch, memory, steps.

print(plan_text(recipe, config, num_images=1281167, num_eval=50000, steps=Steps(25020, 37530), processes=1, device="cuda",
                bf16=True, available=available_memory("cuda")))
"""

import dataclasses
import shutil
from pathlib import Path

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..refinement.memory import (
    GIGA,
    HEADROOM,
    encoder_parameters,
    fitting_micro_batch,
    head_blocks_of,
    head_parameters,
    memory_estimate,
    needed,
)
from ..refinement.recipe import RefineRecipe
from ..refinement.resolve import Steps
from ..runtime.device import emulates_bf16
from ..runtime.files import in_bytes
from ..runtime.sharding import fsdp2_requested

READS = {
    "cls": "the CLS token",
    "mean": "the mean patch",
    "register": "the first register token",
    "global_repr": "the predictor on the output, the mean patch on earlier blocks",
}
"""What the heads read, in words, for each `pooling`."""


def checkpoint_bytes(recipe: RefineRecipe, config: MimRefinerConfig) -> float:
    """Estimated bytes of a checkpoint in the refinement: weights, their average and AdamW's moments of both, heads, queue."""
    weights, trained = encoder_parameters(config, recipe.freeze_blocks)
    rows = (
        4 * len(head_blocks_of(recipe, config)) * (recipe.embedding_dim + 1) + 24
    )  # rows, norms; index, label, age
    return (
        8 * weights + 8 * trained + 12 * head_parameters(recipe, config) + recipe.queue_size * rows
    )


def disk_text(recipe: RefineRecipe, config: MimRefinerConfig) -> str:
    """What the checkpoints take, while the next one is written beside those that are kept, and what is free."""
    each, folder = checkpoint_bytes(recipe, config), Path(recipe.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    needed, free = (recipe.keep + 1) * each, shutil.disk_usage(existing).free
    text = f"checkpoints of about {in_bytes(each)}, {recipe.keep} kept: {in_bytes(needed)} at most; {in_bytes(free)} free"
    return text + (", TOO LITTLE: make room, or lower --keep" if free < needed else "")


def _memory_lines(
    recipe: RefineRecipe, config: MimRefinerConfig, processes: int, bf16: bool, available: int
) -> list[str]:
    """What a step needs and what there is, in words; a second line says what to change where it does not fit."""
    auto = recipe.micro_batch_size == "auto"
    fitting = fitting_micro_batch(recipe, config, processes, bf16, available)
    if auto:
        recipe = dataclasses.replace(
            recipe, micro_batch_size=fitting or (None if fitting is None else 1)
        )
    parts = memory_estimate(recipe, config, processes, bf16)
    total, largest = sum(parts.values()), max(parts, key=lambda part: parts[part])
    lines = [
        f"about {total / GIGA:.2f} GiB per process of {available / GIGA:.2f} that are free, most of it {largest} "
        f"({parts[largest] / GIGA:.2f})"
    ]
    if total <= HEADROOM * available:
        return lines
    for checkpointing in dict.fromkeys((recipe.gradient_checkpointing, True)):
        changed = dataclasses.replace(recipe, gradient_checkpointing=checkpointing)
        size = fitting_micro_batch(changed, config, processes, bf16, available)
        if size == 0:
            continue
        flags = ([] if size is None or auto else [f"--micro_batch_size {size}"]) + [
            "--gradient_checkpointing true"
        ] * checkpointing
        need = (
            needed(dataclasses.replace(changed, micro_batch_size=size), config, processes, bf16)
            / GIGA
        )
        return [
            *lines,
            f"it does not fit: {' '.join(flags)} needs {need:.2f} GiB and gives the same gradients",
        ]
    return [
        *lines,
        "it does not fit, whatever the micro-batch: lower --batch_size, --queue_size or --num_heads",
    ]


def _shards_text(processes: int) -> str:
    """What FSDP2 does to a run, in words."""
    if processes == 1:
        return "FSDP2 is on, but one process has nothing to share"
    return (
        f"FSDP2: each of {processes} processes keeps 1/{processes} of encoder, moving average, heads, gradients and AdamW's moments; "
        "a block is whole while it is used, the queue always"
    )


def plan_text(
    recipe: RefineRecipe,
    config: MimRefinerConfig,
    *,
    num_images: int | None,
    num_eval: int,
    steps: Steps,
    processes: int,
    device: str,
    bf16: bool,
    available: int,
) -> str:
    """The plan as lines for a terminal. `recipe` is a resolved one; `available` are the free bytes of one process."""
    assert recipe.pooling is not None
    last = config.num_hidden_layers - 1
    heads = ", ".join(
        "output" if block == last else str(block) for block in head_blocks_of(recipe, config)
    )
    if recipe.head_blocks == "auto":
        heads = f"what measuring all blocks proposes (auto; by default {heads})"
    rows, columns = config.grid
    parameters = encoder_parameters(config)[0] / 1e6
    frozen = (
        f"embeddings and blocks 0-{recipe.freeze_blocks - 1}"
        if recipe.freeze_blocks
        else "nothing (position tables are never trained)"
    )
    start = recipe.model or recipe.init_from or f"pre-trained first by {recipe.pretrain}"
    images = "a stream" if num_images is None else f"{num_images} images"
    micro = (
        ""
        if recipe.micro_batch_size is None
        else f", {recipe.micro_batch_size} at a time through the encoder (exact)"
    )
    if recipe.micro_batch_size == "auto":
        micro = ", as many at a time through the encoder as fit (auto; exact)"
    precision = (
        ("bf16, emulated and slower than fp32 on this CPU" if emulates_bf16(device) else "bf16")
        if bf16
        else "fp32"
    )
    warmup = f"{steps.warmup} of head warm-up (encoder frozen)"
    if recipe.init_from is not None:
        warmup = "no head warm-up (heads and queues come along)"
    colour = "with colour, blur, greyscale, solarise" if recipe.colour else "crop and flip only"
    lines = [
        (
            "start",
            f"{start}: {parameters:.1f} M parameters, {last + 1} blocks of width {config.hidden_size}, {rows}x{columns} patches",
        ),
        ("data", f"{recipe.dataset}: {images} to refine on, {num_eval} to evaluate on"),
        (
            "heads",
            f"on {heads} (0-based blocks); they read {READS[recipe.pooling]}; "
            f"temperature {recipe.temperature:g}; queue {recipe.queue_size}",
        ),
        ("frozen", frozen),
        (
            "views",
            f"{recipe.global_views} of {recipe.global_size} px, {recipe.local_views} of {recipe.local_size} px, {colour}",
        ),
        (
            "batch",
            f"{recipe.batch_size} images over {processes} process(es) on {device}, {precision}{micro}",
        ),
        *([("shards", _shards_text(processes))] if fsdp2_requested() else []),
        ("steps", f"{warmup} + {steps.refine} of refinement; stage: {recipe.stage}"),
        *zip(
            ("memory", ""), _memory_lines(recipe, config, processes, bf16, available), strict=False
        ),
        ("disk", disk_text(recipe, config) if recipe.save_every else "no checkpoints"),
        ("result", f"{recipe.output_dir}/model, metrics.json, clusters.png, curves.png, log.jsonl"),
    ]
    return "\n".join(["Plan", *(f"  {name:<7} {text}" for name, text in lines)])


__all__ = ["checkpoint_bytes", "plan_text"]
