"""Which columns of a table are read, against tables made for one rule each."""

import datetime
import decimal
import io
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Value
from PIL import Image

from mim_refiner_hf.cli import main
from mim_refiner_hf.data.found import SourceOptions
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.data.stream import open_stream

PICTURE = datasets.Image()


def encoded(side: int) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.new("RGB", (side, side)).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


SHOWN, SMALL = encoded(20), encoded(6)


def table(columns: dict[str, list[Any]], types: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns, features=datasets.Features(types))


def side(images: Any) -> int:
    return int(images[0].image.size[0])


@pytest.mark.parametrize("other", ["mask", "Segmentation", "thumbnail", "depth_map", "image_mask"])
@pytest.mark.parametrize("name", ["image", "photo", "pixel_values", "x"])
def test_masks_and_thumbnails_come_last(name: str, other: str) -> None:
    images = open_images(table({other: [SMALL], name: [SHOWN]}, {other: PICTURE, name: PICTURE}))
    assert side(images) == 20
    # alone it is what there is
    assert side(open_images(table({other: [SMALL]}, {other: PICTURE}))) == 6


def test_images_come_before_bytes() -> None:
    rows = {"md5": [b"x" * 16], "jpg": [SHOWN]}
    assert side(open_images(table(rows, {"md5": Value("binary"), "jpg": PICTURE}))) == 20


@pytest.mark.parametrize(
    ("name", "kind", "values", "expected"),
    [
        ("class", Value("string"), ["b", "a", ""], [1, 0, -1]),
        ("target", Value("int64"), [2, 0, None], [2, 0, -1]),
        ("category", Value("large_string"), ["b", "a", None], [1, 0, -1]),
        ("label", Value("float64"), [1.0, 0.0, None], [1, 0, -1]),
        ("label", Value("bool"), [True, False, None], [1, 0, -1]),
        ("species", ClassLabel(names=["a", "b"]), [1, 0, -1], [1, 0, -1]),
    ],
)
def test_labels_of_any_name_and_type(
    name: str, kind: Any, values: list[Any], expected: list[int]
) -> None:
    images = open_images(
        table({"image": [SHOWN] * 3, name: values}, {"image": PICTURE, name: kind})
    )
    assert images.labels is not None and images.labels.tolist() == expected


def test_a_column_without_a_label_gives_way_to_the_next() -> None:
    rows = {"image": [SHOWN] * 2, "label": [None, None], "labels": [1, 0]}
    types = {"image": PICTURE, "label": Value("int64"), "labels": Value("int64")}
    assert open_images(table(rows, types)).labels.tolist() == [1, 0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (datasets.Sequence(Value("int64")), [0, 1]),
        ({"id": Value("int64")}, {"id": 1}),
        (Value("date32"), datetime.date(2026, 1, 1)),
        (Value("decimal128(5, 2)"), decimal.Decimal(1)),
        (Value("binary"), b"cat"),
    ],
    ids=str,
)
def test_a_column_called_a_label_of_another_type_is_said(
    kind: Any, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = {"image": [SHOWN] * 2, "label": [value] * 2}
    images = open_images(table(rows, {"image": PICTURE, "label": kind}))
    assert images.labels is None
    assert re.search("column label of .* holds .*, no label: .* unlabelled", caplog.text)


def test_what_is_open_is_refused_with_all_names() -> None:
    two = table({"left": [SMALL], "right": [SHOWN]}, {"left": PICTURE, "right": PICTURE})
    with pytest.raises(ValueError, match="2 columns that hold images: left, right; name one"):
        open_images(two)
    kinds = {"split_name": ClassLabel(names=["train"]), "species": ClassLabel(names=["a"])}
    rows = {"image": [SHOWN], "split_name": [0], "species": [0]}
    with pytest.raises(ValueError, match="columns that hold classes: split_name, species"):
        open_images(table(rows, {"image": PICTURE, **kinds}))


def pair(folder: Path) -> Path:
    """A parquet file with two columns of images, and labels under an odd name."""
    rows = {"left": [SMALL] * 12, "right": [SHOWN] * 12, "size": [5] * 12, "kind": ["b", "a"] * 6}
    types = {"left": PICTURE, "right": PICTURE, "size": Value("int64"), "kind": Value("string")}
    table(rows, types).to_parquet(folder / "pair.parquet")
    return folder / "pair.parquet"


def test_columns_that_are_named_are_read(tmp_path: Path) -> None:
    columns = SourceOptions("right", "kind")
    images = open_images(pair(tmp_path), options=columns)
    assert side(images) == 20 and images.class_names == ["a", "b"]
    assert images.labels is not None and images.labels.tolist() == [1, 0] * 6
    stream = open_stream(str(tmp_path / "pair.parquet"), options=columns)
    assert stream.image_column == "right" and stream.label_column == "kind"


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (SourceOptions("nosuch"), "image_column='nosuch': .* no such column; it has left, right"),
        (SourceOptions("kind"), "image_column='kind': this column of .* holds Value"),
        (SourceOptions("left", "right"), "label_column='right': this column"),
    ],
)
def test_columns_that_are_not_there_are_refused(
    columns: SourceOptions, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        open_images(pair(tmp_path), options=columns)


@pytest.mark.parametrize("source", ["digits", "folder", [Image.new("RGB", (8, 8))]])
def test_what_is_no_table_has_no_columns(source: Any, tmp_path: Path) -> None:
    if source == "folder":
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        source = tmp_path
    with pytest.raises(ValueError, match=r"image_column='x': .* is no table"):
        open_images(source, options=SourceOptions("x"))


@pytest.mark.parametrize("command", ["refine", "embed", "evaluate", "cluster"])
def test_every_command_takes_the_column(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A column that is not there is refused before a model is loaded or anything is written."""
    folder = {"refine": "output_dir", "evaluate": "output_dir"}.get(command, "out")
    from mim_refiner_hf import MimRefinerConfig, MimRefinerModel

    shape = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_attention_heads": 2}
    tiny = MimRefinerConfig(**shape, num_hidden_layers=2, intermediate_size=32)
    MimRefinerModel(tiny).save_pretrained(tmp_path / "model")
    words = [command, str(pair(tmp_path)), "--model", str(tmp_path / "model")]
    words += [f"--{folder}", str(tmp_path / "out"), "--image_column", "nosuch"]
    assert main(words) == 2
    assert "--image_column nosuch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_arrays_stand_behind_images() -> None:
    rows = {"bands": [np.zeros((4, 4, 5), np.uint8).tolist()], "image": [SHOWN]}
    types = {"bands": datasets.Array3D((4, 4, 5), "uint8"), "image": PICTURE}
    assert side(open_images(table(rows, types))) == 20
