"""Groups for FiftyOne and Label Studio, read by these tools' own loaders where they are installed.

Neither is in an extra: `pip install fiftyone label-studio-sdk` beside the package.
"""

import csv
import json
import os
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel, cli, cluster
from mim_refiner_hf.conversion.preprocessing import image_processor
from mim_refiner_hf.publishing import save_model_folder
from mim_refiner_hf.publishing.annotation_tools import GroupedImage, write_for_tools
from mim_refiner_hf.publishing.csv_cells import text_of

NAMES = ["plain.png", "été 猫.png", "100% #1?a=b&c.png", "a\"<b>'.png", "x y.png", "z.png"]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of groups, of images with names that want quoting, one of them no Unicode."""
    root = tmp_path_factory.mktemp("tools")
    photos = root / "photos"
    photos.mkdir()
    colours = [(200, 40, 40), (40, 200, 40), (40, 40, 200)]
    for place in range(18):
        name = f"{place // 6}-{NAMES[place % 6]}"
        noise = np.random.default_rng(place).integers(-20, 20, (16, 16, 3))
        pixels = np.clip(np.array(colours[place // 6]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(photos / name)
    odd = os.fsdecode(os.fsencode(photos) + b"/0-odd-\xff.png")
    Path(odd).write_bytes((photos / "0-plain.png").read_bytes())

    torch.manual_seed(0)
    config = MimRefinerConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    save_model_folder(root / "model", MimRefinerModel(config), image_processor(config, {}))
    words = f"cluster {photos} --model {root}/model --num_clusters 3 --out {root}/groups --also"
    assert cli.main([*words.split(), "fiftyone", "label-studio"]) == 0
    return root / "groups"


def table_of(groups: Path) -> dict[str, tuple[str, float]]:
    """What `groups.csv` says of every image whose name is Unicode."""
    rows = (groups / "groups.csv").read_text().splitlines()[1:]
    found = {}
    for path, group, confidence in csv.reader(rows):
        name = text_of(path)
        if not any("\ud800" <= letter <= "\udfff" for letter in name):
            found[name] = (f"Group {group}", float(confidence))
    return found


def test_fiftyone_has_every_image_with_its_group(groups: Path) -> None:
    files = json.loads((groups / "fiftyone/data.json").read_text())
    labels = json.loads((groups / "fiftyone/labels.json").read_text())
    assert labels["classes"] == ["Group 0", "Group 1", "Group 2"]
    found = {
        files[key]: (label["label"], label["confidence"]) for key, label in labels["labels"].items()
    }
    assert found == table_of(groups)
    assert len(found) == 18
    assert all(Path(file).is_file() for file in found)


def test_fiftyones_own_importer_reads_it(groups: Path) -> None:
    importers = pytest.importorskip("fiftyone.utils.data.importers")
    reader = importers.FiftyOneImageClassificationDatasetImporter
    with reader(str(groups / "fiftyone"), data_path="data.json") as importer:
        found = {
            path: (label.label, pytest.approx(label.confidence)) for path, _, label in importer
        }
        assert importer.get_dataset_info()["classes"] == ["Group 0", "Group 1", "Group 2"]
    assert found == table_of(groups)


def test_label_studio_has_every_image_with_its_group(groups: Path) -> None:
    tasks = json.loads((groups / "label-studio.json").read_text())
    found = {}
    for task in tasks:
        address = urlsplit(task["data"]["image"])
        assert address.path == "/data/local-files/"
        # as its server does, with LOCAL_FILES_DOCUMENT_ROOT=/
        (place,) = parse_qs(address.query)["d"]
        assert unquote(address.query.removeprefix("d=")) == place
        (prediction,) = task["predictions"]
        (result,) = prediction["result"]
        (choice,) = result["value"]["choices"]
        found[f"/{place}"] = (choice, prediction["score"])
    assert found == table_of(groups)

    interface = ElementTree.parse(groups / "label-studio.xml").getroot()
    choices = interface.find("Choices")
    assert choices is not None
    assert [choice.get("value") for choice in choices] == ["Group 0", "Group 1", "Group 2"]
    names = {result["from_name"], result["to_name"]}
    assert names == {choices.get("name"), choices.get("toName")}


def test_label_studios_own_interface_takes_it(groups: Path) -> None:
    label_interface = pytest.importorskip("label_studio_sdk.label_interface")
    interface = label_interface.LabelInterface((groups / "label-studio.xml").read_text())
    interface.validate()
    for task in json.loads((groups / "label-studio.json").read_text()):
        # with predictions inside, its own call of itself lacks an argument (2.1)
        assert interface.validate_task({"data": task["data"]})
        for prediction in task["predictions"]:
            assert interface.validate_prediction(prediction)


def test_names_of_groups_are_quoted(tmp_path: Path) -> None:
    """Two groups of one name are one choice; control characters are spelt out in both files."""
    names = ['a "<b>" & c', "bell\x07", 'a "<b>" & c']
    images = [GroupedImage(tmp_path / "x.png", name, 0.5) for name in names]
    write_for_tools(tmp_path, images, names, ["label-studio", "fiftyone"])
    choices = ElementTree.parse(tmp_path / "label-studio.xml").getroot().find("Choices")
    assert choices is not None
    shown = [choice.get("value") for choice in choices]
    assert shown == ['a "<b>" & c', "bell\\u0007"]
    tasks = json.loads((tmp_path / "label-studio.json").read_text())
    said = [task["predictions"][0]["result"][0]["value"]["choices"][0] for task in tasks]
    assert said == [shown[0], shown[1], shown[0]]
    assert json.loads((tmp_path / "fiftyone/labels.json").read_text())["classes"] == shown


def test_images_of_a_table_are_those_written(tmp_path: Path, groups: Path) -> None:
    """Images without files of their own are found in the folder of the groups."""
    images = [Image.new("RGB", (16, 16), (20 * n, 0, 0)) for n in range(6)]
    out = tmp_path / "out"
    cluster(images, model=groups.parent / "model", num_clusters=2, out=out, also="fiftyone")
    files = json.loads((out / "fiftyone/data.json").read_text())
    assert len(files) == 6
    assert all(Path(file).is_file() and Path(file).is_relative_to(out) for file in files.values())


def test_what_cannot_be_written_is_refused(tmp_path: Path, groups: Path) -> None:
    images = [Image.new("RGB", (16, 16))] * 4
    with pytest.raises(ValueError, match=r"also='csv'.*allowed: fiftyone, label-studio"):
        cluster(images, model=groups.parent / "model", out=tmp_path / "out", also=["csv"])
    with pytest.raises(ValueError, match=r"also.*needs out"):
        cluster(images, model=groups.parent / "model", also=["fiftyone"])
    with pytest.raises(ValueError, match=r"out.* is for images"):
        cluster(np.eye(4), also=["fiftyone"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_are_no_unicode_are_counted(
    groups: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    del groups
    odd = Path(os.fsdecode(b"/photos/\xff.png"))
    images = [GroupedImage(odd, "a", 0.5), GroupedImage(Path("/photos/b.png"), "a", 0.5)]
    write_for_tools(tmp_path, images, ["a"], ["fiftyone"])
    assert "1 images are not among those for fiftyone" in caplog.text
    assert list(json.loads((tmp_path / "fiftyone/data.json").read_text()).values()) == [
        "/photos/b.png"
    ]
