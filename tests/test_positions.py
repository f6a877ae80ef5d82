"""Grids that are no squares, against timm's own models of the same weights."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from mim_refiner_hf.conversion import load_encoder

SIZES = [(16, 64), (24, 16), (8, 72), (48, 32), (32, 32)]


def vit(size: tuple[int, int], **options: Any) -> Any:
    """A small ViT of timm with patches of 8 pixels and positions that are no zeros."""
    torch.manual_seed(0)
    shape = {"patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3, "num_classes": 0}
    model = timm.models.VisionTransformer(img_size=size, **shape, **options).eval()
    for name, tensor in model.named_parameters():
        if name in ("pos_embed", "cls_token", "reg_token"):
            nn.init.normal_(tensor, std=0.5)
    return model


def saved(folder: Path, contents: Any) -> Path:
    torch.save(contents, folder / "x.pth")
    return folder / "x.pth"


def assert_same_tokens(encoder: Any, model: Any, size: tuple[int, int]) -> None:
    with torch.no_grad():
        pixels = torch.randn(2, 3, *size)
        found: Tensor = encoder(pixels).last_hidden_state
        torch.testing.assert_close(found, model.forward_features(pixels), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 3},
        {"reg_tokens": 3, "no_embed_class": True},
    ],
)
def test_a_stated_size_tells_the_grid(
    size: tuple[int, int], options: dict[str, Any], tmp_path: Path
) -> None:
    model = vit(size, **options)
    encoder = load_encoder(saved(tmp_path, model.state_dict()), image_size=size)
    assert encoder.config.image_hw == size
    assert_same_tokens(encoder, model, size)


@pytest.mark.parametrize("size", SIZES)
def test_a_file_that_states_its_size_needs_no_argument(
    size: tuple[int, int], tmp_path: Path
) -> None:
    model = vit(size)
    contents = {"model": model.state_dict(), "args": Namespace(input_size=list(size))}
    assert_same_tokens(load_encoder(saved(tmp_path, contents)), model, size)


def test_another_size_than_the_files_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path = saved(tmp_path, vit((16, 64)).state_dict())
    with pytest.raises(ValueError, match=r"is 8 patches .* positions for 17, or 16 beside 1"):
        load_encoder(path, image_size=(16, 32))
    for wrong in ((16, 60), (0, 8), "big", (8, 8, 8)):
        with pytest.raises(ValueError, match="image_size"):
            load_encoder(path, image_size=wrong)


def test_a_square_that_would_be_a_guess_is_refused(tmp_path: Path) -> None:
    # CLS and 3 x 5 patches, or 4 x 4 patches
    path = saved(tmp_path, vit((24, 40)).state_dict())
    with pytest.raises(ValueError, match=r"16 positions .* give image_size, height and width"):
        load_encoder(path)
    assert_same_tokens(load_encoder(path, image_size=(24, 40)), vit((24, 40)), (24, 40))


def test_a_square_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    encoder = load_encoder(saved(tmp_path, vit((16, 64)).state_dict()))
    assert encoder.config.grid == (4, 4)
    assert "positions for 4 x 4 patches, taken as a square" in caplog.text
