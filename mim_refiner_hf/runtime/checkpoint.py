"""Checkpoints that are complete or absent: a folder of safetensors and JSON, with checksums.

    save_checkpoint(folder, step=500, tensors=tensors, state={"recipe": ...}, keep=2)  # all
    processes found = load_latest(folder)                         # the newest one that is intact
    check_tensors(found, model.state_dict())            # before anything is restored

Tensors and state are written first, then a manifest with their sha256, and last the folder gets its
name. Of sharded tensors every process writes its parts (`tensor_files.py`), and any number of
processes reads them back. Nothing is pickled.

A folder whose name starts with `.tmp-` was being written, or removed, when its run ended; the next
save clears it. A disk without room for the next checkpoint is noticed before a byte is written.
`tests/test_checkpoint_faults.py` fails or kills a save at each of its operations in turn.
"""

import errno
import itertools
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypedDict

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .distributed import gather_objects, rank, world_size
from .files import STAGED, CheckpointError, in_bytes, sha256_of, sync_to_disk
from .finite import NotFiniteTensorError, check_finite
from .held import LostFolderError, check_held, lost_folder
from .room import SaveError
from .sharding import own_parts, shard_like
from .strangers import parse_json
from .tensor_files import PLACES, TENSORS, Place, ShardedTensors, read_tensors, tensor_files
from .text import one_line
from .versions import FORMAT_VERSIONS, NewerFormatError, check_format
from .wording import setting

logger = logging.getLogger(__name__)

_STATE = "state.json"
_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
# bytes for headers, manifest and folder entries beside the tensors
_SMALL_FILES = 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and is intact.

    Attributes:
        step: number of finished steps.
        tensors: by name, on the CPU.
        state: what else was saved, JSON.
        path: the folder it was read from.
    """

    step: int
    tensors: Mapping[str, Tensor]
    state: dict[str, Any]
    path: Path

    @property
    def where(self) -> Path:
        """What to name when a tensor does not fit: its one file, or the folder of its many."""
        return self.path if isinstance(self.tensors, ShardedTensors) else self.path / TENSORS


# --- writing


def save_checkpoint(
    folder: Path, *, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step-<step>`, remove all but the newest `keep`, and return where it is.

    Every process of the job calls it. A checkpoint of the same step gets a second name
    (`step-<step>-2`) until the new one is in place.

    Args:
        folder: one that all processes see, on all machines.
        tensors: the names are the same in every process. The first process writes `state` and
            whatever is not sharded.

    Raises:
        SaveError: in every process, if it cannot be written (no room, read-only, failing disk);
            earlier checkpoints are intact then.
        NotFiniteTensorError: in every process, for weights that hold NaN or infinity.
        LostFolderError: in every process, when the folder was removed or taken by another run.
    """
    parts, places = own_parts(tensors)
    sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    writers = world_size() if sharded else 1
    names = tensor_files(writers)
    text = json.dumps(state)
    own_bytes = sum(part.nbytes for part in parts.values())
    needed = sum(gather_objects(own_bytes)) + len(text) + _SMALL_FILES

    is_first = rank() == 0
    writes = rank() < len(names)
    target = temporary = None
    remedy = (
        f"lower {setting('learning_rate')}, or {setting('mixed_precision', 'no')}; earlier "
        "checkpoints are intact"
    )
    _in_all(writes, lambda: check_finite(parts, f"the checkpoint after step {step}", remedy))
    try:
        begun = _in_all(is_first, lambda: _begin(folder, step, needed))
        target, temporary = begun[0]
        written = _in_all(writes, lambda: _write_part(temporary / names[rank()], parts, places))
        _in_all(is_first, lambda: _complete(temporary, target, step, text, dict(written)))
    except OSError as error:
        # its bytes may be what fills the disk
        if temporary is not None and is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        _raise_save_error(folder, step, target, error)

    if is_first:
        _remove_superseded(folder, target, keep)
    return target


