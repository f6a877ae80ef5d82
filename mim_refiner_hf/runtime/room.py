"""A disk that takes no more, said in one sentence, whichever library met it.

    with room_to_write(Path("out/model")):
        save_file(...)                # SafetensorError: I/O error: File too large (os error 27)
    # SaveError: there is no room to write out/model (File too large); make room, and ...

Libraries in C, C++ and Rust have errors of their own where Python has OSError, and some of ours
arrive inside another error. So the whole chain is looked at: the number of an OSError, and the
words of every other one. What writes a file or folder is in `room_to_write`, and so is a command as
a whole (`cli/main.py`), for whatever is written by the way.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# no space, a quota that is used up, a limit on the size of files
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# as _NO_ROOM nothing that the user asked for is wrong: a disk that fails, or became read-only
_REFUSED = (*_NO_ROOM, errno.EROFS, errno.EIO)
_NUMBER = re.compile(r"\b(?:os error|errno) (\d+)\b", re.IGNORECASE)
# of libraries that do not even pass the number on; the first three are torch.save's
_WITHOUT_NUMBER = (
    "PytorchStreamWriter failed writing",
    "] . unexpected pos",
    "basic_ios::clear: iostream error",
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
)


class SaveError(OSError):
    """Something could not be written; the message says what is intact and how to go on."""


@contextmanager
def room_to_write(place: Path | None = None) -> Iterator[None]:
    """Raise a SaveError for whatever error in the block comes from a disk that takes no more.

    Args:
        place: what the block writes, for the message; None for many things, where a SaveError that
            says more is left as it is.

    Raises:
        SaveError: as described; other errors stay what they are.
    """
    try:
        yield
    except Exception as error:
        number = _number_of(error)
        if number is None or (place is None and isinstance(error, SaveError)):
            raise

        written = "a file" if place is None else str(place)
        problem = f"{written} could not be written"
        remedy = "make the disk writable"
        if number in _NO_ROOM:
            problem = f"there is no room to write {written}"
            remedy = "make room"
        reason = os.strerror(number)
        raise SaveError(
            f"{problem} ({reason}); {remedy}, and run the same command again"
        ) from error


def _number_of(error: BaseException | None) -> int | None:
    """The errno with which a disk refused what led to `error`; None where none did."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        number = _own_number(error)
        if number in _REFUSED:
            return number
        error = error.__cause__ or error.__context__
    return None


def _own_number(error: BaseException) -> int | None:
    """The errno of one error, by its attribute or its words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    found = _NUMBER.search(text)
    if found is not None:
        return int(found[1])
    # the sentence of an error that is made of another one has no number, but that one has
    return errno.ENOSPC if any(words in text for words in _WITHOUT_NUMBER) else None
