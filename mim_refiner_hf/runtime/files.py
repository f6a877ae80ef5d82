"""Files and folders that are whole or not there, their digests, and the data files of the package.

    write_json(Path("out/metrics.json"), {"knn_accuracy": 0.96})
    with whole_file(Path("out/curves.png")) as new:              # becomes out/curves.png
        figure.savefig(new, format="png")
    with staged_folder(Path("out/model"), check) as new:         # becomes out/model
        ...

A kill at any moment leaves the old content or the new one, and at most a hidden left-over beside
it, which the next writer replaces. A disk without room is a SaveError (`room.py`).
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .held import LostFolderError, check_held
from .room import room_to_write

REPOSITORY = Path(__file__).parents[2]
# of an encoder's weights
FILE_SUFFIXES = {".pth", ".pt", ".th", ".bin", ".tar", ".safetensors"}
STAGED = ".tmp-"
_ASIDE = ".old-"
# of Linux's renameat2: paths count from the working folder; both names change places
_FROM_HERE = -100
_EXCHANGE = 2
# what a system says that cannot do that, or not on this disk
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
ON_WINDOWS = os.name == "nt"


class CheckpointError(ValueError):
    """A file or folder cannot be turned into weights; the message says why, and a remedy."""


# --- one file


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place to write to, which becomes `path` when the block ends well, and else vanishes.

    Raises:
        SaveError: when there is no room.
        LostFolderError: when the folder of this run is another's now.
        ValueError: as `check_file`.
    """
    check_held()
    check_file(path)
    # the ending is another one, so that nobody who looks for *.json meets it
    new = path.with_name(f".{path.name}.tmp")
    _clear(new)

    with room_to_write(path):
        try:
            yield new
            sync_to_disk(new)
            check_held()
            new.replace(path)
        # what has that name now is another run's
        except LostFolderError:
            raise
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        sync_to_disk(path.parent)


def write_text(path: Path, text: str) -> None:
    r"""Write text so that `path` holds the old or the new one, never half of it.

    A name of a file that is no valid Unicode survives as \udcff, which is also JSON's way.
    """
    with whole_file(path) as new:
        new.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_to_disk(path: Path) -> None:
    """Ask the operating system to bring a file or folder to the disk."""
    # Windows syncs no folder, and a file only where it is open for writing
    if ON_WINDOWS and path.is_dir():
        return
    access = os.O_RDWR if ON_WINDOWS else os.O_RDONLY
    descriptor = os.open(path, access)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def in_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


# --- what has a name that is ours


def check_kinds(folder: Path, folders: Iterable[str] = ()) -> None:
    """Refuse a folder of ours in which something of another kind has a name that is written there.

    Args:
        folder: where files of ours lie, or will.
        folders: names of folders below it that are made.

    Raises:
        ValueError: for a folder that is called like one of our files, by its ending, and for a file
            in the place of a folder.
    """
    for name in folders:
        path = folder / name
        if os.path.lexists(path) and not path.is_dir():
            raise ValueError(f"{_is_what(path)}, but a folder of that name is made; {_REMEDY}")
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix in _ENDINGS and not path.name.startswith("."):
            check_file(path)


def check_file(path: Path) -> None:
    """ValueError where a file cannot be written, as a folder or a link to nothing has its name."""
    if os.path.lexists(path) and not path.is_file():
        raise ValueError(f"{_is_what(path)}, but a file of that name is written; {_REMEDY}")


_TEXTS = (".json", ".jsonl", ".damaged", ".csv", ".md", ".html", ".xml", ".yaml", ".py")
_ENDINGS = (*_TEXTS, ".png", ".parquet", ".safetensors", ".onnx")
_REMEDY = "rename or remove it, or name another folder"


