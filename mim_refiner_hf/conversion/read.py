"""Read a checkpoint as it was saved: a file, a model folder, a name of the zoo or of the Hub.

No pickle is ever executed, and of a Hub model only JSON, weights and the card (for its licence) are
downloaded.
"""

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

from ..runtime.files import FILE_SUFFIXES, CheckpointError, in_bytes, refuse_missing_model
from ..runtime.retry import patiently
from ..runtime.strangers import check_contents, parse_json, read_json
from ..runtime.tensor_files import read_header, read_tensor_file
from ..runtime.text import one_line
from .birder_models import contents_of_header
from .digests import DIGESTS, SETTINGS, check_digests, check_file_digests
from .layout import Source, listed
from .licence import CARD, Licence, licence_beside
from .preprocessing import PROCESSOR, nested_preprocessing
from .timm_models import hub_name
from .zoo import fetch, find_entry

# in the order in which transformers looks for them; an index names the shards
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# of a safetensors file, in bytes: the format's own limit
_LONGEST_HEADER = 100_000_000


class Note:
    """An empty thing in the place of an object that is no weight, whatever it was made of."""

    def __init__(self, *_: object) -> None:
        """Nothing is kept of the arguments."""

    def __setstate__(self, _: object) -> None:
        """Nor of the state."""


# what trainers note beside the weights, by its names in pickles: scores as numbers of NumPy (1 and
# 2), the state of its random generator, folders
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_NOTED = [
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    *(f"pathlib.{name}" for name in _PATHS),
    *(f"pathlib._local.{name}" for name in _PATHS),
]


def read_source(source: str | Path, revision: str | None) -> Source:
    """Read whatever `source` names, and compare it with its digests where it has them.

    What exists here comes before the zoo, and the zoo before the Hub; a `revision` can only mean
    the Hub.

    Raises:
        FileNotFoundError: for a path that does not exist.
        CheckpointError: for a file that cannot be read, or that is not what its digest says.
    """
    path = Path(source).expanduser()
    name = str(source)
    entry = find_entry(name)
    if entry is not None and not path.exists() and revision is None:
        licence = Licence(entry.licence)
        return Source(entry.name, read_weights(fetch(entry)), {}, {}, entry.family, licence)
    if path.is_file():
        return Source(name, read_weights(path), {}, {})

    if not path.is_dir():
        refuse_missing_model(source)
        repository = hub_name(name)
        path = _hub_folder(repository, revision)
        licence = licence_beside(path, repository)
        return _read_folder(name, path, licence, _named_as(repository))
    return _read_folder(name, path, licence_beside(path))


def _named_as(repository: str) -> tuple[str, ...]:
    """Weights that are called as their repository, which is how birder's are."""
    name = repository.rpartition("/")[2]
    return f"{name}.safetensors", f"{name}.pt"


def _read_folder(name: str, folder: Path, licence: Licence, more: tuple[str, ...] = ()) -> Source:
    """The weights and the JSON files of a model folder; `name` is what its user calls it.

    Args:
        more: names of weights besides `WEIGHTS`.
    """
    digests = read_json(folder / DIGESTS)
    config, stated = (read_json(folder / file) for file in SETTINGS)
    # as transformers: one that is nested in the processor's file comes first
    preprocessing = nested_preprocessing(read_json(folder / PROCESSOR)) or stated

    contents: dict[str, Any] = {}
    for file in weight_files(folder, name, more):
        contents.update(read_weights(file))

    if digests:
        check_digests(name, digests, contents)
        check_file_digests(folder, digests)
    return Source(name, contents, config, preprocessing, licence=licence)


def weight_files(folder: Path, name: str, more: tuple[str, ...] = ()) -> list[Path]:
    """The files that transformers would read of a model folder, which its user calls `name`.

    That is model.safetensors, else the shards that its index names, else the same of
    pytorch_model.bin, else a file of one of the names `more`. Whatever lies beside them is another
    model.

    Raises:
        CheckpointError: where there is none, and for an index that names a file elsewhere, or one
            that is missing.
    """
    for file in (*WEIGHTS, *more):
        if (folder / file).is_file():
            return [folder / file]
        index = folder / f"{file}.index.json"
        if not index.is_file():
            continue
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise CheckpointError(f"{index} has no weight_map, which names the shards")
        shards = sorted({str(shard) for shard in named.values()})
        there = {path.name for path in folder.iterdir() if path.is_file()}
        for shard in shards:
            if shard not in there:
                raise CheckpointError(
                    f"{index.name} of {name} names {one_line(shard)[:200]}, which is missing "
                    "there; get the model again"
                )
        return [folder / shard for shard in shards]

    others = sorted(path.name for path in folder.glob("*") if path.suffix in FILE_SUFFIXES)
    hint = "for another weight file, give the file itself"
    if others:
        hint += f", such as {one_line(others[0])[:200]}"
    # the folder of a run holds more than its model
    if Path(name).is_dir() and (folder / "model" / WEIGHTS[0]).is_file():
        hint = f"its folder model/ does: give {Path(name) / 'model'}"
    raise CheckpointError(
        f"{name} holds no {' and no '.join(WEIGHTS)}, nor an index of one; {hint}"
    )


