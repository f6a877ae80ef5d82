"""The cards of the zoo: `model_cards/<model>/results.yaml` -> `README.md` and `.eval_results/` beside it, and the index above.

    python -m mim_refiner_hf.publishing.zoo_card model_cards/          # or: make cards

The numbers come from `results.yaml` (`zoo_results.py`), the words from `zoo_card.md.jinja` and `zoo_index.md.jinja`. Everything that
is rendered says of every number who found it: the paper, with its table, or we, with date and seed.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from ..conversion.zoo import ZOO
from ..runtime.text import fenced, plain
from .model_card import CITATION, TAGS
from .zoo_results import (
    DATASETS,
    METRICS,
    PROTOCOLS,
    Measured,
    Protocol,
    Reported,
    Results,
    read_results,
)

TEMPLATE, INDEX = (
    Path(__file__).with_name(name) for name in ("zoo_card.md.jinja", "zoo_index.md.jinja")
)
PAPER = "https://arxiv.org/abs/2402.10093"


def who(row: Reported | Measured) -> str:
    """Who found a number, in the words that mark it wherever it is shown."""
    return "reported by the paper" if isinstance(row, Reported) else "measured by us"


def groups(rows: Sequence[Reported | Measured]) -> list[tuple[Protocol, list[dict[str, str]]]]:
    """The rows by protocol, in the order of PROTOCOLS, as cells of a table."""
    order = list(PROTOCOLS)
    ordered = sorted(rows, key=lambda row: order.index(row.score.protocol))
    return [
        (
            PROTOCOLS[protocol],
            [
                {
                    "dataset": DATASETS[row.score.dataset][0],
                    "setting": row.score.setting,
                    "metric": METRICS[row.score.metric],
                    "value": f"{row.score.value}",
                    "source": row.source,
                    "command": plain(row.command) if isinstance(row, Measured) else "",
                }
                for row in group
            ],
        )
        for protocol, group in groupby(ordered, key=lambda row: row.score.protocol)
    ]


def source(row: Reported | Measured) -> dict[str, Any]:
    """The paper and its tables, as the metadata name a source; nothing for what we measured, whose source is the repository itself."""
    return (
        {"source_name": f"MIM-Refiner, {row.source}", "source_url": PAPER}
        if isinstance(row, Reported)
        else {}
    )


def eval_results(results: Results) -> list[EvalResult]:
    """Every number for the card's `model-index`. Its `config` says who found it, so the two kinds are never grouped."""
    return [
        EvalResult(
            task_type=PROTOCOLS[row.score.protocol].task,
            dataset_type=DATASETS[row.score.dataset][1] or row.score.dataset,
            dataset_name=DATASETS[row.score.dataset][0],
            dataset_config=f"{row.score.label} ({who(row)})",
            metric_type=row.score.metric,
            metric_name=f"{row.score.label}: {METRICS[row.score.metric]} ({who(row)})",
            metric_value=row.score.value,
            **source(row),
        )
        for row in results.rows
    ]


def eval_files(results: Results) -> dict[str, str]:
    """File name -> content under `.eval_results/`, for the data sets that have an identifier on the Hub.

    The Hub shows an entry once the data set's repository declares the task as a benchmark; until then they are data.
    """
    entries: dict[str, list[EvalResultEntry]] = {}
    for row in results.rows:
        hub_name = DATASETS[row.score.dataset][1]
        task = f"{row.score.protocol} {row.score.setting} {row.score.metric}".replace(
            "%", "percent"
        ).replace("-", "_")
        how = f"; seed {row.seed}: {row.command}" if isinstance(row, Measured) else ""
        entry = EvalResultEntry(
            dataset_id=hub_name,
            task_id="_".join(task.split()),
            value=row.score.value,
            date=str(row.date) if isinstance(row, Measured) else None,
            notes=f"{who(row)}; {row.score.label}: {METRICS[row.score.metric]}{how}",
            **source(row),
        )
        if hub_name:
            entries.setdefault(f"{row.score.dataset}.yaml", []).append(entry)
    return {
        name: yaml.safe_dump(
            eval_result_entries_to_yaml(found), sort_keys=False, allow_unicode=True, width=1000
        )
        for name, found in entries.items()
    }


