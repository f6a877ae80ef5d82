"""The zoo's cards: rendered from results.yaml byte for byte, true to the paper's tables, strict,
and clear about who found what.
"""

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from mim_refiner_hf import MimRefinerConfig
from mim_refiner_hf.conversion.zoo import ZOO, ZOO_ENTRIES, find_entry
from mim_refiner_hf.publishing.convert import Conversion, card_files, find_zoo_card
from mim_refiner_hf.publishing.ways_to_use import ways_to_use
from model_cards.render import main, write_cards
from model_cards.results import DATASETS, Results, read_results

CARDS = Path(__file__).resolve().parents[1] / "model_cards"
MODELS = sorted(path.parent.name for path in CARDS.glob("*/results.yaml"))
IN_THE_PAPER = [
    name for name in MODELS if not re.match(r"dbot|crossmae|mae-reimpl|mae-ct-(aug|\w16)", name)
]
OF_MAE_CT = [name for name in MODELS if name.startswith(("mae-ct", "mae-reimpl"))]
MEASURED = {
    "protocol": "knn",
    "setting": "last block",
    "dataset": "imagenet-1k",
    "metric": "accuracy",
    "value": 81.4,
    "command": "mim-refiner evaluate x | tee <log>",
    "date": "2025-01-31",
    "seed": 0,
}


def copy_of(tmp_path: Path, models: list[str]) -> Path:
    """The results.yaml of some models in a folder of their own, without anything rendered."""
    for name in models:
        (tmp_path / name).mkdir()
        shutil.copyfile(CARDS / name / "results.yaml", tmp_path / name / "results.yaml")
    return tmp_path


def edit(path: Path, **changes: object) -> None:
    """Change keys of a results.yaml; `measured` rows get a real date, as YAML reads one."""
    path.write_text(
        yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}).replace(
            "'2025-01-31'", "2025-01-31"
        )
    )


def files_of(folder: Path) -> set[Path]:
    """The cards and numbers in a folder, without the program beside them."""
    return {
        path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".md", ".yaml")
    }


def test_every_card_is_what_its_numbers_render_to(tmp_path: Path) -> None:
    """Also nothing else lies there: no card without numbers, no leftover."""
    assert len(MODELS) == 16 + len(OF_MAE_CT) == 27
    write_cards(copy_of(tmp_path, MODELS))
    fresh = files_of(tmp_path)
    assert files_of(CARDS) == fresh
    for path in fresh:
        assert (CARDS / path).read_bytes() == (tmp_path / path).read_bytes(), (
            f"{path}: run `make cards`"
        )


@pytest.mark.parametrize("name", MODELS)
def test_the_metadata_read_back(name: str) -> None:
    """huggingface_hub finds every number in the model-index, with its source, and the same ones of
    known data sets in .eval_results.
    """
    results = read_results(CARDS / name / "results.yaml")
    data = ModelCard.load(CARDS / name / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "transformers",
        "image-feature-extraction",
        results.entry.licence,
    )
    index = [
        (found.metric_type, found.metric_value, found.dataset_config, found.source_name)
        for found in data.eval_results or []
    ]
    expected = [
        (
            row.score.metric,
            row.score.value,
            f"{row.score.label} (reported by the {'authors' if row.stated else 'paper'})",
            row.source if row.stated else f"MIM-Refiner, {row.source}",
        )
        for row in results.reported
    ]
    assert Counter(index) == Counter(expected)
    for path in (CARDS / name / ".eval_results").glob("*.yaml"):
        entries = parse_eval_result_entries(yaml.safe_load(path.read_text()))
        rows = [row for row in results.reported if row.score.dataset == path.stem]
        assert {entry.dataset_id for entry in entries} == {DATASETS[path.stem][1]}
        assert [entry.value for entry in entries] == [row.score.value for row in rows]
        assert len({entry.task_id for entry in entries}) == len(entries)
        for entry, row in zip(entries, rows, strict=True):
            place = "github.com/ml-jku/MAE-CT" if row.stated else "arxiv.org/abs/2402.10093"
            assert place in str(entry.source_url)
            assert f"reported by the {'authors' if row.stated else 'paper'}" in str(entry.notes)


@pytest.mark.parametrize("name", MODELS)
def test_a_card_names_what_exists(name: str) -> None:
    results = read_results(CARDS / name / "results.yaml")
    text = (CARDS / name / "README.md").read_text()
    assert (
        f"mim-refiner convert {name} out/{name}" in text
        and str(results.entry.url or results.entry.repo) in text
    )
    if results.starting_model:
        recipe = CARDS.parent / "training" / "recipes" / f"{name}.yaml"
        assert recipe.is_file() and f"--recipe {name}" in text
        start = read_results(CARDS / results.starting_model / "results.yaml")
        assert start.entry.architecture == results.entry.architecture
        assert start.starting_model is None
    for link in re.findall(r"\]\((\.\./[^)]+)\)", text):
        assert (CARDS / name / link).is_file(), link


