"""One encoder in whatever trainers wrap around it, against the encoder loaded bare."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import timm
import torch
from hypothesis import given, settings
from torch import Tensor

from mim_refiner_hf.conversion import load_encoder


def vit(seed: int) -> dict[str, Tensor]:
    """A tiny ViT with timm's names."""
    torch.manual_seed(seed)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}
    return dict(timm.models.VisionTransformer(**shape, num_classes=0).state_dict())


MEANT, OTHER = vit(0), vit(1)
DECODER = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 192)}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def loaded(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the encoder in a file with these contents."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(dict(contents), Path(folder) / "x.pth")
        return dict(load_encoder(Path(folder) / "x.pth").state_dict())


EXPECTED = loaded(MEANT)


def assert_meant(contents: Mapping[str, Any]) -> None:
    found = loaded(contents)
    assert found.keys() == EXPECTED.keys()
    for name, tensor in EXPECTED.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


words = st.sampled_from(["module", "_orig_mod", "model", "encoder", "backbone", "net", "vit", "zz"])
containers = st.sampled_from(["", "state_dict", "model", "model_state_dict", "state_dict_ema", "y"])


@settings(max_examples=60)
@given(words=st.lists(words, max_size=3), container=containers, whole=st.booleans())
def test_any_container_and_any_prefix(words: list[str], container: str, whole: bool) -> None:
    prefix = "".join(f"{word}." for word in words)
    tensors = under(prefix, MEANT | DECODER if whole else MEANT)
    contents = {container: tensors, "epoch": 3} if container else tensors
    # what an optimizer keeps has the names of the weights
    assert_meant({**contents, "optimizer_states": [under("model.", OTHER)]})


@given(wrapper=st.sampled_from(["_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"]))
@settings(max_examples=3)
def test_wrappers_inside_the_names(wrapper: str) -> None:
    inside = {name.replace("blocks.1.", f"blocks.1.{wrapper}."): MEANT[name] for name in MEANT}
    assert_meant(under("backbone.", inside))


@pytest.mark.parametrize(
    ("meant", "other"),
    [
        ("teacher.backbone.", "student.backbone."),
        ("teacher_backbone.vit.", "student_backbone.vit."),
        ("model_ema.module.", "net."),
        ("target_encoder.", "encoder."),
        ("teacher.", "semantic."),
    ],
)
def test_of_two_encoders_the_teacher_is_meant(meant: str, other: str) -> None:
    both = under(other, OTHER) | under(meant, MEANT)
    assert_meant({"state_dict": both})
    assert_meant({"checkpoint": dict(reversed(both.items()))})


def test_chunks_of_blocks_are_numbered_through() -> None:
    chunked = {name.replace("blocks.", "blocks.0."): tensor for name, tensor in MEANT.items()}
    assert_meant({"model": under("teacher.backbone.", chunked)})


def test_what_lies_outside_is_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    head = {"decode_head.conv.weight": torch.zeros(3, 3), "decode_head.conv.bias": torch.zeros(3)}
    assert_meant({"state_dict": under("backbone.", MEANT) | head})
    assert "2 tensors outside state_dict.backbone. are left behind" in caplog.text
    assert "decode_head.conv.weight" in caplog.text


@pytest.mark.parametrize("pair", [("left.", "right."), ("teacher.a.", "teacher.b.")])
def test_several_encoders_of_which_none_is_meant_are_refused(pair: tuple[str, str]) -> None:
    both = under(pair[0], MEANT) | under(pair[1], OTHER)
    with pytest.raises(ValueError, match=f"holds 2 encoders, under .*{pair[0]}.*{pair[1]}"):
        loaded({"weights": both})


def test_a_tensor_that_fits_no_family_is_still_an_error() -> None:
    with pytest.raises(ValueError, match=r"1 tensors have no place .*: blocks\.0\.strange"):
        loaded({"state_dict": under("model.", MEANT | {"blocks.0.strange": torch.zeros(3)})})
