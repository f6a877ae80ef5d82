"""Runs as MAE-CT's: the momentum projector through both stages, checkpoints and interruptions, and
rates and temperature of each stage.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    assert_identical,
    final_state,
    log_of,
    losses,
    run_stopped_before,
    shorten,
    small_recipes,
)
from torch import Tensor

from mim_refiner_hf import RefineRecipe
from mim_refiner_hf.refinement.trainer import Trainer
from mim_refiner_hf.runs.init_from import encoder_of, open_start
from mim_refiner_hf.runs.run import run
from mim_refiner_hf.runtime.checkpoint import read_checkpoint

pytestmark = pytest.mark.usefixtures("quick")

Recipes = Callable[..., RefineRecipe]

MOMENTUM = 0.9
MAE_CT: dict[str, Any] = {
    "head_blocks": [2],
    "activation": "relu",
    "predictor_norm": False,
    "norm_views": "apart",
    "head_init": "kaiming",
    "swap": "all",
    "local_views": 0,
    "target_momentum": MOMENTUM,
    "head_temperature": 0.15,
    "refine_head_learning_rate": 2e-2,
    "warmup_epochs": None,
    "warmup_share": 0.25,
    "end_learning_rate": 0.0,
    "freeze_blocks": 1,
}
# steps of the head warm-up, and of all
WARM, LAST = 4, 8


def checkpoint(recipe: RefineRecipe, step: int) -> Mapping[str, Tensor]:
    return read_checkpoint(Path(recipe.output_dir) / f"checkpoints/step-{step:08}").tensors


@pytest.fixture(scope="module")
def whole(
    cifar: str, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> RefineRecipe:
    """A run that nothing has interrupted, with a checkpoint after every step; not to be changed."""
    recipe = small_recipes(models["vit_mae"], cifar, tmp_path_factory.mktemp("whole"))
    return finished(recipe("whole", **MAE_CT, save_every=1))


@pytest.fixture(scope="module")
def without(
    cifar: str, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> RefineRecipe:
    """The same run without a momentum projector; not to be changed."""
    recipe = small_recipes(models["vit_mae"], cifar, tmp_path_factory.mktemp("without"))
    return finished(recipe("without", **{**MAE_CT, "target_momentum": None}))


def finished(recipe: RefineRecipe) -> RefineRecipe:
    """The recipe, which has been run."""
    with pytest.MonkeyPatch.context() as patched:
        shorten(patched)
        run(recipe)
    return recipe


def test_the_momentum_projector_is_the_formula_from_the_warm_projector_on(
    whole: RefineRecipe,
) -> None:
    """Weights m * old + (1 - m) * new of the new projector; statistics are the projector's."""
    names = [name for name in checkpoint(whole, LAST) if "target_projector" in name]
    assert len(names) == 3 * 5
    follows: dict[str, Tensor] = {}
    for step in range(WARM, LAST + 1):
        state = checkpoint(whole, step)
        for name in names:
            own = state[name.replace("target_projector", "heads.projector")].double()
            is_statistic = "running_" in name
            if step == WARM or is_statistic:
                follows[name] = own
            else:
                follows[name] = MOMENTUM * follows[name] + (1 - MOMENTUM) * own
            if step > WARM:
                torch.testing.assert_close(state[name].double(), follows[name], atol=1e-6, rtol=0)
                assert is_statistic or not torch.equal(state[name].double(), own)


@pytest.mark.slow
def test_interrupted_run_ends_with_the_same_bits(recipe: Recipes, whole: RefineRecipe) -> None:
    """In the head warm-up, between the stages, before momentum begins, and late."""
    asked = recipe("interrupted", **MAE_CT)
    run_stopped_before(asked, (1, 3, WARM, 5, 6, 7))
    assert_identical(asked, whole)


@pytest.mark.slow
def test_two_stages_one_after_the_other(recipe: Recipes, whole: RefineRecipe) -> None:
    assert run(recipe("pieces", **MAE_CT, stage="warmup")) is None
    run(recipe("pieces", **MAE_CT, stage="refine"))
    assert_identical(recipe("pieces"), whole)


@pytest.mark.slow
def test_momentum_begins_with_the_second_refinement_step(
    without: RefineRecipe, whole: RefineRecipe
) -> None:
    """Until then it is the projector, so that every loss is that of a run without it."""
    assert losses(without)[: WARM + 1] == losses(whole)[: WARM + 1]
    assert losses(without)[WARM + 1] != losses(whole)[WARM + 1]
    assert not any("target_projector" in name for name in final_state(without))


