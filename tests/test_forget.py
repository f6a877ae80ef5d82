"""`--forget` and `--keep`: metadata that is erased, and that says what neighbours are."""

import dataclasses
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from small_encoder import fresh_encoder, make_processor
from small_runs import (
    Stopped,
    assert_identical,
    final_state,
    log_of,
    losses,
    run_stopped_before,
    stop_before,
    trained_folder,
)

from mim_refiner_hf import RefineRecipe, load_encoder
from mim_refiner_hf.cli.main import main
from mim_refiner_hf.data.fields import Field, find_fields
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.evaluation.features import encode, encode_images, own_columns
from mim_refiner_hf.evaluation.int8 import in_int8
from mim_refiner_hf.model.configuration_mim_refiner import ConfigurationError, MimRefinerConfig
from mim_refiner_hf.model.modeling_mim_refiner import prefix_tokens_only
from mim_refiner_hf.publishing import save_model_folder
from mim_refiner_hf.publishing.model_card import write_card
from mim_refiner_hf.publishing.run_file import erased_words
from mim_refiner_hf.refinement.erasure import erase, fit_eraser
from mim_refiner_hf.refinement.metadata import Metadata, have_neighbours
from mim_refiner_hf.refinement.queue import NearestNeighbourQueue
from mim_refiner_hf.runs import run as run_module
from mim_refiner_hf.runs.fields import RunFields, open_fields, settle_fields
from mim_refiner_hf.runs.refine import _ending, refine
from mim_refiner_hf.runs.run import run
from mim_refiner_hf.runs.verdict import Verdict
from mim_refiner_hf.runtime.optimisation import recompute_blocks

pytestmark = pytest.mark.usefixtures("quick")

RULES = [[True], [False], [True, True], [True, False], [False, False, True]]


# ---- the rules


def may(values: np.ndarray, forgotten: list[bool], own: int, other: int) -> bool:
    """Whether one image may be the neighbour of another one, said once more."""
    if own == other:
        return False
    for field, to_forget in enumerate(forgotten):
        mine, theirs = values[field, own], values[field, other]
        same = mine == theirs and mine != -1
        if same == to_forget:
            return False
    return True


@pytest.mark.parametrize("forgotten", RULES)
@pytest.mark.parametrize("drawn", [True, False])
def test_neighbours_are_those_of_a_slow_loop(forgotten: list[bool], drawn: bool) -> None:
    rng = np.random.default_rng(len(forgotten))
    heads, views, batch, size, dim, topk = 2, 2, 7, 24, 5, 4
    values = rng.integers(-1, 3, size=(len(forgotten), 40))
    queue = NearestNeighbourQueue(heads, size, dim)
    # a third are start rows
    rows = np.where(rng.random(size) < 0.3, -1, rng.integers(40, size=size))
    queue.sample_index.copy_(torch.from_numpy(rows))
    targets = torch.randn(heads, views, batch, dim)
    index = rng.integers(40, size=batch)
    # in every rule one has no row: its values occur nowhere
    values[:, index[0]] = [5 if not forget else 0 for forget in forgotten]
    if all(forgotten):
        values[:, rows[rows >= 0]] = 0
    draw = torch.randint(topk, (heads, views, batch)) if drawn else None

    metadata = Metadata(values, forgotten)
    own = torch.from_numpy(index)
    allowed = metadata.may_be_neighbours(own, queue.sample_index)
    found = queue.lookup(targets, own, topk=topk, draw=draw, allowed=allowed)
    assert found.found is not None
    left = 0
    for head, view, image in np.ndindex(heads, views, batch):
        target = targets[head, view, image].double().numpy()
        target = target / np.linalg.norm(target)
        ranked = []
        for place, row in enumerate(rows):
            if row >= 0 and may(values, forgotten, index[image], row):
                cosine = float(target @ queue.rows[head, place].double().numpy())
                ranked.append((-cosine, place))
        ranked.sort()
        got = found.rows[head, view, image]
        assert bool(found.found[image]) == bool(ranked)
        if not ranked:
            left += 1
            np.testing.assert_allclose(got, target, atol=1e-6)
            continue
        pick = int(draw[head, view, image]) if draw is not None else 0
        cosine, place = ranked[pick % min(topk, len(ranked))]
        assert int(found.positions[head, view, image]) == place
        assert torch.equal(got, queue.rows[head, place])
        assert float(found.similarity[head, view, image]) == pytest.approx(-cosine, abs=1e-5)
    assert left >= heads * views


