"""Folders of images: every image once, the same streamed or not, and a line about all the rest."""

import importlib.util
import io
import json
import os
import string
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mim_refiner_hf.clustering.image_items import image_files, images_at, list_folder
from mim_refiner_hf.data.found import SourceOptions
from mim_refiner_hf.data.images import ImageDataset, open_images
from mim_refiner_hf.data.stream import open_stream

KINDS = {".jfif": "JPEG", ".jpe": "JPEG", ".jp2": "JPEG2000", ".avif": "AVIF", ".heic": "HEIF"}


def put(root: Path, *names: str) -> Path:
    """Pictures of these names, each of its own colour."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (16, 16), (number * 40 % 255, 50, 90))
        picture.save(path, KINDS.get(path.suffix.lower(), "PNG"))
    return root


def labelled(images: ImageDataset) -> dict[str, str | int | None]:
    """File name -> the name of its class, or its number where classes have none."""
    labels = [-1] * len(images) if images.labels is None else images.labels.tolist()
    return {
        Path(images.describe(i)).name: _word(images.class_names, label)
        for i, label in enumerate(labels)
    }


def labelled_stream(folder: Path, **options: str) -> dict[str, str | int | None]:
    """The same, read in passing."""
    stream = open_stream(str(folder), **options)
    return {
        Path(stream.describe(example)).name: _word(stream.class_names, stream.decode(example)[1])
        for _, example in stream.iterate(0, 0)
    }


def _word(names: list[str] | None, label: int) -> str | int | None:
    if label < 0:
        return None
    return names[label] if names else label


# ---- what is found

NAME = st.text(string.ascii_lowercase, min_size=1, max_size=2)
ENDING = st.sampled_from([".png", ".JPG", ".jfif", ".txt", ".npy", ".mp4", "", ".tar.gz"])
TREE = st.lists(st.tuples(st.lists(NAME, max_size=3), NAME, ENDING), min_size=1, max_size=12)


@given(tree=TREE)
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_every_file_of_a_tree_is_listed_once(
    tree: list[tuple[list[str], str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for folders, name, ending in tree:
        # a folder may not take a file's name
        path = root.joinpath(*(f"{folder}_" for folder in folders), name + ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    walked = [Path(place) / name for place, _, names in os.walk(root) for name in names]
    listing = list_folder(root)
    assert listing.files == list(map(str, sorted(walked)))
    pictures = [path for path in walked if path.suffix.lower() in (".png", ".jpg", ".jfif")]
    arrays = [path for path in walked if path.suffix == ".npy"]
    assert image_files(listing.files) == list(map(str, sorted(pictures or arrays)))


@pytest.mark.parametrize("ending", [".jfif", ".avif", ".jp2", ".jpe", ".PNG", ".heic"])
def test_every_readable_format_is_found(ending: str, tmp_path: Path) -> None:
    if ending == ".heic" and importlib.util.find_spec("pillow_heif") is None:
        pytest.skip("pillow-heif is not installed")
    put(tmp_path, f"a{ending}")
    assert len(open_images(tmp_path)) == len(images_at(tmp_path)) == 1
    assert len(labelled_stream(tmp_path)) == 1
    colour = open_images(tmp_path)[0].image.resize((1, 1)).getpixel((0, 0))
    assert np.abs(np.array(colour) - (0, 50, 90)).max() < 8


def test_what_is_left_aside_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "1.png", "2.png")
    for name in ("a.mp4", "b.mp4", "c.psd", "d", "e.\x1b[2J"):
        (tmp_path / name).write_bytes(b"x")
    says = f"5 files in {tmp_path} left aside: .mp4 2, .psd 1, without an ending 1, others 1"
    for look in (open_images, images_at, open_stream):
        caplog.clear()
        look(str(tmp_path))
        assert caplog.messages == [says]


def test_a_line_says_that_stray_images_take_the_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a/1.png", "b/2.png", "3.png")
    assert open_images(tmp_path).labels is None
    assert "1 of 3 images in" in caplog.text and "all count as unlabelled" in caplog.text
    caplog.clear()
    put(tmp_path / "flat", "1.png", "2.png")
    assert open_images(tmp_path / "flat").labels is None and not caplog.messages


# ---- links


@given(
    edges=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=8),
    follow=st.booleans(),
)
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_every_real_image_counts_once_however_folders_are_linked(
    edges: list[tuple[int, int]], follow: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Five folders inside and one outside, with links between any of them."""
    top = tmp_path_factory.mktemp("linked")
    places = [top / f"data/{number}" for number in range(5)] + [top / "outside"]
    for number, place in enumerate(places):
        put(place, f"{number}.png")
    for place, target in set(edges):
        (places[place] / f"to{target}").symlink_to(places[target])
    listing = list_folder(top / "data", follow_links=follow)
    outside = follow and any(target == 5 for _, target in edges)
    expected = [f"{number}.png" for number in range(5 + outside)]
    assert sorted(Path(file).name for file in listing.files) == expected
    # each link is entered, or named
    entered = {Path(file).parent.name for file in listing.files} & {"to5"}
    assert len(listing.links) + len(entered) == len(set(edges))


