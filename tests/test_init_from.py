"""`--init_from`: a new run from another run's weights, heads and queues.

Not a continuation of it.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from small_runs import (
    Stopped,
    assert_identical,
    final_state,
    log_of,
    losses,
    small_recipes,
    stop_before,
)

from mim_refiner_hf import RefineRecipe, cli
from mim_refiner_hf.refinement.batches import view_batches
from mim_refiner_hf.refinement.recipe_files import parse_recipe, read_recipe
from mim_refiner_hf.refinement.resolve import Steps
from mim_refiner_hf.refinement.trainer import Trainer
from mim_refiner_hf.runs import run as run_module
from mim_refiner_hf.runs.init_from import encoder_of, open_start, place_heads
from mim_refiner_hf.runs.run import run
from mim_refiner_hf.runtime.checkpoint import load_latest, save_checkpoint
from mim_refiner_hf.runtime.files import CheckpointError
from mim_refiner_hf.runtime.tensor_files import TENSORS

pytestmark = pytest.mark.usefixtures("quick")

Recipes = Callable[..., RefineRecipe]


@pytest.fixture(scope="module")
def old(
    cifar: str, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> RefineRecipe:
    """A run of 4 + 4 steps that still has its checkpoints; not to be changed."""
    asked = small_recipes(models["vit_mae"], cifar, tmp_path_factory.mktemp("old"))("old")
    run(asked)
    return asked


def first_loss_of(old: RefineRecipe) -> float:
    """The loss that the old run's average, heads and queue give on a refinement's first batch."""
    prepared = run_module.prepare(old)
    start = prepared.start
    assert start.encoder is not None and prepared.resume is not None
    trainer = Trainer(
        dataclasses.replace(prepared.recipe, steps=Steps(0, 4)),
        Accelerator(),
        prepared.images.training,
        start.encoder,
        start.processor.image_mean,
        start.processor.image_std,
    )
    tensors = prepared.resume.tensors
    for name, tensor in trainer.refiner.state_dict(keep_vars=True).items():
        source = (
            f"average.{name.removeprefix('encoder.')}"
            if name.startswith("encoder.")
            else f"refiner.{name}"
        )
        tensor.data.copy_(tensors[source])
    device = trainer.accelerator.device
    batches = view_batches(trainer.recipe, trainer.images, 0, 1, device)
    return trainer.update(0, next(iter(batches))).loss.item()


@pytest.mark.slow
def test_the_first_loss_is_that_of_the_old_weights(old: RefineRecipe, recipe: Recipes) -> None:
    new = recipe("new", model=None, init_from=old.output_dir, head_blocks=None)
    run(new)
    assert losses(new)[0] == first_loss_of(old)
    log = log_of(new)
    assert [line["step"] for line in log] == [1, 2, 3, 4] and {line["stage"] for line in log} == {
        "refine"
    }
    # the queue came with its labels
    assert all("output/neighbour_accuracy" in line for line in log)
    # as the refinement of the old run began
    assert log[0]["learning_rate"] == log_of(old)[4]["learning_rate"]
    by_checkpoint = recipe(
        "by-checkpoint", model=None, init_from=f"{old.output_dir}/checkpoints/step-00000008"
    )
    run(by_checkpoint)
    assert_identical(by_checkpoint, new)


def test_another_data_set_knows_none_of_the_queued_images(
    old: RefineRecipe, recipe: Recipes, cifar: str, tmp_path: Path
) -> None:
    shutil.copy(cifar, tmp_path / "others.parquet")
    new = recipe(
        "new",
        model=None,
        init_from=old.output_dir,
        dataset=str(tmp_path / "others.parquet"),
        max_steps=1,
    )
    run(new)
    state, before = final_state(new), final_state(old)
    assert (
        (state["refiner.queue.sample_index"] == -1).sum()
        == (state["refiner.queue.labels"] == -1).sum()
        == 32
    )
    kept = state["refiner.queue.sample_index"] == -1
    assert torch.equal(state["refiner.queue.rows"][:, kept], before["refiner.queue.rows"][:, kept])
    assert not any("neighbour_accuracy" in key for key in log_of(new)[0])


@pytest.mark.slow
def test_an_interrupted_new_run_goes_on_without_the_old_one(
    recipe: Recipes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Warm heads for two refinements.

    One is stopped, the warm run removed, and the same command ends with the same bits.
    """
    warm = recipe("warm", stage="warmup", pooling="mean")
    run(warm)
    settings = {"model": None, "init_from": warm.output_dir, "temperature": 0.3, "pooling": None}
    whole, stopped = recipe("whole", **settings), recipe("stopped", **settings)
    result = run(whole)
    assert result is not None and result.refined.config.pooling == "mean"
    assert result.metrics["starting_model"] == f"the weights of the run {warm.output_dir}"

    with monkeypatch.context() as patch:
        stop_before(3, patch)
        with pytest.raises(Stopped):
            run(stopped)
    with pytest.raises(ValueError, match=r"another recipe \(init_from was .*warm, is .*whole"):
        run(dataclasses.replace(stopped, init_from=whole.output_dir))
    shutil.rmtree(warm.output_dir)
    run(stopped)
    assert_identical(stopped, whole)


