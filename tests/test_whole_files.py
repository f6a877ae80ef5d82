"""Files and folders are whole or not there: no room, kills at any step, what the dead left."""

import errno
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chaos import save_start
from command_chaos import content, words_of, write_images
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from small_store import make_encoder, make_processor

from mim_refiner_hf import cli, load_encoder
from mim_refiner_hf.publishing.hub import push_folder, save_model_folder
from mim_refiner_hf.runtime import files
from mim_refiner_hf.runtime.files import check_folder, staged_folder, whole_file
from mim_refiner_hf.runtime.lock import LOCK, scratch_folder, sole_run
from mim_refiner_hf.runtime.room import SaveError, room_to_write

needs_limits = pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="POSIX only")


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def check(folder: Path) -> Path:
    return check_folder(folder, "a", "test")


def in_a_fork(work: Callable[[], object]) -> int:
    """Runs `work` in a child process; its wait status."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# --- no room


WRITERS: dict[str, Callable[[Path], object]] = {
    "python": lambda path: path.write_bytes(bytes(10_000)),
    "safetensors": lambda path: save_file({"a": torch.zeros(10_000)}, path),
    "torch": lambda path: torch.save(torch.zeros(10_000), path),
    "arrow": lambda path: pq.write_table(pa.table({"a": [os.urandom(9000)]}), path),
    "pillow": lambda path: Image.effect_noise((200, 200), 90).save(path, "PNG"),
}


@needs_limits
@pytest.mark.parametrize("library", WRITERS)
def test_every_library_ends_in_one_sentence(library: str, tmp_path: Path) -> None:
    (tmp_path / "whole").write_text("before")
    with (
        files_up_to(1000),
        pytest.raises(SaveError, match=r"no room to write .*/whole \(.*\); make room") as raised,
        whole_file(tmp_path / "whole") as new,
    ):
        WRITERS[library](new)
    assert "\n" not in str(raised.value)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"whole": "before"}

    with files_up_to(1000), pytest.raises(SaveError), staged_folder(tmp_path / "f", check) as new:
        WRITERS[library](new / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
        OSError(
            "[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"
        ),
        RuntimeError(
            "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing"
        ),
        RuntimeError("unable to write to file </torch_1>: No space left on device (28)"),
        OSError(errno.EROFS, "Read-only file system"),
    ],
    ids=str,
)
def test_what_comes_from_the_disk_is_known_in_a_chain(error: Exception) -> None:
    with pytest.raises(SaveError, match=r"could not be written|no room"), room_to_write():
        try:
            raise error
        except Exception as first:
            raise KeyError("something else") from first


def test_other_errors_stay_what_they_are() -> None:
    for error in (ValueError("batch 28"), FileNotFoundError(2, "No such file"), SaveError("more")):
        with pytest.raises(type(error)) as raised, room_to_write():
            raise error
        assert raised.value is error
    with pytest.raises(KeyboardInterrupt), room_to_write():
        raise KeyboardInterrupt


@needs_limits
def test_a_command_says_it_and_ends_well_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model_folder(tmp_path / "model", make_encoder(), make_processor())
    words = ["convert", str(tmp_path / "model"), str(tmp_path / "out")]
    with files_up_to(20_000):
        assert cli.main(words) == 1
    assert "error: there is no room to write" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert cli.main(words) == 0


# --- a folder in the place of a file


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and images, for every command."""
    folder = tmp_path_factory.mktemp("scene")
    save_start(folder / "model")
    write_images(folder / "images")
    return folder


def swap(path: Path) -> None:
    """A folder in the place of a file, or a file in that of a folder."""
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("mine")
    else:
        path.unlink()
        path.mkdir()
        (path / "mine").touch()


def is_mine(path: Path) -> bool:
    return (path / "mine").is_file() if path.is_dir() else path.read_text() == "mine"


def names_in(folder: Path) -> list[str]:
    """What a command has written, to the second level, without groups; of numbers the first."""
    names: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.count("/") < 2 and "group-" not in name:
            names.setdefault(re.sub(r"\d+", "0", name), name)
    return list(names.values())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "command",
    [
        "convert",
        "export-vit",
        "export-timm",
        "embed",
        "cluster",
        "pretrain",
        pytest.param("evaluate", marks=pytest.mark.slow),
        pytest.param("refine", marks=pytest.mark.slow),
    ],
)
def test_what_is_in_the_place_of_a_file_is_named_or_was_the_commands(
    command: str, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = words_of(command, scene, out)
    assert cli.main(words) == 0
    undisturbed = content(out, None)
    kept = Path(shutil.copytree(out, tmp_path / "kept", symlinks=True))

    for name in names_in(kept):
        shutil.rmtree(out)
        shutil.copytree(kept, out, symlinks=True)
        swap(out / name)
        capsys.readouterr()
        code = cli.main(words)
        errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]

        # what is replaced as a whole is as it has to be
        if code == 0:
            assert content(out, None) == undisturbed, name
            assert (kept / name).is_dir() or "/" in name, name
            continue
        assert code == 2 and len(errors) == 1, name
        assert str(out) in errors[0] and "Errno" not in errors[0], name
        assert is_mine(out / name), name

        # nor is a model loaded before that is said
        (scene / "empty").mkdir(exist_ok=True)
        unloadable = [word.replace(str(scene / "model"), str(scene / "empty")) for word in words]
        assert cli.main(unloadable) == 2
        assert errors[0] in capsys.readouterr().err


