"""Sizes of images: a line that says which are allowed, or what the class makes of odd ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from random_weights import randomise
from test_export_back import EVERY
from test_transformers_encoders import TOLERANCE, WITH_MLP, saved, their_output

from mim_refiner_hf import MimRefinerConfig, RefineRecipe, load_encoder
from mim_refiner_hf.cli import main
from mim_refiner_hf.conversion import CheckpointError
from mim_refiner_hf.model.configuration_mim_refiner import LARGEST_SIDE, ConfigurationError
from mim_refiner_hf.pretraining import recipe as pretraining
from mim_refiner_hf.publishing.export import export
from mim_refiner_hf.refinement.resolve import resolve

NO_SIZES = [0, -8, 30, 4, "big", "32", [32, 32, 32], [32], [32, 0], (33, 33), True, [True, 32]]
NO_SIZES += [32.0, float("nan"), 10**9, 10**400, {"height": 32}, [], "x" * 10_000, [[32, 32]]]


def bare(folder: Path) -> Path:
    """A file of a tiny ViT with positions for 4 x 4 patches of 8 pixels and CLS."""
    shape = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 192, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", **shape, num_classes=0)
    torch.save(model.state_dict(), folder / "bare.pth")
    return folder / "bare.pth"


@pytest.mark.parametrize("name", ["bare", "dinov3", "beit"])
def test_what_is_no_size_is_refused_by_its_loader(tmp_path: Path, name: str) -> None:
    source = bare(tmp_path) if name == "bare" else tmp_path
    if name != "bare":
        saved(tmp_path, EVERY[name])
    for size in NO_SIZES:
        with pytest.raises(CheckpointError) as caught:
            load_encoder(source, image_size=size)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 500
        assert "height and width, in whole pixels, multiples of the patch size 8 up to" in message


def test_a_size_that_is_not_the_tables_is_refused_with_one_that_is(tmp_path: Path) -> None:
    for size in (64, [40, 24], (8, 8)):
        with pytest.raises(CheckpointError, match=r"positions for 17, .*; give image_size=32"):
            load_encoder(bare(tmp_path), image_size=size)
    # 4 x 6 patches and CLS, which could be 5 x 5; then 4 x 7
    shape = {"img_size": (32, 48), "patch_size": 8, "depth": 1, "embed_dim": 192, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", **shape, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match="no square; give image_size, height and width"):
        load_encoder(tmp_path / "wide.pth")
    assert load_encoder(tmp_path / "wide.pth", image_size=[32, 48]).config.grid == (4, 6)
    model = timm.create_model("vit_tiny_patch16_224", **shape | {"img_size": (32, 56)})
    model.reset_classifier(0)
    torch.save(model.state_dict(), tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match=r"; give such as image_size=\[32, 56\]"):
        load_encoder(tmp_path / "wide.pth", image_size=64)
    with pytest.raises(CheckpointError, match="no square; give image_size, height and width"):
        load_encoder(tmp_path / "wide.pth")


def test_a_table_of_relative_positions_is_for_one_size(tmp_path: Path) -> None:
    saved(tmp_path, EVERY["beit"])
    with pytest.raises(CheckpointError, match=r"image_size=64 is 64 patches, .* for 16 patches"):
        load_encoder(tmp_path, image_size=64)
    # nor has it any to contradict where positions are computed
    saved(tmp_path, EVERY["dinov3"])
    assert load_encoder(tmp_path, image_size=(40, 24)).config.image_hw == (40, 24)


@pytest.mark.parametrize("size", NO_SIZES)
def test_what_is_no_size_in_a_configuration(tmp_path: Path, size: Any) -> None:
    saved(tmp_path, EVERY["vit"])
    stated = json.loads((tmp_path / "config.json").read_text())
    # json refuses numbers that have no end by itself
    if size != 10**400:
        (tmp_path / "config.json").write_text(json.dumps({**stated, "image_size": size}))
        # a class of transformers takes no part of a patch
        if size != (33, 33):
            with pytest.raises(CheckpointError, match="image_size") as caught:
                load_encoder(tmp_path)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    with pytest.raises(ConfigurationError, match="image_size") as refused:
        MimRefinerConfig(image_size=size, patch_size=8)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "image_size=0: must be at least 1 and at most 8192"),
        (-8, "image_size=-8: must be at least 1 and at most 8192"),
        (10**9, "image_size=1000000000: must be at least 1 and at most 8192"),
        (30, "patch_size=8: must divide image_size=30; use image_size=24"),
        (4, "patch_size=8: must divide image_size=4; use image_size=8"),
        ("big", "must be of the type int"),
        ([32, 32, 32], "must be of the type int"),
    ],
)
def test_the_recipes(size: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pretraining.PretrainRecipe(image_size=size, patch_size=8)
    config = MimRefinerConfig(image_size=32, patch_size=8)
    for name in ("global_size", "local_size"):
        with pytest.raises(ValueError, match=f"{name}=.* must be (at |a multiple|of the type)"):
            resolve(RefineRecipe(model="a", dataset="b", **{name: size}), config, 100)
    assert pretraining._LARGEST_SIDE == LARGEST_SIDE


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(bare(tmp_path)), str(tmp_path / "out"), "--image_size"]
    for size in (["0"], ["30"], ["32", "32", "32"], ["1000000000"]):
        assert main([*words, *size]) == 2
        message = capsys.readouterr().err
        assert "--image_size" in message and "multiples of the patch size 8" in message
    assert main([*words, "64"]) == 2
    assert "give --image_size 32" in capsys.readouterr().err
    for size in (["32"], ["32", "32"]):
        assert main([*words, *size]) == 0
    with pytest.raises(SystemExit) as caught:
        main([*words, "big"])
    assert caught.value.code == 2


# --- images that are no whole number of patches ---------------------------------------------------


@pytest.mark.parametrize("name", ["siglip", "vit", "clip", "dinov2", "dinov3"])
def test_a_class_cuts_its_images_to_whole_patches(tmp_path: Path, name: str) -> None:
    """As SigLIP does at 384 pixels with patches of 14: the last 6 are read by no patch."""
    case = EVERY[name]._replace(settings={**EVERY[name].settings, "image_size": 38})
    model = saved(tmp_path / "theirs", case)
    encoder = load_encoder(tmp_path / "theirs")
    assert encoder.config.cut_to_patches and encoder.config.grid == (4, 4)
    encoder.save_pretrained(tmp_path / "ours")
    encoder.image_processor.save_pretrained(tmp_path / "ours")

    for size in ((38, 38), (32, 32), (45, 30)):
        if name == "vit" and size == (32, 32):
            continue
        pixels = torch.randn(2, 3, *size)
        resize = case.resize and size != (38, 38)
        theirs = their_output(model, pixels, resize)
        for ours in (encoder, load_encoder(tmp_path / "ours")):
            with torch.no_grad():
                output = ours(pixels, interpolate_pos_encoding=True)
            expected = {"atol": TOLERANCE, "rtol": TOLERANCE, "msg": f"{name} at {size}"}
            torch.testing.assert_close(
                output.last_hidden_state, theirs.last_hidden_state, **expected
            )
            torch.testing.assert_close(output.pooler_output, case.pooled(theirs), **expected)

    differences = export(tmp_path / "theirs", tmp_path / "native", "native")
    assert max(differences.values()) < TOLERANCE
    again = transformers.AutoConfig.from_pretrained(tmp_path / "native")
    assert again.image_size == 38
    # views are whole patches, the largest of them too
    resolve(RefineRecipe(model="a", dataset="b", local_views=2), encoder.config, 100)


def test_a_model_of_timm_does_too(tmp_path: Path) -> None:
    shape = {"img_size": 38, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}
    model = randomise(timm.create_model("vit_base_patch16_siglip_224", **shape, num_classes=0))
    encoder = load_encoder(model)
    pixels = torch.randn(2, 3, 38, 38)
    with torch.no_grad():
        ours = encoder(pixels).pooler_output
        torch.testing.assert_close(ours, model(pixels), atol=TOLERANCE, rtol=TOLERANCE)


def test_a_stated_size_that_is_not_the_tables(tmp_path: Path) -> None:
    saved(tmp_path, EVERY["vit"])
    stated = json.loads((tmp_path / "config.json").read_text())
    assert stated["image_size"] == WITH_MLP["image_size"]
    for size in (64, 24, [40, 24]):
        (tmp_path / "config.json").write_text(json.dumps({**stated, "image_size": size}))
        with pytest.raises(CheckpointError, match="but its weights have positions for 16 patches"):
            load_encoder(tmp_path)
