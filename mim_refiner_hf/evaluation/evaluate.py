"""`evaluate`: how good an encoder is, and whether it got better than another, with errors and pictures.

    mim-refiner evaluate out/model --dataset my_images/ --against facebook/vit-mae-large      # or training/evaluate.py
    report = evaluate("out/model", "my_images/", against="facebook/vit-mae-large", output_dir=Path("out/evaluation"))

k-NN, clustering, RankMe and the block profile are always measured (RankMe alone where there are no labels); `protocols` adds slower
ones. The folder gets `metrics.json`, `report.md` and the plots of `plots.py`; it appears whole or not at all.
"""

import importlib.metadata
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import normalized_mutual_info_score

from ..broken_images import readable
from ..checkpointing import write_json
from ..conversion import load_encoder
from ..data import ImageDataset, hold_out, open_images
from ..modeling_mim_refiner import MimRefinerModel
from .cluster_scores import cluster_accuracy, matched
from .evidence import Change, Measured, compare, measure
from .linear_probe import linear_probe
from .low_shot import low_shot
from .pictures import draw_clusters
from .plots import draw_confusion, draw_map, draw_neighbours, draw_profile
from .report import BANK_SIZE, METRICS, Evaluation, evaluate_encoder, evenly_spaced, format_metric, fully_labelled
from .robustness import robustness
from .scores import ProtocolResult

HELD_OUT = 0.2  # of the images, where no evaluation images are named
PROTOCOLS: Mapping[str, Callable[..., ProtocolResult]] = {
    "low_shot": low_shot,
    "linear_probe": linear_probe,
    "linear_probe_fast": partial(linear_probe, augment=False),
    "robustness": robustness,
}
"""What `--protocols` can add; each needs labels."""


@dataclass(frozen=True)
class Side:
    """One model of a comparison: its evaluation, the errors of the scores that have one, and what the extra protocols gave."""

    name: str
    evaluation: Evaluation
    measured: dict[str, Measured]
    extra: dict[str, ProtocolResult]

    @property
    def metrics(self) -> dict[str, Any]:
        """Every number, as `metrics.json` holds it."""
        errors = {f"{name}_standard_error": found.error for name, found in self.measured.items()}
        extra = {name: value for result in self.extra.values() for name, value in result.metrics.items()}
        return {**self.evaluation.metrics, **errors, **extra}


def open_images_of(
    dataset: str,
    config: str | None,
    split: str | None,
    eval_dataset: str | None,
    eval_split: str | None,
    num_channels: int,
    seed: int,
) -> tuple[ImageDataset, ImageDataset]:
    """The k-NN bank's images and those to evaluate on; a fifth is held out where neither data set nor split is named for it."""
    images = open_images(dataset, config=config, split=split, num_channels=num_channels)
    if eval_dataset is None and eval_split is None:
        return hold_out(images, HELD_OUT, seed)
    evaluated = open_images(
        eval_dataset or dataset, config=config if eval_dataset is None else None, split=eval_split, num_channels=num_channels
    )
    if evaluated.fingerprint == images.fingerprint:
        raise ValueError(
            f"--eval_split {eval_split}: these are the images of the k-NN bank; name another split, or leave it out"
        )
    return images, evaluated


def errors_of(evaluation: Evaluation) -> dict[str, Measured]:
    """k-NN and cluster accuracy and NMI with their errors over images and, for the latter two, over runs of k-means."""
    if evaluation.predicted is None or evaluation.features.labels is None:
        return {}
    labels, groups = evaluation.features.labels.numpy(), evaluation.assignments
    n, runs = len(labels), evaluation.groups.all_assignments
    right, in_place = (evaluation.predicted.numpy() == labels), matched(labels, groups)
    accuracies = [cluster_accuracy(labels, run) for run in runs]
    nmis = [normalized_mutual_info_score(labels, run) for run in runs]
    return {
        "knn_accuracy": measure(lambda rows: float(right[rows].mean()), n),
        "cluster_accuracy": measure(lambda rows: float(in_place[rows].mean()), n, spread=float(np.std(accuracies))),
        "nmi": measure(
            lambda rows: float(normalized_mutual_info_score(labels[rows], groups[rows])), n, spread=float(np.std(nmis))
        ),
    }


