"""`mim-refiner`: the commands, and the job behind `accelerate launch training/refine.py`.

    mim-refiner refine --model facebook/vit-mae-large --dataset my_images/ --output_dir out     (or under `accelerate launch -m`)
    mim-refiner pretrain --recipe pretrain-digits --dataset my_images/ --output_dir out
    mim-refiner convert mae_pretrain_vit_large.pth mae-l16
    mim-refiner push out/model user/name
    mim-refiner export out/model out/timm --to timm                                              (or vit, or onnx)

Exit codes: 0 done, 2 wrong use (one line says which value and what is allowed), 1 something else failed, 130 interrupted.
"""

import argparse
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator, PartialState
from transformers import HfArgumentParser

from .conversion.load import image_processor
from .data import open_images
from .distributed import launch_processes, launched_short, several_on_the_cpu
from .pretraining.mae import PretrainRecipe, pretrain_mae
from .publishing.convert import DTYPES, convert
from .publishing.export import FORMATS, ExportError, export
from .publishing.hub import PushError, check_model_folder, check_repo_id, push_folder, save_model_folder
from .publishing.model_card import write_card
from .refinement.recipe import RefineRecipe
from .refinement.recipe_files import parse_recipe, read_fields
from .refinement.run import RunResult, run


def refine(recipe: RefineRecipe) -> RunResult | None:
    """Refine a masked-image model as `recipe` says and write the result to `recipe.output_dir`.

    Leaves `model/` (weights, configuration, preprocessing, code, card), `metrics.json`, `clusters.png`, `curves.png`, `log.jsonl`; with
    `push_to_hub` it publishes the folder. Returns None after a dry run or a head warm-up alone.

    Raises:
        ValueError, FileNotFoundError: for wrong settings, before any work.
        FloatingPointError: for a loss that is not finite.
        PushError: when the Hub fails; the local result is intact and the message says how to continue.
    """
    if recipe.push_to_hub is not None:
        check_repo_id(recipe.push_to_hub)
    check_model_folder(Path(recipe.output_dir) / "model")
    result = run(recipe)
    if result is None or not PartialState().is_main_process:
        return result
    folder = result.output_dir / "model"
    save_model_folder(folder, result.encoder, result.processor)
    write_card(result.output_dir)
    shutil.rmtree(result.output_dir / "checkpoints", ignore_errors=True)  # complete: nothing left to resume
    print(f"The refined model: {folder}")
    if recipe.push_to_hub is not None:
        print(f"Published: {push_folder(folder, recipe.push_to_hub)}")
    return result


def _refine(arguments: Sequence[str]) -> None:
    refine(parse_recipe(arguments))


@dataclass
class _PretrainCommand:
    """What `pretrain` asks for beside the fields of PretrainRecipe."""

    recipe: str | None = field(default=None, metadata={"help": "Name in training/recipes/ or path of a YAML file."})
    dataset: str = field(default="digits", metadata={"help": "Image folder, parquet, Hub name, or 'digits' (bundled)."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    split: str | None = field(default=None, metadata={"help": "Split to train on."})
    output_dir: str = field(default="outputs/pretrained", metadata={"help": "Folder for the model."})
    num_workers: int = field(default=2, metadata={"help": "Data-loading workers."})


def _pretrain(arguments: Sequence[str]) -> None:
    parser = HfArgumentParser(
        (PretrainRecipe, _PretrainCommand),  # type: ignore[arg-type]
        description="Pre-train an encoder by masked autoencoding.",
        allow_abbrev=False,
    )
    name = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    name.add_argument("--recipe")
    chosen = name.parse_known_args(arguments)[0].recipe
    if chosen is not None:
        parser.set_defaults(**read_fields(chosen, PretrainRecipe))
    recipe, command = parser.parse_args_into_dataclasses(list(arguments))
    check_model_folder(Path(command.output_dir))
    images = open_images(command.dataset, config=command.dataset_config, split=command.split, num_channels=recipe.num_channels)
    accelerator = Accelerator(cpu=several_on_the_cpu())
    encoder = pretrain_mae(recipe, images, accelerator, command.num_workers)
    if accelerator.is_main_process:
        save_model_folder(Path(command.output_dir), encoder, image_processor(encoder.config, {}))
        print(f"The pre-trained model: {command.output_dir}")


def _push(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mim-refiner push", description="Publish a model folder: weights first, the card last."
    )
    parser.add_argument("folder", type=Path, help="what a run left as <output_dir>/model")
    parser.add_argument("repository", help="user/name on the Hub")
    parser.add_argument("--private", action="store_true", help="for a new repository")
    options = parser.parse_args(arguments)
    print(f"Published: {push_folder(options.folder, options.repository, private=options.private)}")


def _convert(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mim-refiner convert",
        description="Any masked-image-modeling checkpoint as a model folder for the Hub, verified by loading it back.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="checkpoint file, model folder, Hub name, or a name of the zoo (model_cards/)")
    parser.add_argument("destination", type=Path, help="new folder for the model")
    parser.add_argument("--family", help="family of the file, when detection should be overruled")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the source's")
    parser.add_argument("--num_heads", type=int, help="attention heads, for a file that does not tell")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub name")
    parser.add_argument("--push", metavar="USER/NAME", help="publish the folder under this name")
    parser.add_argument("--private", action="store_true", help="for a new repository")
    options = parser.parse_args(arguments)
    if options.push is not None:
        check_repo_id(options.push)
    settings = {name: getattr(options, name) for name in ("family", "dtype", "num_heads", "revision")}
    print(convert(options.source, options.destination, **settings), flush=True)
    if options.push is not None:
        print(f"Published: {push_folder(options.destination, options.push, private=options.private)}")


def _export(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mim-refiner export",
        description="An encoder in another library's format, compared with it after loading it back.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="model folder, Hub name, or an original checkpoint")
    parser.add_argument("destination", type=Path, help="new folder")
    parser.add_argument("--to", choices=FORMATS, required=True, help="timm, transformers' own classes, or ONNX")
    options = parser.parse_args(arguments)
    differences = export(options.source, options.destination, options.to)
    worst = ", ".join(f"{difference:.1e} in its {output}" for output, difference in differences.items())
    print(f"{options.destination}: loaded back as {options.to}, it differs from {options.source} by at most {worst}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "refine": _refine,
    "pretrain": _pretrain,
    "convert": _convert,
    "push": _push,
    "export": _export,
}


def command(name: str, arguments: Sequence[str] | None = None) -> int:
    """Run one command and translate what it raises into an exit code and one line on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if arguments is None and (processes := launched_short()):
        return launch_processes(processes)
    try:
        COMMANDS[name](sys.argv[1:] if arguments is None else arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (PushError, ExportError, FloatingPointError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def refine_command() -> int:
    """What `training/refine.py` and `python -m mim_refiner_hf.refinement.trainer` run."""
    return command("refine")


def main(arguments: Sequence[str] | None = None) -> int:
    """The console command `mim-refiner`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="mim-refiner", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    chosen = parser.parse_args(arguments[:1]).command
    return command(chosen, arguments[1:])


__all__ = ["command", "main", "refine", "refine_command"]

if __name__ == "__main__":
    raise SystemExit(main())
