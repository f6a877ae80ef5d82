"""docs/reproduce.md in earnest: each of its commands is run on a stand-in of its data, in tiny.

The commands are read off the page, so a changed page is tested; only the model and the images are
small, and what is trained is trained for an epoch or two. Once with six classes, and once, where
the shared folder is, with a thousand, and models that lie where the zoo puts its downloads: files
that the authors' own code wrote, of every official layout in turn.
"""

import io
import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from runpy import run_path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pytest
import torch
from golden_cases import GOLDENS, facts
from huggingface_hub import constants
from PIL import Image
from pyarrow import parquet

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel
from mim_refiner_hf.cli import main
from mim_refiner_hf.conversion import zoo
from mim_refiner_hf.conversion.download import Record
from mim_refiner_hf.conversion.preprocessing import image_processor
from mim_refiner_hf.conversion.shapes import HEADS_OF_WIDTH
from mim_refiner_hf.conversion.zoo import ZOO
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.data.split_files import listed_places
from mim_refiner_hf.evaluation.linear_probe import linear_probe
from mim_refiner_hf.evaluation.low_shot import shots_of_all
from mim_refiner_hf.evaluation.segmentation import segmentation_probe
from mim_refiner_hf.publishing.hub import save_model_folder
from mim_refiner_hf.runs import comparison, protocol
from mim_refiner_hf.runs.comparison import Data
from mim_refiner_hf.runtime.files import sha256_of

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "reproduce.md"
CLASSES = 6
OF_IMAGENET = 1000
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


def other_commands() -> list[str]:
    """The page's lines that are no evaluation: refinements, ablations, an example."""
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    pattern = r"^(?:accelerate launch .*training/(?:refine|pretrain)\.py .*|python .*)$"
    return re.findall(pattern, text, re.MULTILINE)


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
    subsets = [root / f"imagenet_subsets{split}" for split in (1, 2, 3)]
    names = [f"n{number:08d}_{{}}.JPEG" for number in range(CLASSES)]
    for image, folder in enumerate(subsets):
        folder.mkdir()
        (folder / "1imgs_class.txt").write_text("\n".join(name.format(image) for name in names))
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
    save_model_folder(root / "mae-refined-l16", encoder, image_processor(config, {}))
    return root


def few_epochs(*arguments: Any) -> Any:
    """`added_protocols`, whose recipe of fine-tuning then trains for one epoch."""
    added = protocol.added_protocols(*arguments)
    if added.recipe is None:
        return added
    return replace(added, recipe=replace(added.recipe, epochs=1, warmup_epochs=0))


@pytest.fixture(autouse=True)
def _quickly(quick: None, monkeypatch: pytest.MonkeyPatch, stand_in: Path) -> None:
    monkeypatch.setattr("mim_refiner_hf.runs.evaluate.added_protocols", few_epochs)
    trained = {
        "linear_probe": partial(linear_probe, epochs=2),
        "segmentation": partial(segmentation_probe, epochs=2),
        "segmentation_slide": partial(segmentation_probe, epochs=2, inference="slide"),
    }
    for name, run in trained.items():
        monkeypatch.setitem(comparison.PROTOCOLS, name, run)  # type: ignore[arg-type]
    monkeypatch.setattr("mim_refiner_hf.evaluation.evidence.RESAMPLES", 20)
    monkeypatch.setattr("mim_refiner_hf.evaluation.segmentation.MIOU_RESAMPLES", 20)
    monkeypatch.chdir(stand_in)


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
    if not any("segmentation" in word for word in command):
        paper = "--protocol" in command
        size = 37 if paper else 32
        words = f"shorter side {size}, centre crop 32 x 32"
        assert report["protocol"]["images"] == {"mae-refined-l16": words}
        assert 0 <= report["after"]["knn_accuracy"] <= 1
    if "--split_file" in command:
        assert "listed" in (Path(command[-1]) / "report.md").read_text()


# --- a thousand classes, and the authors' files ---------------------------------------------------


class Official(NamedTuple):
    """A file that the authors' code wrote: a golden, and a model of the zoo in the same layout."""

    model: str
    case: str
    file: str


OFFICIAL = [
    Official("mae-refined-l16", "mimrefiner-prenorm", "checkpoint.th"),
    Official("d2v2-refined-h14", "mimrefiner-postnorm", "checkpoint.th"),
    Official("mae-l16", "mae", "checkpoint_encoder.pth"),
    Official("mae-2b14", "maws", "checkpoint.pt"),
    Official("d2v2-l16", "data2vec2", "checkpoint.pt"),
    Official("dbot-l16", "dbot", "checkpoint_encoder.pth"),
    Official("crossmae-l16", "crossmae", "checkpoint_full.pth"),
    Official("mae-ct-l16", "maect-encoder", "checkpoint.th"),
    Official("capi-l14-in1k", "capi", "checkpoint.pth"),
]


