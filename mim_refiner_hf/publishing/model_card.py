"""The model card of a run: starting weights and result side by side, with everything needed to repeat the measurement.

    from mim_refiner_hf.publishing import write_card
    write_card(Path("out"))                                # reads out/metrics.json, writes out/model/README.md

`CardData` holds the facts, `model_card.md.jinja` the words. The metadata block on top goes through huggingface_hub, with both
results in its `model-index`. Text that came from a data set or a user is escaped: a name cannot become a link or HTML.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.tables import METRICS, comparison_rows, format_metric
from ..runtime.files import write_text
from ..runtime.text import fenced, one_line, plain

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
CITATION = Path(__file__).with_name("citation.bib").read_text(encoding="utf-8").strip()
"""The paper, as every card cites it."""
REPO_PLACEHOLDER = (
    "your-name/your-model"  # in the card's snippets, until `push_folder` knows the repository
)
PRETRAINED_HERE = "a MAE pre-trained in this run"  # as the trainer writes `starting_model`
TAGS = [
    "mim-refiner",
    "masked-image-modeling",
    "self-supervised",
    "image-clustering",
    "feature-extraction",
]


def is_hub_name(name: str | None) -> bool:
    """Whether `name` is "user/name" on the Hub rather than a path here or a word such as "digits"."""
    return (
        bool(name and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name))
        and not Path(str(name)).exists()
    )


def duration(seconds: float) -> str:
    """Seconds for readers: "45 s", "12.3 min", "5.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class CardData:
    """The facts of one run, as its `metrics.json` states them.

    Attributes:
        model_name: name of the run's folder.
        before, after: metrics of the starting weights and of the result (see `evaluate_encoder`); None when not measured.
        starting_model: Hub name, path, or "a MAE pre-trained in this run".
        dataset: `name`, `config`, `split`, `images`, `fingerprint`, `eval_name`, `eval_images`, `num_classes`.
        protocol: how each group of metrics was measured, in words.
        seed, command, seconds, stage_seconds, versions, hardware: of the run.
        recipe: every field of the `RefineRecipe`.
    """

    model_name: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    starting_model: str
    dataset: dict[str, Any]
    protocol: dict[str, str]
    seed: int
    command: str
    seconds: float
    stage_seconds: dict[str, float]
    versions: dict[str, str]
    hardware: str
    recipe: dict[str, Any]

    @classmethod
    def from_run(cls, run_folder: Path) -> "CardData":
        """Read `<run_folder>/metrics.json`.

        Raises:
            FileNotFoundError: when the run has not written it.
            ValueError: when it is not JSON or lacks a field.
        """
        path = Path(run_folder) / "metrics.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; give the output folder of a finished run"
            )
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is not valid JSON ({error}); the run has to be evaluated again"
            ) from error
        facts = {name: run.get(name) for name in cls.__dataclass_fields__ if name != "model_name"}
        if missing := [
            name
            for name, value in facts.items()
            if value is None and name not in ("before", "after")
        ]:
            raise ValueError(
                f"{path} lacks {', '.join(missing)}, which the card needs; it is not a finished run's file"
            )
        return cls(model_name=one_line(Path(run_folder).resolve().name), **facts)

    @property
    def has_labels(self) -> bool:
        """Whether the result was measured against true classes."""
        return self.after is not None and "knn_accuracy" in self.after

    def warning(self) -> str | None:
        """The sentence that a reader must see first, or None when the run shows what it should."""
        if self.after is None:
            return "This model was not evaluated: nothing here says that it is better than its starting weights."
        if not self.has_labels:
            return "No labels were available, so the only evidence is RankMe, which needs none and says little about any one task."
        if self.before is None:
            return "The starting weights were not evaluated: nothing here says that this model is better than they are."
        worse = [
            METRICS[name][0]
            for name in ("knn_accuracy", "cluster_accuracy", "nmi")
            if self.after[name] <= self.before[name]
        ]
        return (
            f"Compared with the starting weights, this run did NOT improve: {', '.join(worse)}."
            if worse
            else None
        )

    def eval_results(self) -> list[EvalResult]:
        """Both measurements for the `model-index`: the result, then the starting weights as a configuration of their own."""
        config = one_line(self.dataset.get("config") or "default")
        name = one_line(self.dataset.get("eval_name") or self.dataset["name"])
        results = []
        for metrics, suffix in ((self.after, ""), (self.before, " (starting weights)")):
            for key in METRICS:
                if metrics is None or key not in metrics:
                    continue
                results.append(
                    EvalResult(
                        task_type="image-feature-extraction",
                        task_name="Image feature extraction",
                        dataset_type=one_line(self.dataset["name"]),
                        dataset_name=name + suffix,
                        dataset_config=config
                        + suffix,  # what huggingface_hub groups by: keeps the two results apart
                        metric_type=key,
                        metric_name=METRICS[key][0] + suffix,
                        metric_value=round(float(metrics[key]), 6),
                    )
                )
        return results

    def metadata(self) -> ModelCardData:
        """The YAML block of the card."""
        optional: dict[str, Any] = {}
        if is_hub_name(self.starting_model):
            optional |= {"base_model": self.starting_model, "base_model_relation": "finetune"}
        if is_hub_name(self.dataset["name"]):
            optional["datasets"] = [self.dataset["name"]]
        if results := self.eval_results():
            optional |= {"model_name": self.model_name, "eval_results": results}
        return ModelCardData(
            license="apache-2.0",
            library_name="transformers",
            pipeline_tag="image-feature-extraction",
            tags=TAGS,
            **optional,
        )

    def metric_rows(self) -> list[tuple[str, str, str, str]]:
        """(metric, starting weights, this model, change) as text; only what was measured on both sides has a change."""
        if self.before is not None and self.after is not None:
            return comparison_rows(self.before, self.after)
        rows = []
        for name, (label, _) in METRICS.items():
            if name in (self.after or self.before or {}):
                old, new = (
                    "-" if side is None else format_metric(name, side[name])
                    for side in (self.before, self.after)
                )
                rows.append((label, old, new, "-"))
        return rows

    def block_rows(self) -> list[tuple[int, str, str]]:
        """(block, k-NN accuracy of the starting weights, of this model) for every block measured on both sides."""
        old, new = ((side or {}).get("knn_per_block") or [] for side in (self.before, self.after))
        return [
            (block, format_metric("knn_accuracy", was), format_metric("knn_accuracy", now))
            for block, (was, now) in enumerate(
                zip(old, new, strict=False)
            )  # one side may not have been measured
        ]

    def render(self) -> str:
        """The whole card as Markdown."""
        data = {
            name: plain(value) for name, value in self.dataset.items() if value not in (None, "")
        }
        card = ModelCard.from_template(
            self.metadata(),
            template_str=TEMPLATE.read_text(encoding="utf-8"),
            name=plain(self.model_name),
            repo_id=REPO_PLACEHOLDER,
            warning=self.warning(),
            starting_model=plain(self.starting_model),
            pretrained_here=self.starting_model == PRETRAINED_HERE,
            data=data,
            labelled=self.has_labels,
            rows=self.metric_rows(),
            blocks=self.block_rows(),
            protocol={plain(name): plain(text) for name, text in self.protocol.items()},
            seed=int(self.seed),
            command=fenced(self.command.strip(), "bash"),
            time=duration(self.seconds),
            stages=", ".join(
                f"{plain(stage)} {duration(spent)}"
                for stage, spent in self.stage_seconds.items()
                if spent
            ),
            hardware=plain(self.hardware),
            versions=", ".join(
                f"{plain(package)} {plain(version)}" for package, version in self.versions.items()
            ),
            citation=fenced(CITATION, "bibtex"),
            recipe=fenced(
                json.dumps(self.recipe, indent=2, sort_keys=True, ensure_ascii=False), "json"
            ),
        )
        return str(card)


def write_card(run_folder: Path) -> Path:
    """Render the card of a finished run into `<run_folder>/model/README.md` and return that path.

    Raises:
        FileNotFoundError: when the run has no `metrics.json` or no `model` folder.
        ValueError: when `metrics.json` is not a finished run's.
    """
    card = CardData.from_run(run_folder).render()
    model = Path(run_folder) / "model"
    if not model.is_dir():
        raise FileNotFoundError(
            f"{model} does not exist; the card belongs beside the run's saved model"
        )
    write_text(model / "README.md", card)
    return model / "README.md"


__all__ = ["REPO_PLACEHOLDER", "CardData", "write_card"]
