"""The cards of the zoo: `<model>/results.yaml` -> `README.md` and `.eval_results/` beside it.

    python -m model_cards.render                       # from the repository's root; or: make cards

The numbers come from `results.yaml` (results.py), the words from `zoo_card.md.jinja` and
`zoo_index.md.jinja`, which becomes the README above them all. Every number that is shown says who
found it: the paper, with its table, or we, with date and seed.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard

from mim_refiner_hf.conversion.zoo import ZOO
from mim_refiner_hf.publishing.convert import COPY_MARK
from mim_refiner_hf.publishing.model_card import CITATION, card_metadata, eval_results_yaml
from mim_refiner_hf.publishing.ways_to_use import family_config, ways_to_use
from mim_refiner_hf.refinement.recipe_files import read_recipe
from mim_refiner_hf.runtime.text import fenced, plain

from .results import (
    DATASETS,
    METRICS,
    PLACES,
    PROTOCOLS,
    Measured,
    Protocol,
    Reported,
    Results,
    read_results,
)

FOLDER = Path(__file__).parent
PAPERS = {
    "MIM-Refiner": "https://arxiv.org/abs/2402.10093",
    "MAE-CT": "https://arxiv.org/abs/2304.10520",
}
CITATIONS = {
    "MIM-Refiner": CITATION,
    "MAE-CT": (FOLDER / "citation_mae_ct.bib").read_text(encoding="utf-8").strip(),
}


@dataclass(frozen=True)
class Table:
    """The rows of one protocol; a row is dataset, setting, metric, value, source, command."""

    protocol: Protocol
    rows: list[dict[str, str]]


def found_by(row: Reported | Measured) -> str:
    """Who found a number, in the words that mark it wherever it is shown."""
    if isinstance(row, Measured):
        return "measured by us"
    return f"reported by the {'authors' if row.stated else 'paper'}"


def tables_of(rows: Sequence[Reported | Measured]) -> list[Table]:
    """The rows by protocol, in the order of PROTOCOLS."""
    tables = []
    for name, protocol in PROTOCOLS.items():
        own = [row for row in rows if row.score.protocol == name]
        if own:
            tables.append(Table(protocol, [_cells(row) for row in own]))
    return tables


def _cells(row: Reported | Measured) -> dict[str, str]:
    """What a table shows of a row."""
    command = ""
    if isinstance(row, Measured):
        command = plain(row.command)
    return {
        "dataset": DATASETS[row.score.dataset][0],
        "setting": row.score.setting,
        "metric": METRICS[row.score.metric],
        "value": f"{row.score.value}",
        "source": row.source,
        "command": command,
    }


def source(row: Reported | Measured) -> dict[str, Any]:
    """The paper and its tables, or another place, as the metadata name a source.

    Nothing for what we measured: its source is the repository itself.
    """
    if isinstance(row, Measured):
        return {}
    if row.stated:
        return {"source_name": row.source, "source_url": PLACES[row.stated][1]}
    return {"source_name": f"MIM-Refiner, {row.source}", "source_url": PAPERS["MIM-Refiner"]}


def model_index(results: Results) -> list[EvalResult]:
    """Every number for the card's `model-index`.

    The configuration of the data set says who found it, so the two kinds are never grouped.
    """
    index = []
    for row in results.rows:
        title, hub_name = DATASETS[row.score.dataset]
        label = row.score.label
        entry = EvalResult(
            task_type=PROTOCOLS[row.score.protocol].task,
            dataset_type=hub_name or row.score.dataset,
            dataset_name=title,
            dataset_config=f"{label} ({found_by(row)})",
            metric_type=row.score.metric,
            metric_name=f"{label}: {METRICS[row.score.metric]} ({found_by(row)})",
            metric_value=row.score.value,
            **source(row),
        )
        index.append(entry)
    return index


def eval_files(results: Results) -> dict[str, str]:
    """File name -> content under `.eval_results/`, for data sets with an identifier on the Hub.

    The Hub shows an entry once the data set's repository declares the task as a benchmark; until
    then they are data.
    """
    entries: dict[str, list[EvalResultEntry]] = {}
    for row in results.rows:
        if DATASETS[row.score.dataset][1]:
            entries.setdefault(f"{row.score.dataset}.yaml", []).append(_eval_entry(row))
    return {name: eval_results_yaml(rows) for name, rows in entries.items()}


def _eval_entry(row: Reported | Measured) -> EvalResultEntry:
    """One number as the Hub's evaluation results have it; the task is one word."""
    score = row.score
    task = f"{score.protocol} {score.setting} {score.metric}"
    task = task.replace("%", "percent").replace("-", "_")

    notes = f"{found_by(row)}; {score.label}: {METRICS[score.metric]}"
    date = None
    if isinstance(row, Measured):
        notes += f"; seed {row.seed}: {row.command}"
        date = str(row.date)

    return EvalResultEntry(
        dataset_id=DATASETS[score.dataset][1],
        task_id="_".join(task.split()),
        value=score.value,
        date=date,
        notes=notes,
        **source(row),
    )


