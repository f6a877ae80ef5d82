"""Formats state their version: none is the first, a newer one is refused by name, at once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_store import make_encoder, make_processor
from transformers import AutoModel

from mim_refiner_hf import MimRefinerConfig, RefineRecipe
from mim_refiner_hf.conversion import CheckpointError, load_encoder
from mim_refiner_hf.evaluation.manifest import weights_fingerprint
from mim_refiner_hf.evaluation.shard_files import STORE_FORMAT, read_manifest
from mim_refiner_hf.publishing import save_model_folder
from mim_refiner_hf.runs.prepare import as_begun
from mim_refiner_hf.runtime.arithmetic import arithmetic, say_changes
from mim_refiner_hf.runtime.checkpoint import load_latest, save_checkpoint
from mim_refiner_hf.runtime.settings import read_fields
from mim_refiner_hf.runtime.versions import NewerFormatError

NEWER = (
    "was written by a newer version: format 3, this one reads up to [12]; upgrade mim_refiner_hf"
)


def state(path: Path, version: Any) -> None:
    """Let a JSON file state this version, or none."""
    content = json.loads(path.read_text())
    assert content.pop("format_version") == 1
    path.write_text(
        json.dumps(content if version is None else {"format_version": version, **content})
    )


def checkpoint(folder: Path, version: Any) -> Any:
    tensors = {"weight": torch.ones(2)}
    for step in (1, 2):
        save_checkpoint(folder, step=step, tensors=tensors, state={}, keep=2)
    state(folder / "step-00000002/manifest.json", version)
    found = load_latest(folder)
    return found and found.step


def store(folder: Path, version: Any) -> Any:
    text = STORE_FORMAT.removesuffix("1") + str(version or 1)
    manifest = {"format": text, "num_images": 2, "shard_size": 2, "columns": {"output": 4}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return read_manifest(folder)


def run_folder(folder: Path, version: Any) -> Any:
    text = json.dumps({"format_version": 1, "seed": 7, "epochs": 5})
    (folder / "recipe.json").write_text(text)
    state(folder / "recipe.json", version)
    return as_begun(RefineRecipe(model="m"), folder).epochs


def recipe_file(folder: Path, version: Any) -> Any:
    path = folder / "again.yaml"
    path.write_text(json.dumps({"format_version": 1, "seed": 7}))
    state(path, version)
    return read_fields(str(path), RefineRecipe)["seed"]


def recipe(folder: Path, version: Any) -> Any:
    return RefineRecipe(model="m", **({} if version is None else {"format_version": version})).model


def model(folder: Path, version: Any) -> Any:
    save_model_folder(folder / "model", make_encoder(), make_processor())
    state(folder / "model/config.json", version)
    return load_encoder(folder / "model").config.hidden_size


def auto_model(folder: Path, version: Any) -> Any:
    save_model_folder(folder / "model", make_encoder(), make_processor())
    state(folder / "model/config.json", version)
    return AutoModel.from_pretrained(folder / "model").config.hidden_size


KINDS = [checkpoint, store, run_folder, recipe_file, recipe, model, auto_model]


@pytest.mark.parametrize("read", KINDS)
def test_only_a_newer_format_is_refused(read: Callable[[Path, Any], Any], tmp_path: Path) -> None:
    for version in (None, 1):
        assert read(tmp_path, version)
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
    with pytest.raises(ValueError, match=NEWER):
        read(tmp_path, 3)


def test_a_newer_checkpoint_is_not_skipped_as_broken(tmp_path: Path) -> None:
    with pytest.raises(NewerFormatError):
        checkpoint(tmp_path, 3)
    assert (tmp_path / "step-00000002/tensors.safetensors").is_file()


@pytest.mark.parametrize("version", ["3", 0, -1, 1.5, True, [1], {}, 10**40])
def test_what_is_no_version_is_one_short_line(version: Any, tmp_path: Path) -> None:
    for read in (run_folder, recipe_file, model):
        with pytest.raises((ValueError, CheckpointError)) as raised:
            read(tmp_path, version)
        assert len(str(raised.value)) < 600 and "\n" not in str(raised.value)


def test_the_version_is_no_part_of_what_a_model_computes() -> None:
    encoder = make_encoder()
    before = weights_fingerprint(encoder)
    encoder.config.format_version = 0
    assert weights_fingerprint(encoder) == before
    assert json.loads(MimRefinerConfig().to_json_string())["format_version"] == 1


def test_what_decides_the_bits_is_said_where_it_differs(caplog: pytest.LogCaptureFixture) -> None:
    begun = arithmetic(8, bf16=False)
    assert begun.keys() == {
        "torch",
        "device",
        "processes",
        "threads",
        "micro_batch_size",
        "precision",
    }
    say_changes(begun, begun)
    # an older version recorded none
    say_changes({}, begun)
    assert not caplog.records
    for name in begun:
        caplog.clear()
        say_changes({**begun, name: "another"}, begun)
        (record,) = caplog.records
        assert f"{name} another, now {begun[name]}" in record.getMessage()
