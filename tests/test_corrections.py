"""Groups as people corrected them: cells that no spreadsheet runs, the file with all that can be
wrong with it, and `cluster --start`, which takes it back.

`test_cluster_browser.py` makes the file in a browser; here it is written as the page writes it.
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_store import make_encoder, make_processor
from test_cluster_folder import Structure

from mim_refiner_hf import cli, cluster
from mim_refiner_hf.publishing import save_model_folder
from mim_refiner_hf.publishing.corrections import read_corrections
from mim_refiner_hf.publishing.csv_cells import cell_of, text_of, write_table

COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40))
KINDS = ("red", "green", "blue", "yellow")
HOSTILE = ("=cmd|' calc'!A0.png", "+1.png", "-2.png", "@SUM(1).png", "\t=1.png", "'q.png")


def draw(path: Path, kind: int, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(-25, 25, (20, 20, 3))
    pixels = (np.array(COLOURS[kind]) + noise).clip(0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model_folder(tmp_path / "model", make_encoder(), make_processor())
    return tmp_path / "model"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten pictures of each of four colours; some of the red ones have names that hurt."""
    folder = tmp_path / "photos"
    for kind, name in enumerate(KINDS):
        for i in range(10):
            hurts = kind == 0 and i < len(HOSTILE)
            draw(folder / (HOSTILE[i] if hurts else f"{name}-{i}.png"), kind, 100 * kind + i)
    return folder


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def saved(file: Path, groups: dict[str, tuple[str, str]]) -> Path:
    """The file as the page saves it: path -> (group, state)."""
    table = [(path, group, state) for path, (group, state) in groups.items()]
    write_table(file, ("path", "group", "state"), table)
    file.write_text("\ufeff" + file.read_text(encoding="utf-8"), encoding="utf-8", newline="")
    return file


def kind_of(name: str) -> int:
    """The colour of a picture of `photos`, by its name."""
    word = name.partition("-")[0]
    return KINDS.index(word) if word in KINDS else 0


def corrected(photos: Path, file: Path) -> Path:
    """A person's work: red is one group, green and blue another, a yellow one is put to the red
    ones, another is left out.
    """
    groups = {}
    for path in sorted(photos.iterdir()):
        kind = kind_of(path.name)
        groups[str(path)] = (("=red, mine", "the rest", "the rest", "été 猫")[kind], "")
    groups[str(photos / "yellow-0.png")] = ("=red, mine", "moved")
    groups[str(photos / "yellow-1.png")] = ("", "left out")
    return saved(file, groups)


# --- cells


@given(st.text(st.characters(codec=None, categories=None), max_size=12))
def test_every_text_is_read_back_and_none_begins_as_a_formula(text: str) -> None:
    cell = cell_of(text)
    assert text_of(cell) == text
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠"))


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("a.png", "a.png"),
        ("=1.png", "'=1.png"),
        ("'=1.png", "''=1.png"),
        ("'a'.png", "''a'.png"),
        ("a\u202egnp.\x1b[31m", "a\\u202egnp.\\u001b[31m"),
        ("C:\\u00e9\\new.png", "C:\\u005cu00e9\\new.png"),
        # CSV quotes line ends and tabs: the cell behind the apostrophe is the file's name
        ("\n=1.png", "'\n=1.png"),
        ("\t=1.png", "'\t=1.png"),
        ("tag\U000e0041", "tag\\U000e0041"),
        ("\udcff.png", "\\udcff.png"),
        ("a\\udcff.png", "a\\u005cudcff.png"),
    ],
)
def test_how_a_text_is_written(text: str, cell: str) -> None:
    assert cell_of(text) == cell and text_of(cell) == text


@pytest.mark.parametrize("cell", ["'a.png", "\\ud", "\\Uffffffff", "'", ""])
def test_a_cell_of_somebody_else_stays(cell: str) -> None:
    assert text_of(cell) == cell


