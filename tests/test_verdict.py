"""Is the result better than its start? The numbers that need no labels against slow, plain ones;
and what a run ships, writes, says and exits with, whatever the answer.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import Stopped, stop_before, trained_folder

from mim_refiner_hf import RefineRecipe, cli, load_encoder, refine
from mim_refiner_hf.data.images import ImageDataset, open_images
from mim_refiner_hf.evaluation import evidence
from mim_refiner_hf.evaluation.evidence import change_between, resamples
from mim_refiner_hf.evaluation.label_free import (
    TwoViews,
    label_free_scores,
    reciprocal_ranks,
    relative_change,
    separation,
    similarities,
    two_views,
)
from mim_refiner_hf.publishing import CardData
from mim_refiner_hf.publishing.run_file import RunRecord
from mim_refiner_hf.refinement.failure import NotBetterError
from mim_refiner_hf.runs import refine as refine_module
from mim_refiner_hf.runs.prepare import RunImages, prepare
from mim_refiner_hf.runs.run_folder import begin_folder
from mim_refiner_hf.runs.verdict import (
    GUARD,
    LEAST_PHOTOS,
    judges_text,
    judging_photos,
    verdict_on,
)

Recipes = Callable[..., RefineRecipe]

pytestmark = pytest.mark.usefixtures("quick")


def photos(noise: float, count: int = 60, rank: int = 24, seed: int = 0) -> TwoViews:
    """Features of photos, and of copies that differ by noise; `rank` directions are used."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(count, rank, generator=generator)
    copies = plain + noise * torch.randn(count, rank, generator=generator)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0][:rank]
    return TwoViews(plain @ basis, copies @ basis)


# --- the numbers ----------------------------------------------------------------------------------


def plain_cosines(views: TwoViews) -> np.ndarray:
    """Pair by pair, in fp64."""
    plain, copies = views.plain.double().numpy(), views.copies.double().numpy()
    mean, deviation = plain.mean(0), plain.std(0, ddof=1) + 1e-6
    plain, copies = (plain - mean) / deviation, (copies - mean) / deviation
    table = np.zeros((len(plain), len(plain)))
    for i, copy in enumerate(copies):
        for j, photo in enumerate(plain):
            table[i, j] = copy @ photo / np.linalg.norm(copy) / np.linalg.norm(photo)
    return table


def plain_separation(table: np.ndarray, rows: np.ndarray) -> float:
    """d' of the photos that were drawn, those drawn twice counted twice."""
    own = [table[i, i] for i in rows]
    others = [table[i, j] for i in rows for j in rows if i != j]
    return float((np.mean(own) - np.mean(others)) / np.std(others))


def test_separation_is_that_of_slow_loops_on_all_photos_and_on_every_resample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # as many as a run takes
    monkeypatch.setattr(evidence, "RESAMPLES", 500)
    views = photos(noise=1.5, count=30)
    table = plain_cosines(views)
    assert np.allclose(similarities(views), table, atol=1e-5)
    score = separation(table)
    assert score.value == pytest.approx(plain_separation(table, np.arange(30)))
    assert score.draws is not None and len(score.draws) == 500
    for drawn, rows in list(zip(score.draws, resamples(30), strict=True))[::100]:
        assert drawn == pytest.approx(plain_separation(table, rows))
    assert score.standard_error == pytest.approx(np.std(score.draws, ddof=1))


def test_reciprocal_ranks_are_those_of_a_sorted_list() -> None:
    table = plain_cosines(photos(noise=2.5, count=40))
    expected = []
    for i, row in enumerate(table):
        expected.append(1 / (1 + sorted(-row).index(-row[i])))
    assert 0.1 < np.mean(expected) < 0.95
    assert np.allclose(reciprocal_ranks(table), expected)
    # of photos that cannot be told apart, the right one comes in the middle
    assert reciprocal_ranks(np.ones((5, 5))).tolist() == [1 / 3] * 5


def test_copies_depend_on_seed_and_pixels_alone(cifar: str, models: dict[str, str]) -> None:
    encoder = load_encoder(models["vit_mae"])
    images = open_images(cifar).subset(range(6))
    backwards = images.subset([5, 4, 3, 2, 1, 0])
    one, other, seeded = (
        two_views(encoder, chosen, encoder.image_processor, seed=seed)
        for chosen, seed in ((images, 0), (backwards, 0), (images, 1))
    )
    torch.testing.assert_close(one.copies, other.copies.flip(0))
    assert not torch.allclose(one.copies, seeded.copies)
    torch.testing.assert_close(one.plain, seeded.plain)


