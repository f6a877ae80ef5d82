"""`export --to native`: back to the class of transformers, loaded by it, with the same outputs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from random_weights import randomise
from small_checkpoints import TINY
from test_transformers_encoders import (
    CASES,
    TOLERANCE,
    WITH_MLP,
    Case,
    cls_of,
    saved,
    their_output,
    three_steps,
    tower_of,
)
from transformers import AutoImageProcessor, AutoModel

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel, load_encoder
from mim_refiner_hf.cli import main
from mim_refiner_hf.model.configuration_mim_refiner import ConfigurationError
from mim_refiner_hf.publishing import export_back, save_model_folder
from mim_refiner_hf.publishing.export import ExportError, export
from mim_refiner_hf.publishing.sentence_files import SENTENCE_FILES

RELATIVE = {**WITH_MLP, "layer_norm_eps": 1e-5, "use_relative_position_bias": True}
OLDER = {
    # the pooler is of a pre-training that transformers' class draws at random
    "vit": Case("ViT", WITH_MLP, cls_of, resize=True),
    "vit_mae": Case("ViTMAE", {**WITH_MLP, "mask_ratio": 0.0}, cls_of, resize=True),
    "beit": Case("Beit", {**RELATIVE, "use_mean_pooling": False}, resize=True),
    "beit-absolute": Case(
        "Beit",
        {
            **WITH_MLP,
            "use_absolute_position_embeddings": True,
            "layer_scale_init_value": 0.0,
            "use_mean_pooling": False,
        },
        resize=True,
    ),
    "beit-mean": Case("Beit", RELATIVE, resize=True),
    "data2vec": Case("Data2VecVision", RELATIVE, cls_of, resize=True),
    "data2vec-norm": Case(
        "Data2VecVision", {**RELATIVE, "use_mean_pooling": False}, cls_of, resize=True
    ),
}
EVERY = {**CASES, **OLDER}
# where the class masks patches, or pools in another way than ours
ELSEWHERE = {"vit_mae": "ViTModel"}
# classes that pool nothing
WITHOUT_VECTOR = ("ViTMSN", "IJepa", "Data2VecVision")
REFINED = ("dinov2-swiglu", "dinov3", "deit", "siglip", "clip", "pixio", "aimv2", "vit", "beit")


def compare(name: str, encoder: MimRefinerModel, folder: Path) -> transformers.PreTrainedModel:
    """The class of a folder, after its tokens and vectors were compared with the encoder's."""
    case = EVERY[name]
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    for size in ((32, 32), (48, 24), (24, 40)):
        if case.name.startswith("Aimv2") and size != (32, 32) and name != "aimv2-native":
            continue
        pixels = torch.randn(2, 3, *size)
        theirs = their_output(model, pixels, case.resize)
        with torch.no_grad():
            ours = encoder(pixels, interpolate_pos_encoding=True)
        kwargs = {"atol": TOLERANCE, "rtol": TOLERANCE, "msg": f"{name} at {size}"}
        torch.testing.assert_close(theirs.last_hidden_state, ours.last_hidden_state, **kwargs)
        pooled = theirs.get("pooler_output")
        if pooled is not None:
            torch.testing.assert_close(pooled, ours.pooler_output, **kwargs)
    return model


@pytest.mark.parametrize("name", EVERY)
def test_every_class_gets_its_encoder_back(tmp_path: Path, name: str) -> None:
    theirs = tower_of(saved(tmp_path / "theirs", EVERY[name]))
    encoder = load_encoder(tmp_path / "theirs")
    differences = export(tmp_path / "theirs", tmp_path / "native", "native")
    assert max(differences.values()) < TOLERANCE

    files = {path.name for path in (tmp_path / "native").iterdir()}
    settings = {"config.json", "preprocessor_config.json"}
    read_by_others = set(SENTENCE_FILES) if "features" in differences else set()
    assert files == {"model.safetensors", "README.md", *settings, *read_by_others}
    assert "auto_map" not in (tmp_path / "native/config.json").read_text()
    model = compare(name, encoder, tmp_path / "native")
    assert type(model).__name__ == ELSEWHERE.get(name, type(theirs).__name__)
    pools_not = EVERY[name].name in WITHOUT_VECTOR or name == "siglip-no-head"
    assert ("features" in differences) == (not pools_not and name != "aimv2-no-head")

    # what is not folded into CLS or registers has its very value again
    before = theirs.state_dict()
    after = model.state_dict()
    folded = ("token", "embedding", "pooler")
    kept = [key for key in after if not any(part in key for part in folded) and key in before]
    assert all(torch.equal(after[key], before[key]) for key in kept)
    # another class may have other names
    assert len(kept) > 15 or name in ELSEWHERE


