"""`metrics.json` of a run, which `runs/run_record.py` writes and the card reads.

run = read_run(Path("out"))
run["verdict"], run["after"], run["dataset"]["images"]
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ..evaluation.evidence import JudgedChange
from ..runtime.text import one_line

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


class ErasedField(TypedDict):
    """How well a linear probe tells the values of a field, before it was erased and after.

    By logistic regression, in images that the eraser was not fitted on; by chance it is the share
    of the most frequent value. None where too few of these images have a value.
    """

    name: str
    chance: float
    probe_before: float | None
    probe_after: float | None


class Erased(TypedDict):
    """What is erased from the features of a result (`runs/fields.py`).

    For the probes, which have `probed` of the `images`, the eraser was fitted on another half.
    """

    fields: list[ErasedField]
    directions: int
    width: int
    images: int
    probed: int


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
    erased: NotRequired[Erased]


def erased_words(erased: Erased) -> str:
    """What is erased, and how well, in a sentence."""
    parts = []
    for field in erased["fields"]:
        before, after = field["probe_before"], field["probe_after"]
        probe = "too few images with a value to probe"
        if before is not None and after is not None:
            probe = (
                f"linear probe {100 * before:.1f} % before, {100 * after:.1f} % after, "
                f"{100 * field['chance']:.1f} % by chance"
            )
        parts.append(f"{one_line(field['name'])} ({probe})")
    return (
        f"{', '.join(parts)}: {erased['directions']} of {erased['width']} directions, fitted on "
        f"{erased['images']} images; probed on {erased['probed']} of these, with an eraser of "
        "the others"
    )


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
