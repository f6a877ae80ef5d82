"""Checkpoints are complete or absent.

What a broken disk, a kill and a flipped bit leave behind is never resumed from.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mim_refiner_hf.runtime.checkpoint import (
    Checkpoint,
    check_tensors,
    load_latest,
    save_checkpoint,
    verify,
)
from mim_refiner_hf.runtime.files import CheckpointError
from mim_refiner_hf.runtime.optimisation import optimizer_tensors, restore_optimizer


def save(folder: Path, step: int, keep: int = 10) -> Path:
    """A checkpoint whose every value is its step."""
    tensors = {"weight": torch.full((64, 3), float(step)), "count": torch.tensor(step)}
    return save_checkpoint(
        folder, step=step, tensors=tensors, state={"step": step, "name": "é"}, keep=keep
    )


def test_round_trip(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(5, 7),
        "transposed": torch.randn(5, 7).T,
        "half": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(3),
    }
    state = {"recipe": {"model": "a", "scale": [0.25, 1.0]}, "before": None}
    path = save_checkpoint(tmp_path, step=12, tensors=tensors, state=state, keep=1)
    found = load_latest(tmp_path)
    assert found is not None
    assert (found.step, found.state) == (12, state)
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert {file.name for file in path.iterdir()} == {
        "tensors.safetensors",
        "state.json",
        "manifest.json",
    }  # no pickle
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == {
        "tensors.safetensors",
        "state.json",
    }


def test_no_checkpoint(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None
    assert load_latest(tmp_path) is None


def test_newest_is_taken_and_keep_is_respected(tmp_path: Path) -> None:
    # as text, 90 would come after 1000
    for step in (5, 90, 100, 1000):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-00001000"]
    found = load_latest(tmp_path)
    assert found is not None
    assert found.step == 1000
    assert torch.equal(found.tensors["count"], torch.tensor(1000))


def test_same_step_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save_checkpoint(
        tmp_path, step=3, tensors={"weight": torch.zeros(1)}, state={"second": True}, keep=2
    )
    found = load_latest(tmp_path)
    assert found is not None
    assert found.state == {"second": True}
    assert len(list(tmp_path.iterdir())) == 1


def truncate(path: Path) -> None:
    content = (path / "tensors.safetensors").read_bytes()
    (path / "tensors.safetensors").write_bytes(content[: len(content) // 2])


def flip_bit(path: Path) -> None:
    """In tensor data: safetensors alone loads this without a word."""
    content = bytearray((path / "tensors.safetensors").read_bytes())
    content[-5] ^= 1
    (path / "tensors.safetensors").write_bytes(content)


def flip_bit_of_state(path: Path) -> None:
    content = (path / "state.json").read_text()
    (path / "state.json").write_text(content.replace('"step": 30', '"step": 31'))


def remove_tensors(path: Path) -> None:
    (path / "tensors.safetensors").unlink()


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def halve_manifest(path: Path) -> None:
    content = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(content[: len(content) // 2])


def empty_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


DAMAGES = [
    truncate,
    flip_bit,
    flip_bit_of_state,
    remove_tensors,
    remove_manifest,
    halve_manifest,
    empty_manifest,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_checkpoints_are_skipped_and_named(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    intact, broken = save(tmp_path, 20), save(tmp_path, 30)
    assert verify(broken) is None
    damage(broken)
    assert verify(broken)
    with caplog.at_level(logging.WARNING):
        found = load_latest(tmp_path)
    assert found is not None
    assert found.step == 20
    assert torch.equal(found.tensors["weight"], torch.full((64, 3), 20.0))
    (message,) = [record.getMessage() for record in caplog.records]
    assert str(broken) in message and str(intact) not in message


def test_all_broken(tmp_path: Path) -> None:
    """Hours of work do not start anew without a word."""
    flip_bit(save(tmp_path, 1))
    with pytest.raises(
        CheckpointError,
        match=r"none of the checkpoints in .* is intact \(step-00000001; .*remove that folder",
    ):
        load_latest(tmp_path)


def test_a_broken_newer_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    """The run went on from step 20.

    Its next checkpoint, 25, is the newest good one although 30 sorts behind it.
    """
    save(tmp_path, 20)
    flip_bit(save(tmp_path, 30))
    save(tmp_path, 25, keep=1)
    found = load_latest(tmp_path)
    assert found is not None
    assert found.step == 25


def test_what_a_killed_write_leaves_is_ignored_and_cleared(tmp_path: Path) -> None:
    save(tmp_path, 10)
    left_over = tmp_path / ".tmp-00000020"
    left_over.mkdir()
    (left_over / "tensors.safetensors").write_bytes(b"half")
    found = load_latest(tmp_path)
    assert found is not None
    assert found.step == 10
    save(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]


@pytest.mark.parametrize("fused", [True, False])
def test_optimiser_round_trip(tmp_path: Path, fused: bool) -> None:
    """After a restore the next step is the same bit for bit, with groups of different settings."""

    def build() -> tuple[torch.nn.Sequential, torch.optim.AdamW]:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        groups = [
            {"params": list(model[0].parameters()), "lr_scale": 0.5},
            {"params": list(model[1].parameters()), "lr_scale": 1.0},
        ]
        return model, torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), fused=fused)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(
                torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            ).square().sum().backward()
            optimizer.step()

    model, optimizer = build()
    train(model, optimizer, range(3))
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint(
        tmp_path, step=3, tensors=weights | optimizer_tensors(optimizer), state={}, keep=1
    )
    train(model, optimizer, range(3, 6))

    resumed, new_optimizer = build()
    found = load_latest(tmp_path)
    assert found is not None
    resumed.load_state_dict(
        {k.removeprefix("model."): v for k, v in found.tensors.items() if k.startswith("model.")}
    )
    restore_optimizer(new_optimizer, found)
    assert [group["lr_scale"] for group in new_optimizer.param_groups] == [0.5, 1.0]
    train(resumed, new_optimizer, range(3, 6))
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


# --- into a model


STATE = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
MISFITS = {
    "missing": ({"bias": torch.zeros(3)}, "1 tensors are missing, first weight"),
    "unknown": (STATE | {"extra": torch.zeros(1)}, "1 tensors have no place, first extra"),
    "transposed": (
        STATE | {"weight": torch.zeros(2, 3)},
        r"weight is \[2, 3\] float32 and has to be \[3, 2\] float32",
    ),
    "other dtype": (
        STATE | {"bias": torch.zeros(3).half()},
        r"bias is \[3\] float16 and has to be \[3\] float32",
    ),
    "not a number": (
        STATE | {"bias": torch.tensor([0, float("nan"), 0])},
        "bias holds values that are not finite",
    ),
    "infinite moment": (
        STATE | {"optimizer.0.exp_avg": torch.tensor([float("inf")])},
        "optimizer.0.exp_avg holds values that",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit_are_named(case: str, tmp_path: Path) -> None:
    tensors, says = MISFITS[case]
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/tensors\.safetensors: {says}"):
        check_tensors(Checkpoint(1, tensors, {}, tmp_path), STATE)


@pytest.mark.parametrize("damage", ["another parameter", "another shape", "half of it"])
def test_optimiser_state_that_does_not_fit_is_named(damage: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    tensors = optimizer_tensors(optimizer)
    assert {name for name in tensors if ".0." in name} == {
        "optimizer.0.step",
        "optimizer.0.exp_avg",
        "optimizer.0.exp_avg_sq",
    }
    restore_optimizer(optimizer, Checkpoint(1, tensors, {}, tmp_path))
    if damage == "another parameter":
        tensors |= {
            name.replace(".1.", ".2."): tensor for name, tensor in tensors.items() if ".1." in name
        }
    elif damage == "another shape":
        tensors["optimizer.1.exp_avg"] = torch.zeros(4)
    else:
        del tensors["optimizer.1.exp_avg_sq"]
    with pytest.raises(
        CheckpointError,
        match=rf"optimizer\.{2 if damage == 'another parameter' else 1} is not the state of",
    ):
        restore_optimizer(optimizer, Checkpoint(1, tensors, {}, tmp_path))