def render_card(name: str, results: Results, start: Results | None, copy: str = "") -> str:
    """The README of the model in folder `name`, refined from `start` (None for a model that is not refined).

    `copy` says how a converted copy was made and checked; with it the card stands alone, without links to its neighbours.
    """
    optional: dict[str, Any] = {"license": results.entry.licence}
    if results.base_model:
        optional |= {"base_model": results.base_model, "base_model_relation": "finetune"}
    if found := eval_results(results):
        optional |= {"model_name": name, "eval_results": found}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        datasets=["ILSVRC/imagenet-1k"],
        tags=TAGS,
        **optional,
    )
    return str(
        ModelCard.from_template(
            data,
            template_str=TEMPLATE.read_text(encoding="utf-8"),
            name=name,
            results=results,
            start=start,
            copy=copy,
            address=results.entry.url
            or f"https://huggingface.co/{results.entry.repo}/blob/main/{results.entry.filename}",
            notes=[plain(note) for note in results.notes],
            reported=groups(results.reported),
            measured=groups(results.measured),
            paper=PAPER,
            citation=fenced(CITATION, "bibtex"),
        )
    )


def render_index(models: dict[str, Results]) -> str:
    """`model_cards/README.md`: every model with the paper's headline numbers on ImageNet-1K."""
    scores = {
        name: {
            (row.score.protocol, row.score.setting, row.score.metric): row.score.value
            for row in results.reported
            if row.score.dataset == "imagenet-1k"
        }
        for name, results in models.items()
    }
    others = [name for name in ZOO if name not in {results.zoo_name for results in models.values()}]
    template = jinja2.Template(INDEX.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined)
    return template.render(models=models, scores=scores, others=others, paper=PAPER)


def write_cards(folder: Path) -> list[Path]:
    """Render every `<folder>/<model>/results.yaml` into the card and `.eval_results/` beside it, and `<folder>/README.md`.

    Returns the files, all written only once all could be rendered.

    Raises:
        FileNotFoundError: when `folder` holds no model.
        ValueError: for a `results.yaml` that is wrong, or names a starting model that has none.
    """
    found = {path.parent.name: read_results(path) for path in folder.glob("*/results.yaml")}
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no <model>/results.yaml; give the folder model_cards/ of the repository"
        )
    models = {
        name: found[name]
        for name in sorted(found, key=lambda name: list(ZOO).index(found[name].zoo_name))
    }
    texts = {folder / "README.md": render_index(models)}
    for name, results in models.items():
        start = models.get(results.starting_model or "")
        if start is None and results.starting_model:
            raise ValueError(
                f"{name}: starting_model {results.starting_model!r} has no folder; there are {', '.join(models)}"
            )
        texts[folder / name / "README.md"] = render_card(name, results, start)
        texts |= {
            folder / name / ".eval_results" / file: text
            for file, text in eval_files(results).items()
        }
    for path in set(folder.glob("*/.eval_results/*.yaml")) - texts.keys():
        path.unlink()
    for path, text in texts.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.rstrip() + "\n", encoding="utf-8")
    return list(texts)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m mim_refiner_hf.publishing.zoo_card model_cards/`; exit code 2 with one sentence for a wrong file."""
    parser = argparse.ArgumentParser(
        description="Render the cards of the zoo from their results.yaml files."
    )
    parser.add_argument("folder", type=Path, help="model_cards/ of the repository")
    try:
        files = write_cards(parser.parse_args(arguments).folder)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(files)} files written")
    return 0


__all__ = ["main", "write_cards"]

if __name__ == "__main__":
    raise SystemExit(main())
