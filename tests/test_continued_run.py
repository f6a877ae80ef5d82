"""What does not change a run: interruptions, stages apart, micro-batches, workers, a stream.

And what must not be continued.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from small_runs import (
    SHAPE,
    Stopped,
    assert_identical,
    final_state,
    losses,
    shorten,
    small_recipes,
    stop_before,
)
from torch import Tensor

from mim_refiner_hf import RefineRecipe
from mim_refiner_hf.conversion import load_encoder
from mim_refiner_hf.evaluation import report
from mim_refiner_hf.pretraining.loop import Pretrainer
from mim_refiner_hf.runs import run as run_module
from mim_refiner_hf.runs.prepare import prepare
from mim_refiner_hf.runs.run import run
from mim_refiner_hf.runtime.checkpoint import load_latest
from mim_refiner_hf.runtime.tracking import JsonlTracker

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def uninterrupted(
    cifar: str, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> RefineRecipe:
    """A finished run; not to be changed."""
    asked = small_recipes(models["vit_mae"], cifar, tmp_path_factory.mktemp("whole"))("whole")
    with pytest.MonkeyPatch.context() as patched:
        shorten(patched)
        run(asked)
    return asked


@pytest.mark.slow
def test_interrupted_run_ends_with_the_same_bits(
    recipe: Callable[..., RefineRecipe], uninterrupted: RefineRecipe
) -> None:
    """Killed before the first checkpoint, between two of each stage, and where the stages change.

    The command is always the same.
    """
    asked = recipe("interrupted")
    for step in (1, 3, 4, 5, 7):
        with pytest.MonkeyPatch.context() as patched:
            stop_before(step, patched)
            with pytest.raises(Stopped):
                run(asked)
        with (Path(asked.output_dir) / "log.jsonl").open("a") as log:
            # what a full disk leaves of a line
            log.write('{"step": ')
    run(asked)
    assert_identical(asked, uninterrupted)


@pytest.mark.slow
def test_two_stages_one_after_the_other(
    recipe: Callable[..., RefineRecipe], uninterrupted: RefineRecipe
) -> None:
    assert run(recipe("pieces", stage="warmup")) is None
    result = run(recipe("pieces", stage="refine"))
    assert result is not None
    assert_identical(recipe("pieces"), uninterrupted)


@pytest.mark.slow
def test_how_it_runs_does_not_change_what_is_trained(
    recipe: Callable[..., RefineRecipe], uninterrupted: RefineRecipe
) -> None:
    other = recipe("other", num_workers=2, save_every=3)
    run(other)
    assert_identical(other, uninterrupted)
    seeded = recipe("seeded", seed=1)
    run(seeded)
    assert losses(seeded) != losses(uninterrupted)


def averaged(state: Mapping[str, Tensor]) -> Tensor:
    """All weights of the moving average in one vector."""
    return torch.cat(
        [value.flatten() for key, value in state.items() if key.startswith("average.")]
    )


@pytest.mark.slow
def test_micro_batches_and_gradient_checkpointing_change_nothing(
    recipe: Callable[..., RefineRecipe], uninterrupted: RefineRecipe
) -> None:
    exact = averaged(final_state(uninterrupted))
    for name, settings in (
        ("micro", {"micro_batch_size": 5}),
        ("both", {"micro_batch_size": 16, "gradient_checkpointing": True}),
    ):
        asked = recipe(name, **settings)
        run(asked)
        assert losses(asked) == pytest.approx(losses(uninterrupted), rel=1e-3), name
        # of all weights together: Adam moves one whose gradient is near zero by its sign alone
        assert (averaged(final_state(asked)) - exact).norm() <= 1e-3 * exact.norm(), name


def test_finished_run_is_not_trained_again(
    uninterrupted: RefineRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = final_state(uninterrupted)
    stop_before(0, monkeypatch)
    result = run(uninterrupted)
    assert result is not None
    for name, tensor in result.refined.state_dict().items():
        assert torch.equal(tensor, before[f"average.{name}"])


@pytest.fixture
def pretraining(tmp_path: Path) -> dict[str, Any]:
    """Fields of a run that pre-trains its start in two steps."""
    small = {
        **SHAPE,
        "decoder_size": 16,
        "decoder_layers": 1,
        "decoder_attention_heads": 1,
        "epochs": 2,
        "warmup_epochs": 0,
    }
    del small["intermediate_size"]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**small, "batch_size": 100}))
    return {
        "model": None,
        "pretrain": str(tmp_path / "small.yaml"),
        "max_steps": 2,
        "eval_fraction": 0.25,
        "save_every": 1,
    }


@pytest.mark.slow
def test_pretraining_is_not_repeated_by_a_continued_run(
    recipe: Callable[..., RefineRecipe], pretraining: dict[str, Any]
) -> None:
    whole, interrupted = recipe("whole", **pretraining), recipe("interrupted", **pretraining)
    run(whole)
    with pytest.MonkeyPatch.context() as patched:
        stop_before(3, patched)
        with pytest.raises(Stopped):
            run(interrupted)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            run_module, "pretrained_start", lambda *_, **__: pytest.fail("pre-trained again")
        )
        run(interrupted)
    assert_identical(interrupted, whole)
    # the start is kept, and is what was measured
    for once in (whole, interrupted):
        folder, prepared = Path(once.output_dir), run_module.prepare(once)
        start = load_encoder(folder / "pretrained")
        images = prepared.images
        assert images.bank is not None and images.evaluation is not None
        measured = report.evaluate_encoder(
            start, start.image_processor, images.bank, images.evaluation, seed=once.seed
        )
        assert measured.metrics == json.loads((folder / "metrics.json").read_text())["before"]


@pytest.mark.slow
def test_a_run_goes_on_within_its_pretraining(
    recipe: Callable[..., RefineRecipe], pretraining: dict[str, Any]
) -> None:
    whole = recipe("whole", **pretraining)
    run(whole)
    midway = recipe("midway", **pretraining)
    with pytest.MonkeyPatch.context() as patched:
        update = Pretrainer.update

        def stopping(self: Pretrainer, step: int, batch: dict[str, Any]) -> Any:
            if step == 1:
                raise Stopped
            return update(self, step, batch)

        patched.setattr(Pretrainer, "update", stopping)
        with pytest.raises(Stopped):
            run(midway)
    begun = load_latest(Path(midway.output_dir) / "pretraining/checkpoints")
    assert begun is not None and begun.step == 1
    run(midway)
    assert_identical(midway, whole)
    assert not (Path(midway.output_dir) / "pretraining/checkpoints").exists()


def test_stream(recipe: Callable[..., RefineRecipe], cifar: str) -> None:
    """Read in passing, over an epoch's end (6 batches of 32 in 200 images), interrupted in the
    middle.
    """
    settings = {"streaming": True, "max_steps": 4}
    whole, interrupted = recipe("whole", **settings), recipe("interrupted", **settings)
    result = run(whole)
    assert result is not None
    assert result.metrics["dataset"]["images"] is None
    with pytest.MonkeyPatch.context() as patched:
        stop_before(7, patched)
        with pytest.raises(Stopped):
            run(interrupted)
    run(interrupted)
    assert_identical(interrupted, whole)


def test_another_recipe_does_not_continue(
    recipe: Callable[..., RefineRecipe], uninterrupted: RefineRecipe
) -> None:
    with pytest.raises(ValueError, match=r"another recipe \(temperature was 0.2, is 0.5"):
        run(dataclasses.replace(uninterrupted, temperature=0.5))


def test_another_spelling_of_a_path_is_the_same_recipe(
    recipe: Callable[..., RefineRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped run goes on where its data set and model are written in another way."""
    asked = recipe("spelt")
    stop_before(3, monkeypatch)
    with pytest.raises(Stopped):
        run(asked)
    monkeypatch.undo()
    monkeypatch.chdir(Path(asked.dataset).parent)
    again = f"./{Path(asked.dataset).name}"
    assert again != asked.dataset
    check_same = dataclasses.replace(asked, dataset=again, model=f"{asked.model}/")
    prepare(check_same)
    with pytest.raises(ValueError, match=r"another recipe \(dataset was"):
        prepare(dataclasses.replace(asked, dataset="digits"))


