"""CAPI: rotary positions, RMSNorm, registers on the border, the predictor's read-out; against the authors' code and slow formulas."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel, RefineRecipe, refine
from mim_refiner_hf.conversion import CheckpointError, load_encoder
from mim_refiner_hf.data import open_images
from mim_refiner_hf.evaluation import extract_features
from mim_refiner_hf.optimization import encoder_groups, freeze
from mim_refiner_hf.positions_mim_refiner import (
    RotaryPositions,
    border_coordinates,
    patch_coordinates,
    rotary_frequencies,
    token_coordinates,
)
from mim_refiner_hf.refinement.heads import IdHeads
from mim_refiner_hf.refinement.queue import NearestNeighbourQueue
from mim_refiner_hf.refinement.recipe import resolve
from mim_refiner_hf.refinement.refiner import Refiner

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "norm_type": "rmsnorm",
    "position_encoding": "rope",
    "bias": "none",
    "use_cls_token": False,
    "num_register_tokens": 4,
    "final_norm_affine": False,
    "predictor_layers": 1,
}
CPU = torch.device("cpu")
TOLERANCE = {"atol": 1e-5, "rtol": 0}


def tiny(**settings: Any) -> MimRefinerModel:
    """Random values in every parameter, frequencies included; norms around 0.7, so that the tokens stay of order one."""
    model = MimRefinerModel(MimRefinerConfig(**{**TINY, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + 0.7 * (parameter.ndim == 1))
    return model.eval()


@pytest.fixture
def capi(goldens: Path) -> Path:
    return goldens / "capi"


# --- the authors' encoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("file", "case", "pixels"),
    [
        ("checkpoint.pth", "", "pixel_values"),
        ("checkpoint.pth", "rect.", "pixel_values_rect"),
        ("checkpoint_perturbed_rope.pth", "perturbed_rope.", "pixel_values"),
    ],
)
def test_equals_the_authors_model(capi: Path, file: str, case: str, pixels: str, attention: str) -> None:
    """No tensor of the encoder and of the read-out is off by more than 1e-5, at sizes that no flag has to allow."""
    inputs, expected = load_file(capi / "inputs.safetensors"), load_file(capi / "outputs.safetensors")
    encoder = load_encoder(capi / file)
    encoder.set_attn_implementation(attention)
    encoder.config.pooling = "global_repr"
    with torch.no_grad():
        output = encoder(inputs[pixels], output_hidden_states=True)
    registers, patches = output.last_hidden_state.split([8, output.last_hidden_state.shape[1] - 8], dim=1)
    found = {
        "embeddings": output.hidden_states[0],
        "blocks": torch.stack(output.hidden_states[1:]),
        "tokens_normed": output.last_hidden_state,
        "registers": registers,
        "feature_map": patches.reshape(expected[f"{case}feature_map"].shape),
        "global_repr": output.pooler_output,
    }
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[case + name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_report_names_what_is_left_behind(capi: Path) -> None:
    report = load_encoder(capi / "checkpoint_perturbed_rope.pth").load_report
    assert str(report) == "capi: 49 of 49 placed; predictor after its first block: 9 dropped; clustering head: 2 dropped"
    assert all(".blocks.1." in name for name in report.dropped["predictor after its first block"])


def test_configuration_is_read_off_the_file(capi: Path) -> None:
    config = load_encoder(capi / "checkpoint.pth").config
    assert (config.num_attention_heads, config.num_register_tokens, config.predictor_layers) == (3, 8, 1)
    assert (config.layer_norm_eps, config.bias, config.pooling) == (1e-5, "none", "mean")


def test_a_file_without_the_predictor_is_an_encoder_that_cannot_read_it(capi: Path, tmp_path: Path) -> None:
    state = torch.load(capi / "checkpoint.pth", weights_only=True)
    alone = {name: tensor for name, tensor in state.items() if "decoder" not in name and "mask_token" not in name}
    torch.save(alone, tmp_path / "encoder.pth")
    encoder = load_encoder(tmp_path / "encoder.pth")
    assert encoder.predictor is None
    assert encoder.config.missing_for("global_repr") == "no predictor (predictor_layers=0)"
    torch.save({**alone, "backbone.mask_token": state["backbone.mask_token"]}, tmp_path / "torn.pth")
    with pytest.raises(CheckpointError, match=r"1 tensors have no place .*predictor\.mask_token"):
        load_encoder(tmp_path / "torn.pth")
    torch.save(
        {name: tensor for name, tensor in state.items() if "blocks.1.residual1.fn.rope" not in name}, tmp_path / "no_rope.pth"
    )
    with pytest.raises(CheckpointError, match=r"missing: layers\.1\.attention\.rope\.frequencies"):
        load_encoder(tmp_path / "no_rope.pth")


# --- positions ----------------------------------------------------------------------------------------------------------------


def test_start_values_equal_the_authors(capi: Path) -> None:
    expected = load_file(capi / "outputs.safetensors")
    torch.testing.assert_close(rotary_frequencies(12), expected["rope_freqs_default"], rtol=1e-6, atol=0)
    assert torch.equal(border_coordinates(8, CPU), expected["edge_register_coords"][0])
    model = MimRefinerModel(MimRefinerConfig(**TINY))  # and they are what an encoder starts with, after `_init_weights`
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
            expected[:, :, token, c] = heads[:, :, token, c] * math.cos(angle[c]) + partner * math.sin(angle[c])
    torch.testing.assert_close(rope(heads, places), expected, **TOLERANCE)
    torch.testing.assert_close(rope(heads, places.expand(2, 5, 2)), expected, **TOLERANCE)  # places of each image its own


def test_registers_sit_on_the_box_of_the_patches() -> None:
    """The whole image: corners and mid-edges; one row of patches: on that row; a part of the image: on its own box."""
    whole = token_coordinates(patch_coordinates((4, 3), CPU), registers=8)
    assert whole[:8].tolist() == [[0, 0], [0.5, 0], [1, 0], [1, 0.5], [1, 1], [0.5, 1], [0, 1], [0, 0.5]]
    assert whole.shape == (20, 2) and whole[9].tolist() == [0, 0.5]  # the second patch of the first row
    assert token_coordinates(patch_coordinates((1, 3), CPU), registers=4)[:4].tolist() == [[0, 0], [0, 0], [0, 1], [0, 1]]
    part = torch.tensor([[[0.25, 0.5], [0.75, 1.0]], [[0.0, 0.0], [0.5, 0.25]]])  # two images, two visible patches each
    corners = token_coordinates(part, registers=4)[:, :4]
    assert corners[0].tolist() == [[0.25, 0.5], [0.75, 0.5], [0.75, 1.0], [0.25, 1.0]]
    assert corners[1].tolist() == [[0, 0], [0.5, 0], [0.5, 0.25], [0, 0.25]]


# --- a model as transformers wants it -----------------------------------------------------------------------------------------


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
    """`hidden_states` and `attentions` count the encoder's blocks; the predictor has the same classes inside."""
    model = tiny(pooling="global_repr", predictor_layers=2)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(torch.randn(2, 3, 32, 32), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 20, 32)] * 4
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 2, 20, 20)] * 3
    torch.testing.assert_close(model.norm(output.hidden_states[-1]), output.last_hidden_state)


