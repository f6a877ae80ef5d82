"""`mim-refiner evaluate`.

The same numbers as the protocols, errors and verdicts, a card that is updated and not piled up.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import BertConfig, BertModel

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel, load_encoder
from mim_refiner_hf.cli import main
from mim_refiner_hf.data.images import hold_out, open_images
from mim_refiner_hf.evaluation import evaluate_encoder, extract_features, knn_accuracy
from mim_refiner_hf.evaluation.cluster_scores import cluster_accuracy, kmeans_runs, matched
from mim_refiner_hf.evaluation.label_free import label_free_scores, similarities, two_views
from mim_refiner_hf.publishing import save_model_folder
from mim_refiner_hf.runs.choices import ON_MASKS
from mim_refiner_hf.runs.comparison import HELD_OUT

PICTURES = {"clusters.png", "map.png", "block_profile.png", "confusion.png", "neighbours.png"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tiny encoders with a card each; the second sees less."""
    root = tmp_path_factory.mktemp("models")
    folders = []
    for name, depth in (("good", 2), ("other", 1)):
        torch.manual_seed(depth)
        shape = {
            "hidden_size": 32,
            "num_hidden_layers": depth,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }
        encoder = MimRefinerModel(
            MimRefinerConfig(**shape, image_size=16, patch_size=4, num_channels=1)
        )
        size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
        processor = MimRefinerImageProcessor(
            **size, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
        )
        save_model_folder(root / name, encoder, processor)
        (root / name / "README.md").write_text(
            "---\nlicense: apache-2.0\n---\n\n# A card\n", encoding="utf-8"
        )
        folders.append(root / name)
    return folders[0], folders[1]


