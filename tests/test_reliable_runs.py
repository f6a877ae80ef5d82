"""Whole small runs over bad data and on a failing disk.

What is trained, what is listed, what is said, and that they can go on.
"""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mim_refiner_hf import (
    MimRefinerConfig,
    MimRefinerImageProcessor,
    MimRefinerModel,
    RefineRecipe,
    cli,
)
from mim_refiner_hf.data.images import hold_out, open_images
from mim_refiner_hf.publishing import save_model_folder
from mim_refiner_hf.refinement.resolve import resolve
from mim_refiner_hf.runs import plan
from mim_refiner_hf.runs.evaluate import evaluate
from mim_refiner_hf.runs.prepare import prepare
from mim_refiner_hf.runs.run import run
from mim_refiner_hf.runtime import checkpoint as checkpointing
from mim_refiner_hf.runtime.checkpoint import load_latest, save_checkpoint, size_of
from mim_refiner_hf.runtime.room import SaveError

SHAPE: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
BAD = {3, 7, 8, 20, 21, 33}

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "model"
    torch.manual_seed(0)
    processor = MimRefinerImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    save_model_folder(folder, MimRefinerModel(MimRefinerConfig(**SHAPE)), processor)
    return str(folder)


@pytest.fixture
def fields(model: str, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run over 40 unlabelled images, 6 of them broken: 3 + 3 epochs of 4 steps."""
    for i in range(40):
        path = tmp_path / f"photos/{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(
            np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        ).save(path)
        if i in BAD:
            path.write_bytes(path.read_bytes()[: 50 * (i % 2)])
    return {
        "model": model,
        "dataset": str(tmp_path / "photos"),
        "eval_fraction": 0.2,
        "max_bad_fraction": 0.2,
        "head_blocks": [1],
        "projector_dim": 16,
        "predictor_dim": 24,
        "embedding_dim": 8,
        "queue_size": 16,
        "topk": 4,
        "local_views": 1,
        "batch_size": 8,
        "epochs": 3,
        "head_epochs": 3,
        "warmup_epochs": 0,
        "save_every": 4,
        "log_every": 2,
        "num_workers": 0,
        "report_to": "none",
        "output_dir": str(tmp_path / "out"),
    }


def listed(output: Path) -> list[int]:
    return [entry["index"] for entry in json.loads((output / "broken.json").read_text())["images"]]


@pytest.mark.slow
def test_bad_images_in_training_and_evaluation(fields: dict[str, Any], tmp_path: Path) -> None:
    """All six are listed once, whichever part of the data they fell into.

    No score has been taken of them.
    """
    result = run(RefineRecipe(**fields))
    assert result is not None
    assert set(listed(tmp_path / "out")) == BAD and result.metrics["broken_images"] == 6
    evaluated = prepare(RefineRecipe(**{**fields, "dry_run": True})).images.evaluation
    assert evaluated is not None and len(evaluated) == 8
    assert result.metrics["dataset"]["eval_images"] == len(set(evaluated.indices.tolist()) - BAD)
    again = run(RefineRecipe(**{**fields, "output_dir": str(tmp_path / "again"), "num_workers": 2}))
    assert again is not None and listed(tmp_path / "again") == listed(tmp_path / "out")
    for name, tensor in result.refined.state_dict().items():
        assert torch.equal(tensor, again.refined.state_dict()[name]), name


def test_evaluate_leaves_them_out_and_says_so(fields: dict[str, Any], tmp_path: Path) -> None:
    """Of images without labels only those to be measured on are read."""
    report = evaluate(fields["model"], fields["dataset"], output_dir=tmp_path / "report")
    _, held_out = hold_out(open_images(fields["dataset"]), 0.2, 0)
    bad = BAD & set(held_out.indices.tolist())
    assert {entry["index"] for entry in report["broken"]} == bad and all(
        entry["reason"] for entry in report["broken"]
    )
    assert report["dataset"]["eval_images"] == len(held_out) - len(bad)
    assert (
        f"{len(bad)} images could not be read and are left out"
        in (tmp_path / "report/report.md").read_text()
    )


def test_too_many_stop_and_a_higher_limit_goes_on(
    fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        word
        for name, value in fields.items()
        for word in (f"--{name}", *map(str, np.atleast_1d(value)))
    ]
    assert cli.command("refine", [*words, "--max_bad_fraction", "0.1", "--eval_fraction", "0"]) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert (
        "of 40 images of" in message
        and "10.0% that --max_bad_fraction allows" in message
        and "broken.json" in message
    )
    stopped = listed(tmp_path / "out")
    assert len(stopped) >= 5 and set(stopped) <= BAD
    assert cli.command("refine", [*words, "--eval_fraction", "0"]) == 0
    assert set(listed(tmp_path / "out")) == BAD


def test_a_changed_data_set_is_not_resumed(fields: dict[str, Any], tmp_path: Path) -> None:
    recipe = RefineRecipe(**{**fields, "stage": "warmup", "eval_fraction": 0.0})
    run(recipe)
    shutil.copy(tmp_path / "photos/00.png", tmp_path / "photos/005.png")
    with pytest.raises(
        ValueError, match=r"photos is not the data set .*: 40 images then, 41 now; .*005\.png"
    ):
        run(RefineRecipe(**{**fields, "eval_fraction": 0.0}))
    (tmp_path / "photos/005.png").unlink()
    assert run(RefineRecipe(**{**fields, "eval_fraction": 0.0})) is not None


def test_a_full_disk_in_the_middle_of_a_run(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops with the sentence, the checkpoint before is intact, and the same command ends as if
    nothing had been.
    """
    recipe = RefineRecipe(**{**fields, "eval_fraction": 0.0})
    whole = run(
        RefineRecipe(**{**fields, "eval_fraction": 0.0, "output_dir": str(tmp_path / "whole")})
    )
    saves, save = [], checkpointing.save_file

    def full(*arguments: Any) -> None:
        saves.append(1)
        if len(saves) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(checkpointing, "save_file", full)
        with pytest.raises(
            SaveError,
            match=r"after step 12 could not be written .*No space left.*step-00000008 is intact",
        ):
            run(recipe)
    resumed = run(recipe)
    assert whole is not None and resumed is not None
    for name, tensor in whole.refined.state_dict().items():
        assert torch.equal(tensor, resumed.refined.state_dict()[name]), name


def test_a_checkpoint_of_another_shape_is_refused_whole(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    recipe = RefineRecipe(**{**fields, "eval_fraction": 0.0, "stage": "warmup"})
    run(recipe)
    found = load_latest(tmp_path / "out/checkpoints")
    assert found is not None
    name = "refiner.encoder.norm.weight"
    tensors = {**found.tensors, name: torch.zeros(31)}
    save_checkpoint(
        tmp_path / "out/checkpoints", step=found.step, tensors=tensors, state=found.state, keep=1
    )
    with pytest.raises(
        ValueError,
        match=rf"tensors\.safetensors: {name} is \[31\] float32 and has to be \[32\] float32",
    ):
        run(RefineRecipe(**{**fields, "eval_fraction": 0.0}))


def test_the_plan_predicts_the_size_of_a_checkpoint(
    fields: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = RefineRecipe(
        **fields
        | {"eval_fraction": 0.0, "save_total_limit": 1, "queue_size": 5000, "projector_dim": 256}
    )
    run(recipe)
    (checkpoint,) = (tmp_path / "out/checkpoints").iterdir()
    config = MimRefinerConfig(**SHAPE)
    assert plan.checkpoint_bytes(resolve(recipe, config, 40), config) == pytest.approx(
        size_of(checkpoint), rel=0.1
    )
    said = capsys.readouterr().out
    assert (
        "disk    checkpoints of about" in said
        and "checkpoints (refine): " in said
        and "1 kept" in said
    )
    monkeypatch.setattr(
        plan.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40, 0)
    )
    assert "0 B free, TOO LITTLE: make room, or lower save_total_limit" in plan.disk_text(
        resolve(recipe, config, 40), config
    )