@pytest.mark.parametrize("forgotten", RULES)
def test_images_with_neighbours_are_counted_as_a_loop_counts_them(forgotten: list[bool]) -> None:
    rng = np.random.default_rng(0)
    for values_at_most in (1, 2, 4, 20):
        for count in (1, 2, 9, 30):
            values = rng.integers(-1, values_at_most, size=(len(forgotten), count))
            places = range(count)
            expected = [any(may(values, forgotten, i, j) for j in places) for i in places]
            assert have_neighbours(values, forgotten).tolist() == expected


# ---- what is erased


def featured(count: int = 300, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of unequal strengths, and three fields that show in them, some values missing."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-1, 3, (3, count), generator=generator)
    mixed = torch.randn(width, width, generator=generator, dtype=torch.float64)
    features = torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixed
    shown = torch.randn(3, 4, width, generator=generator, dtype=torch.float64)
    for field, own in zip(shown, values, strict=True):
        features += 2 * field[own + 1]
    return features + 5, values


def spread(features: torch.Tensor, own: torch.Tensor) -> float:
    """The largest difference of the mean features of two values."""
    means = torch.stack([features[own == value].mean(dim=0) for value in own[own >= 0].unique()])
    return float((means - means[0]).abs().max())


def test_the_eraser_is_the_least_change_with_equal_means() -> None:
    features, values = featured()
    own = values[0] + 1
    found = fit_eraser(features, own, shrinkage=0.0)
    assert found.rank == 3 and spread(features, own) > 1
    assert spread(found(features), own) < 1e-9
    # written as what it is: min |P x - x|^2 so that P takes every class mean to the same point, by
    # its Lagrangian, a row of P at a time
    centred = features - features.mean(dim=0)
    width = features.shape[1]
    means = torch.stack([centred[own == value].mean(dim=0) for value in range(4)])
    system = torch.zeros(width + 4, width + 4, dtype=torch.float64)
    system[:width, :width] = centred.T @ centred / len(centred)
    system[:width, width:] = means.T
    system[width:, :width] = means
    right = torch.zeros(width + 4, width, dtype=torch.float64)
    right[:width] = system[:width, :width]
    solved = torch.linalg.lstsq(system, right, driver="gelsd").solution[:width].T
    expected = features.mean(dim=0) + centred @ solved.T
    torch.testing.assert_close(found(features), expected, atol=1e-8, rtol=0)

    # shrunk, it is not the least change of these, but the means are equal all the same
    shrunk = fit_eraser(features, own)
    assert spread(shrunk(features), own) < 1e-9
    changes = [(each(features) - features).square().sum() for each in (found, shrunk)]
    assert changes[0] < changes[1]


def test_several_fields_are_erased_as_far_as_they_are_known() -> None:
    features, values = featured()
    found = fit_eraser(features, values)
    assert found.rank == 6
    assert all(spread(features, own) > 1 > 1e-9 > spread(found(features), own) for own in values)
    # an image without any value says nothing
    alone = fit_eraser(features, values[0])
    known = values[0] >= 0
    same = fit_eraser(features[known], values[0][known])
    torch.testing.assert_close(alone(features), same(features), atol=1e-12, rtol=0)
    # fewer images than channels
    few = fit_eraser(features[:9], values[0, :9])
    assert few(features).isfinite().all() and spread(few(features[:9]), values[0, :9]) < 1e-9
    # what shows nothing leaves all as it is
    nothing = fit_eraser(torch.ones(9, 4), values[0, :9])
    encoder = fresh_encoder()
    erase(encoder, nothing, ["camera"])
    assert nothing.rank == 0 and encoder.config.erased is None


@pytest.mark.parametrize(
    "changes",
    [
        {"pooling": "cls"},
        {"pooling": "mean", "features": "last_block"},
        {"pooling": "register", "num_register_tokens": 2, "norm_placement": "post"},
        {"pooling": "prefix", "num_register_tokens": 2},
    ],
)
def test_an_encoder_gives_erased_features_on_every_path(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    encoder = fresh_encoder(**changes)
    pixels = torch.randn(40, 3, 16, 16)
    column = own_columns(encoder.config)[-1]
    encoder.requires_grad_(False)
    plain, first = encode(encoder, pixels, [column])[column], torch.arange(40) % 4
    before = json.loads(encoder.config.to_json_string())
    assert "erased" not in before and before["format_version"] == 1

    found = fit_eraser(plain, first)
    erase(encoder, found, ["camera"])
    erased = encode(encoder, pixels, [column])[column]
    torch.testing.assert_close(erased, found(plain), atol=1e-5, rtol=0)
    # once more, by another field: both in one
    second = torch.arange(40) // 4 % 3
    again = fit_eraser(erased, second)
    erase(encoder, again, ["site"])
    erased = encode(encoder, pixels, [column])[column]
    torch.testing.assert_close(erased, again(found(plain)), atol=1e-5, rtol=0)
    assert max(spread(erased, first), spread(erased, second)) < 1e-5
    config = encoder.config
    assert (config.erased_directions, config.erased, config.format_version) == (
        5,
        ["camera", "site"],
        2,
    )

    # what every way of reading it gives
    torch.testing.assert_close(encoder.features_of(pixels), erased, atol=1e-6, rtol=0)
    outputs = encoder(pixels, output_hidden_states=True)
    torch.testing.assert_close(encoder.pool(outputs.hidden_states[-1]), erased, atol=1e-6, rtol=0)
    torch.testing.assert_close(encoder.norm(outputs.hidden_states[-1]), outputs.last_hidden_state)
    with prefix_tokens_only(encoder):
        tokens = encoder(pixels).last_hidden_state
    shown = tokens.shape[1]
    torch.testing.assert_close(tokens, outputs.last_hidden_state[:, :shown], atol=1e-5, rtol=0)

    # nothing of it is trained, and it is in the file
    assert not [name for name, _ in encoder.named_parameters() if "eraser" in name]
    encoder.requires_grad_(True).train()
    recompute_blocks(encoder)
    recomputed = encoder.features_of(pixels)
    torch.testing.assert_close(recomputed, erased, atol=1e-6, rtol=0)
    recomputed.sum().backward()
    encoder.requires_grad_(False)
    save_model_folder(tmp_path / "model", encoder, make_processor())
    loaded = load_encoder(tmp_path / "model").requires_grad_(False)
    assert torch.equal(loaded.features_of(pixels), encoder.eval().features_of(pixels))
    assert loaded.config.erased == ["camera", "site"]

    # in lower precision as without an eraser
    quick = in_int8(loaded)
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, quick.get_buffer(name))
    for lower in (quick, loaded.bfloat16()):
        similarity = torch.cosine_similarity(lower.features_of(pixels).float(), erased)
        assert similarity.min() > 0.99


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"erased_directions": 33, "erased": ["a"]}, "must be at most hidden_size=32"),
        ({"erased_directions": 2}, "give both or none"),
        ({"erased": ["a"]}, "give both or none"),
        (
            {"erased_directions": 2, "erased": ["a"], "pooling_head": "attention"},
            "the weights of pooling='attention' would read tokens that they do not know",
        ),
    ],
)
def test_a_configuration_that_erases_what_cannot_be_is_refused(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        fresh_encoder(**changes)


# ---- where the values are


CAMERAS = ["a", "b", None, "a", " ", "b"]


def write_photos(folder: Path, count: int = len(CAMERAS)) -> Path:
    """Images of 32 px, no two alike, in two folders."""
    rng = np.random.default_rng(1)
    for place in range(count):
        path = folder / f"day{place % 2}" / f"{place:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    return folder


def write_rows(file: Path, lines: list[str]) -> str:
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def values_of(images: Any, name: str, file: str | None = None) -> list[int]:
    (field,) = find_fields(open_images(images), [name], "forget", file)
    return field.values.tolist()


def test_values_are_found_wherever_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = write_photos(tmp_path / "photos")
    paths = sorted(photos.rglob("*.png"))
    rows = [f"{path.relative_to(photos)},{path.stem[-1]}" for path in paths]
    by_camera = {path: CAMERAS[int(path.stem)] or "" for path in paths}
    expected = [{"a": 0, "b": 1}.get(by_camera[path].strip(), -1) for path in paths]
    assert sorted(expected) == [-1, -1, 0, 0, 1, 1]
    lines = ["file_name,camera", *(f"{path.name},{by_camera[path]}" for path in paths)]

    # a file of its own names them by the ends of their paths, a folder's counts from itself
    file = write_rows(tmp_path / "cameras.csv", [*lines, "gone.png,c"])
    assert values_of(photos, "camera", file) == expected
    assert "1 rows of" in caplog.text and "files that are not there" in caplog.text
    assert values_of([*paths], "camera", file) == expected
    write_rows(photos / "metadata.csv", ["file_name,place,label", *(f"{row},x" for row in rows)])
    assert values_of(photos, "place") == [int(path.stem[-1]) for path in paths]
    (photos / "metadata.csv").unlink()
    for day in ("day0", "day1"):
        inside = [line for line in lines[1:] if (photos / day / line.split(",")[0]).exists()]
        write_rows(photos / day / "metadata.csv", [lines[0], *inside, inside[0]])
    assert values_of(photos, "camera") == expected

    # two rows that contradict each other are none
    torn = write_rows(tmp_path / "torn.csv", [*lines, f"{paths[0].name},z"])
    assert values_of(photos, "camera", torn)[0] == -1
    assert "1 images have several values of camera" in caplog.text

    # in a table: words, numbers, names of classes, and no image is read
    table = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": b"", "path": None}] * 6,
            "camera": CAMERAS,
            "site": [3, 1, None, 1, 3, 1],
            "label": [0, -1, 1, 1, 0, 0],
        },
        datasets.Features(
            image=datasets.Image(),
            camera=datasets.Value("string"),
            site=datasets.Value("int64"),
            label=datasets.ClassLabel(names=["cat", "dog"]),
        ),
    )
    assert values_of(table, "camera") == [0, 1, -1, 0, -1, 1]
    assert values_of(table, "site") == [1, 0, -1, 0, 1, 0]
    assert values_of(table, "label") == [0, -1, 1, 1, 0, 0]
    assert values_of(table.select([5, 4, 0]), "camera") == [1, -1, 0]
    assert values_of(open_images(table).subset([2, 3]), "site") == [1, 0, -1, 0, 1, 0]
    with pytest.raises(ValueError, match=r"forget='shape'.* no such column, it has camera, site"):
        values_of(table, "shape")
    lists = table.add_column("shape", [[1, 2]] * 6)
    with pytest.raises(ValueError, match=r"forget='shape': this column .* holds a list for each"):
        values_of(lists, "shape")


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["name,camera", "000.png,a"], "has no column file_name, only name, camera"),
        (["file_name,camera", "9.png,a"], "none of its 1 rows names an image of .*such as 9.png"),
        (["file_name,site", "000.png,a"], "forget='camera': .* no such column, it has file_name, "),
        (["file_name,camera", "000.png,"], "this column of .* has no value for any of its 6"),
        (["file_name,camera", "000.png,a", "x"], "cannot be read: .*Expected 2 columns, got 1"),
        (["file_name;camera", "000.png;a"], "has no column file_name, only file_name;camera"),
    ],
)
def test_a_file_of_metadata_that_says_nothing_is_refused(
    lines: list[str], says: str, tmp_path: Path
) -> None:
    photos = write_photos(tmp_path / "photos")
    file = write_rows(tmp_path / "cameras.csv", lines)
    with pytest.raises(ValueError, match=says) as refused:
        values_of(photos, "camera", file)
    assert "\n" not in str(refused.value)


