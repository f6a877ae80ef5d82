"""transformers' vision classes as starts: tokens and vectors are those of the class itself.

Each is built tiny and random from its own configuration, saved, loaded and compared.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from random_weights import randomise
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel, RefineRecipe, refine
from mim_refiner_hf.conversion import CheckpointError, load_encoder
from mim_refiner_hf.model.configuration_mim_refiner import ConfigurationError
from mim_refiner_hf.publishing import export_timm
from mim_refiner_hf.publishing.export import export
from mim_refiner_hf.refinement.heads import IdHeads
from mim_refiner_hf.refinement.queue import NearestNeighbourQueue
from mim_refiner_hf.refinement.refiner import NnaSettings, Refiner
from mim_refiner_hf.refinement.resolve import resolve
from mim_refiner_hf.runtime.optimisation import freeze

TOLERANCE = 1e-5
BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
SHAPE = {**BLOCKS, "image_size": 32}
WITH_MLP = {**SHAPE, "intermediate_size": 48}
NAFLEX = {**BLOCKS, "intermediate_size": 48, "num_patches": 16}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TOWERS = {"text_config": TEXT, "vision_config": WITH_MLP}


class Case(NamedTuple):
    """A class of transformers with its settings, and what is pooled: a reader of its output."""

    name: str
    settings: dict[str, Any]
    pooled: Callable[[Any], Tensor] = lambda output: output.pooler_output
    # what transformers' class is asked for beside pixels at another size
    resize: bool = False


def cls_of(output: Any) -> Tensor:
    return output.last_hidden_state[:, 0]


def mean_of(output: Any) -> Tensor:
    return output.last_hidden_state.mean(dim=1)


CASES = {
    "dinov2": Case("Dinov2", SHAPE),
    "dinov2-swiglu": Case("Dinov2", {**SHAPE, "use_swiglu_ffn": True}),
    "dinov2-no-qkv-bias": Case("Dinov2", {**SHAPE, "qkv_bias": False, "hidden_act": "relu"}),
    "dinov2-registers": Case("Dinov2WithRegisters", SHAPE),
    "dinov2-registers-swiglu": Case("Dinov2WithRegisters", {**SHAPE, "use_swiglu_ffn": True}),
    # the pooler is of a classification that transformers' class draws at random
    "deit": Case("DeiT", WITH_MLP, cls_of, resize=True),
    "vit_msn": Case("ViTMSN", WITH_MLP, cls_of, resize=True),
    "ijepa": Case("IJepa", WITH_MLP, mean_of, resize=True),
    "dinov3": Case("DINOv3ViT", {**WITH_MLP, "num_register_tokens": 4}),
    "dinov3-plain": Case("DINOv3ViT", {**WITH_MLP, "rope_theta": 50.0}),
    "dinov3-7b": Case(
        "DINOv3ViT",
        {
            **WITH_MLP,
            "num_register_tokens": 3,
            "use_gated_mlp": True,
            "hidden_act": "silu",
            "query_bias": False,
            "value_bias": False,
        },
    ),
    "siglip": Case("SiglipVision", WITH_MLP, resize=True),
    "siglip-no-head": Case("SiglipVision", {**WITH_MLP, "vision_use_head": False}, mean_of, True),
    "siglip-towers": Case("Siglip", TOWERS, resize=True),
    "siglip2": Case("Siglip2Vision", NAFLEX),
    "siglip2-towers": Case("Siglip2", {**TOWERS, "vision_config": NAFLEX}),
    "clip": Case("CLIPVision", WITH_MLP, resize=True),
    "clip-gelu": Case("CLIPVision", {**WITH_MLP, "hidden_act": "gelu"}, resize=True),
    "clip-towers": Case("CLIP", TOWERS, resize=True),
    "pixio": Case("Pixio", SHAPE),
    "aimv2": Case("Aimv2Vision", WITH_MLP),
    "aimv2-native": Case("Aimv2Vision", {**WITH_MLP, "is_native": True}),
    "aimv2-no-head": Case("Aimv2Vision", {**WITH_MLP, "use_head": False}, mean_of),
    "aimv2-towers": Case("Aimv2", TOWERS),
}

# `model_type`s of others, and why they are no start
REFUSED = {
    "bert": "it reads text",
    "clip_text_model": "it reads text",
    "llama": "it reads text",
    "detr": "it detects objects",
    "yolos": "it detects objects",
    "videomae": "it reads videos",
    "vjepa2": "it reads videos",
    "hiera": "its tokens change in width and number from stage to stage",
    "swin": "its tokens change in width and number from stage to stage",
}


def saved(folder: Path, case: Case) -> PreTrainedModel:
    """The case's model with random weights, saved under `folder`."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.name}Config")(**case.settings)
    model = randomise(getattr(transformers, f"{case.name}Model")(config))
    model.save_pretrained(folder)
    return model


