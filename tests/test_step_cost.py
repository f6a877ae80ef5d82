"""What a step costs: launched operations, no waiting, memory that does not grow with the batch, and
the plan's estimate of it.
"""

import copy
import dataclasses
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from step_counters import Launches, NoWaiting, PeakMemory
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.initialization import no_init_weights

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel, RefineRecipe
from mim_refiner_hf.model.modeling_mim_refiner import prefix_tokens_only
from mim_refiner_hf.refinement import memory
from mim_refiner_hf.refinement.heads import IdHeads
from mim_refiner_hf.refinement.memory import (
    bytes_needed,
    choose_micro_batch,
    largest_that_fits,
    memory_estimate,
)
from mim_refiner_hf.refinement.queue import NearestNeighbourQueue
from mim_refiner_hf.refinement.refiner import NnaSettings, Refiner, keeps_a_graph, neighbour_draw
from mim_refiner_hf.refinement.resolve import ResolvedRecipe, resolve
from mim_refiner_hf.runs.plan import plan_text
from mim_refiner_hf.runtime.optimisation import encoder_groups, freeze, head_groups

SHAPE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
POST = {"norm_placement": "post", "embedding_norm": True, "final_norm": False}
CAPI_LIKE = {
    "position_encoding": "rope",
    "num_register_tokens": 4,
    "use_cls_token": False,
    "norm_type": "rmsnorm",
}


def small_refiner(heads: int = 4, views: int = 5, bf16: bool = False, **changes: Any) -> Refiner:
    torch.manual_seed(0)
    encoder = MimRefinerModel(MimRefinerConfig(**{**SHAPE, "intermediate_size": 96, **changes}))
    # as in the goldens: fresh weights would give all images nearly the same features
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    freeze(encoder, 0)
    blocks = list(range(4 - min(heads, 4), 4)) if heads <= 4 else [3] * heads
    stack, queue = IdHeads(heads, 48, 24, 32, 16), NearestNeighbourQueue(heads, 64, 16)
    settings = NnaSettings(2, views, temperature=0.2)
    return Refiner(encoder, blocks, stack, queue, settings, bf16=bf16).train()


def views_of(batch: int, local: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, n, 3, size, size, generator=generator)
        for n, size in ((2, 32), (local, 16))
    ]


def gradients(refiner: Refiner, batch: int = 6, **settings: Any) -> Tensor:
    """All gradients of one step as one vector."""
    index = torch.arange(batch)
    draw = neighbour_draw(0, 0, 5, len(refiner.head_blocks), 2, batch)
    views = [view.to(refiner.encoder.dtype) for view in views_of(batch)]
    refiner.backward(views, index, index % 3, topk=5, draw=draw, **settings)
    return torch.cat([p.grad.flatten() for p in refiner.parameters() if p.grad is not None])


# ---- exact micro-batches


@pytest.mark.parametrize(
    "changes", [{}, POST, CAPI_LIKE, {"pooling": "mean"}], ids=["mae", "d2v2", "registers", "mean"]
)
# 4 does not divide the 6 images
@pytest.mark.parametrize("micro", [1, 2, 4, 6])
def test_micro_batches_give_the_gradient_of_the_whole_batch(
    micro: int, changes: dict[str, Any]
) -> None:
    # fp32: its rounding, seen 2e-7 to 1e-6
    for dtype, tolerance in (
        (torch.float32, 2e-6),
        (torch.float64, 1e-12),
    ):
        whole = gradients(small_refiner(**changes).to(dtype))
        split = gradients(small_refiner(**changes).to(dtype), micro_batch_size=micro)
        assert (whole - split).norm() <= tolerance * whole.norm()


