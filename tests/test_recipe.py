"""Recipes: the paper's numbers, one recipe from YAML, Python and the command line, and what is
derived from the encoder.
"""

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from PIL import Image

from mim_refiner_hf import (
    MimRefinerConfig,
    MimRefinerModel,
    RefineRecipe,
    read_recipe,
)
from mim_refiner_hf.cli.main import main
from mim_refiner_hf.conversion.zoo import ZOO
from mim_refiner_hf.evaluation.fine_tuning import FineTuneRecipe
from mim_refiner_hf.pretraining.recipe import PretrainRecipe
from mim_refiner_hf.refinement.recipe import START_FIELDS
from mim_refiner_hf.refinement.recipe_files import parse_recipe
from mim_refiner_hf.refinement.recipe_method import default_head_blocks
from mim_refiner_hf.refinement.resolve import count_steps, resolve
from mim_refiner_hf.runs.begun import check_as_begun
from mim_refiner_hf.runs.plan import plan_text
from mim_refiner_hf.runtime.settings import check_fields, read_fields, recipe_file

RECIPES = Path(__file__).parents[1] / "training/recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
REFINING = [name for name in NAMES if not name.startswith(("pretrain-", "fine-tune-"))]
IMAGENET = 1_281_167

L16 = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 16}
H14 = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14}
TWOB14 = {"hidden_size": 2560, "num_hidden_layers": 24, "num_attention_heads": 32, "patch_size": 14}
SHAPES = {
    "b16": {"num_hidden_layers": 12, "patch_size": 16},
    "l16": L16,
    "h16": {**H14, "patch_size": 16},
    "h14": H14,
    "2b14": TWOB14,
    "tiny": {"num_hidden_layers": 12, "patch_size": 4, "image_size": 32},
}

KEPT_SHAPES = {
    **SHAPES,
    "tiny": {**SHAPES["tiny"], "hidden_size": 192, "num_attention_heads": 3},
    "digits": {
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "patch_size": 4,
        "image_size": 16,
    },
}