def tower_of(model: PreTrainedModel) -> PreTrainedModel:
    return getattr(model, "vision_model", model)


def their_output(model: PreTrainedModel, pixels: Tensor, resize: bool) -> Any:
    """What transformers' own class makes of images (B, 3, H, W)."""
    tower = tower_of(model)
    arguments: dict[str, Any] = {"interpolate_pos_encoding": True} if resize else {}
    if "Siglip2" in type(tower).__name__:
        patch = BLOCKS["patch_size"]
        rows = pixels.shape[2] // patch
        columns = pixels.shape[3] // patch
        # (B, 3, rows, patch, columns, patch) to rows of pixels with their channels
        pixels = pixels.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
        pixels = pixels.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        arguments = {
            "pixel_attention_mask": torch.ones(pixels.shape[:2], dtype=torch.long),
            "spatial_shapes": torch.tensor([[rows, columns]] * len(pixels)),
        }
    if "ViTMAE" in type(tower).__name__:
        # patches are sorted by this noise
        patches = (pixels.shape[2] * pixels.shape[3]) // BLOCKS["patch_size"] ** 2
        arguments["noise"] = torch.arange(patches).expand(len(pixels), -1)
    with torch.no_grad():
        return tower(pixels, **arguments)


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_vectors_are_those_of_the_class(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    model = saved(tmp_path, case)
    from_memory = load_encoder(model)
    encoder = load_encoder(tmp_path)
    assert encoder.load_report.placed == encoder.load_report.total
    state = encoder.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in from_memory.state_dict().items())

    for size in ((32, 32), (48, 24), (24, 40)):
        # the class with a table takes no other size
        if case.name.startswith("Aimv2") and size != (32, 32) and name != "aimv2-native":
            continue
        pixels = torch.randn(2, 3, *size)
        theirs = their_output(model, pixels, case.resize)
        with torch.no_grad():
            ours = encoder(pixels, interpolate_pos_encoding=True)
        kwargs = {"atol": TOLERANCE, "rtol": TOLERANCE, "msg": f"{name} at {size}"}
        torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, **kwargs)
        torch.testing.assert_close(ours.pooler_output, case.pooled(theirs), **kwargs)
        # not a vector of zeros, nor the same for every image
        assert ours.pooler_output.std(dim=0).mean() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_is_read_again(tmp_path: Path, name: str) -> None:
    saved(tmp_path / "theirs", CASES[name])
    encoder = load_encoder(tmp_path / "theirs")
    encoder.save_pretrained(tmp_path / "ours")
    pixels = torch.randn(2, 3, 48, 24)
    with torch.no_grad():
        expected = encoder(pixels, interpolate_pos_encoding=True).pooler_output
        for load in (load_encoder, AutoModel.from_pretrained):
            again = load(tmp_path / "ours")
            vectors = again(pixels, interpolate_pos_encoding=True).pooler_output
            assert torch.equal(vectors, expected)


# --- from start to result -------------------------------------------------------------------------


