"""One encoder in whatever trainers wrap around it, against the encoder loaded bare."""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import hypothesis.strategies as st
import numpy as np
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


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("model", "model_ema"),
        ("model", "ema"),
        ("state_dict", "ema_state_dict"),
        ("state_dict", "state_dict_ema"),
        ("model", "teacher"),
        ("state_dict", "momentum_encoder"),
        ("model", "target_net"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_the_teacher_is_meant_beside_a_known_container(
    student: str, teacher: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A file whose student lies where a known format has its only encoder."""
    both = {student: under(prefix, OTHER), teacher: under(prefix, MEANT), "epoch": 3}
    assert_meant(both)
    assert_meant(dict(reversed(both.items())))


def test_another_encoder_beside_a_known_container_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert_meant({"model": MEANT, "model_before": OTHER})
    assert "the encoder under model. is read; those under model_before. are left" in caplog.text
    with pytest.raises(ValueError, match=r"holds 2 encoders, under model_ema\.a\., model_ema\.b\."):
        loaded({"model": OTHER, "model_ema": under("a.", MEANT) | under("b.", MEANT)})


@pytest.mark.parametrize(
    ("most", "some"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
        (torch.float16, torch.bfloat16),
        (torch.float16, torch.float64),
    ],
)
def test_tensors_of_several_dtypes_are_read_as_float32(
    most: torch.dtype, some: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """Norms kept in full precision, a table of positions in double: nothing is rounded further."""
    file = {name: MEANT[name].to(some if "norm" in name else most) for name in MEANT}
    expected = loaded({name: tensor.float() for name, tensor in file.items()})
    found = loaded(file)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert "of several dtypes" in caplog.text and "read as float32" in caplog.text


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.complex64])
def test_what_is_no_float_is_named(dtype: torch.dtype) -> None:
    told = rf"1 tensors hold .*layers\.0\.mlp\.fc1\.weight is {dtype}"
    with pytest.raises(ValueError, match=told):
        loaded(MEANT | {"blocks.0.mlp.fc1.weight": MEANT["blocks.0.mlp.fc1.weight"].to(dtype)})
    too_large = MEANT["blocks.0.mlp.fc1.weight"].double() * 1e300
    with pytest.raises(ValueError, match=r"1 tensors are too large for float32: layers\.0\.mlp"):
        loaded(MEANT | {"blocks.0.mlp.fc1.weight": too_large})


@pytest.mark.parametrize(
    "note",
    [
        np.float64(0.5),
        np.float32(0.5),
        np.int64(7),
        np.bool_(True),
        np.str_("best"),
        np.arange(4),
        np.random.RandomState(0).get_state(),
        Path("runs/1"),
        PureWindowsPath("runs/1"),
        argparse.Namespace(output_dir=Path("runs/1"), lr=np.float64(1e-3)),
    ],
    ids=lambda note: type(note).__name__,
)
def test_what_trainers_note_beside_the_weights(note: Any, tmp_path: Path) -> None:
    torch.save({"model": MEANT, "epoch": note}, tmp_path / "x.pth")
    found = load_encoder(tmp_path / "x.pth").state_dict()
    assert all(torch.equal(found[name], EXPECTED[name]) for name in EXPECTED)