def test_a_table_is_utf_8_whatever_files_are_called(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", ("path", "n"), [("\udcff=.png", 3)])
    assert (tmp_path / "t.csv").read_bytes() == b"path,n\r\n\\udcff=.png,3\r\n"


def test_bytes_of_earlier_versions_are_read(tmp_path: Path) -> None:
    (tmp_path / "lines.csv").write_bytes(b'path,cluster\r\n"a\\u000ab.png",0\r\n')
    assert read_corrections(tmp_path / "lines.csv").group_of == {"a\nb.png": 0}
    (tmp_path / "old.csv").write_bytes(b"path,cluster\r\n\xff.png,0\r\n")
    assert read_corrections(tmp_path / "old.csv").group_of == {"\udcff.png": 0}


# --- the file


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file; give the CSV file that the page saved"),
        (b"", "is empty; it needs a line with the columns path and group"),
        (b"PK\x03\x04...", "is a workbook (.xlsx, .ods); save it as CSV (UTF-8)"),
        (b"p\0a\0t\0h\0", "is no text in UTF-8; save it as CSV (UTF-8)"),
        (b"name,group\na,b\n", "has 0 columns path, and needs one; its columns are name, group"),
        (b"path,kind\na,b\n", "has 0 columns group (or cluster), and needs one"),
        (b"path,group,group\na,b,c\n", "has 2 columns group (or cluster), and needs one"),
        (b"path,group\na.png,cats\nb,c.png,dogs\n", "line 3 has 3 cells, and the header 2"),
        (b'path,group\n"a.png,cats\n', "is no line of a CSV file"),
        (b"path,group\n,cats\n", "line 2 has no path; remove the line"),
        (b"path,group\na.png,\n", "line 2, a.png, has no group; name one, or put 'left out'"),
        (b"path,group,state\na,b,gone\n", "line 2 has the state gone; allowed are moved, left out"),
        (b"path,group\na,b\nc,b\na,d\n", "line 4 names a, as line 2 does; an image is in one"),
        (b"path,group,state\na,,left out\n", "no image is in a group (1 are left out)"),
        (b"path,group\na," + b"x" * 201 + b"\n", "line 2 has a group of 201 characters"),
        (b"path,group\na,b\\u202ec\n", "allowed are up to 200 that can be seen"),
        (b"path,group\n" + b"x" * 200_000 + b",b\n", "is no line of a CSV file (field larger"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_file_is_one_line_before_any_work(
    content: bytes | None,
    says: str,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "c.csv"
    if content is not None:
        file.write_bytes(content)
    # a folder that holds no model: it is not looked into
    (tmp_path / "empty").mkdir()
    words = ["cluster", str(photos), "--model", str(tmp_path / "empty"), "--start", str(file)]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and error.startswith(f"error: --start {file}: ") and says in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_of_spreadsheets_are_read(
    separator: str, mark: str, end: str, tmp_path: Path
) -> None:
    lines = [
        ("Path", "Group", "note"),
        ("'=a.png", "cats", ""),
        ('"b,;c.png"', "dogs", "x"),
        ("", "", ""),
    ]
    text = mark + "".join(separator.join(line) + end for line in lines)
    (tmp_path / "c.csv").write_text(text, encoding="utf-8", newline="")
    found = read_corrections(tmp_path / "c.csv")
    assert found.names == ["cats", "dogs"]
    assert found.group_of == {"=a.png": 0, "b,;c.png": 1}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_clusters": 3}, "num_clusters=3: the groups of start="),
        ({"method": "heads"}, "method='heads': new images go to the nearest centroid"),
    ],
)
def test_what_does_not_go_with_a_start(
    settings: dict[str, object], says: str, photos: Path, tmp_path: Path
) -> None:
    file = corrected(photos, tmp_path / "c.csv")
    with pytest.raises(ValueError, match=says):
        cluster(photos, "gone", start=file, **settings)
    with pytest.raises(ValueError, match=r"start=.*is for images; vectors \(n, d\) need none"):
        cluster(np.zeros((4, 3)), start=file)


def test_other_images_are_refused(photos: Path, tmp_path: Path, model: Path) -> None:
    file = saved(tmp_path / "c.csv", {"elsewhere/a.png": ("cats", "")})
    refusal = r"none of its 1 images in groups, such as elsewhere/a.png, is among the 40 of "
    with pytest.raises(ValueError, match=refusal):
        cluster(photos, model, start=file)


# --- cluster --start


def test_corrected_groups_are_the_starting_point(
    photos: Path,
    model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Names stay, moved images stay, left-out ones stay out, new ones go to the nearest."""
    file = corrected(photos, tmp_path / "corrected.csv")
    (photos / "green-9.png").unlink()
    for kind, name in enumerate(KINDS):
        draw(photos / "new" / f"{name}.png", kind, 900 + kind)
    (photos / "new" / "cut.png").write_bytes(b"cut")
    words = ["cluster", str(photos), "--model", str(model), "--start", str(file)]
    assert cli.main([*words, "--out", str(tmp_path / "g")]) == 0

    said = capsys.readouterr().out
    assert "42 images in 3 groups (as corrected in corrected.csv); 1 could not be read" in said
    assert "; 1 left out, 4 new" in said
    assert "1 of its images are not among these and count for nothing, first: " in caplog.text

    found = {text_of(row["path"]): row for row in rows(tmp_path / "g" / "groups.csv")}
    group_of = {Path(path).name: text_of(row["group"]) for path, row in found.items()}
    for name in HOSTILE:
        assert group_of[name] == "=red, mine"
    assert group_of["yellow-0.png"] == "=red, mine" and group_of["yellow-2.png"] == "été 猫"
    assert "yellow-1.png" not in group_of and "green-9.png" not in group_of
    assert group_of["red.png"] == "=red, mine" and group_of["yellow.png"] == "été 猫"
    assert group_of["green.png"] == group_of["blue.png"] == "the rest"

    # sizes: 10 + 1 + 1, 19 + 2, 8 + 1; the largest is first
    summary = json.loads((tmp_path / "g" / "summary.json").read_text(encoding="utf-8"))
    assert summary["names"] == ["the rest", "=red, mine", "été 猫"]
    assert summary["sizes"] == [21, 12, 9] and summary["new_images"] == 4
    assert summary["left_out"] == [str(photos / "yellow-1.png")]
    out = rows(tmp_path / "g" / "left-out.csv")
    assert [row["path"] for row in out] == [str(photos / "yellow-1.png")]

    by_hand = found[str(photos / "yellow-0.png")]
    assert by_hand["state"] == "moved" and float(by_hand["confidence"]) < 0.5
    sure = [float(row["confidence"]) for row in found.values() if row is not by_hand]
    assert np.median(sure) > 0.8

    # the page goes on from there
    data = json.loads(Structure((tmp_path / "g" / "index.html").read_text()).scripts[0])
    assert data["names"] == summary["names"] and data["left_out"] == summary["left_out"]
    moved = [name for name, by_hand in zip(data["name"], data["moved"], strict=True) if by_hand]
    assert moved == [str(photos / "yellow-0.png")]
    assert [Path(name).name for name, _ in data["broken"]] == ["cut.png"]


def test_its_own_table_is_a_start_too(
    photos: Path,
    model: Path,
    tmp_path: Path,
) -> None:
    """`groups.csv` as `cluster` leaves it, and again as `cluster --start` leaves it."""
    first = cluster(photos, model, num_clusters=4, out=tmp_path / "a")
    second = cluster(photos, model, start=tmp_path / "a" / "groups.csv", out=tmp_path / "b")
    third = cluster(photos, model, start=tmp_path / "b" / "groups.csv")
    assert second.labels.tolist() == third.labels.tolist()
    # of equal size: in the order of the file
    assert second.summary["names"] == third.summary["names"]
    assert [int(second.summary["names"][label]) for label in second.labels] == list(first.labels)


def test_it_works_in_python_with_lists_and_relative_paths(
    photos: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A path is the same file, however it is written; images left out have the label -1."""
    corrected(photos, tmp_path / "c.csv")
    monkeypatch.chdir(tmp_path)
    images = sorted(Path("photos").iterdir())
    groups = cluster(images, model, start="c.csv")
    labels = {path.name: int(label) for path, label in zip(images, groups.labels, strict=True)}
    assert labels["yellow-1.png"] == -1 and labels["yellow-0.png"] == labels["red-9.png"]
    assert groups.num_clusters == 3 and "1 left out, 0 new" in str(groups)
    confidence = dict(zip(labels, groups.confidence, strict=True))
    assert confidence["yellow-1.png"] == 0 < confidence["yellow-0.png"]
    # further vectors, into the same groups
    new, sure = groups.clustering.assign(torch.from_numpy(groups.features[:3]))
    assert new.shape == sure.shape == (3,)


def test_a_feature_store_takes_a_start(
    photos: Path,
    model: Path,
    tmp_path: Path,
) -> None:
    file = corrected(photos, tmp_path / "c.csv")
    words = ["embed", str(photos), "--model", str(model), "--out", str(tmp_path / "f")]
    assert cli.main([*words, "--num_workers", "0"]) == 0
    shutil.rmtree(photos)
    groups = cluster(tmp_path / "f", start=file, out=tmp_path / "g")
    assert groups.summary["names"][0] == "the rest" and groups.summary["sizes"] == [20, 11, 8]
    # without a picture there is no page, but the tables are whole
    assert len(rows(tmp_path / "g" / "groups.csv")) == 39


def test_groups_without_an_image_are_dropped_and_named(
    photos: Path,
    model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = corrected(photos, tmp_path / "c.csv")
    for path in photos.glob("yellow-*"):
        if path.name != "yellow-0.png":
            path.write_bytes(b"cut")
    groups = cluster(photos, model, start=file)
    assert groups.summary["names"] == ["the rest", "=red, mine"]
    assert "1 groups have no image that can be read and are dropped: été 猫" in caplog.text

    only = saved(tmp_path / "o.csv", {str(photos / "yellow-2.png"): ("cats", "")})
    with pytest.raises(ValueError, match="none of its images in groups can be read"):
        cluster(photos, model, start=only, out=tmp_path / "g")
    assert not (tmp_path / "g").exists() and not list(tmp_path.glob(".*"))
