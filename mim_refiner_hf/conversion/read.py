"""Read a checkpoint as it was saved: a file, a model folder, or a Hub name; no pickle is ever executed."""

import json
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file

JSON_FILES = ["config.json", "preprocessor_config.json"]
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # in order of preference, one file or several shards
FILE_SUFFIXES = {".pth", ".pt", ".th", ".bin", ".tar", ".safetensors"}


class CheckpointError(ValueError):
    """A source cannot be turned into an encoder; the message says why, names the tensors, and says what to do."""


@dataclass(frozen=True)
class Source:
    """What was read: the weights' container as it was saved, and the JSON files beside it (empty where there are none)."""

    name: str
    contents: Mapping[str, Any]
    config: Mapping[str, Any]
    preprocessing: Mapping[str, Any]


def listed(names: list[str], limit: int = 8) -> str:
    """Names for an error message, the first few of a long list."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_source(source: str | Path, revision: str | None) -> Source:
    """Read a file, a folder, or a Hub name (which is downloaded into the Hub cache, weights and JSON only)."""
    path = Path(source).expanduser()
    if path.is_file():
        return Source(str(source), read_weights(path), {}, {})
    if not path.is_dir():
        if isinstance(source, Path) or path.suffix in FILE_SUFFIXES or path.is_absolute() or str(source).startswith((".", "~")):
            raise FileNotFoundError(f"{source} does not exist; give a Hub name, a model folder, or a checkpoint file")
        path = download(str(source), revision)
    config, preprocessing = (read_json(path / name) for name in JSON_FILES)
    shards = next((found for pattern in WEIGHTS if (found := sorted(path.glob(pattern)))), [])
    if not shards:
        raise CheckpointError(f"{source} holds no {' and no '.join(WEIGHTS)}; for another weight file, give the file itself")
    contents: dict[str, Any] = {}
    for shard in shards:
        contents.update(read_weights(shard))
    return Source(str(source), contents, config, preprocessing)


def download(name: str, revision: str | None) -> Path:
    """The Hub cache's folder of this model: JSON and safetensors, or pytorch_model.bin where it has no safetensors."""
    try:
        for pattern in WEIGHTS:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*JSON_FILES, pattern]))
            if any(folder.glob(pattern)):
                break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name} is neither a local path nor a model that the Hub could deliver: {first_line}") from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def read_weights(path: Path) -> Mapping[str, Any]:
    """The nested dictionary that a weight file holds. Torch files are read without executing anything they contain."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([Namespace]):  # plain data; the official dBOT, ConMIM and iBOT files carry one
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged bytes make the parsers raise nearly anything
        with path.open("rb") as file:
            is_torch_file = file.read(2).startswith((b"PK", b"\x80"))  # a zip, or a bare pickle; anything else is neither
        if isinstance(error, UnpicklingError) and is_torch_file:
            asked = re.search(r"GLOBAL (\S+)", str(error))
            raise CheckpointError(
                f"{path} holds more than plain tensors{f' ({asked[1]})' if asked else ''} and would execute code while being "
                "read, which was refused; get the weights as safetensors, or have their state dict saved alone"
            ) from error
        reason = f"{type(error).__name__}: {error}".split(". ")[0]
        raise CheckpointError(f"{path} is unreadable: truncated, or no weight file ({reason}); get it again") from error
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"{path} holds a {type(contents).__name__}, not a dictionary of tensors")
    return contents
