"""Where a run's numbers go: `log.jsonl` always, TensorBoard, W&B or Trackio by `report_to`.

logs = trackers(Path("out"), ["tensorboard"], start_step=0, callbacks=[print])
accelerator = Accelerator(log_with=logs, project_dir="out")
accelerator.init_trackers("mim-refiner")
accelerator.log({"loss": 1.2, "block22/loss": 0.6}, step=10)

A callback is called with (step, values) for every line of log.jsonl, by the process that writes it.
"""

import json
import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

from .files import write_text
from .held import check_held
from .text import one_line
from .wording import setting

logger = logging.getLogger(__name__)

LogCallback = Callable[[int | None, dict[str, Any]], Any]
"""What is called with (step, values) for every line of the log."""


class JsonlTracker(GeneralTracker):
    """One JSON object per line: `step` and what was logged.

    Args:
        path: of the file.
        start_step: where the run goes on; the lines of steps that it does again are dropped.
        callbacks: called with step and values after each line.
    """

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path, start_step: int, callbacks: Sequence[LogCallback] = ()) -> None:
        super().__init__()
        self.path = path
        self.start_step = start_step
        self.callbacks = callbacks

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    @on_main_process
    def start(self) -> None:
        """Begin the file, or keep what lies before the start step.

        Lines that are none of the log's go to `log.jsonl.damaged`: a power cut or a full disk is no
        reason to lose a run.
        """
        kept: list[str] = []
        damaged: list[bytes] = []
        if self.start_step and self.path.is_file():
            for line in self.path.read_bytes().splitlines():
                step = _step_of(line)
                if step is None:
                    damaged.append(line)
                elif step <= self.start_step:
                    kept.append(line.decode() + "\n")

        if damaged:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            with aside.open("ab") as file:
                file.write(b"\n".join(damaged) + b"\n")
            logger.warning(
                "%s: %d damaged lines are set aside in %s; the log lacks their steps",
                one_line(self.path),
                len(damaged),
                aside.name,
            )
        if self.start_step and not kept:
            logger.warning("%s lacks the steps up to %d", one_line(self.path), self.start_step)
        write_text(self.path, "".join(kept))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Append one line, and tell the callbacks; LostFolderError as `check_held`."""
        check_held()
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for callback in self.callbacks:
            callback(step, dict(values))


def _step_of(line: bytes) -> int | None:
    """The step of a line of the log; None of anything else."""
    try:
        found = json.loads(line)
    # no text, or no JSON
    except ValueError:
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return step if isinstance(step, int) else None


def installed_loggers(names: Sequence[str]) -> list[str]:
    """Those of the loggers that are installed; a missing one is said, not fatal."""
    found = []
    for name in names:
        if find_spec(name) is not None:
            found.append(name)
            continue
        asked = setting("report_to", name)
        logger.warning("%s: not installed, so not used (pip install %s)", asked, name)
    return found


def trackers(
    output_dir: Path, names: list[str], start_step: int, callbacks: Sequence[LogCallback] = ()
) -> list[Any]:
    """The JSONL tracker and the named ones that are installed."""
    own = JsonlTracker(output_dir / "log.jsonl", start_step, callbacks)
    return [own, *installed_loggers(names)]
