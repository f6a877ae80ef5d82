"""Checkpoints that are complete or absent: safetensors and JSON in a folder, a manifest with sha256 last, then a rename.

    save_checkpoint(Path("out/checkpoints"), step=500, tensors=tensors, state={"recipe": ...}, keep=2)
    found = load_latest(Path("out/checkpoints"))               # the newest whose manifest verifies; skipped ones are named

Nothing is pickled. A folder whose name starts with `.tmp-` was being written when its run ended; it is removed by the next save.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: number of finished steps, named tensors on the CPU, and JSON state."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write JSON so that `path` holds the old or the new text, never half of it; names that are no valid Unicode survive."""
    temporary = path.with_name(f".{path.name}.tmp")
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # \udcff is JSON's own way to write that byte
    temporary.replace(path)


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_to_disk(path: Path) -> None:
    """Ask the operating system to bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_folder(folder: Path, marker: str, kind: str) -> Path:
    """`folder`, resolved, if it may be written: it is absent, empty or a `kind` of folder, which holds `marker`; else a ValueError."""
    folder = Path(folder).resolve()
    if folder.exists() and not (folder / marker).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a {kind} folder, so it will not be overwritten; name another one")
    return folder


@contextmanager
def staged_folder(folder: Path, check: Callable[[Path], Path]) -> Iterator[Path]:
    """A new empty folder beside `folder` that takes its place when the block ends well, and vanishes when it does not.

    What was in `folder` goes away only once the new one is in place.

    Raises:
        ValueError: when `folder` exists and holds what `check`, which resolves it, will not have replaced.
    """
    folder = check(folder)
    new, old = folder.with_name(f".tmp-{folder.name}"), folder.with_name(f".old-{folder.name}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def save_checkpoint(folder: Path, *, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-<step>` and remove all but the newest `keep`.

    Raises:
        OSError: if it cannot be written (disk full, read-only); earlier checkpoints are intact then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".tmp-*"):
        shutil.rmtree(left_over)
    target, temporary = folder / f"step-{step:08d}", folder / f".tmp-{step:08d}"
    temporary.mkdir()
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, temporary / "tensors.safetensors")
    (temporary / "state.json").write_text(json.dumps(state))
    names = ("tensors.safetensors", "state.json")
    files = {name: {"size": (temporary / name).stat().st_size, "sha256": sha256_of(temporary / name)} for name in names}
    (temporary / "manifest.json").write_text(json.dumps({"step": step, "files": files}))
    for name in (*names, "manifest.json"):
        sync_to_disk(temporary / name)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    sync_to_disk(folder)
    found = sorted(folder.glob("step-*"))
    later = [path for path in found if path > target]  # broken: this run would have gone on from there
    for old in [path for path in found if path <= target][:-keep] + later:
        shutil.rmtree(old)
    return target


def verify(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, in a few words; None if every file is as the manifest says."""
    manifest = checkpoint / "manifest.json"
    try:
        files = json.loads(manifest.read_text())["files"]
        for name, expected in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"] or sha256_of(path) != expected["sha256"]:
                return f"{name} is not the file that was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({error})"
    return None


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None; broken ones are skipped with a warning that names them."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if wrong := verify(path):
            logger.warning("skipping checkpoint %s: %s", path, wrong)
            continue
        state = json.loads((path / "state.json").read_text())
        return Checkpoint(int(path.name.removeprefix("step-")), load_file(path / "tensors.safetensors"), state)
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat named tensors, `optimizer.<parameter>.<key>`."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{key}": torch.as_tensor(value) for i, values in state.items() for key, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


__all__ = [
    "Checkpoint",
    "check_folder",
    "load_latest",
    "optimizer_tensors",
    "restore_optimizer",
    "save_checkpoint",
    "sha256_of",
    "staged_folder",
    "sync_to_disk",
    "verify",
    "write_json",
]
