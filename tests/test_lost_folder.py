"""A run whose folder is removed, renamed or taken notices before each save, and writes nothing."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from mim_refiner_hf.runtime.checkpoint import save_checkpoint
from mim_refiner_hf.runtime.files import staged_folder, write_json
from mim_refiner_hf.runtime.held import LostFolderError, check_held
from mim_refiner_hf.runtime.lock import LOCK, sole_run
from mim_refiner_hf.runtime.tracking import JsonlTracker


def save_a_file(out: Path) -> None:
    write_json(out / "metrics.json", {})


def save_a_folder(out: Path) -> None:
    with staged_folder(out / "model", lambda folder: folder) as new:
        (new / "config.json").write_text("{}")


def save_steps(out: Path) -> None:
    tensors = {"weight": torch.ones(2)}
    save_checkpoint(out / "checkpoints", step=1, tensors=tensors, state={}, keep=2)


def log_a_line(out: Path) -> None:
    JsonlTracker(out / "log.jsonl", start_step=0).log({"loss": 1.0}, step=1)


SAVES = [save_a_file, save_a_folder, save_steps, log_a_line]


def removed(out: Path) -> None:
    shutil.rmtree(out)


def renamed(out: Path) -> None:
    out.rename(out.with_name("elsewhere"))


def made_anew(out: Path) -> None:
    shutil.rmtree(out)
    out.mkdir()


def taken(out: Path) -> None:
    made_anew(out)
    (out / LOCK).write_text("of another run")


def put_back_from_a_copy(out: Path) -> None:
    """Names and contents are what they were, the files are others."""
    copy = Path(shutil.copytree(out, out.with_name("copy")))
    shutil.rmtree(out)
    copy.rename(out)


def led_elsewhere(out: Path) -> None:
    out.rename(out.with_name("elsewhere"))
    taken_by_another = out.with_name("another")
    taken_by_another.mkdir()
    (taken_by_another / LOCK).touch()
    out.symlink_to(taken_by_another)


def without_its_lock(out: Path) -> None:
    (out / LOCK).unlink()


LOSSES = [removed, renamed, made_anew, taken, put_back_from_a_copy, led_elsewhere, without_its_lock]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("lose", LOSSES)
def test_nothing_is_written_into_the_folder_of_another(
    lose: Callable[[Path], None], save: Callable[[Path], None], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped = pytest.raises(LostFolderError, match=f"{out} is no longer this run's")
    with stopped, sole_run(out, "output_dir"):
        save(out)
        lose(out)
        before = contents(tmp_path)
        save(out)
    # nor is the other's lock removed at the end
    assert contents(tmp_path) == before


@pytest.mark.parametrize("lose", LOSSES)
def test_a_folder_lost_while_it_is_written(lose: Callable[[Path], None], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped = pytest.raises(LostFolderError, match="is no longer this run's")
    staged = staged_folder(out / "model", lambda folder: folder)
    with stopped, sole_run(out, "output_dir"), staged as new:
        (new / "config.json").write_text("{}")
        lose(out)
        before = contents(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("lose", LOSSES)
@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "gone"), OSError("I/O error"), SafetensorError("os error 2")]
)
def test_what_a_library_says_of_a_lost_folder_is_no_wrong_use(
    error: Exception, lose: Callable[[Path], None], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(type(error)), sole_run(out, "output_dir"):
        raise error
    with pytest.raises(LostFolderError), sole_run(out, "output_dir"):
        (out / "kept").touch()
        lose(out)
        raise error
    # what is wrong with the words stays what it is
    other = tmp_path / "below/other"
    with pytest.raises(ValueError, match="nonsense"), sole_run(other, "output_dir"):
        lose(other)
        raise ValueError("nonsense")


def test_a_folder_filled_by_another_program_is_not_replaced(tmp_path: Path) -> None:
    """Where the lock lies beside it, as for `evaluate`, removing the folder does not matter."""

    def only_empty(folder: Path) -> Path:
        if folder.exists() and any(folder.iterdir()):
            raise ValueError("holds something else")
        return folder

    out = tmp_path / "out"
    stopped = pytest.raises(ValueError, match="something else")
    with stopped, sole_run(out, "out", beside=True), staged_folder(out, only_empty) as new:
        (new / "report.md").touch()
        out.mkdir()
        (out / "thesis.txt").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_what_was_not_lost_goes_on(tmp_path: Path) -> None:
    with sole_run(tmp_path / "one", "out"), sole_run(tmp_path / "two", "out", beside=True):
        os.utime(tmp_path / "one" / LOCK)
        (tmp_path / "one" / LOCK).write_text("rewritten in place")
        check_held()
        for save in SAVES:
            save(tmp_path / "one")
    check_held()
