"""The tensors of a checkpoint: one safetensors file, or, where they are sharded, one a process.

    tensors.safetensors                                     # not sharded
    tensors-00000-of-00002.safetensors                      # sharded by two processes
    tensors-00001-of-00002.safetensors

    found = read_tensors(checkpoint)                        # by any number of processes
    found["average.norm.weight"]                            # whole

The header of a file says, of each part of a sharded tensor, the shape of the whole and where in it
the part begins.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import load, load_file
from torch import Tensor

from .text import ODD_BYTES

TENSORS = "tensors.safetensors"
# the key, in the header of a file, of the JSON that says where its parts belong
PLACES = "places"


class Place(TypedDict):
    """Where a part of a sharded tensor belongs: the shape of the whole, the offset in it."""

    shape: list[int]
    offset: list[int]


def tensor_files(count: int) -> list[str]:
    """The names of the files that `count` processes write."""
    if count == 1:
        return [TENSORS]
    return [f"tensors-{i:05}-of-{count:05}.safetensors" for i in range(count)]


def read_tensor_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file."""
    # the library opens no path that is no valid Unicode, and takes the bytes
    if ODD_BYTES.search(str(path)):
        return load(path.read_bytes())
    return load_file(path)


def read_header(path: Path) -> dict[str, str]:
    """What the header of a safetensors file, which was read, states beside its tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return dict(header.get("__metadata__") or {})


class ShardedTensors(Mapping[str, Tensor]):
    """Whole tensors by name, on the CPU.

    Each is put together from its parts when it is asked for, so that there is never more than one.

    Args:
        paths: all files of one checkpoint.

    Raises:
        ValueError: naming file and tensor, where parts do not add up to the whole.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        # offsets and values
        self._parts: dict[str, list[tuple[list[int], Tensor]]] = {}
        self._shapes: dict[str, list[int]] = {}
        for path in paths:
            self._add_file(path)

        for name, shape in self._shapes.items():
            found = sum(part.numel() for _, part in self._parts[name])
            if found != math.prod(shape):
                raise ValueError(
                    f"the parts of {name} have {found} values, "
                    f"the whole {shape} has {math.prod(shape)}"
                )

    def _add_file(self, path: Path) -> None:
        """Take over the parts in a file; ValueError where one lies outside its whole."""
        with safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get(PLACES, "{}")
            places: dict[str, Place] = dict(json.loads(stated))
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                part = file.get_tensor(name)
                whole: Place = {"shape": list(part.shape), "offset": [0] * part.ndim}
                place = places.get(name, whole)

                shape = self._shapes.setdefault(name, place["shape"])
                offset = place["offset"]
                if shape != place["shape"] or not _lies_within(part, offset, shape):
                    raise ValueError(
                        f"{path.name} holds {name} at {offset}, which is not within {shape}"
                    )
                self._parts.setdefault(name, []).append((offset, part))

    def __getitem__(self, name: str) -> Tensor:
        parts = self._parts[name]
        if len(parts) == 1:
            return parts[0][1]
        whole = torch.empty(self._shapes[name], dtype=parts[0][1].dtype)
        for offset, part in parts:
            region = [slice(o, o + n) for o, n in zip(offset, part.shape, strict=True)]
            whole[tuple(region)] = part
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _lies_within(part: Tensor, offset: list[int], shape: list[int]) -> bool:
    """Whether a part that begins at `offset` fits into a whole of that shape."""
    if not len(shape) == len(offset) == part.ndim:
        return False
    places = zip(offset, part.shape, shape, strict=True)
    return all(0 <= start <= size - length for start, length, size in places)


def read_tensors(folder: Path) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint's folder by name, whole; ValueError as `ShardedTensors`."""
    one = folder / TENSORS
    if one.exists():
        return read_tensor_file(one)
    return ShardedTensors(sorted(folder.glob("tensors-*.safetensors")))
