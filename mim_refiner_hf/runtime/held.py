"""Whether this run still has the folder that it took, asked before everything that it saves.

    with held(Path("out/.run.lock"), Path("out")):       # lock.py, once the lock is taken
        check_held()                                     # files.py, checkpoint.py: before each save
    # LostFolderError: out is no longer this run's: it was removed or renamed, and another run ...

A lock belongs to a file, not to its name: who removes the folder of a run that lives takes the name
away, and the next run of that name gets a lock of its own. So the file behind the name is compared
with the one that was locked.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .ending import CommandFailure


class LostFolderError(CommandFailure):
    """The folder that this run writes to was removed, renamed or taken; nothing was written."""


# the locks of this process: file -> what it is, and the folder that it stands for
_HELD: dict[Path, tuple[os.stat_result, Path]] = {}


@contextmanager
def held(lock: Path, folder: Path) -> Iterator[None]:
    """Within, `check_held` compares the file `lock` with what it is now."""
    _HELD[lock] = (lock.stat(), folder)
    try:
        yield
    finally:
        del _HELD[lock]


@contextmanager
def losses_named() -> Iterator[None]:
    """Raise a LostFolderError for what is said of files whose folder was lost between two looks."""
    try:
        yield
    except Exception as error:
        lost = lost_folder()
        if lost is None or isinstance(error, ValueError | CommandFailure):
            raise
        raise lost from error


def still_held(lock: Path) -> bool:
    """Whether the file behind the name of a lock is the one that was taken."""
    taken = _HELD[lock][0]
    try:
        return os.path.samestat(lock.stat(), taken)
    except OSError:
        return False


def lost_folder() -> LostFolderError | None:
    """What to raise where a lock of this process is no longer the file that it was, else None."""
    for lock, (_, folder) in _HELD.items():
        if not still_held(lock):
            return LostFolderError(
                f"{folder} is no longer this run's: while it ran, the folder or its {lock.name} "
                "was removed, renamed or taken by another run; it stops without writing there; "
                "run the same command again, into another folder if that run goes on"
            )
    return None


def check_held() -> None:
    """Raise unless every lock of this process is still the file that it was.

    Raises:
        LostFolderError: naming the folder, and what to do.
    """
    lost = lost_folder()
    if lost is not None:
        raise lost
