"""`mim-refiner evaluate`: the same numbers as the protocols, errors and verdicts, a card that is updated and not piled up."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel, load_encoder
from mim_refiner_hf.cli import main
from mim_refiner_hf.data import hold_out, open_images
from mim_refiner_hf.evaluation import evaluate_encoder
from mim_refiner_hf.evaluation.cluster_scores import cluster_accuracy, kmeans, matched
from mim_refiner_hf.evaluation.comparison import HELD_OUT
from mim_refiner_hf.publishing import save_model_folder

PICTURES = {"clusters.png", "map.png", "block_profile.png", "confusion.png", "neighbours.png"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tiny encoders with a card each; the second sees less."""
    root = tmp_path_factory.mktemp("models")
    folders = []
    for name, depth in (("good", 2), ("other", 1)):
        torch.manual_seed(depth)
        shape = {"hidden_size": 32, "num_hidden_layers": depth, "num_attention_heads": 2, "intermediate_size": 64}
        encoder = MimRefinerModel(MimRefinerConfig(**shape, image_size=16, patch_size=4, num_channels=1))
        size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
        processor = MimRefinerImageProcessor(**size, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False)
        save_model_folder(root / name, encoder, processor)
        (root / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# A card\n", encoding="utf-8")
        folders.append(root / name)
    return folders[0], folders[1]


@pytest.fixture(autouse=True)
def _few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mim_refiner_hf.evaluation.evidence.RESAMPLES", 50)
    monkeypatch.setattr("mim_refiner_hf.evaluation.report.kmeans", partial(kmeans, runs=5))


def test_matched_items_are_those_that_accuracy_counts() -> None:
    rng = np.random.default_rng(0)
    for groups in (3, 5, 9):
        labels, assignments = rng.integers(0, 5, 200) * 7, rng.integers(0, groups, 200) - 4
        own = matched(labels, assignments)
        assert own.mean() == cluster_accuracy(labels, assignments)
        for group in np.unique(assignments[own]):  # one class per group, one group per class
            assert len(np.unique(labels[own & (assignments == group)])) == 1
        assert len(np.unique(labels[own])) == len(np.unique(assignments[own]))


def test_report_has_the_protocols_numbers_and_the_pictures(models: tuple[Path, Path], tmp_path: Path) -> None:
    good, other = models
    assert (
        main(["evaluate", str(good), "--dataset", "digits", "--against", str(other), "--output_dir", str(tmp_path / "out")])
        == 0
    )
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    encoder = load_encoder(good)
    bank, evaluated = hold_out(open_images("digits", num_channels=1), HELD_OUT, 0)
    expected = evaluate_encoder(encoder, vars(encoder)["image_processor"], bank, evaluated).metrics
    assert report["after"]["knn_per_block"] == pytest.approx(expected.pop("knn_per_block"))
    assert {name: report["after"][name] for name in expected} == pytest.approx(expected)
    share, count = expected["knn_accuracy"], len(evaluated)
    assert report["after"]["knn_accuracy_standard_error"] == pytest.approx(np.sqrt(share * (1 - share) / count), rel=0.4)
    assert set(report["changes"]) == {"knn_accuracy", "cluster_accuracy", "nmi"}
    change = report["changes"]["knn_accuracy"]
    assert change["difference"] == pytest.approx(report["after"]["knn_accuracy"] - report["before"]["knn_accuracy"])
    assert change["low"] < change["difference"] < change["high"]
    assert report["dataset"]["eval_images"] == count and report["seed"] == 0 and report["versions"]["torch"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == PICTURES | {"metrics.json", "report.md"}
    for name in PICTURES:
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 200
    assert "| verdict |" in (tmp_path / "out" / "report.md").read_text()


def test_a_model_is_not_better_than_itself(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    encoder = load_encoder(models[0])
    save_model_folder(copy, encoder, vars(encoder)["image_processor"])
    flags = ["--dataset", "digits", "--against", str(copy), "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", str(models[0]), *flags]) == 0
    changes = json.loads((tmp_path / "out" / "metrics.json").read_text())["changes"]
    assert {(change["difference"], change["verdict"]) for change in changes.values()} == {(0.0, "no clear difference")}
    assert "no clear difference" in capsys.readouterr().out


def test_card_is_updated_and_not_piled_up(models: tuple[Path, Path], tmp_path: Path) -> None:
    card = models[1] / "README.md"
    command = ["evaluate", str(models[1]), "--dataset", "digits", "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0
    once = card.read_text()
    assert main(command) == 0
    assert main([*command, "--seed", "1"]) == 0
    thrice = ModelCard.load(card)
    assert once.count("## Evaluation on") == 1 and "# A card" in once
    names = [result.metric_name for result in ModelCard(once).data.eval_results]
    assert len(names) == len(set(names)) >= 5
    assert thrice.data.license == "apache-2.0" and "# A card" in thrice.text
    assert thrice.text.count("## Evaluation on") <= 2  # another seed holds out other images


def test_without_labels_only_rankme_is_measured(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    for index in range(12):
        Image.effect_noise((20, 20), 20 + 10 * index).save(tmp_path / "photos" / f"{index}.png")
    command = ["evaluate", str(models[0]), "--dataset", str(tmp_path / "photos"), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--protocols", "low_shot"]) == 2
    assert "needs a label" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(command) == 0
    assert set(json.loads((tmp_path / "out" / "metrics.json").read_text())["after"]) == {"rankme"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset", "no_such_folder/"], "no_such_folder"),
        (["--dataset", "digits", "--against", "gone.pth"], "gone.pth"),
        (["--dataset", "digits", "--output_dir", "{tmp}/full"], "something else"),
        (["--dataset", "digits", "--output_dir", "{tmp}/full/note.txt"], "is a file"),
    ],
)
def test_wrong_use_exits_2(
    models: tuple[Path, Path], tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    before = (models[0] / "README.md").read_text()
    assert main(["evaluate", str(models[0]), "--num_workers", "0", *(flag.format(tmp=tmp_path) for flag in flags)]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "full" / "note.txt").read_text() == "mine" and (models[0] / "README.md").read_text() == before
