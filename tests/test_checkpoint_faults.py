"""A save that fails, or is killed, at each of its operations in turn.

The newest valid checkpoint stays, and the next save is clean.

The operations are those that change the disk. Each one is, on its n-th call, refused with an error
of the operating system, or the last thing that its process did: the process is a fork that ends
there, with no chance to tidy up.
"""

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from mim_refiner_hf.runtime import checkpoint as checkpointing
from mim_refiner_hf.runtime.checkpoint import (
    SaveError,
    load_latest,
    read_checkpoint,
    save_checkpoint,
)
from mim_refiner_hf.runtime.files import write_json

OPERATIONS: dict[str, tuple[Any, str]] = {
    "mkdir": (os, "mkdir"),
    "write tensors": (checkpointing, "save_file"),
    # for writing: pathlib's `write_text`
    "open": (io, "open"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "remove a file": (os, "unlink"),
    "remove a folder": (os, "rmdir"),
}
ERRORS = {"disk full": errno.ENOSPC, "failing disk": errno.EIO, "read-only": errno.EROFS}
KILLED = 9
START = {"nothing": (), "one before": (10,), "two before": (10, 20), "the same step": (10, 30)}


def save(folder: Path, step: int) -> Path:
    tensors = {"weight": torch.full((64, 3), float(step)), "count": torch.tensor(step)}
    return save_checkpoint(folder, step=step, tensors=tensors, state={"step": step}, keep=1)


@contextmanager
def fault(operation: str, call: int, happens: Callable[[], None]) -> Iterator[list[str]]:
    """`happens` instead of the n-th call of an operation.

    What is written to a file gets half way. The list tells whether it did.
    """
    owner, name = OPERATIONS[operation]
    original, calls, struck = getattr(owner, name), [0], []

    def replaced(*arguments: Any, **settings: Any) -> Any:
        writes = operation != "open" or str((*arguments, "r")[1]).startswith("w")
        calls[0] += writes
        if not writes or calls[0] != call:
            return original(*arguments, **settings)
        struck.append(name)
        if operation == "write tensors":
            original(*arguments, **settings)
            arguments[1].write_bytes(arguments[1].read_bytes()[:200])
        if operation == "open":
            with original(*arguments, **settings) as file:
                file.write('{"st')
        return happens()

    setattr(owner, name, replaced)
    try:
        yield struck
    finally:
        setattr(owner, name, original)


def killed(folder: Path, operation: str, call: int) -> bool:
    """Save step 30 in a process that ends at that operation; False if it got through."""
    child = os.fork()
    if not child:
        with fault(operation, call, lambda: os._exit(KILLED)):
            save(folder, 30)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


def prepared(folder: Path, before: tuple[int, ...]) -> int | None:
    """A folder with checkpoints of these steps, all kept; the newest of them."""
    for step in before:
        path = save(folder / "elsewhere", step)
        shutil.move(path, folder / path.name)
    shutil.rmtree(folder / "elsewhere", ignore_errors=True)
    return max(before, default=None)


def assert_goes_on(folder: Path, newest: int | None) -> None:
    """The newest valid checkpoint is the one before, or the new one.

    The next save leaves itself and nothing else.
    """
    found = load_latest(folder)
    assert (found and found.step) in ({newest, 30} if newest else {None, 30})
    if found is not None:
        assert torch.equal(found.tensors["weight"], torch.full((64, 3), float(found.step)))
    last = save(folder, 40)
    assert list(folder.iterdir()) == [last] and read_checkpoint(last).state == {"step": 40}


@pytest.mark.slow
@pytest.mark.parametrize("before", START)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_any_operation(operation: str, before: str, tmp_path: Path) -> None:
    calls = 0
    while True:
        folder = tmp_path / f"{calls}"
        newest = prepared(folder, START[before])
        if not killed(folder, operation, calls + 1):
            break
        assert_goes_on(folder, newest)
        calls += 1
    expected = {
        "mkdir": 1,
        "write tensors": 1,
        "open": 2,
        "fsync": 5,
        "rename": 1,
        "remove a file": 0,
        "remove a folder": 0,
    }
    assert calls >= expected[operation] + (operation.startswith("remove") and before != "nothing")


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_refused_at_any_operation(operation: str, error: str, tmp_path: Path) -> None:
    def refuse() -> None:
        if operation == "write tensors":  # as safetensors 0.8 says it
            raise SafetensorError(
                f"Error while serializing: I/O error: {os.strerror(ERRORS[error])} (os error "
                f"{ERRORS[error]})"
            )
        raise OSError(ERRORS[error], os.strerror(ERRORS[error]))

    calls = 0
    while True:
        folder = tmp_path / f"{calls}"
        newest = prepared(folder, (10, 20))
        with fault(operation, calls + 1, refuse) as struck:
            try:
                save(folder, 30)
            except SaveError as raised:
                assert os.strerror(ERRORS[error]) in str(raised) and "\n" not in str(raised)
                assert f"after step 30 could not be written to {folder}" in str(raised)
                assert "step-000000" in str(raised) and "run the same command again" in str(raised)
            else:
                # the folder was there already, or all is written and an old checkpoint could not
                # be removed
                assert (
                    not struck or operation in ("mkdir", "rename") or operation.startswith("remove")
                )
        if not struck:
            break
        # its bytes may be what fills the disk
        assert not list(folder.glob(".tmp-step*"))
        assert_goes_on(folder, newest)
        calls += 1
    assert calls >= 1


def test_no_space_is_noticed_before_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10)
    monkeypatch.setattr(checkpointing, "save_file", lambda *_: pytest.fail("began to write"))
    monkeypatch.setattr(
        checkpointing.shutil,
        "disk_usage",
        lambda _: shutil._ntuple_diskusage(2**40, 2**40 - 2**19, 2**19),
    )
    with pytest.raises(
        SaveError,
        match=r"takes 1\.0 MiB and 512\.0 KiB are free: .* short.*step-00000010 is intact; make "
        r"room",
    ):
        save(tmp_path, 20)
    found = load_latest(tmp_path)
    assert found is not None and found.step == 10 and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        SaveError, match="there is no earlier one; make room, or the folder writable"
    ):
        save(tmp_path / "file" / "checkpoints", 1)


@pytest.mark.parametrize("operation", ["open", "fsync", "rename"])
def test_json_is_the_old_or_the_new(operation: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"old": 1})

    def refuse() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    name = "replace" if operation == "rename" else OPERATIONS[operation][1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(OPERATIONS, operation, (OPERATIONS[operation][0], name))
        with fault(operation, 1, refuse) as struck, pytest.raises(OSError, match="No space"):
            write_json(path, {"new": 2})
    assert (
        struck and path.read_text() == '{\n  "old": 1\n}\n' and list(tmp_path.iterdir()) == [path]
    )