@pytest.mark.parametrize("name", EVERY)
def test_what_is_exported_is_the_same_encoder(tmp_path: Path, name: str) -> None:
    saved(tmp_path / "theirs", EVERY[name])
    encoder = load_encoder(tmp_path / "theirs")
    export(tmp_path / "theirs", tmp_path / "native", "native")
    again = load_encoder(tmp_path / "native")
    state = again.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in encoder.state_dict().items())

    settings = [loaded.config.to_diff_dict() for loaded in (encoder, again)]
    different = {
        key for key in settings[0] | settings[1] if settings[0].get(key) != settings[1].get(key)
    }
    moved = {"source_model_type"} if name in ELSEWHERE else set()
    assert different <= {"architectures", "layer_scale_init", "dtype"} | moved


@pytest.mark.parametrize("name", REFINED)
def test_a_refined_encoder_goes_back_too(tmp_path: Path, name: str) -> None:
    theirs = tower_of(saved(tmp_path / "theirs", EVERY[name]))
    encoder = load_encoder(tmp_path / "theirs")
    three_steps(encoder)
    encoder.eval()
    save_model_folder(tmp_path / "model", encoder, encoder.image_processor)
    export(tmp_path / "model", tmp_path / "native", "native")
    model = compare(name, encoder, tmp_path / "native")
    assert type(model) is type(theirs)
    before = theirs.state_dict()
    trained = [
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    ]
    assert any(".1." in key for key in trained)


def test_the_class_reads_the_same_pixels(tmp_path: Path) -> None:
    picture = Image.effect_mandelbrot((60, 44), (-2, -1.5, 1, 1.5), 60)
    for name in ("dinov2", "clip", "siglip2"):
        saved(tmp_path / name, CASES[name])
        ours = load_encoder(tmp_path / name).image_processor
        export(tmp_path / name, tmp_path / f"{name}-native", "native")
        native = AutoImageProcessor.from_pretrained(tmp_path / f"{name}-native")
        if name == "siglip2":
            assert type(native).__name__.startswith("Siglip2ImageProcessor")
            assert (native.patch_size, native.max_num_patches) == (8, 16)
            continue
        pixels = [made(picture.convert("RGB"), return_tensors="pt") for made in (ours, native)]
        assert torch.equal(pixels[0].pixel_values, pixels[1].pixel_values)


# --- encoders that came from no class -------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "ViTModel"),
        ({"layer_scale_init": 1.0, "intermediate_size": 128}, "BeitModel"),
        ({"final_norm": False}, "Data2VecVisionModel"),
        ({"num_register_tokens": 1}, "DeiTModel"),
        ({"use_cls_token": False}, "IJepaModel"),
        ({"num_register_tokens": 3, "pooling": "prefix", "intermediate_size": 128}, "PixioModel"),
        ({"position_encoding": "rope", "rope_theta": 100, "layer_scale_init": 1}, "DINOv3ViTModel"),
        ({"image_size": [16, 32]}, "ViTModel"),
    ],
)
def test_a_class_is_found_by_what_it_computes(
    tmp_path: Path, settings: dict[str, Any], kind: str
) -> None:
    encoder = randomise(MimRefinerModel(MimRefinerConfig(**{**TINY, **settings})))
    height, width = encoder.config.image_hw
    processor = MimRefinerImageProcessor(crop_size={"height": height, "width": width})
    save_model_folder(tmp_path / "model", encoder, processor)
    export(tmp_path / "model", tmp_path / "native", "native")
    stated = json.loads((tmp_path / "native/config.json").read_text())
    assert stated["architectures"] == [kind]


# --- refusals, failures, the command --------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"source_model_type": "vit", "pooling": "mean"},
            r"transformers' ViTModel has no pooling='mean' \(only 'cls'\); --to onnx takes every",
        ),
        (
            {"source_model_type": "vit_mae", "features": "last_block"},
            r"ViTModel has no features='last_block' \(only 'output'\)",
        ),
        (
            {"norm_placement": "post", "embedding_norm": True, "final_norm": False},
            r"no norm_placement='post' \(only 'pre'\), and no embedding_norm=True",
        ),
        (
            {
                "source_model_type": "siglip_vision_model",
                "use_cls_token": False,
                "pooling_head": "attention_mlp",
                "pooling": "mean",
            },
            r"SiglipVisionModel has no pooling='mean' \(only 'attention' with pooling_head=",
        ),
        (
            {"source_model_type": "clip_vision_model"},
            r"CLIPVisionModel has no patch_bias=True \(only False\), and no embedding_norm=False",
        ),
        (
            {"source_model_type": "dinov2", "layer_scale_init": 1.0, "intermediate_size": 100},
            r"no intermediate_size=100 \(only what a whole mlp_ratio makes of hidden_size=32\)",
        ),
        (
            {
                "source_model_type": "dinov2",
                "layer_scale_init": 1.0,
                "gated_mlp": True,
                "intermediate_size": 88,
            },
            r"Dinov2Model has no hidden_act='gelu' \(only 'silu' with gated_mlp=True\)",
        ),
        (
            {"source_model_type": "dinov3_vit", "layer_scale_init": 1.0},
            r"no position_encoding='absolute' \(only 'rope'\), and no rope_theta=None",
        ),
        (
            {"source_model_type": "beit", "image_size": [16, 32], "position_encoding": "relative"},
            r"BeitModel has no image_size=\[16, 32\] \(only a square\)",
        ),
        (
            {"source_model_type": "deit", "layer_scale_init": 0.5},
            r"no num_register_tokens=0 \(only 1\), and no layer_scale_init=0.5 \(only None\)",
        ),
    ],
)
def test_what_a_class_lacks_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    encoder = randomise(MimRefinerModel(MimRefinerConfig(**{**TINY, **settings})))
    save_model_folder(tmp_path / "model", encoder, MimRefinerImageProcessor())
    with pytest.raises(ValueError, match=message) as caught:
        export(tmp_path / "model", tmp_path / "native", "native")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "native").exists()


