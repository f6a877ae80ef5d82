"""The preprocessing that `load_encoder` hands out.

The source's own, the family's, else ImageNet's at the native size.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import facts
from small_checkpoints import TINY

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