def test_micro_batches_with_recomputed_blocks_and_in_bf16() -> None:
    whole = gradients(small_refiner())
    recomputed = small_refiner()
    recomputed.encoder.activation_checkpointing_enable()
    assert (whole - gradients(recomputed, micro_batch_size=2)).norm() <= 1e-6 * whole.norm()
    rounded, split = (
        gradients(small_refiner(bf16=True)),
        gradients(small_refiner(bf16=True), micro_batch_size=2),
    )
    # bf16 rounding: weights' gradients are summed in fp32
    assert (rounded - split).norm() <= 0.01 * rounded.norm()
    assert (rounded - whole).norm() > 1e-3 * whole.norm()  # it was bf16


def test_activation_memory_does_not_grow_with_the_batch() -> None:
    """Bytes that autograd keeps at once for the encoder, over the whole step.

    One micro-batch's, whether its graph waits or not.
    """

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def kept(batch: int, micro: int | None) -> int:
        refiner, most = small_refiner(), 0
        holders: Counter[tuple[int, int]] = Counter()  # of each (address, bytes)

        def count(tensor: Tensor) -> Saved:
            nonlocal most
            saved, storage = Saved(tensor), tensor.untyped_storage()
            key = (storage.data_ptr(), storage.nbytes())
            holders[key] += 1
            weakref.finalize(saved, holders.subtract, [key])
            most = max(most, sum(size for (_, size), number in holders.items() if number))
            return saved

        def encode(pixels: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved.tensor):
                return Refiner.encode(refiner, pixels)

        refiner.encode = encode  # type: ignore[method-assign]
        gradients(refiner, batch, micro_batch_size=micro)
        assert not any(holders.values())  # all of it has gone
        return most

    # what does not depend on the number of images
    weights = kept(2, 2) - (kept(4, 4) - kept(2, 2))
    assert keeps_a_graph(8, 2) and not keeps_a_graph(12, 2)
    assert kept(12, 2) == kept(8, 2) == kept(2, 2) < kept(4, 4)
    assert kept(8, None) - weights > 3.5 * (kept(2, 2) - weights)


# ---- operations


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads", [4, 8, 12])
def test_a_step_launches_few_operations(heads: int, bf16: bool) -> None:
    """Heads, queue, loss and what is told for the log, forward and backward, at 12 views.

    The number of heads is no factor.
    """
    refiner = small_refiner(heads=heads, views=12, bf16=bf16)
    features = torch.randn(heads, 12 * 6, 48, requires_grad=True)
    index, draw = torch.arange(6), neighbour_draw(0, 0, 5, heads, 2, 6)
    with Launches() as launches:
        refiner.align(features, index, index, topk=5, draw=draw).loss.backward()
    assert 60 < launches.total <= 150, launches.names
    assert launches.names["native_batch_norm"] == 5  # one per layer, for all heads
    assert launches.names["bmm"] <= 5 * 3 + 6


@pytest.mark.parametrize("micro", [None, 2])
def test_no_step_waits_for_the_device(micro: int | None) -> None:
    refiner = small_refiner()
    with NoWaiting():
        gradients(refiner, micro_batch_size=micro)
        gradients(refiner, train_encoder=False)
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        torch.ones(2).sum().item()


# ---- the last block for the tokens that are read


@pytest.mark.parametrize(
    "changes", [{}, POST, CAPI_LIKE, {"pooling": "mean"}, {"position_encoding": "relative"}]
)
@pytest.mark.parametrize("recompute", [False, True])
def test_last_block_for_the_tokens_that_are_read(changes: dict[str, Any], recompute: bool) -> None:
    encoder = small_refiner(**changes).encoder
    if recompute:
        encoder.activation_checkpointing_enable()
    pixels, found = views_of(3)[0][:, 0], []
    for shortened in (False, True):
        encoder.zero_grad()
        with FlopCounterMode(display=False) as flops:
            if shortened:
                with prefix_tokens_only(encoder):
                    outputs = encoder(pixels)
                    features = encoder.pool(outputs.last_hidden_state)
                    features.square().sum().backward()
            else:
                outputs = encoder(pixels)
                features = encoder.pool(outputs.last_hidden_state)
                features.square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
        found.append(
            (
                features.detach(),
                gradient,
                flops.get_total_flops(),
                outputs.last_hidden_state.shape[1],
            )
        )
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-6, rtol=1e-6)
    assert (found[1][1] - found[0][1]).norm() <= 1e-6 * found[0][1].norm()
    config = encoder.config
    if config.pooling == "mean" or config.relative_positions != "none":
        # the patches are needed, nothing is left out
        assert found[1][2:] == found[0][2:]
    else:
        assert found[1][3] == config.num_prefix_tokens
        assert found[1][2] < 0.90 * found[0][2]
    assert not encoder.layers[-1]._forward_pre_hooks