def evaluate(
    model: str,
    dataset: str,
    *,
    output_dir: Path,
    against: str | None = None,
    dataset_config: str | None = None,
    split: str | None = None,
    eval_dataset: str | None = None,
    eval_split: str | None = None,
    protocols: Sequence[str] = (),
    seed: int = 0,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Measure an encoder, and a second one beside it, and write the evidence.

    Args:
        model, against: anything `load_encoder` takes; `against` is the one to be better than.
        dataset, dataset_config, split: images of the k-NN bank, as `open_images` takes them.
        eval_dataset, eval_split: what is classified and clustered; neither: a fifth of `dataset` is held out.
        protocols: names of `PROTOCOLS`.
        seed: of k-means, the held-out part and the protocols.
        output_dir: folder of the result; an earlier result in it is replaced.

    Returns:
        What `metrics.json` holds: `after` (the model), `before` (`against`), `changes` with verdicts, how it was measured, and the
        `broken` images, which are left out.

    Raises:
        ValueError, FileNotFoundError: before any measurement, for wrong input.
    """
    began = time.perf_counter()
    if unknown := [name for name in protocols if name not in PROTOCOLS]:
        raise ValueError(f"--protocols {unknown[0]}: must be one of {', '.join(PROTOCOLS)}")
    check_output(output_dir)
    encoders = {name: load_encoder(name) for name in ([against] if against else []) + [model]}
    channels = {encoder.config.num_channels for encoder in encoders.values()}
    if len(channels) > 1:
        raise ValueError(f"--against {against}: it has another number of input channels than {model}; they cannot be compared")
    bank, evaluated = open_images_of(dataset, dataset_config, split, eval_dataset, eval_split, channels.pop(), seed)
    if protocols and not (fully_labelled(bank) and fully_labelled(evaluated)):
        raise ValueError(f"--protocols {' '.join(protocols)}: needs a label for every image, and {dataset} has images without")
    used = bank if protocols else evenly_spaced(bank, BANK_SIZE)
    (bank, unreadable), (evaluated, more) = (readable(images, num_workers) for images in (used, evaluated))
    sides = [measure_side(name, encoder, bank, evaluated, protocols, seed, num_workers) for name, encoder in encoders.items()]
    before, after = (sides[0] if against else None), sides[-1]
    changes = {} if before is None else changes_of(before, after)
    report = {
        "model": model,
        "against": against,
        "before": None if before is None else before.metrics,
        "after": after.metrics,
        "changes": {name: describe_change(change) for name, change in changes.items()},
        "dataset": describe_data(dataset, dataset_config, split, bank, evaluated, eval_split),
        "broken": unreadable + more,
        "protocol": {
            "bank": f"at most {BANK_SIZE} images, evenly spaced",
            "errors": "bootstrap over images, 500 resamples, paired",
        },
        "seed": seed,
        "command": command_line(),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "scikit-learn")},
        "hardware": platform.processor() or platform.machine(),
    }
    write_report(output_dir, report, sides, bank, evaluated)
    return report


def measure_side(
    name: str,
    encoder: MimRefinerModel,
    bank: ImageDataset,
    evaluated: ImageDataset,
    protocols: Sequence[str],
    seed: int,
    num_workers: int,
) -> Side:
    """Every measurement of one encoder."""
    processor = vars(encoder)["image_processor"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings: dict[str, Any] = {"seed": seed, "num_workers": num_workers, "device": device}
    evaluation = evaluate_encoder(encoder, processor, bank, evaluated, **settings)
    data = {"encoder": encoder, "processor": processor, "train_images": bank, "eval_images": evaluated}
    return Side(name, evaluation, errors_of(evaluation), {name: PROTOCOLS[name](**data, **settings) for name in protocols})


def changes_of(before: Side, after: Side) -> dict[str, Change]:
    """The change of every score that both sides have an error for."""
    return {name: compare(before.measured[name], found) for name, found in after.measured.items() if name in before.measured}


def describe_change(change: Change) -> dict[str, Any]:
    """A change as JSON: difference, 95 % interval, verdict."""
    low, high = change.interval
    return {"difference": change.difference, "low": low, "high": high, "verdict": change.verdict}


def describe_data(
    dataset: str, config: str | None, split: str | None, bank: ImageDataset, evaluated: ImageDataset, eval_split: str | None
) -> dict[str, Any]:
    """Which images, told so that someone else can take the same."""
    return {
        "name": dataset,
        "config": config,
        "split": split,
        "bank_images": len(evenly_spaced(bank, BANK_SIZE)),
        "fingerprint": bank.fingerprint,
        "eval_name": f"{evaluated.name} ({eval_split or 'held out'})",
        "eval_images": len(evaluated),
        "eval_fingerprint": evaluated.fingerprint,
        "num_classes": evaluated.num_classes,
    }


# --- what is written ----------------------------------------------------------------------------------------------------------


def command_line() -> str:
    """What was typed, so that it can be typed again."""
    program = Path(sys.argv[0])
    typed = ["mim-refiner"] if program.name == "mim-refiner" else ["python", os.path.relpath(program)]
    return shlex.join([*typed, *sys.argv[1:]])


def check_output(output_dir: Path) -> None:
    """Refuse a folder that holds anything but an earlier evaluation."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir}: is a file; name a folder")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not (output_dir / "report.md").is_file():
        raise ValueError(f"--output_dir {output_dir}: holds something else than an evaluation; name another folder")


