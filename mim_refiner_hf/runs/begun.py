"""The output folder of a run before it begins: whose it is, and what a run there began as.

check_output(output, recipe)            # nothing of others is there
recipe = as_begun(recipe, output)       # what is left open is as it was
check_as_begun(output, resolved)     # and the rest is the same
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..conversion.zoo import find_entry
from ..pretraining.recipe import PretrainRecipe
from ..refinement.failure import FAILURES
from ..refinement.recipe import FITTED, RefineRecipe
from ..refinement.resolve import ResolvedRecipe
from ..runtime.files import check_apart, check_kinds
from ..runtime.lock import check_writable
from ..runtime.settings import recipe_name, with_new_names
from ..runtime.strangers import parse_json
from ..runtime.versions import check_format
from ..runtime.wording import setting

logger = logging.getLogger(__name__)

# Fields that may differ when a run is continued: they say where and how it runs, not what is
# computed.
_FREE_FIELDS = frozenset(
    [
        "recipe",
        "max_bad_fraction",
        "output_dir",
        "stage",
        "num_workers",
        "micro_batch_size",
        "compile",
        "gradient_checkpointing",
        "report_to",
        "log_every",
        "save_every",
        "save_total_limit",
        "save_as",
        "push_to_hub",
        "license",
        "fail_if_not_better",
        "dry_run",
    ]
)
# paths, which have several spellings
_PLACES = ("dataset", "eval_dataset", "metadata", "model", "init_from")
_RECIPE = "recipe.json"
# what a run makes beside the models that it ships, whose folders are looked at by `refine`
_FOLDERS = (
    "start",
    "pretrained",
    "pretraining",
    "checkpoints",
    FAILURES,
    "tensorboard",
    "tensorboard/mim-refiner",
)


def check_output(output: Path, recipe: RefineRecipe) -> None:
    """Refuse a folder that no run began in, or that the images lie in, or that lies among them.

    A run there would write between what others wrote, and its pictures would be images of the next.

    Raises:
        ValueError: naming the folder and what to do.
    """
    check_writable(output, "output_dir")
    for images in (recipe.dataset, recipe.eval_dataset):
        if images is not None:
            check_apart(output, images)
    if not output.is_dir():
        return
    if (output / _RECIPE).is_file():
        check_kinds(output, _FOLDERS)
        return
    foreign = sorted(path.name for path in output.iterdir() if not path.name.startswith("."))
    if foreign:
        raise ValueError(
            f"{setting('output_dir', output)}: holds {foreign[0]} and is no run's folder, so "
            "nothing is written there; name another one"
        )


def as_begun(recipe: RefineRecipe, output: Path) -> RefineRecipe:
    """The recipe with what it leaves open as the run in `output`, if there is one, began.

    Whatever fits another machine better, a run ends as it began.

    Raises:
        ValueError: for a stated setting that was another.
    """
    old = saved_recipe(output)
    if old is None:
        return recipe
    names = [name for name in FITTED if name not in _FREE_FIELDS]
    stated = {name: getattr(recipe, name) for name in names}
    # before they meet what the run began with: that contradicts them, and is not why
    _refuse_changes(
        output,
        {name: value for name, value in stated.items() if value is not None and name in old},
        old,
    )
    if recipe.num_heads is None:
        names.append("head_blocks")

    begun = {}
    for name in names:
        if getattr(recipe, name) is None and old.get(name) is not None:
            begun[name] = old[name]
    return dataclasses.replace(recipe, **begun)


def check_as_begun(output: Path, recipe: ResolvedRecipe) -> None:
    """Refuse an output folder that belongs to a run of another recipe.

    Raises:
        ValueError: naming the fields that differ.
    """
    old = saved_recipe(output)
    if old is None:
        return
    if "objective" in old:
        raise ValueError(
            f"{setting('output_dir', output)}: holds a pre-training; name another folder"
        )
    unknown = sorted(old.keys() - recipe.as_written().keys())
    if unknown:
        raise ValueError(
            f"{setting('output_dir', output)}: its recipe.json has settings that this version does "
            f"not know ({', '.join(unknown)}); go on with the version of mim_refiner_hf that began "
            "the run, or name another folder"
        )
    stated = {}
    lacking = []
    defaults = {field.name: field.default for field in dataclasses.fields(RefineRecipe)}
    for name, value in recipe.as_written().items():
        # a version that did not know the field did what leaving it out does
        if name not in old and getattr(recipe.asked, name) == defaults[name]:
            if name not in _FREE_FIELDS:
                lacking.append(f"{name} {value}")
            continue
        stated[name] = value
    _refuse_changes(output, stated, old)
    if lacking:
        logger.warning(
            "the recipe of the run in %s is of an older version; it goes on with %s",
            output,
            ", ".join(lacking),
        )


def _refuse_changes(output: Path, stated: Mapping[str, object], old: Mapping[str, object]) -> None:
    """ValueError that names the fields of a recipe that are not as the run in a folder has them."""
    changes = []
    for name, value in stated.items():
        before = old.get(name)
        if name in _FREE_FIELDS or (name in old and before == value):
            continue
        if name in _PLACES and same_place(before, value):
            continue
        if name == "pretrain" and _same_pretraining(before, value):
            continue
        changes.append(f"{name} was {before}, is {value}")

    if changes:
        raise ValueError(
            f"{setting('output_dir', output)}: holds a run of another recipe "
            f"({'; '.join(changes)}); choose another folder or remove it"
        )


def same_place(before: object, now: object) -> bool:
    """Whether two spellings are of one file or folder, or of one model of the zoo.

    Such as `photos` and `./photos/`, or `mae_large16` and `mae-l16`.
    """
    if not isinstance(before, str) or not isinstance(now, str):
        return False
    places = [Path(name).expanduser() for name in (before, now)]
    if any(place.exists() for place in places):
        return all(place.exists() for place in places) and places[0].samefile(places[1])
    entry = find_entry(now)
    return entry is not None and find_entry(before) is entry


def _same_pretraining(before: object, now: object) -> bool:
    """Whether two spellings are of one recipe of pre-training, which have been renamed."""
    if not isinstance(before, str) or not isinstance(now, str):
        return False
    prefix = PretrainRecipe.recipe_prefix
    return recipe_name(before, prefix) == recipe_name(now, prefix)


def saved_recipe(output: Path) -> dict[str, Any] | None:
    """The recipe.json of a run's or a pre-training's folder; None where there is none.

    Raises:
        ValueError: where it cannot be read, or is of a later version.
    """
    saved = output / _RECIPE
    if not saved.is_file():
        return None

    try:
        recipe = with_new_names(dict(parse_json(saved.read_text())))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{setting('output_dir', output)}: its recipe.json cannot be read ({error}); "
            "name another folder or remove it"
        ) from error
    check_format("recipe", recipe.pop("format_version", None), saved)
    return recipe
