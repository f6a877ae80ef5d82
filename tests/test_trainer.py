"""Whole runs in miniature.

From foreign weights and real images to a saved model, and its settings.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import (
    final_state,
    log_of,
    losses,
    trained_folder,
)
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

from mim_refiner_hf import RefineRecipe, refine
from mim_refiner_hf.conversion import load_encoder
from mim_refiner_hf.refinement.loss import head_weights
from mim_refiner_hf.refinement.queue import NearestNeighbourQueue
from mim_refiner_hf.refinement.trainer import Trainer
from mim_refiner_hf.runs.run import run
from mim_refiner_hf.runtime.checkpoint import load_latest

LABELLED = {
    "knn_accuracy",
    "cluster_accuracy",
    "nmi",
    "ami",
    "ari",
    "cluster_accuracy_mean",
    "nmi_mean",
    "knn_per_block",
    "rankme",
}


pytestmark = pytest.mark.usefixtures("quick")


# ---- from foreign weights to a saved model


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit_mae", "data2vec"])
def test_refine_transformers_weights(
    family: str, recipe: Callable[..., RefineRecipe], models: dict[str, str]
) -> None:
    asked = recipe(model=models[family], eval_fraction=0.2, max_steps=None, head_epochs=3, epochs=3)
    start = load_encoder(models[family])
    result = refine(asked)
    assert result is not None
    folder = Path(asked.output_dir)

    trained = trained_folder(folder)
    model = AutoModel.from_pretrained(trained).eval()
    processor = AutoImageProcessor.from_pretrained(trained)
    pixels = processor(Image.new("RGB", (40, 50), (200, 30, 90)), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model(pixels).pooler_output, result.refined(pixels).pooler_output, atol=1e-6, rtol=0
        )
    saved = load_file(trained / "model.safetensors")
    # an encoder and nothing else: no head, no queue, no decoder
    assert saved.keys() == start.state_dict().keys()
    changed = {
        name for name, tensor in saved.items() if not torch.equal(tensor, start.state_dict()[name])
    }
    assert {name for name in saved if name not in changed and "position" not in name} == set()
    assert not any("position" in name for name in changed)
    assert (folder / "model/README.md").is_file() and (folder / "clusters.png").is_file()
    assert not (folder / "checkpoints").exists()

    log = log_of(asked)
    # 160 images in batches of 32, 3 + 3 epochs
    assert [line["step"] for line in log] == list(range(1, 31))
    for stage in (log[:15], log[15:]):
        assert np.mean([line["loss"] for line in stage[-4:]]) < np.mean(
            [line["loss"] for line in stage[:4]]
        )

    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(result.metrics))
    assert LABELLED == set(metrics["before"]) == set(metrics["after"])
    assert len(metrics["after"]["knn_per_block"]) == 3
    assert set(metrics) >= {
        "command",
        "dataset",
        "hardware",
        "protocol",
        "recipe",
        "seconds",
        "seed",
        "starting_model",
        "versions",
    }
    assert metrics["starting_model"] == models[family]
    assert (
        metrics["dataset"]["images"],
        metrics["dataset"]["eval_images"],
        metrics["dataset"]["num_classes"],
    ) == (160, 40, 10)
    assert RefineRecipe(**metrics["recipe"]).head_blocks == [1, 2]


def test_log_tells_every_head(recipe: Callable[..., RefineRecipe]) -> None:
    asked = recipe()
    run(asked)
    log = log_of(asked)
    assert [line["stage"] for line in log] == ["warmup"] * 4 + ["refine"] * 4
    for line in log:
        for head in ("block1", "output"):
            assert 0 < line[f"{head}/loss"] < 10
            assert -1 <= line[f"{head}/neighbour_similarity"] <= 1
            assert 0 < line[f"{head}/alignment"] < 1
            assert line[f"{head}/neighbour_age"] >= 0 and 0 < line[f"{head}/spread"] < 1.2
        assert line["loss"] == pytest.approx(line["block1/loss"] + line["output/loss"], rel=1e-5)
        assert (
            line["learning_rate"] > 0
            and line["images_per_second"] > 0
            and line["seconds_left"] >= 0
        )
    # the queue holds no labels yet
    assert not any("neighbour_accuracy" in key for key in log[0])
    accuracies = [line["output/neighbour_accuracy"] for line in log[1:]]
    assert all(0 <= accuracy <= 1 for accuracy in accuracies) and max(accuracies) > 0


@pytest.mark.slow
def test_collapse_is_warned_of_once_per_head(
    recipe: Callable[..., RefineRecipe],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        NearestNeighbourQueue, "spread", lambda queue, count: torch.tensor([0.5, 0.01])
    )
    run(recipe())
    (warning,) = [
        record.getMessage() for record in caplog.records if "collapsing" in record.getMessage()
    ]
    assert warning.startswith("step 0: to head output all images look nearly alike (spread 0.010")


def test_unlabelled_folder_needs_no_labels(
    recipe: Callable[..., RefineRecipe], tmp_path: Path
) -> None:
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        (tmp_path / f"photos/{i % 3}").mkdir(parents=True, exist_ok=True)
        # one outside the sub-folders: they are no labels then
        name = f"photos/{i % 3}/{i}.png" if i else "photos/loose.png"
        Image.fromarray(pixels).save(tmp_path / name)
    asked = recipe(dataset=str(tmp_path / "photos"), eval_fraction=0.25, batch_size=16, max_steps=2)
    result = refine(asked)
    assert result is not None
    assert set(result.metrics["before"]) == set(result.metrics["after"]) == {"rankme"}
    assert result.metrics["dataset"]["num_classes"] == 0
    assert not any("accuracy" in key for line in log_of(asked) for key in line)
    card = (Path(asked.output_dir) / "model/README.md").read_text()
    assert "RankMe" in card and "k-NN accuracy" not in card
    assert (Path(asked.output_dir) / "clusters.png").is_file()


@pytest.mark.slow
def test_evaluation_can_be_left_out_or_repeated(recipe: Callable[..., RefineRecipe]) -> None:
    without = recipe("without", max_steps=2)
    result = refine(without)
    assert result is not None
    assert result.metrics["before"] is None and result.metrics["after"] is None
    assert (Path(without.output_dir) / "model/config.json").is_file()
    often = recipe(
        "often", eval_fraction=0.2, eval_every=1, head_epochs=1, epochs=3, max_steps=None
    )
    run(often)
    measured = [line for line in log_of(often) if "knn_accuracy" in line]
    # after each epoch of 5 steps but the last, which ends the run
    assert [line["step"] for line in measured] == [
        10,
        15,
    ]


@pytest.mark.slow
def test_the_average_ships_and_frozen_blocks_stay(
    recipe: Callable[..., RefineRecipe], models: dict[str, str]
) -> None:
    asked = recipe(freeze_blocks=1)
    result = run(asked)
    assert result is not None
    start, state = load_encoder(models["vit_mae"]).state_dict(), final_state(asked)
    for name, tensor in result.refined.state_dict().items():
        assert torch.equal(tensor, state[f"average.{name}"])
        frozen = name.startswith(("embeddings.", "layers.0."))
        assert torch.equal(tensor, start[name]) == frozen, name
        assert torch.equal(tensor, state[f"refiner.encoder.{name}"]) == frozen, name


# ---- sources and settings


def test_stream_is_evaluated_without_finding_itself(
    recipe: Callable[..., RefineRecipe], cifar: str
) -> None:
    """Half of the evaluation images are the k-NN bank.

    Were all of them, every image would be its own neighbour.
    """
    result = run(recipe(streaming=True, eval_dataset=cifar, max_steps=1))
    assert result is not None
    assert result.metrics["dataset"]["eval_images"] == 100
    assert result.metrics["before"]["knn_accuracy"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["staggered_decay", "one_hot"])
def test_loss_schedules_weigh_the_heads(schedule: Any, recipe: Callable[..., RefineRecipe]) -> None:
    asked = recipe(loss_schedule=schedule, head_blocks=[0, 1, 2], max_steps=3)
    run(asked)
    for line in log_of(asked):
        step = line["step"] - 1
        weights = (
            head_weights(schedule, 3, (step - 3) / 3) if line["stage"] == "refine" else [1.0] * 3
        )
        expected = np.dot(
            weights, [line[f"{head}/loss"] for head in ("block0", "block1", "output")]
        )
        assert line["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_swap_settings(recipe: Callable[..., RefineRecipe]) -> None:
    """Each is another objective.

    InfoNCE, which uses no neighbour, does not depend on how many there are to draw from.
    """
    seen = {}
    for swap in ("positive", "all", "none"):
        asked = recipe(swap, swap=swap)
        run(asked)
        seen[swap] = losses(asked)
    assert len({tuple(values) for values in seen.values()}) == 3
    assert np.isfinite(list(seen.values())).all()
    other = recipe("none-top-1", swap="none", topk=1)
    run(other)
    assert losses(other) == seen["none"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        *[
            {"pooling": "mean"},
            {"local_views": 0},
            {"global_views": 1},
            {"colour": True},
            {"num_heads": 1},
        ],
        {"micro_batch_size": "auto"},
    ],
)
def test_other_shapes_of_a_run(
    settings: dict[str, Any], recipe: Callable[..., RefineRecipe]
) -> None:
    asked = recipe(
        max_steps=2, **({"head_blocks": None} if "num_heads" in settings else {}), **settings
    )
    result = run(asked)
    assert result is not None
    assert np.isfinite(losses(asked)).all() and len(losses(asked)) == 4
    assert result.refined.config.pooling == settings.get("pooling", "cls")


# ---- what goes wrong


def test_loss_that_is_not_finite_stops_before_the_update(
    recipe: Callable[..., RefineRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    update, seen = Trainer.update, {}

    def spoiled(self: Trainer, now: int, batch: dict[str, Tensor]) -> Any:
        if now == 5:
            settings = self.refiner.settings
            self.refiner.settings = replace(settings, temperature=0.0)
            seen["trainer"], seen["index"] = self, batch["index"].tolist()
            seen["before"] = {
                name: tensor.clone() for name, tensor in self.refiner.named_parameters()
            }
        return update(self, now, batch)

    monkeypatch.setattr(Trainer, "update", spoiled)
    asked = recipe()
    with pytest.raises(
        FloatingPointError,
        match=r"loss of step 5 is not finite.*block1.*output.*weights were not updated",
    ) as raised:
        run(asked)
    assert str(seen["index"][0]) in str(raised.value)
    for name, tensor in seen["trainer"].refiner.named_parameters():
        assert torch.equal(tensor, seen["before"][name]), name
    found = load_latest(Path(asked.output_dir) / "checkpoints")
    assert found is not None and found.step == 4


def test_refine_without_head_warmup(recipe: Callable[..., RefineRecipe]) -> None:
    """No step of it is logged; the pairs are the released ones."""
    asked = recipe(eval_fraction=0.0, head_epochs=0, pairs="released", log_every=1)
    assert refine(asked) is not None
    lines = (Path(asked.output_dir) / "log.jsonl").read_text().splitlines()
    stages = [json.loads(line).get("stage") for line in lines]
    assert "refine" in stages and "warmup" not in stages