def report_table(report: Mapping[str, Any]) -> str:
    """The scores as a Markdown table; with `before`, the change, its 95 % interval and the verdict."""
    before, after, changes = report["before"], report["after"], report["changes"]

    def cell(metrics: Mapping[str, Any], name: str) -> str:
        error = metrics.get(f"{name}_standard_error")
        return format_metric(name, metrics[name]) + ("" if error is None else f" ± {100 * error:.1f}")

    lines = ["| metric | this model |", "|---|---:|"]
    if before is not None:
        lines = [f"| metric | {report['against']} | this model | change (95 %) | verdict |", "|---|---:|---:|---:|---|"]
    for name, (label, _) in METRICS.items():
        if name not in after:
            continue
        if before is None:
            lines.append(f"| {label} | {cell(after, name)} |")
        elif name in changes:
            low, value, high = (f"{100 * changes[name][key]:+.1f}" for key in ("low", "difference", "high"))
            lines.append(
                f"| {label} | {cell(before, name)} | {cell(after, name)} | {value} ({low} to {high}) | {changes[name]['verdict']} |"
            )
        elif name in before:
            lines.append(f"| {label} | {cell(before, name)} | {cell(after, name)} | | no error measured |")
    return "\n".join(lines)


def write_report(
    output_dir: Path, report: dict[str, Any], sides: Sequence[Side], bank: ImageDataset, evaluated: ImageDataset
) -> None:
    """Write the folder: numbers, words and pictures, in place of an earlier evaluation."""
    new = output_dir.with_name(f".tmp-{output_dir.name}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    write_json(new / "metrics.json", report)
    found = sides[-1].evaluation
    pictures = ["clusters.png", "map.png"]
    draw_clusters(evaluated, found, new / "clusters.png")
    draw_map(evaluated, found, new / "map.png")
    if found.predicted is not None:
        names = ["before", "after"] if len(sides) == 2 else ["this model"]
        draw_profile(
            {name: side.evaluation.metrics for name, side in zip(names, sides, strict=True)}, new / "block_profile.png"
        )
        draw_confusion(evaluated, found, new / "confusion.png")
        draw_neighbours(evaluated, evenly_spaced(bank, BANK_SIZE), found, new / "neighbours.png")
        pictures += ["block_profile.png", "confusion.png", "neighbours.png"]
    extra = "\n".join(
        f"## {side.name}: {name}\n\n```text\n{result}\n```\n" for side in sides for name, result in side.extra.items()
    )
    data, count = report["dataset"], len(report["broken"])
    broken = f" {count} images could not be read and are left out; metrics.json lists them." if count else ""
    text = (
        f"# {report['model']}\n\n{data['eval_images']} images of {data['eval_name']}, k-NN bank of {data['bank_images']} images, seed "
        f"{report['seed']}, {report['seconds']:.0f} s.{broken}\n\n```bash\n{report['command']}\n```\n\n{report_table(report)}\n\n{extra}\n"
        + "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures)
    )
    (new / "report.md").write_text(text + "\n", encoding="utf-8")
    shutil.rmtree(output_dir, ignore_errors=True)
    new.rename(output_dir)


__all__ = ["PROTOCOLS", "evaluate", "report_table"]
