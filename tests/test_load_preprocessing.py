"""The preprocessing that `load_encoder` hands out.

The source's own, the family's, else ImageNet's at the native size.
"""

import json
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from golden_cases import facts
from hypothesis import HealthCheck, given, settings
from PIL import Image
from safetensors.torch import save_file
from small_checkpoints import TINY
from torch import Tensor

from mim_refiner_hf.conversion import load_encoder
from mim_refiner_hf.model.configuration_mim_refiner import MimRefinerConfig
from mim_refiner_hf.model.modeling_mim_refiner import MimRefinerModel


@pytest.mark.parametrize(
    ("settings", "size", "crop"),
    [
        ({"size": {"height": 36, "width": 36}}, 36, {"height": 36, "width": 36}),
        ({"size": 36}, 36, {"height": 36, "width": 36}),
        (
            {"size": {"height": 36, "width": 36}, "crop_size": 32, "do_center_crop": True},
            36,
            {"height": 32, "width": 32},
        ),
        (
            {"size": {"shortest_edge": 40}, "crop_size": {"height": 24, "width": 32}},
            40,
            {"height": 24, "width": 32},
        ),
        ({}, 32, {"height": 32, "width": 32}),
    ],
)
def test_processor_is_the_sources_own(
    tmp_path: Path, settings: dict[str, Any], size: int, crop: dict[str, int]
) -> None:
    MimRefinerModel(MimRefinerConfig(**TINY)).save_pretrained(tmp_path)
    settings = settings | {"image_mean": [0.5] * 3, "image_std": [0.4] * 3, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = load_encoder(tmp_path).image_processor
    assert (list(processor.image_mean), list(processor.image_std), processor.resample) == (
        [0.5] * 3,
        [0.4] * 3,
        2,
    )
    assert (dict(processor.size), dict(processor.crop_size)) == ({"shortest_edge": size}, crop)


def test_processor_defaults_to_imagenet_at_native_size(
    goldens: Path, tmp_path: Path, mae_heads: int
) -> None:
    source = goldens / "mae/checkpoint_encoder.pth"
    processor = load_encoder(source, num_heads=mae_heads).image_processor
    size = facts("mae")["image_size"]
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert dict(processor.size) == {"shortest_edge": size}
    assert dict(processor.crop_size) == {"height": size, "width": size}
    assert processor.do_convert_rgb
    MimRefinerModel(
        MimRefinerConfig(**{**TINY, "image_size": [16, 32]}, num_channels=1)
    ).save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert not encoder.image_processor.do_convert_rgb
    pixels = encoder.image_processor(
        torch.zeros(1, 40, 60, dtype=torch.uint8), return_tensors="pt"
    ).pixel_values
    assert pixels.shape == (1, 1, 16, 32)
    torch.testing.assert_close(
        pixels[0, 0, 0, 0], torch.tensor(-(0.485 + 0.456 + 0.406) / (0.229 + 0.224 + 0.225))
    )
    encoder(pixels)


@pytest.mark.parametrize(("flag", "mean"), [(None, 0.5), (False, 0.5), (True, 0.485)])
def test_processor_of_conmim_follows_its_training(
    goldens: Path, tmp_path: Path, flag: bool | None, mean: float
) -> None:
    contents = torch.load(goldens / "conmim/checkpoint.pth", weights_only=True)
    contents["args"] = None if flag is None else Namespace(imagenet_default_mean_and_std=flag)
    torch.save(contents, tmp_path / "conmim.pth")
    processor = load_encoder(tmp_path / "conmim.pth").image_processor
    assert (processor.image_mean[0], processor.image_std[0]) == (
        mean,
        0.5 if mean == 0.5 else 0.229,
    )


def _pixels(preprocessing: dict[str, Any], picture: Image.Image, tmp_path: Path) -> Tensor:
    """Pixels of a saved model with this preprocessing."""
    MimRefinerModel(MimRefinerConfig(**TINY)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return load_encoder(tmp_path).image_processor(picture, return_tensors="pt").pixel_values


@pytest.mark.parametrize("rescale", [None, False, True])
@pytest.mark.parametrize("factor", [None, 1 / 255, 1 / 127.5, 1.0])
@pytest.mark.parametrize("normalise", [None, False, True])
@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.25), (127.5, 60.0)])
def test_pixels_are_scaled_and_normalised_as_the_source_says(
    rescale: bool | None,
    factor: float | None,
    normalise: bool | None,
    mean: float,
    std: float,
    tmp_path: Path,
) -> None:
    """Against the arithmetic of transformers' processors: p * factor, then (p - mean) / std."""
    stated = {"do_rescale": rescale, "rescale_factor": factor, "do_normalize": normalise}
    said = {key: value for key, value in stated.items() if value is not None}
    said |= {"image_mean": [mean] * 3, "image_std": [std] * 3}
    levels = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3) % 256
    found = _pixels(said, Image.fromarray(levels.astype(np.uint8)), tmp_path)

    expected = levels.astype(np.float64)
    if rescale is not False:
        expected *= 1 / 255 if factor is None else factor
    if normalise is not False:
        expected = (expected - mean) / std
    np.testing.assert_allclose(found[0].permute(1, 2, 0), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rescale_factor", 0),
        ("rescale_factor", "1/255"),
        ("crop_pct", -1),
        ("do_flip_channel_order", True),
        ("do_pad", True),
        ("rescale_offset", True),
    ],
)
def test_preprocessing_that_is_not_ours_is_refused_by_its_key(
    key: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"says {key} "):
        _pixels({key: value, "size": 32}, Image.new("RGB", (32, 32)), tmp_path)