@pytest.fixture(scope="module")
def thousand(shared: Path, stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet's folders with 1000 classes of two real photos; one more of every fourth class."""
    root = tmp_path_factory.mktemp("thousand")
    for name in ("inat18", "vtab", "ade20k"):
        shutil.copytree(stand_in / name, root / name)
    rows = parquet.read_table(shared / "data/tiny-imagenet-100/train.parquet").column("image")
    names = []
    # each class of the file holds ten of these: nine photos one after the other
    for number in range(OF_IMAGENET):
        name = f"n{number:08d}"
        splits = ("train", "train", "val") if number % 4 == 0 else ("train", "train")
        for place, split in enumerate(splits):
            folder = root / "imagenet" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            encoded = rows[9 * number + place].as_py()["bytes"]
            (folder / f"{name}_{place}.JPEG").write_bytes(encoded)
        names += [f"{name}_0.JPEG", f"{name}_1.JPEG"]

    lists = root / "lists"
    shutil.copytree(stand_in / "lists", lists)
    for split in (1, 2, 3):
        folder = root / f"imagenet_subsets{split}"
        folder.mkdir()
        (folder / "1imgs_class.txt").write_text("\n".join(names[split % 2 :: 2]) + "\n")
    for percent in (1, 10):
        (lists / f"{percent}percent.txt").write_text("\n".join(names) + "\n")
    return root


def put_into_zoo(
    official: Official, monkeypatch: pytest.MonkeyPatch, home: Path, depth: int | None = None
) -> None:
    """Let the zoo have downloaded a golden as one of its models; with `depth`, of so many blocks.

    Its width is none of the published ones, so the table of widths learns it.
    """
    entry = ZOO[official.model]
    of_case = facts(official.case)
    monkeypatch.setitem(HEADS_OF_WIDTH, of_case["dim"], of_case["num_heads"])
    file = home / "mim_refiner_hf" / (entry.name + Path(entry.url or entry.filename).suffix)
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDENS / official.case / official.file, file)
    if depth is not None:
        contents = torch.load(file, weights_only=True)
        key = next(key for key in ("model", "state_dict") if key in contents)
        first = {name: t for name, t in contents[key].items() if name.startswith("blocks.0.")}
        for block in range(depth):
            more = {n.replace(".0.", f".{block}.", 1): t.clone() for n, t in first.items()}
            contents[key] |= more
        torch.save(contents, file)
    Record(entry.url, size=file.stat().st_size, sha256=sha256_of(file)).write(file)

    monkeypatch.setattr(constants, "HF_HOME", str(home))
    # of the one file that lies on the Hub
    monkeypatch.setattr(zoo, "hf_hub_download", lambda *_, **__: str(file))


