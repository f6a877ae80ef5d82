"""Broken images: what counts as one and why, what stands in for it, who hears of it, and when there
are too many.
"""

import io
import json
import os
import re
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mim_refiner_hf.clustering import decoding
from mim_refiner_hf.clustering.decoding import decode_image
from mim_refiner_hf.data import broken as broken_images
from mim_refiner_hf.data.broken import BROKEN, BrokenImages, readable
from mim_refiner_hf.data.images import ImageDataset, open_images
from mim_refiner_hf.data.order import BatchSampler, epoch_order
from mim_refiner_hf.data.reading import read_sample
from mim_refiner_hf.data.stream import open_stream
from mim_refiner_hf.data.views import MultiCrop, ViewDataset, view_specs

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)


def encoded(kind: str = "PNG", image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A valid header that claims a size, and no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(b""), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def bit_flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


# --- what is broken, and why ----------------------------------------------------------------------

KNOWN = "it is no image of a known format \\("
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "a web page": (b"<!DOCTYPE html>", KNOWN),
    "PostScript, which Pillow would run": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
        KNOWN,
    ),
    "truncated JPEG": (encoded("JPEG")[:-300], "image file is truncated"),
    "truncated PNG": (encoded("PNG")[:-300], "runcated"),
    "truncated GIF": (encoded("GIF")[:-300], "image file is truncated"),
    "truncated WebP": (encoded("WEBP")[:-300], ""),
    "truncated TIFF": (encoded("TIFF")[:-300], ""),
    "PNG with a flipped bit": (bit_flip(encoded("PNG")), "broken PNG file"),
    "decompression bomb": (png_of_size(20000, 20000), "20000 x 20000 pixels|decompression bomb"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_and_their_reasons(case: str, tmp_path: Path) -> None:
    content, reason = BAD[case]
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    said = []
    for source, name in ((path, None), (content, str(path))):
        with pytest.raises(
            ValueError, match=rf"Cannot decode {path}: .*({reason}).*; replace or remove it\.$"
        ) as raised:
            decode_image(source, name=name)
        said.append(str(raised.value))
    # no addresses: the list is the same everywhere
    assert said[0] == said[1] and "0x" not in said[0] and "\n" not in said[0]


def cmyk_with_a_broken_profile() -> bytes:
    return encoded("JPEG", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), icc_profile=b"no profile")


GOOD: dict[str, Callable[[], bytes]] = {
    "another extension": lambda: encoded("PNG"),
    "garbage in EXIF": lambda: encoded("JPEG", exif=b"Exif\x00\x00" + bytes(range(64))),
    "EXIF cut off": lambda: encoded(
        "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01"
    ),
    "broken colour profile": cmyk_with_a_broken_profile,
    "animation": lambda: encoded("GIF", save_all=True, append_images=[Image.new("RGB", (30, 40))]),
    "16 bits": lambda: encoded("PNG", Image.fromarray(np.full((9, 9), 4660, np.uint16))),
}


