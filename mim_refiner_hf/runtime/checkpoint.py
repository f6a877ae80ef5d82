"""Checkpoints that are complete or absent: safetensors and JSON in a folder, a manifest with sha256 last, then a rename.

    save_checkpoint(Path("out/checkpoints"), step=500, tensors=tensors, state={"recipe": ...}, keep=2)    # in every process
    found = load_latest(Path("out/checkpoints"))               # the newest whose manifest verifies; skipped ones are named
    check_tensors(found, model.state_dict())                   # before anything is restored

Of sharded tensors every process writes its parts (`tensor_files.py`), and any number of processes reads them back.
Nothing is pickled. A folder whose name starts with `.tmp-` was being written, or removed, when its run ended; the next save clears
it. A disk without room for the next checkpoint is noticed before a byte is written; `tests/test_checkpoint_faults.py` fails or kills
a save at each of its operations in turn.
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
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from .distributed import gather_objects, rank, world_size
from .files import STAGED, CheckpointError, in_bytes, sha256_of, sync_to_disk
from .sharding import own_parts
from .tensor_files import PLACES, TENSORS, ShardedTensors, read_tensors, tensor_files

logger = logging.getLogger(__name__)

STATE, MANIFEST = "state.json", "manifest.json"
NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
MANY_SMALL_FILES = 2**20  # bytes for headers, manifest and folder entries beside the tensors


class SaveError(OSError):
    """A checkpoint could not be written; those before it are intact, and the message says how to go on."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: number of finished steps, named tensors on the CPU, JSON state, and where it was read from."""

    step: int
    tensors: Mapping[str, Tensor]
    state: dict[str, Any]
    path: Path

    @property
    def where(self) -> Path:
        """What to name when a tensor does not fit: its one file, or the folder of its many."""
        return self.path if isinstance(self.tensors, ShardedTensors) else self.path / TENSORS


