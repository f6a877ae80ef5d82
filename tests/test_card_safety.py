"""Text of strangers in cards and reports.

Whatever it is, the metadata and the structure of the page stay the same.

The cards are read by two others: huggingface_hub (metadata) and markdown-it (structure, HTML
allowed, as on the Hub).
"""

from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

from mim_refiner_hf import MimRefinerConfig
from mim_refiner_hf.publishing.convert import Conversion, card_files
from mim_refiner_hf.publishing.model_card import CardData, update_card
from mim_refiner_hf.publishing.run_file import RunRecord
from mim_refiner_hf.runs.comparison import Side
from mim_refiner_hf.runs.report_folder import write_report
from mim_refiner_hf.runtime.text import UNSEEN, fenced, one_line, plain

NASTY = [
    "a\n---\nlicense: evil\n---\n# b",
    "---",
    "`a` ``b`` ```\n<script>x</script>\n```",
    "<script>alert(1)</script><img src=x onerror=y>",
    "{{ 7*7 }} {% for x in y %} {# z #} ${1}",
    "a | b | c\n|---|---|",
    "[a](javascript:alert(1)) ![i](https://e.vil/x.png)",
    "https://e.vil www.e.vil mailto:a@e.vil <https://e.vil>",
    "**b** _i_ ~~s~~ # h\n- l\n> q\n1. n\n    code",
    "x" * 5000 + " " + "y " * 900,
    "photo\u202egnp.exe \u2066iso\u2069 \u200bzero \ufeffmark",
    "a\u2028b\u2029c\x85d\x0be\x1b[31mred",
    "bad \udcff byte",
    "key: [1, 2]\n? x : !!python/object/apply:os.system ['id']",
    "null",
    "1e3",
    "'\"\\",
    "-->\n<!-- end of evaluation -->",
    "&#60;b&#62; &lt;b&gt;",
]
HARMLESS = "word"
METRICS = {"knn_accuracy": 0.9, "cluster_accuracy": 0.8, "nmi": 0.7, "rankme": 20.0}


def run_card(text: str) -> str:
    """The card of a run in which every name is `text`."""
    names = dict.fromkeys(("name", "eval_name", "config", "split", "fingerprint"), text)
    run: dict[str, Any] = {
        "before": METRICS,
        "after": METRICS,
        "starting_model": text,
        "dataset": {**names, "images": 9},
        "protocol": {text: text},
        "seed": 0,
        "command": text,
        "seconds": 1.0,
        "stage_seconds": {text: 1.0},
        "versions": {text: text},
        "hardware": text,
        "recipe": {"dataset": text},
        **dict.fromkeys(("verdict", "judgement", "pixels")),
    }
    return CardData(one_line(text), cast(RunRecord, run)).render(MimRefinerConfig())


def converted_card(text: str) -> str:
    done = Conversion(Path("out"), text, "0" * 64, text, 5, "float32", 0.0, 0.0, 1.0)
    return card_files(text, done, {"Family": text, "Input": text}, MimRefinerConfig())["README.md"]


def report(text: str) -> dict[str, Any]:
    """What `evaluate` returns, with every name `text`."""
    change = {"difference": 0.1, "low": 0.0, "high": 0.2, "verdict": "better"}
    names = dict.fromkeys(("name", "config", "eval_name", "fingerprint", "eval_fingerprint"), text)
    data = {**names, "eval_images": 5, "bank_images": 6, "train_images": 6}
    measured = {
        "before": METRICS,
        "after": METRICS,
        "changes": {"nmi": change},
        "dataset": data,
        "broken": [],
    }
    return {
        "model": text,
        "against": text,
        **measured,
        "transfer": {text: measured},
        "seed": 0,
        "command": text,
        "seconds": 1.0,
        "protocol": {"knn": text},
        "versions": {"torch": text},
        "fingerprints": {text: text},
        "hardware": text,
    }


