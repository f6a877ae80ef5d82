"""Where a run's numbers go: `log.jsonl` always, TensorBoard, W&B or Trackio by `--report_to`.

logs = trackers(Path("out"), ["tensorboard"], start_step=0)
accelerator = Accelerator(log_with=logs, project_dir="out")
accelerator.init_trackers("mim-refiner")
accelerator.log({"loss": 1.2, "block22/loss": 0.6}, step=10)
"""

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

from .files import write_text

logger = logging.getLogger(__name__)


class JsonlTracker(GeneralTracker):
    """One JSON object per line: `step` and what was logged.

    Args:
        path: of the file.
        start_step: where the run goes on; the lines of steps that it does again are dropped.
    """

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path, start_step: int) -> None:
        super().__init__()
        self.path = path
        self.start_step = start_step

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    @on_main_process
    def start(self) -> None:
        """Begin the file, or keep what lies before the start step."""
        kept = []
        if self.start_step and self.path.is_file():
            for line in self.path.read_text().splitlines(keepends=True):
                # a full disk can leave half a line
                if line.endswith("}\n") and json.loads(line)["step"] <= self.start_step:
                    kept.append(line)
        write_text(self.path, "".join(kept))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def trackers(output_dir: Path, names: list[str], start_step: int) -> list[Any]:
    """The JSONL tracker and the named ones that are installed; a missing one is said, not fatal."""
    found: list[Any] = [JsonlTracker(output_dir / "log.jsonl", start_step)]
    for name in names:
        if find_spec(name) is not None:
            found.append(name)
            continue
        message = "--report_to %s: not installed, so not used (pip install %s)"
        logger.warning(message, name, name)
    return found


__all__ = ["JsonlTracker", "trackers"]
