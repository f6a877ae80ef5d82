"""`refine`: a run from its recipe to a model folder with its card, and to the Hub.

result = refine("photos/", model="facebook/vit-mae-base", output_dir="out")
result = refine(images, model=encoder, epochs=10, seed=1)      # any field of the recipe by name
result = refine(RefineRecipe(model=..., dataset=...))
result.encoder.encode(images), result.metrics["after"]

refine(images, model=encoder, callbacks=[lambda step, values: print(step, values["loss"])])
"""

import copy
import dataclasses
import difflib
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from ..conversion import load_encoder
from ..data.images import ImageDataset, open_images
from ..model.modeling_mim_refiner import MimRefinerModel
from ..publishing.hub import check_model_folder, check_repo_id, push_folder, save_model_folder
from ..publishing.model_card import write_card
from ..publishing.run_file import erased_words
from ..refinement.adapters import check_adapter_folder
from ..refinement.failure import NotBetterError
from ..refinement.recipe import RefineRecipe
from ..refinement.recipe_files import read_recipe
from ..runtime.distributed import lost_processes_named
from ..runtime.held import check_held
from ..runtime.lock import sole_run
from ..runtime.tracking import LogCallback
from ..runtime.wording import setting
from .prepare import START, Given
from .run import RunResult, run
from .run_record import GROUPS, NEIGHBOURS
from .save_as import save_as

SHIPPED = "model"
"""Folder of what ships."""
NOT_SHIPPED = "refined_not_shipped"
"""Folder of what was trained, where it is not better than the start."""
ADAPTER = "adapter"
"""Folder of the adapters that were trained, where `model/` is the start with them."""
ADAPTER_NOT_SHIPPED = "adapter_not_shipped"
"""The same where they are not better than the start alone."""
# images from which on cluster heads were better than k-means on refined features; fewer were not
# measured there: benchmarks/results/cluster-heads.md
_ENOUGH_FOR_HEADS = 1000


def refine(
    images: Any = None,
    *,
    model: Any = None,
    callbacks: LogCallback | Sequence[LogCallback] = (),
    **settings: Any,
) -> RunResult | None:
    """Refine an encoder on images and write the result to `output_dir`.

    Leaves `model/` (weights, configuration, preprocessing, code, card), `metrics.json`, pictures
    and `log.jsonl`; with `save_as` also what ships in that format, such as `native/`; with
    `push_to_hub` it publishes `model/`. A result that is not judged better than its start
    (`runs/verdict.py`) does not ship: `model/` holds the start, and `refined_not_shipped/` what was
    trained.

    Args:
        images: what `open_images` takes: a folder, a list of paths, PIL images or arrays, a data
            set of `datasets` or torch; or a whole `RefineRecipe`.
        model: what `load_encoder` takes: a name, a folder, a file, a model object, which stays as
            it is.
        callbacks: one or several, called with (step, values) for every line of log.jsonl, by the
            main process. What one raises ends the run; the same call goes on from the last
            checkpoint.
        settings: fields of `RefineRecipe`, such as `output_dir` and `seed`; `recipe` is a recipe or
            the name of one, whose fields are the defaults; `eval_dataset` takes what `images`
            takes.

    Returns:
        The result, or None after a dry run or a head warm-up alone.

    Raises:
        ValueError, FileNotFoundError: for wrong settings, or while another run writes to the
            folder; before any work.
        TypeError: for a setting that does not exist.
        FloatingPointError: for a loss that is not finite.
        LostProcessError: when another process of the job was killed or hangs.
        LostFolderError: before a save, when the folder was removed or taken by another run.
        NotBetterError: with `fail_if_not_better`, unless the result is judged better; everything is
            written, and the error has it as `result`. The command exits with 3. Of several
            processes, the main one raises it.
        PushError: when the Hub fails; the local result is intact and the message says how to
            continue.
    """
    called = _functions(callbacks)
    recipe, given = _recipe_of(images, model, settings)
    output = Path(recipe.output_dir)
    if recipe.push_to_hub is not None:
        check_repo_id(recipe.push_to_hub)
    for name in filter(None, (SHIPPED, NOT_SHIPPED, recipe.save_as)):
        check_model_folder(output / name)
    for name in (ADAPTER, ADAPTER_NOT_SHIPPED):
        check_adapter_folder(output / name)
    if recipe.dry_run:
        return run(recipe, given)

    with sole_run(output, "output_dir"), lost_processes_named():
        result = run(recipe, given, called)
        # one process writes; were the others to fail meanwhile, a launcher would stop it
        if result is None or not PartialState().is_main_process:
            return result
        _publish(result, recipe)
    if recipe.fail_if_not_better and result.verdict.outcome != "better":
        raise NotBetterError(str(result.verdict), result)
    return result


def _functions(callbacks: LogCallback | Sequence[LogCallback]) -> list[LogCallback]:
    """The callbacks as a list; ValueError for what cannot be called."""
    listed = callbacks if isinstance(callbacks, Sequence) else [callbacks]
    for callback in listed:
        if not callable(callback):
            raise ValueError(
                f"{setting('callbacks', callback)}: each must be a function of (step, values)"
            )
    return list(listed)


