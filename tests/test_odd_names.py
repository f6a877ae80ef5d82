"""File names that are no valid Unicode, or hold line ends: one way to write them, read back."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from small_store import embed, make_encoder, make_processor

from mim_refiner_hf import cli
from mim_refiner_hf.evaluation import FeatureStore
from mim_refiner_hf.evaluation.pictures import class_name
from mim_refiner_hf.publishing.export import export
from mim_refiner_hf.publishing.hub import save_model_folder
from mim_refiner_hf.runtime.files import write_json
from mim_refiner_hf.runtime.tensor_files import read_tensor_file
from mim_refiner_hf.runtime.text import (
    UNSEEN,
    VisibleFormatter,
    on_terminal,
    read_back,
    spelt_out,
)

NAMES = (
    b"plain.png",
    b"caf\xe9.png",
    b"bad\xff\xfe.png",
    b"two\nlines.png",
    b"cr\r.png",
    b"like\\udce9.png",
    "\u65e5\u672c.png".encode(),
)


def in_folder(folder: Path, name: bytes) -> Path:
    return folder / os.fsdecode(name)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, one of an odd name, of all these names, and an image that is none."""
    root = tmp_path_factory.mktemp("odd")
    random = np.random.default_rng(0)
    for shade, kind in ((40, b"gr\xfcn"), (200, b"ro\nt")):
        folder = in_folder(root, kind)
        try:
            folder.mkdir()
        except OSError:
            pytest.skip("this file system takes no such names")
        for name in (*NAMES, *(b"%d.png" % i for i in range(8))):
            pixels = np.clip(random.normal(shade, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(in_folder(folder, name))
    in_folder(root, b"gr\xfcn/brok\xe9n.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "model"
    save_model_folder(folder, make_encoder(), make_processor())
    return folder


@given(st.text(st.characters(codec=None, categories=None), max_size=12))
def test_every_name_is_read_back_and_utf_8(text: str) -> None:
    written = spelt_out(text)
    assert read_back(written) == text
    assert json.loads(json.dumps(text)) == text
    written.encode()


def test_a_store_leads_back_to_the_files(photos: Path, tmp_path: Path) -> None:
    out = in_folder(tmp_path, b"f\xff")
    embed(photos, out)
    store = FeatureStore(out)
    assert len(store.paths) == 2 * (len(NAMES) + 8)
    assert all(Path(path).is_file() for path in store.paths)
    assert store.class_names == ["gr\udcfcn", "ro\nt"]
    assert Path(store.broken[0]["path"]).is_file()


def test_json_gives_the_name_again(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"path": "caf\udce9.png"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"path": "caf\udce9.png"}


def test_groups_are_matched_back_to_their_files(
    photos: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    groups = tmp_path / "groups"
    words = ["cluster", str(photos), "--model", str(model)]
    assert cli.main([*words, "--num_clusters", "2", "--out", str(groups)]) == 0
    table = (groups / "groups.csv").read_bytes().decode()
    assert table.count("caf\\udce9.png") == 2

    again = tmp_path / "again"
    start = ["--start", str(groups / "groups.csv"), "--out", str(again)]
    assert cli.main([*words, *start]) == 0
    summary = json.loads((again / "summary.json").read_text())
    assert (summary["new_images"], summary["left_out"]) == (0, [])
    assert "are not among these" not in capsys.readouterr().err
    # whoever calls it from Python has handlers of their own
    assert "brok" in caplog.text
    caplog.text.encode()
    assert sum(link.is_file() for link in again.glob("group-*/*")) == 2 * (len(NAMES) + 8)


def test_pictures_and_report_spell_names_out(
    photos: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = in_folder(tmp_path, b"o\xe9")
    words = ["evaluate", str(photos), "--model", str(model), "--num_workers", "0"]
    assert cli.main([*words, "--output_dir", str(out)]) == 0
    assert (out / "confusion.png").is_file()
    caplog.text.encode()


def test_a_class_is_one_line_in_pictures() -> None:
    class Images:
        class_names = ("gr\udcfcn", "ro\nt")

    names = [class_name(Images(), label) for label in (0, 1)]  # type: ignore[arg-type]
    assert names == ["gr\\udcfcn", "ro t"]


def test_weights_below_an_odd_name_are_read(tmp_path: Path) -> None:
    file = in_folder(tmp_path, b"w\xff.safetensors")
    save_file({"a": torch.arange(3)}, file)
    assert read_tensor_file(file)["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("to", ["vit", "timm", "onnx"])
def test_what_a_library_cannot_open_is_refused_at_once(
    model: Path, tmp_path: Path, to: str
) -> None:
    with pytest.raises(ValueError, match="no path that is no valid Unicode"):
        export(model, in_folder(tmp_path, b"o\xff"), to)


# ---- what a terminal sees

HOSTILE = "\x1b]0;OWNED\x07\x1b[31m\x9b\u202e\x08\u2028"


@given(st.text(st.characters(max_codepoint=0x2100) | st.sampled_from(HOSTILE + "\n\r\t")))
def test_nothing_that_a_terminal_obeys_reaches_it(text: str) -> None:
    record = logging.LogRecord("x", logging.WARNING, "", 0, "broken: %s", (text,), None)
    for shown in (on_terminal(text), VisibleFormatter("%(message)s").format(record)):
        assert len(shown.splitlines()) <= 1 and not UNSEEN.search(shown)


def test_a_traceback_in_the_log_keeps_its_lines() -> None:
    try:
        raise ValueError("a\nb")
    except ValueError:
        information = sys.exc_info()
    record = logging.LogRecord("x", logging.ERROR, "", 0, "it failed", (), information)
    assert "\nTraceback" in VisibleFormatter().format(record)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["embed", "cluster", "evaluate"])
def test_no_name_of_a_file_reaches_the_terminal_raw(
    command: str, model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    for i in range(12):
        (data / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        shade = Image.new("RGB", (16, 16), (20 * i, 90, 50))
        shade.save(data / "ab"[i % 2] / f"{i}.png")
    (data / "a" / f"broken{HOSTILE}\nerror: fake line.png").write_bytes(b"no picture")
    out = {"embed": "--out", "cluster": "--out", "evaluate": "--output_dir"}[command]
    words = [command, str(data), "--model", str(model), out, str(tmp_path / "out")]
    # in a process of its own: pytest has taken the log over
    ran = subprocess.run(
        [sys.executable, "-m", "mim_refiner_hf.cli", *words, "--num_workers", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = ran.stdout + ran.stderr
    assert "broken" in said and not re.search("[\x1b\x07\x9b\u202e\x08\u2028]", said)
    assert not any(line.startswith("error:") for line in said.splitlines())
