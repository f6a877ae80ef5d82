"""What a run will do, said before it does it: blocks with heads, what is frozen, batch, memory, steps.

print(plan_text(recipe, config, num_images=1281167, num_eval=50000, steps=Steps(25020, 37530), processes=1, device="cuda"))
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from ..checkpointing import in_bytes
from ..configuration_mim_refiner import MimRefinerConfig
from ..modeling_mim_refiner import MimRefinerModel
from .recipe import RefineRecipe, default_head_blocks

GIGA = 2**30
READS = {
    "cls": "the CLS token",
    "mean": "the mean patch",
    "register": "the first register token",
    "global_repr": "the predictor on the output, the mean patch on earlier blocks",
}
"""What the heads read, in words, for each `pooling`."""


class Steps(NamedTuple):
    """Updates of the head warm-up and of the refinement."""

    warmup: int
    refine: int

    @property
    def total(self) -> int:
        """Updates in all."""
        return self.warmup + self.refine


def count_steps(recipe: RefineRecipe, num_images: int | None) -> Steps:
    """Updates per stage: whole batches per epoch times epochs, at most `max_steps`."""
    if num_images is None:
        assert recipe.max_steps is not None
        return Steps(recipe.max_steps, recipe.max_steps)
    per_epoch = num_images // recipe.batch_size
    stages = [round(epochs * per_epoch) for epochs in (recipe.head_epochs, recipe.epochs)]
    return Steps(*(min(steps, recipe.max_steps or steps) for steps in stages))


def encoder_parameters(config: MimRefinerConfig) -> int:
    """Number of weights of the encoder, without allocating it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MimRefinerModel(config).parameters())


def head_blocks_of(recipe: RefineRecipe, config: MimRefinerConfig) -> list[int]:
    """The blocks with heads of a resolved recipe; for "auto", which measures before it chooses, the default ones."""
    return recipe.head_blocks if isinstance(recipe.head_blocks, list) else default_head_blocks(config.num_hidden_layers)


def head_parameters(recipe: RefineRecipe, width: int) -> int:
    """Number of weights of one head: projector and predictor."""
    per_head = width * recipe.projector_dim + recipe.projector_dim**2 + recipe.projector_dim * recipe.embedding_dim
    return per_head + 2 * recipe.embedding_dim * recipe.predictor_dim


def checkpoint_bytes(recipe: RefineRecipe, config: MimRefinerConfig) -> float:
    """Estimated bytes of a checkpoint in the refinement: weights, their average and AdamW's moments of both, heads, queue."""
    trained = 1 - recipe.freeze_blocks / config.num_hidden_layers
    heads = len(head_blocks_of(recipe, config))
    queue = recipe.queue_size * (4 * heads * (recipe.embedding_dim + 1) + 24)  # rows, norms; index, label, age
    return 4 * encoder_parameters(config) * (2 + 2 * trained) + 12 * heads * head_parameters(recipe, config.hidden_size) + queue


def disk_text(recipe: RefineRecipe, config: MimRefinerConfig) -> str:
    """What the checkpoints take, while the next one is written beside those that are kept, and what is free."""
    each, folder = checkpoint_bytes(recipe, config), Path(recipe.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    needed, free = (recipe.keep + 1) * each, shutil.disk_usage(existing).free
    text = f"checkpoints of about {in_bytes(each)}, {recipe.keep} kept: {in_bytes(needed)} at most; {in_bytes(free)} free"
    return text + (", TOO LITTLE: make room, or lower --keep" if free < needed else "")


def memory_estimate(recipe: RefineRecipe, config: MimRefinerConfig, processes: int, bf16: bool) -> dict[str, float]:
    """Bytes of one process in the refinement, by part: fp32 weights, gradients, AdamW and EMA; heads; queue; views; activations; logits."""
    assert recipe.global_size is not None and recipe.local_size is not None
    heads, width = len(head_blocks_of(recipe, config)), config.hidden_size
    per_head = head_parameters(recipe, width)
    batch = recipe.batch_size // processes
    micro = min(recipe.micro_batch_size or batch, batch)
    sizes = [(recipe.global_views, recipe.global_size), (recipe.local_views, recipe.local_size)]
    tokens = [views * ((size // config.patch_size) ** 2 + config.num_prefix_tokens) for views, size in sizes]
    image_tokens = max(tokens) if recipe.micro_batch_size else sum(tokens)
    # kept for the backward of a block, per token: norms, q, k, v, attention, projection (8 D), two MLP tensors
    per_token = width if recipe.gradient_checkpointing else 8 * width + 2 * config.intermediate_size
    bytes_each = 2 if bf16 else 4
    views = recipe.global_views + recipe.local_views
    pixels = batch * config.num_channels * sum(count * size**2 for count, size in sizes)
    return {
        "encoder, AdamW, EMA": 20.0 * encoder_parameters(config),
        "heads, AdamW": 16.0 * heads * per_head,
        "queue": 4.0 * heads * recipe.queue_size * (recipe.embedding_dim + 1),
        "views": 4.0 * pixels,
        "activations": float(micro * image_tokens * per_token * (config.num_hidden_layers - recipe.freeze_blocks) * bytes_each),
        "head activations": 4.0 * heads * batch * views * (4 * recipe.projector_dim + 2 * recipe.predictor_dim),
        "logits": 8.0 * heads * recipe.global_views * batch * views * recipe.batch_size,
    }


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
) -> str:
    """The plan as lines for a terminal. `recipe` is a resolved one."""
    assert recipe.pooling is not None
    last = config.num_hidden_layers - 1
    heads = ", ".join("output" if block == last else str(block) for block in head_blocks_of(recipe, config))
    if recipe.head_blocks == "auto":
        heads = f"what measuring all blocks proposes (auto; by default {heads})"
    rows, columns = config.grid
    memory = memory_estimate(recipe, config, processes, bf16)
    largest = max(memory, key=lambda part: memory[part])
    parameters = encoder_parameters(config) / 1e6
    frozen = (
        f"embeddings and blocks 0-{recipe.freeze_blocks - 1}"
        if recipe.freeze_blocks
        else "nothing (position tables are never trained)"
    )
    start = recipe.model or f"pre-trained first by {recipe.pretrain}"
    images = "a stream" if num_images is None else f"{num_images} images"
    micro = "" if recipe.micro_batch_size is None else f", {recipe.micro_batch_size} at a time through the encoder (exact)"
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
        ("batch", f"{recipe.batch_size} images over {processes} process(es) on {device}, {'bf16' if bf16 else 'fp32'}{micro}"),
        ("steps", f"{steps.warmup} of head warm-up (encoder frozen) + {steps.refine} of refinement; stage: {recipe.stage}"),
        (
            "memory",
            f"about {sum(memory.values()) / GIGA:.1f} GiB per process, most of it {largest} ({memory[largest] / GIGA:.1f})",
        ),
        ("disk", disk_text(recipe, config) if recipe.save_every else "no checkpoints"),
        ("result", f"{recipe.output_dir}/model, metrics.json, clusters.png, curves.png, log.jsonl"),
    ]
    if recipe.micro_batch_size is None and memory["activations"] > 0.5 * sum(memory.values()):
        lines.append(
            ("", "does it not fit? --micro_batch_size 32 gives the same gradients; --gradient_checkpointing helps further")
        )
    return "\n".join(["Plan", *(f"  {name:<7} {text}" for name, text in lines)])


__all__ = ["Steps", "checkpoint_bytes", "count_steps", "encoder_parameters", "memory_estimate", "plan_text"]
