"""The folder of an evaluation: `metrics.json`, `report.md` with its tables, and the pictures.

    write_report(Path("out/evaluation"), report, sides, data)     # `report` as `evaluate` gives it

A table has one row per score; with a second model also the change, its 95 % interval and the
verdict. "better" means that the interval leaves out zero; many scores are looked at, so one in
twenty verdicts on a model that did not change would be wrong.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.pictures import draw_clusters
from ..evaluation.plots import draw_confusion, draw_map, draw_neighbours, draw_profile
from ..evaluation.report import Evaluation
from ..evaluation.tables import markdown_table, report_table
from ..runtime.files import check_kinds, staged_folder, write_json, write_text
from ..runtime.text import fenced, plain
from ..runtime.wording import setting
from .comparison import Data, Side


def command_line() -> str:
    """What was typed, so that it can be typed again."""
    program = Path(sys.argv[0])
    words = ["python", os.path.relpath(program)]
    if program.name == "mim-refiner":
        words = ["mim-refiner"]
    return shlex.join([*words, *sys.argv[1:]])


def check_report_folder(output_dir: Path) -> Path:
    """`output_dir`, resolved; ValueError for one that holds anything but an earlier evaluation.

    And as `check_kinds`.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"{setting('output_dir', output_dir)}: is a file; name a folder")
    is_report = (output_dir / "report.md").is_file()
    if output_dir.is_dir() and any(output_dir.iterdir()) and not is_report:
        raise ValueError(
            f"{setting('output_dir', output_dir)}: holds something else than an evaluation; "
            "name another folder"
        )
    check_kinds(output_dir)
    return output_dir.resolve()


# --- tables ---------------------------------------------------------------------------------------


def knn_tables(report: Mapping[str, Any]) -> str:
    """k-NN accuracy by place of the features: a row per k, a column per temperature.

    With a model before, each cell says before -> after.
    """
    before = report["before"] or {}
    parts = []
    for place, entries in report["after"].get("knn", {}).items():
        new = _by_setting(entries)
        old = _by_setting(before.get("knn", {}).get(place, []))
        temperatures = sorted({temperature for _, temperature in new})

        rows = [["k", *(f"temperature {temperature:g}" for temperature in temperatures)]]
        for k in sorted({k for k, _ in new}):
            row = [str(k)]
            for temperature in temperatures:
                cell = (k, temperature)
                text = f"{100 * new[cell]:.1f}"
                if cell in old:
                    text = f"{100 * old[cell]:.1f} -> {text}"
                row.append(text)
            rows.append(row)
        title = f"{place[0].upper()}{place[1:]}, accuracy in %:"
        parts.append(f"{title}\n\n{markdown_table(rows)}")
    return "\n\n".join(parts)


def _by_setting(entries: Sequence[Mapping[str, Any]]) -> dict[tuple[int, float], float]:
    """The accuracies of a grid by k and temperature."""
    return {(entry["k"], entry["temperature"]): entry["accuracy"] for entry in entries}


def block_table(report: Mapping[str, Any]) -> str:
    """k-NN accuracy of every block; models may differ in their depth."""
    sides = {"before": report["before"] or {}, "after": report["after"]}
    profiles = {
        name: side["knn_per_block"] for name, side in sides.items() if "knn_per_block" in side
    }
    rows = [["block", *profiles]]
    for block in range(max(map(len, profiles.values()))):
        row = [str(block)]
        for profile in profiles.values():
            row.append(f"{100 * profile[block]:.1f}" if block < len(profile) else "")
        rows.append(row)
    return markdown_table(rows)


# --- the page -------------------------------------------------------------------------------------


def summary(report: Mapping[str, Any]) -> str:
    """The verdicts in one sentence."""
    verdicts = [change["verdict"] for change in report["changes"].values()]
    counts = [
        f"{verdicts.count(verdict)} {verdict}"
        for verdict in ("better", "worse", "no clear difference")
    ]
    return f"Of {len(verdicts)} scores whose change can be judged: {', '.join(counts)}."


