"""Read a checkpoint as it was saved: a file, a model folder, a name of the zoo, or a Hub name; no pickle is ever executed."""

import json
import re
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file

from ..runtime.files import CheckpointError
from ..runtime.retry import patiently
from .digests import DIGESTS, SETTINGS, check_digests, check_file_digests
from .layout import Source, listed
from .timm_models import hub_name
from .zoo import ZOO, fetch

JSON_FILES = [*SETTINGS, DIGESTS]
WEIGHTS = (
    "model*.safetensors",
    "pytorch_model*.bin",
)  # in order of preference, one file or several shards
FILE_SUFFIXES = {".pth", ".pt", ".th", ".bin", ".tar", ".safetensors"}


def read_source(source: str | Path, revision: str | None) -> Source:
    """Read a file, a folder, a name of the zoo, or a Hub name (downloaded into the Hub cache, weights and JSON only).

    What exists here comes before the zoo, and the zoo before the Hub; a `revision` can only mean the Hub.
    """
    path = Path(source).expanduser()
    if str(source) in ZOO and not path.exists() and revision is None:
        entry = ZOO[str(source)]
        return Source(entry.name, read_weights(fetch(entry)), {}, {}, entry.family)
    if path.is_file():
        return Source(str(source), read_weights(path), {}, {})
    if not path.is_dir():
        if (
            isinstance(source, Path)
            or path.suffix in FILE_SUFFIXES
            or path.is_absolute()
            or str(source).startswith((".", "~"))
        ):
            raise FileNotFoundError(
                f"{source} does not exist; give a Hub name, a model folder, or a checkpoint file"
            )
        path = download(hub_name(str(source)), revision)
    digests = read_json(path / DIGESTS)
    config, preprocessing = (read_json(path / name) for name in SETTINGS)
    shards = next((found for pattern in WEIGHTS if (found := sorted(path.glob(pattern)))), [])
    if not shards:
        raise CheckpointError(
            f"{source} holds no {' and no '.join(WEIGHTS)}; for another weight file, give the file itself"
        )
    contents: dict[str, Any] = {}
    for shard in shards:
        contents.update(read_weights(shard))
    if digests:
        check_digests(str(source), digests, contents)
        check_file_digests(path, digests)
    return Source(str(source), contents, config, preprocessing)


def download(name: str, revision: str | None) -> Path:
    """The Hub cache's folder of this model: JSON and safetensors, or pytorch_model.bin where it has no safetensors."""
    try:
        for pattern in WEIGHTS:
            wanted = [*JSON_FILES, pattern]
            folder = Path(
                patiently(
                    partial(snapshot_download, name, revision=revision, allow_patterns=wanted),
                    f"loading {name}",
                )
            )
            if any(folder.glob(pattern)):
                break
    except ConnectionError as error:
        raise ConnectionError(
            f"{name}: the Hub does not answer ({error}); run the same command again later"
        ) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name} is neither a local path nor a model that the Hub could deliver: {first_line}"
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; get it again") from error


def read_weights(path: Path) -> Mapping[str, Any]:
    """The nested dictionary that a weight file holds. Torch files are read without executing anything they contain."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(
            [Namespace]
        ):  # plain data; the official dBOT, ConMIM and iBOT files carry one
            # all but the oldest torch files are zips and can be mapped: pages come in as they are used, never all at once
            mapped = zipfile.is_zipfile(path)
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # damaged bytes make the parsers raise nearly anything
        with path.open("rb") as file:
            is_torch_file = file.read(2).startswith(
                (b"PK", b"\x80")
            )  # a zip, or a bare pickle; anything else is neither
        if isinstance(error, UnpicklingError) and is_torch_file:
            asked = re.search(r"GLOBAL (\S+)", str(error))
            raise CheckpointError(
                f"{path} holds more than plain tensors{f' ({asked[1]})' if asked else ''} and would execute code while being "
                "read, which was refused; get the weights as safetensors, or have their state dict saved alone"
            ) from error
        reason = f"{type(error).__name__}: {error}".split(". ")[0]
        lost = f", without {listed(cut)}" if (cut := cut_off(path)) else ""
        raise CheckpointError(
            f"{path} is unreadable: truncated{lost}, or no weight file ({reason}); get it again"
        ) from error
    if not isinstance(contents, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(contents).__name__}, not a dictionary of tensors"
        )
    return contents


def cut_off(path: Path) -> list[str]:
    """The tensors that a truncated safetensors file lacks, in the order of their bytes; empty where not even that can be read."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(
            file.read(8), "little"
        )  # of the data: the length of the header, then the header
        if path.suffix != ".safetensors" or start > path.stat().st_size:
            return []
        try:
            header = json.loads(file.read(start - 8))
            ends = {
                name: entry["data_offsets"][1]
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError):  # damaged in the header itself
            return []
    return sorted(
        (name for name, end in ends.items() if start + end > path.stat().st_size),
        key=ends.__getitem__,
    )