# What the released models were refined with (paper, Table 10; METHOD "Two stages"): encoder,
# epochs, batch, temperature,
# first block with a head (all later ones have one), side of a local view, frozen blocks.
RELEASED = {
    "mae-refined-l16": (L16, 30, 1024, 0.2, 16, 96, 0),
    "mae-refined-h14": (H14, 30, 512, 0.3, 20, 98, 0),
    "mae-refined-2b14": (TWOB14, 20, 512, 0.35, 16, 98, 6),
    "d2v2-refined-l16": (L16, 20, 1024, 0.2, 16, 96, 0),
    "d2v2-refined-h14": (H14, 20, 512, 0.3, 20, 98, 0),
    "dbot-refined-l16": (L16, 30, 1024, 0.2, 16, 96, 0),
    "dbot-refined-h14": (H14, 30, 512, 0.3, 20, 98, 0),
    "crossmae-refined-l16": (L16, 30, 1024, 0.2, 16, 96, 0),
}
IN_ALL_OF_THEM = {
    "head_epochs": 20,
    "warmup_epochs": 4,
    "head_learning_rate": 2e-4,
    "learning_rate": 4e-4,
    "weight_decay": 0.05,
    "head_weight_decay": 1e-5,
    "layer_decay": 0.65,
    "topk": 20,
    "ema_decay": 0.9999,
    "projector_dim": 2048,
    "predictor_dim": 4096,
    "embedding_dim": 256,
    "queue_size": 65536,
    "swap": "positive",
    "loss_schedule": "constant",
    "global_views": 2,
    "local_views": 10,
    "global_size": 224,
    "global_scale": [0.25, 1.0],
    "local_scale": [0.05, 0.25],
    "flip": 0.5,
    "colour": True,
    "stage": "both",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_file_is_valid(name: str) -> None:
    for prefix, kind in (("pretrain-", PretrainRecipe), ("fine-tune-", FineTuneRecipe)):
        if name.startswith(prefix):
            kind(**read_fields(name, kind))
            return
    # the paper's settings are for any encoder
    recipe = read_recipe(name, **({"model": "a"} if name == "paper" else {}))
    assert recipe.recipe == name
    text = (RECIPES / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert "accelerate launch training/refine.py" in text  # the command to start it


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders as deep as the recipes' own, one head wide, and images enough for their batches."""
    folder = tmp_path_factory.mktemp("stand-ins")
    for kind, shape in SHAPES.items():
        tiny = {**shape, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
        MimRefinerModel(MimRefinerConfig(**tiny)).save_pretrained(folder / kind)

    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "PNG")
    rows = [{"bytes": pixel.getvalue(), "path": None}] * 1200
    pyarrow.parquet.write_table(pyarrow.table({"image": rows}), folder / "images.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", REFINING)
def test_every_recipe_reaches_its_plan(
    name: str, stand_ins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--recipe", name, "--output_dir", str(tmp_path / "out"), "--mixed_precision", "no"]
    if "pretrain" not in read_fields(name, RefineRecipe):
        kind = "tiny" if name.startswith("cifar10") else name.rpartition("-")[2]
        kind = kind if kind in SHAPES else "l16"
        flags += ["--model", str(stand_ins / kind)]
        flags += ["--dataset", str(stand_ins / "images.parquet")]
    assert main(["refine", "--dry_run", *flags]) == 0
    assert "Plan" in capsys.readouterr().out


# every recipe with all its values, as they were before a setting could be left open
KEPT = json.loads((Path(__file__).parent / "resolved_recipes.json").read_text())


@pytest.mark.parametrize("name", KEPT)
def test_a_recipe_states_what_it_always_did(name: str) -> None:
    kept = KEPT[name]
    resolved = resolve(
        read_recipe(name), MimRefinerConfig(**KEPT_SHAPES[kept["shape"]]), kept["num_images"]
    )
    found = resolved.as_written()
    found |= {"steps": list(resolved.steps)}
    differing = {
        field: (found[field], value)
        for field, value in kept["values"].items()
        if found[field] != value
    }
    assert differing == {}


@pytest.mark.parametrize("name", REFINING)
def test_every_recipe_names_weights_that_exist(name: str) -> None:
    """Of the zoo or of the Hub; cifar10-tiny and paper ask for a model of one's own."""
    model = read_fields(name, RefineRecipe).get("model")
    assert model in (None, "mae-tiny-cifar10", *ZOO) or str(model).startswith("facebook/vit-mae-")


def test_an_ablation_is_its_base_but_for_what_it_states() -> None:
    ablations = [name for name in NAMES if name.startswith("ablation-")]
    assert len(ablations) == 17
    default = dataclasses.asdict(read_recipe("d2v2-refined-l16"))
    for name in ablations:
        stated = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        assert stated.pop("base") == "d2v2-refined-l16"
        assert dataclasses.asdict(read_recipe(name)) == {**default, "recipe": name, **stated}


def test_bases_form_a_chain(tmp_path: Path) -> None:
    """A path counts from the file that states it; null takes a field of the base away."""
    (tmp_path / "first.yaml").write_text("base: mae-refined-l16\nepochs: 7\nseed: 1\n")
    second = tmp_path / "second.yaml"
    second.write_text("base: first.yaml\nseed: 2\neval_split: null\n")
    assert read_recipe(str(second)) == dataclasses.replace(
        read_recipe("mae-refined-l16"), recipe=str(second), epochs=7, seed=2, eval_split=None
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base: mine.yaml", "the bases go in a circle: mine -> mine"),
        ("base: other.yaml", "the bases go in a circle: mine -> other -> mine"),
        ("base: d2v2", "mine.yaml has base d2v2: unknown; there are cifar10-tiny"),
        ("base: gone.yaml", "gone.yaml: no such file"),
        ("base: [cifar10-tiny]", "has base ['cifar10-tiny']; it must be the name of a recipe"),
    ],
)
def test_bases_that_lead_nowhere_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    (tmp_path / "other.yaml").write_text("base: mine.yaml")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(says)) as refused:
        read_recipe(str(path))
    assert str(refused.value).startswith(f"recipe='{path}': ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_the_numbers_of_the_paper(name: str) -> None:
    shape, epochs, batch, temperature, first_head, local_size, frozen = RELEASED[name]
    config = MimRefinerConfig(**shape, intermediate_size=4 * shape["hidden_size"])
    recipe = resolve(read_recipe(name), config, IMAGENET)
    assert (recipe.epochs, recipe.batch_size, recipe.temperature) == (epochs, batch, temperature)
    assert recipe.head_blocks == list(range(first_head, shape["num_hidden_layers"]))
    assert (recipe.local_size, recipe.freeze_blocks) == (local_size, frozen)
    written = recipe.as_written()
    assert {field: written[field] for field in IN_ALL_OF_THEM} == IN_ALL_OF_THEM
    # the last partial batch of an epoch is dropped
    updates = IMAGENET // batch
    assert recipe.steps == (20 * updates, epochs * updates)


# as the recipes were called when they named the model that they start from
FORMER_NAMES = {name: name.replace("-refined", "") for name in RELEASED}


@pytest.mark.parametrize("name", FORMER_NAMES)
def test_a_recipe_by_its_former_name(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same settings, said in a line; a run that it began goes on, in the folder that it had."""
    old = FORMER_NAMES[name]
    recipe = read_recipe(old)
    assert recipe == read_recipe(name, recipe=old, output_dir=f"outputs/{old}")
    assert f"the recipe is called {name} now" in caplog.text

    shape = RELEASED[name][0]
    config = MimRefinerConfig(**shape, intermediate_size=4 * shape["hidden_size"])
    resolved = resolve(recipe, config, IMAGENET)
    begun = resolved.as_written()
    spelt = {
        "mae-2b14": "mae_twob14",
        "d2v2-l16": "data2vec2_large16",
        "d2v2-h14": "data2vec2-h14",
        "dbot-l16": "dbot_large16",
        "dbot-h14": "DBOT-H14",
        "crossmae-l16": "crossmae_large16",
    }
    begun["model"] = spelt.get(str(begun["model"]), begun["model"])
    (tmp_path / "recipe.json").write_text(json.dumps(begun))
    check_as_begun(tmp_path, resolved)
    begun["model"] = "mae_base16"
    (tmp_path / "recipe.json").write_text(json.dumps(begun))
    with pytest.raises(ValueError, match="model was mae_base16, is"):
        check_as_begun(tmp_path, resolved)


def test_a_field_by_its_former_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: m\ndataset: d\nkeep: 3\n")
    assert read_recipe(str(path)).save_total_limit == 3
    assert f"{path} has keep, which is called save_total_limit now" in caplog.text


def test_without_colour_is_half_as_long() -> None:
    """Paper, Table 7: everything else is the recipe with colour."""
    with_colour, without = read_recipe("d2v2-refined-h14"), read_recipe("no-colour-h14")
    differing = {
        field.name
        for field in dataclasses.fields(RefineRecipe)
        if getattr(with_colour, field.name) != getattr(without, field.name)
    }
    assert differing == {"recipe", "output_dir", "colour", "epochs"}
    assert (without.colour, without.epochs) == (False, with_colour.epochs // 2)


def test_small_gpu_recipe_trains_the_same_thing() -> None:
    """One GPU of 24 GB differs from mae-refined-l16 only in how, not in what is computed."""
    large, small = read_recipe("mae-refined-l16"), read_recipe("one-gpu-24gb")
    differing = {
        field.name
        for field in dataclasses.fields(RefineRecipe)
        if getattr(large, field.name) != getattr(small, field.name)
    }
    assert differing <= {
        "recipe",
        "output_dir",
        "micro_batch_size",
        "gradient_checkpointing",
        "mixed_precision",
    }
    assert small.micro_batch_size is not None


def test_every_field_is_documented() -> None:
    for field in dataclasses.fields(RefineRecipe):
        text = field.metadata.get("help", "")
        assert len(text) > 15 and text.endswith("."), field.name


def test_yaml_python_and_command_line_give_the_same_recipe(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "model": "facebook/vit-mae-base",
        "dataset": "photos",
        "head_blocks": [9, 11],
        "global_scale": [0.3, 0.9],
        "colour": False,
        "gradient_checkpointing": True,
        "temperature": 0.25,
        "learning_rate": 1e-3,
        "swap": "all",
        "max_steps": 7,
        "batch_size": 32,
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(changes))
    flags = []
    for name, value in changes.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    python = RefineRecipe(**changes)
    assert parse_recipe(flags) == python
    for from_file in (read_recipe(str(path)), parse_recipe(["--recipe", str(path)])):
        assert dataclasses.replace(from_file, recipe=None) == python
    changed = parse_recipe(
        ["--recipe", str(path), "--temperature", "0.5", "--head_blocks", "10", "--colour", "true"]
    )
    assert (changed.temperature, changed.head_blocks, changed.colour, changed.swap) == (
        0.5,
        [10],
        True,
        "all",
    )
    assert read_recipe(str(path), temperature=0.5, head_blocks=[10], colour=True) == changed


def test_head_blocks_may_be_auto(tmp_path: Path) -> None:
    """One word in place of numbers, in YAML, Python and flags alike.

    What it stands for is found out in the run.
    """
    path = tmp_path / "mine.yaml"
    path.write_text("model: a\nhead_blocks: auto\n")
    asked = RefineRecipe(model="a", head_blocks="auto")
    assert (
        parse_recipe(["--model", "a", "--head_blocks", "auto"])
        == parse_recipe(["--model", "a", "--head-blocks", "auto"])
        == asked
    )
    for from_file in (read_recipe(str(path)), parse_recipe(["--recipe", str(path)])):
        assert dataclasses.replace(from_file, recipe=None) == asked
    assert parse_recipe(["--recipe", str(path), "--head_blocks", "8", "9"]).head_blocks == [8, 9]
    path.write_text("model: a\nhead_blocks: [8, 9]\n")
    assert parse_recipe(["--recipe", str(path), "--head_blocks", "auto"]).head_blocks == "auto"
    assert parse_recipe(["--recipe", str(path)]).head_blocks == [8, 9]

    resolved = resolve(
        dataclasses.replace(asked, freeze_blocks=20), MimRefinerConfig(**L16), IMAGENET
    )
    assert resolved.to_measure == {"head_blocks", "micro_batch_size"}
    assert resolved.as_written()["head_blocks"] == "auto"
    text = plan_text(resolved, MimRefinerConfig(**L16), num_eval=0, device="cuda", available=2**34)
    assert (
        "on what measuring all blocks proposes (auto; by default 16, 17, 18, 19, 20, 21, 22, "
        "output)" in text
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--head_blocks", "automatic"], "--head_blocks automatic: must be of the type"),
        (["--head_blocks", "auto", "8"], "--head_blocks auto 8: must be of the type"),
        (
            ["--head_blocks", "auto", "--num_heads", "2"],
            "--head_blocks auto and --num_heads 2 exclude each other",
        ),
    ],
)
def test_what_is_almost_auto_is_refused(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_recipe(["--model", "a", *flags])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
    with pytest.raises(
        ValueError, match=r"head_blocks='automatic': must be numbers of blocks, or auto"
    ):
        RefineRecipe(model="a", head_blocks="automatic")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3"])
def test_numbers_in_yaml_are_numbers(tmp_path: Path, text: str) -> None:
    """YAML 1.1, which PyYAML speaks, takes 1e-3 for text."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: a\nlearning_rate: {text}\n")
    assert (
        read_recipe(str(path)).learning_rate
        == parse_recipe(["--recipe", str(path)]).learning_rate
        == 1e-3
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            ("topk", 2.5),
            ("epochs", "3"),
            ("epochs", True),
            ("learning_rate", "fast"),
            ("colour", "no"),
            ("head_blocks", 3),
        ],
        *[
            ("head_blocks", [1, "2"]),
            ("global_scale", 0.5),
            ("dataset", 5),
            ("output_dir", None),
            ("swap", 1),
        ],
    ],
)
def test_wrong_types_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        RefineRecipe(**{"model": "a", field: value})