def describe_images(measured: Mapping[str, Any], labelled: bool) -> str:
    """One line on what was measured on."""
    data = measured["dataset"]
    name = plain(data["eval_name"])
    fingerprints = f"{plain(data['fingerprint'])}, {plain(data['eval_fingerprint'])}"
    learnt = f"{data['train_images']} images to learn from"
    if labelled:
        learnt = f"k-NN bank of {data['bank_images']} images"
    line = f"{data['eval_images']} images of {name}, {learnt}; data {fingerprints}."

    count = len(measured["broken"])
    if count:
        line += f" {count} images could not be read and are left out; metrics.json lists them."
    return line


def method(report: Mapping[str, Any]) -> str:
    """How it was measured, as a list."""
    facts = {name: text for name, text in report["protocol"].items() if name != "added"}
    facts["seed"] = report["seed"]
    facts["weights"] = ", ".join(f"{name} {text}" for name, text in report["fingerprints"].items())
    facts["versions"] = ", ".join(f"{name} {text}" for name, text in report["versions"].items())
    facts["hardware"] = f"{report['hardware']}, {report['seconds']:.0f} s"
    return "\n".join(f"- {name}: {plain(text)}" for name, text in facts.items())


def scores_section(report: Mapping[str, Any], has_evaluation: bool) -> str:
    """The table of scores, the verdicts, and what could not be measured."""
    paragraphs = [report_table(report)]
    if report["before"] is not None:
        paragraphs.append(summary(report))
    if not has_evaluation:
        paragraphs.append(
            "The data is measured by its masks: only segmentation was, for k-NN and clustering "
            "need labels."
        )
    elif "knn" not in report["after"]:
        paragraphs.append(
            "There are images without labels, so nothing was measured that needs them."
        )
    return "\n\n".join(paragraphs)


def sections(report: Mapping[str, Any], sides: Sequence[Side]) -> dict[str, str]:
    """The parts of the page below its head, by title."""
    found = {"Scores": scores_section(report, sides[-1].evaluation is not None)}
    for name, transferred in report["transfer"].items():
        table = report_table({**transferred, "against": report["against"]})
        paragraphs = [describe_images(transferred, True), table]
        if transferred["changes"]:
            paragraphs.append(summary(transferred))
        found[f"Transfer to {plain(name)}"] = "\n\n".join(paragraphs)
    if "knn" in report["after"]:
        found["k-NN"] = knn_tables(report)
        found["k-NN per block (%)"] = block_table(report)

    settings = []
    for side in sides:
        for name, result in side.extra.items():
            settings.append(f"{side.name}: {name}\n{result}")
    if settings:
        found["Settings of the protocols"] = fenced("\n\n".join(settings), "text")
    return found


def draw_pictures(folder: Path, data: Data, sides: Sequence[Side], found: Evaluation) -> list[str]:
    """Draw what can be drawn of the last side; returns the names of the files."""
    draw_clusters(data.evaluated, found, folder / "clusters.png")
    draw_map(data.evaluated, found, folder / "map.png")
    pictures = ["clusters.png", "map.png"]
    if found.predicted is None:
        return pictures

    names = ["before", "after"] if len(sides) == 2 else ["this model"]
    profiles = {name: side.metrics for name, side in zip(names, sides, strict=True)}
    draw_profile(profiles, folder / "block_profile.png")
    draw_confusion(data.evaluated, found, folder / "confusion.png")
    draw_neighbours(data.evaluated, data.bank, found, folder / "neighbours.png")
    return [*pictures, "block_profile.png", "confusion.png", "neighbours.png"]


def write_report(
    output_dir: Path, report: Mapping[str, Any], sides: Sequence[Side], data: Data
) -> None:
    """Write the folder: numbers, words and pictures, in place of an earlier evaluation."""
    found = sides[-1].evaluation
    with staged_folder(output_dir, check_report_folder) as new:
        write_json(new / "metrics.json", report)
        pictures = []
        if found is not None:
            pictures = draw_pictures(new, data, sides, found)

        parts = [f"# {plain(report['model'])}", describe_images(report, found is not None)]
        if report["against"] is not None:
            parts.append(f"Compared with {plain(report['against'])} on the same images.")
        parts.append(fenced(report["command"], "bash"))
        for title, text in sections(report, sides).items():
            parts.append(f"## {title}\n\n{text}")
        if pictures:
            links = [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
            parts.append("\n".join(["## Pictures", "", *links]))
        parts.append(f"## How it was measured\n\n{method(report)}")
        write_text(new / "report.md", "\n\n".join(parts) + "\n")
