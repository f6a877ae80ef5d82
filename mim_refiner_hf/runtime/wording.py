"""How messages call a setting: a flag in the shell, an argument in Python.

    raise ValueError(f"{setting('topk', 9)}: must be at most {setting('queue_size', 8)}")
    # in Python:               topk=9: must be at most queue_size=8
    # under mim-refiner:       --topk 9: must be at most --queue_size 8

The command line says once that it is the one who reads (`in_the_shell`); nothing else in the
package knows of the two ways. Values are shown short: of an object its type, of a long list the
first few and their number.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

# items of a list, and characters of a text, that are shown
_MOST_ITEMS = 32
_MOST_CHARACTERS = 300

_reader_is_shell: ContextVar[bool] = ContextVar("reader_is_shell", default=False)


@contextmanager
def in_the_shell() -> Iterator[None]:
    """Within, messages speak of flags."""
    before = _reader_is_shell.set(True)
    try:
        yield
    finally:
        _reader_is_shell.reset(before)


def setting(name: str, *value: Any) -> str:
    """A setting as its user wrote it: `--topk 9` or `topk=9`; without a value `--topk` or `topk`.

    A name in capitals is that of a word without a flag: `DESTINATION out/` or `destination='out/'`.
    """
    if _reader_is_shell.get():
        flag = name if name.isupper() else f"--{name}"
        return " ".join([flag, *map(spelt, value)])
    return "=".join([name.lower(), *map(shown, value)])


def millions(count: int) -> str:
    """A number of weights: 85798656 -> "85.8 M", and 21600 -> "21.6 k"."""
    if count < 1e5:
        return f"{count / 1e3:.1f} k"
    return f"{count / 1e6:.1f} M"


def written(value: Any) -> str:
    """A value as the reader of the message writes it."""
    return spelt(value) if _reader_is_shell.get() else shown(value)


def spelt(value: Any) -> str:
    """A value as it stands on a command line: a list without brackets and commas."""
    if isinstance(value, list):
        return " ".join(map(spelt, value))
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, bool):
        return str(value).lower()
    return shown(value)


def shown(value: Any) -> str:
    """A value as Python writes it, never longer than a line: of most objects the type alone."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and len(value) > _MOST_CHARACTERS:
        value = f"{value[:_MOST_CHARACTERS]}..."
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)

    if isinstance(value, list | tuple):
        if any(isinstance(item, list | tuple | dict) for item in value):
            return kind_of(value)
        items = [shown(item) for item in value[:_MOST_ITEMS]]
        if len(value) > _MOST_ITEMS:
            items.append(f"... {len(value)} in all")
        return f"[{', '.join(items)}]"
    return kind_of(value)


def kind_of(value: Any) -> str:
    """What an object is, in a word or two: its type, and the shape or the length it has."""
    name = type(value).__name__
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{name} of shape {tuple(shape)}"
    if isinstance(value, list | tuple | dict | set):
        return f"{name} of {len(value)}"
    return name
