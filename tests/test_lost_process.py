"""A process of a job is killed or hangs: the others end in time, with one line that names it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_store import make_encoder, make_processor

from mim_refiner_hf.publishing.hub import save_model_folder
from mim_refiner_hf.runtime.distributed import (
    TIMEOUT,
    LostProcessError,
    lost_processes_named,
    patience,
)

REPOSITORY = Path(__file__).parents[1]
SECONDS = 4
# what the processes do, and then end well; each writes its number when it is in the midst of it
WORKER = """
import os, sys, time
from pathlib import Path
import torch
from mim_refiner_hf.cli import main
torch.set_num_threads(1)
rank, folder, words = os.environ["RANK"], Path(sys.argv[1]), sys.argv[2:]
if words[0] == "refine":
    from mim_refiner_hf.refinement.trainer import Trainer
    update = Trainer.update
    def slowly(self, step, batch):
        (folder / f"busy-{rank}").touch()
        time.sleep(0.05)
        return update(self, step, batch)
    Trainer.update = slowly
else:
    from mim_refiner_hf.evaluation import embed
    encode_shard = embed.encode_shard
    def slowly(*arguments):
        (folder / f"busy-{rank}").touch()
        time.sleep(0.5)
        return encode_shard(*arguments)
    embed.encode_shard = slowly
sys.exit(main(words))
"""
REFINE = {
    "batch_size": 16,
    "queue_size": 32,
    "topk": 4,
    "projector_dim": 8,
    "predictor_dim": 8,
    "embedding_dim": 8,
    "local_views": 0,
    "head_epochs": 1,
    "epochs": 1,
    "warmup_epochs": 0,
    "max_steps": 500,
    "num_workers": 0,
    "eval_fraction": 0,
    "report_to": "none",
}


def start(count: int, folder: Path, words: list[str]) -> list[subprocess.Popen[str]]:
    """A job of processes as torchrun and mpirun start them, without anybody who watches them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), TIMEOUT: str(SECONDS)}
    job |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    for number in range(count):
        own = {"RANK": str(number), "LOCAL_RANK": str(number), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", WORKER, str(folder), *words]
        processes.append(
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=os.environ | job | own,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "number", "victim"),
    [
        ("refine", signal.SIGKILL, 0),
        ("refine", signal.SIGSTOP, 1),
        ("embed", signal.SIGKILL, 1),
        ("embed", signal.SIGSTOP, 0),
    ],
)
def test_the_others_end_in_time_with_one_line(
    command: str, number: signal.Signals, victim: int, tmp_path: Path
) -> None:
    save_model_folder(tmp_path / "model", make_encoder(), make_processor())
    words = [command, "--model", str(tmp_path / "model"), "--dataset", "digits"]
    if command == "refine":
        words += ["--output_dir", str(tmp_path / "out")]
        words += [word for name, value in REFINE.items() for word in (f"--{name}", str(value))]
    else:
        words += ["--out", str(tmp_path / "out"), "--shard_size", "100", "--num_workers", "0"]

    processes = start(2, tmp_path, words)
    survivor = processes[1 - victim]
    try:
        until = time.monotonic() + 120
        while len(list(tmp_path.glob("busy-*"))) < 2:
            assert time.monotonic() < until
            assert survivor.poll() is None, survivor.stderr and survivor.stderr.read()
            time.sleep(0.05)
        os.kill(processes[victim].pid, number)
        began = time.monotonic()
        _, said = survivor.communicate(timeout=90)
        took = time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
            process.wait()

    assert survivor.returncode == 1, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said, said
    waited = "ended or lost its connection" if number == signal.SIGKILL else f"for {SECONDS} s"
    assert f"process {victim} of 2" in lines[0] and waited in lines[0], lines
    # the work of both, of which one has half; then the wait, and the roll call
    assert took < 60


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:2",
        "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation",
        "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error",
        "Timed out after 5 seconds waiting for clients. 1/2 clients joined.",
    ],
)
def test_what_torch_says_of_others_is_translated(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match=re.escape(text)), lost_processes_named():
        # alone, it is about something else
        raise RuntimeError(text)
    monkeypatch.setenv("WORLD_SIZE", "2")
    translated = pytest.raises(LostProcessError, match="did not find each other within 1800 s")
    with translated, lost_processes_named():
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="of ours"), lost_processes_named():
        raise RuntimeError("a fault of ours")


@pytest.mark.parametrize("stated", ["0", "-3", "soon", "1e3", "9" * 60, ""])
def test_a_wait_that_is_no_number_is_refused(stated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT, stated)
    with pytest.raises(ValueError, match=f"{TIMEOUT}=.{{0,50}} must be a whole number of seconds"):
        patience()