def test_a_change_is_judged_on_the_same_photos_and_so_more_surely() -> None:
    before, after = photos(noise=2.0), photos(noise=1.7)
    old, new = (label_free_scores(views).scores["separation"] for views in (before, after))
    change = change_between(old, new)
    assert change.difference == pytest.approx(new.value - old.value) and change.difference > 0
    assert change.error < 0.8 * np.hypot(old.standard_error, new.standard_error)


def test_relative_change_leaves_out_what_stayed() -> None:
    before = {
        "a": torch.tensor([3.0, 4.0]),
        "frozen": torch.full((9,), 100.0),
        "gone": torch.ones(1),
    }
    after = {"a": torch.tensor([3.0, 4.5]), "frozen": torch.full((9,), 100.0)}
    assert relative_change(before, after) == pytest.approx(0.5 / 5)
    assert relative_change(before, before) == 0


# --- the rule -------------------------------------------------------------------------------------


def judged(before: TwoViews, after: TwoViews, moved: float = 0.03) -> tuple[str, str]:
    old, new = label_free_scores(before), label_free_scores(after)
    verdict = verdict_on(old, new, moved, f"{len(before.plain)} photos")
    assert verdict.before == old.metrics and verdict.after == new.metrics
    return verdict.outcome, verdict.reason


def test_better_is_what_stands_clearer_apart() -> None:
    outcome, reason = judged(photos(noise=2.0), photos(noise=1.0))
    assert outcome == "better" and "separation d' " in reason and "on 60 photos" in reason


def test_worse_and_unchanged_are_not_better() -> None:
    assert judged(photos(noise=1.0), photos(noise=2.0))[0] == "not better"
    outcome, reason = judged(photos(noise=1.0), photos(noise=1.0))
    assert outcome == "not better" and "no rise beyond chance" in reason


def test_weights_that_did_not_move_are_not_better() -> None:
    outcome, reason = judged(photos(noise=2.0), photos(noise=1.0), moved=0.0003)
    assert outcome == "not better" and "moved by 0.03 % only; a higher learning_rate" in reason


def test_a_collapse_is_not_better_however_clear_a_photo_stands_apart() -> None:
    before, after = photos(noise=4.0), photos(noise=0.05, rank=4)
    old, new = label_free_scores(before), label_free_scores(after)
    assert change_between(old.scores["separation"], new.scores["separation"]).verdict == "better"
    assert new.rankme < GUARD * old.rankme
    outcome, reason = judged(before, after)
    assert outcome == "not better" and "collapsed (RankMe 2" in reason


def test_too_few_photos_do_not_judge() -> None:
    few = LEAST_PHOTOS - 1
    outcome, reason = judged(photos(noise=2.0, count=few), photos(noise=0.1, count=few))
    assert outcome == "not better" and f"{few} photos are too few" in reason
    assert judged(photos(2.0, count=few + 1), photos(0.1, count=few + 1))[0] == "better"


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_photos_that_are_all_alike_do_not_judge() -> None:
    alike = TwoViews(torch.ones(30, 8), torch.full((30, 8), 2.0))
    scores = label_free_scores(alike).scores
    assert scores["separation"].value == 0
    assert all(np.isfinite([score.value, score.standard_error]).all() for score in scores.values())
    assert judged(alike, alike)[0] == "not better"


def test_who_judges(cifar: str) -> None:
    """Held-out photos where there are 200, else the training photos; 2000 at most."""
    train = open_images(cifar)
    many = train.subset(np.arange(5000) % 200)
    few = train.subset(range(50))

    def chosen(training: ImageDataset, evaluation: ImageDataset | None) -> tuple[int, str]:
        found, kind = judging_photos(RunImages(training, evaluation, bank=training))
        assert found is not None
        return len(found), kind

    assert chosen(many, None) == (2000, "training photos")
    assert chosen(many, few) == (2000, "training photos")
    assert chosen(many, train) == (200, "held-out photos")
    assert chosen(few, train) == (200, "held-out photos")