def test_a_link_to_a_file_counts_once_with_its_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "store", "far.png")
    put(tmp_path / "data", "near.png")
    (tmp_path / "data/again.png").symlink_to(tmp_path / "data/near.png")
    for name in ("far1.png", "far2.png"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "store/far.png")
    for name in ("gone1.png", "gone2.png"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "nowhere.png")
    listing = list_folder(tmp_path / "data")
    assert [Path(file).name for file in listing.files] == [
        "far1.png",
        "gone1.png",
        "gone2.png",
        "near.png",
    ]
    assert [Path(file).name for file in listing.repeated] == ["again.png", "far2.png"]
    open_images(tmp_path / "data")
    assert "2 links to images that are counted already left aside: again.png, far2" in caplog.text


def test_a_folder_that_cannot_be_listed_is_an_error_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    for look in (open_images, images_at, open_stream):
        with pytest.raises(ValueError, match=r"/b cannot be listed \(Permission denied\)"):
            look(str(tmp_path))


# ---- labels

TREES = [
    ("bird/eagle/1.png", "bird/owl/2.png", "cat/tiger/3.png"),
    ("images/n01/1.png", "images/n02/2.png", "annotations/3.png"),
    ("data/1.png", "data/2.png"),
    ("a/1.png", "b/2.png", "3.png"),
    ("train/a/1.png", "train/b/2.png", "val/a/3.png"),
    ("10/1.png", "2/2.png", "1/3.png"),
    ("1.png", "2.png"),
]


@pytest.mark.parametrize("names", TREES)
def test_a_stream_has_the_labels_of_the_data_set(names: tuple[str, ...], tmp_path: Path) -> None:
    put(tmp_path, *names)
    assert labelled_stream(tmp_path) == labelled(open_images(tmp_path))


CELLS = st.sampled_from(
    [["x", "y", "x"], [0, 1, 0], ["10", "9", "x"], [2**40, 5, 5], ["", "y", ""]]
)


@given(cells=CELLS, ending=st.sampled_from(["csv", "jsonl", "parquet"]), nested=st.booleans())
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_metadata_labels_images_as_datasets_has_it(
    cells: list[str | int],
    ending: str,
    nested: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("metadata")
    place = root / "inner" if nested else root
    put(place, "1.png", "2.png", "sub/3.png")
    table = datasets.Dataset.from_dict(
        {"file_name": ["1.png", "2.png", "sub/3.png"], "label": cells}
    )
    to = {"csv": "to_csv", "jsonl": "to_json", "parquet": "to_parquet"}[ending]
    getattr(table, to)(place / f"metadata.{ending}")

    numbers = all(isinstance(cell, int) and cell < 2**16 for cell in cells)
    words = [cell if numbers else str(cell) or None for cell in cells]
    expected = dict(zip(("1.png", "2.png", "3.png"), words, strict=True))
    assert labelled(open_images(root)) == labelled_stream(root) == expected


def test_gaps_of_metadata_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a/1.png", "b/2.png", "b/3.png")
    metadata = tmp_path / "metadata.csv"
    metadata.write_text("file_name,species\na/1.png,x\nb/9.png,y\n")
    assert labelled(open_images(tmp_path)) == {"1.png": "a", "2.png": "b", "3.png": "b"}

    caplog.clear()
    images = open_images(tmp_path, options=SourceOptions(label_column="species"))
    assert labelled(images) == {"1.png": "x", "2.png": None, "3.png": None}
    assert "1 rows of" in caplog.text and "2 of 3 images have no row in" in caplog.text
    changed = metadata.read_text().replace("x", "z")
    metadata.write_text(changed)
    assert open_images(tmp_path).fingerprint != images.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metadata.csv", b"file_name,label\n1.png,caf\xe9\n", "metadata.csv cannot be read: .*utf"),
        ("metadata.jsonl", b"{{{", "metadata.jsonl cannot be read"),
        ("metadata.parquet", b"no parquet", "metadata.parquet cannot be read"),
        ("other.csv", b"", "label_column='kind': the folder has none of metadata.csv"),
        ("metadata.csv", b"file_name,label\n1.png,x\n", "label_column='kind': .* no such column"),
    ],
)
def test_metadata_that_will_not_do_is_one_line(
    name: str, content: bytes, says: str, tmp_path: Path
) -> None:
    put(tmp_path, "1.png")
    (tmp_path / name).write_bytes(content)
    for look in (open_images, open_stream):
        with pytest.raises(ValueError, match=says):
            look(str(tmp_path), options=SourceOptions(label_column="kind"))