def test_a_changed_setting_is_named_before_what_it_contradicts(
    recipe: Callable[..., RefineRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer epochs than the warm-up that the run in the folder began with."""
    asked = recipe("changed", warmup_epochs=None, epochs=4.0)
    stop_before(3, monkeypatch)
    with pytest.raises(Stopped):
        run(asked)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"another recipe \(epochs was 4\.0, is 0\.01\)"):
        prepare(dataclasses.replace(asked, epochs=0.01))


@pytest.mark.parametrize("place", ["among", "around", "same"])
def test_no_run_is_written_among_its_images(
    recipe: Callable[..., RefineRecipe], tmp_path: Path, place: str
) -> None:
    """Its pictures would be images of the next run."""
    photos = tmp_path / "outer/photos"
    photos.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(photos / "a.png")
    folder = {"among": photos / "out", "around": tmp_path / "outer", "same": photos}[place]
    asked = dataclasses.replace(recipe(), dataset=str(photos), output_dir=str(folder))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="lie within each other"):
        prepare(asked)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_run_is_written_into_the_folder_of_others(
    recipe: Callable[..., RefineRecipe], tmp_path: Path
) -> None:
    """Such as that of `cluster`; hidden files, and a lock, are nobody's."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / ".run.lock").touch()
    asked = dataclasses.replace(recipe(), output_dir=str(folder))
    prepare(asked)
    (folder / "groups.csv").touch()
    with pytest.raises(ValueError, match=r"holds groups\.csv and is no run's folder"):
        prepare(asked)


@pytest.mark.slow
def test_fields_that_an_older_version_did_not_know_count_as_left_out(
    recipe: Callable[..., RefineRecipe],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fields = ("swap", "views", "loss_schedule", "freeze_blocks", "flip")
    asked = recipe("whole", max_steps=4, **{field: default_of(field) for field in fields})
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_before(5, patched)
        run(asked)
    saved = Path(asked.output_dir) / "recipe.json"
    older = json.loads(saved.read_text())
    for field in fields:
        older.pop(field)
    # and one that it called by a name that is another's now
    older["keep"] = older.pop("save_total_limit")
    saved.write_text(json.dumps(older))
    run(asked)
    (said,) = re.findall("of an older version; it goes on with (.*)", caplog.text)
    assert {lacking.split()[0] for lacking in said.split(", ")} == {*fields, "keep"}


def default_of(name: str) -> Any:
    """The default of a field of the recipe."""
    return next(field.default for field in dataclasses.fields(RefineRecipe) if field.name == name)


@pytest.mark.parametrize(
    "damage",
    [
        b"\0" * 40,
        b"\xff\xfe}",
        b"xx}",
        b"]",
        b'{"step": "three"}',
        b'{"loss": 1.0}',
        b'{"step": 3, "loss": 0.',
    ],
)
def test_damaged_lines_of_the_log_are_set_aside(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}).encode() for step in (1, 2, 3, 4)]
    log.write_bytes(b"\n".join([lines[0], damage, *lines[1:]]) + b"\n")
    JsonlTracker(log, start_step=3).start()
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]
    assert (tmp_path / "log.jsonl.damaged").read_bytes() == damage + b"\n"
    assert "1 damaged lines are set aside in log.jsonl.damaged" in caplog.text


def test_a_log_that_is_gone_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    JsonlTracker(tmp_path / "log.jsonl", start_step=3).start()
    assert "log.jsonl lacks the steps up to 3" in caplog.text
    caplog.clear()
    JsonlTracker(tmp_path / "new.jsonl", start_step=0).start()
    assert caplog.text == ""