def test_the_plan_says_who_will_judge(
    cifar: str, recipe: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    train = open_images(cifar)
    few = train.subset(range(LEAST_PHOTOS - 1))
    text = judges_text(RunImages(few, None, bank=few))
    assert text.startswith("19 training photos are too few to judge, it takes 20: the start")
    assert judges_text(RunImages(train, None, bank=train)).startswith("by 200 training photos")
    refine(recipe(dry_run=True, eval_fraction=None))
    plan = capsys.readouterr().out
    assert "  verdict by 180 training photos, without labels" in plan, plan


# --- what a run does with it ----------------------------------------------------------------------

STILL = {"learning_rate": 1e-9, "head_learning_rate": 1e-3}
BETTER = {"max_steps": 40, "epochs": 20, "head_epochs": 20}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_encoder(folder).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_the_start_ships_where_nothing_got_better(
    recipe: Recipes, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = recipe(**STILL)
    result = refine(asked)
    assert result is not None and result.verdict.outcome == "not better"
    output, start = Path(asked.output_dir), load_encoder(models["vit_mae"])

    # the start, to the bit, and what was trained beside it
    shipped, kept_back = weights_of(output / "model"), weights_of(output / "refined_not_shipped")
    assert same(shipped, start.state_dict()) and same(result.encoder.state_dict(), shipped)
    assert not same(kept_back, shipped) and same(result.refined.state_dict(), kept_back)
    assert trained_folder(output) == output / "refined_not_shipped"
    assert result.encoder.config.name_or_path == start.config.name_or_path
    assert not (output / "start").exists() and not (output / "checkpoints").exists()
    photo = Image.new("RGB", (40, 40), (200, 30, 90))
    assert np.allclose(result.encoder.encode([photo]), start.encode([photo]))

    # numbers, card, and the last line
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["verdict"] == "not better" and metrics["judgement"]["ships"] == "start"
    assert metrics["judgement"]["weights_change"] < 1e-4
    for side in ("before", "after"):
        found = metrics["judgement"][side]
        assert {"separation", "retrieval", "cluster_stability", "rankme"} < found.keys()
        assert found["separation_standard_error"] > 0
    change = metrics["judgement"]["changes"]["separation"]
    assert change["low"] <= change["difference"] <= change["high"]
    card = (output / "model" / "README.md").read_text()
    assert "holds the STARTING weights" in card and "Verdict: not better." in card
    assert "| refined, not in this folder |" in card and "| this model |" not in card
    said = capsys.readouterr().out
    last = said.strip().splitlines()[-1]
    assert last.startswith("Not better: the weights moved by 0.00 % only")
    assert f"The start ships: {output}/model" in last and "neighbours.png" in last
    assert last.endswith(f"Next: mim-refiner cluster {asked.dataset} --model {output}/model")
    assert "finds a photo again from a distorted copy" in said


@pytest.mark.slow
def test_a_better_result_ships(recipe: Recipes, capsys: pytest.CaptureFixture[str]) -> None:
    asked = recipe(**BETTER)
    output = Path(asked.output_dir)
    # an earlier run into the same folder, that shipped its start
    begin_folder(prepare(asked))
    shutil.copytree(asked.model or "", output / "refined_not_shipped")
    result = refine(asked)
    assert result is not None and result.verdict.outcome == "better", result.verdict
    assert result.encoder is result.refined
    assert same(weights_of(output / "model"), result.refined.state_dict())
    assert not (output / "refined_not_shipped").exists() and not (output / "start").exists()
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["verdict"] == "better" and metrics["judgement"]["ships"] == "refined"
    assert metrics["judgement"]["changes"]["separation"]["low"] > 0
    card = CardData.from_run(output)
    assert card.warning() is None and "Verdict: better." in card.render(result.encoder.config)
    assert "| separation d' of a photo from others" in card.render(result.encoder.config)
    for name in ("neighbours.png", "groups_before_after.png"):
        with Image.open(output / name) as picture:
            assert picture.width > 400 and np.asarray(picture.convert("L")).std() > 20
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("Better: separation d' ") and "on 200 training photos" in last
    # cluster heads are advised where they were measured to be better
    assert last.endswith(f"--model {output}/model")
    many = {**result.metrics, "dataset": {**result.metrics["dataset"], "images": 1000}}
    advice = refine_module._ending(replace(result, metrics=cast(RunRecord, many)), "nowhere/")
    assert advice.endswith(f"mim-refiner cluster photos/ --model {output}/model --method heads")


@pytest.mark.slow
def test_a_resumed_run_comes_to_the_same_verdict(recipe: Recipes) -> None:
    """Stopped in the head warm-up, in the refinement, and once before the first checkpoint."""
    whole, stopped = recipe("whole"), recipe("stopped")
    for step in (1, 3, 6):
        with pytest.MonkeyPatch.context() as patched:
            stop_before(step, patched)
            with pytest.raises(Stopped):
                refine(stopped)
    first, second = refine(whole), refine(stopped)
    assert first is not None and second is not None
    assert first.verdict == second.verdict and first.verdict.before is not None
    assert same(first.encoder.state_dict(), second.encoder.state_dict())


def test_a_lost_start_is_not_judged(recipe: Recipes) -> None:
    asked = recipe()
    with pytest.MonkeyPatch.context() as patched:
        stop_before(6, patched)
        with pytest.raises(Stopped):
            refine(asked)
    shutil.rmtree(Path(asked.output_dir) / "start")
    result = refine(asked)
    assert result is not None and result.verdict.outcome == "not judged"
    assert "start, the start to compare with, is missing" in result.verdict.reason
    assert result.encoder is result.refined


@pytest.mark.slow
def test_a_new_run_from_another_one_is_judged_by_that(recipe: Recipes) -> None:
    """The start is the other run's average, also once its folder is gone."""
    warm = recipe("warm", stage="warmup")
    assert refine(warm) is None
    asked = recipe("new", model=None, init_from=warm.output_dir, **STILL)
    with pytest.MonkeyPatch.context() as patched:
        stop_before(3, patched)
        with pytest.raises(Stopped):
            refine(asked)
    begun = weights_of(Path(asked.output_dir) / "start")
    shutil.rmtree(warm.output_dir)
    result = refine(asked)
    assert result is not None and result.verdict.outcome == "not better"
    assert same(result.encoder.state_dict(), begun)


@pytest.mark.slow
def test_a_stream_is_judged_where_photos_are_named(recipe: Recipes, cifar: str) -> None:
    blind = refine(recipe("blind", streaming=True, max_steps=1))
    assert blind is not None and blind.verdict.outcome == "not judged"
    assert "name photos by eval_dataset" in blind.verdict.reason
    assert blind.metrics["verdict"] == "not judged" and blind.encoder is blind.refined
    card = CardData.from_run(blind.output_dir)
    assert "Nobody judged" in (card.warning() or "")
    seeing = refine(recipe("seeing", streaming=True, max_steps=1, eval_dataset=cifar))
    assert seeing is not None and seeing.verdict.photos == "100 held-out photos"


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("kind", ["two", "alike"])
def test_what_cannot_judge_ships_the_start(
    kind: str, models: dict[str, str], tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    pictures: Any = [Image.new("RGB", (32, 32), (90, 140, 30))] * 24
    if kind == "two":
        pictures = [generator.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(2)]
    result = refine(
        pictures,
        model=models["vit_mae"],
        output_dir=tmp_path,
        max_steps=3,
        report_to="none",
        num_workers=0,
    )
    assert result is not None and result.verdict.outcome == "not better", result
    assert same(weights_of(tmp_path / "model"), weights_of(Path(models["vit_mae"])))


@pytest.mark.slow
def test_exit_code_3_after_everything_is_written(
    recipe: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = recipe(fail_if_not_better=True, **STILL)
    with pytest.raises(NotBetterError, match=r"moved by 0\.00 % only") as raised:
        refine(asked)
    assert raised.value.result.verdict.outcome == "not better"
    output = Path(asked.output_dir)
    assert (output / "model/README.md").is_file() and (output / "metrics.json").is_file()

    recipe_file = output / "again.yaml"
    fields = json.loads((output / "recipe.json").read_text())
    recipe_file.write_text(json.dumps({**fields, "recipe": None}))
    capsys.readouterr()
    words = ["refine", "--recipe", str(recipe_file), "--output_dir", f"{output}-again"]
    assert cli.main(words) == 3
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("Not better: the weights moved") and "--learning_rate" in error
    assert (
        cli.main([*words[:3], "--output_dir", f"{output}-calm", "--fail_if_not_better", "false"])
        == 0
    )


def test_the_help_says_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["refine", "--help"]):
        with pytest.raises(SystemExit):
            cli.main(words)
        told = " ".join(capsys.readouterr().out.split())
        assert "3" in told and "fail_if_not_better" in told
