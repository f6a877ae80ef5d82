"""One run per output folder: the second is refused while the first lives.

    with sole_run(Path("out"), "output_dir"):
        ...                                         # nobody else writes to out/ meanwhile

What holds is a lock of the operating system (`flock`, by filelock) on `.run.lock` in the folder. It
goes with the process, however that ends, so a file that kill -9 leaves behind stops nobody; the
file also says who holds the lock. Of the processes of one distributed job only the main one takes
it. Who finds the file of a run that died removes what that one left half-written.

    with scratch_folder(Path("."), "features") as folder:
        ...                                         # vanishes with the block, or the next one

Network file systems without locks fall back on filelock's own way, where a crashed holder's mark
has to be removed by hand.
"""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from .distributed import gather_objects, rank, world_size
from .files import check_file, clear_left_over
from .held import held, losses_named, still_held
from .ranks import check_ranks, stated_rank, take_ranks
from .wording import setting

LOCK = ".run.lock"


def check_writable(folder: Path, option: str) -> None:
    """Raise a ValueError unless `folder` is, or can become, a folder that can be written to.

    Args:
        option: the setting that gave it, for the message.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    named = setting(option, folder)
    if not existing.is_dir():
        raise ValueError(f"{named}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{named}: {existing} cannot be written to; name another folder")


@contextmanager
def sole_run(folder: Path, option: str, *, beside: bool = False) -> Iterator[None]:
    """Keep other runs out of `folder`; it is made, and removed again if it stayed empty.

    Every process of a job that has begun calls it. Whoever saves something meanwhile stops if the
    folder was removed or taken (`held.py`).

    Args:
        folder: where the run writes.
        option: the setting that named it, for messages.
        beside: lock next to the folder instead of in it, for one that is replaced as a whole.

    Raises:
        ValueError: when another run holds it, with its process, host and start; or as
            `check_writable`, `take_ranks` and `check_ranks`.
    """
    folder = folder.absolute()
    path = folder.with_name(f".{folder.name}.lock") if beside else folder / LOCK
    take_ranks()
    check_ranks()
    # which may not have met the others yet
    if world_size() == 1 and stated_rank() > 0:
        yield
        return

    missing = [parent for parent in path.parents if not parent.exists()]
    lock = None
    refusal = None
    if rank() == 0:
        try:
            lock = _take(folder, path, option, beside)
        except ValueError as error:
            refusal = str(error)
    # all are refused alike: the others would wait for the main one
    refusal = gather_objects(refusal)[0]
    if refusal is not None:
        raise ValueError(refusal)

    with held(path, folder):
        try:
            with losses_named():
                yield
        finally:
            if lock is not None:
                _give_back(lock, path, missing)


def _take(folder: Path, path: Path, option: str, beside: bool) -> BaseFileLock:
    """Take the lock in the file `path`, and say there who has it; ValueError if somebody does."""
    check_writable(folder, option)
    check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    died = path.exists()
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"{setting(option, folder)}: another run writes there ({_holder(path)}); "
            "wait for it, stop it, or name another folder"
        ) from error

    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    holder = {"process": os.getpid(), "host": platform.node(), "since": now}
    path.write_text(json.dumps(holder))
    if died:
        clear_left_over(folder, beside=beside)
    return lock


def _give_back(lock: BaseFileLock, path: Path, missing: list[Path]) -> None:
    """Release a lock and remove its file, and those of the `missing` folders that stayed empty."""
    # who has lost the folder leaves alone what has its name now
    if not still_held(path):
        lock.release()
        return
    # while it is held: whoever has opened it already sees that it lost its name, and starts over
    path.unlink()
    lock.release()
    # not empty: the run wrote something
    with suppress(OSError):
        for parent in missing:
            parent.rmdir()


# --- a folder for a while


@contextmanager
def scratch_folder(parent: Path | None, name: str) -> Iterator[Path]:
    """A new hidden folder that vanishes with the block.

    Folders of the same name that runs left which were killed are removed first; those of runs that
    live are locked, and stay.

    Args:
        parent: where; None for the system's folder for such things.
        name: what it holds, a word.
    """
    prefix = f".{name}-"
    folder, lock = _locked_folder(parent, prefix)
    try:
        for other in folder.parent.glob(f"{prefix}*"):
            if other != folder:
                _remove_if_dead(other, folder)
        yield folder
    finally:
        # Windows removes no file that is open
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def _locked_folder(parent: Path | None, prefix: str) -> tuple[Path, BaseFileLock]:
    """A new folder, and the lock in it, which is held."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = FileLock(folder / LOCK)
        # between the two, somebody may have taken it for that of a dead run
        with suppress(Timeout, FileNotFoundError):
            lock.acquire(timeout=0)
            if (folder / LOCK).exists():
                return folder, lock
            lock.release()


def _remove_if_dead(folder: Path, own: Path) -> None:
    """Remove another run's folder unless its lock is held, or somebody else owns it."""
    with suppress(OSError, Timeout):
        if folder.is_symlink() or folder.stat().st_uid != own.stat().st_uid:
            return
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _holder(path: Path) -> str:
    """Who holds the lock, in words."""
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    # it has just begun, or just ended
    except (OSError, ValueError, KeyError, TypeError):
        return "it does not say which"
