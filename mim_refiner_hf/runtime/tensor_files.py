"""The tensors of a checkpoint: one safetensors file, or, where they are sharded, one from every process.

    tensors.safetensors                                                               # not sharded
    tensors-00000-of-00002.safetensors, tensors-00001-of-00002.safetensors            # by two processes

    found = read_tensors(checkpoint)                                                  # by any number of processes
    found["average.norm.weight"]                                                      # whole

The header of a file says of each part of a sharded tensor the shape of the whole and where the part begins in it.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

TENSORS = "tensors.safetensors"
PLACES = "places"  # key in the header of the JSON that says where parts belong


def tensor_files(count: int) -> list[str]:
    """The names of the files that `count` processes write."""
    return (
        [TENSORS]
        if count == 1
        else [f"tensors-{i:05}-of-{count:05}.safetensors" for i in range(count)]
    )


class ShardedTensors(Mapping[str, Tensor]):
    """Whole tensors by name, on the CPU, each put together from its parts when it is asked for: never more than one at a time.

    Args:
        paths: all files of one checkpoint.

    Raises:
        ValueError: naming file and tensor, where parts do not add up to the whole.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._parts: dict[str, list[tuple[list[int], Tensor]]] = {}  # offsets and values
        self._shapes: dict[str, list[int]] = {}
        for path in paths:
            with safe_open(path, "pt") as file:
                places = dict(json.loads((file.metadata() or {}).get(PLACES, "{}")))
                for name in file.keys():  # noqa: SIM118  # it is no mapping
                    part = file.get_tensor(name)
                    place = places.get(name, {"shape": list(part.shape), "offset": [0] * part.ndim})
                    shape, offset = self._shapes.setdefault(name, place["shape"]), place["offset"]
                    fits = shape == place["shape"] and len(shape) == len(offset) == part.ndim
                    if not fits or any(
                        not 0 <= o <= s - n
                        for o, n, s in zip(offset, part.shape, shape, strict=True)
                    ):
                        raise ValueError(
                            f"{path.name} holds {name} at {offset}, which is not within {shape}"
                        )
                    self._parts.setdefault(name, []).append((offset, part))
        for name, shape in self._shapes.items():
            if (found := sum(part.numel() for _, part in self._parts[name])) != math.prod(shape):
                raise ValueError(
                    f"the parts of {name} have {found} values, the whole {shape} has {math.prod(shape)}"
                )

    def __getitem__(self, name: str) -> Tensor:
        parts = self._parts[name]
        if len(parts) == 1:
            return parts[0][1]
        whole = torch.empty(self._shapes[name], dtype=parts[0][1].dtype)
        for offset, part in parts:
            whole[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = part
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def read_tensors(folder: Path) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint's folder by name, whole; ValueError as `ShardedTensors`."""
    one = folder / TENSORS
    return (
        load_file(one)
        if one.exists()
        else ShardedTensors(sorted(folder.glob("tensors-*.safetensors")))
    )


__all__ = ["PLACES", "TENSORS", "ShardedTensors", "read_tensors", "tensor_files"]
