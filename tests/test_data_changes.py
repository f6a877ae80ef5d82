"""A data set that changed between two runs of one command is noticed, and the first difference is
named.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from PIL import Image

from mim_refiner_hf.data.fingerprint import RECORD, check_data_record, write_data_record
from mim_refiner_hf.data.images import hold_out, open_images


def image(path: Path, size: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((size, size), 90).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/1.png", "a/2.png", "b/3.png", "b/4.png"):
        image(tmp_path / "photos" / name)
    write_data_record(
        tmp_path / RECORD, hold_out(open_images(str(tmp_path / "photos")), 0.5, seed=0)[0]
    )
    return tmp_path / "photos"


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "one more": (
        lambda folder: image(folder / "a/15.png"),
        r"4 images then, 5 now; .* new or changed: .*a/15\.png",
    ),
    "one more at the end": (
        lambda folder: image(folder / "c/1.png"),
        r"4 images then, 5 now; .*: .*c/1\.png",
    ),
    "one less": (
        lambda folder: (folder / "a/2.png").unlink(),
        r"4 images then, 3 now; .*: .*b/3\.png",
    ),
    "the last is gone": (
        lambda folder: (folder / "b/4.png").unlink(),
        r"4 .*, 3 now; what came after .*b/3\.png is missing",
    ),
    "renamed": (
        lambda folder: (folder / "b/3.png").rename(folder / "b/5.png"),
        r"4 images then, 4 now; .*: .*b/4\.png",
    ),
    "another size": (
        lambda folder: image(folder / "a/2.png", 9),
        r"4 images then, 4 now; .*: .*a/2\.png",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_folder_are_named(change: str, folder: Path, tmp_path: Path) -> None:
    check_data_record(tmp_path / RECORD, open_images(str(folder)))
    alter, says = CHANGES[change]
    alter(folder)
    with pytest.raises(
        ValueError,
        match=rf"photos is not the data set that this run began with: {says}\. Put it back",
    ):
        check_data_record(tmp_path / RECORD, open_images(str(folder)))


def test_the_same_images_elsewhere_are_the_same(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/a/1.png").touch()
    check_data_record(tmp_path / RECORD, open_images(str(tmp_path / "copy")))


def test_tables(tmp_path: Path) -> None:
    for rows, name in ((3, "1.parquet"), (4, "2.parquet")):
        datasets.Dataset.from_dict({"image": [b"x"] * rows}).to_parquet(tmp_path / "data" / name)
    write_data_record(tmp_path / RECORD, open_images(str(tmp_path / "data")))
    (tmp_path / "data/2.parquet").touch()
    check_data_record(tmp_path / RECORD, open_images(str(tmp_path / "data")))
    with pytest.raises(ValueError, match=r"7 images then, 3 now; .*its split train\[:3\]"):
        check_data_record(tmp_path / RECORD, open_images(str(tmp_path / "data"), split="train[:3]"))
    datasets.Dataset.from_dict({"image": [b"xyz" * 50] * 4}).to_parquet(tmp_path / "data/2.parquet")
    with pytest.raises(ValueError, match=r"7 images then, 7 now; .*2\.parquet"):
        check_data_record(tmp_path / RECORD, open_images(str(tmp_path / "data")))


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"images": 3, "fingerprint": "x", "entries": "*"}', "\x00"]
)
def test_a_damaged_record(content: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(
        ValueError, match=rf"{RECORD} cannot be read \(.*\); remove it, and the data set is taken"
    ):
        check_data_record(tmp_path / RECORD, open_images(str(folder)))
    write_data_record(tmp_path / RECORD, open_images(str(folder)))
    assert json.loads((tmp_path / RECORD).read_text())["images"] == 4