def test_compiles_and_exports() -> None:
    model = tiny(num_hidden_layers=1, pooling="global_repr")
    pixels = torch.randn(3, 3, 16, 24)
    with torch.no_grad():
        expected = model(pixels)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(pixels)
        batch = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
        exported = torch.export.export(model, (torch.randn(2, 3, 16, 24),), dynamic_shapes=batch).module()(pixels)
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
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, plain in gradients[0].items():
        assert plain.abs().max() > 0, name
        torch.testing.assert_close(plain, gradients[1][name])


def test_bf16_keeps_the_angles_in_fp32() -> None:
    """bf16 weights, and autocast on fp32 weights: the frequencies go up to 44 radians, where bf16 is off by 0.1."""
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
        ({"predictor_layers": -1}, "predictor_layers=-1 must not be negative"),
        ({"predictor_layers": 0, "pooling": "global_repr"}, "the encoder has no predictor.*use pooling='mean'"),
        ({"num_register_tokens": 0, "pooling": "register"}, "the encoder has no register tokens.*use pooling='mean'"),
        ({"pooling": "global_repr", "features": "last_block"}, "use features='output'"),
        ({"pooling": "max"}, "pooling"),
    ],
)
def test_contradicting_configurations_raise(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        MimRefinerConfig(**{**TINY, **settings})


# --- pooling ------------------------------------------------------------------------------------------------------------------


def read_out(model: MimRefinerModel, output: Tensor, grid: tuple[int, int]) -> Tensor:
    """CAPI's `global_repr` of an encoder output, step by step: mask tokens, cross-attention, MLP, RMS, mean."""

    def rms(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + model.config.layer_norm_eps).sqrt() * weight

    block, places = model.predictor.blocks[0], patch_coordinates(grid, CPU)
    tokens = model.predictor.mask_token.expand(len(output), len(places), -1)
    attention = block.attention
    query = attention.heads(rms(tokens, block.norm1.weight) @ attention.q_proj.weight.T)
    key, value = (attention.heads(output @ part.weight.T) for part in (attention.k_proj, attention.v_proj))
    query, key = attention.rope(query, places), attention.rope(key, token_coordinates(places, 4))
    weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
    tokens = tokens + (weights @ value).transpose(1, 2).flatten(2) @ attention.o_proj.weight.T
    tokens = tokens + block.mlp(rms(tokens, block.norm2.weight))
    return rms(tokens).mean(1)


@pytest.mark.parametrize("pooling", ["mean", "register", "global_repr"])
def test_heads_and_features_read_what_the_pooling_says(pooling: str) -> None:
    """Heads: raw blocks and the encoder's output. Evaluation: raw blocks, but `global_repr` needs the output."""
    model = tiny(pooling=pooling)
    pixels = torch.randn(2, 3, 16, 32)
    pool: Callable[[Tensor], Tensor] = (lambda t: t[:, 0]) if pooling == "register" else (lambda t: t[:, 4:].mean(1))
    heads, queue = IdHeads(2, 32, 8, 8, 4), NearestNeighbourQueue(2, 8, 4)
    refiner = Refiner(model, [1, 2], heads, queue, num_global=2, num_views=2, temperature=0.2)
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
        features = refiner.encode(pixels)
    last = read_out(model, output.last_hidden_state, (2, 4)) if pooling == "global_repr" else pool(output.last_hidden_state)
    torch.testing.assert_close(features[0], pool(output.hidden_states[2]), **TOLERANCE)
    torch.testing.assert_close(features[1], last, **TOLERANCE)
    torch.testing.assert_close(output.pooler_output, last, **TOLERANCE)


@pytest.mark.parametrize("pooling", ["mean", "register", "global_repr"])
def test_evaluated_features_follow_the_pooling(tmp_path: Path, pooling: str) -> None:
    for number in range(3):
        Image.effect_noise((32, 32), 60 + 10 * number).convert("RGB").save(tmp_path / f"{number}.png")
    processor = MimRefinerImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model = tiny(pooling=pooling)
    found = extract_features(model, open_images(str(tmp_path)), processor, blocks=[0, 2])
    with torch.no_grad():
        pixels = processor([Image.open(tmp_path / f"{number}.png") for number in range(3)], return_tensors="pt").pixel_values
        output = model(pixels, output_hidden_states=True)
        blocks = [output.hidden_states[1], output.hidden_states[3]]
        expected = [tokens[:, 0] if pooling == "register" else tokens[:, 4:].mean(1) for tokens in blocks]
        if pooling == "global_repr":
            expected[1] = read_out(model, output.last_hidden_state, (4, 4))
    for block, vectors in zip((0, 2), expected, strict=True):
        torch.testing.assert_close(found.blocks[block], vectors, **TOLERANCE)
    assert torch.equal(found.features, found.blocks[2])


def test_register_comes_after_cls() -> None:
    model = tiny(
        position_encoding="absolute", use_cls_token=True, num_register_tokens=3, predictor_layers=0, pooling="register"
    )
    with torch.no_grad():
        output = model(torch.randn(2, 3, 32, 32))
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 1])


