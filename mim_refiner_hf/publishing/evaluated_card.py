"""Put an evaluation into the card of a model folder: its `model-index`, a section, and `.eval_results/` where the data is on the Hub.

    update_card(Path("out/model"), report)                     # `report` as `evaluation.evaluate.evaluate` returns it

Results on other data stay; earlier ones on the same data are replaced. Text from data sets is escaped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, eval_result_entries_to_yaml

from ..evaluation.tables import METRICS, protocol_labels, report_table
from ..runtime.files import write_text
from ..runtime.text import fenced, one_line, plain
from .hub import CARD
from .model_card import is_hub_name

BEGIN, END = "<!-- evaluation: {} -->", "<!-- end of evaluation -->"


def scores_of(report: Mapping[str, Any]) -> dict[str, str]:
    """The scores that were measured, and what to call them."""
    labels = {name: label for name, (label, _) in METRICS.items() if name in report["after"]}
    return labels | protocol_labels(report["after"])


def eval_results(report: Mapping[str, Any]) -> list[EvalResult]:
    """The model's scores for the `model-index`."""
    data = report["dataset"]
    return [
        EvalResult(
            task_type="image-feature-extraction",
            task_name="Image feature extraction",
            dataset_type=one_line(data["name"]),
            dataset_name=one_line(data["eval_name"]),
            dataset_config=one_line(data["config"] or "default"),
            dataset_revision=one_line(data["eval_fingerprint"]),
            metric_type=name,
            metric_name=label,
            metric_value=round(float(report["after"][name]), 6),
        )
        for name, label in scores_of(report).items()
    ]


def section(report: Mapping[str, Any]) -> str:
    """The card's section on this evaluation, between marks that name the data."""
    data = report["dataset"]
    return "\n\n".join(
        [
            BEGIN.format(plain(data["eval_fingerprint"])),
            f"## Evaluation on {plain(data['eval_name'])}",
            f"{data['eval_images']} images, {data['bank_images']} others to compare with, seed {int(report['seed'])}; "
            "± is one standard error.",
            report_table(report, against=plain(report["against"] or "")),
            fenced(one_line(report["command"]), "bash"),
            END,
        ]
    )


def update_card(folder: Path, report: Mapping[str, Any]) -> Path:
    """Update `<folder>/README.md` and return its path.

    Raises:
        FileNotFoundError: when the folder has no card.
    """
    path = folder / CARD
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {CARD} to update; a run of refine, or convert, writes one"
        )
    card = ModelCard.load(path)
    new = eval_results(report)
    measured = {(result.dataset_type, result.dataset_name, result.dataset_config) for result in new}
    kept = [
        result
        for result in card.data.eval_results or []
        if (result.dataset_type, result.dataset_name, result.dataset_config) not in measured
    ]
    card.data.eval_results = kept + new
    card.data.model_name = card.data.model_name or one_line(folder.resolve().name)
    begin = BEGIN.format(plain(report["dataset"]["eval_fingerprint"]))
    text = card.text
    if begin in text:
        head, _, rest = text.partition(begin)
        text = head.rstrip() + rest.partition(f"\n{END}")[2]
    card.text = f"{text.rstrip()}\n\n{section(report)}\n"
    # the entries first: the card says what they hold
    write_entries(folder, report)
    write_text(path, f"---\n{card.data.to_yaml()}\n---\n{card.text}")
    return path


def write_entries(folder: Path, report: Mapping[str, Any]) -> None:
    """`.eval_results/<data set>.yaml`, for data that has a name on the Hub."""
    name = report["dataset"]["name"]
    if not is_hub_name(name):
        return
    entries = [
        EvalResultEntry(
            dataset_id=name,
            task_id=metric,
            value=round(float(report["after"][metric]), 6),
            notes=one_line(f"seed {report['seed']}: {report['command']}"),
        )
        for metric in scores_of(report)
    ]
    path = folder / ".eval_results" / f"{name.replace('/', '--')}.yaml"
    path.parent.mkdir(exist_ok=True)
    text = yaml.safe_dump(
        eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True, width=1000
    )
    write_text(path, text)


__all__ = ["update_card"]