def _recipe_of(images: Any, model: Any, settings: Mapping[str, Any]) -> tuple[RefineRecipe, Given]:
    """The recipe, with names, and the objects that it has the names of."""
    known = [field.name for field in dataclasses.fields(RefineRecipe)]
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "RefineRecipe lists all of them"
            raise TypeError(f"refine() has no setting {name!r}; {hint}")

    values = dict(settings)
    base = values.pop("recipe", None)
    if isinstance(images, RefineRecipe):
        if base is not None:
            raise ValueError("images and recipe are both a recipe; give one of them")
        base, images = images, None
    if images is not None and "dataset" in settings:
        raise ValueError("images and dataset name both the images; give one of them")

    for name, value in values.items():
        if isinstance(value, Path):
            values[name] = str(value)
        elif isinstance(value, np.generic):
            values[name] = value.item()
        elif isinstance(value, tuple):
            values[name] = list(value)
    dataset = values.pop("dataset", images)
    given, named = _names_of(dataset, model, values.pop("eval_dataset", None))
    values.update(named)
    if isinstance(base, RefineRecipe):
        return dataclasses.replace(base, **values), given
    if base is not None:
        return read_recipe(str(base), **values), given
    return RefineRecipe(**values), given


def _names_of(dataset: Any, model: Any, evaluation: Any) -> tuple[Given, dict[str, str]]:
    """Objects, opened, and what the recipe calls them; what was named already keeps its name."""
    named: dict[str, str] = {}
    opened: dict[str, ImageDataset] = {}
    for name, source in (("dataset", dataset), ("eval_dataset", evaluation)):
        if isinstance(source, str | Path):
            named[name] = str(source)
        elif source is not None:
            opened[name] = open_images(source)
            named[name] = opened[name].name

    encoder = None
    if isinstance(model, str | Path):
        named["model"] = str(model)
    elif model is not None:
        encoder = _own_copy(model)
        named["model"] = encoder.config.name_or_path or type(model).__name__
    return Given(opened.get("dataset"), opened.get("eval_dataset"), encoder), named


def _own_copy(model: Any) -> MimRefinerModel:
    """The encoder of a model object, to be trained without a change of the object."""
    encoder = copy.deepcopy(load_encoder(model))
    return encoder.requires_grad_(True)


def _publish(result: RunResult, recipe: RefineRecipe) -> None:
    """The model folder, its card, and the way to the Hub."""
    output = result.output_dir
    folder = output / SHIPPED
    save_model_folder(folder, result.encoder, result.processor)
    kept_back = output / NOT_SHIPPED
    if result.verdict.ships_start:
        save_model_folder(kept_back, result.refined, result.processor)
    elif kept_back.exists():
        check_held()
        # of an earlier run of this recipe: it is older than what ships
        shutil.rmtree(kept_back)
    _publish_adapter(result)
    write_card(output)
    if recipe.save_as is not None:
        check_held()
        print(save_as(folder, recipe.save_as))

    # the run is complete: nothing is left to resume
    check_held()
    left = ["checkpoints", START]
    if result.adapter is not None and result.adapter.base == str(output / START):
        left.remove(START)
    for name in left:
        shutil.rmtree(output / name, ignore_errors=True)
    print(_ending(result, recipe.dataset))
    if recipe.push_to_hub is not None:
        print(f"Published: {push_folder(folder, recipe.push_to_hub)}")


def _publish_adapter(result: RunResult) -> None:
    """Write the adapters, if such were trained."""
    output = result.output_dir
    names = (ADAPTER, ADAPTER_NOT_SHIPPED)
    if result.adapter is None:
        return
    name, other = reversed(names) if result.verdict.ships_start else names
    check_held()
    # of an earlier run of this recipe
    shutil.rmtree(output / other, ignore_errors=True)

    result.adapter.save(output / name)


def _ending(result: RunResult, images: str) -> str:
    """What got better, how sure that is, where the pictures and the model are, and what next."""
    output = result.output_dir
    folder = output / SHIPPED
    verdict = result.verdict
    parts = [f"{verdict}."]
    if (output / NEIGHBOURS).is_file():
        parts.append(f"Look at {output / NEIGHBOURS} and {output / GROUPS}.")

    photos = images if Path(images).exists() else "photos/"
    command = ["mim-refiner", "cluster", photos, "--model", str(folder)]
    erased = result.metrics.get("erased")
    if erased is not None and not verdict.ships_start:
        parts.append(f"Erased: {erased_words(erased)}.")
    if verdict.ships_start:
        unchanged = "" if erased is None else " as it was, with nothing that this run erased"
        kept_back = output / NOT_SHIPPED
        parts.append(f"The start ships{unchanged}: {folder}; what was trained: {kept_back}.")
    else:
        parts.append(f"The refined model: {folder}.")
        if (result.metrics["dataset"].get("images") or 0) >= _ENOUGH_FOR_HEADS:
            command += ["--method", "heads"]
    parts.append(f"Next: {shlex.join(command)}")
    return " ".join(parts)