# --- true to the paper ----------------------------------------------------------------------------


def printed(paper: str, table: int, name: str) -> list[float]:
    """The numbers that a table prints for a model, in its rows as the text shows them (Table 13
    without its column of differences).
    """
    lines = paper.splitlines()
    end = next(
        number for number, line in enumerate(lines) if line.startswith(f"**Table {table}:**")
    )
    start = max(
        number for number in range(end) if lines[number].strip() and "\t" not in lines[number]
    )
    rows = [
        [re.sub(r"</?\w+>| \[[\d, ]+\]", "", cell).strip() for cell in line.split("\t")]
        for line in lines[start + 1 : end]
        if "\t" in line
    ]
    method, _, size = name.rpartition("-")
    arch = {"l16": "L/16", "h14": "H/14", "2b14": "2B/14"}[size]
    methods = {"d2v2": {"data2vec 2.0", "D2V2"}, "mae-ct": {"MAE-CT"}}.get(
        method, {method.upper().replace("REFINED", "Refined")}
    )
    found, group = [], ""
    for first, *rest in rows:
        # tables 2, 3 and 9 print the size once for several rows
        group = first if re.fullmatch(r"\w+/\d+", first) else group
        cells = [cell for cell in rest if re.fullmatch(r"-?\d+\.\d", cell)]
        cells = cells[:2] if table == 13 else cells
        if table == 5 and first in methods:
            found += {"L/16": cells[:2], "H/14": cells[2:]}.get(arch, [])
        elif table in (2, 3, 9) and rest[0] in methods:
            found += cells if group == arch else []
        elif first in methods and rest[0] == ("✓" if table == 7 else arch):
            found += cells if table != 7 or arch == "H/14" else []
    return [float(cell) for cell in found]


@pytest.mark.parametrize("name", IN_THE_PAPER)
def test_every_number_is_the_papers(name: str, shared: Path) -> None:
    """Table by table: all that a table prints for this model, and nothing that it does not."""
    (paper,) = [path.read_text() for path in (shared / "papers").glob("002_*.txt")]
    results = read_results(CARDS / name / "results.yaml")
    for table in (2, 3, 4, 5, 7, 8, 9, 13):
        ours = [float(row.score.value) for row in results.reported if table in row.tables]
        assert Counter(ours) == Counter(printed(paper, table, name)), f"Table {table}"
    assert len(results.reported) >= (9 if name in OF_MAE_CT else 30)


def test_the_papers_two_numbers_for_one_score() -> None:
    """A sentence says 64.7, the tables 64.2: the tables are followed, and the card says so."""
    results = read_results(CARDS / "d2v2-refined-h14" / "results.yaml")
    (shot,) = [
        row
        for row in results.reported
        if (row.score.protocol, row.score.setting) == ("low-shot-logistic", "1-shot")
    ]
    assert shot.score.value == 64.2 and not any(row.score.value == 64.7 for row in results.reported)
    assert "prints 64.7" in (CARDS / "d2v2-refined-h14" / "README.md").read_text()


# README of ml-jku/MAE-CT, by size: linear probe and k-NN of the start, of MAE-CT, of MAE-CT_aug
README_OF_MAE_CT = {
    "b16": ((66.7, 51.1), (73.5, 64.1), (76.9, 73.4)),
    "l16": ((75.9, 60.6), (80.2, 78.0), (81.5, 79.1)),
    "h16": ((78.0, 61.1), (81.5, 79.4), (82.2, 79.8)),
    "h14": (None, (81.3, 79.1), (82.0, 78.9)),
}


@pytest.mark.parametrize("name", OF_MAE_CT)
def test_numbers_of_mae_ct_are_those_of_its_readme(name: str) -> None:
    """The start of ViT-H/14 is MAE's own, whose card has MIM-Refiner's numbers."""
    method, _, size = name.rpartition("-")
    place = ("mae-reimpl", "mae-ct", "mae-ct-aug").index(method)
    results = read_results(CARDS / name / "results.yaml")
    stated = {row.score.protocol: row.score.value for row in results.reported if row.stated}
    probe, knn = README_OF_MAE_CT[size][place] or ()
    assert stated == {"linear-probe-maect": probe, "knn": knn}
    if results.starting_model:
        text = (CARDS / name / "README.md").read_text()
        assert ("change colours" in text) == (method == "mae-ct-aug")
        assert "lehner2023contrastive" in text and "arxiv.org/abs/2304.10520" in text