def render_card(name: str, results: Results, start: Results | None) -> str:
    """The README of the model in folder `name`, refined from `start`; None if it is not refined."""
    entry = results.entry
    optional: dict[str, Any] = {}
    if results.base_model:
        optional |= {"base_model": results.base_model, "base_model_relation": "finetune"}
    index = model_index(results)
    if index:
        optional |= {"model_name": name, "eval_results": index}

    on_the_hub = f"https://huggingface.co/{entry.repo}/blob/main/{entry.filename}"
    card = ModelCard.from_template(
        card_metadata(license=entry.licence, datasets=["ILSVRC/imagenet-1k"], **optional),
        template_str=(FOLDER / "zoo_card.md.jinja").read_text(encoding="utf-8"),
        name=name,
        results=results,
        start=start,
        colour=results.starting_model is not None and read_recipe(name).colour,
        copy_mark=COPY_MARK,
        address=entry.url or on_the_hub,
        ways=ways_to_use(f"out/{name}", family_config(entry.family), local=True),
        notes=[plain(note) for note in results.notes],
        reported=tables_of(results.reported),
        measured=tables_of(results.measured),
        paper=PAPERS[results.method],
        papers=PAPERS,
        citation=fenced(CITATIONS[results.method], "bibtex"),
    )
    return str(card)


def render_index(models: dict[str, Results]) -> str:
    """The README above the models: each with the paper's headline numbers on ImageNet-1K."""
    scores: dict[str, dict[tuple[str, str, str], float]] = {}
    for name, results in models.items():
        scores[name] = {}
        for row in results.reported:
            if row.score.dataset == "imagenet-1k":
                key = (row.score.protocol, row.score.setting, row.score.metric)
                scores[name][key] = row.score.value

    others = [name for name in ZOO if name not in models]
    text = (FOLDER / "zoo_index.md.jinja").read_text(encoding="utf-8")
    template = jinja2.Template(text, undefined=jinja2.StrictUndefined)
    return template.render(models=models, scores=scores, others=others, papers=PAPERS)


# columns of the tables in docs/reproduce.md: heading, protocols, settings, data set, metric
_SHOTS = ("low-shot-logistic", "low-shot-fine-tuning")
_KNN = ("knn", "knn-tuned")
_LOWEST = "lowest loss of 100 runs"
_MEAN = "mean of 100 runs"
_IN1K = "imagenet-1k"
_VTAB = ("caltech101", "cifar100", "dtd", "flowers102", "pets", "sun397", "svhn")
Column = tuple[str, tuple[str, ...], str, str, str]
NUMBERS: dict[str, list[Column]] = {
    "Tables 2, 13": [
        *((shot, _SHOTS, shot, _IN1K, "accuracy") for shot in ("1-shot", "2-shot", "5-shot")),
        *((share, _SHOTS, share, _IN1K, "accuracy") for share in ("1 %", "10 %")),
        ("probe", ("linear-probe",), "", _IN1K, "accuracy"),
        ("k-NN", _KNN, "last block", _IN1K, "accuracy"),
        ("k-NN, last 4", _KNN, "last 4 blocks", _IN1K, "accuracy"),
    ],
    "Tables 3, 9": [
        ("ACC", ("clustering",), _LOWEST, _IN1K, "cluster_accuracy"),
        *((name.upper(), ("clustering",), _LOWEST, _IN1K, name) for name in ("nmi", "ami", "ari")),
        ("SIL", ("class-separation",), "", _IN1K, "silhouette"),
        ("DBS", ("class-separation",), "", _IN1K, "davies_bouldin"),
        ("mean ACC", ("clustering",), _MEAN, _IN1K, "cluster_accuracy"),
        ("mean NMI", ("clustering",), _MEAN, _IN1K, "nmi"),
    ],
    "Tables 4, 5": [
        *(
            (f"iNat {shot}", ("inat-low-shot",), shot, "inat18", "accuracy")
            for shot in ("1-shot", "5-shot", "10-shot")
        ),
        ("iNat probe", ("linear-probe",), "", "inat18", "accuracy"),
        ("ADE20K", ("segmentation-probe",), "", "ade20k", "mean_iou"),
        ("all of ImageNet", ("fine-tuning",), "", _IN1K, "accuracy"),
        ("all of iNat", ("fine-tuning",), "", "inat18", "accuracy"),
    ],
    "Table 8": [(name, ("linear-probe",), "", name, "accuracy") for name in _VTAB],
}
PAGE = FOLDER.parent / "docs" / "reproduce.md"
_BEGIN, _END = "<!-- numbers: make cards -->\n", "<!-- end of numbers -->\n"