def three_steps(encoder: MimRefinerModel) -> list[float]:
    """The losses of three steps of refinement by what an empty recipe resolves to, of 16 images."""
    torch.manual_seed(0)
    recipe = resolve(RefineRecipe(model="start", dataset="noise"), encoder.config, 16)
    freeze(encoder, recipe.freeze_blocks)
    count = len(recipe.head_blocks)
    width = encoder.config.hidden_size
    refiner = Refiner(
        encoder,
        recipe.head_blocks,
        IdHeads(count, width, 16, 16, 8, seed=0),
        NearestNeighbourQueue(count, 32, 8, seed=0),
        NnaSettings(2, 3, temperature=recipe.temperature),
    )
    trained = [parameter for parameter in refiner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for step in range(3):
        views = [torch.randn(8, 2, 3, 32, 32), torch.randn(8, 1, 3, 16, 16)]
        indices = torch.arange(8) + 8 * step
        result = refiner.backward(views, indices, torch.full((8,), -1))
        losses.append(result.loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_trained_but_positions(tmp_path: Path, name: str) -> None:
    """Heads on what the family pools reach all of it; position tables stay."""
    saved(tmp_path, CASES[name])
    encoder = load_encoder(tmp_path)
    pooling = encoder.config.pooling
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    three_steps(encoder)

    after = encoder.state_dict()
    same = [key for key, tensor in after.items() if torch.equal(tensor, before[key])]
    assert same == [key for key in before if key == "embeddings.position_embeddings"]
    assert encoder.config.pooling == pooling


def test_a_tower_is_refined_from_start_to_verdict(tmp_path: Path) -> None:
    saved(tmp_path / "start", CASES["siglip"])
    noise = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    result = refine(
        [Image.fromarray(picture) for picture in noise],
        model=str(tmp_path / "start"),
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        num_workers=0,
        report_to="none",
    )
    assert result.refined.config.pooling == "attention"
    shipped = load_encoder(tmp_path / "out" / "model")
    assert shipped.config.pooling_head == "attention_mlp"


def test_a_saved_encoder_is_exported(tmp_path: Path) -> None:
    """`torch.export` of what is new in the forward pass."""
    for name in ("dinov3", "siglip", "clip", "aimv2-native"):
        saved(tmp_path / name, CASES[name])
        encoder = load_encoder(tmp_path / name)
        pixels = torch.randn(2, 3, 32, 32)
        exported = torch.export.export(encoder, (pixels,)).module()
        with torch.no_grad():
            vectors = encoder(pixels).pooler_output
            torch.testing.assert_close(exported(pixels).pooler_output, vectors)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("pixio", "pooling but of CLS, patches or attention .pooling='prefix'"),
        ("dinov2-no-qkv-bias", "activation but gelu, .*hidden_act='relu'"),
    ],
)
def test_what_timm_cannot_say_is_refused(tmp_path: Path, name: str, first: str) -> None:
    saved(tmp_path, CASES[name])
    reason = export_timm.refusal(load_encoder(tmp_path).config)
    assert reason is not None
    assert re.search(first, reason)


@pytest.mark.parametrize(
    "name",
    ["dinov2-swiglu", "dinov3", "dinov3-7b", "siglip", "siglip2", "clip", "clip-gelu", "aimv2"],
)
def test_what_timm_can_say_goes_there(tmp_path: Path, name: str) -> None:
    saved(tmp_path / "theirs", CASES[name])
    encoder = load_encoder(tmp_path / "theirs")
    differences = export(tmp_path / "theirs", tmp_path / "timm", "timm")
    assert max(differences.values()) < TOLERANCE
    again = load_encoder(tmp_path / "timm")
    state = again.state_dict()
    equal = {key for key, tensor in encoder.state_dict().items() if torch.equal(tensor, state[key])}
    assert equal == encoder.state_dict().keys()


def test_preprocessing_is_the_sources_own(tmp_path: Path) -> None:
    picture = Image.new("RGB", (60, 40), (200, 100, 50))
    saved(tmp_path, CASES["clip"])
    without = load_encoder(tmp_path).image_processor
    assert without.image_mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])

    theirs = transformers.CLIPImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, image_std=[0.5] * 3
    )
    theirs.save_pretrained(tmp_path)
    ours = load_encoder(tmp_path).image_processor
    expected = theirs(picture, return_tensors="pt").pixel_values
    torch.testing.assert_close(ours(picture, return_tensors="pt").pixel_values, expected)


