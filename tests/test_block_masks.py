"""Masks of CAPI and ConMIM: those of the authors' code from the same draws, and exact counts."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import GOLDENS, facts, tensors
from safetensors.torch import load_file

from mim_refiner_hf.pretraining.block_masks import (
    ASPECTS,
    RectangleDraw,
    aspect_limits,
    block_mask,
    draw_rectangle,
    mask_source,
    masked_squares,
    predicted_positions,
    random_mask,
    rectangle_mask,
    shuffled,
    square_mask,
    squares_of,
)

CAPI = "capi-masking"
CONMIM = "conmim-masking"


def cases(kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and settings of CAPI's cases of one kind."""
    found = facts(CAPI).get("cases", {})
    return [(name, case) for name, case in found.items() if case.get("kind") == kind]


def conmim(prefix: str) -> dict[str, dict[str, Any]]:
    kinds = facts(CONMIM).get("kinds", {})
    return {name: kind for name, kind in kinds.items() if name.startswith(prefix)}


def rectangle_settings(case: dict[str, Any]) -> tuple[tuple[int, int], int, tuple[float, float]]:
    """Grid, cells of the rectangle, and limits of its aspect."""
    grid = tuple(case["grid"])
    masked = case["num_masking_patches"]
    cells = masked if case["kind"] == "Block" else math.prod(grid) - masked
    aspects = (case.get("min_aspect", ASPECTS[0]), case.get("max_aspect", ASPECTS[1]))
    return grid, cells, aspects


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("kind", ["InverseBlock", "Block"])
def test_rectangles_are_the_authors(kind: str) -> None:
    inputs, expected = tensors(CAPI)
    assert cases(kind)
    for name, case in cases(kind):
        grid, cells, aspects = rectangle_settings(case)
        # drawn as theirs, from Python's generator, and given the same draws
        source = random.Random(case["seed"])
        for draws, mask in zip(inputs[f"{name}.draws"], expected[f"{name}.masks"], strict=True):
            aspect, top, left, down, right, low, high = draws.tolist()
            assert aspect_limits(grid, cells, aspects) == pytest.approx((low, high), abs=1e-12)
            drawn = draw_rectangle(grid, cells, source, case["roll"], aspects)
            given = RectangleDraw(aspect, int(top), int(left), (int(down), int(right)))
            assert drawn == given

            rectangle = rectangle_mask(grid, cells, given)
            masked = rectangle if kind == "Block" else ~rectangle
            assert masked.sum() == case["num_masking_patches"]
            np.testing.assert_array_equal(masked, mask.numpy().astype(bool), err_msg=name)


@pytest.mark.usefixtures("goldens")
def test_uniform_masks_are_the_authors() -> None:
    _, expected = tensors(CAPI)
    assert cases("Uniform")
    for name, case in cases("Uniform"):
        grid = tuple(case["grid"])
        source = np.random.RandomState(case["seed"])
        for mask in expected[f"{name}.masks"]:
            order = np.arange(math.prod(grid))
            source.shuffle(order)
            ours = random_mask(grid, case["num_masking_patches"], order.tolist())
            np.testing.assert_array_equal(ours, mask.numpy().astype(bool))


@pytest.mark.usefixtures("goldens")
def test_predicted_and_visible_positions_are_the_authors() -> None:
    inputs, expected = tensors(CAPI)
    case = facts(CAPI)["cases"]["collate"]
    visible, predicted = [], []
    for image, mask in enumerate(inputs["collate.masks"].numpy().astype(bool)):
        first = image * case["n_tokens"]
        noise = inputs["collate.noise"][image].tolist()
        predicted.append(first + predicted_positions(mask, noise, case["n_predict"]))
        visible.append(first + np.flatnonzero(~mask))
    assert np.concatenate(predicted).tolist() == expected["collate.predict_indices"].tolist()
    assert np.concatenate(visible).tolist() == expected["collate.visible_indices"].tolist()


@pytest.mark.usefixtures("goldens")
def test_squares_are_the_authors() -> None:
    expected = load_file(GOLDENS / CONMIM / "outputs.safetensors")
    assert conmim("squares.")
    for name, kind in conmim("squares.").items():
        side = kind["image_size"] // kind["patch_size"]
        square = kind["mask_patch_size"] // kind["patch_size"]
        assert squares_of((side, side), square) == kind["squares"]
        assert masked_squares(kind["squares"], kind["mask_ratio"]) == kind["masked_squares"]
        orders = expected[f"{name}.permutation"]
        for order, mask in zip(orders, expected[f"{name}.mask"], strict=True):
            ours = square_mask((side, side), square, kind["mask_ratio"], order.tolist())
            assert ours.sum() == kind["masked_patches"]
            np.testing.assert_array_equal(ours, mask.numpy().astype(bool), err_msg=name)


def blocks(kind: dict[str, Any], source: random.Random) -> np.ndarray:
    return block_mask(
        tuple(kind["grid"]),
        kind["masked_patches_wanted"],
        kind["min_patches_per_block"],
        source,
        kind["min_aspect"],
        kind["max_patches_per_block"],
    )


@pytest.mark.usefixtures("goldens")
def test_blocks_are_the_authors() -> None:
    expected = load_file(GOLDENS / CONMIM / "outputs.safetensors")
    assert conmim("blocks.")
    for name, kind in conmim("blocks.").items():
        source = random.Random(kind["random_seed"])
        ours = [blocks(kind, source) for _ in range(kind["masks"])]
        assert [int(mask.sum()) for mask in ours] == kind["masked"]
        np.testing.assert_array_equal(np.stack(ours), expected[f"{name}.mask"].bool(), name)


@pytest.mark.usefixtures("goldens")
def test_every_patch_is_masked_as_often_as_in_the_authors_code() -> None:
    expected = load_file(GOLDENS / CONMIM / "outputs.safetensors")
    for name, kind in conmim("blocks.").items():
        drawn = np.stack([blocks(kind, mask_source(0, 0, index)) for index in range(5000)])
        frequency = torch.from_numpy(drawn).float().mean(dim=0)
        torch.testing.assert_close(
            frequency, expected[f"{name}.masked_frequency"].float(), atol=0.03, rtol=0
        )
        mean = kind["statistics_of_20000_masks"]["masked_mean"]
        assert drawn.sum(axis=(1, 2)).mean() == pytest.approx(mean, abs=0.1)


def test_a_rolled_rectangle_shows_every_patch_equally_often() -> None:
    grid, cells = (6, 8), 17
    shown = np.zeros(grid)
    for index in range(4000):
        shown += rectangle_mask(grid, cells, draw_rectangle(grid, cells, mask_source(1, 2, index)))
    # standard error 0.0076
    assert np.abs(shown / 4000 - cells / 48).max() < 0.035


def test_a_source_is_a_pure_function_of_seed_step_and_image() -> None:
    first = shuffled(100, mask_source(0, 5, 7))
    assert sorted(first) == list(range(100))
    assert first == shuffled(100, mask_source(0, 5, 7))
    others = [(1, 5, 7), (0, 6, 7), (0, 5, 8), (0, 7, 5)]
    assert all(shuffled(100, mask_source(*key)) != first for key in others)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: squares_of((7, 7), 2), "squares of 2 x 2 patches do not divide the grid of 7 x 7"),
        (lambda: squares_of((2, 2), 2), "into two or more"),
        (lambda: masked_squares(4, 0.9), "a share of 0.9 masks all 4 squares"),
        (lambda: aspect_limits((2, 40), 30), "no rectangle of 30 patches"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        call()
    assert "\n" not in str(refused.value)
