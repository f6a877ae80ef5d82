"""What a model card is, and its three writers: of a run, of a conversion, of a later evaluation.

    write_card(Path("out"))                        # out/metrics.json -> out/model/README.md
    text = conversion_card(source, name, ...)      # the same weights under new names
    update_card(Path("out/model"), report)         # adds what `evaluate` returned to either

The words of the first two are in `model_card.md.jinja`. The metadata block on top goes through
huggingface_hub; its `model-index` holds every score. Text that came from a data set or a user is
escaped (runtime/text.py): a name cannot become a link or HTML. The file is
long because the three write the same metadata, scores and marks.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from ..conversion.licence import CARD, UNKNOWN, Licence
from ..evaluation.tables import (
    METRICS,
    NO_CHANGES,
    comparison_rows,
    format_metric,
    report_table,
    score_labels,
)
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..runtime.files import write_text
from ..runtime.pace import duration
from ..runtime.text import fenced, one_line, plain
from .card_licence import licence_line
from .run_file import RUN_FILE, Metrics, RunRecord, erased_words, read_run
from .ways_to_use import ways_to_use

# in the card's snippets, until `push_folder` knows the repository
REPO_PLACEHOLDER = "your-name/your-model"
# the paper, as every card cites it
CITATION = Path(__file__).with_name("citation.bib").read_text(encoding="utf-8").strip()

_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
# as run_record.py ends `starting_model`
_PRETRAINED_HERE = "pre-trained in this run"
RunSide = Literal["before", "after"]
_BEGIN = "<!-- evaluation: {} -->"
_END = "<!-- end of evaluation -->"


# What all cards share


def is_hub_name(name: str | None) -> bool:
    """Whether this is "user/name" on the Hub rather than a path here or a word such as "digits"."""
    if not name or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return False
    return not Path(name).exists()


def card_metadata(**more: Any) -> ModelCardData:
    """The metadata of a card: what is the same for every encoder, and `more` of this one.

    `license`, with its name and link, is among `more` only where it is known.
    """
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=[
            "mim-refiner",
            "masked-image-modeling",
            "self-supervised",
            "image-clustering",
            "feature-extraction",
        ],
        **more,
    )


def eval_results_yaml(entries: Iterable[EvalResultEntry]) -> str:
    """A file of `.eval_results/`, which the Hub reads beside the card."""
    content = eval_result_entries_to_yaml(list(entries))
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)


def _base_model(name: str) -> dict[str, str]:
    """The metadata that name the starting weights, where they are on the Hub."""
    if not is_hub_name(name):
        return {}
    return {"base_model": name, "base_model_relation": "finetune"}


def _model_index(
    metrics: Metrics, data: Mapping[str, Any], *, suffix: str = ""
) -> list[EvalResult]:
    """The scores of one model on one data set, for the `model-index`.

    Args:
        metrics: name -> score.
        data: where it was measured: `name`, `eval_name`, `config`, `eval_fingerprint`.
        suffix: behind every name. huggingface_hub groups scores by the configuration of the data:
            it keeps two models on the same data apart.
    """
    fingerprint = data.get("eval_fingerprint")
    index = []
    for name, label in score_labels(metrics).items():
        score = EvalResult(
            task_type="image-feature-extraction",
            task_name="Image feature extraction",
            dataset_type=one_line(data["name"]),
            dataset_name=one_line(data.get("eval_name") or data["name"]) + suffix,
            dataset_config=one_line(data.get("config") or "default") + suffix,
            dataset_revision=None if fingerprint is None else one_line(fingerprint),
            metric_type=name,
            metric_name=label + suffix,
            metric_value=round(float(metrics[name]), 6),
        )
        index.append(score)
    return index


def _save_card(path: Path, text: str) -> Path:
    """Put a card in its place, whole."""
    write_text(path, text)
    return path


# The card of a run


# what the card says without: a run need not be measured, and older ones had no verdict
_OPTIONAL = {"before", "after", "pixels", "verdict", "judgement", "licence"}


@dataclass(frozen=True)
class CardData:
    """The facts of one run, as its `metrics.json` states them.

    Attributes:
        model_name: name of the run's folder.
        run: what is in `metrics.json`, with None for what is `_OPTIONAL` and not there.
        licence: of the starting weights.
    """

    model_name: str
    run: RunRecord
    licence: Licence = UNKNOWN

    @classmethod
    def from_run(cls, run_folder: Path) -> "CardData":
        """Read `<run_folder>/metrics.json`.

        Raises:
            FileNotFoundError: when the run has not written it.
            ValueError: when it is not JSON or lacks a field.
        """
        run = read_run(run_folder)
        path = Path(run_folder) / RUN_FILE
        needed = RunRecord.__required_keys__ - _OPTIONAL
        missing = [name for name in RunRecord.__annotations__ if name in needed]
        missing = [name for name in missing if run.get(name) is None]
        if missing:
            raise ValueError(
                f"{path} lacks {', '.join(missing)}, which the card needs; it is not a finished "
                "run's file"
            )
        name = one_line(Path(run_folder).resolve().name)
        licence = Licence.from_metadata(run.get("licence") or {}, where=path)
        return cls(name, cast(RunRecord, {**dict.fromkeys(_OPTIONAL), **run}), licence)

    @property
    def has_labels(self) -> bool:
        """Whether the result was measured against true classes."""
        after = self.run["after"]
        return after is not None and "knn_accuracy" in after

    @property
    def ships_start(self) -> bool:
        """Whether the folder holds the starting weights, for the result was not better."""
        return self.run["verdict"] == "not better"

    @property
    def reason(self) -> str:
        """The verdict's reason, safe in Markdown; empty where there is no verdict."""
        judgement = self.run["judgement"]
        return "" if judgement is None else plain(judgement.get("reason", ""))

    @property
    def erased(self) -> str:
        """What is erased from the features, safe in Markdown; empty where nothing is."""
        erased = self.run.get("erased")
        return "" if erased is None or self.ships_start else plain(erased_words(erased))

    def scores(self, side: RunSide) -> Metrics | None:
        """All that was measured of one side; None where nothing was."""
        evaluated = self.run[side]
        judgement = self.run["judgement"]
        judged = None if judgement is None else judgement.get(side)
        if evaluated is None and judged is None:
            return None
        return {**(evaluated or {}), **(judged or {})}

    def warning(self) -> str | None:
        """The sentence that a reader must see first, or None when the run shows what it should."""
        before = self.run["before"]
        after = self.run["after"]
        verdict = self.run["verdict"]
        if self.ships_start:
            return (
                "This folder holds the STARTING weights: the refinement was judged not better than "
                f"they are ({self.reason})."
            )
        if verdict == "not judged":
            return f"Nobody judged whether this model is better than its start: {self.reason}."
        if verdict is not None and not self.has_labels:
            return None
        if after is None:
            return (
                "This model was not evaluated: nothing here says that it is better than its "
                "starting weights."
            )
        if not self.has_labels:
            return (
                "No labels were available, so the only evidence is RankMe, which needs none and "
                "says little about any one task."
            )
        if before is None:
            return (
                "The starting weights were not evaluated: nothing here says that this model is "
                "better than they are."
            )

        worse = []
        for name in ("knn_accuracy", "cluster_accuracy", "nmi"):
            if after[name] <= before[name]:
                worse.append(METRICS[name][0])
        if not worse:
            return None
        return f"Compared with the starting weights, this run did NOT improve: {', '.join(worse)}."

    def metadata(self) -> ModelCardData:
        """The YAML block of the card; both measurements, where there are two."""
        optional: dict[str, Any] = _base_model(self.run["starting_model"])
        dataset = self.run["dataset"]
        if is_hub_name(dataset["name"]):
            optional["datasets"] = [dataset["name"]]

        names: dict[RunSide, str] = {"after": "", "before": " (starting weights)"}
        if self.ships_start:
            names = {"before": "", "after": " (refined, not in this folder)"}
        index = []
        for side, suffix in names.items():
            index += _model_index(self.scores(side) or {}, dataset, suffix=suffix)
        if index:
            optional |= {"model_name": self.model_name, "eval_results": index}
        return card_metadata(**self.licence.metadata(), **optional)

    def metric_rows(self) -> list[tuple[str, str, str, str]]:
        """(metric, starting weights, this model, change) as text.

        Only what was measured on both sides has a change.
        """
        before = self.scores("before")
        after = self.scores("after")
        if before is not None and after is not None:
            judgement = self.run["judgement"]
            changes = NO_CHANGES
            if judgement is not None:
                changes = judgement.get("changes", NO_CHANGES)
            return comparison_rows(before, after, changes)

        rows = []
        for name, metric in METRICS.items():
            if before is not None and name in before:
                rows.append((metric.label, format_metric(name, before[name]), "-", "-"))
            elif after is not None and name in after:
                rows.append((metric.label, "-", format_metric(name, after[name]), "-"))
        return rows

    @property
    def pixel_scores(self) -> str:
        """What the images give without an encoder, in one line; empty where it was not measured."""
        parts = []
        for name, value in (self.run["pixels"] or {}).items():
            if name in METRICS:
                parts.append(f"{METRICS[name].label} {format_metric(name, value)}")
        return ", ".join(parts)

    def block_rows(self) -> list[tuple[int, str, str]]:
        """(block, k-NN accuracy of the starting weights, of this model), where both have it."""
        old = (self.run["before"] or {}).get("knn_per_block") or []
        new = (self.run["after"] or {}).get("knn_per_block") or []
        rows = []
        for block, (was, now) in enumerate(zip(old, new, strict=False)):
            before = format_metric("knn_accuracy", was)
            after = format_metric("knn_accuracy", now)
            rows.append((block, before, after))
        return rows

    def render(self, config: MimRefinerConfig) -> str:
        """The whole card as Markdown; `config` is that of the encoder."""
        run = self.run
        data = {}
        for name, value in run["dataset"].items():
            if value not in (None, ""):
                data[name] = plain(value)

        is_pretrained_here = run["starting_model"].endswith(_PRETRAINED_HERE)
        stages = []
        for stage, spent in run["stage_seconds"].items():
            if spent:
                stages.append(f"{plain(stage)} {duration(spent)}")
        versions = [f"{plain(name)} {plain(number)}" for name, number in run["versions"].items()]
        recipe = json.dumps(run["recipe"], indent=2, sort_keys=True, ensure_ascii=False)

        return _render(
            self.metadata(),
            config,
            run=self,
            verdict=run["verdict"],
            name=plain(self.model_name),
            starting_model=plain(run["starting_model"]),
            licence=licence_line(
                self.licence, "" if is_pretrained_here else "the starting weights"
            ),
            pretrained_here=is_pretrained_here,
            data=data,
            protocol={plain(name): plain(text) for name, text in run["protocol"].items()},
            command=fenced(run["command"].strip(), "bash"),
            seed=run["seed"],
            time=duration(run["seconds"]),
            stages=", ".join(stages),
            hardware=plain(run["hardware"]),
            versions=", ".join(versions),
            citation=fenced(CITATION, "bibtex"),
            recipe=fenced(recipe, "json"),
        )