def test_every_tensor_is_placed_or_dropped_by_name(old: RefineRecipe) -> None:
    start = open_start(old.output_dir)
    encoder = encoder_of(start)
    report = encoder.load_report
    dropped = [name for names in report.dropped.values() for name in names]
    assert report.placed + len(dropped) == len(start.tensors) and len(set(dropped)) == len(dropped)
    assert set(report.dropped) == {"the encoder beside its average", "optimiser"}
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, start.tensors[f"average.{name}"])
    for wrong in ({"average.stray": torch.ones(1)}, {"refiner.predictor.weight": torch.ones(1)}):
        with pytest.raises(CheckpointError, match=r"stray|refiner\.predictor\.weight"):
            encoder_of(dataclasses.replace(start, tensors={**start.tensors, **wrong}))
    expected = {
        name: tensor for name, tensor in start.tensors.items() if not name.startswith("optimizer.")
    }
    less = dataclasses.replace(
        start,
        tensors={n: tensor for n, tensor in start.tensors.items() if n != "refiner.queue.norms"},
    )
    with pytest.raises(
        CheckpointError, match=r"1 tensors are missing, first refiner\.queue\.norms"
    ):
        place_heads(less, expected, None, None, same_data=True)


WRONG = [
    ({"embedding_dim": 8}, "--embedding_dim 8, there 16"),
    ({"projector_dim": 64}, "--projector_dim 64, there 32"),
    ({"predictor_dim": 64}, "--predictor_dim 64, there 48"),
    ({"queue_size": 128}, "--queue_size 128, there 64"),
    ({"head_blocks": [0, 2]}, "--head_blocks 0 2, there 1 2"),
    ({"pooling": "mean"}, "--pooling mean, there cls"),
    ({"stage": "warmup"}, "--stage warmup exclude each other"),
    ({"head_blocks": "auto"}, "--head_blocks auto exclude each other"),
    ({"model": "facebook/vit-mae-base"}, "--model facebook/vit-mae-base and --init_from"),
    ({"pretrain": "pretrain-digits"}, "--pretrain pretrain-digits and --init_from"),
    ({"init_from": "{old}/nowhere"}, "no such folder"),
    (
        {"init_from": "facebook/vit-mae-base"},
        "no such folder; give a run's output folder, or for a model use --model",
    ),
    ({"init_from": "{models}"}, "no heads and no queues to start from; use --model {models}"),
    (
        {"init_from": "{finished}"},
        "a finished run keeps its model alone: use --model {finished}/model",
    ),
    ({"init_from": "{early}"}, "heads are at step 2 of 4 of their warm-up"),
    ({"init_from": "{damaged}"}, "no intact checkpoint"),
]


def test_wrong_use(
    old: RefineRecipe,
    recipe: Recipes,
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One sentence and exit code 2, and nothing is written."""
    finished, checkpoints = tmp_path / "finished", Path(old.output_dir) / "checkpoints"
    shutil.copytree(models["vit_mae"], finished / "model")
    shutil.copytree(checkpoints / "step-00000006", tmp_path / "step-00000006")
    tensors = load_file(tmp_path / "step-00000006" / TENSORS)
    save_file(
        {name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "step-00000006" / TENSORS
    )
    places = {
        "old": old.output_dir, "models": models["vit_mae"], "finished": str(finished),
        "early": str(checkpoints / "step-00000002"), "damaged": str(tmp_path / "step-00000006"),
    }  # fmt: skip
    for changes, says in WRONG:
        fields = {"model": None, "init_from": old.output_dir, **changes}
        fields["init_from"] = str(fields["init_from"]).format(**places)
        asked = {**dataclasses.asdict(recipe("new")), **fields}
        words: list[str] = []
        for name, value in asked.items():
            if value not in (None, ""):
                words += [
                    f"--{name}",
                    *(map(str, value) if isinstance(value, list) else [str(value)]),
                ]
        try:
            code = cli.main(["refine", *words])
        except SystemExit as stopped:
            code = stopped.code  # type: ignore[assignment]
        error = capsys.readouterr().err
        assert code == 2 and says.format(**places) in error, (changes, error)
        assert not (tmp_path / "new").exists()


def test_checkpoints_of_earlier_versions_are_refused_with_what_to_do(
    old: RefineRecipe, tmp_path: Path
) -> None:
    found = load_latest(Path(old.output_dir) / "checkpoints")
    assert found is not None
    state = {
        key: value for key, value in found.state.items() if key not in ("encoder", "preprocessing")
    }
    path = save_checkpoint(tmp_path / "earlier", step=8, tensors=found.tensors, state=state, keep=1)
    with pytest.raises(
        CheckpointError,
        match=r"of an earlier version and lacks encoder, preprocessing; go on with that run",
    ):
        open_start(str(path))


def test_a_recipes_own_starting_weights_are_left_out() -> None:
    recipe = read_recipe("quickstart", init_from="warm")
    assert (recipe.init_from, recipe.pretrain, recipe.model) == ("warm", None, None)
    parsed = parse_recipe(["--recipe", "mae-refined-l16", "--init_from", "warm"])
    assert (parsed.init_from, parsed.model, parsed.batch_size) == ("warm", None, 1024)