# --- reported and measured ------------------------------------------------------------------------


def test_the_two_kinds_never_mix(tmp_path: Path) -> None:
    """The same score by the paper and by us.

    Two tables, two entries of the model-index, two sources; nothing runs together.
    """
    folder = copy_of(tmp_path, ["mae-l16", "mae-refined-l16"])
    edit(folder / "mae-refined-l16" / "results.yaml", measured=[MEASURED])
    write_cards(folder)
    text = (folder / "mae-refined-l16" / "README.md").read_text()
    paper, ours = text.split("\n## Reported by the paper\n")[1].split("\n## Measured by us\n")
    assert "| 81.5 | Tables 2, 13 |" in paper and "81.4" not in paper
    ours = ours.split("\n## ")[0]
    assert "| 81.4 | 2025-01-31, seed 0: mim-refiner evaluate x &#124; tee &#60;log&#62; |" in ours
    assert "81.5" not in ours and "Table" not in ours
    index = ModelCard.load(folder / "mae-refined-l16" / "README.md").data.eval_results or []
    both = {
        (found.metric_value, found.source_name, found.dataset_config)
        for found in index
        if found.metric_value in (81.4, 81.5)
    }
    assert (81.4, None, "k-NN, last block (measured by us)") in both
    assert (81.5, "MIM-Refiner, Tables 2, 13", "k-NN, last block (reported by the paper)") in both
    entries = parse_eval_result_entries(
        yaml.safe_load(
            (folder / "mae-refined-l16" / ".eval_results" / "imagenet-1k.yaml").read_text()
        )
    )
    (mine,) = [entry for entry in entries if entry.value == 81.4]
    assert (
        mine.source_url is None
        and mine.date == "2025-01-31"
        and str(mine.notes).startswith("measured by us")
    )


REPORTED = {
    "tables": [2],
    "protocol": "knn",
    "setting": "last block",
    "dataset": "imagenet-1k",
    "metric": "accuracy",
    "value": 1.0,
}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"score": 3}, "unknown key score in results; allowed: name,"),
        ({"name": "mae-l16"}, "the name is that of the folder; leave it out"),
        ({"notes": "one"}, "notes 'one' must be a list"),
        ({"reported": 3}, "must be lists of rows, found 3"),
        (
            {"reported": ["k-NN 81.5"]},
            "reported, row 1: expected the fields of reported, found 'k-NN 81.5'",
        ),
        (
            {"reported": [REPORTED, REPORTED]},
            "there are two values for knn, last block, imagenet-1k, accuracy",
        ),
        (
            {"reported": [{**REPORTED, "seed": 0}]},
            "reported, row 1: unknown key seed in reported; allowed: score, tables",
        ),
        (
            {"reported": [{**REPORTED, "tables": [1]}]},
            r"tables \(1,\) must be a list of some of 2, 3, 4",
        ),
        ({"reported": [{**REPORTED, "tables": 2}]}, "tables 2 must be a list"),
        ({"reported": [{**REPORTED, "tables": []}]}, r"tables \(\) must be a list of some of"),
        (
            {"reported": [{**REPORTED, "stated": "blog"}]},
            "stated 'blog' is unknown; allowed: maect-readme",
        ),
        (
            {"reported": [{**REPORTED, "protocol": "knn20"}]},
            "protocol 'knn20' is unknown; allowed: knn, knn-tuned",
        ),
        (
            {"reported": [{**REPORTED, "setting": "1-shot"}]},
            "setting '1-shot' is none of knn; allowed: 'last block'",
        ),
        ({"reported": [{**REPORTED, "dataset": "imagenet"}]}, "dataset 'imagenet' is unknown"),
        ({"reported": [{**REPORTED, "metric": ["nmi"]}]}, r"metric \('nmi',\) is unknown"),
        ({"reported": [{**REPORTED, "value": "81.5"}]}, "value '81.5' is not a number"),
        ({"measured": [{**MEASURED, "tables": [2]}]}, "unknown key tables in measured"),
        ({"measured": [REPORTED]}, "measured, row 1: unknown key tables"),
        ({"measured": [{**MEASURED, "command": " "}]}, "command ' ' must be the command line"),
        (
            {"measured": [{**MEASURED, "seed": None}]},
            "seed None must be a date such as 2025-01-31 and an integer",
        ),
        (
            {"measured": [{key: value for key, value in MEASURED.items() if key != "date"}]},
            "date missing in measured",
        ),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = copy_of(tmp_path, ["mae-refined-l16"]) / "mae-refined-l16" / "results.yaml"
    assert isinstance(read_results(path), Results)
    edit(path, **changes)
    with pytest.raises(ValueError, match=f"results.yaml: .*{message}"):
        read_results(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("reported: [", "results.yaml: while parsing"),
        ("- 1", "found"),
        ("{}", "reported, measured missing"),
    ],
)
def test_what_is_no_results_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "results.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_results(path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence and exit code 2 for what is wrong, and then nothing is written."""
    assert main([str(tmp_path)]) == 2 and "holds no <model>/results.yaml" in capsys.readouterr().err
    folder = copy_of(tmp_path, ["mae-h14", "mae-refined-h14"])
    edit(folder / "mae-refined-h14" / "results.yaml", starting_model="mae-g14")
    assert main([str(folder)]) == 2
    assert "mae-refined-h14: starting_model 'mae-g14' has no folder" in capsys.readouterr().err
    assert not list(folder.rglob("README.md"))
    edit(folder / "mae-refined-h14" / "results.yaml", starting_model="mae-h14")
    leftover = folder / "mae-h14" / ".eval_results" / "old.yaml"
    leftover.parent.mkdir()
    leftover.write_text("[]")
    assert (
        main([str(folder)]) == 0 and "9 files" in capsys.readouterr().out and not leftover.exists()
    )