def _render(metadata: ModelCardData, config: MimRefinerConfig, **values: Any) -> str:
    template = _TEMPLATE.read_text(encoding="utf-8")
    ways = ways_to_use(REPO_PLACEHOLDER, config)
    card = ModelCard.from_template(metadata, template_str=template, ways=ways, **values)
    return str(card)


def write_card(run_folder: Path) -> Path:
    """Write the card of a finished run, `<run_folder>/model/README.md`, and return its path.

    Raises:
        FileNotFoundError: when the run has no `metrics.json` or no `model` folder.
        ValueError: when `metrics.json` is not a finished run's.
    """
    card = CardData.from_run(run_folder)
    model = Path(run_folder) / "model"
    if not model.is_dir():
        raise FileNotFoundError(
            f"{model} does not exist; the card belongs beside the run's saved model"
        )
    return _save_card(model / CARD, card.render(MimRefinerConfig.from_pretrained(model)))


# The card of a conversion


def conversion_card(
    source: str, name: str, facts: str, licence: Licence, config: MimRefinerConfig
) -> str:
    """The card of the encoder of `source`, converted into a folder called `name`.

    No score was measured, so the card claims none.

    Args:
        source: Hub name or path.
        facts: how the copy was made and checked, in Markdown.
        licence: of the source.
        config: of the encoder.
    """
    shown = source
    if not is_hub_name(source):
        shown = Path(source).name
    return _render(
        card_metadata(**licence.metadata(), **_base_model(source)),
        config,
        run=None,
        name=plain(name),
        source=plain(shown),
        facts=facts,
        licence=licence_line(licence, "its source"),
        command=fenced(f"mim-refiner convert {source} {name}", "bash"),
    )