def test_siglip_2_has_no_size_and_states_the_rest(tmp_path: Path) -> None:
    saved(tmp_path, CASES["siglip2"])
    transformers.Siglip2ImageProcessor(image_std=[0.25] * 3).save_pretrained(tmp_path)
    ours = load_encoder(tmp_path).image_processor
    assert dict(ours.crop_size)["height"] == 32
    assert list(ours.image_mean) == [0.5] * 3 and list(ours.image_std) == [0.25] * 3


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "reason"), REFUSED.items())
def test_other_models_are_refused_by_name(tmp_path: Path, model_type: str, reason: str) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(CheckpointError) as caught:
        load_encoder(tmp_path)
    message = str(caught.value)
    assert f"model_type='{model_type}', not a plain ViT known here" in message
    assert f": {reason}; give one of these" in message
    assert "dinov2" in message and "\n" not in message


def test_two_towers_without_the_one_for_images(tmp_path: Path) -> None:
    saved(tmp_path, CASES["clip-towers"])
    weights = load_file(tmp_path / "model.safetensors")
    text = {key: tensor for key, tensor in weights.items() if key.startswith("text_")}
    save_file(text, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no encoder of the vision tower of .*, only text"):
        load_encoder(tmp_path)

    (tmp_path / "config.json").write_text('{"model_type": "clip", "vision_config": [1]}')
    with pytest.raises(CheckpointError, match=r"has vision_config \[1\]; it must be an object"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("num_hidden_layers", 1), ("num_hidden_layers", 3), ("hidden_size", 16)]
)
def test_weights_of_another_size_than_the_configuration(
    tmp_path: Path, field: str, value: int
) -> None:
    saved(tmp_path, CASES["dinov2"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(CheckpointError, match=f"states {field}={value}, but its weights have"):
        load_encoder(tmp_path)


def test_what_a_tower_leaves_out_has_the_default_of_its_class(tmp_path: Path) -> None:
    """Published configurations of SigLIP state little more than their type."""
    tower = {"hidden_size": 24, "intermediate_size": 16, "image_size": 32}
    model = randomise(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**tower)))
    model.save_pretrained(tmp_path)
    stated = {"model_type": "siglip", "vision_config": tower}
    (tmp_path / "config.json").write_text(json.dumps(stated))

    encoder = load_encoder(tmp_path)
    assert encoder.config.hidden_act == "gelu_pytorch_tanh"
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels).pooler_output, model(pixels).pooler_output)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 100.0}, "rope_theta=100.0 needs position_encoding='rope'"),
        ({"position_encoding": "rope", "rope_theta": 0}, "rope_theta=0 must be a number from 1.0"),
        ({"position_encoding": "rope"}, "with rope_theta=None needs use_cls_token=False"),
        (
            {"position_encoding": "rope", "rope_theta": 100.0, "predictor_layers": 1},
            "predictor_layers=1 needs position_encoding='rope', and rope_theta=None",
        ),
        ({"position_encoding": "sincos", "hidden_size": 36, "num_attention_heads": 2}, None),
        (
            {"position_encoding": "sincos", "hidden_size": 34, "num_attention_heads": 2},
            "position_encoding='sincos' needs hidden_size=34 to be a multiple of 4",
        ),
        ({"pooling": "attention"}, "no attention pooling .pooling_head='none'.; use pooling="),
        ({"use_cls_token": False, "pooling": "prefix"}, "no token in front of the patches"),
        (
            {"pooling_head": "attention", "features": "last_block"},
            "pooling='attention' reads the encoder's output",
        ),
        ({"pooling_head": "cls"}, "pooling_head"),
        ({"position_resampling": "nearest"}, "position_resampling"),
        ({"gated_mlp": 1}, "gated_mlp"),
    ],
)
def test_settings_that_contradict_each_other(fields: dict[str, Any], message: str | None) -> None:
    if message is None:
        MimRefinerConfig(**fields)
        return
    with pytest.raises(ConfigurationError, match=message):
        MimRefinerConfig(**fields)
