"""`refine`: a run from its recipe to a model folder with its card, and to the Hub."""

import shutil
from pathlib import Path

from accelerate import PartialState

from ..publishing.hub import check_model_folder, check_repo_id, push_folder, save_model_folder
from ..publishing.model_card import write_card
from ..refinement.recipe import RefineRecipe
from ..runtime.lock import sole_run
from .run import RunResult, run


def refine(recipe: RefineRecipe) -> RunResult | None:
    """Refine a masked-image model as `recipe` says and write the result to `recipe.output_dir`.

    Leaves `model/` (weights, configuration, preprocessing, code, card), `metrics.json`,
    `clusters.png`, `curves.png`, `log.jsonl`; with `push_to_hub` it publishes the folder. Returns
    None after a dry run or a head warm-up alone.

    Raises:
        ValueError, FileNotFoundError: for wrong settings, or while another run writes to the
            folder; before any work.
        FloatingPointError: for a loss that is not finite.
        PushError: when the Hub fails; the local result is intact and the message says how to
            continue.
    """
    output = Path(recipe.output_dir)
    if recipe.push_to_hub is not None:
        check_repo_id(recipe.push_to_hub)
    check_model_folder(output / "model")
    if recipe.dry_run:
        return run(recipe)

    with sole_run(output, "--output_dir"):
        result = run(recipe)
        if result is not None and PartialState().is_main_process:
            _publish(result, recipe.push_to_hub)
    return result


def _publish(result: RunResult, repository: str | None) -> None:
    """The model folder, its card, and the way to the Hub."""
    folder = result.output_dir / "model"
    save_model_folder(folder, result.encoder, result.processor)
    write_card(result.output_dir)
    # the run is complete: nothing is left to resume
    shutil.rmtree(result.output_dir / "checkpoints", ignore_errors=True)
    print(f"The refined model: {folder}")
    if repository is not None:
        print(f"Published: {push_folder(folder, repository)}")


__all__ = ["refine"]