def evaluated_card(text: str, folder: Path) -> str:
    """A run's card after two evaluations on the same data."""
    folder.mkdir()
    (folder / "README.md").write_text(run_card("another"), encoding="utf-8")
    update_card(folder, report(text))
    return update_card(folder, report(text)).read_text(encoding="utf-8")


def structure(markdown: str) -> list[tuple[str, str, str]]:
    """Every element in order, with what it leads to; text, and where its lines break, apart."""

    def flat(tokens: list[Token]) -> list[Token]:
        return [each for token in tokens for each in (token, *flat(token.children or []))]

    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = [
        token
        for token in flat(reader.parse(markdown))
        if token.type not in ("text", "text_special", "softbreak", "inline")
    ]
    return [(token.type, token.tag, token.attrGet("href") or token.info) for token in tokens]


def metadata(card: str) -> tuple[str, dict[str, Any], str]:
    """A card taken apart as the Hub does: (first line, metadata, text)."""
    first, block, text = card.split("---\n", 2)
    return first, yaml.safe_load(block), text


def shape(value: Any) -> Any:
    """Nested keys and types, without the texts."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    return [shape(each) for each in value] if isinstance(value, list) else type(value).__name__


@pytest.mark.parametrize("text", NASTY, ids=lambda text: ascii(text[:24]))
@pytest.mark.parametrize("kind", ["run", "converted", "evaluated"])
def test_text_of_strangers_changes_nothing_but_itself(text: str, kind: str, tmp_path: Path) -> None:
    def make(written: str, folder: str) -> str:
        if kind == "evaluated":
            return evaluated_card(written, tmp_path / folder)
        return (run_card if kind == "run" else converted_card)(written)

    card = make(text, "nasty")
    first, data, body = metadata(card)
    _, expected, harmless = metadata(make(HARMLESS, "harmless"))
    assert first == "" and shape(data) == shape(expected)
    assert data.get("license") == expected.get("license") and data["tags"] == expected["tags"]
    assert structure(body) == structure(harmless)
    assert not UNSEEN.search(card) and card.encode()
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    loaded = ModelCard.load(tmp_path / "README.md").data
    if kind != "converted":
        assert one_line(text) in {result.dataset_type for result in loaded.eval_results}


@pytest.mark.parametrize("text", NASTY, ids=lambda text: ascii(text[:24]))
def test_a_report_keeps_its_structure(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mim_refiner_hf.runs.report_folder.draw_pictures", lambda *_: ["map.png"])
    written = {}
    for which, name in (("nasty", text), ("harmless", HARMLESS)):
        side = Side(name, METRICS, {}, {"low_shot": name}, evaluation=object())  # type: ignore[arg-type, dict-item]
        write_report(tmp_path / which, report(name), [side], None)  # type: ignore[arg-type]
        written[which] = (tmp_path / which / "report.md").read_text(encoding="utf-8")
    assert structure(written["nasty"]) == structure(written["harmless"])


def test_the_check_sees_an_escape() -> None:
    """Each kind of text that is not escaped is noticed."""
    unescaped = 0
    for text in NASTY:
        unescaped += structure(f"# a\n\n{text}\n\n| b |\n|---|\n| {text} |\n") != structure(
            "# a\n\nword\n\n| b |\n|---|\n| word |\n"
        )
        assert structure(f"# a\n\n- **b:** {plain(text)}\n\n{fenced(text, 'bash')}") == structure(
            "# a\n\n- **b:** w\n\n```bash\nw\n```"
        )
    assert unescaped >= 10


def test_hidden_characters_are_spelt_out() -> None:
    assert (
        one_line("photo\u202egnp.exe") == "photo\\u202egnp.exe"
        and plain("a\u202eb") == "a&#92;u202eb"
    )
    assert one_line("été 猫 नमस्ते سلام 👩\u200d🔬") == "été 猫 नमस्ते سلام 👩\u200d🔬"
    assert one_line("bad \udcff byte") == "bad \\udcff byte"
