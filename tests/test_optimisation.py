"""Learning rates, weight decay, freezing and the moving average, against the authors' code and a
formula written out.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import facts

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel
from mim_refiner_hf.refinement.heads import IdHeads
from mim_refiner_hf.runtime.optimisation import (
    encoder_groups,
    freeze,
    head_groups,
    learning_rate,
    set_learning_rate,
    update_average,
)

RUNS = facts("lr-groups", "lr_groups.json").get("runs", [])


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: run["name"])
def golden(goldens: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """A released recipe: its rates, layer decay, weight decay, and what came of them."""
    return dict(request.param)


@pytest.fixture(scope="module")
def encoder(golden: dict[str, Any]) -> MimRefinerModel:
    """The encoder of the recipe by its names alone: its widths play no part, and it is narrow."""
    names = golden["params"]
    config = MimRefinerConfig(
        hidden_size=8,
        num_hidden_layers=golden["depth"],
        num_attention_heads=1,
        intermediate_size=8,
        norm_placement="post" if "embed_norm.weight" in names else "pre",
        embedding_norm="embed_norm.weight" in names,
        final_norm="norm.weight" in names,
    )
    with torch.device("meta"):
        return MimRefinerModel(config)


def authors_name(name: str) -> str:
    """`layers.3.attention.k_proj.bias` -> `blocks.3.attn.qkv.bias`.

    What the authors' code calls a parameter of ours.
    """
    if name == "embeddings.cls_token":
        return "cls_tokens.tokens"
    for ours, theirs in (
        ("embeddings.patch_embeddings.", "patch_embed.proj."),
        ("embeddings.norm.", "embed_norm."),
        ("layers.", "blocks."),
        ("attention.o_proj.", "attn.proj."),
        ("attention.q_proj.", "attn.qkv."),
        ("attention.k_proj.", "attn.qkv."),
        ("attention.v_proj.", "attn.qkv."),
    ):
        name = name.replace(ours, theirs)
    return name


def settings_by_name(groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """(lr_scale, weight_decay) of every parameter."""
    return {
        name: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for name in group["names"]
    }


def test_every_parameter_has_the_authors_scale_and_decay(
    golden: dict[str, Any], encoder: MimRefinerModel
) -> None:
    freeze(encoder, blocks=0)
    found = settings_by_name(
        encoder_groups(encoder, golden["decay"], golden["optimizer"]["weight_decay"])
    )
    assert {authors_name(name) for name in found} == set(golden["params"])
    # q, k and v, weight and bias, in place of one qkv
    assert len(found) == len(golden["params"]) + 2 * 2 * golden["depth"]
    for name, (scale, decay) in found.items():
        expected = golden["params"][authors_name(name)]
        assert scale == pytest.approx(expected["lr_scale"], rel=1e-9), name
        assert decay == expected["weight_decay"], name
        assert scale * golden["scaled_lr"] == pytest.approx(expected["peak_lr"], rel=1e-9), name


def test_schedule(golden: dict[str, Any]) -> None:
    warmup, total, peak = golden["warmup_updates"], golden["total_updates"], golden["scaled_lr"]
    assert golden["lr"] * golden["effective_batch_size"] / 256 == pytest.approx(peak, rel=1e-9)
    for step, expected in golden["schedule"]:
        assert learning_rate(step, warmup, total, peak) == pytest.approx(expected, rel=1e-9), step


def test_learning_rate_of_every_parameter_at_one_step(
    golden: dict[str, Any], encoder: MimRefinerModel
) -> None:
    freeze(encoder, blocks=0)
    groups = encoder_groups(encoder, golden["decay"], golden["optimizer"]["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    step = golden["lr_after_schedule_step"]["step"]
    expected = golden["lr_after_schedule_step"]["lr"]
    rate = learning_rate(
        step, golden["warmup_updates"], golden["total_updates"], golden["scaled_lr"]
    )
    set_learning_rate(optimizer, rate)
    for group in optimizer.param_groups:
        for name in group["names"]:
            assert group["lr"] == pytest.approx(expected[authors_name(name)], rel=1e-9), name


def test_final_norm_is_not_decayed() -> None:
    config = MimRefinerConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=16,
    )
    found = settings_by_name(encoder_groups(MimRefinerModel(config), 0.5, 0.05))
    assert found["norm.weight"] == (1.0, 0.0)
    assert found["layers.1.mlp.fc1.weight"] == (0.5, 0.05)
    assert found["layers.0.mlp.fc1.weight"] == (0.25, 0.05)
    assert found["embeddings.patch_embeddings.weight"] == (0.125, 0.05)
    assert found["embeddings.cls_token"] == (0.125, 0.0)


def test_freezing_as_the_2b_model_does() -> None:
    """Patch embedding, CLS and the first 6 blocks.

    Position tables, absolute and relative, are frozen in any case.
    """
    shape = {
        "hidden_size": 8,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "image_size": 16,
    }
    encoder = MimRefinerModel(
        MimRefinerConfig(
            **shape, patch_size=8, position_encoding="absolute+relative", num_register_tokens=1
        )
    )
    names = {name for name, _ in encoder.named_parameters()}
    positions = {name for name in names if "position" in name}
    assert len(positions) == 1 + 8
    freeze(encoder, blocks=0)
    assert {
        name for name, parameter in encoder.named_parameters() if not parameter.requires_grad
    } == positions
    freeze(encoder, blocks=6)
    early = tuple(f"layers.{block}." for block in range(6))
    expected = {name for name in names if name.startswith(("embeddings.", *early))} | positions
    assert {
        name for name, parameter in encoder.named_parameters() if not parameter.requires_grad
    } == expected
    grouped = settings_by_name(encoder_groups(encoder, 0.65, 0.05))
    assert set(grouped) == names - expected


def test_batch_norm_of_heads_has_no_decay() -> None:
    heads = IdHeads(num_heads=3, dim=8, projector_dim=8, predictor_dim=8, embedding_dim=4)
    found = settings_by_name(head_groups(heads, weight_decay=1e-5))
    assert set(found) == {name for name, _ in heads.named_parameters()}
    for name, (scale, decay) in found.items():
        assert scale == 1.0
        assert decay == (0.0 if ".norm." in name else 1e-5), name


def test_moving_average_is_the_formula_and_leaves_frozen_weights() -> None:
    model, average = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    average.load_state_dict(model.state_dict())
    model.bias.requires_grad_(False)
    expected = model.weight.detach().double().clone()
    start_bias = model.bias.clone()
    for step in range(20):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
            # does not happen to a frozen weight; here it shows that the average skips it
            model.bias.add_(1.0)
        update_average(average, model, decay=0.9)
        expected = 0.9 * expected + 0.1 * model.weight.detach().double()
    torch.testing.assert_close(average.weight.double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(average.bias, start_bias)
