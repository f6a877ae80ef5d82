"""The licence of weights: found once, on every card of what is made of them, asked for where it is
not known. Cards are read back with huggingface_hub.
"""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from test_convert import mae_file
from transformers import ViTMAEModel

from mim_refiner_hf import RefineRecipe, load_encoder
from mim_refiner_hf.cli import main
from mim_refiner_hf.conversion.licence import UNKNOWN, Licence, licence_beside, saved_licence
from mim_refiner_hf.conversion.zoo import ZOO
from mim_refiner_hf.publishing import hub
from mim_refiner_hf.publishing.convert import convert
from mim_refiner_hf.publishing.export import export
from mim_refiner_hf.runs.refine import refine
from mim_refiner_hf.runs.run import run

Recipes = Callable[..., RefineRecipe]

KEYS = ("license", "license_name", "license_link")
HOUSE = {"license": "other", "license_name": "house licence 1.0", "license_link": "LICENSE"}


def stated(folder: Path) -> dict[str, str]:
    """The licence in the metadata of a folder's card."""
    data = ModelCard.load(folder / "README.md").data.to_dict()
    return {key: data[key] for key in KEYS if key in data}


def licensed(folder: str | Path, copy: Path, metadata: dict[str, str]) -> Path:
    """A copy of a model folder whose card states a licence."""
    shutil.copytree(folder, copy)
    lines = [f"{key}: {value}\n" for key, value in metadata.items()]
    (copy / "README.md").write_text(f"---\n{''.join(lines)}---\n\n# A start\n", encoding="utf-8")
    return copy


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks the Hub for anything fails the test."""

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(hub, "_upload", asked)


# --- chains


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_licence_with_name_and_link_survives_every_step(
    models: dict[str, str], recipe: Recipes, tmp_path: Path
) -> None:
    """Start -> convert -> refine -> refine -> every twin -> convert of the twin."""
    start = licensed(models["vit_mae"], tmp_path / "start", HOUSE)
    convert(start, tmp_path / "converted")
    refine(recipe("first", model=str(tmp_path / "converted"), max_steps=1))
    refine(recipe("second", model=str(tmp_path / "first" / "model"), max_steps=1))
    for to in ("timm", "vit", "onnx"):
        export(tmp_path / "second" / "model", tmp_path / to, to)
    convert(tmp_path / "timm", tmp_path / "back")

    for name in ("converted", "first/model", "second/model", "timm", "vit", "onnx", "back"):
        folder = tmp_path / name
        assert stated(folder) == HOUSE, name
        text = ModelCard.load(folder / "README.md").text
        assert "- **Licence:** other (house licence 1.0, LICENSE), that of" in text, name


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_where_none_is_known_every_card_says_so(
    models: dict[str, str], recipe: Recipes, tmp_path: Path
) -> None:
    convert(models["vit_mae"], tmp_path / "converted")
    refine(recipe("refined", model=models["vit_mae"], max_steps=1))
    export(models["vit_mae"], tmp_path / "timm", "timm")
    for name in ("converted", "refined/model", "timm"):
        assert stated(tmp_path / name) == {}
        assert "- **Licence:** not known: " in ModelCard.load(tmp_path / name / "README.md").text


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_run_that_starts_from_a_checkpoint_has_the_licence_of_its_start(
    models: dict[str, str], recipe: Recipes, tmp_path: Path
) -> None:
    start = licensed(models["vit_mae"], tmp_path / "start", {"license": "cc-by-nc-4.0"})
    run(recipe("old", model=str(start), max_steps=2))
    # the run needs its start no more
    shutil.rmtree(start)
    refine(recipe("new", model=None, init_from=str(tmp_path / "old"), head_blocks=None))
    assert stated(tmp_path / "new" / "model") == {"license": "cc-by-nc-4.0"}


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_users_word_counts_where_the_start_has_none(
    models: dict[str, str], recipe: Recipes, tmp_path: Path
) -> None:
    refine(recipe("refined", model=models["vit_mae"], max_steps=1, license="mit"))
    convert(models["vit_mae"], tmp_path / "converted", license="mit")
    assert stated(tmp_path / "refined" / "model") == {"license": "mit"}
    assert stated(tmp_path / "converted") == {"license": "mit"}


# --- where it is found


def test_a_name_of_the_zoo_has_the_licence_of_its_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = mae_file(tmp_path / "mae.pth")
    monkeypatch.setattr("mim_refiner_hf.conversion.read.fetch", lambda _: file)
    convert("mae-b16", tmp_path / "base", num_heads=2)
    convert("mae-l16", tmp_path / "carded", num_heads=2)
    assert ZOO["mae-b16"].licence == "cc-by-nc-4.0"
    assert stated(tmp_path / "base") == stated(tmp_path / "carded") == {"license": "cc-by-nc-4.0"}


def test_a_bare_file_has_none_though_a_card_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert load_encoder(mae_file(tmp_path / "mae.pth"), num_heads=2).licence == UNKNOWN


def test_the_card_of_a_hub_model_comes_along_and_its_link_gets_an_address(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = licensed(models["vit_mae"], tmp_path / "cache", HOUSE)

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert "README.md" in allow_patterns
        return str(cache)

    monkeypatch.setattr("mim_refiner_hf.conversion.read.snapshot_download", snapshot)
    assert load_encoder("someone/mae").licence == Licence(
        "other", "house licence 1.0", "https://huggingface.co/someone/mae/blob/main/LICENSE"
    )


def test_model_objects_have_the_licence_of_what_they_were_loaded_from(
    models: dict[str, str], tmp_path: Path
) -> None:
    start = licensed(models["vit_mae"], tmp_path / "start", {"license": "cc-by-nc-4.0"})
    theirs = load_encoder(ViTMAEModel.from_pretrained(start))
    assert theirs.licence == load_encoder(theirs).licence == Licence("cc-by-nc-4.0")

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    model.pretrained_cfg["license"] = "apache-2.0"
    assert load_encoder(model).licence == Licence("apache-2.0")


# --- cards of strangers

# each list holds the one before it twice
BOMB = "b0: &b0 [x, x]\n" + "".join(f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, 99))


@pytest.mark.parametrize(
    ("front", "found", "warns"),
    [
        ("license: mit", Licence("mit"), False),
        ("license: [cc-by-nc-4.0]", Licence("cc-by-nc-4.0"), False),
        (
            "license_name: x\nlicense_link: https://a.b/c",
            Licence("other", "x", "https://a.b/c"),
            False,
        ),
        ("tags: [x]", UNKNOWN, False),
        ("license: null", UNKNOWN, False),
        ("license:", UNKNOWN, False),
        # what has not the form of a licence
        ("license: [mit, apache-2.0]", UNKNOWN, True),
        ("license: {a: b}", UNKNOWN, True),
        ('license: "mit](http://e.vil)"', UNKNOWN, True),
        (f"license: {'a' * 5000}", UNKNOWN, True),
        ("license: other\nlicense_link: javascript:alert(1)", Licence("other"), True),
        # what is no metadata
        ("license: mit\nx: [", UNKNOWN, True),
        ("- license: mit", UNKNOWN, False),
        ("license: mit\nx: " + "[" * 5000 + "]" * 5000, UNKNOWN, True),
        ("license: mit\n" + "x: 1\n" * 100_000, UNKNOWN, True),
        # what a loader with tags would obey; here it is text that nobody looks at
        ("license: mit\nx: !!python/object/apply:os.system [ls]", Licence("mit"), False),
        ("license: mit\n" + BOMB, Licence("mit"), False),
    ],
)
def test_a_card_of_a_stranger(
    front: str, found: Licence, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n\n# A card\n", encoding="utf-8")
    began = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        assert licence_beside(tmp_path) == found
    assert time.perf_counter() - began < 20
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == warns
    assert all("README.md: its " in text and "\n" not in text for text in messages)


@pytest.mark.parametrize(
    "content", [b"", b"# A card\nlicense: mit\n", b"---\n\xff\xfe: \x00", b"\x89PNG"]
)
def test_a_card_without_metadata(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(content)
    assert licence_beside(tmp_path) == UNKNOWN
    assert saved_licence(str(tmp_path / "nowhere")) == saved_licence("") == UNKNOWN


def test_a_hostile_name_cannot_break_out_of_a_card(models: dict[str, str], tmp_path: Path) -> None:
    evil = "'<script>x</script> [a](http://e.vil) ![i](x)'"
    start = licensed(models["vit_mae"], tmp_path / "s", {**HOUSE, "license_name": evil})
    convert(start, tmp_path / "c")
    export(start, tmp_path / "t", "timm")
    for name in ("c", "t"):
        text = ModelCard.load(tmp_path / name / "README.md").text
        assert not any(raw in text for raw in ("<script", "http://e", "![i]")), text
        assert stated(tmp_path / name)["license_name"] == evil.strip("'")


# --- publishing

ASKS = "states no licence, and to be published it needs one: ask its authors and give --license "


@pytest.mark.usefixtures("quick", "no_hub")
def test_publishing_asks_before_any_work(
    models: dict[str, str], cifar: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models["vit_mae"]
    convert(model, tmp_path / "model")
    out = tmp_path / "out"
    for command in (
        ["push", str(tmp_path / "model"), "tester/tiny"],
        ["convert", model, str(out), "--push", "tester/tiny"],
        ["refine", cifar, "--model", model, "--output_dir", str(out), "--push_to_hub", "tester/x"],
    ):
        assert main(command) == 2, command
        errors = capsys.readouterr().err.strip().splitlines()
        assert len([line for line in errors if line.startswith("error: ")]) == 1
        assert ASKS in errors[-1], errors
        assert not out.exists() or not list(out.iterdir())


@pytest.mark.usefixtures("quick", "no_hub")
def test_weights_trained_from_nothing_are_asked_for_a_licence_too(
    recipe: Recipes, tmp_path: Path
) -> None:
    asked = recipe("out", model=None, pretrain="pretrain-digits", push_to_hub="tester/x")
    with pytest.raises(ValueError, match=r"what pretrain='pretrain-digits' trains states no lic"):
        refine(asked)


def test_another_licence_than_the_weights_is_refused(
    models: dict[str, str], recipe: Recipes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = licensed(models["vit_mae"], tmp_path / "start", {"license": "cc-by-nc-4.0"})
    refusal = r"license='mit': .*start is under cc-by-nc-4.0, and so is .*; leave license out"
    with pytest.raises(ValueError, match=refusal):
        convert(start, tmp_path / "c", license="mit")
    with pytest.raises(ValueError, match=refusal):
        refine(recipe("out", model=str(start), license="mit"))
    assert main(["push", str(start), "tester/x", "--license", "mit"]) == 2
    assert "error: --license mit: " in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"license='My own!': must be an identifier of the Hub"):
        convert(models["vit_mae"], tmp_path / "c", license="My own!")
    # the same one is no contradiction
    convert(start, tmp_path / "c", license="cc-by-nc-4.0")


@pytest.mark.parametrize("card", ["converted", "none", "foreign"])
def test_push_puts_the_users_licence_into_the_card(
    card: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    convert(models["vit_mae"], model)
    if card == "none":
        (model / "README.md").unlink()
    elif card == "foreign":
        (model / "README.md").write_text("---\ntags:\n- mine\n---\n\n# My words\n")
    sent = []
    monkeypatch.setattr(
        hub, "_upload", lambda folder, *_: sent.append(stated(folder)) or "https://hub/x"
    )
    assert main(["push", str(model), "tester/x", "--license", "cc-by-4.0"]) == 0
    assert sent == [{"license": "cc-by-4.0"}] and load_encoder(model).licence == Licence(
        "cc-by-4.0"
    )

    loaded = ModelCard.load(model / "README.md")
    assert "not known" not in loaded.text
    if card == "foreign":
        assert loaded.data.tags == ["mine"] and "# My words" in loaded.text
    if card == "converted":
        assert "- **Licence:** cc-by-4.0, as who published it states" in loaded.text


def test_push_does_not_write_over_a_card_that_it_cannot_read(
    models: dict[str, str], tmp_path: Path, no_hub: None
) -> None:
    model = tmp_path / "model"
    convert(models["vit_mae"], model)
    (model / "README.md").write_text("---\nlicense: [\n---\n\n# My words\n")
    with pytest.raises(ValueError, match=r"README.md: its metadata cannot be read .* mend it"):
        hub.push_folder(model, "tester/x", license="mit")
    assert "# My words" in (model / "README.md").read_text()


def test_weights_stay_the_same(models: dict[str, str], tmp_path: Path) -> None:
    """A card beside the weights changes nothing about them."""
    start = licensed(models["vit_mae"], tmp_path / "start", HOUSE)
    ours = load_encoder(start).state_dict()
    plain = load_encoder(models["vit_mae"]).state_dict()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