# ---- the plan's estimate

TINY = {
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 768,
}
BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
CASES: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    (TINY, {}, False),
    (TINY, {"pooling": "mean"}, False),
    (TINY, {"micro_batch_size": 8, "gradient_checkpointing": True}, True),
    (TINY, {"freeze_blocks": 1, "num_heads": 2}, True),
    (TINY, {"micro_batch_size": 3}, False),  # no graph waits
    # nor here, and the heads' moment is the larger
    (
        TINY,
        {"batch_size": 80, "micro_batch_size": 16, "queue_size": 65536},
        True,
    ),
    (BASE, {"gradient_checkpointing": True}, False),
    (BASE, {"micro_batch_size": 8}, True),
]


def planned(
    shape: dict[str, Any], changes: dict[str, Any], bf16: bool
) -> tuple[ResolvedRecipe, MimRefinerConfig]:
    config = MimRefinerConfig(**shape)
    fields = {
        "model": "a",
        "batch_size": 16,
        "queue_size": 8192,
        "local_views": 4,
        "projector_dim": 512,
        "predictor_dim": 1024,
    }
    recipe = RefineRecipe(**{**fields, **changes})
    resolved = resolve(recipe, config, 1000, bf16=bf16)
    # the whole batch at once, where nothing else is named
    if "micro_batch_size" not in changes:
        resolved = dataclasses.replace(resolved, to_measure=frozenset())
    return resolved, config


def measured_peak(recipe: ResolvedRecipe, config: MimRefinerConfig) -> int:
    """Bytes of all tensors alive at the peak of a second step, weights, moments and views included;
    fake, so nothing is computed.
    """
    batch, blocks, widths = (
        recipe.batch_size,
        recipe.head_blocks,
        (recipe.projector_dim, recipe.predictor_dim),
    )
    with FakeTensorMode(), PeakMemory() as tracked:
        with no_init_weights():
            encoder = MimRefinerModel(config).train()
        freeze(encoder, recipe.freeze_blocks)
        if recipe.gradient_checkpointing:
            encoder.activation_checkpointing_enable()
        average = copy.deepcopy(encoder)
        heads = IdHeads(len(blocks), config.hidden_size, *widths, recipe.embedding_dim)
        queue = NearestNeighbourQueue(len(blocks), recipe.queue_size, recipe.embedding_dim)
        sizes = [(recipe.global_views, recipe.global_size), (recipe.local_views, recipe.local_size)]
        count = sum(number for number, _ in sizes)
        refiner = Refiner(
            encoder,
            blocks,
            heads,
            queue,
            NnaSettings(2, count, temperature=0.2),
            bf16=recipe.bf16,
        ).train()
        optimizer = torch.optim.AdamW(
            encoder_groups(encoder, 0.65, 0.05) + head_groups(heads, 0.0), fused=True
        )
        for parameter in refiner.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()
        views = [torch.empty(batch, number, 3, size, size) for number, size in sizes]
        index, draw = torch.arange(batch), torch.zeros(len(blocks), 2, batch, dtype=torch.long)
        tracked.peak = tracked.live
        refiner.backward(
            views, index, index, topk=5, draw=draw, micro_batch_size=recipe.micro_batch_size
        )
        del average
        return tracked.peak


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(("shape", "changes", "bf16"), CASES)
def test_estimate_of_the_plan(shape: dict[str, Any], changes: dict[str, Any], bf16: bool) -> None:
    recipe, config = planned(shape, changes, bf16)
    measured = measured_peak(recipe, config)
    parts = memory_estimate(recipe, config)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.15), parts


