"""The encoder equals transformers' and timm's models from the same weights, and keeps what
transformers promises of a model.

Every parity test draws random values for every tensor (position and bias tables, layer scales and
tokens included), so that a tensor that is ignored, swapped or transposed shows.
"""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from random_weights import randomise
from timm.layers import resample_abs_pos_embed
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from mim_refiner_hf.conversion import load_encoder
from mim_refiner_hf.model.configuration_mim_refiner import ConfigurationError, MimRefinerConfig
from mim_refiner_hf.model.modeling_mim_refiner import MimRefinerModel
from mim_refiner_hf.model.positions_mim_refiner import (
    relative_position_index,
    sincos_position_table,
)

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
SIZES = [(32, 32), (16, 16), (24, 48)]
TOLERANCE = {"atol": 1e-5, "rtol": 0}


def tiny(**settings: Any) -> MimRefinerModel:
    return randomise(MimRefinerModel(MimRefinerConfig(**{**TINY, **settings})))


def converted(model: Any, folder: Path) -> MimRefinerModel:
    """Our encoder with the weights of a transformers model."""
    model.save_pretrained(folder)
    return load_encoder(folder)


def assert_same_tokens(ours: MimRefinerModel, pixels: torch.Tensor, expected: Any) -> None:
    """Final tokens and the output of every block."""
    with torch.no_grad():
        output = ours(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, **TOLERANCE)
    for block, (mine, theirs) in enumerate(
        zip(output.hidden_states, expected.hidden_states, strict=True)
    ):
        torch.testing.assert_close(mine, theirs, **TOLERANCE, msg=f"hidden state {block}")


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_equals_transformers_vit(tmp_path: Path, size: tuple[int, int]) -> None:
    model = randomise(transformers.ViTModel(transformers.ViTConfig(**TINY)))
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    assert_same_tokens(converted(model, tmp_path), pixels, expected)