def test_integers_pass_for_numbers() -> None:
    recipe = RefineRecipe(model="a", temperature=1, global_scale=[1, 1], warmup_epochs=2)
    check_fields(recipe)
    assert recipe.temperature == 1


def test_no_arguments_are_the_quickstart() -> None:
    quickstart = read_recipe("quickstart")
    assert parse_recipe([]) == quickstart
    assert parse_recipe(["--seed", "3", "--output_dir", "out"]) == dataclasses.replace(
        quickstart, seed=3, output_dir="out"
    )
    assert quickstart.dataset == "digits" and quickstart.pretrain == "pretrain-digits"


def test_a_model_or_data_of_ones_own_is_not_the_quickstart() -> None:
    recipe = parse_recipe(["--model", "facebook/vit-mae-large", "--dataset", "photos"])
    assert recipe == RefineRecipe(model="facebook/vit-mae-large", dataset="photos")


def test_a_start_takes_the_place_of_the_recipes(tmp_path: Path) -> None:
    for field, value in (("pretrain", "pretrain-digits"), ("model", "a")):
        for name in ("cifar10-tiny", "quickstart"):
            recipe = parse_recipe(["--recipe", name, f"--{field}", value])
            started = [each for each in START_FIELDS if getattr(recipe, each) is not None]
            assert started == [field] and getattr(recipe, field) == value
            assert read_recipe(name, **{field: value}) == recipe
    # how a model's file is read is the recipe's still, of what is pre-trained it is nothing
    (tmp_path / "own.yaml").write_text("base: paper\nmodel: a.pth\nfamily: mae\n")
    own = str(tmp_path / "own.yaml")
    assert read_recipe(own, model="b.pth").family == "mae"
    assert read_recipe(own, pretrain="pretrain-digits").family is None