def test_the_processor_file_of_transformers_5_comes_first(tmp_path: Path) -> None:
    MimRefinerModel(MimRefinerConfig(**TINY)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3}))
    nested = {"image_processor": {"image_mean": [0.5] * 3}, "processor_class": "ViTProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert list(load_encoder(tmp_path).image_processor.image_mean) == [0.5] * 3
    # of other inputs
    (tmp_path / "processor_config.json").write_text('{"tokenizer_class": "a"}')
    assert list(load_encoder(tmp_path).image_processor.image_mean) == [0.1] * 3


# --- which files are the weights


def _saved(folder: Path, seed: int, **how: Any) -> MimRefinerModel:
    torch.manual_seed(seed)
    model = MimRefinerModel(MimRefinerConfig(**TINY))
    model.save_pretrained(folder, **how)
    return model


@pytest.mark.parametrize("kind", ["one file", "shards", "torch"])
@given(name=st.from_regex(r"(model|pytorch_model)[-_.a-z0-9 ()]{1,12}", fullmatch=True))
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_beside_the_weights_are_other_models(kind: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "m"
        model = _saved(folder, 0, max_shard_size="20KB" if kind == "shards" else "1GB")
        other = _saved(Path(scratch) / "other", 1)
        if kind == "torch":
            (folder / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
        for suffix in (".safetensors", ".bin"):
            path = folder / f"{name}{suffix}"
            if path.exists() or path.name in ("model.safetensors", "pytorch_model.bin"):
                continue
            if suffix == ".bin":
                torch.save(other.state_dict(), path)
            else:
                save_file(other.state_dict(), path, metadata={"format": "pt"})
        loaded = load_encoder(folder).state_dict()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(loaded[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "missing.safetensors"])
def test_an_index_that_names_a_file_that_is_not_there_is_refused(
    shard: str, tmp_path: Path
) -> None:
    _saved(tmp_path / "m", 0, max_shard_size="20KB")
    _saved(tmp_path, 1)
    (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = tmp_path / "m/model.safetensors.index.json"
    stated = json.loads(index.read_text())
    stated["weight_map"][next(iter(stated["weight_map"]))] = shard
    index.write_text(json.dumps(stated))
    with pytest.raises(ValueError, match="which is missing there"):
        load_encoder(tmp_path / "m")
