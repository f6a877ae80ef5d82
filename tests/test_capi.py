"""CAPI: rotary positions, RMSNorm, registers on the border, the predictor's read-out.

Against the authors' code and slow formulas.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import contents, dropped_names, encoder_tensors, facts
from safetensors.torch import load_file
from tiny_capi import TINY, TOLERANCE, tiny
from transformers import AutoModel

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel
from mim_refiner_hf.conversion import CheckpointError, load_encoder
from mim_refiner_hf.model.configuration_mim_refiner import ConfigurationError
from mim_refiner_hf.model.positions_mim_refiner import (
    RotaryPositions,
    border_coordinates,
    patch_coordinates,
    rotary_frequencies,
    token_coordinates,
)

CPU = torch.device("cpu")


@pytest.fixture
def capi(goldens: Path) -> Path:
    return goldens / "capi"


# --- the authors' encoder -------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("file", "case", "pixels"),
    [
        ("checkpoint.pth", "", "pixel_values"),
        ("checkpoint.pth", "rect.", "pixel_values_rect"),
        ("checkpoint_perturbed_rope.pth", "perturbed_rope.", "pixel_values"),
    ],
)
def test_equals_the_authors_model(
    capi: Path, file: str, case: str, pixels: str, attention: str
) -> None:
    """No tensor of the encoder and of the read-out is off by more than 1e-5, at sizes that no flag
    has to allow.
    """
    inputs, expected = (
        load_file(capi / "inputs.safetensors"),
        load_file(capi / "outputs.safetensors"),
    )
    encoder = load_encoder(capi / file)
    encoder.set_attn_implementation(attention)
    encoder.config.pooling = "global_repr"
    with torch.no_grad():
        output = encoder(inputs[pixels], output_hidden_states=True)
    count = facts("capi")["n_registers"]
    registers = output.last_hidden_state[:, :count]
    patches = output.last_hidden_state[:, count:]
    found = {
        "embeddings": output.hidden_states[0],
        "blocks": torch.stack(output.hidden_states[1:]),
        "tokens_normed": output.last_hidden_state,
        "registers": registers,
        "feature_map": patches.reshape(expected[f"{case}feature_map"].shape),
        "global_repr": output.pooler_output,
    }
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor,
            expected[case + name],
            **TOLERANCE,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_report_names_what_is_left_behind(capi: Path) -> None:
    report = load_encoder(capi / "checkpoint_perturbed_rope.pth").load_report
    state = contents("capi", "checkpoint_perturbed_rope.pth")
    count = encoder_tensors(state, "capi")
    assert str(report).startswith(f"capi: {count} of {count} placed")
    left = {reason: set(names) for reason, names in report.dropped.items()}
    assert left == dropped_names(state, "capi")
    assert "clustering head" in left


def test_configuration_is_read_off_the_file(capi: Path) -> None:
    config = load_encoder(capi / "checkpoint.pth").config
    stated = facts("capi")
    assert config.hidden_size == stated["dim"]
    assert config.num_hidden_layers == stated["depth"]
    assert config.num_attention_heads == stated["num_heads"]
    assert config.num_register_tokens == stated["n_registers"]
    assert config.layer_norm_eps == stated["eps"]
    # the authors read the image's vector off the predictor's first block
    assert config.predictor_layers == 1
    assert (config.bias, config.pooling) == ("none", "mean")


def test_a_file_without_the_predictor_is_an_encoder_that_cannot_read_it(
    capi: Path, tmp_path: Path
) -> None:
    state = torch.load(capi / "checkpoint.pth", weights_only=True)
    alone = {
        name: tensor
        for name, tensor in state.items()
        if "decoder" not in name and "mask_token" not in name
    }
    torch.save(alone, tmp_path / "encoder.pth")
    encoder = load_encoder(tmp_path / "encoder.pth")
    assert encoder.predictor is None
    assert encoder.config.missing_for("global_repr") == "no predictor (predictor_layers=0)"
    torch.save(
        {**alone, "backbone.mask_token": state["backbone.mask_token"]}, tmp_path / "torn.pth"
    )
    with pytest.raises(CheckpointError, match=r"1 tensors have no place .*predictor\.mask_token"):
        load_encoder(tmp_path / "torn.pth")
    torch.save(
        {
            name: tensor
            for name, tensor in state.items()
            if "blocks.1.residual1.fn.rope" not in name
        },
        tmp_path / "no_rope.pth",
    )
    with pytest.raises(CheckpointError, match=r"missing: layers\.1\.attention\.rope\.frequencies"):
        load_encoder(tmp_path / "no_rope.pth")


# --- positions ------------------------------------------------------------------------------------


def test_start_values_equal_the_authors(capi: Path) -> None:
    expected = load_file(capi / "outputs.safetensors")
    frequencies = expected["rope_freqs_default"]
    width = frequencies.shape[-1]
    torch.testing.assert_close(rotary_frequencies(width), frequencies, rtol=1e-6, atol=0)
    (border,) = expected["edge_register_coords"]
    assert torch.equal(border_coordinates(len(border), CPU), border)
    # and they are what an encoder starts with, after `_init_weights`
    model = MimRefinerModel(MimRefinerConfig(**TINY))
    assert torch.equal(model.layers[2].attention.rope.frequencies, rotary_frequencies(16))


def test_rotation_is_the_formula_written_out() -> None:
    rope = RotaryPositions(8)
    torch.nn.init.normal_(rope.frequencies)
    heads, places = torch.randn(2, 3, 5, 8), torch.rand(5, 2)
    expected = torch.empty_like(heads)
    for token in range(5):
        angle = (places[token] @ rope.frequencies).tolist()
        for c in range(8):
            partner = -heads[:, :, token, c + 4] if c < 4 else heads[:, :, token, c - 4]
            expected[:, :, token, c] = heads[:, :, token, c] * math.cos(
                angle[c]
            ) + partner * math.sin(angle[c])
    torch.testing.assert_close(rope(heads, places), expected, **TOLERANCE)
    torch.testing.assert_close(
        rope(heads, places.expand(2, 5, 2)), expected, **TOLERANCE
    )  # places of each image its own


def test_registers_sit_on_the_box_of_the_patches() -> None:
    """The whole image: corners and mid-edges; one row of patches: on that row.

    A part of the image: on its own box.
    """
    whole = token_coordinates(patch_coordinates((4, 3), CPU), registers=8)
    assert whole[:8].tolist() == [
        [0, 0],
        [0.5, 0],
        [1, 0],
        [1, 0.5],
        [1, 1],
        [0.5, 1],
        [0, 1],
        [0, 0.5],
    ]
    # the second patch of the first row
    assert whole.shape == (20, 2) and whole[9].tolist() == [
        0,
        0.5,
    ]
    assert token_coordinates(patch_coordinates((1, 3), CPU), registers=4)[:4].tolist() == [
        [0, 0],
        [0, 0],
        [0, 1],
        [0, 1],
    ]
    # two images, two visible patches each
    part = torch.tensor([[[0.25, 0.5], [0.75, 1.0]], [[0.0, 0.0], [0.5, 0.25]]])
    corners = token_coordinates(part, registers=4)[:, :4]
    assert corners[0].tolist() == [[0.25, 0.5], [0.75, 0.5], [0.75, 1.0], [0.25, 1.0]]
    assert corners[1].tolist() == [[0, 0], [0.5, 0], [0.5, 0.25], [0, 0.25]]


# --- a model as transformers wants it -------------------------------------------------------------


def test_save_load_save_is_bit_equal(capi: Path, tmp_path: Path) -> None:
    encoder = load_encoder(capi / "checkpoint_perturbed_rope.pth")
    encoder.save_pretrained(tmp_path / "first")
    loaded = AutoModel.from_pretrained(tmp_path / "first", pooling="global_repr")
    ours = load_encoder(tmp_path / "first")
    ours.save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    expected = load_file(capi / "outputs.safetensors")["perturbed_rope.global_repr"]
    with torch.no_grad():
        found = loaded(load_file(capi / "inputs.safetensors")["pixel_values"]).pooler_output
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_recordings_are_of_the_encoder_alone() -> None:
    """`hidden_states` and `attentions` count the encoder's blocks.

    The predictor has the same classes inside.
    """
    model = tiny(pooling="global_repr", predictor_layers=2)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(torch.randn(2, 3, 32, 32), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 20, 32)] * 4
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 2, 20, 20)] * 3
    torch.testing.assert_close(model.norm(output.hidden_states[-1]), output.last_hidden_state)


@pytest.mark.slow
def test_compiles_and_exports() -> None:
    model = tiny(num_hidden_layers=1, pooling="global_repr")
    pixels = torch.randn(3, 3, 16, 24)
    with torch.no_grad():
        expected = model(pixels)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(pixels)
        batch = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
        exported = torch.export.export(
            model, (torch.randn(2, 3, 16, 24),), dynamic_shapes=batch
        ).module()(pixels)
    for output in (compiled, exported):
        torch.testing.assert_close(output.pooler_output, expected.pooler_output, **TOLERANCE)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_sdpa() -> None:
    model = tiny(pooling="global_repr")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(pixels).pooler_output
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(pixels).pooler_output, expected, **TOLERANCE)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_gives_equal_gradients() -> None:
    model = tiny(pooling="global_repr").train()
    pixels, gradients = torch.randn(2, 3, 32, 32), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert model.predictor.blocks[0].gradient_checkpointing is checkpointing
        model.zero_grad()
        model(pixels).pooler_output.square().sum().backward()
        gradients.append(
            {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        )
    for name, plain in gradients[0].items():
        assert plain.abs().max() > 0, name
        torch.testing.assert_close(plain, gradients[1][name])


def test_bf16_keeps_the_angles_in_fp32() -> None:
    """bf16 weights, and autocast on fp32 weights.

    The frequencies go up to 44 radians, where bf16 is off by 0.1.
    """
    model = tiny(pooling="global_repr")
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.rope.frequencies.copy_(rotary_frequencies(16).bfloat16())
        pixels = torch.randn(2, 3, 32, 48)
        expected = model(pixels).pooler_output
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(pixels).pooler_output
        cast = model.bfloat16()(pixels)
    assert cast.last_hidden_state.dtype == cast.pooler_output.dtype == torch.bfloat16
    for output in (autocast, cast.pooler_output):
        assert torch.nn.functional.cosine_similarity(output.float(), expected).min() > 0.999
    places = token_coordinates(patch_coordinates((4, 6), CPU), 4)
    queries = torch.ones(1, 1, 28, 16)
    rope = model.layers[0].attention.rope
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        in_bf16 = rope(queries, places)
        in_fp32 = rope.float()(queries, places)
    torch.testing.assert_close(in_bf16, in_fp32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_cls_token": True}, "needs use_cls_token=False"),
        ({"num_register_tokens": 6}, "num_register_tokens=6 must be a multiple of 4"),
        ({"hidden_size": 36}, "whose width is a multiple of 4.*make it 18"),
        ({"position_encoding": "absolute"}, "predictor_layers=1 needs position_encoding='rope'"),
        ({"predictor_layers": -1}, "predictor_layers=-1 must be a whole number from 0 to"),
        (
            {"predictor_layers": 0, "pooling": "global_repr"},
            "the encoder has no predictor.*use pooling='mean'",
        ),
        (
            {"num_register_tokens": 0, "pooling": "register"},
            "the encoder has no register tokens.*use pooling='mean'",
        ),
        ({"pooling": "global_repr", "features": "last_block"}, "use features='output'"),
        ({"pooling": "max"}, "pooling"),
    ],
)
def test_contradicting_configurations_raise(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MimRefinerConfig(**{**TINY, **settings})