def test_plan_says_what_to_change_when_it_does_not_fit() -> None:
    recipe, config = planned(BASE, {"batch_size": 64}, bf16=True)

    def text(available: float, **changes: Any) -> str:
        changed, _ = planned(BASE, {"batch_size": 64, **changes}, bf16=True)
        return plan_text(changed, config, num_eval=0, device="cuda", available=int(available))

    whole = bytes_needed(recipe, config)
    assert "does not fit" not in text(2 * whole) and "does not fit" in text(whole)
    said = text(whole)
    size = int(said.split("micro_batch_size=")[1].split()[0])
    assert (
        size in (32, 64) and "the same gradients" in said and "--gradient_checkpointing" not in said
    )
    assert bytes_needed(dataclasses.replace(recipe, micro_batch_size=size), config) <= 0.85 * whole
    least = bytes_needed(dataclasses.replace(recipe, micro_batch_size=1), config)
    assert "lower batch_size, queue_size or num_heads" in text(0.9 * least)
    assert "as many at a time through the encoder as fit" in text(whole, micro_batch_size="auto")
    assert "does not fit" not in text(whole, micro_batch_size="auto")


# ---- micro_batch_size auto


@pytest.mark.parametrize(
    ("most", "expected"), [(0, 0), (1, 1), (5, 4), (8, 8), (11, 8), (12, 12), (99, 12)]
)
def test_largest_that_fits_is_found_by_doubling(most: int, expected: int) -> None:
    asked: list[int] = []
    assert largest_that_fits(lambda size: asked.append(size) or size <= most, 12) == expected  # type: ignore[func-returns-value]
    assert asked == [1, 2, 4, 8, 12][: len(asked)]


def auto_recipe() -> tuple[ResolvedRecipe, Refiner]:
    refiner = small_refiner()
    fields = {
        "projector_dim": 24,
        "predictor_dim": 32,
        "embedding_dim": 16,
        "queue_size": 64,
        "local_views": 3,
        "local_size": 16,
    }
    recipe = RefineRecipe(
        model="a",
        batch_size=12,
        topk=5,
        head_blocks=[0, 1, 2, 3],
        micro_batch_size="auto",
        **fields,
    )  # type: ignore[arg-type]
    return resolve(recipe, refiner.encoder.config, 100), refiner


def test_auto_takes_what_the_estimate_allows() -> None:
    recipe, refiner = auto_recipe()

    def need(micro: int | None) -> float:
        changed = dataclasses.replace(recipe, micro_batch_size=micro)
        return bytes_needed(changed, refiner.encoder.config) / memory.HEADROOM

    for micro, free in ((None, need(None)), (4, need(4)), (4, 0.99 * need(8)), (1, need(1))):
        choice = choose_micro_batch(recipe, refiner, int(free) + 1)
        assert choice.value == micro
        assert ("whole batch" in choice.reason) == (micro is None) and "GiB" in choice.reason
    with pytest.raises(
        ValueError, match=r"^micro_batch_size='auto': not even one .* gradient_checkpointing=True"
    ):
        choose_micro_batch(recipe, refiner, int(0.9 * need(1)))


def test_trying_catches_what_runs_out_of_memory() -> None:
    """The way of a GPU, with an encoder that takes at most 10 global views = 5 images at a time."""
    recipe, refiner = auto_recipe()
    encode, seen = refiner.encode, []

    def limited(pixels: Tensor) -> Tensor:
        seen.append(pixels.shape)
        if len(pixels) > 10:
            raise torch.OutOfMemoryError
        return encode(pixels)

    refiner.encode = limited  # type: ignore[method-assign]
    tried = largest_that_fits(
        lambda images: memory._passes_on_trial(refiner, recipe, images, reserve=10), 12
    )
    assert tried == 4 and seen == [(2 * images, 3, 32, 32) for images in (1, 2, 4, 8)]
    assert all(parameter.grad is None for parameter in refiner.parameters())
