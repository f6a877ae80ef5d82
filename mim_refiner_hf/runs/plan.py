"""What a run will do, said before it does it: start, data, heads, views, batch, memory, disk.

available = available_memory("cuda")
print(plan_text(recipe, config, num_eval=50000, device="cuda", available=available))
"""

import dataclasses
import shutil
from pathlib import Path

import torch

from ..clustering.channels import is_picture
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..refinement.auto import choose_eval_fraction
from ..refinement.memory import (
    GIGA,
    HEADROOM,
    bytes_needed,
    encoder_parameters,
    fitting_micro_batch,
    head_parameters,
    memory_estimate,
    projector_parameters,
)
from ..refinement.misfit import misfits
from ..refinement.resolve import ResolvedRecipe
from ..runtime.device import emulates_bf16
from ..runtime.files import in_bytes
from ..runtime.sharding import fsdp2_requested
from ..runtime.text import one_line
from ..runtime.wording import millions, setting

# of the adapters that are named where the whole encoder does not fit
_RANK = 8
# What the heads read, in words, for each `pooling`.
_READS = {
    "cls": "the CLS token",
    "mean": "the mean patch",
    "register": "the first register token",
    "prefix": "the mean of CLS and registers",
    "attention": "the attention pooling of the output, the mean patch on earlier blocks",
    "global_repr": "the predictor on the output, the mean patch on earlier blocks",
}


def plan_text(
    recipe: ResolvedRecipe,
    config: MimRefinerConfig,
    *,
    num_eval: int,
    device: str,
    available: int,
) -> str:
    """The plan as lines for a terminal.

    Args:
        config: of the encoder that is refined.
        num_eval: images to evaluate on.
        device: "cuda" or "cpu".
        available: free bytes of one process.
    """
    asked = recipe.asked
    images = "a stream" if recipe.num_images is None else f"{recipe.num_images} images"

    lines = [
        ("start", _start_text(recipe, config)),
        ("data", f"{asked.dataset}: {images} to refine on, {_held_out(recipe, num_eval)}"),
        ("heads", _heads_text(recipe, config.num_hidden_layers - 1)),
        ("frozen", _frozen_text(recipe, config)),
        ("views", _views_text(recipe, config.num_channels)),
        ("batch", _batch_text(recipe, device)),
    ]
    if fsdp2_requested():
        lines.append(("shards", _shards_text(recipe.processes)))
    lines.append(("steps", _steps_text(recipe)))

    # what it takes, and what it leaves
    lines += _named("memory", _memory_lines(recipe, config, available))
    disk = disk_text(recipe, config) if recipe.save_every else "no checkpoints"
    files = "metrics.json, neighbours.png, groups_before_after.png, curves.png, log.jsonl"
    lines += [("disk", disk), ("result", f"{recipe.output_dir}/model, {files}")]
    lines += _named("chosen", chosen_lines(recipe))
    lines += _named("careful", misfits(recipe))
    return "\n".join(["Plan", *(f"  {name:<7} {text}" for name, text in lines)])


def _held_out(recipe: ResolvedRecipe, num_eval: int) -> str:
    """How many images are measured on, and where nothing states it, why so many."""
    asked = recipe.asked
    text = f"{num_eval} to evaluate on"
    stated = [asked.eval_fraction, asked.eval_dataset, asked.eval_split]
    if recipe.num_images is None or any(field is not None for field in stated):
        return text
    return f"{text} ({choose_eval_fraction(recipe.num_images + num_eval).reason})"


def chosen_lines(recipe: ResolvedRecipe) -> list[str]:
    """What the recipe left open: flags with the values that they got, and the reason."""
    flags: dict[str, list[str]] = {}
    for name, reason in recipe.reasons.items():
        flags.setdefault(reason, []).append(f"{name} {_shown(recipe, name)}")
    return [f"{', '.join(fields)}: {reason}" for reason, fields in flags.items()]


def _shown(recipe: ResolvedRecipe, name: str) -> str:
    if name in recipe.to_measure:
        return "auto"
    value = getattr(recipe, name)
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return f"{value}"


def _named(name: str, texts: list[str]) -> list[tuple[str, str]]:
    """Lines of the plan under one name, which only the first one shows."""
    return [("" if number else name, text) for number, text in enumerate(texts)]


