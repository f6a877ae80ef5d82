"""Tables of strangers, and odd ones: a result or one sentence, and nothing else is decoded."""

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.data.stream import open_stream
from mim_refiner_hf.evaluation.feature_store import FeatureStore
from mim_refiner_hf.evaluation.segmentation_data import names_beside
from mim_refiner_hf.evaluation.shard_files import STORE_FORMAT
from mim_refiner_hf.runs.begun import saved_recipe
from mim_refiner_hf.runtime.checkpoint import verify

COUNT = 6
ROWS = 102


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "PNG")
    return file.getvalue()


PICTURES = pa.array([{"bytes": png(10 * i), "path": None} for i in range(COUNT)])


def stored(folder: Path, columns: dict[str, Any], metadata: Any = None, name: str = "a") -> Path:
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, folder / f"{name}.parquet")
    return folder


def shard(folder: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(folder / "a.tar", "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return folder


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    stored(tmp_path, {"image": pa.array([], PICTURES.type)})
    for look in (open_images, open_stream):
        with pytest.raises(ValueError, match=r"Cannot open .*: it has no rows"):
            look(str(tmp_path))


def restated(folder: Path, count: int) -> Path:
    """The table `a` there, whose footer states `count` rows, or its row group too."""
    file = folder / "a.parquet"
    content = file.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")

    # zigzag numbers of Thrift: the field of the footer is the first of them
    footer = content[start:-8].replace(_varint(ROWS), _varint(count), 1)
    assert footer != content[start:-8]
    file.write_bytes(content[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    return folder


def _varint(count: int) -> bytes:
    left = 2 * count
    parts = []
    while left > 127:
        parts.append(left & 127 | 128)
        left >>= 7
    return bytes([*parts, left])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("count", [1, ROWS - 1, ROWS + 1, 10**6, 10**12])
def test_rows_that_are_stated_and_not_there_are_said_once(
    count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = pa.concat_arrays([PICTURES] * (ROWS // COUNT))
    restated(stored(tmp_path, {"image": pictures}), count)
    line = f"states {count} images and has {ROWS}; it goes on"

    assert len(open_images(str(tmp_path))) == ROWS
    assert caplog.text.count(line) == 1
    caplog.clear()
    stream = open_stream(str(tmp_path))
    for epoch in range(2):
        assert len(list(stream.iterate(0, epoch))) == ROWS
        assert len(list(stream.in_order())) == ROWS
    assert caplog.text.count(line) == 1


def test_some_rows_that_were_saved_do_not_state_the_number_of_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored(tmp_path, {"image": PICTURES})
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"))["train"]
    table.select(range(2)).save_to_disk(tmp_path / "saved")
    assert len(open_images(str(tmp_path / "saved"))) == 2
    assert len(list(open_stream(str(tmp_path / "saved")).in_order())) == 2
    assert caplog.text == ""


@pytest.mark.parametrize("place", [0.1, 0.4])
def test_a_stream_that_breaks_off_is_one_sentence_with_its_name(
    place: float, tmp_path: Path
) -> None:
    file = stored(tmp_path, {"image": PICTURES}) / "a.parquet"
    content = bytearray(file.read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    first = int(place * footer)
    content[first : first + 40] = bytes(40)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} cannot be read beyond ")):
        for example in (stream := open_stream(str(tmp_path))).in_order():
            stream.decode(example)


def test_a_shard_without_rows_is_passed_over_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored(tmp_path, {"image": pa.array([], PICTURES.type)})
    stored(tmp_path, {"image": PICTURES}, name="b")
    assert len(open_images(tmp_path)) == COUNT
    assert "1 of 2 files of" in caplog.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["info", "features", "image", "_type", "x"]), inner)
    ),
    max_leaves=8,
)


@given(metadata=JSON)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_metadata_for_datasets_are_believed_only_where_they_make_sense(
    metadata: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("metadata")
    stored(folder, {"image": PICTURES}, metadata)
    try:
        images = open_images(folder)
    # metadata may say that a column is something else, as long as it is said in one line
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert len(images) == COUNT and images[1].image.getpixel((0, 0)) == (10, 10, 10)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (pa.array([0, 1, 2**64 - 1, 3, 0, 1], pa.uint64()), ["0", "1", "3", str(2**64 - 1)]),
        (pa.array([0, 1, 10**12, 3, 0, 1]), ["0", "1", "3", "1000000000000"]),
        (pa.array([0, 1, -5, 3, 0, 1]), None),
        (pa.nulls(COUNT, pa.int64()), None),
    ],
)
def test_the_size_of_a_label_is_no_size_of_a_table(
    labels: Any, names: list[str] | None, tmp_path: Path
) -> None:
    images = open_images(stored(tmp_path, {"image": PICTURES, "label": labels}))
    assert images.class_names == names and images.num_classes < 10


OTHERS = {
    "npy": b"\x93NUMPY" + b"x" * 50,
    "npz": b"PK\x03\x04",
    "pth": b"cposix\nsystem\n(S'true'\ntR.",
    "json": b"[" * 20_000,
    "txt": b"\xff\xfe caption",
    "msg": b"\xc1",
    "cbor": b"\xff",
    "ten": b"x",
    "id": b"no number",
}


@pytest.mark.parametrize("ending", OTHERS)
@pytest.mark.parametrize("look", [open_images, open_stream])
def test_members_of_a_shard_that_are_not_asked_for_are_not_decoded(
    ending: str, look: Any, tmp_path: Path
) -> None:
    members = {}
    for i in range(COUNT):
        members[f"{i}.{ending}"] = OTHERS[ending]
        members[f"{i}.png"] = png(10 * i)
        members[f"{i}.cls"] = str(i % 2).encode()
    opened = look(str(shard(tmp_path, members)))
    if look is open_images:
        labels = [opened[i].label for i in range(COUNT)]
    else:
        labels = sorted(opened.decode(x)[1] for _, x in opened.iterate(0, 0))
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1" + b"\0" * 40 + b"PAR1", b"\xff" * 100], ids=range(4)
)
def test_a_damaged_table_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    for look in (open_images, open_stream):
        with pytest.raises(ValueError, match="Cannot open") as refused:
            look(str(tmp_path))
        assert "\n" not in str(refused.value)


def test_files_of_two_schemas_are_one_sentence(tmp_path: Path) -> None:
    stored(tmp_path, {"image": PICTURES, "label": pa.array([1] * COUNT)})
    stored(tmp_path, {"image": PICTURES, "other": pa.array(["x"] * COUNT)}, name="b")
    with pytest.raises(ValueError, match="Cannot open") as refused:
        open_images(tmp_path)
    assert "\n" not in str(refused.value)


# --- feature stores and runs ----------------------------------------------------------------------

STORED = {
    "format": STORE_FORMAT,
    "num_images": 3,
    "shard_size": 2,
    "class_names": None,
    "columns": {"block0.cls": 4},
    "command": None,
}
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("num_images", value) for value in (10**30, -1, "3", 2.5, True, [3])),
        *(("shard_size", value) for value in (0, None, 10**30, "2")),
        *(("columns", value) for value in (None, {"a": -1}, {"a": "4"}, ["a"])),
        *(("class_names", value) for value in ("cat", [1], {"a": 1})),
        ("command", ["rm"]),
    ],
)
def test_a_manifest_of_a_store_is_checked(field: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(STORED | {field: value}))
    with pytest.raises(ValueError, match=f"is damaged: its {field} is ") as refused:
        FeatureStore(tmp_path)
    assert len(str(refused.value)) < 400
    # more shards than there are files are not counted up to
    (tmp_path / "manifest.json").write_text(json.dumps(STORED | {"num_images": 10**12}))
    with pytest.raises(ValueError, match="is not complete, 0 of 500000000000 shards"):
        FeatureStore(tmp_path)


@pytest.mark.parametrize(
    "record", ["[]", "{}", "1", DEEP, '{"rows": -1, "size": 1, "sha256": "", "broken": []}']
)
def test_a_record_of_a_shard_is_checked(record: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(STORED | {"num_images": 2}))
    for folder, name, content in (
        ("shards", "00000.parquet", "x"),
        ("records", "00000.json", record),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(content)
    with pytest.raises(ValueError, match="is not complete, 0 of 1 shards"):
        FeatureStore(tmp_path)


def test_deep_json_of_stores_and_runs_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text(DEEP)
    with pytest.raises(ValueError, match="is not a folder of features"):
        FeatureStore(tmp_path / "store")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(DEEP)
    with pytest.raises(ValueError, match=r"its recipe\.json cannot be read .*nested deeper"):
        saved_recipe(tmp_path / "run")
    for file in ("state.json", "manifest.json"):
        checkpoint = tmp_path / file / "step-00000001"
        checkpoint.mkdir(parents=True)
        (checkpoint / file).write_text(DEEP)
        assert verify(checkpoint) is not None
    (tmp_path / "classes.json").write_text(DEEP)
    with pytest.raises(ValueError, match="is no list of names in JSON"):
        names_beside(str(tmp_path))
