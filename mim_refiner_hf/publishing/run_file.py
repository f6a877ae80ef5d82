"""`metrics.json` of a run, which `runs/run_record.py` writes and the card reads.

run = read_run(Path("out"))
run["verdict"], run["after"], run["dataset"]["images"]
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ..evaluation.evidence import JudgedChange

RUN_FILE = "metrics.json"

Metrics = Mapping[str, Any]
"""Scores by name, as `evaluate_encoder` gives them: numbers, and lists such as `knn_per_block`."""


class RunDataset(TypedDict):
    """What a run was trained and measured on."""

    name: str
    config: NotRequired[str | None]
    split: NotRequired[str | None]
    images: NotRequired[int | None]
    fingerprint: NotRequired[str | None]
    eval_name: NotRequired[str | None]
    eval_images: NotRequired[int | None]
    num_classes: NotRequired[int]


class Judgement(TypedDict):
    """Whether a result is better than its start, and by which numbers (`runs/verdict.py`)."""

    reason: str
    photos: str
    ships: str
    weights_change: float | None
    before: dict[str, float] | None
    after: dict[str, float] | None
    changes: dict[str, JudgedChange]


class RunRecord(TypedDict):
    """Everything that a run leaves in numbers, and what is needed to get them again.

    `before` and `after` are scores of the starting weights and of the result, None where nothing
    was measured; `pixels` those of the images without an encoder, of a run that pre-trained its
    start.
    """

    before: Metrics | None
    after: Metrics | None
    pixels: dict[str, float] | None
    verdict: str
    judgement: Judgement
    seed: int
    command: str
    seconds: float
    stage_seconds: dict[str, float]
    versions: dict[str, str]
    hardware: str
    starting_model: str
    licence: dict[str, str]
    dataset: RunDataset
    protocol: dict[str, str]
    recipe: Mapping[str, object]
    broken_images: NotRequired[int]
    head_choice: NotRequired[Mapping[str, object]]


def read_run(run_folder: Path) -> Mapping[str, Any]:
    """What is in a run's folder, which need not be a whole `RunRecord`.

    Raises:
        FileNotFoundError: when the run has not written it.
        ValueError: when it is not JSON.
    """
    path = Path(run_folder) / RUN_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the output folder of a finished run")
    try:
        run: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); the run has to be evaluated again"
        ) from error
    return run
