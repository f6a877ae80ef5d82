"""What a run leaves as evidence: `metrics.json`, the pictures, the table of before and after.

metrics.json holds the scores before and after, the verdict with its numbers, and all that is needed
to get them again. The pictures, which people look at:

| picture                  | shows                                                               |
|--------------------------|---------------------------------------------------------------------|
| `neighbours.png`         | ten photos, and their nearest ones before beside after              |
| `groups_before_after.png`| the groups of the photos before beside the same groups after        |
| `clusters.png`           | the groups of the evaluation images, where there are some           |
| `curves.png`             | loss and neighbours over the run, with labels k-NN per block         |
"""

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from ..evaluation.label_free import TwoViews, reciprocal_ranks, similarities
from ..evaluation.pictures import draw_clusters, draw_curves
from ..evaluation.plots import draw_groups_before_after, draw_neighbours_before_after
from ..evaluation.report import Evaluation
from ..evaluation.tables import comparison_table
from ..publishing.run_file import RUN_FILE, Metrics, RunDataset, RunRecord
from ..runtime.files import write_json
from ..runtime.sharding import fsdp2_requested
from .comparison import eval_words
from .prepare import Prepared
from .verdict import Judged, Verdict

NEIGHBOURS = "neighbours.png"
GROUPS = "groups_before_after.png"

# How the scores are made, for the reader of metrics.json.
_PROTOCOL = {
    "features": "pooled token of the last block, without the final norm (paper, Sec. 5.2)",
    "knn": "k=10, temperature 0.07, features standardised by the training images, "
    "cosine similarity",
    "clustering": "mini-batch k-means on L2-normalised features, 100 runs, "
    "the one with the lowest loss; k = number of classes",
    "verdict": "a photo and a distorted copy of it, last block, standardised by the photos; "
    "separation = (mean cosine to its own copy - mean to others) / their standard deviation; "
    "95 % interval by a paired bootstrap over photos",
}
# Packages whose versions decide the numbers.
_VERSIONED = (
    "mim_refiner_hf",
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "datasets",
    "pillow",
    "scikit-learn",
)


@dataclass(frozen=True)
class BeforeAfter:
    """Scores by name, as `evaluate_encoder` gives them; None where nothing was measured.

    Without evaluation images, or beside them, the verdict tells what needs no labels. Beside a
    start that the run itself pre-trained stands what the pixels give without an encoder.
    """

    before: Metrics | None
    after: Metrics | None
    verdict: Verdict
    pixels: dict[str, float] | None = None

    def table(self) -> str:
        """Before beside after, as text; empty where nothing was measured."""
        verdict = self.verdict
        before = {**(self.before or {}), **(verdict.before or {})}
        after = {**(self.after or {}), **(verdict.after or {})}
        if not before or not after:
            return ""
        return comparison_table(before, after, verdict.changes_as_json, self.pixels)


def run_record(
    prepared: Prepared, accelerator: Accelerator, measured: BeforeAfter, seconds: dict[str, float]
) -> RunRecord:
    """The contents of metrics.json, as JSON.

    Args:
        seconds: that each stage took.
    """
    asked = prepared.recipe.asked
    begun = f"the weights of the run {asked.init_from}"
    pretraining = prepared.start.pretraining
    if pretraining is not None:
        method = "MAE" if pretraining.objective == "mae" else f"{pretraining.objective} encoder"
        begun = f"a {method} pre-trained in this run"

    words = shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    return {
        "before": measured.before,
        "after": measured.after,
        "pixels": measured.pixels,
        "verdict": measured.verdict.outcome,
        "judgement": measured.verdict.as_json(),
        "seed": asked.seed,
        "command": f"{_launcher(accelerator)} {words}",
        "seconds": round(sum(seconds.values()), 1),
        "stage_seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
        "hardware": _hardware(accelerator),
        "starting_model": asked.model or begun,
        "licence": prepared.start.licence.metadata(),
        "dataset": _dataset(prepared),
        "protocol": _PROTOCOL,
        "recipe": prepared.recipe.as_written(),
    }


def _launcher(accelerator: Accelerator) -> str:
    """How the processes of this run are started."""
    launched = any(name.startswith("ACCELERATE_") for name in os.environ)
    words = ["accelerate launch" if launched else "python"]
    if accelerator.num_processes > 1:
        if fsdp2_requested():
            words.append("--use_fsdp --fsdp_version 2")
        elif accelerator.device.type == "cpu":
            words.append("--cpu")
        words.append(f"--num_processes {accelerator.num_processes}")
    return " ".join(words)


def _hardware(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    count = accelerator.num_processes
    return f"{count} x {device}" if count > 1 else device


def _dataset(prepared: Prepared) -> RunDataset:
    """What was trained and measured on."""
    asked = prepared.recipe.asked
    evaluated = prepared.images.evaluation
    facts: RunDataset = {
        "name": asked.dataset,
        "config": asked.dataset_config,
        "split": asked.split,
        "images": prepared.recipe.num_images,
        "fingerprint": getattr(prepared.images.training, "fingerprint", None),
        "eval_name": None,
        "eval_images": None,
        "num_classes": 0,
    }

    if evaluated is not None:
        whole = None if asked.eval_dataset is None else ""
        facts["eval_name"] = eval_words(evaluated.name, asked.eval_split or whole)
        facts["eval_images"] = len(evaluated)
        facts["num_classes"] = evaluated.num_classes
    return facts


def write_evidence(
    prepared: Prepared,
    metrics: RunRecord,
    measured: BeforeAfter,
    after: Evaluation | None,
    judged: Judged,
) -> None:
    """Write metrics.json and the pictures, and print the table."""
    output = Path(prepared.recipe.output_dir)
    write_json(output / RUN_FILE, metrics)
    if after is not None and prepared.images.evaluation is not None:
        draw_clusters(prepared.images.evaluation, after, output / "clusters.png")
    draw_curves(output / "log.jsonl", measured.before, measured.after, output / "curves.png")

    if judged.found:
        assert judged.photos is not None
        old, new = (side.plain for side in judged.views)
        draw_neighbours_before_after(judged.photos, old, new, output / NEIGHBOURS)
        was, now = (side.groups for side in judged.found)
        draw_groups_before_after(judged.photos, (old, was), (new, now), output / GROUPS)

    table = measured.table()
    if table:
        print(f"\n{table}\n", flush=True)
    if judged.found and prepared.recipe.nested_widths:
        print(nested_line(judged.views[-1], prepared.recipe.nested_widths), flush=True)


def nested_line(views: TwoViews, widths: Sequence[int]) -> str:
    """How well photos are found again from distorted copies by the first channels alone."""
    whole = views.plain.shape[1]
    found = []
    for width in (*widths, whole):
        cut = TwoViews(views.plain[:, :width], views.copies[:, :width])
        retrieval = 100 * reciprocal_ranks(similarities(cut)).mean()
        found.append(f"{retrieval:.1f} % by {width}")
    return f"Of {whole} channels the first ones alone: MRR {', '.join(found)}."