def test_words_of_a_streamed_table_get_the_numbers_of_the_data_set(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    rows = {"image": [{"bytes": file.getvalue(), "path": None}] * 4, "label": ["b", "a", None, "c"]}
    kinds = {"image": datasets.Image(), "label": datasets.Value("string")}
    datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(tmp_path / "t.parquet")
    images, stream = open_images(tmp_path), open_stream(str(tmp_path))
    assert stream.class_names == images.class_names == ["a", "b", "c"]
    assert images.labels is not None
    streamed = sorted(stream.decode(example)[1] for _, example in stream.iterate(0, 0))
    assert streamed == sorted(images.labels.tolist()) == [-1, 0, 1, 2]


# ---- splits and tables


@given(
    rows=st.sampled_from(["[:50%]", "[2:]", "[-3:]", "[10%:60%]", "[1:2]", "[:]"]),
    count=st.integers(4, 9),
)
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
def test_a_slice_of_a_folder_is_that_of_a_table(
    rows: str, count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("slices")
    put(root / "folder", *(f"{'ab'[number % 2]}/{number}.png" for number in range(count)))
    whole = open_images(root / "folder")
    datasets.Dataset.from_dict({"name": list(labelled(whole))}).to_parquet(root / "t.parquet")
    expected = datasets.load_dataset(
        "parquet", data_files={"train": str(root / "t.parquet")}, split=f"train{rows}"
    )["name"]
    part = open_images(root / "folder", split=f"train{rows}")
    assert list(labelled(part)) == list(expected)
    assert part.class_names == whole.class_names
    assert set(labelled_stream(root / "folder", split=f"train{rows}")) == set(expected)
    assert (part.fingerprint == whole.fingerprint) == (rows == "")


@pytest.mark.parametrize("split", ["train[:", "train[1:x]", "train[3:1]", "train[90:]"])
def test_a_slice_that_means_nothing_is_refused(split: str, tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "a/2.png")
    with pytest.raises(ValueError, match=r"split='train\["):
        open_images(tmp_path, split=split)


def test_tables_among_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Notes do not hide the images beside them; a table of images does, with a word."""
    put(tmp_path, "a/1.png", "b/2.png")
    notes = datasets.Dataset.from_dict({"file": ["a/1.png"], "score": [1]})
    notes.to_parquet(tmp_path / "notes.parquet")
    (tmp_path / "backup.tar").write_bytes(b"\0" * 10240)
    images = open_images(tmp_path)
    assert labelled(images) == labelled_stream(tmp_path) == {"1.png": "a", "2.png": "b"}
    assert "2 files in" in caplog.text and ".parquet 1" in caplog.text

    caplog.clear()
    pictures = [{"bytes": (tmp_path / "a/1.png").read_bytes(), "path": None}] * 3
    kinds = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": pictures}, kinds)
    table.to_parquet(tmp_path / "pictures.parquet")
    assert len(open_images(tmp_path)) == 3
    assert "4 files in" in caplog.text and ".png 2" in caplog.text


@pytest.mark.parametrize("again", ["one table", "two tables"])
def test_an_image_of_several_labels_has_none_and_is_counted(
    again: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    rows = ["0.png,a", "1.png,b", "2.png,a", "3.png,b"]
    # the same once more is no contradiction, nor is a row without a label
    more = ["0.png,b", "1.png,b", "2.png,"]
    if again == "one table":
        rows += more
    else:
        lines = [dict(zip(("file_name", "label"), row.split(","), strict=True)) for row in more]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))

    images = open_images(str(tmp_path))
    assert images.labels is not None and images.labels.tolist() == [-1, 1, 0, 1]
    assert "1 images have several labels in" in caplog.text and "0.png" in caplog.text


def test_spaces_in_a_table_are_no_part_of_names_and_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    table = tmp_path / "metadata.csv"
    table.write_text("file_name, label \n0.png, a\n1.png,a \n2.png,b")
    images = open_images(str(tmp_path))
    assert images.class_names == ["a", "b"]
    assert images.labels is not None and images.labels.tolist() == [0, 0, 1]

    assert caplog.text == ""
    table.write_text("file_name,caption\n0.png,red")
    assert open_images(str(tmp_path)).labels is None
    assert "has no column of labels, only file_name, caption" in caplog.text


def test_words_that_are_one_number_are_two_classes(tmp_path: Path) -> None:
    words = ["007", "7", "07", "8", "8"]
    for number, _ in enumerate(words):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    rows = [f"{number}.png,{word}" for number, word in enumerate(words)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    images = open_images(str(tmp_path))
    labels = images.labels.tolist()
    assert len(set(labels)) == 4 and labels[3] == labels[4], (labels, images.class_names)