def _hub_folder(name: str, revision: str | None) -> Path:
    """The Hub cache's folder of a model: JSON, card, and what comes first of its weights."""
    try:
        for file in (*WEIGHTS, *_named_as(name)):
            # the index, and the shards that it may name
            stem, _, suffix = file.rpartition(".")
            weights = [file, f"{file}.index.json", f"{stem}-*-of-*.{suffix}"]
            files = [*SETTINGS, PROCESSOR, DIGESTS, CARD, *weights]
            download = partial(snapshot_download, name, revision=revision, allow_patterns=files)
            folder = Path(patiently(download, f"loading {name}"))
            if any((folder / found).is_file() for found in weights[:2]):
                break

    except ConnectionError as error:
        raise ConnectionError(
            f"{name}: the Hub does not answer ({error}); check the name and the "
            "network, and run the same command again later"
        ) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name} is neither a local path nor a model that the Hub could deliver: {first_line}"
        ) from error
    return folder


def read_weights(path: Path) -> Mapping[str, Any]:
    """The nested dictionary that a weight file holds; nothing in a torch file is executed."""
    try:
        if path.suffix == ".safetensors":
            tensors = read_tensor_file(path)
            check_contents(path, tensors)
            return contents_of_header(path, tensors, read_header(path))
        _refuse_packed(path)
        # plain data; the official dBOT, ConMIM and iBOT files carry a Namespace
        notes = [(Note, name) for name in _NOTED]
        with torch.serialization.safe_globals([Namespace, *notes]):
            # all but the oldest torch files are zips and can be mapped: their pages come in as
            # they are used, never all at once
            is_zip = zipfile.is_zipfile(path)
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (OSError, CheckpointError):
        raise
    # damaged bytes make the parsers raise nearly anything
    except Exception as error:
        raise _why_unreadable(path, error) from error

    if not isinstance(contents, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(contents).__name__}, not a dictionary of tensors"
        )
    check_contents(path, contents)
    return contents


def _refuse_packed(path: Path) -> None:
    """CheckpointError for a zip whose parts are larger than itself; torch packs nothing."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())
    size = path.stat().st_size
    if unpacked > size:
        raise CheckpointError(
            f"{path} has {in_bytes(size)} and would be unpacked to {in_bytes(unpacked)}, but "
            "weight files are not packed; get it again"
        )


def _why_unreadable(path: Path, error: Exception) -> CheckpointError:
    """What to tell of a weight file that a parser gave up: that it holds code, or is damaged."""
    # torch files are zips or bare pickles; what begins otherwise is neither
    with path.open("rb") as file:
        is_torch_file = file.read(2).startswith((b"PK", b"\x80"))
    if isinstance(error, UnpicklingError) and is_torch_file:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({one_line(asked[1])[:200]})" if asked else ""
        return CheckpointError(
            f"{path} holds more than plain tensors{what} and would execute code while being read, "
            "which was refused; get the weights as safetensors, or have their state dict saved "
            "alone"
        )

    lost = _cut_off(path)
    what = f", without {listed(lost)}" if lost else ""
    reason = one_line(f"{type(error).__name__}: {error}".split(". ")[0])[:200]
    return CheckpointError(
        f"{path} is unreadable: truncated{what}, or no weight file ({reason}); get it again"
    )


def _cut_off(path: Path) -> list[str]:
    """The tensors that a truncated safetensors file lacks, in the order of their bytes.

    Empty where not even that can be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        # the data begin after the length of the header and the header
        start = 8 + int.from_bytes(file.read(8), "little")
        if path.suffix != ".safetensors" or start > min(size, _LONGEST_HEADER):
            return []
        header = file.read(start - 8)

    # the header itself can be damaged
    try:
        entries = parse_json(header.decode("utf-8"))
        entries.pop("__metadata__", None)
        ends = {name: start + entry["data_offsets"][1] for name, entry in entries.items()}
        return sorted((name for name, end in ends.items() if end > size), key=ends.__getitem__)
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
