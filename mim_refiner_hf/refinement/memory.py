"""The memory of a step: how much it needs, and the largest micro-batch with which it fits.

    parts = memory_estimate(recipe, config, processes=1, bf16=True)       # bytes by part; their sum is the peak of one process
    size, reason = choose_micro_batch(recipe, refiner, processes=1, available=free)           # --micro_batch_size auto

Counted is what is alive at the peak of a step. In one pass that is the start of the encoder's backward pass: all activations, and
the heads'. In many micro-batches it is the larger of two moments that never meet: heads, queue and loss on the whole batch, or one
micro-batch in the encoder with all gradients; in few, one of which waits with its graph (`refiner.keeps_a_graph`), they do meet.
What CUDA itself takes, 1-2 GiB, is left out; `HEADROOM` covers it. Under FSDP2 (`sharding.py`) a process has its share of weights
and moments, and two units of them whole, the one at work and the next.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.last_block import can_leave_patches_out, prefix_tokens_only
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import all_gather
from ..runtime.optimisation import freeze
from ..runtime.sharding import fsdp2_requested
from .recipe import RefineRecipe
from .refiner import Refiner, keeps_a_graph
from .resolve import default_head_blocks

GIGA = 2**30
HEADROOM = 0.85
"""Share of the free memory that is planned with."""


def head_blocks_of(recipe: RefineRecipe, config: MimRefinerConfig) -> list[int]:
    """The blocks with heads of a resolved recipe; for "auto", which measures before it chooses, the default ones."""
    return (
        recipe.head_blocks
        if isinstance(recipe.head_blocks, list)
        else default_head_blocks(config.num_hidden_layers)
    )


def encoder_parameters(config: MimRefinerConfig, freeze_blocks: int = 0) -> tuple[int, int]:
    """Number of weights of the encoder, and of those that are trained, without allocating it."""
    with torch.device("meta"):
        encoder = MimRefinerModel(config)
    freeze(encoder, freeze_blocks)
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in encoder.parameters()]
    return sum(count for count, _ in counts), sum(count for count, trained in counts if trained)


def head_parameters(recipe: RefineRecipe, config: MimRefinerConfig) -> int:
    """Number of weights of all heads: projectors and predictors."""
    projector, predictor, embedding = (
        recipe.projector_dim,
        recipe.predictor_dim,
        recipe.embedding_dim,
    )
    return len(head_blocks_of(recipe, config)) * (
        projector * (config.hidden_size + projector + embedding) + 2 * embedding * predictor
    )


class _Group(NamedTuple):
    """Views of one size, per image: how many, their side, their tokens together."""

    views: int
    size: int
    tokens: int


def _groups(recipe: RefineRecipe, config: MimRefinerConfig) -> list[_Group]:
    assert recipe.global_size is not None and recipe.local_size is not None
    sizes = [(recipe.global_views, recipe.global_size), (recipe.local_views, recipe.local_size)]
    return [
        _Group(n, size, n * ((size // config.patch_size) ** 2 + config.num_prefix_tokens))
        for n, size in sizes
    ]


def _activations(
    recipe: RefineRecipe, config: MimRefinerConfig, bf16: bool, kept: int, largest: int
) -> float:
    """Bytes that the encoder's graph keeps for `kept` tokens; `largest` of them are recomputed at once.

    Per token a block keeps its two residual sums, the norms' outputs (in bf16 one copy for each of q, k and v), q, k, v, what
    attention gives, and both sides of the MLP's activation. In the last block nothing of this, where patches are left out.
    """
    width, inner = config.hidden_size, config.intermediate_size
    block = 24 * width + 4 * inner if bf16 else 32 * width + 8 * inner
    turning = (
        2 if bf16 else 4
    ) * inner + 8 * width  # gradients in flight where the backward pass begins
    blocks = config.num_hidden_layers - recipe.freeze_blocks
    if recipe.gradient_checkpointing:
        return 4.0 * width * kept * blocks + float((block + turning) * largest)
    return float(kept * (block * (blocks - can_leave_patches_out(config)) + turning))


def _of_heads(
    recipe: RefineRecipe, config: MimRefinerConfig, processes: int, bf16: bool
) -> dict[str, float]:
    """Bytes alive while heads, queue and loss see the whole batch."""
    heads, batch, each = (
        len(head_blocks_of(recipe, config)),
        recipe.batch_size // processes,
        2 if bf16 else 4,
    )
    views = recipe.global_views + recipe.local_views
    rows, embedding = heads * batch * views, recipe.embedding_dim
    activations = (
        each * rows * (6 * recipe.projector_dim + 3 * recipe.predictor_dim + 4 * embedding)
    )
    casts = 2 * (head_parameters(recipe, config) + rows * config.hidden_size) if bf16 else 0
    similarities = (
        each
        * heads
        * recipe.queue_size
        * (recipe.global_views * batch + (embedding if bf16 else 0))
    )
    logits = 8 * heads * recipe.global_views * batch * views * recipe.batch_size
    return {
        "head activations": float(activations + casts),
        "similarities and logits": float(max(similarities, logits)),
    }


def memory_estimate(
    recipe: RefineRecipe, config: MimRefinerConfig, processes: int, bf16: bool
) -> dict[str, float]:
    """Bytes of one process at the peak of a refinement step, by part. `recipe` is a resolved one, its micro-batch a number or None.

    In micro-batches a sharded encoder's gradients are whole until the last one is through.
    """
    micro = recipe.micro_batch_size
    assert micro != "auto"
    heads, batch, each = (
        len(head_blocks_of(recipe, config)),
        recipe.batch_size // processes,
        2 if bf16 else 4,
    )
    groups = _groups(recipe, config)
    views, pixels = (
        sum(g.views for g in groups),
        config.num_channels * sum(g.views * g.size**2 for g in groups),
    )
    weights, trained = encoder_parameters(config, recipe.freeze_blocks)
    of_heads, at_work = head_parameters(recipe, config), _of_heads(recipe, config, processes, bf16)
    shards = processes if fsdp2_requested() else 1
    parts = {
        "encoder and EMA": 8.0 * weights / shards,
        "heads": 8.0 * of_heads / shards,  # and their gradients
        "AdamW": 8.0 * (trained + of_heads) / shards,
        "queue": 4.0 * heads * recipe.queue_size * (recipe.embedding_dim + 1),
        "views": 4.0 * batch * pixels,
        "features": 8.0 * heads * batch * views * config.hidden_size,  # and their gradients
    }
    if shards > 1:
        parts["gathered weights"] = 8.0 * max(
            weights / config.num_hidden_layers, heads * recipe.projector_dim**2
        )
    largest = max(g.tokens for g in groups)
    if micro is None:
        tokens = batch * sum(g.tokens for g in groups)
        activations = (
            _activations(recipe, config, bf16, tokens, batch * largest) + each * batch * pixels
        )
        casts = 2.0 * trained * len([g for g in groups if g.views]) if bf16 else 0.0
        # gradients of the encoder come as its activations go
        return (
            parts
            | at_work
            | {
                "activations": activations + casts,
                "gradients": max(0.0, 4.0 * trained / shards - activations),
            }
        )
    tokens = min(micro, batch) * largest
    passing = {
        "activations": _activations(recipe, config, bf16, tokens, tokens)
        + (2.0 * trained if bf16 else 0.0)
    }
    if keeps_a_graph(batch, micro):  # gradients of the encoder come when heads and loss have gone
        return (
            parts
            | at_work
            | passing
            | {"gradients": max(0.0, 4.0 * trained - sum(at_work.values()))}
        )
    passing["gradients"] = 4.0 * trained
    return parts | max(at_work, passing, key=lambda moment: sum(moment.values()))


def needed(recipe: RefineRecipe, config: MimRefinerConfig, processes: int, bf16: bool) -> float:
    """Bytes of one process at the peak: the sum of `memory_estimate`."""
    return sum(memory_estimate(recipe, config, processes, bf16).values())


def largest_that_fits(fits: Callable[[int], bool], batch: int) -> int:
    """The largest of 1, 2, 4, ..., batch for which `fits` says yes, asked in this order; 0 if not even 1 does."""
    size = 0
    while size < batch:
        larger = min(max(1, 2 * size), batch)
        if not fits(larger):
            break
        size = larger
    return size


def fitting_micro_batch(
    recipe: RefineRecipe, config: MimRefinerConfig, processes: int, bf16: bool, available: float
) -> int | None:
    """By the estimate: None where the whole batch fits at once, else the largest micro-batch that does, 0 if none does."""

    def fits(micro: int | None) -> bool:
        changed = dataclasses.replace(recipe, micro_batch_size=micro)
        return needed(changed, config, processes, bf16) <= HEADROOM * available

    return None if fits(None) else largest_that_fits(fits, recipe.batch_size // processes)


def _passes(refiner: Refiner, recipe: RefineRecipe, images: int, reserve: int) -> bool:
    """Whether that many images go through the encoder and back while `reserve` bytes are taken by what comes later."""
    views, size, _ = max(_groups(recipe, refiner.encoder.config), key=lambda group: group.tokens)
    device, channels = refiner.encoder.device, refiner.encoder.config.num_channels
    taken = pixels = None
    try:
        taken = torch.empty(reserve, dtype=torch.uint8, device=device)
        pixels = torch.zeros(images * views, channels, size, size, device=device)
        with prefix_tokens_only(refiner.encoder):
            refiner.encode(pixels).sum().backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        del taken, pixels
        refiner.zero_grad()
        torch.cuda.empty_cache()


def choose_micro_batch(
    recipe: RefineRecipe, refiner: Refiner, processes: int, available: int
) -> tuple[int | None, str]:
    """For --micro_batch_size auto: images per pass, the same on every process, and why.

    Where the estimate says that the whole batch fits at once, it passes at once. Otherwise a GPU is asked by trying: 1, 2, 4, ...
    images forward and backward, beside a reserve for the optimiser, gradients and views, and for heads and loss where a graph waits
    for them; on the CPU, and under FSDP2, where one process cannot try without the others, the estimate decides.

    Args:
        recipe: a resolved one with micro_batch_size "auto".
        refiner: on its device, in training mode; left without gradients.
        available: free bytes of this process.

    Raises:
        ValueError: if not even one image at a time fits.
    """
    config, batch = refiner.encoder.config, recipe.batch_size // processes
    size = fitting_micro_batch(recipe, config, processes, refiner.bf16, available)
    if size is not None and refiner.encoder.device.type == "cuda" and not fsdp2_requested():
        parts = memory_estimate(
            dataclasses.replace(recipe, micro_batch_size=1), config, processes, refiner.bf16
        )
        reserve = int(
            parts["AdamW"]
            + parts["views"]
            + parts["features"]
            + parts["heads"]
            + (1 - HEADROOM) * available
        )
        at_work = int(sum(_of_heads(recipe, config, processes, refiner.bf16).values()))

        def fits(images: int) -> bool:
            return _passes(
                refiner, recipe, images, reserve + at_work * keeps_a_graph(batch, images)
            )

        size = largest_that_fits(fits, batch)
    everyone = all_gather(
        torch.tensor([batch + 1 if size is None else size], device=refiner.encoder.device)
    )
    smallest = int(everyone.min())
    if smallest == 0:
        raise ValueError(
            f"--micro_batch_size auto: not even one image at a time fits into the {available / GIGA:.1f} GiB that are free; use "
            "--gradient_checkpointing true, or lower --batch_size, --queue_size or --num_heads"
        )
    chosen = None if smallest > batch else smallest
    with_it = needed(
        dataclasses.replace(recipe, micro_batch_size=chosen), config, processes, refiner.bf16
    )
    what = "The whole batch at once" if chosen is None else f"{chosen} images at a time"
    return chosen, f"{what}: about {with_it / GIGA:.2f} GiB of {available / GIGA:.2f} that are free"


__all__ = [
    "HEADROOM",
    "choose_micro_batch",
    "encoder_parameters",
    "fitting_micro_batch",
    "head_blocks_of",
    "largest_that_fits",
    "memory_estimate",
    "needed",
]
