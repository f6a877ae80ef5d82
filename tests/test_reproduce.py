"""docs/reproduce.md in earnest: each of its evaluations is run on a stand-in of its data, in tiny.

The commands are read off the page, so a changed page is tested; only the model and the images are
small.
"""

import io
import json
import os
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel
from mim_refiner_hf.cli import main
from mim_refiner_hf.conversion.load import image_processor
from mim_refiner_hf.evaluation.cluster_scores import kmeans_runs
from mim_refiner_hf.publishing.hub import save_model_folder

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reproduce.md"
CLASSES = 6
pytestmark = pytest.mark.usefixtures("without_umap")


def page_commands() -> list[list[str]]:
    """The words of every evaluation of the page, without the launcher."""
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = []
    for line in text.splitlines():
        start = ("mim-refiner evaluate ", "accelerate launch --num_processes 8 training/evaluate")
        if line.startswith(start) and " MODEL " not in line:
            words = shlex.split(line)
            place = 2 if words[0] == "mim-refiner" else words.index("training/evaluate.py") + 1
            commands.append(words[place:])
    return commands


def picture(rng: np.random.Generator, colour: int) -> Image.Image:
    """Noise around a colour of its class."""
    noise = rng.integers(0, 80, (36, 40, 3)) + (37 * colour) % 150
    return Image.fromarray(noise.astype(np.uint8))


def as_png(image: Image.Image) -> dict[str, bytes]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue()}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the page has it: data sets, lists, and a tiny model under the name of the zoo."""
    root = tmp_path_factory.mktemp("stand-in")
    rng = np.random.default_rng(0)
    for data in ("imagenet", "inat18", "vtab/pets"):
        for split, count in (("train", 4), ("val", 3), ("test", 3)):
            for number in range(CLASSES):
                folder = root / data / split / f"n{number:08d}"
                folder.mkdir(parents=True)
                for image in range(count):
                    name = f"n{number:08d}_{image}.png"
                    picture(rng, number).save(folder / name)

    lists = root / "lists"
    lists.mkdir()
    names = [f"n{number:08d}_{{}}.JPEG" for number in range(CLASSES)]
    for split in (1, 2):
        (lists / f"1imgs_class_{split}.txt").write_text(
            "\n".join(name.format(split) for name in names)
        )
    few = "\n".join(name.format(image) for name in names for image in (0, 3))
    for name in ("1percent", "10percent", "inat18_5shot_1"):
        (lists / f"{name}.txt").write_text(few + "\n")

    (root / "ade20k").mkdir()
    for split in ("train", "test"):
        images = [as_png(picture(rng, number)) for number in range(4)]
        masks = [as_png(Image.fromarray(rng.integers(0, 3, (36, 40), np.uint8))) for _ in range(4)]
        table = pyarrow.table({"image": images, "mask": masks})
        parquet.write_table(table, root / f"ade20k/{split}.parquet")
    (root / "ade20k/classes.json").write_text(json.dumps(["sky", "tree", "road"]))

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = MimRefinerConfig(**shape, intermediate_size=64, image_size=32, patch_size=16)
    encoder = MimRefinerModel(config).eval()
    save_model_folder(root / "mae_refined_l16", encoder, image_processor(config, {}))
    return root


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch, stand_in: Path) -> Iterator[None]:
    monkeypatch.setattr("mim_refiner_hf.evaluation.evidence.RESAMPLES", 20)
    monkeypatch.setattr(
        "mim_refiner_hf.evaluation.report.kmeans_runs", partial(kmeans_runs, runs=3)
    )
    monkeypatch.setattr("mim_refiner_hf.evaluation.segmentation.MIOU_RESAMPLES", 20)
    before = Path.cwd()
    os.chdir(stand_in)
    yield
    os.chdir(before)


def test_the_page_has_commands_for_every_protocol() -> None:
    asked = " ".join(word for command in page_commands() for word in command)
    for word in ("linear_probe", "low_shot", "fine_tuning", "segmentation", "--protocol paper"):
        assert word in asked
    assert len(page_commands()) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("command", page_commands(), ids=lambda words: words[-1])
def test_a_command_of_the_page_runs(command: list[str]) -> None:
    assert main(["evaluate", *command, "--num_workers", "0"]) == 0
    report = json.loads((Path(command[-1]) / "metrics.json").read_text())
    if "segmentation" not in command:
        paper = "--protocol" in command
        size = 37 if paper else 32
        words = f"shorter side {size}, centre crop 32 x 32"
        assert report["protocol"]["images"] == {"mae_refined_l16": words}
        assert 0 <= report["after"]["knn_accuracy"] <= 1
    if "--split_file" in command:
        assert "listed" in (Path(command[-1]) / "report.md").read_text()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--bank_size 5", ["--bank_size 5", "at least 10"]),
        ("--protocol papers", ["--protocol", "'papers'", "quick"]),
        ("--split_file lists/1percent.txt", ["--split_file lists/1percent.txt", "low_shot"]),
        ("--protocols low_shot --split_file lists/no.txt", ["lists/no.txt", "no such file"]),
        (
            "--protocols low_shot --split_file lists/gone.txt",
            ["lists/gone.txt", "1 of its 1", "n9"],
        ),
        ("--protocols fine_tuning --split_file lists/empty.txt", ["lists/empty.txt", "is empty"]),
        ("--protocols low_shot --split_file lists/twice.txt", ["lists/twice.txt", "twice"]),
        ("--protocols low_shot --split_file lists/uneven.txt", ["lists/uneven.txt", "0 images"]),
        (
            "--protocols fine_tuning --split_file lists/1percent.txt lists/10percent.txt",
            ["one list, not 2"],
        ),
    ],
)
def test_bad_input_is_one_line(
    stand_in: Path, flags: str, says: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    (stand_in / "lists/gone.txt").write_text("n9\n")
    (stand_in / "lists/empty.txt").write_text("\n")
    (stand_in / "lists/twice.txt").write_text("n00000000_1\nn00000000_1.JPEG\n")
    (stand_in / "lists/uneven.txt").write_text("n00000000_1\n")
    words = ["evaluate", "mae_refined_l16", "--dataset", "imagenet/train", "--num_workers", "0"]
    words += ["--eval_dataset", "imagenet/val", *shlex.split(flags)]
    try:
        code: object = main(words)
    except SystemExit as error:
        code = error.code
    assert code == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    for part in says:
        assert part in line


def test_the_whole_bank_counts_unless_a_size_is_named(stand_in: Path) -> None:
    words = ["evaluate", "mae_refined_l16", "--dataset", "imagenet/train", "--num_workers", "0"]
    words += ["--eval_dataset", "imagenet/val", "--output_dir"]
    assert main([*words, "out/whole"]) == 0
    assert main([*words, "out/some", "--bank_size", "12"]) == 0
    whole, some = (
        json.loads((stand_in / f"out/{name}/metrics.json").read_text())
        for name in ("whole", "some")
    )
    assert whole["dataset"]["bank_images"] == 4 * CLASSES
    assert some["dataset"]["bank_images"] == 12
    assert whole["protocol"]["bank"].startswith("all images")
    assert some["protocol"]["bank"] == "at most 12 images, evenly spaced"