# the recipes of fine-tuning beyond the first run with six classes: they take the same flags
OF_A_THOUSAND = [
    words for words in page_commands() if words[-1] not in ("out/10percent", "out/100percent")
]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(OF_A_THOUSAND)))
def test_commands_run_with_a_thousand_classes_and_official_files(
    number: int, thousand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(thousand)
    command = OF_A_THOUSAND[number]
    official = OFFICIAL[number % len(OFFICIAL)]
    put_into_zoo(official, monkeypatch, tmp_path)
    assert main(["evaluate", official.model, *command[1:], "--num_workers", "0"]) == 0
    report = json.loads((Path(command[-1]) / "metrics.json").read_text())
    assert report["model"] == official.model
    if "imagenet/train" in command:
        assert report["dataset"]["num_classes"] == OF_IMAGENET
        assert report["dataset"]["bank_images"] == 2 * OF_IMAGENET


def test_there_is_a_command_for_every_official_layout() -> None:
    assert len(OF_A_THOUSAND) >= len(OFFICIAL)


@pytest.mark.slow
@pytest.mark.parametrize("command", other_commands())
def test_refinements_and_examples_of_the_page_run(
    command: str, thousand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(thousand)
    words = shlex.split(command)
    if words[0] == "python":
        put_into_zoo(OFFICIAL[2], monkeypatch, tmp_path)
        flags = ["--limit", "60", "--reconstruction_epochs", "1"]
        monkeypatch.setattr(sys, "argv", [*words[1:], *flags])
        example = run_path(str(REPOSITORY / words[1]), run_name="example")
        assert example["main"]() == 0
        return
    place = next(place for place, word in enumerate(words) if word.startswith("training/"))
    start = Official("d2v2-l16", "data2vec2", "checkpoint.pt")
    if "mae" in command:
        start = Official("mae-h14", "mae", "checkpoint_encoder.pth")
    put_into_zoo(start, monkeypatch, tmp_path, depth=32 if "h14" in command else 24)
    flags = ["--model", start.model, "--dataset", "imagenet", "--split", "train"]
    flags += ["--eval_split", "val", "--global_size", "32", "--local_size", "16", "--dry_run"]
    assert main(["refine", *words[place + 1 :], *flags]) == 0


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
        (
            "--protocols low_shot --split_file lists/uneven.txt",
            ["lists/uneven.txt", "0 images of class n00000001"],
        ),
        (
            "--protocols fine_tuning --split_file lists/1percent.txt lists/10percent.txt",
            ["one list, not 2"],
        ),
        ("--protocols fine_tuning --recipe fine-tune-1percent-2b14", ["freeze_blocks 6", "4 bl"]),
        ("--protocols fine_tuning --split_file lists/uneven.txt", ["needs 2 images or more"]),
        ("--eval_dataset imagenet/train", ["--eval_dataset imagenet/train", "the k-NN bank"]),
        ("--eval_dataset plain --protocols low_shot", ["plain has images without"]),
        ("--eval_split test", ["no split (sub-folder) 'test'", "'n00000004'] and 1 more"]),
    ],
)
def test_bad_input_is_one_line(
    stand_in: Path,
    flags: str,
    says: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # all of it is said before an image is encoded
    monkeypatch.delattr("mim_refiner_hf.runs.evaluate.without_broken")
    (stand_in / "plain").mkdir(exist_ok=True)
    for image in range(3):
        picture(np.random.default_rng(image), image).save(stand_in / f"plain/{image}.png")
    (stand_in / "lists/gone.txt").write_text("n9\n")
    (stand_in / "lists/empty.txt").write_text("\n")
    (stand_in / "lists/twice.txt").write_text("n00000000_1\nn00000000_1.JPEG\n")
    (stand_in / "lists/uneven.txt").write_text("n00000000_1\n")
    words = ["evaluate", "mae-refined-l16", "--dataset", "imagenet/train", "--num_workers", "0"]
    words += ["--eval_dataset", "imagenet/val", *shlex.split(flags)]
    try:
        code: object = main(words)
    except SystemExit as error:
        code = error.code
    assert code == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    for part in says:
        assert part in line


def test_a_list_that_names_images_that_are_held_out_says_so(
    stand_in: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    named = [path.name for path in (stand_in / "imagenet/train").rglob("*.png")]
    (stand_in / "lists/all.txt").write_text("\n".join(named))
    words = ["evaluate", "mae-refined-l16", "--dataset", "imagenet/train", "--num_workers", "0"]
    assert main([*words, "--protocols", "low_shot", "--split_file", "lists/all.txt"]) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"5 of its {len(named)} images" in line
    assert "held out" in line and "--eval_dataset" in line


def test_a_list_finds_images_by_name_and_where_names_occur_twice_by_folder(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/n00000001_7.JPEG"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "images" / name)
    images = open_images(str(tmp_path / "images"))
    names = [Path(str(source)).relative_to(tmp_path / "images").stem for source in images.found[0]]
    assert names == ["1", "2", "1", "n00000001_7"]

    # as editors of Windows write it, with a label and the Hub's name
    lines = "\ufeffdog/1.png\r\nn00000001_7_n00000001.JPEG 3\r\n\r\ncat\\1.png,0\r\n2\r\n"
    path = tmp_path / "list.txt"
    path.write_bytes(lines.encode())
    assert listed_places(images, path).tolist() == [2, 3, 0, 1]
    # what is left has one image of that name, and the list means the other
    with pytest.raises(ValueError, match=r"1 of its 4 images .* held out"):
        listed_places(images.subset([1, 2, 3]), path)

    for text, says in (
        ("1.png", "has several images called 1; a list needs"),
        ("cat/2.png\n2", "names 2 twice"),
        ("cow/1.png", "1 of its 1 images are not in .*, such as cow/1"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            listed_places(images, path)


def test_classes_that_a_list_lacks_are_said(
    stand_in: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, val = (open_images(f"imagenet/{split}") for split in ("train", "val"))
    data = Data("imagenet/train", None, None, "", train, val)
    (stand_in / "lists/two.txt").write_text("n00000000_1\nn00000003_1\n")
    lists = ["lists/two.txt"]
    added = protocol.added_protocols(["fine_tuning"], None, lists, [], seed=0)
    protocol.check_added([], data, added)
    assert "two.txt' has no image of 4 of the classes" in caplog.text
    assert "12 images of imagenet/val cannot be right" in caplog.text


def test_of_1_2_and_5_shots_those_are_measured_that_every_class_has(
    stand_in: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert list(shots_of_all(open_images("imagenet/train"))) == [1, 2]
    assert "class n00000000 has 4 images in imagenet/train" in caplog.text


def test_the_whole_bank_counts_unless_a_size_is_named(stand_in: Path) -> None:
    words = ["evaluate", "mae-refined-l16", "--dataset", "imagenet/train", "--num_workers", "0"]
    words += ["--eval_dataset", "imagenet/val", "--output_dir"]
    assert main([*words, "out/whole"]) == 0
    assert main([*words, "out/some", "--bank_size", "12"]) == 0
    whole, some = (
        json.loads((stand_in / f"out/{name}/metrics.json").read_text())
        for name in ("whole", "some")
    )
    assert whole["dataset"]["bank_images"] == 4 * CLASSES
    assert whole["dataset"]["eval_name"] == "imagenet/val"
    assert some["dataset"]["bank_images"] == 12
    assert whole["protocol"]["bank"].startswith("all images")
    assert some["protocol"]["bank"] == "at most 12 images, evenly spaced"