def _is_what(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder"
    if path.is_file():
        return f"{path} is a file"
    return f"{path} is neither file nor folder"


def _clear(path: Path) -> None:
    """Remove what a killed run, or anybody, left under a name of ours for what is unfinished."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# --- a folder


def check_folder(folder: Path, marker: str, kind: str) -> Path:
    """`folder`, resolved, if it may be written: it is absent, empty, or a `kind` of folder.

    One that a killed run left aside is put back.

    Args:
        marker: the file by which such a folder is known.
        kind: what it is called, for the message.

    Raises:
        ValueError: when something else is there, and as `check_kinds`.
    """
    folder = Path(folder).resolve()
    aside = left_aside(folder)
    if aside is not None:
        aside.rename(folder)

    if not folder.exists():
        return folder
    if (folder / marker).is_file():
        check_kinds(folder)
        return folder
    if folder.is_dir() and not any(folder.iterdir()):
        return folder
    raise ValueError(
        f"{folder} exists and is not a {kind} folder, so it will not be overwritten; "
        "name another one"
    )


def check_apart(out: Path, images: Any) -> None:
    """ValueError where a folder to write and the images, or their folder, lie within each other.

    Args:
        images: a path or a name; other objects lie nowhere.
    """
    if not isinstance(images, str | Path) or not Path(images).expanduser().exists():
        return
    folder = out.expanduser().resolve()
    origin = Path(images).expanduser().resolve()
    if origin == folder or origin in folder.parents or folder in origin.parents:
        raise ValueError(
            f"{out} and the images in {images} lie within each other; name another folder for what "
            "is written"
        )


@contextmanager
def staged_folder(folder: Path, check: Callable[[Path], Path]) -> Iterator[Path]:
    """A new empty folder that becomes `folder` when the block ends well, and else vanishes.

    What was in `folder` goes away only once the new one is in place.

    Args:
        check: resolves `folder`, or raises a ValueError where it may not be replaced.

    Raises:
        SaveError: when there is no room.
        LostFolderError: when the folder of this run is another's now.
        ValueError: as `check`, also where another program has filled `folder` meanwhile.
    """
    check_held()
    folder = check(folder)
    new = folder.with_name(f"{STAGED}{folder.name}")
    _clear(new)

    try:
        with room_to_write(folder):
            new.mkdir(parents=True)
            yield new
            # the names must not reach the disk before the contents
            for path in (*new.rglob("*"), new):
                sync_to_disk(path)
            check_held()
            _exchange(check(folder), new)
            sync_to_disk(folder.parent)
    # what has that name now is another run's
    except LostFolderError:
        raise
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    # after an exchange the old content has this name
    shutil.rmtree(new, ignore_errors=True)


def _exchange(folder: Path, new: Path) -> None:
    """Put `new` in the place of `folder`; where that fails, `folder` is what it was."""
    old = folder.with_name(f"{_ASIDE}{folder.name}")
    _clear(old)
    if not folder.exists():
        new.rename(folder)
        return
    # then the old content is under the name of the new one, which is removed
    if _exchange_at_once(folder, new):
        return

    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange_at_once(one: Path, other: Path) -> bool:
    """Exchange two names in one step, where system and disk can; False where they cannot."""
    library = None if ON_WINDOWS else ctypes.CDLL(None, use_errno=True)
    # Linux has it
    if library is None or not hasattr(library, "renameat2"):
        return False
    names = (_FROM_HERE, os.fsencode(one), _FROM_HERE, os.fsencode(other))
    if library.renameat2(*names, _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(one))


def left_aside(folder: Path) -> Path | None:
    """Where the content of `folder` is if a run was killed while it replaced it, else None."""
    old = folder.with_name(f"{_ASIDE}{folder.name}") if folder.name else folder
    return old if not folder.exists() and old.is_dir() else None


def refuse_missing_model(source: str | Path | None) -> None:
    """Raise a FileNotFoundError for a path that is not there and cannot be a name on the Hub.

    Args:
        source: of an encoder: a path, or a name; None where none is asked for.
    """
    if source is None:
        return
    path = Path(source).expanduser()
    looks_local = path.suffix in FILE_SUFFIXES or path.is_absolute() or isinstance(source, Path)
    if (looks_local or str(source).startswith((".", "~"))) and not path.exists():
        raise FileNotFoundError(
            f"{source} does not exist{say_left_aside(path)}; give a Hub name, a model folder, "
            "or a checkpoint file"
        )


def refuse_no_model_folder(folder: Path) -> None:
    """Raise a FileNotFoundError where a folder holds no model that could be published."""
    parts = ("config.json", "model*.safetensors")
    missing = [part for part in parts if not any(folder.glob(part))]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a model folder: {' and '.join(missing)} missing"
            f"{say_left_aside(folder)}; give the run's model folder"
        )


def refuse_no_run(folder: Path) -> None:
    """Raise a FileNotFoundError where a folder is that of no run."""
    if not (folder / "recipe.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no run: it has no recipe.json; give the output_dir of one"
        )


def say_left_aside(folder: Path) -> str:
    """How to get a folder back that is not there: the end of a sentence, mostly empty."""
    old = left_aside(folder)
    return "" if old is None else f" (a killed run left its content in {old}: rename that)"


def clear_left_over(folder: Path, *, beside: bool) -> None:
    """Remove what a run that died left half-written; for who has taken over its lock of `folder`.

    Args:
        beside: `folder` is replaced as a whole, so that nothing half-written is inside.
    """
    if beside:
        shutil.rmtree(folder.with_name(f"{STAGED}{folder.name}"), ignore_errors=True)
        if folder.exists():
            shutil.rmtree(folder.with_name(f"{_ASIDE}{folder.name}"), ignore_errors=True)
        return

    for part in (folder, *filter(Path.is_dir, folder.glob("[!.]*"))):
        for path in part.glob(".*"):
            if path.suffix == ".tmp" and path.is_file():
                path.unlink()
            elif path.name.startswith(STAGED):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(_ASIDE):
                _settle(path)


def _settle(aside: Path) -> None:
    """Remove what stands aside, or put it back where it has no successor."""
    folder = aside.with_name(aside.name.removeprefix(_ASIDE))
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.rename(folder)


# --- what is installed beside the package


def shipped_folder(name: str, in_repository: str) -> Path:
    """A folder of data files, in a checkout of the repository or where it is installed.

    Args:
        name: the folder of the package that holds them when it is installed.
        in_repository: where a checkout of the repository has them; that one is taken if it exists.
    """
    folder = REPOSITORY / in_repository
    # of an installed package, the folder above is site-packages, where that name is anybody's
    if (REPOSITORY / "pyproject.toml").is_file() and folder.is_dir():
        return folder
    return Path(__file__).parents[1] / name
