"""The recipes of MAE-CT hold the numbers of the authors' code (arXiv 2304.10520), and what its
fields refuse.
"""

import dataclasses
from typing import Any, NamedTuple

import pytest

from mim_refiner_hf import MimRefinerConfig, RefineRecipe, read_recipe
from mim_refiner_hf.conversion.zoo import ZOO
from mim_refiner_hf.data.views import view_specs
from mim_refiner_hf.refinement.auto import Situation, fit
from mim_refiner_hf.refinement.misfit import misfits
from mim_refiner_hf.refinement.recipe_files import parse_recipe
from mim_refiner_hf.refinement.resolve import ResolvedRecipe, Steps, resolve
from mim_refiner_hf.runs.plan import checkpoint_bytes

IMAGENET = 1_281_167
SHAPES = {
    "b16": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "l16": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "h16": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16},
    "h14": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16},
}


class Tuned(NamedTuple):
    """What differs between the models of the authors; rates by their rule, before it doubles."""

    batch: int
    epochs: int
    temperature: float
    topk: int
    momentum: float
    head_rate: float


TUNED = {
    "mae-ct-b16": Tuned(1024, 20, 0.15, 20, 0.99, 1e-4),
    "mae-ct-l16": Tuned(1024, 20, 0.2, 20, 0.99, 1e-4),
    "mae-ct-h16": Tuned(512, 30, 0.3, 20, 0.995, 1e-4),
    "mae-ct-h14": Tuned(512, 30, 0.3, 20, 0.995, 1e-4),
    "mae-ct-aug-b16": Tuned(1024, 80, 0.15, 10, 0.99, 5e-4),
    "mae-ct-aug-l16": Tuned(1024, 40, 0.15, 10, 0.99, 5e-4),
    "mae-ct-aug-h16": Tuned(512, 40, 0.35, 20, 0.995, 5e-4),
    "mae-ct-aug-h14": Tuned(512, 40, 0.35, 20, 0.995, 5e-4),
}
IN_ALL_OF_THEM = {
    "projector_dim": 2048,
    "predictor_dim": 4096,
    "embedding_dim": 256,
    "queue_size": 65536,
    "activation": "relu",
    "predictor_norm": False,
    "norm_views": "apart",
    "head_init": "kaiming",
    "swap": "all",
    "head_temperature": 0.15,
    "head_epochs": 20,
    "warmup_epochs": None,
    "warmup_share": 0.2,
    "end_learning_rate": 0.0,
    "layer_decay": 0.65,
    "weight_decay": 0.05,
    "head_weight_decay": 1e-5,
    "ema_decay": 0.9999,
    "loss_schedule": "constant",
    "global_views": 2,
    "local_views": 0,
    "global_size": 224,
    "global_scale": [0.08, 1.0],
    "flip": 0.5,
    "stage": "both",
}


def config_of(name: str) -> MimRefinerConfig:
    """The encoder of a recipe."""
    size = name.rpartition("-")[2]
    return MimRefinerConfig(**SHAPES[size], patch_size=int(size[1:]))


def resolved(name: str, **changes: Any) -> ResolvedRecipe:
    return resolve(read_recipe(name, **changes), config_of(name), IMAGENET)