def test_other_data_do_not_inherit_the_splits_of_a_recipe() -> None:
    assert read_recipe("mae-refined-l16").eval_split == "validation"
    assert read_recipe("mae-refined-l16", dataset="photos").eval_split is None
    assert parse_recipe(["--recipe", "mae-refined-l16", "--dataset", "photos"]).eval_split is None
    assert (
        parse_recipe(
            ["--recipe", "mae-refined-l16", "--dataset", "photos", "--eval_split", "test"]
        ).eval_split
        == "test"
    )


def test_recipe_names() -> None:
    assert recipe_file("quickstart") == RECIPES / "quickstart.yaml"
    assert recipe_file(str(RECIPES / "quickstart.yaml")) == RECIPES / "quickstart.yaml"
    with pytest.raises(FileNotFoundError, match=r"quick-start.*quickstart"):
        recipe_file("quick-start")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("mae-l16", "pretrain-mae-l16"),
        ("pretrain-data2vec2-l16", "pretrain-d2v2-l16"),
        ("d2v2-h14", "pretrain-d2v2-h14"),
        ("conmim-s16", "pretrain-conmim-s16"),
        ("capi-l14", "pretrain-capi-l14"),
        ("mae-ct-h16", "pretrain-mae-ct-h16"),
        ("digits", "pretrain-digits"),
    ],
)
def test_a_pretraining_recipe_goes_by_short_names(asked: str, found: str) -> None:
    assert read_fields(asked, PretrainRecipe) == read_fields(found, PretrainRecipe)