def test_a_difference_at_another_size_alone_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registers with DINOv2's own resampling have no class; pretend that they had."""
    saved(tmp_path / "theirs", CASES["dinov2-registers"])
    encoder = load_encoder(tmp_path / "theirs")
    encoder.config.position_resampling = "bicubic"
    save_model_folder(tmp_path / "model", encoder, encoder.image_processor)
    refusal = r"no position_resampling='bicubic' \(only 'bicubic_antialias'\)"
    with pytest.raises(ValueError, match=refusal):
        export(tmp_path / "model", tmp_path / "native", "native")

    kind = export_back.class_named("Dinov2WithRegistersModel")
    monkeypatch.setattr(export_back, "class_of", lambda config: kind)
    monkeypatch.setattr(export_back, "other_size", lambda config: (16, 16))
    with pytest.raises(ExportError, match="Dinov2WithRegistersModel: tokens differ by"):
        export(tmp_path / "model", tmp_path / "native", "native")
    assert not (tmp_path / "native").exists()


def test_a_weight_without_a_place_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path, OLDER["vit"])
    encoder = load_encoder(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    layout = next(entry for entry in export_back.LAYOUTS if "vit" in entry.model_types)
    weights = {**encoder.state_dict(), "layers.7.norm1.weight": torch.ones(32)}
    with pytest.raises(KeyError, match=r"no place for layers\.7\.norm1\.weight"):
        export_back.reverse_layout(layout, model, weights)


@pytest.mark.parametrize("value", ["", "no such\nthing", "x" * 41, 3, ["vit"]])
def test_a_source_that_is_no_model_type_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="source_model_type") as caught:
        MimRefinerConfig(source_model_type=value)
    assert "\n" not in str(caught.value)


def test_a_source_of_a_later_version_counts_as_none(tmp_path: Path) -> None:
    config = MimRefinerConfig(**TINY, source_model_type="vit_of_2030")
    save_model_folder(tmp_path / "model", MimRefinerModel(config), MimRefinerImageProcessor())
    assert load_encoder(tmp_path / "model").config.source_model_type == "vit_of_2030"
    assert export_back.refusal(config) is None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "theirs", CASES["dinov2"])
    words = ["export", str(tmp_path / "theirs"), str(tmp_path / "native"), "--to", "native"]
    assert main(words) == 0
    assert "loaded back as native, it differs from" in capsys.readouterr().out
    card = (tmp_path / "native/README.md").read_text()
    assert "library_name: transformers" in card and "--to native" in card


# --- beside the result of a run -------------------------------------------------------------------


def run_words(tmp_path: Path, name: str) -> list[str]:
    """A refinement of three steps of the case `name` on 16 images of noise, saved as native."""
    saved(tmp_path / "start", EVERY[name])
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    for number, picture in enumerate(noise):
        Image.fromarray(picture).save(tmp_path / f"photos/{number}.png")
    return [
        *("refine", str(tmp_path / "photos"), "--model", str(tmp_path / "start")),
        *("--output_dir", str(tmp_path / "out"), "--max_steps", "3", "--num_workers", "0"),
        *("--report_to", "none", "--save_as", "native"),
    ]


def test_a_run_leaves_its_result_as_the_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run_words(tmp_path, "dinov2")) == 0
    assert f"The same for native: {tmp_path / 'out/native'}" in capsys.readouterr().out
    shipped = load_encoder(tmp_path / "out/model")
    assert type(compare("dinov2", shipped, tmp_path / "out/native")).__name__ == "Dinov2Model"


def test_what_cannot_be_saved_so_is_said_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*run_words(tmp_path, "dinov2"), "--pooling", "mean"]
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "--save_as native: transformers' Dinov2Model has no pooling='mean'" in message
    assert main([*words, "--dry_run", "true"]) == 2
    assert not (tmp_path / "out").exists()

    (tmp_path / "out/native").mkdir(parents=True)
    (tmp_path / "out/native/photo.jpg").write_bytes(b"mine")
    assert main(words[:-2]) == 2
    assert "out/native" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main([*words[:-3], "tf"])
    assert caught.value.code == 2