@pytest.mark.parametrize("case", GOOD)
def test_odd_files_that_are_fine(case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = decode_image(GOOD[case]())
    assert image.mode == "RGB" and image.width > 0


@pytest.mark.parametrize("pillows", [None, 10, 2**40])
def test_our_own_limit_whatever_pillows_is(
    pillows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone else in the process may have switched Pillow's off, or made its warning an error."""
    monkeypatch.setattr(decoding, "MAX_PIXELS", 40 * 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows if pillows != 10 else 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(encoded()).size == (30, 40)
    with pytest.raises(ValueError, match="it has 31 x 40 pixels, more than 1200"):
        decode_image(encoded(image=Image.new("RGB", (31, 40))))
    monkeypatch.setattr(decoding, "MAX_BYTES", 10)


def test_folders_with_traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FIFO does not hang, a device is not read, links that lead nowhere have a reason, links in a
    circle come to an end.
    """
    root = tmp_path / "photos"
    (root / "a").mkdir(parents=True)
    (root / "a" / "1.png").write_bytes(encoded())
    (root / "elsewhere.jpg").mkdir()
    (root / "elsewhere.jpg" / "2.png").write_bytes(encoded())
    os.mkfifo(root / "fifo.png")
    (root / "zero.png").symlink_to("/dev/zero")
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "a" / "back").symlink_to(root)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "3.png").write_bytes(encoded())
    (root / "linked").symlink_to(tmp_path / "outside")
    began = time.perf_counter()
    images = open_images(str(root))
    assert [str(Path(images.describe(i)).relative_to(root)) for i in range(len(images))] == [
        "a/1.png",
        "elsewhere.jpg/2.png",
        "fifo.png",
        "gone.png",
        "self.png",
        "zero.png",
    ]
    left, broken = readable(images)
    assert left.indices.tolist() == [0, 1] and [entry["index"] for entry in broken] == [
        2,
        3,
        4,
        5,
    ]
    reasons = [
        "it is no regular file",
        "No such file",
        "Too many levels of symbolic links",
        "it is no regular file",
    ]
    assert all(reason in entry["reason"] for reason, entry in zip(reasons, broken, strict=True))
    assert time.perf_counter() - began < 5

    def denied(path: Any) -> Any:
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(
        ValueError, match=rf"{root / 'a'} cannot be listed \(Permission denied\); make it readable"
    ):
        open_images(str(root))


def test_an_unreadable_file_is_a_broken_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1.png").write_bytes(encoded())

    def denied(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(decoding.os, "open", denied)
    with pytest.raises(
        ValueError, match=r"Cannot decode .*1\.png: Permission denied; replace or remove it"
    ):
        open_images(str(tmp_path))[0]


# --- what stands in for it ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[int]]:
    """5 000 images of one colour, 500 of them broken."""
    bad = set(np.random.default_rng(1).choice(5000, 500, replace=False).tolist())
    cells = [
        b"broken" if i in bad else encoded("PPM", Image.new("RGB", (2, 2), (i % 256, i // 256, 9)))
        for i in range(5000)
    ]
    path = tmp_path_factory.mktemp("table") / "images"
    datasets.Dataset.from_dict(
        {"image": cells, "label": [i % 10 for i in range(5000)]}
    ).save_to_disk(path)
    return path, bad


def epoch_of(
    source: Any, workers: int, rank: int = 0, world_size: int = 1, steps: int = 10
) -> list[dict[str, Any]]:
    crop = MultiCrop(view_specs(1, 1, 4, 2, (0.5, 1.0), (0.3, 0.5), colour=False))
    sampler = BatchSampler(
        source, batch_size=500, seed=3, steps=steps, rank=rank, world_size=world_size
    )
    return list(
        DataLoader(ViewDataset(source, crop, seed=5), batch_sampler=sampler, num_workers=workers)
    )


def assert_same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    assert len(b) > 0
    for x, y in zip(a[: len(b)], b, strict=True):
        for key in ("index", "label", "global_views", "local_views"):
            assert torch.equal(x[key], y[key]), key
        assert x["broken"] == y["broken"]


def joined(parts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The batches of several processes as those of one."""

    def join(shares: tuple[dict[str, Any], ...], key: str) -> Any:
        if key == "broken":
            return [entry for share in shares for entry in share[key]]
        return torch.cat([share[key] for share in shares])

    return [{key: join(shares, key) for key in shares[0]} for shares in zip(*parts, strict=True)]


@pytest.mark.slow
def test_500_broken_of_5000(table: tuple[Path, set[int]]) -> None:
    """One epoch: the rule, equal for any number of workers and processes, and a complete list."""
    path, bad = table
    images = open_images(str(path))
    whole = epoch_of(images, workers=0)
    for workers in (1, 4):
        assert_same(whole, epoch_of(images, workers, steps=2))
    assert_same(whole, joined([epoch_of(images, 0, rank, 2) for rank in (0, 1)]))

    order = epoch_order(5000, 3, 0).tolist()
    expected = []
    # the rule, in slow and plain words: one batch later, and on until one is readable
    for place, index in enumerate(order):
        later = place + 500
        while index in bad:
            index, later = order[later % 5000], later + 1
        expected.append(index)
    assert torch.cat([batch["index"] for batch in whole]).tolist() == expected
    assert torch.cat([batch["label"] for batch in whole]).tolist() == [
        index % 10 for index in expected
    ]
    # replaced by others of the same batch only where two broken neighbours point to one image
    twice = [500 - len(set(batch["index"].tolist())) for batch in whole]
    assert sum(twice) <= 15

    broken = BrokenImages(images, max_fraction=0.1)
    for batch in whole:
        broken.add(batch["broken"])
    broken.share()
    assert [entry["index"] for entry in broken.entries] == sorted(bad)
    assert all(entry["path"] == f"row {entry['index']} of {path}" for entry in broken.entries)


def test_a_stream_follows_the_same_rule(table: tuple[Path, set[int]]) -> None:
    stream = open_stream(str(table[0]))
    examples = list(stream.iterate(3, 0))
    bad = {index for index, example in examples if example["image"] == b"broken"}
    assert len(bad) == 500
    whole = epoch_of(stream, workers=0)
    assert_same(whole, epoch_of(stream, workers=2, steps=2))
    assert_same(whole, joined([epoch_of(stream, 0, rank, 4, steps=3) for rank in range(4)]))
    indices = torch.cat([batch["index"] for batch in whole]).tolist()
    for place, index in enumerate(indices[:4500]):
        # the good image at that place, or the next good one at its place in the batch after
        later = place // 500 * 500 + 500
        places = [later + (place + k) % 500 for k in range(500)]
        assert index == next(p for p in (place, *places) if p not in bad)


def test_a_substitute_has_its_own_index_and_views_of_its_own(tmp_path: Path) -> None:
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        (tmp_path / f"{i}.png").write_bytes(
            encoded(image=Image.fromarray(pixels)) if i != 3 else b""
        )
    images = open_images(str(tmp_path))
    crop = MultiCrop(view_specs(2, 0, 8, 8, (0.3, 1.0), (0.1, 0.5), colour=True))
    views = ViewDataset(images, crop, seed=0)
    other, own = views[0, 3, 5, 6], views[0, 5, 6, 7]
    # the queue keeps an image from finding itself by this index
    assert other["index"] == own["index"] == 5
    assert not torch.equal(other["global_views"], own["global_views"])
    assert own["broken"] == "" and [entry["index"] for entry in json.loads(other["broken"])] == [3]
    with pytest.raises(
        ValueError,
        match=r"1 images of .* in a row are broken, first: Cannot decode .*3\.png: it is empty",
    ):
        read_sample(images, (0, 3))


# the loader, and so its workers, are kept by the frames of the error until the process ends
UNREADABLE = """
import sys
from mim_refiner_hf.data.batches import batches_of_views
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.data.views import MultiCrop, view_specs
crops = MultiCrop(view_specs(2, 0, 8, 8, (0.3, 1.0), (0.1, 0.5), colour=True))
kept = iter(batches_of_views(
    open_images(sys.argv[1]), crops, batch_size=2, seed=0, stop_step=3, num_workers=2
))
try:
    next(kept)
except ValueError as error:
    print(error)
"""


def test_workers_end_with_a_process_that_no_image_could_be_read_for(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"none")
    done = subprocess.run(
        [sys.executable, "-c", UNREADABLE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert re.match(r"10 images of .* in a row are broken, first: Cannot decode", line), line


def test_without_broken_images_every_process_has_its_own_part_of_a_stream(tmp_path: Path) -> None:
    """2 and 4 processes: together every example of every whole batch, each once, in one order."""
    cells = [encoded("PPM", Image.new("RGB", (2, 2), (i, 0, 0))) for i in range(50)]
    datasets.Dataset.from_dict({"image": cells}).save_to_disk(tmp_path)

    def pixels(rank: int, world_size: int, start: int = 0) -> list[list[int]]:
        stream = open_stream(str(tmp_path))
        sampler = BatchSampler(
            stream,
            batch_size=8,
            seed=1,
            steps=9,
            rank=rank,
            world_size=world_size,
            start_step=start,
        )
        return [
            [read_sample(stream, key).sample.image.getpixel((0, 0))[0] for key in batch]
            for batch in sampler
        ]

    whole = pixels(0, 1)
    # 6 batches an epoch; two images are left over
    first, second = (
        [*chain(*whole[:6])],
        [*chain(*whole[6:])],
    )
    assert len(set(first)) == 48 and len(set(second)) == 24
    for world_size in (2, 4):
        parts = [pixels(rank, world_size) for rank in range(world_size)]
        assert [[*chain(*shares)] for shares in zip(*parts, strict=True)] == whole
        for step in range(9):
            shares = [set(part[step]) for part in parts]
            assert sum(map(len, shares)) == len(set.union(*shares)) == 8
        assert pixels(1, world_size, start=7) == parts[1][7:]


# --- who hears of it ------------------------------------------------------------------------------


def test_too_many_stop_and_the_list_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_images("digits").subset(range(100))
    entries = [
        {"index": i, "path": f"row {i}", "reason": f"Cannot decode row {i}: it is empty"}
        for i in range(80)
    ]
    broken = BrokenImages(images, max_fraction=0.05, path=tmp_path / BROKEN)  # of all 1297: 64
    broken.add(["", json.dumps(entries[:40]), *entries[20:64]])
    assert len(broken) == 0
    broken.share()
    assert len(broken) == 64 and len(caplog.records) == 10
    assert json.loads((tmp_path / BROKEN).read_text()) == {"images": entries[:64]}
    monkeypatch.setattr(
        broken_images, "gather_objects", lambda own: [own, {70: entries[70]}]
    )  # another process's
    with pytest.raises(
        ValueError,
        match=r"65 of 1297 images of digits are broken, more than the 5.0% .*first: .*row 0",
    ):
        broken.share()
    assert len(json.loads((tmp_path / BROKEN).read_text())["images"]) == 65


def test_the_share_of_a_stream_is_one_of_what_was_read(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"image": [encoded()] * 3}).save_to_disk(tmp_path)
    broken = BrokenImages(open_stream(str(tmp_path)), max_fraction=0.05)
    broken.add([{"index": i, "path": "", "reason": "r"} for i in range(51)])
    with pytest.raises(ValueError, match="51 of 100 images of"):
        broken.share(images_read=100)
    broken.add([{"index": 51, "path": "", "reason": "r"}])
    broken.share(images_read=1100)
    assert len(broken) == 52


def test_none_readable(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"None of the 1 images of .* can be read, first: .*it is empty"
    ):
        readable(open_images(str(tmp_path)))
    digits: ImageDataset = open_images("digits")
    assert readable(digits)[0] is digits