# An evaluation in a card that is there


def update_card(folder: Path, report: Mapping[str, Any]) -> Path:
    """Put an evaluation into the card of a model folder; returns the card's path.

    It gets into the `model-index`, into a section of its own, and into `.eval_results/` where the
    data is on the Hub. Results on other data stay; earlier ones on the same data are replaced.

    Args:
        report: as `runs.evaluate.evaluate` returns it.

    Raises:
        FileNotFoundError: when the folder has no card.
    """
    path = folder / CARD
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {CARD} to update; a run of refine, or convert, writes one"
        )
    card = ModelCard.load(path)

    index = _model_index(report["after"], report["dataset"])
    measured = {_measured_on(result) for result in index}
    others = [r for r in card.data.eval_results or [] if _measured_on(r) not in measured]
    card.data.eval_results = others + index
    card.data.model_name = card.data.model_name or one_line(folder.resolve().name)

    section = _evaluation_section(report)
    begin = section.partition("\n")[0]
    text = card.text
    if begin in text:
        head, _, rest = text.partition(begin)
        text = head.rstrip() + rest.partition(f"\n{_END}")[2]

    _write_eval_results(folder, report)
    return _save_card(path, f"---\n{card.data.to_yaml()}\n---\n{text.rstrip()}\n\n{section}\n")


