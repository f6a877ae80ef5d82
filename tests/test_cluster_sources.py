"""`cluster` of a feature store, resumed, without a model, and with one that does not suit."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_store import COUNT, make_encoder, make_processor, write_photos

from mim_refiner_hf import cli, cluster
from mim_refiner_hf.evaluation import FeatureStore
from mim_refiner_hf.evaluation import embed as embedding
from mim_refiner_hf.publishing import save_model_folder
from mim_refiner_hf.runs import cluster_features
from mim_refiner_hf.runs.cluster_model import DEFAULT_MODEL


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = write_photos(tmp_path)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model_folder(tmp_path / "model", make_encoder(), make_processor())
    return tmp_path / "model"


@pytest.fixture
def store(photos: Path, model: Path, tmp_path: Path) -> Path:
    words = ["embed", str(photos), "--model", str(model), "--out", str(tmp_path / "features")]
    assert cli.main(words) == 0
    return tmp_path / "features"


def rows(folder: Path, name: str = "groups.csv") -> list[dict[str, str]]:
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def group(images: Path, out: Path, *more: str) -> int:
    return cli.main(["cluster", str(images), "--num_clusters", "3", "--out", str(out), *more])


# --- a feature store ------------------------------------------------------------------------------


def test_a_store_gives_the_groups_of_its_images(
    store: Path, photos: Path, model: Path, tmp_path: Path
) -> None:
    assert group(photos, tmp_path / "a", "--model", str(model)) == 0
    assert group(store, tmp_path / "b") == 0
    one, two = (rows(tmp_path / name) for name in "ab")
    assert [row["path"] for row in one] == [row["path"] for row in two]
    assert [row["cluster"] for row in one] == [row["cluster"] for row in two]
    assert "broken.png" in rows(tmp_path / "b", "broken.csv")[0]["path"]
    assert (tmp_path / "b" / "index.html").is_file()
    opened = cluster(FeatureStore(store), num_clusters=3)
    assert len(opened.labels) == COUNT + 1 and (opened.labels == -1).sum() == 1


def test_images_that_are_gone_are_counted(
    store: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("cat/00.png", "dog/20.png"):
        (photos / name).unlink()
    assert group(store, tmp_path / "groups") == 0
    assert "2 of 24 images are no longer where they were" in caplog.text
    assert len(rows(tmp_path / "groups")) == COUNT
    links = list((tmp_path / "groups").glob("group-*/*"))
    assert len(links) == COUNT - 2 and all(path.is_file() for path in links)


def test_without_any_image_there_is_no_page(
    store: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos.rename(tmp_path / "elsewhere")
    assert group(store, tmp_path / "groups") == 0
    assert not (tmp_path / "groups" / "index.html").exists()
    assert "there is no page" in capsys.readouterr().out


def test_a_store_needs_no_model(
    store: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert group(store, tmp_path / "groups", "--model", str(model)) == 2
    assert "holds features already" in capsys.readouterr().err
    assert not (tmp_path / "groups").exists()


# --- resuming -------------------------------------------------------------------------------------


def test_images_that_were_encoded_are_not_encoded_again(
    photos: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster_features, "_PART", 8)
    monkeypatch.setattr(cluster_features, "_MOST_PARTS", 400)
    assert group(photos, tmp_path / "whole", "--model", str(model)) == 0

    true_write = embedding.write_shard
    written: list[int] = []

    def stop_after_two(folder: Path, shard: int, found: Any, broken: Any) -> None:
        if len(written) == 2:
            raise OSError("pulled the plug")
        written.append(shard)
        true_write(folder, shard, found, broken)

    out = tmp_path / "groups"
    with monkeypatch.context() as stopped:
        stopped.setattr(embedding, "write_shard", stop_after_two)
        assert group(photos, out, "--model", str(model)) == 1
    assert not out.exists() and (tmp_path / ".groups.features").is_dir()

    def note(folder: Path, shard: int, found: Any, broken: Any) -> None:
        written.append(shard)
        true_write(folder, shard, found, broken)

    monkeypatch.setattr(embedding, "write_shard", note)
    capsys.readouterr()
    assert group(photos, out, "--model", str(model), "--batch_size", "3") == 0
    assert written == [0, 1, 2]
    assert "16 of 24 images were encoded by the run before" in capsys.readouterr().err
    assert not (tmp_path / ".groups.features").exists()

    # other batches, other last bits
    resumed, whole = rows(out), rows(tmp_path / "whole")
    for own, theirs in zip(resumed, whole, strict=True):
        assert float(own.pop("confidence")) == pytest.approx(
            float(theirs.pop("confidence")), abs=2e-3
        )
    assert resumed == whole


def test_features_of_another_model_are_made_anew(
    photos: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = tmp_path / ".groups.features"
    left.mkdir()
    (left / "manifest.json").write_text("{}")
    assert group(photos, tmp_path / "groups", "--model", str(model)) == 0
    assert "it is made anew" in caplog.text and not left.exists()


def test_it_says_how_long_it_will_take(
    photos: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(model), "--batch_size", "4"]
    assert group(photos, tmp_path / "groups", *words) == 0
    said = capsys.readouterr().err
    assert "24 images at about" in said and "then the groups" in said


# --- the model ------------------------------------------------------------------------------------


def test_without_a_network_the_default_model_says_what_to_do(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert group(photos, tmp_path / "groups") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert DEFAULT_MODEL in said and "give --model NAME" in said


def test_the_default_model_is_named(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def small(name: str) -> Any:
        assert name == DEFAULT_MODEL
        encoder = make_encoder()
        vars(encoder)["image_processor"] = make_processor()
        return encoder

    monkeypatch.setattr("mim_refiner_hf.runs.cluster_model.load_encoder", small)
    assert group(photos, tmp_path / "groups") == 0
    assert f"The model: {DEFAULT_MODEL}" in capsys.readouterr().err


def test_a_model_that_does_not_suit_is_a_line_each(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "dark"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(4):
        pixels = noise.integers(0, 3, (200, 240, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (model / "README.md").write_text("---\ndatasets:\n- digits\n---\n# A model\n")
    cluster(folder, str(model), num_clusters=2)
    lines = [line for line in caplog.text.splitlines() if "may not suit" in line]
    assert len(lines) == 3
    assert "sees 16 x 16 pixels, and theirs are about 200" in lines[0]
    assert "standard deviations away" in lines[1]
    assert "trained on digits" in lines[2]


@pytest.mark.parametrize(
    "card",
    [b"---\ndatasets: [digits\n---\n", b"---\n- digits\n---\n", b"\xff\xfe\x00card"],
    ids=["broken YAML", "no mapping", "no text"],
)
def test_a_card_that_cannot_be_read_is_said_and_stops_nothing(
    model: Path, photos: Path, caplog: pytest.LogCaptureFixture, card: bytes
) -> None:
    (model / "README.md").write_bytes(card)
    cluster(photos, str(model), num_clusters=2)
    assert "its card cannot be read" in caplog.text