def test_recipes_of_other_commands_are_not_listed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there are pretrain-capi-cifar10, ") as refused:
        read_fields("quick-start", PretrainRecipe)
    assert "mae-refined-2b14" not in str(refused.value) and "ablation" not in str(refused.value)
    (tmp_path / "mine.yaml").write_text("base: d2v2-digits\nepochs: 2\n")
    mine = read_fields(str(tmp_path / "mine.yaml"), PretrainRecipe)
    assert mine == {**read_fields("pretrain-d2v2-digits", PretrainRecipe), "epochs": 2}
    assert recipe_file("data2vec2-l16").stem == "d2v2-refined-l16"
    with pytest.raises(FileNotFoundError, match="there are fine-tune-100percent, ") as refused:
        read_fields("mae-refined-l14", FineTuneRecipe)
    assert "pretrain" not in str(refused.value)
    one = read_fields("fine-tune-1percent-h14", FineTuneRecipe)
    assert read_fields("1percent-h14", FineTuneRecipe) == one


@pytest.mark.parametrize(("layers", "heads"), [(24, 8), (32, 12), (12, 4), (6, 2), (2, 2), (1, 1)])
def test_default_heads_are_on_the_last_third(layers: int, heads: int) -> None:
    assert default_head_blocks(layers) == list(range(layers - heads, layers))