# --- converted copies


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_copy_has_the_card_under_its_own_name(name: str) -> None:
    results = read_results(CARDS / name / "results.yaml")
    assert find_zoo_card(results.name) == CARDS / name
    done = Conversion(Path("out"), results.name, None, "all placed", 5, "float32", 0, 0, 1)
    config = MimRefinerConfig()
    files = card_files("my-copy", done, {"Shape": "24 blocks"}, config)

    card = ModelCard(files.pop("README.md"))
    shipped = ModelCard.load(CARDS / name / "README.md")
    assert card.data.model_name == ("my-copy" if shipped.data.eval_results else None)
    assert card.data.eval_results == shipped.data.eval_results
    assert "\n## This copy\n\n- **Shape:** 24 blocks\n" in card.text and "<!--" not in card.text
    assert f"convert {name} my-copy " in card.text and "](../" not in card.text
    # the snippets are its own, with the formats that its encoder can take
    assert ways_to_use("my-copy", config, local=True) in card.text
    assert f"out/{name}" not in card.text

    kept = {f".eval_results/{path.name}" for path in (CARDS / name / ".eval_results").glob("*")}
    assert files.keys() == kept
    assert all((CARDS / name / file).read_text() == text for file, text in files.items())


# of this package before, which are those of the authors' torch hub
FORMER_NAMES = {
    "mae_refined_twob14": "mae-refined-2b14",
    "d2v2_refined_h14": "d2v2-refined-h14",
    "dbot_refined_l16": "dbot-refined-l16",
    "crossmae_refined_l16": "crossmae-refined-l16",
    "maect_base16": "mae-ct-b16",
    "maectaug_huge14": "mae-ct-aug-h14",
    "maectaug-h16": "mae-ct-aug-h16",
    "mae_reimpl_large16": "mae-reimpl-l16",
    "mae_base16": "mae-b16",
    "mae_twob14": "mae-2b14",
    "data2vec2_large16": "d2v2-l16",
    "data2vec2-h14": "d2v2-h14",
    "dbot_huge14": "dbot-h14",
    "crossmae_large16": "crossmae-l16",
    "capi_vitl14_in22k": "capi-l14-in22k",
}


def test_every_spelling_of_a_name_is_that_model() -> None:
    """What a user types, and what authors and earlier versions called it: one model each."""
    for entry in ZOO_ENTRIES:
        name = entry.name
        for spelling in (name, name.replace("_", "-"), name.replace("-", "_"), name.upper()):
            assert find_entry(spelling) is entry, spelling
    for old, name in FORMER_NAMES.items():
        assert find_entry(old) is ZOO[name], old
        assert find_entry(old.replace("_", "-")) is ZOO[name], old
    assert find_entry("mae-refined-l") is None and find_entry("resnet50") is None


def test_a_folder_with_a_name_of_the_zoo_is_no_official_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_encoder` takes the folder, so its card must not claim the paper's numbers."""
    assert find_zoo_card("mae-l16") is not None and find_zoo_card("mae-b16") is None
    monkeypatch.chdir(tmp_path)
    Path("mae-l16").mkdir()
    assert find_zoo_card("mae-l16") is None
