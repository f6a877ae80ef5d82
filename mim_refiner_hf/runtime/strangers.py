"""Files of strangers, bounded before they are believed: JSON, and what torch files hold.

    config = read_json(folder / "config.json")     # {} where there is none
    card = file_of_model("user/name", "README.md")
    check_contents(path, torch.load(path, weights_only=True))

A file of a hundred kilobytes can be nested so deep that its reader crashes, hold a number that
takes minutes to write out, or tensors that are a terabyte once they are copied. All of that is one
sentence here.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.hub import cached_file

from .files import CheckpointError, in_bytes
from .text import one_line

# Far above what any model needs: an index of 100 000 tensors has 10 MB, a configuration is nested
# five deep, a training file with its optimizer's state has some thousand entries.
_MOST_BYTES = 2**24
_DEEPEST = 32
_MOST_DIGITS = 100
_MOST_ENTRIES = 100_000
# tensors of several names can share their bytes
_MOST_SHARING = 8

# a string, closed or not, or a bracket; possessive, so that no text takes quadratic time
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)


def parse_json(text: str) -> Any:
    """What JSON says.

    Raises:
        ValueError: for text that is none, that is nested deeper than 32 times, or that holds a
            whole number of more than 100 digits.
    """
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        if match[0] in "[{":
            depth += 1
        elif match[0] in "]}":
            depth -= 1
        if depth > _DEEPEST:
            raise ValueError(f"it is nested deeper than the {_DEEPEST} levels that are allowed")
    return json.loads(text, parse_int=_whole_number)


def _whole_number(digits: str) -> int:
    """A whole number of JSON; ValueError for one that is too long to be computed with."""
    if len(digits) > _MOST_DIGITS:
        raise ValueError(
            f"it holds a number of {len(digits)} digits, and {_MOST_DIGITS} are allowed"
        )
    return int(digits)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file.

    Raises:
        CheckpointError: for a file larger than 16 MiB, one that `parse_json` refuses, or that
            holds no object.
    """
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise CheckpointError(
            f"{path} is larger than {in_bytes(_MOST_BYTES)}, which JSON beside a model may have; "
            "get it again"
        )

    try:
        found = parse_json(content.decode("utf-8"))
    except ValueError as error:
        reason = one_line(error)[:200]
        raise CheckpointError(f"{path} is not valid JSON: {reason}; get it again") from error

    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} is not valid JSON: it holds no object, {{..}}, but a "
            f"{type(found).__name__}; get it again"
        )
    return found


def file_of_model(name: str, file: str) -> Path | None:
    """A file of a model folder, or of a Hub name; None where there is none, or no network."""
    path = Path(name, file)
    if name and path.is_file():
        return path
    if Path(name).exists() or name.count("/") != 1:
        return None

    try:
        found = cached_file(name, file)
    # no such model or file, or no network
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def check_contents(path: Path, contents: Mapping[Any, Any]) -> None:
    """Check that walking through what a weight file holds, and copying its tensors, has an end.

    Raises:
        CheckpointError: for dictionaries within dictionaries without an end, and for tensors
            without values of their own or with many times more of them than the file has bytes.
    """
    entries = 0
    total = 0
    # not by recursion: what is nested without an end would crash it
    waiting: list[tuple[Mapping[Any, Any], int]] = [(contents, 1)]
    while waiting:
        mapping, depth = waiting.pop()
        entries += len(mapping)
        if depth > _DEEPEST or entries > _MOST_ENTRIES:
            raise CheckpointError(
                f"{path} is nested deeper than {_DEEPEST} times or has more than {_MOST_ENTRIES} "
                "entries, which no weight file needs; have its state dict saved alone"
            )

        for key, value in mapping.items():
            if isinstance(value, Mapping):
                waiting.append((value, depth + 1))
            elif isinstance(value, Tensor):
                total += _bytes_of(path, key, value)

    size = path.stat().st_size
    if total > _MOST_SHARING * size:
        raise CheckpointError(
            f"{path} has {in_bytes(size)}, but its tensors would have {in_bytes(total)}: they "
            "are views of few values; have its state dict saved as plain tensors"
        )


def _bytes_of(path: Path, key: object, tensor: Tensor) -> int:
    """Bytes of a plain array in the memory of this machine; CheckpointError for another tensor."""
    is_plain = tensor.layout == torch.strided and not tensor.is_nested
    if not is_plain or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{path} holds {one_line(key)[:200]} without its values, sparse or nested; "
            "have its state dict saved as plain tensors"
        )
    return tensor.numel() * tensor.element_size()