def _in_all(takes_part: bool, work: Callable[[], Any]) -> list[Any]:
    """What `work` gives in the processes that take part; an error in all where it fails in one.

    Raises:
        LostFolderError: when the folder is no longer this run's.
        NotFiniteTensorError: as `work`.
        OSError: for what a disk or a library says.
    """
    failure: Exception | None = None
    done = None
    if takes_part:
        try:
            check_held()
            done = work()
        except (LostFolderError, NotFiniteTensorError) as error:
            failure = error
        # safetensors says "No space left on device" in a class of its own
        except (OSError, SafetensorError) as error:
            failure = lost_folder() or OSError(str(error))

    everywhere = gather_objects((takes_part, done, failure))
    failures = [error for _, _, error in everywhere if error is not None]
    if failures:
        raise failures[0]
    return [result for took_part, result, _ in everywhere if took_part]


def _begin(folder: Path, step: int, needed: int) -> tuple[Path, Path]:
    """The place of a new checkpoint, and an empty folder beside it to write it into."""
    target = _unused(folder / f"step-{step:08d}")
    temporary = folder / f"{STAGED}{target.name}"
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(f"{STAGED}*"):
        shutil.rmtree(left_over)

    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"it takes {in_bytes(needed)} and {in_bytes(free)} are free: "
            f"{in_bytes(needed - free)} short",
        )
    temporary.mkdir()
    return target, temporary


class _FileRecord(TypedDict):
    """What the manifest says of a file."""

    size: int
    sha256: str


def _write_part(
    path: Path, parts: dict[str, Tensor], places: dict[str, Place]
) -> tuple[str, _FileRecord]:
    """Write the tensors of this process; as `_on_disk`."""
    save_file(parts, path, {PLACES: json.dumps(places)} if places else None)
    return _on_disk(path)


def _on_disk(path: Path) -> tuple[str, _FileRecord]:
    """Bring a file to the disk; its name, and what the manifest says of it."""
    sync_to_disk(path)
    return path.name, {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _complete(
    temporary: Path, target: Path, step: int, text: str, files: dict[str, _FileRecord]
) -> None:
    """Write state and manifest beside the tensors, and give the folder its name."""
    (temporary / _STATE).write_text(text)
    version = {"format_version": FORMAT_VERSIONS["checkpoint"]}
    manifest = version | {"step": step, "files": files | dict([_on_disk(temporary / _STATE)])}
    (temporary / _MANIFEST).write_text(json.dumps(manifest))
    sync_to_disk(temporary / _MANIFEST)

    # the folder's entries reach the disk before its name does
    sync_to_disk(temporary)
    temporary.rename(target)
    sync_to_disk(target.parent)


def _raise_save_error(folder: Path, step: int, target: Path | None, error: OSError) -> NoReturn:
    """Say what is intact and how to go on."""
    intact = [path.name for path in _newest_first(folder) if path != target]
    state = f"{intact[0]} is intact" if intact else "there is no earlier one"
    raise SaveError(
        f"the checkpoint after step {step} could not be written to {folder} ({error}); {state}; "
        "make room, or the folder writable, and run the same command again"
    ) from error


def _remove_superseded(folder: Path, target: Path, keep: int) -> None:
    """Remove what `target` makes superfluous; a warning where that cannot be done.

    That is: the same step's earlier checkpoints, all but the newest `keep`, and later ones, which
    are broken, for this run would have gone on from there.
    """
    others = [path for path in _newest_first(folder) if path != target]
    step = _order(target)[0]
    earlier = [path for path in others if _order(path)[0] < step]
    kept = earlier[: keep - 1]

    try:
        for superseded in others:
            if superseded not in kept:
                # never half a checkpoint under its name
                discarded = folder / f"{STAGED}old-{superseded.name}"
                superseded.rename(discarded)
                shutil.rmtree(discarded)
    # nothing is lost by that; the next save tries again
    except OSError as error:
        logger.warning("a superseded checkpoint in %s could not be removed (%s)", folder, error)


# --- names


def _unused(path: Path) -> Path:
    """`path`, or the first of `path`-2, `path`-3, ... that does not exist."""
    if not path.exists():
        return path
    candidates = (path.with_name(f"{path.name}-{count}") for count in itertools.count(2))
    return next(candidate for candidate in candidates if not candidate.exists())


def _order(path: Path) -> tuple[int, int]:
    """(step, how many times it was written) of a checkpoint's name; (-1, 0) for another name."""
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 1)) if match else (-1, 0)


