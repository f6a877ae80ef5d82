"""One run per output folder: the second is refused while the first lives.

    with sole_run(Path("out"), "output_dir"):
        ...                                         # nobody else writes to out/ meanwhile

What holds is a lock of the operating system (`flock`, by filelock) on `.run.lock` in the folder. It
goes with the process, however that ends, so a file that kill -9 leaves behind stops nobody; the
file also says who holds the lock. Of the processes of one distributed job only the main one takes
it.

Network file systems without locks fall back on filelock's own way, where a crashed holder's mark
has to be removed by hand.
"""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from .distributed import rank
from .wording import setting

LOCK = ".run.lock"
# Where launchers write a process's number, as accelerate looks for it: the processes have not found
# each other yet.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


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

    Args:
        folder: where the run writes.
        option: the setting that named it, for messages.
        beside: lock next to the folder instead of in it, for one that is replaced as a whole.

    Raises:
        ValueError: when another run holds it, with its process, host and start; or as
            `check_writable`.
    """
    if rank() or any(int(os.environ.get(name, "0")) for name in _RANKS):
        yield
        return

    check_writable(folder, option)
    folder = folder.absolute()
    path = folder.with_name(f".{folder.name}.lock") if beside else folder / LOCK
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"{setting(option, folder)}: another run writes there ({_holder(path)}); "
            "wait for it, stop it, or name another folder"
        ) from error

    try:
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        holder = {"process": os.getpid(), "host": platform.node(), "since": now}
        path.write_text(json.dumps(holder))
        yield
    finally:
        # while it is held: whoever has opened it already sees that it lost its name, and starts
        # over
        path.unlink(missing_ok=True)
        lock.release()
        # not empty: the run wrote something
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()


def _holder(path: Path) -> str:
    """Who holds the lock, in words."""
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    # it has just begun, or just ended
    except (OSError, ValueError, KeyError, TypeError):
        return "it does not say which"


__all__ = ["check_writable", "sole_run"]