RUN_FILES = ["data.json", "log.jsonl", "log.jsonl.damaged", "metrics.json", "broken.json"]
RUN_PICTURES = ["blocks.png", "clusters.png", "curves.png", "neighbours.png"]
RUN_FOLDERS = ["checkpoints", "failures", "pretraining", "tensorboard", "model", "start"]


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("name", RUN_FILES + RUN_PICTURES + RUN_FOLDERS)
def test_a_run_says_it_before_anything_is_opened(
    name: str, link: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    # what is shipped may lie elsewhere
    if link and name != "model":
        (tmp_path / name).symlink_to(tmp_path / "nothing")
    elif name in RUN_FOLDERS:
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()
    # a folder without a model
    (tmp_path / "empty").mkdir()
    words = ["refine", "digits", "--model", str(tmp_path / "empty"), "--output_dir", str(tmp_path)]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / name) in error and error.count("\n") == 1


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_has_the_name_of_something_unfinished_goes(is_folder: bool, tmp_path: Path) -> None:
    filled(tmp_path / "b", "old")
    for name in (".a.json.tmp", ".tmp-b", ".old-b"):
        if is_folder:
            (tmp_path / name).mkdir()
            (tmp_path / name / "c").touch()
        else:
            (tmp_path / name).touch()
    files.write_json(tmp_path / "a.json", {})
    replace_by(tmp_path / "b", "new")
    left = {path.name for path in tmp_path.iterdir()}
    assert {"a.json", "b"} <= left <= {"a.json", "b", ".old-b"}


def test_a_folder_in_the_place_of_a_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(ValueError, match="is a folder, but a file"), sole_run(tmp_path, "out"):
        pass


# --- a folder in the place of another


def filled(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "a").write_text(text)
    return folder


def replace_by(folder: Path, text: str) -> None:
    with staged_folder(folder, check) as new:
        (new / "a").write_text(text)


@pytest.fixture(params=["at once", "in two steps"])
def exchanging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without renameat2."""
    if request.param == "in two steps":
        monkeypatch.setattr(files, "_exchange_at_once", lambda one, other: False)
    return str(request.param)


def test_a_kill_at_every_step_leaves_one_of_them(
    tmp_path: Path, exchanging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ("rename", "rmtree", "exchange")
    for kind in steps:
        for count in range(4):
            folder = filled(tmp_path / f"{kind}{count}", "old")
            in_a_fork(lambda: killed_at(kind, count, folder, monkeypatch))  # noqa: B023
            if exchanging == "at once":
                assert (folder / "a").is_file()
            assert (check(folder) / "a").read_text() in ("old", "new")

            replace_by(folder, "newer")
            assert (folder / "a").read_text() == "newer"
    assert len(list(tmp_path.iterdir())) == 4 * len(steps)


def killed_at(kind: str, count: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace a folder, and die before the call of that kind and number."""
    calls: list[object] = []

    def before(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **settings: object) -> object:
            calls.append(arguments)
            if len(calls) == count + 1:
                die()
            return call(*arguments, **settings)

        return wrapped

    if kind == "rename":
        monkeypatch.setattr(Path, "rename", before(Path.rename))
    elif kind == "rmtree":
        monkeypatch.setattr(files.shutil, "rmtree", before(files.shutil.rmtree))
    else:
        monkeypatch.setattr(files, "_exchange_at_once", before(files._exchange_at_once))
    replace_by(folder, "new")


def test_readers_say_where_a_model_was_left(tmp_path: Path) -> None:
    filled(tmp_path / ".old-model", "weights")
    for read in (load_encoder, lambda folder: push_folder(folder, "user/name")):
        with pytest.raises(FileNotFoundError, match=r"left its content in .*/\.old-model: rename"):
            read(tmp_path / "model")
    assert (check(tmp_path / "model") / "a").read_text() == "weights"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EACCES])
def test_a_system_that_cannot_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    library = SimpleNamespace(renameat2=lambda *_: -1)
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: library)
    monkeypatch.setattr(files.ctypes, "get_errno", lambda: number)
    folder = filled(tmp_path / "f", "old")
    if number == errno.EACCES:
        with pytest.raises(PermissionError):
            replace_by(folder, "new")
    else:
        replace_by(folder, "new")
    assert (folder / "a").read_text() == ("old" if number == errno.EACCES else "new")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


# --- what a dead run left


def test_who_takes_over_a_lock_clears_what_was_left(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in (
        "shards",
        ".tmp-model",
        "checkpoints/.tmp-step",
        ".old-start",
        "model",
        ".old-model",
    ):
        (run / name).mkdir(parents=True)
    (run / "shards/.0.parquet.tmp").touch()
    (tmp_path / ".tmp-run").mkdir()

    # of no run that died
    with sole_run(run, "out"):
        assert (run / "shards/.0.parquet.tmp").exists()
    (run / LOCK).touch()
    with sole_run(run, "out"):
        pass
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    assert left == ["checkpoints", "model", "shards", "start"]

    (tmp_path / ".run.lock").touch()
    with sole_run(run, "out", beside=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_scratch_folder_of_the_dead_goes_and_of_the_living_stays(tmp_path: Path) -> None:
    def left_by_a_kill() -> None:
        with scratch_folder(tmp_path, "features") as folder:
            (folder / "a").touch()
            die()

    assert in_a_fork(left_by_a_kill) == signal.SIGKILL
    (tmp_path / ".features-link").symlink_to(tmp_path)
    (tmp_path / "other").touch()
    dead = next(path for path in tmp_path.glob(".features-*") if not path.is_symlink())
    with scratch_folder(tmp_path, "features") as one:
        assert not dead.exists()
        with scratch_folder(tmp_path, "features") as two:
            assert one.is_dir() and two.is_dir()
        assert not two.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".features-link", "other"]


def test_a_scratch_folder_goes_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), scratch_folder(tmp_path, "features"):
        raise ValueError("wrong")
    assert list(tmp_path.iterdir()) == []