def _newest_first(folder: Path) -> list[Path]:
    paths = (path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))
    return sorted(paths, key=_order, reverse=True)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint by its content or its name; intact or not."""
    return (folder / _MANIFEST).is_file() or _NAME.fullmatch(folder.name) is not None


def size_of(checkpoint: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(path.stat().st_size for path in checkpoint.iterdir())


# --- reading


def verify(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's folder, in a few words; None for an intact one.

    Raises:
        NewerFormatError: for one of a newer version, which only that one can judge.
    """
    try:
        manifest = parse_json((checkpoint / _MANIFEST).read_text())
        check_format("checkpoint", dict(manifest).get("format_version"), checkpoint)
        step = manifest["step"]
        files = dict(manifest["files"])
        names = {_STATE, *tensor_files(len(files) - 1)}
        if set(files) != names or step != _order(checkpoint)[0]:
            return f"{_MANIFEST} is of another checkpoint"

        for name, expected in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"] or sha256_of(path) != expected["sha256"]:
                return f"{name} is not the file that was written"
    except NewerFormatError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"{_MANIFEST} cannot be read ({reason})"
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint whose every byte is the one that was written.

    Raises:
        CheckpointError: naming folder and file otherwise.
        NewerFormatError: as `verify`.
    """
    remedy = "remove it, and the run goes on from the one before"
    wrong = verify(path)
    if wrong is not None:
        raise CheckpointError(f"{path} is no intact checkpoint: {wrong}; {remedy}")
    try:
        state = parse_json((path / _STATE).read_text())
        return Checkpoint(_order(path)[0], read_tensors(path), dict(state), path)
    # a manifest that was rewritten to fit
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {remedy}") from error


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint; None where there is none. A warning names each broken one.

    Raises:
        CheckpointError: where all are broken: starting anew is not ours to decide.
        NewerFormatError: where the newest is of a newer version; it is not broken, so the run does
            not go on from an older one.
    """
    broken = []
    for path in _newest_first(folder):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            logger.warning("skipping a checkpoint: %s", one_line(error))
            broken.append(path.name)

    if broken:
        raise CheckpointError(
            f"none of the checkpoints in {folder} is intact ({', '.join(broken)}; the warnings "
            "above say why); remove that folder to start the run anew"
        )
    return None


def check_tensors(
    checkpoint: Checkpoint,
    expected: Mapping[str, Tensor],
    beside: tuple[str, ...] = ("optimizer.",),
) -> None:
    """Compare a checkpoint with the tensors that it is to fill: names, shapes, dtypes, no NaN.

    Args:
        beside: how names begin that are not compared. The optimiser's tensors come into being with
            the first step; `restore_optimizer` checks them.

    Raises:
        CheckpointError: naming file and tensor; nothing has been restored then.
    """
    found = checkpoint.tensors
    where = checkpoint.where
    remedy = (
        f"; it is of another model or version: name another {setting('output_dir')}, "
        "or remove this checkpoint"
    )

    expected = {name: value for name, value in expected.items() if not name.startswith(beside)}
    own = {name for name in found if not name.startswith(beside)}
    missing = sorted(expected.keys() - own)
    if missing:
        problem = f"{len(missing)} tensors are missing, first {missing[0]}"
        raise CheckpointError(f"{where}: {problem}{remedy}")
    unknown = sorted(own - expected.keys())
    if unknown:
        problem = f"{len(unknown)} tensors have no place, first {unknown[0]}"
        raise CheckpointError(f"{where}: {problem}{remedy}")

    for name, tensor in expected.items():
        was = _shape_and_dtype(found[name])
        has_to_be = _shape_and_dtype(tensor)
        if was != has_to_be:
            raise CheckpointError(f"{where}: {name} is {was} and has to be {has_to_be}{remedy}")

    for name, tensor in found.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(
                f"{where}: {name} holds values that are not finite; remove this checkpoint to go "
                "on from the one before"
            )


def place_tensors(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> None:
    """Put the checkpoint's tensors of a name that begins with `prefix` into a module."""
    own = {}
    for name, tensor in module.state_dict().items():
        own[name] = shard_like(checkpoint.tensors[prefix + name], tensor)
    module.load_state_dict(own)


def _shape_and_dtype(tensor: Tensor) -> str:
    """Such as "[96, 4] float32"."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
