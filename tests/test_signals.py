"""Runs that are told to stop, killed, or go wrong.

The same command ends with the same bits, and a failed step can be seen again.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos import POLITE
from golden_cases import SHARED
from small_runs import assert_identical, log_of
from torch import Tensor

from mim_refiner_hf import RefineRecipe, cli
from mim_refiner_hf.refinement.failure import NotFiniteError
from mim_refiner_hf.refinement.trainer import Trainer
from mim_refiner_hf.runs.replay import replay
from mim_refiner_hf.runs.run import run
from mim_refiner_hf.runtime.checkpoint import load_latest
from mim_refiner_hf.runtime.signals import SIGNALS, Interrupted, StopSignals

REPOSITORY = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("quick")


def signal_in(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process signal itself in the middle of `step` (0-based)."""
    update = Trainer.update

    def signalled(self: Trainer, now: int, batch: dict[str, Tensor]) -> Any:
        if now == step:
            os.kill(os.getpid(), number)
        return update(self, now, batch)

    monkeypatch.setattr(Trainer, "update", signalled)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: signal.Signals(number).name)
def test_a_signal_ends_the_run_after_a_checkpoint(
    number: int, recipe: Callable[..., RefineRecipe], capfd: pytest.CaptureFixture[str]
) -> None:
    """In a step that saves nothing by itself.

    What the handlers were before, they are afterwards.
    """
    asked, handlers = recipe("stopped", save_every=0), [signal.getsignal(each) for each in SIGNALS]
    with pytest.MonkeyPatch.context() as patched:
        signal_in(4, number, patched)
        with pytest.raises(
            Interrupted, match="stopped after step 5 of 8; the same command goes on"
        ) as raised:
            run(asked)
    assert raised.value.exit_code == POLITE[signal.Signals(number)]
    assert f"{signal.Signals(number).name}: this step is finished" in capfd.readouterr().err
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    found = load_latest(Path(asked.output_dir) / "checkpoints")
    assert found is not None and found.step == 5
    # how often it saves is free to change
    run(recipe("stopped"))
    whole = recipe("whole")
    run(whole)
    assert_identical(recipe("stopped"), whole)


def test_commands_end_with_the_codes_of_a_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, code in ((signal.SIGUSR1, 143), (signal.SIGINT, 130)):

        def stopped(number: int = number) -> None:
            raise Interrupted(number, "stopped after step 5 of 8")

        monkeypatch.setitem(cli.COMMANDS, "refine", lambda words, work=stopped: work)
        assert cli.main(["refine"]) == code
        assert capsys.readouterr().err == "stopped after step 5 of 8\n"


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: signal.Signals(number).name)
def test_a_signal_before_or_after_the_steps_ends_the_command_politely(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(each) for each in SIGNALS]
    work = functools.partial(os.kill, os.getpid(), number)
    monkeypatch.setitem(cli.COMMANDS, "evaluate", lambda words: work)
    assert cli.main(["evaluate"]) == POLITE[signal.Signals(number)]
    assert capsys.readouterr().err.startswith("interrupted; the same command starts again")
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


def test_the_second_signal_ends_the_process_at_once() -> None:
    if (child := os.fork()) == 0:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            if signals.agreed(torch.device("cpu")) == signal.SIGTERM:
                os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


@pytest.mark.slow
def test_killed_at_random_moments() -> None:
    """The short form of `python -m tests.chaos`, with data-loading workers.

    In a process that has not used threads, as it forks.
    """
    command = [
        sys.executable,
        "-m",
        "tests.chaos",
        "--kills",
        "2",
        "--signals",
        "1",
        "--workers",
        "1",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.startswith("3 of 3 runs ended with the same bits")


@pytest.mark.slow
def test_commands_killed_at_random_moments() -> None:
    """The short form of `python -m tests.command_chaos`."""
    commands = ["convert", "export-vit", "embed", "cluster", "refine"]
    if SHARED.is_dir():
        commands.append("push")
    words = ["-m", "tests.command_chaos", "--hits", "1", "--commands", *commands]
    done = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.startswith(
        f"{len(commands)} of {len(commands)} commands ended as if they had not been hit"
    )


# ---- a step that is not finite


@pytest.fixture
def exploding(recipe: Callable[..., RefineRecipe]) -> tuple[RefineRecipe, NotFiniteError]:
    """A run whose head weights leave the range of fp32 in the second of its steps."""
    asked = recipe("exploding", head_learning_rate=1e38)
    with pytest.raises(NotFiniteError) as raised:
        run(asked)
    return asked, raised.value


def test_a_failed_step_is_reported(exploding: tuple[RefineRecipe, NotFiniteError]) -> None:
    asked, error = exploding
    step = error.report.step
    assert f"step {step} is not finite" in str(
        error
    ) and f"mim-refiner replay {asked.output_dir}" in str(error)
    (path,) = (Path(asked.output_dir) / "failures").iterdir()
    assert path.name == f"step-{step:08d}.json" and json.loads(path.read_text())["step"] == step
    assert len(error.report.samples) == 32 and error.report.bad_gradients > 0
    assert set(error.report.head_losses) == {"block1", "output"}
    assert all(line["step"] <= step for line in log_of(asked))


def test_a_failed_step_is_replayed(
    exploding: tuple[RefineRecipe, NotFiniteError], capsys: pytest.CaptureFixture[str]
) -> None:
    asked, error = exploding
    before = {
        path: path.stat().st_mtime_ns
        for path in Path(asked.output_dir).rglob("*")
        if path.is_file()
    }
    assert cli.main(["replay", asked.output_dir]) == 0
    said = capsys.readouterr().out
    assert f"step {error.report.step} is not finite" in said
    assert re.search(
        r"first part with an output that is not finite: heads\S* \(\w+\): (nan|inf), from inputs "
        r"of at most",
        said,
    )
    assert {
        path: path.stat().st_mtime_ns
        for path in Path(asked.output_dir).rglob("*")
        if path.is_file()
    } == before
    assert "went well this time" in replay(Path(asked.output_dir), step=0)


def test_what_cannot_be_replayed(recipe: Callable[..., RefineRecipe], tmp_path: Path) -> None:
    assert cli.main(["replay", str(tmp_path / "nothing")]) == 2
    asked = recipe("whole")
    run(asked)
    with pytest.raises(FileNotFoundError, match="no report of a failed step; name one with step"):
        replay(Path(asked.output_dir))
    with pytest.raises(ValueError, match="step=3: can be replayed from the newest checkpoint on"):
        replay(Path(asked.output_dir), step=3)