def _start_text(recipe: ResolvedRecipe, config: MimRefinerConfig) -> str:
    asked = recipe.asked
    start = asked.model or asked.init_from or f"pre-trained first by {asked.pretrain}"
    text = f"{start}: {encoder_text(config)}"
    if config.erased_directions:
        # the blocks are trained on with it
        text += (
            f"; {', '.join(map(one_line, config.erased or ()))} erased in "
            f"{config.erased_directions} directions, which stay so"
        )
    return text


def encoder_text(config: MimRefinerConfig) -> str:
    """Size and shape of an encoder, in words."""
    parameters = millions(encoder_parameters(config).total)
    rows, columns = config.grid
    return (
        f"{parameters} parameters, {config.num_hidden_layers} blocks of width "
        f"{config.hidden_size}, {rows}x{columns} patches"
    )


def _heads_text(recipe: ResolvedRecipe, last: int) -> str:
    """Which blocks have a head; `last` is the encoder's last block."""
    names = ["output" if block == last else str(block) for block in recipe.head_blocks]
    heads = ", ".join(names)
    if "head_blocks" in recipe.to_measure:
        heads = f"what measuring all blocks proposes (auto; by default {heads})"
    if recipe.nested_widths:
        heads += f", and on its first {', '.join(map(str, recipe.nested_widths))} channels"
    momentum = ""
    if recipe.target_momentum is not None:
        momentum = f"; targets by projectors with momentum {recipe.target_momentum:g}"
    return (
        f"on {heads} (0-based blocks); they read {_READS[recipe.pooling]}; "
        f"temperature {recipe.temperature:g}; queue {recipe.queue_size}{momentum}"
    )


def _frozen_text(recipe: ResolvedRecipe, config: MimRefinerConfig) -> str:
    """What stays as it is, and how much of the encoder does not."""
    text = "nothing (position tables are never trained)"
    if recipe.freeze_blocks:
        text = f"embeddings and blocks 0-{recipe.freeze_blocks - 1}"
    if recipe.lora_rank:
        first = recipe.freeze_blocks
        text = f"all but adapters of rank {recipe.lora_rank} in blocks {first} and later"
    weights = encoder_parameters(config, recipe.freeze_blocks, recipe.lora_rank)
    share = 100 * weights.trained / weights.total
    return f"{text}; {millions(weights.trained)} weights of the encoder train, {share:.1f} %"


def _views_text(recipe: ResolvedRecipe, num_channels: int) -> str:
    colour = "with colour, blur, greyscale, solarise" if recipe.colour else "crop and flip only"
    if recipe.colour and not is_picture(num_channels):
        colour = (
            f"with brightness, contrast and blur of each of {num_channels} channels; no hue, "
            "saturation, greyscale, solarise: they are no colours"
        )
    views = [f"{recipe.global_views} of {recipe.global_size} px"]
    if recipe.local_views:
        views.append(f"{recipe.local_views} of {recipe.local_size} px")
    return ", ".join([*views, colour])


def _batch_text(recipe: ResolvedRecipe, device: str) -> str:
    precision = "fp32"
    if recipe.bf16:
        precision = "bf16"
        if emulates_bf16(device):
            precision = "bf16, emulated and slower than fp32 on this CPU"
        elif device == "cpu" and recipe.asked.mixed_precision == "auto":
            precision = "bf16 (auto: this CPU computes it)"

    passes = ""
    if "micro_batch_size" in recipe.to_measure:
        passes = ", as many at a time through the encoder as fit (auto; exact)"
    elif recipe.micro_batch_size is not None:
        passes = f", {recipe.micro_batch_size} at a time through the encoder (exact)"

    threads = f" ({torch.get_num_threads()} threads)" if device == "cpu" else ""
    return (
        f"{recipe.batch_size} images over {recipe.processes} process(es) on {device}{threads}, "
        f"{precision}{passes}"
    )


def _shards_text(processes: int) -> str:
    """What FSDP2 does to a run."""
    if processes == 1:
        return "FSDP2 is on, but one process has nothing to share"
    return (
        f"FSDP2: each of {processes} processes keeps 1/{processes} of encoder, moving average, "
        "heads, gradients and AdamW's moments; a block is whole while it is used, the queue always"
    )


