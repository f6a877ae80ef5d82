"""A config.json that contradicts its weights: one line says so, or the class says the same.

Every key of every class of transformers that is read is changed, or left out, and the result
compared with what transformers' own class makes of the same folder.
"""

import json
import logging
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export_back import EVERY
from test_transformers_encoders import TOLERANCE, saved, their_output, tower_of
from transformers import AutoModel

from mim_refiner_hf import MimRefinerModel
from mim_refiner_hf.conversion import CheckpointError, load_encoder

# keys of parts that are no encoder, of how the class is called, and of its random masks
ELSEWHERE = {"use_mask_token", "pooler_output_size", "add_fpn", "mask_ratio"}
# ranges that we refuse to leave, though a class would go on: images cut off, no epsilon
OUT_OF_RANGE = "describes an encoder that cannot be built"
LEFT_OUT = object()


def others(value: Any) -> list[Any]:
    """Values that a key could have instead."""
    if isinstance(value, bool):
        return [not value, LEFT_OUT]
    if isinstance(value, int):
        return [value + 1, 2 * value, max(value - 1, 0), LEFT_OUT]
    if isinstance(value, float):
        return [2 * value + 0.5, 0.0, LEFT_OUT]
    if isinstance(value, str):
        return ["relu" if "lu" in value else value, LEFT_OUT]
    return [LEFT_OUT]


def changes(name: str, folder: Path) -> list[tuple[str, Any, dict[str, Any]]]:
    """For every key of the case's own one other value, and the whole config.json with it."""
    model = saved(folder, EVERY[name])
    stated = json.loads((folder / "config.json").read_text())
    tower = stated.get("vision_config", stated)
    kind = tower_of(model).config
    found = []
    for key in sorted(type(kind).__annotations__.keys() - ELSEWHERE):
        if key.startswith("_"):
            continue
        values = others(getattr(kind, key))
        # not always the first, and the same in every run
        value = values[zlib.crc32(f"{name} {key}".encode()) % len(values)]
        changed = {**tower, key: value}
        if value is LEFT_OUT:
            changed.pop(key)
        whole = {**stated, "vision_config": changed} if "vision_config" in stated else changed
        found.append((key, value, whole))
    return found


def outputs(encoder: MimRefinerModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        output = encoder(pixels, interpolate_pos_encoding=True)
    return output.last_hidden_state, output.pooler_output


@pytest.mark.parametrize("name", EVERY)
def test_the_class_says_the_same_or_a_line_is_said(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "mim_refiner_hf")
    pixels = torch.randn(1, 3, 32, 32)
    lines = 0
    for key, value, stated in changes(name, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(stated))
        caplog.clear()
        try:
            encoder = load_encoder(tmp_path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            lines += OUT_OF_RANGE not in str(error)
            continue
        said = [record.getMessage() for record in caplog.records]
        said = [line for line in said if "but its weights have" in line]
        if said:
            assert len(said) == 1 and "the weights are taken" in said[0]
            lines += 1
            continue

        # nothing was said: then there is nothing to say
        model, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), f"{key}={value!r}"
        theirs = their_output(model, pixels, EVERY[name].resize)
        tokens, vector = outputs(encoder, pixels)
        expected = {"atol": TOLERANCE, "rtol": TOLERANCE, "msg": f"{name} with {key}={value!r}"}
        torch.testing.assert_close(tokens, theirs.last_hidden_state, **expected)
        torch.testing.assert_close(vector, EVERY[name].pooled(theirs), **expected)
    assert lines


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("dinov2", "mlp_ratio", 3, "mlp_ratio=3, but its weights have intermediate_size=128; "),
        ("dinov2", "use_swiglu_ffn", True, "use_swiglu_ffn=True, .* have gated_mlp=False; correct"),
        ("dinov3", "num_register_tokens", 2, "num_register_tokens=2, .* num_register_tokens=4; "),
        ("dinov3-7b", "use_gated_mlp", False, "use_gated_mlp=False, .* have gated_mlp=True; "),
        ("pixio", "n_cls_tokens", 4, "n_cls_tokens=4, but its weights have num_register_tokens=7"),
        ("pixio", "mlp_ratio", 1e308, "mlp_ratio=1e.308, but its weights have intermediate_size="),
        ("siglip2", "num_patches", 17, "num_patches=17, but its weights have image_size=32; "),
        ("aimv2", "qkv_bias", True, "qkv_bias=True, but its weights have no query bias; "),
        (
            "siglip-no-head",
            "vision_use_head",
            True,
            "=True, but its weights have no pooling head; ",
        ),
        ("beit-absolute", "layer_scale_init_value", 0.1, "=0.1, but its weights have no layer sc"),
        ("vit_mae", "model_type", "dinov2", "='dinov2', but its weights have no layer scale; "),
        ("dinov2-registers", "model_type", "dinov2", "='dinov2', .* have num_register_tokens=4; "),
    ],
)
def test_what_is_lost_or_of_another_size_is_refused(
    tmp_path: Path, name: str, key: str, value: Any, words: str
) -> None:
    saved(tmp_path, EVERY[name])
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stated, key: value}))
    with pytest.raises(CheckpointError, match=words) as caught:
        load_encoder(tmp_path)
    assert str(caught.value).endswith(
        "; correct its configuration, or get it again with its weights"
    )


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("vit", "qkv_bias", False, "qkv_bias=False, .* have query bias, key bias, value bias: "),
        ("dinov3", "mlp_bias", False, "mlp_bias=False, but its weights have mlp bias: the"),
        ("siglip", "vision_use_head", False, "=False, but its weights have pooling head: the"),
        ("beit", "use_mean_pooling", True, "=True, but its weights have final norm: the"),
        ("beit", "layer_scale_init_value", 0, "=0, but its weights have layer scale: the"),
        ("data2vec", "use_relative_position_bias", False, "have relative positions: the"),
    ],
)
def test_what_the_weights_have_beyond_is_taken(
    tmp_path: Path,
    name: str,
    key: str,
    value: Any,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved(tmp_path, EVERY[name])
    expected = load_encoder(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stated, key: value}))
    caplog.set_level(logging.WARNING, "mim_refiner_hf")
    encoder = load_encoder(tmp_path)
    assert len(caplog.records) == 1
    assert re.search(words, caplog.records[0].getMessage())

    pixels = torch.randn(2, 3, 32, 32)
    for ours, theirs in zip(outputs(encoder, pixels), outputs(expected, pixels), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [None, 1e308, "x", [None], {"a": 1}])
def test_a_value_of_another_type_is_no_traceback(tmp_path: Path, value: Any) -> None:
    """Of every key that is compared: it loads, or one line refuses."""
    for name in ("beit", "dinov2", "pixio", "siglip2", "aimv2"):
        for key, _, stated in changes(name, tmp_path):
            stated.get("vision_config", stated)[key] = value
            stated["architectures"] = value
            (tmp_path / "config.json").write_text(json.dumps(stated))
            try:
                load_encoder(tmp_path)
            except CheckpointError as error:
                assert "\n" not in str(error)
