"""The model card: metadata that huggingface_hub reads back, both measurements, warnings, and text
that cannot break out.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from mim_refiner_hf import MimRefinerConfig
from mim_refiner_hf.publishing import CardData, write_card
from mim_refiner_hf.publishing.model_card import is_hub_name
from mim_refiner_hf.runtime.text import fenced, plain

BEFORE = {
    "knn_accuracy": 0.956,
    "cluster_accuracy": 0.793,
    "nmi": 0.77,
    "ami": 0.76,
    "ari": 0.7,
    "cluster_accuracy_mean": 0.75,
    "nmi_mean": 0.74,
    "rankme": 30.14,
    "knn_per_block": [0.8, 0.956],
}
AFTER = {
    "knn_accuracy": 0.992,
    "cluster_accuracy": 0.825,
    "nmi": 0.839,
    "ami": 0.83,
    "ari": 0.78,
    "cluster_accuracy_mean": 0.81,
    "nmi_mean": 0.82,
    "rankme": 21.0,
    "knn_per_block": [0.81, 0.992],
}
RUN: dict[str, Any] = {
    "before": BEFORE,
    "after": AFTER,
    "seed": 7,
    "command": "accelerate launch training/refine.py --seed 7",
    "seconds": 754.2,
    "stage_seconds": {"pretrain": 500.0, "warmup": 54.2, "refine": 200.0},
    "versions": {"mim_refiner_hf": "0.1.0", "torch": "2.15.0"},
    "hardware": "2 CPU cores (x86_64)",
    "starting_model": "a MAE pre-trained in this run",
    "dataset": {
        "name": "digits",
        "config": None,
        "split": "train",
        "images": 1297,
        "fingerprint": "abc123",
        "eval_name": "digits",
        "eval_images": 500,
        "num_classes": 10,
    },
    "protocol": {"knn": "k = 10, temperature 0.07, last block", "clustering": "k-means, 100 runs"},
    "recipe": {"epochs": 40, "head_blocks": None},
}


def card_of(
    tmp_path: Path, dataset: dict[str, Any] | None = None, **changes: Any
) -> tuple[ModelCard, str]:
    """The card of RUN with changes, as read back by huggingface_hub, and its text below the
    metadata.
    """
    run = tmp_path / "quickstart"
    (run / "model").mkdir(parents=True)
    content = {**RUN, "dataset": {**RUN["dataset"], **(dataset or {})}, **changes}
    (run / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
    MimRefinerConfig().save_pretrained(run / "model")
    path = write_card(run)
    assert path == run / "model" / "README.md"
    assert {file.name for file in path.parent.iterdir()} == {"README.md", "config.json"}
    card = ModelCard.load(path)
    return card, card.text


def test_metadata_reads_back(tmp_path: Path) -> None:
    card, text = card_of(
        tmp_path,
        {"name": "uoft-cs/cifar10"},
        starting_model="facebook/vit-mae-large",
        licence={"license": "cc-by-nc-4.0"},
    )
    data = card.data
    assert "- **Licence:** cc-by-nc-4.0, that of the starting weights\n" in text
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "cc-by-nc-4.0",
        "transformers",
        "image-feature-extraction",
    )
    assert (data.base_model, data.base_model_relation) == ("facebook/vit-mae-large", "finetune")
    assert data.datasets == ["uoft-cs/cifar10"] and data.model_name == "quickstart"
    assert {
        "mim-refiner",
        "masked-image-modeling",
        "self-supervised",
        "image-clustering",
        "feature-extraction",
    } == set(data.tags)


def test_local_data_and_weights_are_not_claimed_to_be_on_the_hub(tmp_path: Path) -> None:
    data = card_of(tmp_path, starting_model="/weights/mae.pth")[0].data
    assert (
        data.base_model is None
        and data.datasets is None
        and not hasattr(data, "base_model_relation")
    )
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "model").mkdir()
    assert is_hub_name("facebook/vit-mae-large")
    for name in (
        None,
        "digits",
        "photos/",
        "./photos",
        "/data/photos",
        "a/b/c",
        str(tmp_path / "my"),
    ):
        assert not is_hub_name(name), name


def test_an_existing_folder_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outputs" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name("outputs/model")


def test_model_index_holds_both_measurements(tmp_path: Path) -> None:
    card, _ = card_of(tmp_path)
    by_name = {
        (result.dataset_name, result.metric_type): result for result in card.data.eval_results
    }
    scalars = [name for name in BEFORE if name != "knn_per_block"]
    assert len(by_name) == 2 * len(scalars)
    for name in scalars:
        assert by_name["digits", name].metric_value == pytest.approx(AFTER[name])
        assert by_name["digits (starting weights)", name].metric_value == pytest.approx(
            BEFORE[name]
        )
        assert "starting weights" in by_name["digits (starting weights)", name].metric_name
        assert "starting weights" not in by_name["digits", name].metric_name
    index = card.data.to_dict()["model-index"]
    assert [result["dataset"]["name"] for result in index[0]["results"]] == [
        "digits",
        "digits (starting weights)",
    ]


def test_text_states_evidence_and_how_to_repeat_it(tmp_path: Path) -> None:
    _, text = card_of(tmp_path)
    for row in (
        "| k-NN accuracy (k=10) | 95.6 % | 99.2 % | +3.6 points |",
        "| RankMe (falls in good runs too; near 0 = collapse) | 30.1 | 21.0 | -9.1 |",
        "| 1 | 95.6 % | 99.2 % |",
        "- **knn:** k = 10, temperature 0.07, last block",
        "digits, split train, 1297 images (fingerprint abc123)",
        "digits (500 images, 10 classes)",
        "```bash\naccelerate launch training/refine.py --seed 7\n```",
        "- **Seed:** 7",
        "- **Time:** 12.6 min (pretrain 8.3 min, warmup 54 s, refine 3.3 min)",
        "- **Hardware:** 2 CPU cores (x86_64)",
        "mim_refiner_hf 0.1.0, torch 2.15.0",
        '"head_blocks": null',
        "trust_remote_code=True",
        "{{MIM-Refiner: A Contrastive Learning Boost",
        "2402.10093",
    ):
        assert row in text, row
    assert "Warning" not in text and "pre-trained in this very run" in text
    assert "- **Licence:** not known: none was chosen for these weights, which were" in text
    assert "\n\n\n" not in text


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"after": {**AFTER, "nmi": 0.77}}, "this run did NOT improve: NMI."),
        (
            {"after": {**AFTER, "knn_accuracy": 0.9, "cluster_accuracy": 0.7}},
            "NOT improve: k-NN accuracy (k=10), cluster accuracy.",
        ),
        ({"before": {"rankme": 3.0}, "after": {"rankme": 4.0}}, "No labels were available"),
        ({"before": None}, "The starting weights were not evaluated"),
        ({"before": None, "after": None}, "This model was not evaluated"),
    ],
)
def test_weak_evidence_is_said_at_the_top(
    tmp_path: Path, changes: dict[str, Any], warning: str
) -> None:
    _, text = card_of(tmp_path, **changes)
    assert warning in text[: text.index("A vision transformer")]


def test_one_sided_and_missing_measurements(tmp_path: Path) -> None:
    card, text = card_of(tmp_path / "one", before=None)
    assert "| NMI | - | 83.9 % | - |" in text and "per block" not in text
    assert {result.dataset_name for result in card.data.eval_results} == {"digits"}
    card, text = card_of(tmp_path / "none", before=None, after=None)
    assert "None: no evaluation was run." in text and card.data.eval_results is None


def test_text_from_data_cannot_break_out(tmp_path: Path) -> None:
    evil = (
        "a](http://e.vil) <script>x</script> | `b` **c**\n---\n# {{ seed }} www.e.vil _d_ ![i](x)"
    )
    changes = {
        "hardware": evil,
        "starting_model": evil,
        "protocol": {evil: evil},
        "versions": {evil: evil},
    }
    dataset = dict.fromkeys(("name", "eval_name", "config", "fingerprint"), evil)
    card, text = card_of(tmp_path, dataset, command="echo\n```\n<b>", **changes)
    assert card.data.eval_results[0].dataset_type == " ".join(evil.split())
    body = text.replace(fenced("echo\n```\n<b>", "bash"), "")
    for raw in (
        "<script",
        "http://e",
        "www.e",
        "**c**",
        "`b`",
        "![i]",
        "](http:",
        "{{ seed",
        "\n# &#",
        " _d_ ",
    ):
        assert raw not in body, raw
    assert "````bash\necho\n```\n<b>\n````" in text
    assert body.count("\n---\n") == 0 and body.count("\n# ") == 1


def test_escaped_text_shows_as_written() -> None:
    text = "café_1 <b> [x](https://a.b) www.c.d _e_ #f"
    escaped = plain(text)
    assert re.sub(r"&#(\d+);", lambda match: chr(int(match[1])), escaped) == text
    assert plain("mim_refiner_hf 0.1.0 (x86_64): 3/4") == "mim_refiner_hf 0.1.0 (x86_64): 3/4"


def test_unfinished_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"metrics\.json does not exist; give the output folder of a finished run",
    ):
        CardData.from_run(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        CardData.from_run(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({**RUN, "seed": None, "command": None}))
    with pytest.raises(ValueError, match="lacks seed, command"):
        CardData.from_run(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps(RUN))
    with pytest.raises(FileNotFoundError, match="model does not exist"):
        write_card(tmp_path)


def test_raw_pixels_stand_below_the_table_where_they_were_measured(tmp_path: Path) -> None:
    _, text = card_of(tmp_path, pixels={"knn_accuracy": 0.972, "nmi": 0.74})
    assert "Raw pixels, by the same protocol: k-NN accuracy (k=10) 97.2 %, NMI 74.0 %." in text
    assert "Raw pixels" not in card_of(tmp_path / "without")[1]