@pytest.mark.parametrize(
    ("shape", "temperature", "local_size", "heads"),
    [(L16, 0.2, 96, 8), (H14, 0.3, 98, 12), (TWOB14, 0.35, 98, 8)],
)
def test_what_is_not_given_is_derived_from_the_encoder(
    shape: Any, temperature: float, local_size: int, heads: int
) -> None:
    config = MimRefinerConfig(**shape, intermediate_size=8)
    recipe = resolve(read_recipe("paper", model="a"), config, IMAGENET)
    assert (recipe.temperature, recipe.global_size, recipe.local_size, recipe.pooling) == (
        temperature,
        224,
        local_size,
        "cls",
    )
    layers = shape["num_hidden_layers"]
    assert recipe.head_blocks == list(range(layers - heads, layers))
    again = resolve(RefineRecipe(**recipe.as_written()), config, IMAGENET)
    assert again.as_written() == recipe.as_written()
    few = resolve(
        RefineRecipe(model="a", num_heads=3, temperature=0.5, local_size=112), config, 300
    )
    assert (few.head_blocks, few.temperature, few.local_size) == (
        [layers - 3, layers - 2, layers - 1],
        0.5,
        112,
    )


def test_small_encoders_get_small_local_views() -> None:
    small = MimRefinerConfig(
        image_size=32, patch_size=4, hidden_size=48, num_attention_heads=3, use_cls_token=False
    )
    recipe = resolve(read_recipe("paper", model="a"), small, IMAGENET)
    assert (recipe.global_size, recipe.local_size, recipe.pooling) == (32, 12, "mean")


def test_batches_fit_processes_and_data() -> None:
    config = MimRefinerConfig(**L16)
    recipe = RefineRecipe(model="a", batch_size=96, micro_batch_size=32)
    assert resolve(recipe, config, 96, processes=3).batch_size == 96
    for num_images, processes, flag in (
        (95, 1, "batch_size=96"),
        (96, 5, "batch_size=96"),
        (96, 4, "micro_batch_size=32"),
    ):
        with pytest.raises(ValueError, match=flag):
            resolve(recipe, config, num_images, processes=processes)


def test_steps_are_whole_batches_and_capped() -> None:
    recipe = RefineRecipe(model="a", batch_size=32, epochs=10, head_epochs=5)
    assert count_steps(recipe, 100) == (15, 30)
    assert count_steps(dataclasses.replace(recipe, max_steps=20), 100) == (15, 20)
    assert count_steps(dataclasses.replace(recipe, max_steps=20, streaming=True), None) == (20, 20)


@pytest.mark.parametrize("stage", ["both", "refine"])
def test_no_head_warmup(stage: Literal["both", "refine"]) -> None:
    """The refinement alone; its learning rate warms up as it would."""
    recipe = RefineRecipe(model="a", batch_size=32, epochs=10, head_epochs=0, stage=stage)
    resolved = resolve(recipe, MimRefinerConfig(**L16), 96)
    assert resolved.steps == (0, 30)
    assert resolved.warmups == (0, 3)
    stream = dataclasses.replace(recipe, max_steps=20, streaming=True)
    assert count_steps(stream, None) == (0, 20)
    with pytest.raises(ValueError, match="head_epochs=0 exclude each other"):
        RefineRecipe(model="a", head_epochs=0, stage="warmup")


@pytest.mark.parametrize(
    "text",
    [
        "heads: " + "[" * 20_000 + "]" * 20_000,
        "heads: " + "{a: " * 20_000 + "1" + "}" * 20_000,
        "- " * 5_000 + "x",
        "seed: " + "9" * 100_000,
        "seed: 2026-13-45",
        "seed: !!python/object/apply:os.system [true]",
        "seed: \x00",
        "seed: [1",
        "&a [*a",
    ],
    ids=lambda text: text[:16],
)
def test_a_file_that_yaml_cannot_read_is_named_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml is not valid YAML") as refusal:
        read_fields(str(path), RefineRecipe)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600
