"""Refinements of a few steps on few images, for the tests of whole runs, and what they leave
behind.

`tests/conftest.py` makes fixtures of it: `quick`, `cifar`, `models` and `recipe`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import Data2VecVisionConfig, Data2VecVisionModel, ViTMAEConfig, ViTMAEModel

from mim_refiner_hf import RefineRecipe
from mim_refiner_hf.evaluation import evidence, label_free, report
from mim_refiner_hf.evaluation.cluster_scores import kmeans_runs
from mim_refiner_hf.refinement.trainer import Trainer
from mim_refiner_hf.runs.run import run
from mim_refiner_hf.runtime.checkpoint import load_latest

SHAPE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few runs of k-means, few resamples, pictures of few pixels."""

    def save_small(figure: Figure, file: Any, **settings: Any) -> None:
        # a layout is found by drawing the figure once more
        figure.set_layout_engine("none")
        savefig(figure, file, dpi=50, **settings)

    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", save_small)
    monkeypatch.setattr(
        report,
        "kmeans_runs",
        lambda *arguments, **settings: kmeans_runs(*arguments, **{**settings, "runs": 3}),
    )
    monkeypatch.setattr(label_free, "_RUNS", 3)
    monkeypatch.setattr(evidence, "RESAMPLES", 100)


def write_cifar(shared: Path, folder: Path) -> str:
    """200 images of CIFAR-10, 20 of each class, as a parquet file; its path."""
    table = parquet.read_table(shared / "data/cifar10/train.parquet")
    labels = np.asarray(table["label"])
    rows = np.concatenate([np.flatnonzero(labels == label)[:20] for label in range(10)])
    parquet.write_table(table.take(rows), folder / "train.parquet")
    return str(folder / "train.parquet")


def write_models(folder: Path) -> dict[str, str]:
    """Encoders as transformers itself saves them.

    Random weights, positions included (5.23 would leave those at zero).
    """
    torch.manual_seed(0)
    folders = {}
    relative = {"use_shared_relative_position_bias": True, "use_mean_pooling": False}
    for name, model in (
        ("vit_mae", ViTMAEModel(ViTMAEConfig(**SHAPE))),
        (
            "data2vec",
            Data2VecVisionModel(Data2VecVisionConfig(**SHAPE, **relative), add_pooling_layer=False),
        ),
    ):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        folders[name] = str(folder / name)
        model.save_pretrained(folders[name])
    return folders


def small_recipes(model: str, dataset: str, folder: Path) -> Callable[..., RefineRecipe]:
    """Gives recipes of 4 + 4 steps without evaluation, each with some fields changed, writing into
    `folder`.
    """

    def changed(output: str = "out", **changes: Any) -> RefineRecipe:
        fields: dict[str, Any] = {
            "model": model,
            "dataset": dataset,
            "eval_fraction": 0.0,
            "head_blocks": [1, 2],
            "projector_dim": 32,
            "predictor_dim": 48,
            "embedding_dim": 16,
            "queue_size": 64,
            "topk": 5,
            "local_views": 2,
            "colour": False,
            "batch_size": 32,
            "max_steps": 4,
            "epochs": 1,
            "head_epochs": 1,
            "warmup_epochs": 0,
            "learning_rate": 8e-3,
            "head_learning_rate": 8e-3,
            "ema_decay": 0.5,
            "save_every": 2,
            "save_total_limit": 100,
            "log_every": 1,
            "num_workers": 0,
            "report_to": "none",
            # processes that a test starts find the CPU as it is
            "mixed_precision": "no",
            "output_dir": str(folder / output),
        }
        return RefineRecipe(**{**fields, **changes})

    return changed


class Stopped(Exception):
    """Stands for a power cut."""


def stop_before(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run die when it is about to compute `step` (0-based)."""
    update = Trainer.update

    def dying(self: Trainer, now: int, batch: dict[str, Tensor]) -> Any:
        if now == step:
            raise Stopped
        return update(self, now, batch)

    monkeypatch.setattr(Trainer, "update", dying)


def run_stopped_before(asked: RefineRecipe, steps: Sequence[int]) -> None:
    """Run the recipe to its end; it dies on the way as often as there are steps."""
    for step in steps:
        with pytest.MonkeyPatch.context() as patched:
            stop_before(step, patched)
            with pytest.raises(Stopped):
                run(asked)
    run(asked)


def log_of(recipe: RefineRecipe) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (Path(recipe.output_dir) / "log.jsonl").read_text().splitlines()
    ]


def trained_folder(output: Path) -> Path:
    """The weights that a run has trained, whether they ship or the start does."""
    kept_back = output / "refined_not_shipped"
    return kept_back if kept_back.is_dir() else output / "model"


def losses(recipe: RefineRecipe) -> list[float]:
    return [line["loss"] for line in log_of(recipe) if "loss" in line]


def final_state(recipe: RefineRecipe) -> Mapping[str, Tensor]:
    """Everything the last checkpoint holds.

    Encoder, heads, batch statistics, queue, average, optimiser.
    """
    found = load_latest(Path(recipe.output_dir) / "checkpoints")
    assert found is not None
    return found.tensors


def assert_identical(first: RefineRecipe, second: RefineRecipe) -> None:
    """Two runs ended with the same bits, and told the same losses on the way."""
    state, other = final_state(first), final_state(second)
    assert state.keys() == other.keys()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []
    assert losses(first) == losses(second)
