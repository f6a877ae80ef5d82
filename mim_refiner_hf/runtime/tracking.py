"""Where a run's numbers go: `log.jsonl` always, TensorBoard, W&B or Trackio by `--report_to`, all through Accelerate.

accelerator = Accelerator(log_with=trackers(Path("out"), ["tensorboard"], start_step=0), project_dir="out")
accelerator.init_trackers("mim-refiner")
accelerator.log({"loss": 1.2, "block22/loss": 0.6}, step=10)
"""

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

logger = logging.getLogger(__name__)


class JsonlTracker(GeneralTracker):
    """One JSON object per line: `step` and what was logged. A resumed run drops the lines of steps that it does again."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path, start_step: int) -> None:
        super().__init__()
        self.path, self.start_step = path, start_step

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    @on_main_process
    def start(self) -> None:
        """Begin the file, or keep what lies before the start step."""
        kept = []
        if self.start_step and self.path.is_file():
            lines = self.path.read_text().splitlines(keepends=True)
            whole = [
                line for line in lines if line.endswith("}\n")
            ]  # a full disk can leave half a line
            kept = [line for line in whole if json.loads(line)["step"] <= self.start_step]
        self.path.write_text("".join(kept))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def trackers(output_dir: Path, names: list[str], start_step: int) -> list[Any]:
    """The JSONL tracker and the named ones that are installed; a missing one is said, not fatal."""
    found: list[Any] = [JsonlTracker(output_dir / "log.jsonl", start_step)]
    for name in names:
        if find_spec(name) is None:
            logger.warning(
                "--report_to %s: not installed, so not used (pip install %s)", name, name
            )
        else:
            found.append(name)
    return found


__all__ = ["JsonlTracker", "trackers"]