@pytest.mark.parametrize("name", TUNED)
def test_the_numbers_are_the_authors(name: str) -> None:
    tuned = TUNED[name]
    size = name.rpartition("-")[2]
    recipe = resolved(name)
    written = recipe.as_written()
    assert {field: written[field] for field in IN_ALL_OF_THEM} == IN_ALL_OF_THEM
    found = (recipe.batch_size, recipe.epochs, recipe.temperature, recipe.topk)
    assert found == (tuned.batch, tuned.epochs, tuned.temperature, tuned.topk)
    assert recipe.target_momentum == tuned.momentum
    assert recipe.pooling == ("mean" if size == "b16" else "cls")

    # one head on the output; the lower half frozen
    layers = SHAPES[size]["num_hidden_layers"]
    assert (recipe.head_blocks, recipe.freeze_blocks) == ([layers - 1], layers // 2)
    assert recipe.colour == ("-aug-" in name)

    # their peak is base x 2 x batch / 256, ours base x batch / 256
    for ours, theirs in (
        (recipe.learning_rate, 1e-4),
        (recipe.head_learning_rate, 1e-4),
        (recipe.refine_head_learning_rate, tuned.head_rate),
    ):
        peak = theirs * 2 * tuned.batch / 256
        assert ours * recipe.batch_size / 256 == pytest.approx(peak, rel=1e-12)

    updates = IMAGENET // tuned.batch
    assert recipe.steps == (20 * updates, tuned.epochs * updates)
    assert recipe.warmups == (4 * updates, tuned.epochs // 5 * updates)


@pytest.mark.parametrize("name", TUNED)
def test_a_recipe_starts_from_the_mae_of_its_size(name: str) -> None:
    model = str(read_recipe(name).model)
    size = name.rpartition("-")[2]
    if size == "h14":
        assert model == "facebook/vit-mae-huge"
    else:
        entry = ZOO[model]
        assert entry.title == "MAE by MAE-CT's authors"
        assert entry.architecture == f"ViT-{size[0].upper()}/{size[1:]}"
    # it goes on from what was written of it
    recipe = resolved(name)
    again = RefineRecipe(**recipe.as_written())
    assert resolve(again, config_of(name), IMAGENET).as_written() == recipe.as_written()
    assert not any("warmup" in line for line in misfits(recipe))


def test_views_of_both_variants() -> None:
    """BYOL's, per view; or crop and flip only."""
    for name in ("mae-ct-l16", "mae-ct-aug-l16"):
        recipe = resolved(name)
        specs = view_specs(
            recipe.global_views,
            recipe.local_views,
            recipe.global_size,
            recipe.local_size,
            recipe.global_scale,
            recipe.local_scale,
            recipe.colour,
            recipe.flip,
        )
        assert [(spec.size, spec.scale, spec.flip) for spec in specs] == [
            (224, (0.08, 1.0), 0.5)
        ] * 2
        assert [spec.colour for spec in specs] == [name == "mae-ct-aug-l16"] * 2
        assert [(spec.blur_p, spec.solarize_p) for spec in specs] == [(1.0, 0.0), (0.1, 0.2)]
        assert {spec.blur_scale for spec in specs} == {1.0}


def test_a_share_is_rounded_down_in_each_stage() -> None:
    recipe = resolved("mae-ct-l16")
    for updates, warm in ((13 * 7, 18), (99, 19), (4, 0), (1, 0), (0, 0)):
        changed = dataclasses.replace(recipe, steps=Steps(updates, 2 * updates))
        assert changed.warmups == (warm, int(2 * updates / 5))


def test_what_the_other_methods_leave_out_is_mim_refiners() -> None:
    config = MimRefinerConfig(**SHAPES["l16"])
    recipe = resolve(read_recipe("mae-refined-l16"), config, IMAGENET)
    assert (recipe.activation, recipe.predictor_norm, recipe.head_init) == ("gelu", True, "xavier")
    assert (recipe.norm_views, recipe.target_momentum) == ("together", None)
    assert recipe.head_temperature == recipe.temperature
    assert recipe.refine_head_learning_rate == recipe.learning_rate
    assert (recipe.end_learning_rate, recipe.warmup_share) == (1e-6, None)
    updates = IMAGENET // 1024
    assert recipe.warmups == (4 * updates, 4 * updates)


def test_a_momentum_projector_is_in_what_a_checkpoint_takes() -> None:
    config = MimRefinerConfig(**SHAPES["l16"])
    sizes = [
        checkpoint_bytes(resolved("mae-ct-l16", target_momentum=momentum), config)
        for momentum in (None, 0.99)
    ]
    assert sizes[1] - sizes[0] == 4 * 2048 * (1024 + 2048 + 256)


@pytest.mark.parametrize("num_images", [None, 50, 777, 5000])
@pytest.mark.parametrize("topk", [None, 30])
def test_a_queue_that_is_left_open_is_whole_batches(
    num_images: int | None, topk: int | None
) -> None:
    stream = {"streaming": True, "max_steps": 9} if num_images is None else {}
    recipe = RefineRecipe(model="a", target_momentum=0.9, topk=topk, **stream)
    situation = Situation(MimRefinerConfig(**SHAPES["b16"]), num_images)
    fitted = fit(recipe, situation).recipe
    assert fitted.queue_size and fitted.batch_size and fitted.topk
    assert fitted.queue_size % fitted.batch_size == 0
    assert fitted.queue_size >= max(fitted.batch_size, fitted.topk)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"target_momentum": 1.0}, "target_momentum 1.0: must be greater than 0 and less than 1"),
    ({"target_momentum": 0.0}, "target_momentum 0.0: must be greater than 0 and less than 1"),
    ({"target_momentum": -0.5}, "target_momentum -0.5: must be greater than 0 and less than 1"),
    ({"warmup_share": 1.0}, "warmup_share 1.0: must be at least 0 and less than 1"),
    ({"end_learning_rate": -0.001}, "end_learning_rate -0.001: must be at least 0"),
    ({"head_temperature": 0.0}, "head_temperature 0.0: must be a number greater than 0"),
    ({"refine_head_learning_rate": 0.0}, "must be a number greater than 0"),
    (
        {"target_momentum": 0.99, "queue_size": 100, "batch_size": 32},
        "queue_size 100: with --target_momentum 0.99 it must be a multiple of --batch_size 32, "
        "for example 96",
    ),
    (
        {"warmup_share": 0.2, "warmup_epochs": 4},
        "--warmup_epochs 4.0 and --warmup_share 0.2 exclude each other: give one of them",
    ),
]


@pytest.mark.parametrize(("changes", "says"), WRONG)
def test_what_a_field_refuses_on_the_command_line(
    changes: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    with pytest.raises(SystemExit) as stopped:
        parse_recipe(["--model", "a", *words])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip()
    assert says in message and "\n" not in message
    with pytest.raises(ValueError, match=next(iter(changes))):
        RefineRecipe(model="a", **changes)


@pytest.mark.parametrize(
    ("field", "allowed"),
    [
        ("activation", "one of gelu, relu"),
        ("norm_views", "one of together, apart"),
        ("head_init", "one of xavier, kaiming"),
    ],
)
def test_words_that_a_field_does_not_know(
    field: str, allowed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=f"^{field}='swish': must be {allowed}$"):
        RefineRecipe(model="a", **{field: "swish"})
    with pytest.raises(SystemExit) as stopped:
        parse_recipe(["--model", "a", f"--{field}", "swish"])
    assert stopped.value.code == 2
    assert f"argument --{field}" in capsys.readouterr().err


def test_a_queue_need_not_be_whole_batches_without_momentum() -> None:
    assert RefineRecipe(model="a", queue_size=100, batch_size=32).queue_size == 100
