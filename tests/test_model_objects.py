"""`load_encoder` of model objects in every state, and of images of other channels than three."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from random_weights import randomise
from test_export_back import EVERY
from test_transformers_encoders import NAFLEX, SHAPE, TOLERANCE, WITH_MLP, saved, their_output

from mim_refiner_hf.conversion import CheckpointError, load_encoder
from mim_refiner_hf.publishing.export import export


def dinov2() -> Any:
    return randomise(transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE)))


def tokens(model: Any, channels: int = 3) -> torch.Tensor:
    """What a model in evaluation mode makes of the same images."""
    pixels = torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(pixels).last_hidden_state


@pytest.mark.parametrize("state", ["train", "compiled", "parallel", "both", "merged", "frozen"])
def test_the_model_inside_is_read(state: str) -> None:
    model = dinov2()
    expected = tokens(model)
    given: Any = model
    if state == "train":
        given = model.train()
    if state in ("compiled", "both"):
        given = torch.compile(given)
    if state in ("parallel", "both"):
        given = torch.nn.DataParallel(given)
    if state == "frozen":
        given = model.requires_grad_(False)
    if state == "merged":
        adapted = with_adapters(model)
        expected = tokens(adapted)
        given = adapted.merge_and_unload()
    was_training = given.training
    encoder = load_encoder(given)
    torch.testing.assert_close(tokens(encoder), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert not encoder.training and given.training == was_training


def with_adapters(model: Any) -> Any:
    # of the extra dev
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, settings).eval()


def test_adapters_are_to_be_merged_first() -> None:
    adapted = with_adapters(dinov2())
    for given in (adapted, adapted.base_model.model, torch.compile(adapted)):
        with pytest.raises(
            CheckpointError, match="adapters beside its weights; give what"
        ) as caught:
            load_encoder(given)
        assert "\n" not in str(caught.value)


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        models = [
            transformers.ViTModel(transformers.ViTConfig(**WITH_MLP)),
            timm.create_model("vit_tiny_patch16_224", depth=1),
        ]
    for model in models:
        with pytest.raises(CheckpointError, match="is on the device meta and has no weights; load"):
            load_encoder(model)


# --- channels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize(
    "name", ["dinov2", "dinov3", "siglip", "siglip2", "clip", "pixio", "aimv2", "vit", "beit"]
)
def test_other_channels_than_three(tmp_path: Path, name: str, channels: int) -> None:
    case = copy.copy(EVERY[name])
    case = case._replace(settings={**case.settings, "num_channels": channels})
    model = saved(tmp_path / "theirs", case)
    encoder = load_encoder(tmp_path / "theirs")
    assert encoder.config.num_channels == channels
    assert len(encoder.image_processor.image_mean) == channels
    pixels = torch.randn(2, channels, 32, 32)
    theirs = their_output(model, pixels, case.resize)
    with torch.no_grad():
        ours = encoder(pixels).last_hidden_state
    torch.testing.assert_close(ours, theirs.last_hidden_state, atol=TOLERANCE, rtol=TOLERANCE)
    assert max(export(tmp_path / "theirs", tmp_path / "native", "native").values()) < TOLERANCE


def test_patches_that_were_cut_out_tell_their_channels() -> None:
    """Of 4 x 4 x 12 and 8 x 8 x 3 pixels the images of three channels are meant."""
    for channels, patch in ((3, 8), (1, 8), (5, 8), (2, 6), (3, 14)):
        config = transformers.Siglip2VisionConfig(
            **{**NAFLEX, "num_channels": channels, "patch_size": patch}
        )
        encoder = load_encoder(randomise(transformers.Siglip2VisionModel(config)))
        assert (encoder.config.num_channels, encoder.config.patch_size) == (channels, patch)
