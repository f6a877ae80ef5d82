"""Checkpoints are complete or absent: what a broken disk, a kill and a flipped bit leave behind is never resumed from."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mim_refiner_hf import checkpointing
from mim_refiner_hf.checkpointing import load_latest, optimizer_tensors, restore_optimizer, save_checkpoint, verify


def save(folder: Path, step: int, keep: int = 10) -> Path:
    """A checkpoint whose every value is its step."""
    tensors = {"weight": torch.full((64, 3), float(step)), "count": torch.tensor(step)}
    return save_checkpoint(folder, step=step, tensors=tensors, state={"step": step, "name": "é"}, keep=keep)


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
    assert {file.name for file in path.iterdir()} == {"tensors.safetensors", "state.json", "manifest.json"}  # no pickle
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == {"tensors.safetensors", "state.json"}


def test_no_checkpoint(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None
    assert load_latest(tmp_path) is None


def test_newest_is_taken_and_keep_is_respected(tmp_path: Path) -> None:
    for step in (5, 90, 100, 1000):  # as text, 90 would come after 1000
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-00001000"]
    found = load_latest(tmp_path)
    assert found is not None
    assert found.step == 1000
    assert torch.equal(found.tensors["count"], torch.tensor(1000))


def test_same_step_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save_checkpoint(tmp_path, step=3, tensors={"weight": torch.zeros(1)}, state={"second": True}, keep=2)
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


DAMAGES = [truncate, flip_bit, flip_bit_of_state, remove_tensors, remove_manifest, halve_manifest, empty_manifest]


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
    flip_bit(save(tmp_path, 1))
    assert load_latest(tmp_path) is None


def test_a_broken_newer_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    """The run went on from step 20; its next checkpoint, 25, is the newest good one although 30 sorts behind it."""
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


@pytest.mark.parametrize("writer", ["save_file", "sync_to_disk", "sha256_of"])
def test_failing_write_leaves_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    save(tmp_path, 10, keep=1)

    def disk_full(*args: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpointing, writer, disk_full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 20, keep=1)
    assert not (tmp_path / "step-00000020").exists()
    found = load_latest(tmp_path)
    assert found is not None
    assert found.step == 10
    save(tmp_path, 20, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]


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
            model(torch.randn(5, 4, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()

    model, optimizer = build()
    train(model, optimizer, range(3))
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint(tmp_path, step=3, tensors=weights | optimizer_tensors(optimizer), state={}, keep=1)
    train(model, optimizer, range(3, 6))

    resumed, new_optimizer = build()
    found = load_latest(tmp_path)
    assert found is not None
    resumed.load_state_dict({k.removeprefix("model."): v for k, v in found.tensors.items() if k.startswith("model.")})
    restore_optimizer(new_optimizer, found.tensors)
    assert [group["lr_scale"] for group in new_optimizer.param_groups] == [0.5, 1.0]
    train(resumed, new_optimizer, range(3, 6))
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