@pytest.fixture(autouse=True)
def _few_runs(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mim_refiner_hf.evaluation.evidence.RESAMPLES", 50)
    monkeypatch.setattr(
        "mim_refiner_hf.evaluation.report.kmeans_runs", partial(kmeans_runs, runs=5)
    )


def test_matched_items_are_those_that_accuracy_counts() -> None:
    rng = np.random.default_rng(0)
    for groups in (3, 5, 9):
        labels, assignments = rng.integers(0, 5, 200) * 7, rng.integers(0, groups, 200) - 4
        own = matched(labels, assignments)
        assert own.mean() == cluster_accuracy(labels, assignments)
        # one class per group, one group per class
        for group in np.unique(assignments[own]):
            assert len(np.unique(labels[own & (assignments == group)])) == 1
        assert len(np.unique(labels[own])) == len(np.unique(assignments[own]))


def test_report_has_the_protocols_numbers_and_the_pictures(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    good, other = models
    assert (
        main(
            [
                "evaluate",
                str(good),
                "--dataset",
                "digits",
                "--against",
                str(other),
                "--output_dir",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    encoder = load_encoder(good)
    bank, evaluated = hold_out(open_images("digits", num_channels=1), HELD_OUT, 0)
    expected = evaluate_encoder(encoder, vars(encoder)["image_processor"], bank, evaluated).metrics
    assert report["after"]["knn_per_block"] == pytest.approx(
        expected.pop("knn_per_block"), abs=0.003
    )  # one image of 359
    share, count = expected["knn_accuracy"], len(evaluated)
    # k-means turns last bits, which versions round differently, into a few images
    assert {name: report["after"][name] for name in expected} == pytest.approx(
        expected, abs=3 / count
    )
    assert report["after"]["knn_accuracy_standard_error"] == pytest.approx(
        np.sqrt(share * (1 - share) / count), rel=0.4
    )
    assert set(report["changes"]) == {"knn_accuracy", "cluster_accuracy", "nmi"}
    change = report["changes"]["knn_accuracy"]
    assert change["difference"] == pytest.approx(
        report["after"]["knn_accuracy"] - report["before"]["knn_accuracy"]
    )
    assert change["low"] < change["difference"] < change["high"]
    assert (
        report["dataset"]["eval_images"] == count
        and report["seed"] == 0
        and report["versions"]["torch"]
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == PICTURES | {
        "metrics.json",
        "report.md",
    }
    for name in PICTURES:
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 200
    page = (tmp_path / "out" / "report.md").read_text()
    assert (
        "| verdict |" in page
        and report["command"] in page
        and report["dataset"]["fingerprint"] in page
    )
    assert "Of 3 scores whose change can be judged:" in page and "50 resamples" in page


@pytest.mark.slow
def test_a_model_is_not_better_than_itself(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    encoder = load_encoder(models[0])
    save_model_folder(copy, encoder, vars(encoder)["image_processor"])
    flags = ["--dataset", "digits", "--split", "test", "--transfer", "digits"]
    flags += ["--against", str(copy), "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", str(models[0]), *flags, "--protocols", "low_shot"]) == 0
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (
        len(report["changes"]) == 6
        and "linear_probe_accuracy" in report["transfer"]["digits"]["changes"]
    )
    changes = report["changes"] | report["transfer"]["digits"]["changes"]
    assert {(change["difference"], change["verdict"]) for change in changes.values()} == {
        (0.0, "no clear difference")
    }
    assert "no clear difference" in capsys.readouterr().out


@pytest.mark.slow
def test_card_is_updated_and_not_piled_up(models: tuple[Path, Path], tmp_path: Path) -> None:
    card = models[1] / "README.md"
    command = [
        "evaluate",
        str(models[1]),
        "--dataset",
        "digits",
        "--split",
        "test",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    once = card.read_text()
    assert main(command) == 0
    assert main([*command, "--seed", "1"]) == 0
    thrice = ModelCard.load(card)
    assert once.count("## Evaluation on") == 1 and "# A card" in once
    names = [result.metric_name for result in ModelCard(once).data.eval_results]
    assert len(names) == len(set(names)) >= 5
    assert thrice.data.license == "apache-2.0" and "# A card" in thrice.text
    # another seed holds out other images
    assert thrice.text.count("## Evaluation on") <= 2


def forward_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the batch size at each forward pass of any encoder."""
    passes: list[int] = []
    forward = MimRefinerModel.forward

    def counting(
        self: MimRefinerModel, pixel_values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        passes.append(len(pixel_values))
        return forward(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(MimRefinerModel, "forward", counting)
    return passes


@pytest.mark.slow
def test_features_that_are_kept_are_never_computed_again(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = forward_passes(monkeypatch)
    command = [
        "evaluate",
        str(models[0]),
        "--dataset",
        "digits",
        "--eval_split",
        "test",
        "--num_workers",
        "0",
    ]
    command += ["--against", str(models[1]), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--protocols", "linear_probe_fast", "low_shot"]) == 0
    # both models, every image once; without --features nothing stays
    assert sum(passes) == 2 * 1797
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    first = json.loads((tmp_path / "out" / "metrics.json").read_text())
    kept = [*command, "--features", str(tmp_path / "features")]
    assert main(kept) == 0 and sum(passes) == 4 * 1797
    assert main([*kept, "--protocols", "linear_probe_fast", "low_shot"]) == 0
    assert (
        main(["evaluate", str(models[0]), "--dataset", "digits", "--split", "test", *kept[-4:]])
        == 0
    )  # another split of the same
    assert sum(passes) == 4 * 1797
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["against"] is None
    assert first["after"]["linear_probe_accuracy"] > 0.3


def test_every_k_and_temperature_is_what_it_is_alone(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    assert (
        main(
            [
                "evaluate",
                str(models[0]),
                "--dataset",
                "digits",
                "--split",
                "test",
                "--output_dir",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    after = json.loads((tmp_path / "out" / "metrics.json").read_text())["after"]
    encoder = load_encoder(models[0])
    bank, evaluated = (
        extract_features(encoder, images, vars(encoder)["image_processor"], blocks=[0, 1])
        for images in hold_out(open_images("digits", split="test", num_channels=1), HELD_OUT, 0)
    )
    assert bank.labels is not None and evaluated.labels is not None
    for place, blocks in (("last block", [1]), ("last 2 blocks", [0, 1])):
        train, test = (
            torch.cat([found.blocks[block] for block in blocks], dim=1)
            for found in (bank, evaluated)
        )
        settings = [(entry["k"], entry["temperature"]) for entry in after["knn"][place]]
        assert settings == [
            (k, tau) for k in (1, 5, 10, 20, 50, 100, 200) for tau in (0.02, 0.07, 0.2)
        ]
        for entry in after["knn"][place]:
            alone = knn_accuracy(
                train,
                bank.labels,
                test,
                evaluated.labels,
                k=entry["k"],
                temperature=entry["temperature"],
            )
            assert entry["accuracy"] == pytest.approx(alone, abs=0.011)  # one image of 100
    assert after["knn"]["last block"][7]["accuracy"] == after["knn_accuracy"]


def photos(folder: Path, count: int = 12) -> Path:
    for index in range(count):
        path = folder / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20, 20), 20 + 10 * index).save(path)
    return folder


def test_without_labels_what_needs_none_is_measured(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "evaluate",
        str(models[0]),
        "--dataset",
        str(photos(tmp_path / "photos", 60)),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--protocols", "low_shot"]) == 2
    assert "needs a label" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*command, "--against", str(models[1])]) == 0
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    copies = {"separation", "retrieval", "cluster_stability"}
    judged = copies | {"neighbour_agreement"}
    scores = judged | {"silhouette"}
    errors = {f"{name}_standard_error" for name in scores}
    assert set(report["after"]) == scores | errors | {"rankme"}
    # a silhouette is of each model's own space
    assert set(report["changes"]) == judged
    assert 0 <= report["after"]["neighbour_agreement"] <= 1
    page = (tmp_path / "out" / "report.md").read_text()
    assert "not judged" in page and "separation d'" in page and "(MRR)" in page

    # as the verdict on a run has them, from its own way
    encoder = load_encoder(models[0])
    _, held_out = hold_out(open_images(str(tmp_path / "photos"), num_channels=1), HELD_OUT, 0)
    views = two_views(encoder, held_out, vars(encoder)["image_processor"], seed=0)
    for name, score in label_free_scores(views, seed=0).metrics.items():
        assert report["after"][name] == pytest.approx(score, abs=1e-4), name
    # reciprocal ranks written out
    near = similarities(views)
    places = [1 + int((row > row[place]).sum()) for place, row in enumerate(near)]
    mrr = sum(1 / place for place in places) / len(places)
    assert report["after"]["retrieval"] == pytest.approx(mrr, abs=1e-4)


def test_broken_images_are_left_out_on_both_sides(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    digits = open_images("digits", num_channels=1)
    for i in range(80):
        image, label, _ = digits[i]
        path = tmp_path / "photos" / str(label) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    images = open_images(str(tmp_path / "photos"), num_channels=1)
    bank, evaluated = hold_out(images, HELD_OUT, 0)
    for found in (bank, evaluated):
        Path(found.describe(3)).write_bytes(b"no image")
    flags = [
        "--dataset",
        str(tmp_path / "photos"),
        "--against",
        str(models[1]),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(["evaluate", str(models[0]), *flags, "--protocols", "linear_probe_fast"]) == 0
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    bank, evaluated = (
        open_images(str(tmp_path / "photos"), num_channels=1).subset(
            [int(index) for place, index in enumerate(found.indices) if place != 3]
        )
        for found in (bank, evaluated)
    )
    assert (report["dataset"]["bank_images"], report["dataset"]["eval_images"]) == (
        len(bank),
        len(evaluated),
    )
    encoder = load_encoder(models[0])
    expected = evaluate_encoder(encoder, vars(encoder)["image_processor"], bank, evaluated).metrics
    assert report["after"]["knn_accuracy"] == pytest.approx(expected["knn_accuracy"])


def test_masks_are_measured_by_the_segmentation_probe(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    for split, seed in (("train", 0), ("test", 1)):
        masks = (
            np.random.default_rng(seed)
            .integers(0, 2, (6, 4, 4))
            .repeat(4, axis=1)
            .repeat(4, axis=2)
            .astype(np.uint8)
        )
        rows = {
            "image": [Image.fromarray(200 * mask) for mask in masks],
            "mask": [Image.fromarray(mask) for mask in masks],
        }
        (tmp_path / "masks").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            str(tmp_path / "masks" / f"{split}.parquet")
        )
    (tmp_path / "masks" / "classes.json").write_text(json.dumps(["dark", "bright"]))
    command = [
        "evaluate",
        str(models[0]),
        "--dataset",
        str(tmp_path / "masks"),
        "--protocols",
        *ON_MASKS,
    ]
    command += [
        "--against",
        str(models[1]),
        "--num_workers",
        "0",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(command) == 2
    assert main([*command, "--eval_split", "test"]) == 0
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    scores = {f"{name}_miou" for name in ON_MASKS}
    assert set(report["after"]) == scores | {f"{name}_standard_error" for name in scores}
    assert set(report["changes"]) == scores
    # dark and bright are told apart by every one
    assert all(report["after"][name] > 0.4 for name in scores)
    assert "only segmentation was" in (tmp_path / "out" / "report.md").read_text()


def test_fine_tuning_takes_a_recipe(models: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text(
        "epochs: 2\nwarmup_epochs: 0\nfraction: 0.1\nscale: 0.5\nflip: 0.0\n"
    )
    command = [
        "evaluate",
        str(models[1]),
        "--dataset",
        "digits",
        "--num_workers",
        "0",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--recipe", "fine-tune-1percent"]) == 2
    assert (
        main([*command, "--protocols", "fine_tuning", "--recipe", str(tmp_path / "short.yaml")])
        == 0
    )
    assert (
        0
        <= json.loads((tmp_path / "out" / "metrics.json").read_text())["after"][
            "fine_tuning_accuracy"
        ]
        <= 1
    )
    # a tenth of the 1038 that are not held out
    assert re.search(
        r"10\d images \(drawn, 0.1 of all\), 2 epochs", (tmp_path / "out" / "report.md").read_text()
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset", "no_such_folder/"], "no_such_folder"),
        (["--dataset", "digits", "--against", "gone.pth"], "gone.pth"),
        (["--dataset", "digits", "--output_dir", "{tmp}/full"], "something else"),
        (["--dataset", "digits", "--output_dir", "{tmp}/full/note.txt"], "is a file"),
        (["--dataset", "digits", "--features", "{tmp}/full"], "not a folder of features"),
        (["--dataset", "digits", "--transfer", "no_such_folder/"], "no_such_folder"),
        (["--dataset", "digits", "--against", "{tmp}/text"], "text"),
        (
            ["--dataset", "digits", "--protocols", "segmentation", "low_shot"],
            "a run of its own",
        ),
        (
            ["--dataset", "digits", "--protocols", "attentive_probe", "segmentation_knn"],
            "--protocols segmentation_knn: it needs masks",
        ),
        (["--dataset", "digits", "--protocols", "segmentation_knn"], "name the images to measure"),
        (["--dataset", "digits", "--protocols", "fine_tuning", "--recipe", "no-such"], "no-such"),
    ],
)
def test_wrong_use_exits_2(
    models: tuple[Path, Path],
    tmp_path: Path,
    flags: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    BertModel(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "text")
    before = (models[0] / "README.md").read_text()
    assert (
        main(
            [
                "evaluate",
                str(models[0]),
                "--num_workers",
                "0",
                *(flag.format(tmp=tmp_path) for flag in flags),
            ]
        )
        == 2
    )
    assert said in capsys.readouterr().err
    assert (tmp_path / "full" / "note.txt").read_text() == "mine" and (
        models[0] / "README.md"
    ).read_text() == before