def save_checkpoint(
    folder: Path, *, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step-<step>` and remove all but the newest `keep`; returns where it is. Every process of the job calls it.

    The order is what makes it complete or absent: tensors and state reach the disk, then the manifest, then the folder's entries,
    then the new name. A checkpoint of the same step gets a second name (`step-<step>-2`) until the new one is in place.

    Args:
        folder: one that all processes see, on all machines.
        tensors: names are the same in every process; what is not sharded, and `state`, the first one writes.

    Raises:
        SaveError: in every process, if it cannot be written (no space for it, disk full, read-only, failing disk); earlier ones are
            intact then.
    """
    parts, places = own_parts(tensors)
    names = tensor_files(
        world_size() if any(isinstance(tensor, DTensor) for tensor in tensors.values()) else 1
    )
    text, target, temporary = json.dumps(state), None, None
    needed = (
        sum(gather_objects(sum(part.nbytes for part in parts.values())))
        + len(text)
        + MANY_SMALL_FILES
    )
    try:
        target, temporary = _in_all(lambda: _begin(folder, step, needed) if rank() == 0 else None)[
            0
        ]
        files = dict(
            _in_all(
                lambda: (
                    _write_part(temporary / names[rank()], parts, places)
                    if rank() < len(names)
                    else None
                )
            )
        )
        _in_all(lambda: _complete(temporary, target, step, text, files) if rank() == 0 else None)
    except OSError as error:
        if temporary is not None and rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # its bytes may be what fills the disk
        intact = [path.name for path in _newest_first(folder) if path != target]
        raise SaveError(
            f"the checkpoint after step {step} could not be written to {folder} ({error}); "
            f"{f'{intact[0]} is intact' if intact else 'there is no earlier one'}; make room, or the folder writable, and run the same "
            "command again"
        ) from error
    if rank() == 0:
        _remove_superseded(folder, target, keep)
    return target


def _in_all(work: Callable[[], Any]) -> list[Any]:
    """What `work` gives in the processes that have something to do, in their order; OSError in all where it fails in one."""
    failure = done = None
    try:
        done = work()
    except (
        OSError,
        SafetensorError,
    ) as error:  # safetensors says "I/O error: No space left on device" in a class of its own
        failure = str(error)
    every = gather_objects((done, failure))
    if failed := [message for _, message in every if message is not None]:
        raise OSError(failed[0])
    return [each for each, _ in every if each is not None]


def _begin(folder: Path, step: int, needed: int) -> tuple[Path, Path]:
    """The place of a new checkpoint, and an empty folder beside it to write it into."""
    target = _unused(folder / f"step-{step:08d}")
    temporary = folder / f"{STAGED}{target.name}"
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(f"{STAGED}*"):
        shutil.rmtree(left_over)
    _check_space(folder, needed)
    temporary.mkdir()
    return target, temporary


def _write_part(
    path: Path, parts: dict[str, Tensor], places: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    save_file(parts, path, {PLACES: json.dumps(places)} if places else None)
    return _on_disk(path)


def _on_disk(path: Path) -> tuple[str, dict[str, Any]]:
    """Bring a file to the disk; its name, and what the manifest says of it."""
    sync_to_disk(path)
    return path.name, {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _complete(temporary: Path, target: Path, step: int, text: str, files: dict[str, Any]) -> None:
    """State, manifest and name of a checkpoint whose tensors are on the disk."""
    (temporary / STATE).write_text(text)
    manifest = {"step": step, "files": files | dict([_on_disk(temporary / STATE)])}
    (temporary / MANIFEST).write_text(json.dumps(manifest))
    sync_to_disk(temporary / MANIFEST)
    sync_to_disk(temporary)
    temporary.rename(target)
    sync_to_disk(target.parent)


def _remove_superseded(folder: Path, target: Path, keep: int) -> None:
    """Remove what `target` makes superfluous; a warning where that cannot be done."""
    try:
        for superseded in _superseded(folder, target, keep):
            superseded.rename(
                discarded := folder / f"{STAGED}old-{superseded.name}"
            )  # never half a checkpoint under its name
            shutil.rmtree(discarded)
    except OSError as error:  # nothing is lost by that; the next save tries again
        logger.warning("a superseded checkpoint in %s could not be removed (%s)", folder, error)


def size_of(checkpoint: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(path.stat().st_size for path in checkpoint.iterdir())


def _check_space(folder: Path, needed: int) -> None:
    """OSError where the disk has not the room, before a byte of it is taken."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"it takes {in_bytes(needed)} and {in_bytes(free)} are free: {in_bytes(needed - free)} short",
        )


def _unused(path: Path) -> Path:
    """`path`, or the first of `path`-2, `path`-3, ... that does not exist."""
    names = itertools.chain(
        [path], (path.with_name(f"{path.name}-{count}") for count in itertools.count(2))
    )
    return next(name for name in names if not name.exists())


def _order(path: Path) -> tuple[int, int]:
    """(step, how many times it was written) of a checkpoint's name; (-1, 0) for another name."""
    match = NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 1)) if match else (-1, 0)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(
        (path for path in folder.glob("step-*") if NAME.fullmatch(path.name)),
        key=_order,
        reverse=True,
    )


def _superseded(folder: Path, target: Path, keep: int) -> list[Path]:
    """The checkpoints to remove now that `target` is written: the same step's earlier ones, all but `keep`, and later ones, which
    are broken: this run would have gone on from there."""
    found = _newest_first(folder)
    step = _order(target)[0]
    earlier = [path for path in found if _order(path)[0] < step]
    return [path for path in found if path != target and path not in earlier[: keep - 1]]


def verify(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, in a few words; None if every file is as the manifest says."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        step, files = manifest["step"], dict(manifest["files"])
        expected = {STATE, *tensor_files(len(files) - 1)}
        if set(files) != expected or step != _order(checkpoint)[0]:
            return f"{MANIFEST} is of another checkpoint"
        for name, expected in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"] or sha256_of(path) != expected["sha256"]:
                return f"{name} is not the file that was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint whose every byte is the one that was written.

    Raises:
        CheckpointError: naming folder and file otherwise.
    """
    if wrong := verify(path):
        raise CheckpointError(
            f"{path} is no intact checkpoint: {wrong}; remove it, and the run goes on from the one before"
        )
    try:
        state = json.loads((path / STATE).read_text())
        return Checkpoint(_order(path)[0], read_tensors(path), dict(state), path)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        SafetensorError,
    ) as error:  # a manifest that was rewritten to fit
        raise CheckpointError(
            f"{path} cannot be read ({error}); remove it, and the run goes on from the one before"
        ) from error


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None where there is none; broken ones are skipped with a warning that names them.

    Raises:
        CheckpointError: where there are checkpoints and all are broken: starting anew is not ours to decide.
    """
    broken = []
    for path in _newest_first(folder):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            logger.warning("skipping a checkpoint: %s", error)
            broken.append(path.name)
    if broken:
        raise CheckpointError(
            f"none of the checkpoints in {folder} is intact ({', '.join(broken)}; the warnings above say why); remove that folder to "
            "start the run anew"
        )
    return None


def check_tensors(checkpoint: Checkpoint, expected: Mapping[str, Tensor]) -> None:
    """Compare the tensors of a checkpoint with those they are to fill: names, shapes, dtypes, no NaN; of the optimiser's, which
    come into being with the first step, `optimizer.<parameter>.` must be complete.

    Raises:
        CheckpointError: naming file and tensor; nothing has been restored then.
    """
    found = checkpoint.tensors
    where = f"{checkpoint.where}: "
    remedy = (
        "; it is of another model or version: name another --output_dir, or remove this checkpoint"
    )
    own = {name for name in found if not name.startswith("optimizer.")}
    if missing := sorted(expected.keys() - own):
        raise CheckpointError(
            f"{where}{len(missing)} tensors are missing, first {missing[0]}{remedy}"
        )
    if unknown := sorted(own - expected.keys()):
        raise CheckpointError(
            f"{where}{len(unknown)} tensors have no place, first {unknown[0]}{remedy}"
        )
    for name, tensor in expected.items():
        there = found[name]
        if (there.shape, there.dtype) != (tensor.shape, tensor.dtype):
            was, is_ = (
                f"{list(each.shape)} {str(each.dtype).removeprefix('torch.')}"
                for each in (there, tensor)
            )
            raise CheckpointError(f"{where}{name} is {was} and has to be {is_}{remedy}")
    for name, tensor in found.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(
                f"{where}{name} holds values that are not finite; remove this checkpoint to go on from the one before"
            )


__all__ = [
    "Checkpoint",
    "SaveError",
    "check_tensors",
    "load_latest",
    "read_checkpoint",
    "save_checkpoint",
    "size_of",
    "verify",
]
