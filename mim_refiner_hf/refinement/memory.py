"""The memory of a step: how much it needs, and the largest micro-batch with which it fits.

    parts = memory_estimate(recipe, config)          # bytes by part; their sum is the peak
    choice = choose_micro_batch(recipe, refiner, available=free)     # --micro_batch_size auto

Counted is what is alive at the peak of a step, in one process. In one pass that is the start of
the encoder's backward pass: all activations, and the heads'. In many micro-batches it is the
larger of two moments that never meet: heads, queue and loss on the whole batch, or one micro-batch
in the encoder with all gradients; in few, one of which waits with its graph
(`refiner.keeps_a_graph`), they do meet. What CUDA itself takes, 1-2 GiB, is left out; `HEADROOM`
covers it. Under FSDP2 (`runtime/sharding.py`) a process has its share of weights and moments, and
two units of them whole, the one at work and the next.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import (
    MimRefinerModel,
    can_leave_patches_out,
    prefix_tokens_only,
)
from ..runtime.distributed import all_gather
from ..runtime.optimisation import freeze
from ..runtime.sharding import fsdp2_requested
from ..runtime.wording import setting
from .adapters import adapted_layers
from .auto import Choice
from .refiner import Refiner, keeps_a_graph
from .resolve import ResolvedRecipe

GIGA = 2**30

# Share of the free memory that is planned with.
HEADROOM = 0.85

# Weights, their gradients and both moments of AdamW are fp32.
_FP32 = 4.0


class EncoderWeights(NamedTuple):
    """Numbers of weights of an encoder, its adapters among them.

    All; those that are trained; those that gradients pass through, of which bf16 keeps copies.
    """

    total: int
    trained: int
    passed: int


def encoder_parameters(
    config: MimRefinerConfig, freeze_blocks: int = 0, lora_rank: int = 0
) -> EncoderWeights:
    """How many weights the encoder has, without allocating it."""
    with torch.device("meta"):
        encoder = MimRefinerModel(config)
    freeze(encoder, freeze_blocks)
    parameters = list(encoder.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    passed = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    if not lora_rank:
        return EncoderWeights(total, passed, passed)
    layers = adapted_layers(encoder, freeze_blocks).values()
    adapters = lora_rank * sum(layer.in_features + layer.out_features for layer in layers)
    return EncoderWeights(total + adapters, adapters, passed + adapters)


def projector_parameters(recipe: ResolvedRecipe, config: MimRefinerConfig) -> int:
    """How many weights the projectors of all heads have."""
    hidden = recipe.projector_dim
    of_a_head = hidden * (config.hidden_size + hidden + recipe.embedding_dim)
    return recipe.num_heads * of_a_head


def head_parameters(recipe: ResolvedRecipe, config: MimRefinerConfig) -> int:
    """How many weights all heads have: projectors and predictors."""
    predictor = 2 * recipe.embedding_dim * recipe.predictor_dim
    return projector_parameters(recipe, config) + recipe.num_heads * predictor


class _Group(NamedTuple):
    """Views of one size, per image: how many, their side, their tokens together."""

    views: int
    size: int
    tokens: int


def _view_groups(recipe: ResolvedRecipe, config: MimRefinerConfig) -> list[_Group]:
    """Global views and local views."""
    groups = []
    for views, size in (
        (recipe.global_views, recipe.global_size),
        (recipe.local_views, recipe.local_size),
    ):
        tokens = (size // config.patch_size) ** 2 + config.num_prefix_tokens
        groups.append(_Group(views, size, views * tokens))
    return groups


def _activations(
    recipe: ResolvedRecipe, config: MimRefinerConfig, kept: int, largest: int
) -> float:
    """Bytes that the encoder's graph keeps for `kept` tokens; `largest` are recomputed at once.

    Per token a block keeps its two residual sums, the norms' outputs (in bf16 one copy for each
    of q, k and v), q, k, v, what attention gives, and both sides of the MLP's activation. In the
    last block nothing of this, where patches are left out.
    """
    width = config.hidden_size
    inner = config.intermediate_size
    if recipe.bf16:
        block = 24 * width + 4 * inner
        # gradients in flight where the backward pass begins
        turning = 2 * inner + 8 * width
    else:
        block = 32 * width + 8 * inner
        turning = 4 * inner + 8 * width

    blocks = config.num_hidden_layers - recipe.freeze_blocks
    if recipe.gradient_checkpointing:
        return _FP32 * width * kept * blocks + float((block + turning) * largest)
    if can_leave_patches_out(config):
        blocks -= 1
    return float(kept * (block * blocks + turning))


def _at_the_heads(recipe: ResolvedRecipe, config: MimRefinerConfig) -> dict[str, float]:
    """Bytes alive while heads, queue and loss see the whole batch."""
    heads = recipe.num_heads
    embedding = recipe.embedding_dim
    of_a_number = 2 if recipe.bf16 else 4
    targets = recipe.global_views * recipe.process_batch
    rows = heads * recipe.process_batch * recipe.num_views

    layers = 6 * recipe.projector_dim + 3 * recipe.predictor_dim + 4 * embedding
    activations = of_a_number * rows * layers
    # similarities to the queue; in bf16 beside a copy of its rows
    copied = embedding if recipe.bf16 else 0
    similarities = of_a_number * heads * recipe.queue_size * (targets + copied)
    if recipe.bf16:
        activations += 2 * (head_parameters(recipe, config) + rows * config.hidden_size)

    # the queue has been searched when the logits come
    logits = 8 * heads * targets * recipe.num_views * recipe.batch_size
    return {
        "head activations": float(activations),
        "similarities and logits": float(max(similarities, logits)),
    }


def _throughout(
    recipe: ResolvedRecipe, config: MimRefinerConfig, weights: EncoderWeights
) -> dict[str, float]:
    """Bytes that are alive from the beginning of a step to its end."""
    of_heads = head_parameters(recipe, config)
    shards = recipe.processes if fsdp2_requested() else 1
    features = len(recipe.head_blocks) * config.hidden_size
    features *= recipe.process_batch * recipe.num_views
    parts = {
        "encoder and EMA": 2 * _FP32 * weights.total / shards,
        # and their gradients
        "heads": 2 * _FP32 * of_heads / shards,
        "AdamW": 2 * _FP32 * (weights.trained + of_heads) / shards,
        "queue": _FP32 * recipe.num_heads * recipe.queue_size * (recipe.embedding_dim + 1),
        "views": _FP32 * recipe.process_batch * _pixels(recipe, config),
        # and their gradients
        "features": 2 * _FP32 * features,
    }
    if recipe.target_momentum is not None:
        parts["target projectors"] = _FP32 * projector_parameters(recipe, config) / shards
    if shards > 1:
        block = weights.total / config.num_hidden_layers
        layer = recipe.num_heads * recipe.projector_dim**2
        parts["gathered weights"] = 2 * _FP32 * max(block, layer)
    return parts


def _pixels(recipe: ResolvedRecipe, config: MimRefinerConfig) -> int:
    """Values of all views of an image."""
    groups = _view_groups(recipe, config)
    return config.num_channels * sum(group.views * group.size**2 for group in groups)


def memory_estimate(recipe: ResolvedRecipe, config: MimRefinerConfig) -> dict[str, float]:
    """Bytes of one process at the peak of a refinement step, by part."""
    weights = encoder_parameters(config, recipe.freeze_blocks, recipe.lora_rank)
    parts = _throughout(recipe, config, weights)
    at_the_heads = _at_the_heads(recipe, config)
    groups = _view_groups(recipe, config)
    largest = max(group.tokens for group in groups)
    batch = recipe.process_batch
    micro = recipe.micro_batch_size

    # the whole batch in one pass: gradients of the encoder come as its activations go
    if micro is None:
        tokens = batch * sum(group.tokens for group in groups)
        activations = _activations(recipe, config, tokens, batch * largest)
        activations += (2 if recipe.bf16 else 4) * batch * _pixels(recipe, config)
        shards = recipe.processes if fsdp2_requested() else 1
        gradients = max(0.0, _FP32 * weights.trained / shards - activations)
        if recipe.bf16:
            # a copy of the weights for the views of each size
            sizes = sum(1 for group in groups if group.views)
            activations += 2.0 * weights.passed * sizes
        return {**parts, **at_the_heads, "activations": activations, "gradients": gradients}

    tokens = min(micro, batch) * largest
    activations = _activations(recipe, config, tokens, tokens)
    if recipe.bf16:
        activations += 2.0 * weights.passed

    # one graph waits: gradients of the encoder come when heads and loss have gone
    if keeps_a_graph(batch, micro):
        gradients = max(0.0, _FP32 * weights.trained - sum(at_the_heads.values()))
        return {**parts, **at_the_heads, "activations": activations, "gradients": gradients}

    # two moments that never meet; sharded gradients are whole until the last pass is through
    passing = {"activations": activations, "gradients": _FP32 * weights.trained}
    larger = max(at_the_heads, passing, key=lambda moment: sum(moment.values()))
    return {**parts, **larger}


def bytes_needed(recipe: ResolvedRecipe, config: MimRefinerConfig) -> float:
    """Bytes of one process at the peak: the sum of `memory_estimate`."""
    return sum(memory_estimate(recipe, config).values())


def largest_that_fits(fits: Callable[[int], bool], batch: int) -> int:
    """The largest of 1, 2, 4, ..., batch that `fits`, asked in this order; 0 if not even 1 does."""
    size = 0
    while size < batch:
        larger = min(max(1, 2 * size), batch)
        if not fits(larger):
            break
        size = larger
    return size


def fitting_micro_batch(
    recipe: ResolvedRecipe, config: MimRefinerConfig, available: float
) -> int | None:
    """By the estimate: None where the whole batch fits at once, else the largest micro-batch.

    0 where not even one image fits.
    """

    def fits(micro: int | None) -> bool:
        changed = dataclasses.replace(recipe, micro_batch_size=micro)
        return bytes_needed(changed, config) <= HEADROOM * available

    if fits(None):
        return None
    return largest_that_fits(fits, recipe.process_batch)


def _passes_on_trial(refiner: Refiner, recipe: ResolvedRecipe, images: int, reserve: int) -> bool:
    """Whether so many images go through the encoder and back beside `reserve` taken bytes."""
    config = refiner.encoder.config
    device = refiner.encoder.device
    group = max(_view_groups(recipe, config), key=lambda group: group.tokens)
    shape = (images * group.views, config.num_channels, group.size, group.size)

    taken = pixels = None
    try:
        taken = torch.empty(reserve, dtype=torch.uint8, device=device)
        pixels = torch.zeros(shape, device=device)
        with prefix_tokens_only(refiner.encoder):
            refiner.encode(pixels).sum().backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        del taken, pixels
        refiner.zero_grad()
        torch.cuda.empty_cache()


def _largest_on_trial(recipe: ResolvedRecipe, refiner: Refiner, available: int) -> int:
    """The largest micro-batch that a GPU takes beside what the rest of a step needs."""
    config = refiner.encoder.config
    parts = memory_estimate(dataclasses.replace(recipe, micro_batch_size=1), config)
    beside = ("AdamW", "views", "features", "heads")
    reserve = sum(parts[name] for name in beside) + (1 - HEADROOM) * available
    at_the_heads = sum(_at_the_heads(recipe, config).values())

    def fits(images: int) -> bool:
        taken = int(reserve)
        # a graph that waits for heads and loss has them beside it
        if keeps_a_graph(recipe.process_batch, images):
            taken += int(at_the_heads)
        return _passes_on_trial(refiner, recipe, images, taken)

    return largest_that_fits(fits, recipe.process_batch)


def choose_micro_batch(
    recipe: ResolvedRecipe, refiner: Refiner, available: int
) -> Choice[int | None]:
    """For --micro_batch_size auto: images per pass, the same on every process, and why.

    Where the estimate says that the whole batch fits at once, it passes at once. Otherwise a GPU
    is asked by trying: 1, 2, 4, ... images forward and backward, beside a reserve for the
    optimiser, gradients and views, and for heads and loss where a graph waits for them. On the
    CPU, and under FSDP2, where one process cannot try without the others, the estimate decides.

    Args:
        refiner: on its device, in training mode; left without gradients.
        available: free bytes of this process.

    Raises:
        ValueError: if not even one image at a time fits.
    """
    config = refiner.encoder.config
    device = refiner.encoder.device
    size = fitting_micro_batch(recipe, config, available)
    if size is not None and device.type == "cuda" and not fsdp2_requested():
        size = _largest_on_trial(recipe, refiner, available)

    # the process with the least memory decides; more than the batch stands for "at once"
    at_once = recipe.process_batch + 1
    own = torch.tensor([at_once if size is None else size], device=device)
    smallest = int(all_gather(own).min())
    free = f"{available / GIGA:.1f} GiB that are free"
    if smallest == 0:
        ways = [setting("gradient_checkpointing", True)]
        if recipe.trainable == "all":
            ways.append(setting("trainable", "lora:8"))
        raise ValueError(
            f"{setting('micro_batch_size', 'auto')}: not even one image at a time fits into "
            f"the {free}; use {' or '.join(ways)}, or lower "
            f"{setting('batch_size')}, {setting('queue_size')} or {setting('num_heads')}"
        )

    chosen = None if smallest == at_once else smallest
    need = bytes_needed(dataclasses.replace(recipe, micro_batch_size=chosen), config)
    what = "The whole batch at once" if chosen is None else f"{chosen} images at a time"
    reason = f"{what}: about {need / GIGA:.2f} GiB of {available / GIGA:.2f} that are free"
    return Choice(chosen, reason)