def render_numbers(models: dict[str, Results]) -> str:
    """The paper's numbers as tables, a line for each model that it has some of."""
    parts = []
    for title, columns in NUMBERS.items():
        heads = [title, *(column[0] for column in columns)]
        parts += [f"| {' | '.join(heads)} |", f"|---|{'---:|' * len(columns)}"]
        for name, results in models.items():
            values = [_value(results, column) for column in columns]
            if any(values):
                cells = [f"`{name}`", *(value or "-" for value in values)]
                parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def _value(results: Results, column: Column) -> str:
    """The number of a column; empty where the paper has none."""
    _, protocols, setting, dataset, metric = column
    for row in results.reported:
        score = row.score
        asked = (score.setting, score.dataset, score.metric) == (setting, dataset, metric)
        if asked and score.protocol in protocols and row.tables:
            return f"{score.value:g}" if score.value < 0 else f"{score.value:.1f}"
    return ""


def with_numbers(page: str, numbers: str) -> str:
    """A page with these tables between its two marks."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{numbers}\n{_END}{after}"


def render_all(folder: Path) -> dict[Path, str]:
    """Path -> text of everything that is made from the `<folder>/<model>/results.yaml`.

    Raises:
        FileNotFoundError: when `folder` holds no model.
        ValueError: for a `results.yaml` that is wrong, or names a starting model that has none.
    """
    models = {path.parent.name: read_results(path) for path in folder.glob("*/results.yaml")}
    if not models:
        raise FileNotFoundError(
            f"{folder} holds no <model>/results.yaml; give the folder model_cards/ of the "
            "repository"
        )
    # in the order of the zoo
    models = {name: models[name] for name in ZOO if name in models}

    texts = {folder / "README.md": render_index(models)}
    if folder.resolve() == FOLDER.resolve():
        texts[PAGE] = with_numbers(PAGE.read_text(encoding="utf-8"), render_numbers(models))
    for name, results in models.items():
        start = models.get(results.starting_model or "")
        if start is None and results.starting_model:
            raise ValueError(
                f"{name}: starting_model {results.starting_model!r} has no folder; "
                f"there are {', '.join(models)}"
            )
        texts[folder / name / "README.md"] = render_card(name, results, start)
        for file, text in eval_files(results).items():
            texts[folder / name / ".eval_results" / file] = text
    return {path: text.rstrip() + "\n" for path, text in texts.items()}


def write_cards(folder: Path) -> list[Path]:
    """Write what `render_all` gives, once all of it could be rendered, and return the files.

    Evaluation results of earlier that belong to no model any more are removed.
    """
    texts = render_all(folder)
    for path in folder.glob("*/.eval_results/*.yaml"):
        if path not in texts:
            path.unlink()

    for path, text in texts.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(texts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the cards; exit code 2 with one sentence for a wrong file."""
    parser = argparse.ArgumentParser(
        prog="python -m model_cards.render",
        description="Render the cards of the zoo from their results.yaml files.",
    )
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="default: this one")
    options = parser.parse_args(arguments)

    try:
        files = write_cards(options.folder)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(files)} files written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