@pytest.mark.parametrize("size", SIZES)
def test_equals_transformers_vit_mae_unmasked(tmp_path: Path, size: tuple[int, int]) -> None:
    model = randomise(transformers.ViTMAEModel(transformers.ViTMAEConfig(**TINY, mask_ratio=0.0)))
    pixels = torch.randn(2, 3, *size)
    # increasing noise: ViTMAE shuffles nothing
    order = torch.arange(size[0] * size[1] // 64).float().expand(2, -1)
    with torch.no_grad():
        expected = model(
            pixels, noise=order, interpolate_pos_encoding=True, output_hidden_states=True
        )
    assert_same_tokens(converted(model, tmp_path), pixels, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", ["relative", "shared_relative", "absolute", "absolute+relative"])
@pytest.mark.parametrize("kind", ["Beit", "Data2VecVision"])
def test_equals_transformers_beit_and_data2vec_vision(
    tmp_path: Path, kind: str, bias: str, size: tuple[int, int]
) -> None:
    config = getattr(transformers, f"{kind}Config")(
        **TINY,
        use_absolute_position_embeddings="absolute" in bias,
        use_relative_position_bias=bias.endswith("relative") and "shared" not in bias,
        use_shared_relative_position_bias="shared" in bias,
        # without a final norm, and with one
        use_mean_pooling=bias == "relative",
    )
    model = randomise(getattr(transformers, f"{kind}Model")(config))
    ours = converted(model, tmp_path)
    assert ours.config.position_encoding == bias
    assert ours.config.final_norm == (bias != "relative")
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True)
    assert_same_tokens(ours, pixels, expected)


@pytest.mark.parametrize("size", SIZES)
def test_equals_timm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    model = randomise(
        timm.models.VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=48,
            depth=3,
            num_heads=3,
            num_classes=0,
            dynamic_img_size=True,
        )
    )

    def without_antialias(*args: Any, **kwargs: Any) -> torch.Tensor:
        # MIM-Refiner resizes without, timm with
        return resample_abs_pos_embed(*args, **kwargs, antialias=False)

    monkeypatch.setattr("timm.models.vision_transformer.resample_abs_pos_embed", without_antialias)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    ours = load_encoder(tmp_path / "timm.pth", num_heads=3)
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        tokens = ours(pixels, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(tokens, model.forward_features(pixels), **TOLERANCE)


def test_post_norm_blocks_equal_the_slow_version() -> None:
    """data2vec 2.0: `x = norm1(x + attn(x)); x = norm2(x + mlp(x))`, after an embedding norm
    (METHOD.md, Encoders).
    """
    model = tiny(norm_placement="post", embedding_norm=True, final_norm=False)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        patches = (
            model.embeddings.patch_embeddings(pixels).flatten(2).mT
            + model.embeddings.position_embeddings
        )
        x = model.embeddings.norm(
            torch.cat([model.embeddings.cls_token.expand(2, -1, -1), patches], dim=1)
        )
        for layer in model.layers:
            q, k, v = (
                getattr(layer.attention, f"{name}_proj")(x).unflatten(-1, (2, 16)).transpose(1, 2)
                for name in "qkv"
            )
            attended = ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = layer.norm1(x + layer.attention.o_proj(attended))
            x = layer.norm2(x + layer.mlp.fc2(torch.nn.functional.gelu(layer.mlp.fc1(x))))
        torch.testing.assert_close(model(pixels).last_hidden_state, x, **TOLERANCE)


@pytest.mark.parametrize("grid", [(4, 4), (2, 5)])
def test_fresh_positions_are_sine_cosine(grid: tuple[int, int]) -> None:
    """As transformers' ViTMAE computes them, but with MAE's order of the halves.

    Width first (transformers: height first).
    """
    expected = (
        build_2d_sinusoidal_position_embedding(*grid, embed_dim=32).roll(16, dims=1).unsqueeze(0)
    )
    torch.testing.assert_close(sincos_position_table(grid, 32), expected, atol=1e-6, rtol=0)
    config = MimRefinerConfig(**{**TINY, "image_size": [grid[0] * 8, grid[1] * 8]})
    assert torch.equal(
        MimRefinerModel(config).embeddings.position_embeddings, sincos_position_table(grid, 32)
    )


def test_fresh_positions_equal_a_trained_mae(shared: Path) -> None:
    trained = load_encoder(shared / "models/mae-tiny-cifar10")
    torch.testing.assert_close(
        MimRefinerModel(trained.config).embeddings.position_embeddings,
        trained.embeddings.position_embeddings,
    )


@pytest.mark.parametrize(
    "positions", ["absolute", "relative", "shared_relative", "absolute+shared_relative"]
)
@pytest.mark.parametrize("width", [32, 30])
def test_no_fresh_table_is_constant(positions: str, width: int) -> None:
    """A constant position table cannot be told apart by training (transformers' ViTMAE from a
    config has one).
    """
    model = MimRefinerModel(
        MimRefinerConfig(
            **{**TINY, "hidden_size": width}, position_encoding=positions, num_register_tokens=2
        )
    )
    tables = {
        name: weight
        for name, weight in model.named_parameters()
        if "position" in name or "token" in name
    }
    assert (
        len(tables)
        == 2 + ("absolute" in positions) + {"r": 3, "s": 1, "a": 0}[positions.split("+")[-1][0]]
    )
    for name, table in tables.items():
        rows = table.reshape(-1, table.shape[-1])
        assert rows.unique(dim=0).shape == rows.shape, name


def test_relative_position_index_tells_offsets_apart() -> None:
    """Two patch pairs share a bias exactly when they have the same offset.

    CLS has three entries of its own.
    """
    index = relative_position_index((2, 3), torch.device("cpu"))
    place = [(row, column) for row in range(2) for column in range(3)]
    offsets: dict[tuple[int, int], set[int]] = {}
    for q, query in enumerate(place):
        for k, key in enumerate(place):
            offsets.setdefault((query[0] - key[0], query[1] - key[1]), set()).add(
                int(index[1 + q, 1 + k])
            )
    assert all(len(entries) == 1 for entries in offsets.values())
    assert len(set.union(*offsets.values())) == len(offsets) == 3 * 5
    assert (set(index[0, 1:].tolist()), set(index[1:, 0].tolist()), int(index[0, 0])) == (
        {15},
        {16},
        17,
    )


# --- attention kernels, recording, compiling ------------------------------------------------------


@pytest.mark.parametrize("positions", ["absolute", "relative", "shared_relative"])
def test_eager_equals_sdpa(positions: str) -> None:
    model = tiny(
        position_encoding=positions, layer_scale_init=0.1, bias="no_key", num_register_tokens=2
    )
    pixels = torch.randn(2, 3, 32, 32)
    outputs = []
    for kernel in ("sdpa", "eager"):
        model.set_attn_implementation(kernel)
        with torch.no_grad():
            outputs.append(model(pixels).last_hidden_state)
    torch.testing.assert_close(*outputs, **TOLERANCE)


def test_attention_weights_are_recorded_with_eager() -> None:
    model = tiny()
    model.set_attn_implementation("eager")
    attentions = model(torch.randn(2, 3, 32, 32), output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, 2, 17, 17)] * 3
    torch.testing.assert_close(attentions[1].sum(-1), torch.ones(2, 2, 17))


