"""Which blocks get a head.

The proposal from a profile, and `--head_blocks auto` in a run and in the example.
"""

import dataclasses
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_encoder import SHAPE, make_encoder, make_processor, open_digits

from mim_refiner_hf import MimRefinerModel, RefineRecipe
from mim_refiner_hf.data.images import ImageDataset
from mim_refiner_hf.data.stream import ImageStream, open_stream
from mim_refiner_hf.evaluation import BlockProfile, propose_head_blocks
from mim_refiner_hf.evaluation.block_analysis import assemble
from mim_refiner_hf.publishing.hub import save_model_folder
from mim_refiner_hf.refinement.resolve import ResolvedRecipe
from mim_refiner_hf.runs import run as run_module
from mim_refiner_hf.runs.head_choice import HeadChoice, check_measurable
from mim_refiner_hf.runs.run import run


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return open_digits()


def profile_of(scores: list[float], labelled: bool = True) -> list[BlockProfile]:
    """A profile whose k-NN accuracy, or without labels agreement, is `scores`.

    The other one says the opposite.
    """
    others = [1 - score for score in scores]
    accuracies, agreements = (scores, others) if labelled else (None, scores)
    return assemble(
        accuracies, agreements, None, [torch.randn(5, 3) for _ in scores], [1.0] * len(scores)
    )


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    ("scores", "frozen", "first"),
    [
        # the last is best: the last third
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 0, 4),
        # the best lies before the last third: from there on
        (
            [0.1, 0.2, 0.3, 0.6, 0.5, 0.4],
            0,
            3,
        ),
        ([0.1, 0.2, 0.3, 0.605, 0.5, 0.6], 0, 4),  # not by more than noise
        ([0.9, 0.2, 0.3, 0.4, 0.5, 0.4], 0, 3),  # far too early: the last half
        ([0.1, 0.2, 0.3, 0.6, 0.5, 0.4], 4, 4),  # frozen blocks carry none
        ([0.1, 0.2, 0.3, 0.6, 0.5, 0.4], 5, 5),
        ([0.3, 0.2], 0, 0),
        ([0.3], 0, 0),
    ],
)
def test_proposal(scores: list[float], frozen: int, first: int, labelled: bool) -> None:
    profile = profile_of(scores, labelled)
    blocks, reason = propose_head_blocks(profile, frozen)
    assert blocks == list(range(first, len(scores)))
    assert reason.startswith(
        "k-NN accuracy is best in block"
        if labelled
        else "agreement of neighbours under augmentation is best in"
    )
    assert ("blocks are frozen" in reason) == (frozen > 0)