def _steps_text(recipe: ResolvedRecipe) -> str:
    warmup = f"{recipe.steps.warmup} of head warm-up (encoder frozen)"
    if recipe.asked.init_from is not None:
        warmup = "no head warm-up (heads and queues come along)"
    elif recipe.steps.warmup == 0:
        warmup = f"no head warm-up ({setting('head_epochs', 0)})"
    return (
        f"{warmup} + {recipe.steps.refine} of refinement; stage: {recipe.asked.stage}; how long "
        "each takes is said once its first steps are timed"
    )


def _memory_lines(recipe: ResolvedRecipe, config: MimRefinerConfig, available: int) -> list[str]:
    """What a step needs and what there is; where it does not fit, a second line says what to do."""
    auto = "micro_batch_size" in recipe.to_measure
    if auto:
        fitting = fitting_micro_batch(recipe, config, available)
        # where nothing fits, what one image at a time would need
        recipe = dataclasses.replace(recipe, micro_batch_size=1 if fitting == 0 else fitting)

    parts = memory_estimate(recipe, config)
    total = sum(parts.values())
    largest = max(parts, key=lambda part: parts[part])
    needs = (
        f"about {total / GIGA:.2f} GiB per process of {available / GIGA:.2f} that are free, "
        f"most of it {largest} ({parts[largest] / GIGA:.2f})"
    )
    if total <= HEADROOM * available:
        return [needs]
    return [needs, f"it does not fit{_remedy(recipe, config, available, auto)}"]


def _remedy(recipe: ResolvedRecipe, config: MimRefinerConfig, available: int, auto: bool) -> str:
    """What to change where a step does not fit; with `auto` the micro-batch chooses itself."""
    trained = [recipe]
    # adapters begin where the heads do, if no other block is stated
    first = recipe.asked.freeze_blocks
    if first is None:
        first = recipe.head_blocks[0]
    # an encoder without linear layers has no adapters
    if recipe.trainable == "all" and encoder_parameters(config, first, _RANK).trained:
        adapters = dataclasses.replace(recipe, trainable=f"lora:{_RANK}", freeze_blocks=first)
        trained.append(adapters)
    ways = []
    for way in trained:
        for recomputed in sorted({way.gradient_checkpointing, True}):
            ways.append(dataclasses.replace(way, gradient_checkpointing=recomputed))

    others = f"{setting('batch_size')}, {setting('queue_size')} or {setting('num_heads')}"
    for way in ways:
        size = fitting_micro_batch(way, config, available)
        if size == 0:
            continue
        changes = []
        result = "gives the same gradients"
        if way.trainable != recipe.trainable:
            changes.append(setting("trainable", way.trainable))
            result = f"trains adapters in place of its weights; or lower {others}"
        if size is not None and not auto:
            changes.append(setting("micro_batch_size", size))
        if way.gradient_checkpointing:
            changes.append(setting("gradient_checkpointing", True))
        need = bytes_needed(dataclasses.replace(way, micro_batch_size=size), config) / GIGA
        return f": {' '.join(changes)} needs {need:.2f} GiB and {result}"
    return f", whatever the micro-batch: lower {others}"


def checkpoint_bytes(recipe: ResolvedRecipe, config: MimRefinerConfig) -> float:
    """Estimated bytes of a checkpoint in the refinement.

    Weights, their average and AdamW's moments of both, heads, queue.
    """
    weights = encoder_parameters(config, recipe.freeze_blocks, recipe.lora_rank)
    # of each head rows and norms; of all together index, label and age
    row = 4 * recipe.num_heads * (recipe.embedding_dim + 1) + 24
    of_heads = 12 * head_parameters(recipe, config)
    if recipe.target_momentum is not None:
        of_heads += 4 * projector_parameters(recipe, config)
    return 8 * weights.total + 8 * weights.trained + of_heads + recipe.queue_size * row


def disk_text(recipe: ResolvedRecipe, config: MimRefinerConfig) -> str:
    """What the checkpoints take, the next one beside those that are kept, and what is free."""
    size = checkpoint_bytes(recipe, config)
    most = (recipe.save_total_limit + 1) * size
    folder = Path(recipe.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = (
        f"checkpoints of about {in_bytes(size)}, {recipe.save_total_limit} kept: "
        f"{in_bytes(most)} at most; {in_bytes(free)} free"
    )
    if free < most:
        text += f", TOO LITTLE: make room, or lower {setting('save_total_limit')}"
    return text