def test_kernels_without_additive_bias_are_refused_with_relative_positions() -> None:
    with pytest.raises(ValueError, match="flex"):
        tiny(position_encoding="relative").set_attn_implementation("flex_attention")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_gives_equal_gradients() -> None:
    model = tiny(position_encoding="shared_relative", layer_scale_init=0.1).train()
    pixels, gradients = torch.randn(2, 3, 32, 32), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert {layer.gradient_checkpointing for layer in model.layers} == {checkpointing}
        model.zero_grad()
        model(pixels).last_hidden_state.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_recording_chosen_hidden_states() -> None:
    model = tiny()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        everything = model(pixels, output_hidden_states=True).hidden_states
        chosen = model(pixels, output_hidden_states=[1, 3]).hidden_states
    assert len(everything) == 4
    recorded = [state for state in chosen if state is not None]
    assert len(recorded) == 2
    assert all(
        torch.equal(state, everything[index]) for state, index in zip(recorded, (1, 3), strict=True)
    )
    # entries are before the final norm
    torch.testing.assert_close(model.norm(everything[-1]), model(pixels).last_hidden_state)


def test_bf16_weights_take_fp32_pixels() -> None:
    model = tiny(position_encoding="absolute+relative", layer_scale_init=0.1)
    pixels = torch.randn(2, 3, 16, 32)
    with torch.no_grad():
        expected = model(pixels, interpolate_pos_encoding=True).pooler_output
        output = model.bfloat16()(pixels, interpolate_pos_encoding=True)
    assert output.last_hidden_state.dtype == output.pooler_output.dtype == torch.bfloat16
    assert (
        torch.nn.functional.cosine_similarity(output.pooler_output.float(), expected).min() > 0.99
    )


def test_compiles_without_graph_breaks() -> None:
    """`fullgraph=True` on the longest path, both kinds of positions at another size.

    Without the slow code generator.
    """
    model = tiny(num_hidden_layers=2, position_encoding="absolute+relative")
    pixels = torch.randn(2, 3, 16, 32)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(
            pixels, interpolate_pos_encoding=True
        )
        torch.testing.assert_close(
            compiled.last_hidden_state, model(pixels, interpolate_pos_encoding=True)[0], **TOLERANCE
        )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_sdpa() -> None:
    """Through flex attention's own reference path.

    Generating its kernel takes 12 s here and tests torch, not us.
    """
    model = tiny(num_register_tokens=2)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(pixels).last_hidden_state
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(pixels).last_hidden_state, expected, **TOLERANCE)


def test_exports_with_a_dynamic_batch() -> None:
    model = tiny(num_hidden_layers=2)
    batch = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=batch)
    pixels = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            program.module()(pixels).pooler_output, model(pixels).pooler_output, **TOLERANCE
        )


# --- pooling, sizes, configuration ----------------------------------------------------------------


@pytest.mark.parametrize("features", ["output", "last_block"])
@pytest.mark.parametrize("cls", [True, False])
def test_pooler_output_is_defined_by_the_configuration(features: str, cls: bool) -> None:
    model = tiny(use_cls_token=cls, num_register_tokens=3, features=features)
    assert model.config.pooling == ("cls" if cls else "mean")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
        tokens = output.hidden_states[-1] if features == "last_block" else output.last_hidden_state
        assert torch.equal(output.pooler_output, tokens[:, 0] if cls else tokens[:, 3:].mean(1))
        assert torch.equal(output.pooler_output, model(pixels).pooler_output)
    assert tokens.shape == (2, 16 + 3 + cls, 32)


def test_mean_pooling_leaves_out_cls_and_registers() -> None:
    model = tiny(pooling="mean", num_register_tokens=3)
    with torch.no_grad():
        output = model(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state[:, 4:].mean(1))


def test_wrong_pixels_raise() -> None:
    model = tiny()
    with pytest.raises(
        ValueError,
        match=r"16x16 but the model's native size is 32x32; resize .* "
        r"interpolate_pos_encoding=True",
    ):
        model(torch.randn(1, 3, 16, 16))
    with pytest.raises(
        ValueError, match=r"20x32; height and width must be multiples of the patch size 8"
    ):
        model(torch.randn(1, 3, 20, 32), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="has 1 channels; this model was built for 3"):
        model(torch.randn(1, 1, 32, 32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads=5 must divide hidden_size=32"),
        ({"image_size": 30}, "patch_size=8 must divide image_size=30"),
        ({"image_size": 0}, "image_size=0 must be a whole number from 1 to"),
        ({"position_encoding": "spiral"}, "position_encoding='spiral' is not supported"),
        ({"position_encoding": ""}, "position_encoding='' is not supported"),
        ({"norm_type": "batchnorm"}, "norm_type"),
        ({"norm_placement": "middle"}, "norm_placement"),
        ({"bias": "some"}, "bias"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a whole number from 1 to"),
        ({"num_register_tokens": -1}, "num_register_tokens=-1 must be a whole number from 0 to"),
        (
            {"use_cls_token": False, "pooling": "cls"},
            r"pooling='cls': the encoder has no CLS token \(use_cls_token=False\)",
        ),
    ],
)
def test_contradicting_configurations_raise(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MimRefinerConfig(**{**TINY, **settings})
