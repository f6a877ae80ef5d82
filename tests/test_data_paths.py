"""No row opens a file outside its data set.

Tables, streams, masks and tar shards with hostile paths; links in image folders.
"""

import io
import os
import re
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from PIL import EpsImagePlugin, Image

from mim_refiner_hf.data.found import SourceOptions
from mim_refiner_hf.data.images import decode_image, open_images
from mim_refiner_hf.data.paths import own_file
from mim_refiner_hf.data.stream import open_stream
from mim_refiner_hf.evaluation.segmentation_data import open_segmentation

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def asked() -> Iterator[list[str]]:
    """What a web server on this machine has been asked for; its address is the first entry."""
    requests: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png("red"))

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    requests.append(f"http://127.0.0.1:{server.server_address[1]}")
    yield requests
    server.shutdown()
    server.server_close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder `mine/` for a data set, with one image below it.

    Beside it an image that is nobody's business.
    """
    (tmp_path / "mine" / "pictures").mkdir(parents=True)
    (tmp_path / "mine" / "pictures" / "own.png").write_bytes(png("blue"))
    (tmp_path / "secret.png").write_bytes(png("red"))
    return tmp_path / "mine"


def table(file: Path, rows: list[dict[str, Any]], **more: Any) -> Path:
    pq.write_table(pa.table({"image": pa.array(rows, STRUCT), **more}), file)
    return file


def hostile(data: Path, address: str) -> list[str]:
    secret = data.parent / "secret.png"
    return [
        "../secret.png",
        "pictures/../../secret.png",
        str(secret),
        secret.as_uri(),
        f"local://{secret}",
        f"{address}/x.png",
        "s3://bucket/x.png",
        "hf://datasets/someone/else@main/x.png",
        f"zip://x.png::{address}/x.zip",
        f"zip://x.png::{secret}",
        f"simplecache::{secret.as_uri()}",
        f"zip://secret.png::dir://..::{secret}",
        "../mine_too/x.png",
    ]


@pytest.mark.usefixtures("quick")
def test_a_row_opens_nothing_outside_its_data_set(
    data: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random access, streaming and masks.

    Also from a folder in which the path would count from the current directory.
    """
    monkeypatch.chdir(data.parent)
    monkeypatch.setenv("HOME", str(data.parent))
    (data.parent / "mine_too").mkdir()
    (data.parent / "mine_too/x.png").write_bytes(png("red"))
    # those would lie below the folder
    outside, absent = (
        hostile(data, asked[0]),
        ["secret.png", "~/secret.png"],
    )
    paths = [*outside, *absent]
    rows = [{"bytes": None, "path": path} for path in paths]
    masks = pa.array([{"bytes": png("black"), "path": None}] * len(rows), STRUCT)
    file = table(data / "train.parquet", rows, mask=masks)
    images, stream = open_images(str(file)), open_stream(str(file))
    segmented = open_segmentation(str(file), class_names=["a", "b"])
    examples = {str(example["image"]["path"]): example for _, example in stream.iterate(0, 0)}
    for i, path in enumerate(paths):
        for read in (
            lambda i=i: images[i],
            lambda path=path: stream.decode(examples[path]),
            lambda i=i: segmented[i],
        ):
            with pytest.raises(ValueError) as refused:
                read()
            if path in outside:
                assert f"names the file {path!r}, which is not one of that data set" in str(
                    refused.value
                )
    assert asked[1:] == []


@pytest.mark.usefixtures("quick")
def test_a_row_may_name_a_file_of_its_data_set(data: Path) -> None:
    own = data / "pictures" / "own.png"
    rows = [
        {"bytes": None, "path": path}
        for path in ("pictures/own.png", "./pictures/../pictures/own.png", str(own))
    ]
    for dataset in (str(table(data / "train.parquet", rows)), str(data), os.path.relpath(data)):
        images = open_images(dataset)
        assert [images[i].image.getpixel((0, 0)) for i in range(3)] == [(0, 0, 255)] * 3
    image, _ = open_stream(str(data)).decode(next(open_stream(str(data)).iterate(0, 0))[1])
    assert image.getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.usefixtures("quick")
