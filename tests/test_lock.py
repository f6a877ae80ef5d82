"""One run per output folder.

The second is refused with exit 2, and a killed one, with or without workers, blocks nobody.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel, cli
from mim_refiner_hf.publishing.hub import save_model_folder
from mim_refiner_hf.runtime.lock import LOCK, sole_run

REPOSITORY = Path(__file__).parents[1]


@contextmanager
def another_run(
    folder: Path, *, beside: bool = False, fork: bool = False
) -> Iterator[tuple[int, int]]:
    """The ids of a process that holds `folder` and, with `fork`, of a child that outlives it, as a
    data-loading worker may.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        with sole_run(folder, "--output_dir", beside=beside):
            worker = os.fork() if fork else 1
            if worker:
                os.write(writer, f"{worker}\n".encode())
            time.sleep(300)
    worker = int(os.read(reader, 20))
    os.close(reader)
    os.close(writer)
    try:
        yield process, worker
    finally:
        for killed in (process, worker)[: 1 + fork]:
            os.kill(killed, signal.SIGKILL)
        os.waitpid(process, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    processor = MimRefinerImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    folder = tmp_path_factory.mktemp("start") / "model"
    save_model_folder(
        folder, MimRefinerModel(MimRefinerConfig(**shape, image_size=16, patch_size=8)), processor
    )
    return str(folder)


def test_the_second_is_told_who_is_there(tmp_path: Path) -> None:
    with sole_run(tmp_path, "out"):
        with pytest.raises(
            ValueError,
            match=rf"out='{tmp_path}': another run writes there \(process {os.getpid()} on .+ "
            rf"since 20",
        ):
            sole_run(tmp_path, "out").__enter__()
        with sole_run(tmp_path / "other", "out"):
            assert (tmp_path / "other" / LOCK).is_file()
    assert list(tmp_path.iterdir()) == []
    with sole_run(tmp_path, "out"):
        pass


@pytest.mark.parametrize("fork", [False, True], ids=["alone", "with a worker that outlives it"])
def test_kill_9_leaves_nothing_that_blocks(tmp_path: Path, fork: bool) -> None:
    with another_run(tmp_path, fork=fork) as (process, worker):
        with pytest.raises(ValueError, match=f"process {process} on "):
            sole_run(tmp_path, "--output_dir").__enter__()
        os.kill(process, signal.SIGKILL)
        while (
            psutil.Process(process).status() != psutil.STATUS_ZOMBIE
        ):  # dead, and not yet waited for
            time.sleep(0.01)
        assert (tmp_path / LOCK).is_file() and (not fork or psutil.pid_exists(worker))
        with sole_run(tmp_path, "--output_dir"):
            assert str(os.getpid()) in (tmp_path / LOCK).read_text()
        assert list(tmp_path.iterdir()) == []


def test_only_the_main_process_of_a_job_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sole_run(tmp_path, "--output_dir"):
        for name, value in {"WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("RANK", "1")
        with sole_run(tmp_path, "--output_dir"):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(ValueError, match="another run"):
            sole_run(tmp_path, "--output_dir").__enter__()


def test_a_run_that_writes_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nonsense"), sole_run(tmp_path / "a/b", "output_dir"):
        raise ValueError("nonsense")
    assert list(tmp_path.iterdir()) == []
    with sole_run(tmp_path / "a/b", "output_dir"):
        (tmp_path / "a/b/result").touch()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["result"]
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(
            ValueError, match=rf"out='{folder}': {tmp_path / 'file'} is a file; name a folder"
        ):
            sole_run(folder, "out").__enter__()


@pytest.mark.parametrize(
    "command", ["refine", "pretrain", "embed", "evaluate", "cluster", "convert", "export"]
)
def test_commands_refuse_a_folder_in_use(
    command: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = {
        "refine": ["--model", model, "--dataset", "digits", "--output_dir", str(out)],
        "pretrain": ["--recipe", "pretrain-digits", "--output_dir", str(out)],
        "embed": [model, "--dataset", "digits", "--num_workers", "0", "--out", str(out)],
        "evaluate": [model, "--dataset", "digits", "--output_dir", str(out)],
        "cluster": ["digits", "--model", model, "--out", str(out)],
        "convert": [model, str(out)],
        "export": [model, str(out), "--to", "timm"],
    }[command]
    with another_run(out, beside=command not in ("refine", "embed")) as (process, _):
        before = sorted(tmp_path.rglob("*"))
        assert cli.main([command, *words]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert (
            line.startswith(("error: --out", "error: DESTINATION "))
            and f"another run writes there (process {process} on " in line
        )
        assert "wait for it, stop it, or name another folder" in line
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_killed_run_is_continued_by_the_same_command(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real run in its own process, killed between two checkpoints while its data-loading workers
    live.
    """
    flags = {
        "model": model,
        "dataset": "digits",
        "output_dir": tmp_path / "out",
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
        "max_steps": 60,
        "save_every": 5,
        "num_workers": 2,
        "eval_fraction": 0,
        "report_to": "none",
    }
    words = [
        "refine",
        *(word for name, value in flags.items() for word in (f"--{name}", str(value))),
    ]
    script = f"import sys; from mim_refiner_hf import cli; sys.exit(cli.main({words!r}))"
    run = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # minutes on a busy machine
        until = time.monotonic() + 600
        while (
            not list((tmp_path / "out").glob("checkpoints/step-*/manifest.json"))
            and time.monotonic() < until
        ):
            assert run.poll() is None
            time.sleep(0.05)
        # so that it cannot end before it is killed
        os.kill(run.pid, signal.SIGSTOP)
        assert cli.main(words) == 2
        assert f"another run writes there (process {run.pid} on " in capsys.readouterr().err
    finally:
        run.kill()
        run.wait()
    assert cli.main(words) == 0
    assert "resume  after step" in capsys.readouterr().out
    assert (tmp_path / "out/model/model.safetensors").is_file() and not (
        tmp_path / "out" / LOCK
    ).exists()


LAUNCHERS = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "MVAPICH": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
}
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher has said anything; what the test takes for one goes with it."""
    for name in (*TORCH, "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("names", LAUNCHERS.values(), ids=list(LAUNCHERS))
def test_processes_of_mpirun_are_one_job_or_refused(
    names: tuple[str, str, str],
    alone: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in zip(names, ("1", "2", "1"), strict=True):
        alone.setenv(name, value)
    # each would train by itself, and write what the other writes
    for command in ("refine", "pretrain", "embed", "evaluate"):
        assert cli.main([command, str(tmp_path)]) == 2
        assert "MASTER_ADDR and MASTER_PORT are not set" in capsys.readouterr().err
    with pytest.raises(ValueError, match="one of 2 processes"), sole_run(tmp_path / "out", "out"):
        pass

    alone.setenv("MASTER_ADDR", "localhost")
    alone.setenv("MASTER_PORT", "1234")
    assert cli.main(["cluster", str(tmp_path)]) == 2
    assert "runs in one process, not 2" in capsys.readouterr().err
    assert [os.environ[name] for name in TORCH] == ["1", "2", "1"]
    # the main process has it
    with sole_run(tmp_path / "out", "out"):
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [*LAUNCHERS.values(), TORCH], ids=[*LAUNCHERS, "torch"])
@pytest.mark.parametrize("count", ["1", "0", None])
def test_a_rank_without_others_is_no_reason_not_to_lock(
    names: tuple[str, str, str], count: str | None, alone: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone.setenv(names[0], "1")
    if count is not None:
        alone.setenv(names[1], count)
    with sole_run(tmp_path, "out"):
        assert (tmp_path / LOCK).is_file()


@pytest.mark.parametrize(
    "job",
    [
        {"RANK": "one", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "two"},
        {"PMI_RANK": "0", "PMI_SIZE": "9" * 400},
    ],
)
def test_a_launcher_that_makes_no_sense_is_one_line(
    job: dict[str, str], alone: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in ({"MASTER_ADDR": "localhost", "MASTER_PORT": "1"} | job).items():
        alone.setenv(name, value)
    assert cli.main(["refine", "digits"]) == 2
    error = capsys.readouterr().err
    assert (error.count("\n") == 1 and len(error) < 400 and "RANK" in error) or "_SIZE" in error
