"""5 000 images, 500 of them broken in ten ways.

A run goes on without them and lists every one, or stops when that is too many.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import log_of
from test_broken_images import assert_same, bit_flip, encoded, epoch_of, png_of_size

from mim_refiner_hf import (
    MimRefinerConfig,
    MimRefinerImageProcessor,
    MimRefinerModel,
    RefineRecipe,
    cli,
)
from mim_refiner_hf.clustering import decoding
from mim_refiner_hf.data.broken import BROKEN
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.publishing import save_model_folder

PICTURE = encoded(
    image=Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))
)
PALETTE = encoded(image=Image.new("P", (12, 12)))


def without_chunk(content: bytes, name: bytes) -> bytes:
    start = content.index(name) - 4
    return (
        content[:start] + content[start + 12 + int.from_bytes(content[start : start + 4], "big") :]
    )


# what is in the file (None: it is made otherwise), and the reason that is listed
BAD: dict[str, tuple[bytes | None, str]] = {
    "truncated": (PICTURE[:-200], "runcated|broken PNG"),
    "empty": (b"", "it is empty"),
    "text": (b"this was never an image", "no image of a known format"),
    "bomb": (png_of_size(30000, 30000), "30000 x 30000 pixels|decompression bomb"),
    "crc": (bit_flip(PICTURE), "broken PNG"),
    "half-written": (
        PICTURE[: len(PICTURE) // 2] + bytes(len(PICTURE) // 2),
        "broken PNG|runcated|chunk",
    ),
    "no-palette": (without_chunk(PALETTE, b"PLTE"), ""),
    "unreadable": (PICTURE, "Permission denied"),
    "loop": (None, "Too many levels of symbolic links"),
    "device": (None, "it is no regular file"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 500 good images, 50 of every bad kind with the kind in the name, and folders that are
    called like images.
    """
    root = tmp_path_factory.mktemp("pile")
    for i in range(4500):
        (root / f"{i:04d}.png").write_bytes(
            encoded("PPM", Image.new("RGB", (4, 4), (i % 256, i // 256, 9)))
        )
    for i in range(500):
        kind = list(BAD)[i % 10]
        content, path = BAD[kind][0], root / f"{9 * i:04d}-{kind}.png"
        if content is not None:
            path.write_bytes(content)
        else:
            path.symlink_to(path if kind == "loop" else "/dev/zero")
    for name in ("0000.jpg", "album.png"):
        (root / name).mkdir()
    return root


@pytest.fixture(autouse=True)
def _unreadable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For root, who may read everything, too."""
    opened = os.open

    def denied(path: Any, *rest: Any, **settings: Any) -> int:
        if "-unreadable" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest, **settings)

    monkeypatch.setattr(decoding.os, "open", denied)
    return None


def test_the_rule_is_the_same_for_any_number_of_workers(folder: Path) -> None:
    images = open_images(str(folder))
    assert len(images) == 5000
    one, four = epoch_of(images, workers=1, steps=3), epoch_of(images, workers=4, steps=3)
    assert_same(one, four)
    indices = torch.cat([batch["index"] for batch in one]).tolist()
    assert not [i for i in indices if "-" in Path(images.describe(i)).name]
    reported = [json.loads(entry) for batch in one for entry in batch["broken"] if entry]
    assert 100 < len(reported) < 200
    # nothing stands in twice in silence: without those that replace a reported image, every image
    # is there once
    own = [
        i
        for batch in one
        for i, entry in zip(batch["index"].tolist(), batch["broken"], strict=True)
        if not entry
    ]
    assert len(set(own)) == len(own) == len(indices) - len(reported)


@pytest.mark.slow
def test_a_run_stops_at_too_many_and_goes_on_when_they_are_allowed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the default of 5 % it stops, with a sentence.

    With 20 % the same command ends, and all 500 are listed, once each.
    """
    shape = {
        "image_size": 8,
        "patch_size": 4,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
    }
    encoder = MimRefinerModel(MimRefinerConfig(**shape, intermediate_size=8))
    square = {"height": 8, "width": 8}
    processor = MimRefinerImageProcessor(size=square, crop_size=square)
    save_model_folder(tmp_path / "start", encoder, processor)
    words = (
        f"refine --model {tmp_path}/start --dataset {folder} --output_dir {tmp_path}/out "
        f"--eval_fraction 0 --num_heads 1 "
        "--projector_dim 8 --predictor_dim 8 --embedding_dim 8 --queue_size 500 --topk 1 "
        "--global_views 1 --local_views 1 "
        "--colour false --batch_size 500 --head_epochs 0.1 --epochs 1 --warmup_epochs 0 "
        "--save_every 2 --log_every 1 "
        "--num_workers 0 --report_to none"
    ).split()
    assert cli.main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(
        r"2\d\d of 5000 images of .* are broken, more than the 5\.0% that --max_bad_fraction "
        r"allows, first: ",
        error,
    )
    assert (
        f"all are listed in {tmp_path}/out/{BROKEN}. Raise it and run the same command again to go "
        f"on" in error
    )
    assert not (tmp_path / "out/model").exists()

    assert cli.main([*words, "--max_bad_fraction", "0.2"]) == 0
    entries = json.loads((tmp_path / "out" / BROKEN).read_text())["images"]
    names = [Path(entry["path"]).name for entry in entries]
    assert len(entries) == len(set(names)) == 500
    assert Counter(name.split("-", 1)[1].removesuffix(".png") for name in names) == dict.fromkeys(
        BAD, 50
    )
    for entry in entries:
        kind = Path(entry["path"]).name.split("-", 1)[1].removesuffix(".png")
        assert re.search(BAD[kind][1], entry["reason"]), entry
    recipe = RefineRecipe(**json.loads((tmp_path / "out/recipe.json").read_text()))
    assert [line["step"] for line in log_of(recipe)] == list(range(1, 12))
    assert json.loads((tmp_path / "out/metrics.json").read_text())["broken_images"] == 500