def test_a_picture_in_a_zip_and_a_mask_are_read_by_the_one_decoder(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 bits keep their range, and PostScript, a program, is not run."""
    deep, program = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(deep, "PNG")
    Image.new("L", (8, 8)).save(program, "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("it was run"))
    with zipfile.ZipFile(data / "own.zip", "w") as file:
        file.writestr("deep.png", deep.getvalue())
        file.writestr("program.png", program.getvalue())

    rows = [{"bytes": None, "path": f"zip://{name}.png::own.zip"} for name in ("deep", "program")]
    images = open_images(str(table(data / "train.parquet", rows)))
    assert images[0].image.getpixel((0, 0)) == (128, 128, 128)
    with pytest.raises(ValueError, match="Cannot decode"):
        images[1]

    image = [{"bytes": png("blue"), "path": None}]
    mask = pa.array([{"bytes": program.getvalue(), "path": None}], STRUCT)
    file = table(data / "masks.parquet", image, mask=mask)
    with pytest.raises(ValueError, match="Cannot decode the mask in row 0 of"):
        open_segmentation(str(file), class_names=["a"])[0]


@pytest.mark.usefixtures("quick")
def test_other_columns_are_not_decoded(data: Path, asked: list[str]) -> None:
    """A second column of images with an address, in passing: nothing asks for it."""
    features = datasets.Features(
        {"image": datasets.Image(), "preview": datasets.Image(), "label": datasets.Value("int64")}
    )
    rows = {
        "image": [{"bytes": png("blue"), "path": None}],
        "preview": [f"{asked[0]}/x.png"],
        "label": [1],
    }
    pq.write_table(datasets.Dataset.from_dict(rows, features).data.table, data / "train.parquet")
    stream = open_stream(str(data / "train.parquet"))
    image, label = stream.decode(next(stream.iterate(0, 0))[1])
    assert image.getpixel((0, 0)) == (0, 0, 255) and label == 1 and asked[1:] == []


def test_bytes_come_before_any_path(data: Path) -> None:
    """As `datasets` writes it: the path beside the bytes is a name, and is not opened."""
    file = table(data / "train.parquet", [{"bytes": png("blue"), "path": "../secret.png"}])
    assert open_images(str(file))[0].image.getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("hf://datasets/ada/birds@main/train/1.png", True),
        ("zip://1.png::hf://datasets/ada/birds@0123/train.zip", True),
        ("{cache}/datasets--ada--birds/snapshots/0123/train/1.png", True),
        ("hf://datasets/ada/birds@main/../../../eve/x.png", False),
        ("hf://datasets/ada/birds2@main/1.png", False),
        ("hf://datasets/eve/birds@main/1.png", False),
        ("hf://eve/birds/1.png", False),
        ("{cache}/datasets--ada--birds/../models--ada--private/x.png", False),
        ("{cache}/datasets--ada--birds2/x.png", False),
        ("train/1.png", False),
        ("/etc/passwd", False),
        ("https://huggingface.co/datasets/ada/birds/resolve/main/1.png", False),
    ],
)
def test_a_data_set_of_the_hub_reads_its_own_repository(path: str, allowed: bool) -> None:
    path = path.format(cache=constants.HF_HUB_CACHE)
    if allowed:
        assert str(own_file(path, "ada/birds")) == path
    else:
        with pytest.raises(
            ValueError, match=re.escape(f"A row of ada/birds names the file {path!r}")
        ):
            own_file(path, "ada/birds")


def test_names_without_an_owner_have_one_by_now() -> None:
    assert own_file("hf://datasets/ada/beans@0/1.png", "beans") == "hf://datasets/ada/beans@0/1.png"
    with pytest.raises(ValueError, match="was not opened"):
        own_file("hf://datasets/ada/more/beans@0/1.png", "beans")


def test_tar_shards_are_read_in_place(data: Path) -> None:
    """Names that would escape, and a link to a file outside.

    Nothing is unpacked, nothing followed.
    """
    with tarfile.open(data / "shard.tar", "w") as tar:
        for name in ("../../escaped.png", "/tmp/escaped.png", "a/b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png("blue"))
            tar.addfile(member, io.BytesIO(png("blue")))
        link = tarfile.TarInfo("z.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(data.parent / "secret.png")
        tar.addfile(link)
    before = sorted(data.parent.rglob("*"))
    stream = open_stream(str(data / "shard.tar"))
    colours = {stream.decode(example)[0].getpixel((0, 0)) for _, example in stream.iterate(0, 0)}
    assert colours == {(0, 0, 255)}
    assert sorted(data.parent.rglob("*")) == before and not Path("/tmp/escaped.png").exists()


def test_links_are_followed_where_that_is_asked_for(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A link to a file is that file; one to a folder is entered on request, and never twice."""
    (data / "linked.png").symlink_to(data.parent / "secret.png")
    (data / "pictures" / "loop").symlink_to(data)
    (data / "pictures" / "up").symlink_to(data.parent)
    for follow_links, expected, said in (
        (
            False,
            ["linked.png", "pictures/own.png"],
            "2 links to folders not entered: pictures/loop",
        ),
        (True, ["pictures/own.png", "pictures/up/secret.png"], "1 link to images that are counted"),
    ):
        caplog.clear()
        images = open_images(str(data), options=SourceOptions(follow_links=follow_links))
        assert [images.describe(i) for i in range(len(images))] == [
            str(data / name) for name in expected
        ]
        assert said in caplog.text
    images = open_images(str(data))
    assert images[0].image.getpixel((0, 0)) == (255, 0, 0)


def test_an_image_that_claims_too_many_pixels_is_not_decoded() -> None:
    """Pillow's limit is left on: a header of 60 000 x 60 000 pixels, in 70 bytes."""
    small = png("blue")
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + small[24:29]
    with pytest.raises(ValueError, match=r"exceeds limit of .* pixels"):
        decode_image(small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:])
