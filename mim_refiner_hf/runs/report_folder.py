"""The folder of an evaluation: `metrics.json`, `report.md` with its tables, and the pictures.

    write_report(Path("out/evaluation"), report, sides, data)       # `report` as `evaluate` returns it
    print(report_table(report))

A table has one row per score; with a second model also the change, its 95 % interval and the verdict. "better" means that the interval
leaves out zero; many scores are looked at, so one in twenty verdicts on a model that did not change would be wrong.
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
from ..runtime.files import staged_folder, write_json
from ..runtime.text import fenced, plain
from .comparison import Data, Side


def command_line() -> str:
    """What was typed, so that it can be typed again."""
    program = Path(sys.argv[0])
    typed = (
        ["mim-refiner"] if program.name == "mim-refiner" else ["python", os.path.relpath(program)]
    )
    return shlex.join([*typed, *sys.argv[1:]])


def check_output(output_dir: Path) -> Path:
    """`output_dir`, resolved; ValueError for one that holds anything but an earlier evaluation."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir}: is a file; name a folder")
    if (
        output_dir.is_dir()
        and any(output_dir.iterdir())
        and not (output_dir / "report.md").is_file()
    ):
        raise ValueError(
            f"--output_dir {output_dir}: holds something else than an evaluation; name another folder"
        )
    return output_dir.resolve()


# --- tables -------------------------------------------------------------------------------------------------------------------


def knn_tables(report: Mapping[str, Any]) -> str:
    """k-NN accuracy for every k and temperature: per place of the features, a row per k, before -> after."""
    parts = []
    for place, after in report["after"].get("knn", {}).items():
        before = (report["before"] or {}).get("knn", {}).get(place, [])
        old = {(entry["k"], entry["temperature"]): entry["accuracy"] for entry in before}
        new = {(entry["k"], entry["temperature"]): entry["accuracy"] for entry in after}
        ks, taus = sorted({k for k, _ in new}), sorted({tau for _, tau in new})
        rows = [["k", *(f"temperature {tau:g}" for tau in taus)]]
        for k in ks:
            texts = [f"{100 * new[k, tau]:.1f}" for tau in taus]
            if (k, taus[0]) in old:
                texts = [
                    f"{100 * old[k, tau]:.1f} -> {text}"
                    for tau, text in zip(taus, texts, strict=True)
                ]
            rows.append([str(k), *texts])
        parts.append(f"{place[0].upper()}{place[1:]}, accuracy in %:\n\n{markdown_table(rows)}")
    return "\n\n".join(parts)


def block_table(report: Mapping[str, Any]) -> str:
    """k-NN accuracy of every block."""
    sides = {"before": report["before"] or {}, "after": report["after"]}
    profiles = {
        name: side["knn_per_block"] for name, side in sides.items() if "knn_per_block" in side
    }
    depth = max(map(len, profiles.values()))
    texts = {
        name: [f"{100 * value:.1f}" for value in profile] + [""] * depth
        for name, profile in profiles.items()
    }
    return markdown_table(
        [
            ["block", *profiles],
            *([str(i), *(text[i] for text in texts.values())] for i in range(depth)),
        ]
    )


# --- the page -----------------------------------------------------------------------------------------------------------------


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
    data, count = measured["dataset"], len(measured["broken"])
    learnt = (
        f"k-NN bank of {data['bank_images']} images"
        if labelled
        else f"{data['train_images']} images to learn from"
    )
    names = [plain(data[key]) for key in ("eval_name", "fingerprint", "eval_fingerprint")]
    return f"{data['eval_images']} images of {names[0]}, {learnt}; data {names[1]}, {names[2]}." + (
        f" {count} images could not be read and are left out; metrics.json lists them."
        if count
        else ""
    )


def method(report: Mapping[str, Any]) -> str:
    """How it was measured, as a list."""
    facts = {name: text for name, text in report["protocol"].items() if name != "added"}
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    weights = ", ".join(
        f"{name} {fingerprint}" for name, fingerprint in report["fingerprints"].items()
    )
    facts |= {"seed": report["seed"], "weights": weights, "versions": versions}
    facts |= {"hardware": f"{report['hardware']}, {report['seconds']:.0f} s"}
    return "\n".join(f"- {name}: {plain(text)}" for name, text in facts.items())


def sections(report: Mapping[str, Any], sides: Sequence[Side]) -> dict[str, str]:
    """The parts of the page below its head, by title."""
    after = report["after"]
    found = {"Scores": report_table(report)}
    if report["before"] is not None:
        found["Scores"] += f"\n\n{summary(report)}"
    if sides[-1].evaluation is None:
        found["Scores"] += (
            "\n\nThe data is measured by its masks: only the segmentation probe was run, for k-NN and clustering need labels."
        )
    elif "knn" not in after:
        found["Scores"] += (
            "\n\nThere are images without labels, so nothing was measured that needs them."
        )
    for name, transferred in report["transfer"].items():
        seen = {**transferred, "against": report["against"]}
        text = f"{describe_images(transferred, True)}\n\n{report_table(seen)}"
        found[f"Transfer to {plain(name)}"] = text + (
            f"\n\n{summary(transferred)}" if transferred["changes"] else ""
        )
    if "knn" in after:
        found["k-NN"] = knn_tables(report)
        found["k-NN per block (%)"] = block_table(report)
    settings = [
        f"{side.name}: {name}\n{result}" for side in sides for name, result in side.extra.items()
    ]
    if settings:
        found["Settings of the protocols"] = fenced("\n\n".join(settings), "text")
    return found


def draw_pictures(folder: Path, data: Data, sides: Sequence[Side], found: Evaluation) -> list[str]:
    """Draw what can be drawn of the last side; returns the names of the files."""
    pictures = ["clusters.png", "map.png"]
    draw_clusters(data.evaluated, found, folder / "clusters.png")
    draw_map(data.evaluated, found, folder / "map.png")
    if found.predicted is not None:
        names = ["before", "after"] if len(sides) == 2 else ["this model"]
        profiles = {name: side.metrics for name, side in zip(names, sides, strict=True)}
        draw_profile(profiles, folder / "block_profile.png")
        draw_confusion(data.evaluated, found, folder / "confusion.png")
        draw_neighbours(data.evaluated, data.bank, found, folder / "neighbours.png")
        pictures += ["block_profile.png", "confusion.png", "neighbours.png"]
    return pictures


def write_report(
    output_dir: Path, report: dict[str, Any], sides: Sequence[Side], data: Data
) -> None:
    """Write the folder: numbers, words and pictures, in place of an earlier evaluation."""
    found = sides[-1].evaluation
    with staged_folder(output_dir, check_output) as new:
        write_json(new / "metrics.json", report)
        pictures = [] if found is None else draw_pictures(new, data, sides, found)
        head = [f"# {plain(report['model'])}", describe_images(report, found is not None)]
        if report["against"] is not None:
            head.append(f"Compared with {plain(report['against'])} on the same images.")
        head.append(fenced(report["command"], "bash"))
        body = [f"## {title}\n\n{text}" for title, text in sections(report, sides).items()]
        body += (
            [
                "## Pictures\n\n"
                + "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures)
            ]
            if pictures
            else []
        )
        text = "\n\n".join([*head, *body, f"## How it was measured\n\n{method(report)}"])
        (new / "report.md").write_text(text + "\n", encoding="utf-8")


__all__ = ["check_output", "command_line", "write_report"]