def _measured_on(result: EvalResult) -> tuple[str, str, str | None]:
    return result.dataset_type, result.dataset_name, result.dataset_config


def _evaluation_section(report: Mapping[str, Any]) -> str:
    """The card's section on this evaluation, between marks; the first one names the data."""
    data = report["dataset"]
    parts = [
        _BEGIN.format(plain(data["eval_fingerprint"])),
        f"## Evaluation on {plain(data['eval_name'])}",
        f"{data['eval_images']} images, {data['bank_images']} others to compare with, "
        f"seed {int(report['seed'])}; ± is one standard error.",
        report_table(report, against=plain(report["against"] or "")),
        fenced(one_line(report["command"]), "bash"),
        _END,
    ]
    return "\n\n".join(parts)


def _write_eval_results(folder: Path, report: Mapping[str, Any]) -> None:
    """`.eval_results/<data set>.yaml`, for data that has a name on the Hub."""
    data_name = report["dataset"]["name"]
    if not is_hub_name(data_name):
        return

    notes = one_line(f"seed {report['seed']}: {report['command']}")
    entries = []
    for name in score_labels(report["after"]):
        value = round(float(report["after"][name]), 6)
        entry = EvalResultEntry(dataset_id=data_name, task_id=name, value=value, notes=notes)
        entries.append(entry)

    path = folder / ".eval_results" / f"{data_name.replace('/', '--')}.yaml"
    path.parent.mkdir(exist_ok=True)
    write_text(path, eval_results_yaml(entries))