def test_proposal_tells_its_evidence() -> None:
    _, reason = propose_head_blocks(profile_of([0.1, 0.2, 0.3, 0.6, 0.5, 0.4]))
    assert reason == (
        "k-NN accuracy is best in block 3 (60.0 %) and falls to 40.0 % in block 5, before the last "
        "third of the blocks: heads from "
        "there on"
    )
    _, reason = propose_head_blocks(profile_of([0.1, 0.2, 0.3, 0.6, 0.7, 0.65]))
    assert reason == (
        "k-NN accuracy is best in block 4 (70.0 %) and falls to 65.0 % in block 5: the last third "
        "of the blocks, 4 to 5, includes it"
    )
    with pytest.raises(ValueError, match=r"frozen=6 of 6 blocks"):
        propose_head_blocks(profile_of([0.1] * 6), frozen=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model_folder(folder, make_encoder(), make_processor())
    return str(folder)


@pytest.fixture
def recipe(model: str, tmp_path: Path) -> Callable[..., RefineRecipe]:
    """A refinement of 3 + 3 steps on digits, with some fields changed."""

    def changed(output: str = "out", **changes: Any) -> RefineRecipe:
        fields: dict[str, Any] = {
            "model": model,
            "dataset": "digits",
            "head_blocks": "auto",
            "eval_fraction": 0.0,
            "projector_dim": 16,
            "predictor_dim": 16,
            "embedding_dim": 8,
            "queue_size": 64,
            "topk": 5,
            "local_views": 1,
            "colour": False,
            "flip": 0.0,
            "batch_size": 32,
            "max_steps": 3,
            "warmup_epochs": 0,
            "num_workers": 0,
            "log_every": 1,
            "report_to": "none",
            "output_dir": str(tmp_path / output),
        }
        return RefineRecipe(**{**fields, **changes})

    return changed


def losses(recipe: RefineRecipe) -> list[float]:
    lines = [
        json.loads(line)
        for line in (Path(recipe.output_dir) / "log.jsonl").read_text().splitlines()
    ]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_auto_measures_chooses_says_why_and_is_kept(
    recipe: Callable[..., RefineRecipe],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = recipe()
    run(dataclasses.replace(asked, stage="warmup"))  # stops between the stages
    printed = capsys.readouterr().out
    assert "what measuring all blocks proposes (auto; by default 2, output)" in printed
    assert (Path(asked.output_dir) / "blocks.png").stat().st_size > 0
    assert json.loads((Path(asked.output_dir) / "recipe.json").read_text())["head_blocks"] == "auto"

    def again(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("measured a second time")

    monkeypatch.setattr(run_module, "choose_head_blocks", again)
    result = run(asked)
    assert result is not None
    choice = json.loads((Path(asked.output_dir) / "metrics.json").read_text())["head_choice"]
    assert f"Heads on blocks {', '.join(map(str, choice['blocks']))}: {choice['reason']}" in printed
    profile = [BlockProfile(**block) for block in choice["profile"]]
    assert propose_head_blocks(profile) == (choice["blocks"], choice["reason"])
    assert result.metrics["recipe"]["head_blocks"] == "auto"

    named = recipe("named", head_blocks=choice["blocks"])
    run(named)
    # the same run, to the last bit
    assert losses(named) == losses(asked)
    with pytest.raises(ValueError, match=r"another recipe \(head_blocks was auto, is \[2, 3\]"):
        run(dataclasses.replace(asked, head_blocks=[2, 3]))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_auto_reads_what_the_heads_read_and_leaves_frozen_blocks_alone(
    recipe: Callable[..., RefineRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, Any] = {}
    choose = run_module.choose_head_blocks

    def watched(recipe: ResolvedRecipe, encoder: MimRefinerModel, *arguments: Any) -> HeadChoice:
        choice = choose(recipe, encoder, *arguments)
        chosen.update(blocks=choice.blocks, pooling=encoder.config.pooling)
        return choice

    monkeypatch.setattr(run_module, "choose_head_blocks", watched)
    run(recipe(freeze_blocks=3, pooling="mean", max_steps=1))
    assert chosen["blocks"] == [3]
    assert chosen["pooling"] == "mean"


def test_auto_needs_images_to_measure(
    recipe: Callable[..., RefineRecipe], digits: ImageDataset, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"head_blocks='auto': 49 images are too few to measure, 50"
    ):
        check_measurable(digits.subset(range(49)))
    check_measurable(digits.subset(range(50)))
    for i in range(40):
        (tmp_path / "few").mkdir(exist_ok=True)
        digits[i].image.save(tmp_path / f"few/{i}.png")
    assert isinstance(open_stream(str(tmp_path / "few")), ImageStream)
    with pytest.raises(ValueError, match=r"head_blocks='auto': 40 images are too few"):
        run(recipe(dataset=str(tmp_path / "few")))
    with pytest.raises(
        ValueError, match=r"head_blocks='auto': a stream cannot be measured.*eval_dataset"
    ):
        run(recipe(dataset=str(tmp_path / "few"), streaming=True))
    assert not (tmp_path / "out").exists()


def test_example_prints_table_and_proposal(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[1] / "examples/block_profile.py"
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(
        sys, "argv", [str(script), "--model", model, "--limit", "90", "--output", str(picture)]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0 and picture.stat().st_size > 0
    printed = capsys.readouterr().out
    assert "60 images as k-NN bank, 30 measured" in printed
    assert (
        len([line for line in printed.splitlines() if line.startswith("|")])
        == 2 + SHAPE["num_hidden_layers"]
    )
    assert "Heads on blocks " in printed and "is best in block " in printed