# --- refinement ---------------------------------------------------------------------------------------------------------------


def test_frequencies_are_frozen_and_the_predictor_is_not_decayed() -> None:
    model = tiny()
    freeze(model, blocks=0)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        f"{part}.attention.rope.frequencies" for part in ("layers.0", "layers.1", "layers.2", "predictor.blocks.0")
    }
    groups = encoder_groups(model, 0.5, 0.05)
    found = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert found["embeddings.register_tokens"] == (0.5**4, 0.0)
    assert found["layers.0.norm1.weight"] == (0.125, 0.0)
    assert found["layers.2.attention.q_proj.weight"] == (0.5, 0.05)
    assert found["predictor.mask_token"] == found["predictor.blocks.0.norm1.weight"] == (1.0, 0.0)
    assert found["predictor.blocks.0.mlp.fc1.weight"] == (1.0, 0.05)


@pytest.mark.parametrize("pooling", ["mean", "register", "global_repr"])
def test_a_checkpoint_is_refined(capi: Path, tmp_path: Path, pooling: str) -> None:
    """Both stages from the authors' file; the predictor goes on where it is read and trained, and only there."""
    recipe = RefineRecipe(
        model=str(capi / "checkpoint_perturbed_rope.pth"),
        dataset="digits",
        eval_fraction=0.0,
        pooling=pooling,
        head_blocks=[2, 3],
        projector_dim=16,
        predictor_dim=16,
        embedding_dim=8,
        queue_size=32,
        topk=2,
        local_views=1,
        global_size=32,
        local_size=16,
        batch_size=8,
        micro_batch_size=4,
        max_steps=2,
        warmup_epochs=0,
        learning_rate=8e-3,
        ema_decay=0.5,
        num_workers=0,
        mixed_precision="no",
        report_to="none",
        output_dir=str(tmp_path / "out"),
    )
    result = refine(recipe)
    assert result is not None
    assert (result.encoder.predictor is None) == (pooling != "global_repr")
    before, refined = load_encoder(capi / "checkpoint_perturbed_rope.pth"), load_encoder(tmp_path / "out/model")
    assert refined.config.pooling == pooling
    assert refined.config.predictor_layers == int(pooling == "global_repr")
    after, start = refined.state_dict(), before.state_dict()
    assert set(after) == {name for name in start if pooling == "global_repr" or not name.startswith("predictor.")}
    same = {name for name, tensor in after.items() if torch.equal(tensor, start[name])}
    assert same == {name for name in after if "rope" in name}  # every trained tensor has moved, every frequency has not
    pixels = load_file(capi / "inputs.safetensors")["pixel_values"]
    with torch.no_grad():
        loaded = AutoModel.from_pretrained(tmp_path / "out/model")(pixels).pooler_output
        torch.testing.assert_close(loaded, refined(pixels).pooler_output)
    assert loaded.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"pooling": "cls"}, {}, "--pooling cls: the encoder has no CLS token .*; use mean"),
        (
            {"pooling": "register"},
            {"num_register_tokens": 0},
            "--pooling register: the encoder has no register tokens .*; use mean",
        ),
        (
            {"pooling": "global_repr"},
            {"predictor_layers": 0},
            "--pooling global_repr: the encoder has no predictor .*; use mean",
        ),
        ({"pooling": "global_repr", "head_blocks": [0, 1]}, {}, r"add block 2 to --head_blocks 0 1, or use mean"),
        ({"head_blocks": [0, 1]}, {"pooling": "global_repr"}, r"add block 2 to --head_blocks 0 1, or use mean"),
    ],
)
def test_poolings_that_the_encoder_cannot_give_are_refused(
    changes: dict[str, Any], shape: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(RefineRecipe(model="x", **changes), MimRefinerConfig(**{**TINY, **shape}), num_images=4096)
