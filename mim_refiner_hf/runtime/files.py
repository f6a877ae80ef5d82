"""Files that are whole or not there: JSON in one step, folders that take their place when they are complete, digests.

write_json(Path("out/metrics.json"), {"knn_accuracy": 0.96})
with staged_folder(Path("out/model"), check) as new:        # `new` becomes out/model when the block ends well
    ...
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import files as installed_files
from pathlib import Path
from typing import Any

PACKAGE = "mim_refiner_hf"
REPOSITORY = Path(__file__).parents[2]
STAGED = ".tmp-"


class CheckpointError(ValueError):
    """A file or folder cannot be turned into weights; the message says why, names the tensors, and says what to do."""


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write JSON so that `path` holds the old or the new text, never half of it; names that are no valid Unicode survive."""
    temporary = path.with_name(f".{path.name}.tmp")
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    try:
        temporary.write_text(
            text, encoding="utf-8", errors="backslashreplace"
        )  # \udcff is JSON's own way to write that byte
        sync_to_disk(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_to_disk(path: Path) -> None:
    """Ask the operating system to bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_folder(folder: Path, marker: str, kind: str) -> Path:
    """`folder`, resolved, if it may be written: it is absent, empty or a `kind` of folder, which holds `marker`; else a ValueError."""
    folder = Path(folder).resolve()
    if (
        folder.exists()
        and not (folder / marker).is_file()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise ValueError(
            f"{folder} exists and is not a {kind} folder, so it will not be overwritten; name another one"
        )
    return folder


@contextmanager
def staged_folder(folder: Path, check: Callable[[Path], Path]) -> Iterator[Path]:
    """A new empty folder beside `folder` that takes its place when the block ends well, and vanishes when it does not.

    What was in `folder` goes away only once the new one is in place.

    Raises:
        ValueError: when `folder` exists and holds what `check`, which resolves it, will not have replaced.
    """
    folder = check(folder)
    new, old = folder.with_name(f".tmp-{folder.name}"), folder.with_name(f".old-{folder.name}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for path in (*new.rglob("*"), new):  # the names must not reach the disk before the contents
            sync_to_disk(path)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def shipped_folder(name: str, in_repository: str) -> Path:
    """A folder of data files: of the repository, or as it was installed with the package.

    Args:
        name: what it is called when installed, `<prefix>/share/mim_refiner_hf/<name>`.
        in_repository: where a checkout of the repository has it; that one is taken if it exists.
    """
    folder = REPOSITORY / in_repository
    if (REPOSITORY / "pyproject.toml").is_file() and folder.is_dir():
        return folder

    inside = f"share/{PACKAGE}/{name}/"
    with suppress(PackageNotFoundError):
        for file in installed_files(PACKAGE) or []:
            before, found, _ = file.as_posix().partition(inside)
            if found and file.dist is not None:
                return Path(str(file.dist.locate_file(before + inside))).resolve()
    return folder


def in_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


__all__ = [
    "STAGED",
    "CheckpointError",
    "check_folder",
    "in_bytes",
    "sha256_of",
    "shipped_folder",
    "staged_folder",
    "sync_to_disk",
    "write_json",
]