def test_a_name_that_several_images_end_with_is_refused(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    (photos / "day0/000.png").rename(photos / "day0/001.png")
    file = write_rows(tmp_path / "cameras.csv", ["file_name,camera", "001.png,a", "day0/001.png,b"])
    with pytest.raises(ValueError, match=r"2 images of .* end with 001\.png; write more"):
        values_of(photos, "camera", file)
    file = write_rows(tmp_path / "both.csv", ["file_name,c", "day1/001.png,a", "day0/001.png,b"])
    assert sorted(values_of(photos, "c", file)) == [-1, -1, -1, -1, 0, 1]
    no_paths = [np.zeros((8, 8, 3), np.uint8), np.ones((8, 8, 3), np.uint8)]
    with pytest.raises(ValueError, match="have no file names to be found by"):
        values_of(no_paths, "c", file)


# ---- whole runs


@pytest.fixture(scope="module")
def cameras(cifar: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The images of `cifar` with three cameras and many tracks, of some nothing is known."""
    table = parquet.read_table(cifar).replace_schema_metadata(None)
    rng = np.random.default_rng(0)
    names = rng.choice(["a", "b", "c", ""], size=len(table))
    table = table.append_column("camera", pa.array(names.tolist()))
    tracks = np.where(
        rng.random(len(table)) < 0.1, "", rng.integers(50, size=len(table)).astype(str)
    )
    table = table.append_column("track", pa.array(tracks.tolist()))
    table = table.append_column("one", pa.array(["x"] * len(table)))
    table = table.append_column("many", pa.array(range(len(table))))
    path = tmp_path_factory.mktemp("cameras") / "train.parquet"
    parquet.write_table(table, path)
    return str(path)


def test_a_run_stopped_and_in_micro_batches(
    recipe: Callable[..., RefineRecipe], cameras: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {"dataset": cameras, "forget": "track", "keep": "label"}
    whole = recipe("whole", **changed)
    assert run(whole) is not None
    said = capsys.readouterr().out
    assert re.search(r"swap positive: .*forget", said)
    plan = (
        r"fields  forget track \((\d+) values, (\d+) images have none, too many to erase from 32 "
        r"channels\): neighbours of other values; keep label \(10 values\): neighbours of the same "
        r"value; 200 of 200 images have neighbours to look up$"
    )
    found = re.search(plan, said, re.M)
    assert found is not None and int(found[1]) > 40 and 5 < int(found[2]) < 40
    asked = recipe("pieces", **changed)
    run_stopped_before(asked, (3, 5, 7))
    assert_identical(asked, whole)
    # at first all rows are start rows; the queue keeps nothing of metadata
    without = [line["images_without_neighbour"] for line in log_of(whole) if "loss" in line]
    assert len(without) == 8 and without[0] == 32 and max(without[3:]) < 16
    names = {name for name in final_state(whole) if name.startswith("refiner.queue.")}
    assert names == {
        f"refiner.queue.{name}" for name in NearestNeighbourQueue(1, 1, 1).state_dict()
    }
    assert not [name for name in final_state(whole) if "metadata" in name]

    other = recipe("micro", micro_batch_size=5, **changed)
    run(other)
    assert losses(other) == pytest.approx(losses(whole), abs=1e-4)
    plain = recipe("plain", dataset=cameras, swap="positive")
    run(plain)
    assert losses(plain)[1:] != pytest.approx(losses(whole)[1:], abs=1e-4)
    assert all("images_without_neighbour" not in line for line in log_of(plain))


def test_few_values_are_erased_after_the_same_training(
    recipe: Callable[..., RefineRecipe], cameras: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = recipe("plain", dataset=cameras)
    alone = run(plain)
    capsys.readouterr()
    changed = {"dataset": cameras, "forget": "camera"}
    pieces = recipe("pieces", **changed)
    run_stopped_before(pieces, (5,))
    plan = (
        r"fields  forget camera \(3 values, \d+ images have none\): erased from the features at "
        r"the end, 2 of 32 directions$"
    )
    said = capsys.readouterr().out
    assert re.search(plan, said, re.M) and "swap none: " in said
    assert_identical(plain, pieces)

    # killed when all steps were done, and not at all
    again = run(pieces)
    asked = recipe("whole", **changed)
    whole = refine(asked)
    assert alone is not None and again is not None and whole is not None
    assert whole.metrics["erased"] == again.metrics["erased"]
    state, other = whole.refined.state_dict(), alone.refined.state_dict()
    added = {f"layers.2.eraser.{name}" for name in ("mean", "read", "write")}
    assert state.keys() == other.keys() | added
    assert all(torch.equal(state[name], tensor) for name, tensor in other.items())
    assert all(torch.equal(state[name], again.refined.state_dict()[name]) for name in added)

    # in the folder as in memory
    output = Path(asked.output_dir)
    loaded = load_encoder(trained_folder(output))
    images = open_images(cameras)
    (field,) = find_fields(images, ["camera"], "forget")
    own = torch.from_numpy(field.values)
    column = own_columns(loaded.config)[-1]
    rows, left = (
        encode_images(each, images, loaded.image_processor, [column])[0][column]
        for each in (alone.refined, loaded)
    )
    assert spread(left, own) < 1e-4 < 1e-2 < spread(rows, own)

    # what the end and the card say of it
    erased = whole.metrics["erased"]
    assert (erased["directions"], erased["width"]) == (2, 32)
    assert erased["images"] == int((own >= 0).sum()) and erased["probed"] == erased["images"] // 2
    start = Verdict("not better", "it is not")
    kept = _ending(dataclasses.replace(whole, verdict=start), cameras)
    assert "ships as it was, with nothing that this run erased: " in kept and "Erased" not in kept
    better = _ending(dataclasses.replace(whole, verdict=Verdict("better", "it is")), cameras)
    words = (
        r"camera \(linear probe [\d.]+ % before, [\d.]+ % after, [\d.]+ % by chance\): 2 of 32 "
        "directions, fitted on "
    )
    assert re.search(f"Erased: {words}", better)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["erased"] == erased
    for verdict, says in (("better", True), ("not better", False)):
        (output / "metrics.json").write_text(json.dumps(metrics | {"verdict": verdict}))
        card = html.unescape(write_card(output).read_text()).replace("\\", "")
        assert bool(re.search(f"Erased from the features:\\*\\* {words}", card)) == says

    # from there on: what was erased stays erased, and once more what training brings back
    further = recipe("further", dataset=cameras, model=str(trained_folder(output)), forget="camera")
    result = run(further)
    assert "; camera erased in 2 directions, which stay so" in capsys.readouterr().out
    assert result is not None
    config = result.refined.config
    assert (config.erased_directions, config.erased) == (4, ["camera"])
    left = encode_images(result.refined, images, result.processor, [column])[0][column]
    assert spread(left, own) < 1e-4


def test_scores_on_the_way_are_of_what_would_ship(
    recipe: Callable[..., RefineRecipe], cameras: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    evaluate = run_module._evaluate

    def spied(prepared: Any, model: Any, per_block: bool = True) -> Any:
        seen.append(model.config.erased_directions)
        return evaluate(prepared, model, per_block)

    monkeypatch.setattr(run_module, "_evaluate", spied)
    length = {"head_epochs": 1, "epochs": 2, "max_steps": None}
    changed = {"dataset": cameras, "eval_every": 1, "eval_fraction": 0.2, **length}
    plain = recipe("plain", **changed)
    run(plain)
    # before, on the way, after
    assert len(seen) > 2 and set(seen) == {0}
    seen.clear()
    asked = recipe("forgets", forget="camera", **changed)
    run(asked)
    assert seen == [0, *[2] * (len(seen) - 1)] and len(seen) > 2
    # and the training goes on as if none had been made
    assert_identical(plain, asked)


@pytest.mark.parametrize("objective", ["mae", "data2vec2", "conmim", "capi"])
def test_pretraining_does_not_undo_what_was_erased(
    objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    erased = fresh_encoder(num_hidden_layers=10, erased_directions=2, erased=["camera", "site"])
    save_model_folder(tmp_path / "model", erased, make_processor())
    words = ["pretrain", "digits", "--objective", objective]
    assert main([*words, "--init_from", str(tmp_path / "model"), "--epochs", "1"]) == 2
    said = capsys.readouterr().err
    assert "a refinement has erased camera, site from its features" in said
    assert said.count("\n") == 1


def test_a_field_that_hardly_an_image_has_is_not_probed() -> None:
    values = np.stack([np.arange(60) % 2, np.where(np.arange(60) < 2, np.arange(60), -1)])
    fields = [Field("camera", values[0], 2), Field("seldom", values[1], 2)]
    settled = RunFields(fields, 2, np.arange(60), width=8, erased=(0, 1))
    rows = torch.randn(60, 8) + 5 * torch.from_numpy(values[0])[:, None]
    erased = settled._probed(rows, torch.from_numpy(values), directions=2, seed=0)
    camera, seldom = erased["fields"]
    before, after = camera["probe_before"], camera["probe_after"]
    assert before is not None and after is not None and after < 0.8 < before
    assert seldom["probe_before"] is None and seldom["probe_after"] is None
    assert "seldom (too few images with a value to probe)" in erased_words(erased)


def test_a_field_is_erased_where_there_is_room(cameras: str) -> None:
    images = open_images(cameras)
    asked = RefineRecipe(model="m", dataset=cameras, forget="track,label,camera", keep="many")
    fields = open_fields(asked, images)
    assert fields is not None
    erased = {}
    for width, before in ((16, 0), (24, 0), (88, 0), (88, 9), (1024, 0)):
        names = ["a"] if before else None
        shape = {"hidden_size": width, "num_attention_heads": 2}
        config = MimRefinerConfig(**shape, erased_directions=before, erased=names)
        erased[width, before] = fields.few_values_first(config).erased_names
    # of tracks there are too few images
    assert erased == {
        (16, 0): ["camera"],
        (24, 0): ["camera"],
        (88, 0): ["label", "camera"],
        (88, 9): ["camera"],
        (1024, 0): ["label", "camera"],
    }
    line = fields.few_values_first(config).plan_line()
    assert "none, fewer than 10 images each on average, too few to erase): neighbours of" in line

    camera = next(field for field in fields.fields if field.name == "camera")
    values = camera.values.copy()
    values[fields.indices[0]] = values.max() + 1
    rare = dataclasses.replace(fields, fields=[camera._replace(values=values)], num_forgotten=1)
    line = rare.few_values_first(config).plan_line()
    assert "1 with fewer than 10 images, erased less surely" in line

    asked = RefineRecipe(model="m", dataset=cameras, forget="camera")
    fields = open_fields(asked, images)
    assert fields is not None
    config = MimRefinerConfig(pooling_head="attention")
    with pytest.raises(
        ValueError, match="weights of pooling attention would not know; give pooling"
    ):
        settle_fields(fields, asked, config)
    given = settle_fields(fields, dataclasses.replace(asked, pooling="mean"), config)
    assert given.erased_names == ["camera"] and given.metadata() is None


def test_a_run_goes_on_with_the_values_that_it_began_with(
    recipe: Callable[..., RefineRecipe], tmp_path: Path
) -> None:
    photos = write_photos(tmp_path / "photos", 64)
    lines = [f"{place:03d}.png,{place % 3}" for place in range(64)]
    file = write_rows(tmp_path / "cameras.csv", ["file_name,camera", *lines])
    asked = recipe(dataset=str(photos), forget="camera", metadata=file)
    with pytest.MonkeyPatch.context() as patched:
        stop_before(3, patched)
        with pytest.raises(Stopped):
            run(asked)
    write_rows(tmp_path / "cameras.csv", ["file_name,camera", *lines[:-1], "063.png,7"])
    with pytest.raises(ValueError, match="forget='camera': these columns have other values than"):
        run(asked)
    write_rows(tmp_path / "cameras.csv", ["file_name,camera", *lines[::-1]])
    assert run(dataclasses.replace(asked, metadata=f"{tmp_path}/./cameras.csv")) is not None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"forget": "one"}, "all 200 images have the same value of one, so there is nothing to"),
        ({"forget": "camera", "trainable": "lora:4"}, "adapters cannot hold that; leave one"),
        ({"forget": "camera", "save_as": "vit"}, "no eraser behind the last block"),
        ({"keep": "many"}, "no two of the 200 images have the same value of many, so none"),
        ({"forget": "label", "keep": "many"}, "no two of the 200 images have the same value"),
        ({"forget": "camera,many,one"}, "all 200 images have the same value of one"),
        ({"forget": "label", "keep": "label"}, "exclude each other: label stands in both"),
        ({"keep": "3"}, "how many checkpoints are kept is --save_total_limit"),
        ({"forget": "track", "swap": "none"}, "uses no neighbours"),
        ({"keep": "camera", "swap": "none"}, "uses no neighbours"),
        ({"forget": "camera,camera"}, "must be names of different columns"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    fields: dict[str, str],
    says: str,
    cameras: str,
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["refine", cameras, "--model", models["vit_mae"], "--output_dir", str(tmp_path / "out")]
    for name, value in ({"eval_fraction": "0"} | fields).items():
        words += [f"--{name}", value]
    try:
        code = main(words)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in error and "error: " in error
    assert not (tmp_path / "out").exists()


def test_the_plan_says_what_rules_out_nothing(
    recipe: Callable[..., RefineRecipe], cameras: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = datasets.load_dataset("parquet", data_files=cameras, split="train")
    fields = {"forget": "many", "keep": "one", "dry_run": True}
    asked = dataclasses.asdict(recipe(**fields)) | {"dataset": table}
    assert refine(**asked) is None
    said = capsys.readouterr().out
    assert "forget many (200 values, no two images share one, so it rules out nothing)" in said
    assert "keep one (1 value, all images share it, so it rules out nothing)" in said
    assert "200 of 200 images have neighbours to look up\n" in said
    fields["keep"] = "camera"
    assert refine(**(asked | fields)) is None
    found = re.search(
        r"(\d+) of 200 images have neighbours to look up, the other (\d+) keep their own other "
        r"view as positive",
        capsys.readouterr().out,
    )
    assert found is not None and int(found[1]) + int(found[2]) == 200 and int(found[2]) > 20


def test_without_it_all_rows_are_looked_up() -> None:
    """Bit for bit as where all rows are allowed."""
    queue = NearestNeighbourQueue(2, 24, 5)
    queue.sample_index.copy_(torch.arange(24))
    targets, index = torch.randn(2, 2, 6, 5), torch.arange(6)
    draw = torch.randint(4, (2, 2, 6))
    plain = queue.lookup(targets, index, topk=4, draw=draw)
    metadata = Metadata(np.full((1, 24), -1), [True])
    allowed = metadata.may_be_neighbours(index, queue.sample_index)
    same = queue.lookup(targets, index, topk=4, draw=draw, allowed=allowed)
    assert plain.found is None and same.found is not None and same.found.all()
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], same[:3], strict=True))
