"""Settings that are left open: fitted to any number of images and any encoder, and said."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mim_refiner_hf import MimRefinerConfig, RefineRecipe, load_encoder, read_recipe, refine
from mim_refiner_hf.cli.main import main
from mim_refiner_hf.refinement.auto import MANY_IMAGES, choose_eval_fraction
from mim_refiner_hf.refinement.misfit import misfits
from mim_refiner_hf.refinement.recipe import FITTED
from mim_refiner_hf.refinement.recipe_files import parse_recipe
from mim_refiner_hf.refinement.resolve import ResolvedRecipe, resolve
from mim_refiner_hf.runs import prepare

IMAGENET = 1_281_167


@st.composite
def configs(draw: Any) -> MimRefinerConfig:
    patch = draw(st.sampled_from([2, 4, 8, 14, 16]))
    grid = draw(st.integers(1, 37))
    heads = draw(st.integers(1, 16))
    return MimRefinerConfig(
        image_size=patch * grid,
        patch_size=patch,
        num_attention_heads=heads,
        hidden_size=heads * draw(st.sampled_from([16, 64, 128])),
        num_hidden_layers=draw(st.integers(1, 40)),
    )


@settings(max_examples=200)
@given(
    config=configs(), images=st.integers(2, 10**7), gpu=st.booleans(), processes=st.integers(1, 8)
)
def test_nothing_stated_fits(
    config: MimRefinerConfig, images: int, gpu: bool, processes: int
) -> None:
    """Any number of images and any encoder; what decides keeps the promises of its rule."""
    images = max(images, 2 * processes)
    found = resolve(RefineRecipe(model="a"), config, images, processes=processes, gpu=gpu)

    assert 2 <= found.batch_size <= max(2, images // 2, processes)
    assert found.batch_size % processes == 0
    assert found.batch_size <= found.queue_size <= 65536 or found.queue_size == found.batch_size
    assert 1 <= found.topk <= min(20, found.queue_size)
    assert found.steps.refine >= 300 and found.steps.warmup >= 40
    assert gpu or found.steps.refine <= 600 + images // found.batch_size
    # what ships is at most one per cent the start by decay alone
    assert found.ema_decay**found.steps.refine <= 0.01
    assert 0 < found.warmup_epochs < min(found.epochs, found.head_epochs)
    assert found.global_size % config.patch_size == 0 < found.global_size <= config.image_hw[0]
    assert 0.65 <= found.layer_decay <= 0.85
    peak = found.learning_rate * found.batch_size / 256
    expected = 1e-3 * (found.batch_size / 64) ** 0.5 * 192 / config.hidden_size
    assert peak == pytest.approx(expected, rel=0.01)
    assert misfits(found) == []


@settings(max_examples=100)
@given(images=st.integers(2, 10**6), batch=st.integers(2, 512), queue=st.integers(1, 4096))
def test_open_settings_follow_stated_ones(images: int, batch: int, queue: int) -> None:
    config = MimRefinerConfig(hidden_size=192, num_attention_heads=3)
    if batch <= images:
        found = resolve(RefineRecipe(model="a", batch_size=batch), config, images)
        assert found.batch_size == batch <= found.queue_size
    if queue >= 2:
        found = resolve(RefineRecipe(model="a", queue_size=queue), config, images)
        assert found.batch_size <= found.queue_size == queue


def test_every_value_has_a_reason() -> None:
    config = MimRefinerConfig(hidden_size=192, num_attention_heads=3)
    found = resolve(RefineRecipe(model="a"), config, 300)
    # held out before the encoder is known; no local views, no size of one
    unsaid = {"eval_fraction", "local_size"}
    assert set(FITTED) - unsaid <= set(found.reasons)
    assert all(found.reasons.values())
    assert found.batch_size == 32 and found.steps == (60, 300)
    assert found.swap == "none" and found.local_views == 0


def test_the_papers_views_and_swap_need_images_and_a_gpu() -> None:
    config = MimRefinerConfig()
    recipe = RefineRecipe(model="a")
    large = resolve(recipe, config, MANY_IMAGES, gpu=True)
    assert (large.local_views, large.swap, large.global_size) == (10, "positive", 224)
    for found in (
        resolve(recipe, config, MANY_IMAGES),
        resolve(recipe, config, MANY_IMAGES - 1, gpu=True),
    ):
        assert (found.local_views, found.swap, found.global_size) == (0, "none", 160)


@pytest.mark.parametrize(
    ("images", "held_out"), [(2, 0), (199, 0), (200, 20), (10_000, 1000), (10**6, 1000)]
)
def test_few_are_held_out(images: int, held_out: int) -> None:
    assert round(images * choose_eval_fraction(images).value) == held_out


# --- the word "auto"


@pytest.mark.parametrize("name", FITTED)
def test_auto_is_left_open(name: str, tmp_path: Path) -> None:
    """In Python, on the command line over a recipe that states it, and in YAML."""
    assert getattr(RefineRecipe(model="a", **{name: "auto"}), name) is None
    dashed = name.replace("_", "-")
    for words in ([f"--{name}", "auto"], [f"--{name}=auto"], [f"--{dashed}", "auto"]):
        found = parse_recipe(["--recipe", "paper", "--model", "a", *words, "--seed", "3"])
        assert (getattr(found, name), found.seed) == (None, 3)
    (tmp_path / "mine.yaml").write_text(f"base: paper\nmodel: a\n{name}: auto\n")
    assert getattr(read_recipe(str(tmp_path / "mine.yaml")), name) is None


def test_images_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_recipe(["photos/", "--model", "a"]) == RefineRecipe(model="a", dataset="photos/")
    with pytest.raises(SystemExit) as stopped:
        parse_recipe(["photos/", "--dataset", "others/", "--model", "a"])
    assert stopped.value.code == 2
    assert "photos/ and --dataset name both the images" in capsys.readouterr().err


# --- what does not fit


def resolved(images: int, **fields: Any) -> ResolvedRecipe:
    config = MimRefinerConfig(hidden_size=192, num_attention_heads=3)
    return resolve(RefineRecipe(model="a", **fields), config, images)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ema_decay": 0.9999}, "ema_decay=0.9999: after 300 updates 97 % of the start"),
        ({"epochs": 2.0}, "epochs=2.0: 18 updates change little"),
        ({"max_steps": 7}, "max_steps=7: changes little; take at least 100"),
        (
            {"warmup_epochs": 25.0, "epochs": 40.0, "head_epochs": 30.0},
            "warmup_epochs=25.0: more than half",
        ),
        ({"learning_rate": 0.0566}, "learning_rate=0.0566: 10 times what fits batch 32"),
        ({"learning_rate": 1e-4}, "learning_rate=0.0001: 0.018 times what fits"),
        (
            {"topk": 50, "queue_size": 256, "swap": "positive"},
            "topk=50: 20 % of the queue's 256 rows are no neighbours",
        ),
        (
            {"queue_size": 4096, "swap": "positive"},
            "queue_size=4096: more than 4 times the 300 images",
        ),
        ({"queue_size": 65536}, "queue_size=65536: more than 4 times the 300 images"),
        ({"temperature": 0.01}, "temperature=0.01: 0.05 times what fits this encoder, only the"),
        ({"temperature": 2.0}, "temperature=2.0: 10 times what fits this encoder, other images"),
    ],
)
def test_what_cannot_work_is_said_with_the_number_to_take(
    fields: dict[str, Any], says: str
) -> None:
    recipe = resolved(300, **fields)
    (problem,) = misfits(recipe)
    assert problem.startswith(says)

    # and the number that it names mends it
    name = next(iter(fields))
    words = r"([0-9]+) epochs" if name == "epochs" else r"take (?:at least )?([0-9.]+)"
    number = float(re.findall(words, problem)[0])
    kind = type(fields[name])
    assert misfits(resolved(300, **{**fields, name: kind(number)})) == []


def test_pairs_that_are_the_same_without_local_views_are_said() -> None:
    (problem,) = misfits(resolved(300, pairs="released"))
    assert problem.startswith("pairs='released': without local views")
    assert misfits(resolved(300, pairs="released", local_views=4)) == []


def test_the_papers_recipes_fit_imagenet() -> None:
    config = MimRefinerConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    for name in ("mae-refined-l16", "d2v2-refined-l16", "one-gpu-24gb"):
        found = resolve(read_recipe(name), config, IMAGENET)
        assert misfits(found) == []


# --- whole runs


def write_images(folder: Path, count: int, alike: bool = False, sizes: int = 1) -> Path:
    """`count` images of noise, or all of one grey; of as many sizes in turn."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        side = 32 + 8 * (number % sizes)
        pixels = random.integers(0, 255, (side, side, 3), dtype=np.uint8)
        if alike:
            pixels = np.full((32, 32, 3), 128, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("count", "alike", "sizes"), [(2, False, 1), (3, False, 1), (12, True, 1), (12, False, 2)]
)
def test_few_images_are_refined(
    count: int, alike: bool, sizes: int, models: dict[str, str], tmp_path: Path
) -> None:
    """Two, three, all alike, of two sizes; only the length is stated, so that the test is short."""
    folder = write_images(tmp_path / "photos", count, alike, sizes)
    result = refine(
        folder, model=models["vit_mae"], output_dir=tmp_path / "out", max_steps=3, num_workers=0
    )
    assert result is not None
    assert all(bool(weight.isfinite().all()) for weight in result.encoder.parameters())
    assert (tmp_path / "out/model/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_sixty_photos_with_nothing_stated(models: dict[str, str], tmp_path: Path) -> None:
    """From folder to evidence: all updates, the verdict, what people look at, and what ships."""
    folder = write_images(tmp_path / "photos", 60, sizes=2)
    result = refine(folder, model=models["vit_mae"], output_dir=tmp_path / "out")
    assert result is not None and result.verdict.photos.startswith("60 ")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model", "metrics.json", "neighbours.png", "groups_before_after.png"} <= written
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["verdict"] == result.verdict.outcome
    shipped = load_encoder(str(tmp_path / "out/model")).state_dict()
    better = result.verdict.outcome == "better"
    expected = result.refined if better else load_encoder(models["vit_mae"])
    assert all(torch.equal(shipped[name], value) for name, value in expected.state_dict().items())
    assert (tmp_path / "out/refined_not_shipped").is_dir() != better


def test_one_image_is_refused(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "photos", 1)
    out = tmp_path / "out"
    code = main(["refine", str(folder), "--model", models["vit_mae"], "--output_dir", str(out)])
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "1 image(s) found; contrastive refinement needs at least 2" in line
    assert not out.exists()


def test_a_run_goes_on_as_it_began_on_another_machine(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was fitted to the first machine stays, though the second one would be given more."""
    folder = write_images(tmp_path / "photos", 12)
    recipe = RefineRecipe(
        model=models["vit_mae"],
        dataset=str(folder),
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        num_workers=0,
        stage="warmup",
    )
    refine(recipe)
    prepared = prepare.prepare(recipe).recipe
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(prepare.torch.accelerator, "is_available", lambda: True)
        again = prepare.prepare(dataclasses.replace(recipe, stage="both")).recipe
    for name in ("batch_size", "epochs", "learning_rate", "queue_size", "local_views"):
        assert getattr(again, name) == getattr(prepared, name)