@pytest.mark.slow
def test_each_stage_has_its_temperature(recipe: Recipes, whole: RefineRecipe) -> None:
    """The warm-up's alone changes its losses; the refinement's alone only those after it."""
    softer = recipe("softer", **{**MAE_CT, "temperature": 0.5})
    run(softer)
    assert losses(softer)[:WARM] == losses(whole)[:WARM]
    assert losses(softer)[WARM] != losses(whole)[WARM]
    # with the same temperature as in the refinement, as if none were stated
    alike = recipe("alike", **{**MAE_CT, "head_temperature": None, "temperature": 0.15})
    run(alike)
    assert losses(alike)[:WARM] == losses(whole)[:WARM]


@pytest.mark.slow
def test_rates_of_each_stage(recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of heads and final norm, per step: a quarter of a stage warms up, the cosine ends at 0."""
    seen = []
    update = Trainer.update

    def watched(self: Trainer, step: int, batch: dict[str, Tensor]) -> Any:
        result = update(self, step, batch)
        rates = {
            name: group["lr"] for group in self.optimizer.param_groups for name in group["names"]
        }
        heads, norm = rates["projector.0.weight"], rates.get("norm.weight")
        seen.append((heads, norm))
        return result

    monkeypatch.setattr(Trainer, "update", watched)
    asked = recipe("watched", **MAE_CT)
    run(asked)

    batch = asked.batch_size or 0
    # of 4 updates: half the peak, the peak, then 3/4 and 1/4 of it
    shape = torch.tensor([1 / 2, 1.0, 3 / 4, 1 / 4], dtype=torch.float64) * batch / 256
    heads = torch.tensor([heads for heads, _ in seen], dtype=torch.float64)
    norms = torch.tensor([norm or 0.0 for _, norm in seen], dtype=torch.float64)
    torch.testing.assert_close(heads[:WARM], (asked.head_learning_rate or 0) * shape)
    torch.testing.assert_close(heads[WARM:], (asked.refine_head_learning_rate or 0) * shape)
    torch.testing.assert_close(norms[WARM:], (asked.learning_rate or 0) * shape)
    logged = [line["learning_rate"] for line in log_of(asked) if "learning_rate" in line]
    assert logged == pytest.approx([*heads[:WARM].tolist(), *norms[WARM:].tolist()])


def test_frozen_blocks_stay(whole: RefineRecipe) -> None:
    before, after = checkpoint(whole, WARM), checkpoint(whole, LAST)
    encoder = {name for name in after if name.startswith("refiner.encoder.")}
    kept = {name for name in encoder if torch.equal(before[name], after[name])}
    assert kept == {name for name in encoder if ".embeddings." in name or ".layers.0." in name}


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "theirs"), [(None, MOMENTUM), (0.5, None), (0.5, MOMENTUM)])
def test_a_run_from_heads_with_or_without_momentum(
    theirs: float | None,
    ours: float | None,
    recipe: Recipes,
    whole: RefineRecipe,
    without: RefineRecipe,
) -> None:
    """The projector comes along; a momentum projector begins as it, whatever the other one had."""
    old = without if theirs is None else whole
    start = open_start(old.output_dir)
    dropped = encoder_of(start).load_report.dropped
    assert ("target projectors" in dropped) == (theirs is not None)

    settings = {**MAE_CT, "target_momentum": ours, "learning_rate": 1e-9, "max_steps": 1}
    settings |= {"refine_head_learning_rate": 1e-9, "model": None, "init_from": old.output_dir}
    new = recipe("new", **settings)
    run(new)
    state = final_state(new)
    held = [name for name in state if "target_projector" in name]
    assert bool(held) == (ours is not None)
    for name in held:
        if "running_" not in name:
            projector = start.tensors[name.replace("target_projector", "heads.projector")]
            torch.testing.assert_close(state[name], projector, atol=1e-6, rtol=0)


def test_heads_of_another_kind_do_not_come_along(recipe: Recipes, whole: RefineRecipe) -> None:
    changes = {"model": None, "init_from": whole.output_dir}
    for name, value in (("activation", "gelu"), ("predictor_norm", True)):
        with pytest.raises(ValueError, match=rf"recipe asks for others \({name}="):
            run(recipe("new", **{**MAE_CT, **changes, name: value}))
