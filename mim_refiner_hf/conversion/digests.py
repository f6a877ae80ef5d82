"""A sha256 of every tensor of a model folder and of its settings: what names and shapes hide.

    write_digests(folder, tensors)                  # every folder that this package writes has them
    add_file_digests(folder)                        # of its two JSON files, once they are final
    check_file_digests(folder, digests)             # another number of heads fits the same tensors
    check_digests("user/model", digests, tensors)   # CheckpointError names the tensors that differ

Two tensors of one shape under each other's names, a square matrix transposed, a bit that flipped on
a disk: all of these would load without a word. Hashing took 2.7 seconds per gigabyte on one core of
a 2.5 GHz Xeon.

Of a JSON file the digest is one of its fields, whatever the formatting, and without those that say
who wrote it: a model that is loaded and saved into its own folder with the same fields is still the
same model. Earlier versions recorded a digest of the bytes, which is accepted too.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..runtime.files import CheckpointError, sha256_of
from ..runtime.strangers import read_json
from .layout import listed

DIGESTS = "weights_digests.json"
SETTINGS = ("config.json", "preprocessor_config.json")

# fields that say by what the folder was written and which classes read it; transformers adds and
# drops them when it saves
_BOOKKEEPING = frozenset(
    (
        "transformers_version",
        "format_version",
        "auto_map",
        "custom_pipelines",
        "image_processor_type",
        "_name_or_path",
    )
)


def tensor_digest(tensor: Tensor) -> str:
    """sha256, in hexadecimal, of a tensor's dtype, shape and values."""
    sha256 = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _fields_digest(path: Path) -> str:
    """sha256, in hexadecimal, of the fields of a JSON object that say how weights are used."""
    fields = read_json(path)
    used = {key: value for key, value in fields.items() if key not in _BOOKKEEPING}
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()


def _write(folder: Path, digests: Mapping[str, str]) -> None:
    text = json.dumps(digests, indent=0) + "\n"
    (folder / DIGESTS).write_text(text, encoding="utf-8")


def write_digests(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `weights_digests.json` for the tensors of a model folder."""
    _write(folder, {name: tensor_digest(tensor) for name, tensor in tensors.items()})


def add_file_digests(folder: Path) -> None:
    """Add to `weights_digests.json` those of the JSON files that say how the weights are used."""
    digests = read_json(folder / DIGESTS)
    _write(folder, digests | {name: _fields_digest(folder / name) for name in SETTINGS})


def check_file_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Compare the JSON files with the digests recorded; a folder of an earlier version has none.

    Raises:
        CheckpointError: when one of them has other fields, or is missing.
    """
    for name in SETTINGS:
        if name not in digests:
            continue
        path = folder / name
        if not path.is_file() or digests[name] not in (_fields_digest(path), sha256_of(path)):
            raise CheckpointError(
                f"{path} has not the fields that {DIGESTS} describes; get the folder again, or, if "
                f"you changed it yourself, remove its line from {DIGESTS}"
            )


def check_digests(name: str, digests: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Compare tensors with the digests recorded for them.

    Raises:
        CheckpointError: when any tensor is another one, is missing, or has no digest; it names
            them.
    """
    recorded = {key: value for key, value in digests.items() if key not in SETTINGS}
    changed = []
    for key in dict.fromkeys([*recorded, *tensors]):
        if key not in tensors or recorded.get(key) != tensor_digest(tensors[key]):
            changed.append(key)

    if changed:
        raise CheckpointError(
            f"{name}: {len(changed)} of {len(recorded)} tensors are not the ones that {DIGESTS} "
            f"describes: {listed(changed)}; get the folder again, or, if you saved other weights "
            f"into it yourself, delete its {DIGESTS}"
        )
