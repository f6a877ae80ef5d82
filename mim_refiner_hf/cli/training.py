"""The commands that train, and the one that looks at a step that failed: refine, pretrain, replay."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from transformers import HfArgumentParser

from ..conversion.load import image_processor
from ..data.broken import MAX_BAD_FRACTION
from ..data.images import open_images
from ..pretraining.mae import PretrainRecipe, pretrain_mae
from ..publishing.hub import check_model_folder, save_model_folder
from ..refinement.recipe_files import parse_recipe
from ..runs.refine import refine
from ..runs.replay import replay
from ..runtime.launch import several_on_the_cpu
from ..runtime.lock import sole_run
from ..runtime.settings import NonNegativeInt, Share, check_fields, documented, read_fields


def run_refine(arguments: Sequence[str]) -> None:
    refine(parse_recipe(arguments))


@dataclass
class _PretrainCommand:
    """What `pretrain` asks for beside the fields of PretrainRecipe."""

    recipe: str | None = documented(None, "Name in training/recipes/ or path of a YAML file.")
    dataset: str = documented("digits", "Image folder, parquet, Hub name, or 'digits' (bundled).")
    dataset_config: str | None = documented(None, "Configuration of a Hub data set.")
    split: str | None = documented(None, "Split to train on.")
    output_dir: str = documented("outputs/pretrained", "Folder for the model.")
    num_workers: NonNegativeInt = documented(2, "Data-loading workers.")
    max_bad_fraction: Share = documented(
        MAX_BAD_FRACTION, "Stop when more than this share of the images is broken."
    )

    def __post_init__(self) -> None:
        check_fields(self)


def run_pretrain(arguments: Sequence[str]) -> None:
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
    where = {"config": command.dataset_config, "split": command.split}
    images = open_images(command.dataset, **where, num_channels=recipe.num_channels)
    folder = Path(command.output_dir)
    with sole_run(folder, "--output_dir", beside=True):
        accelerator = Accelerator(cpu=several_on_the_cpu())
        encoder = pretrain_mae(
            recipe, images, accelerator, command.num_workers, command.max_bad_fraction
        )
        if accelerator.is_main_process:
            save_model_folder(folder, encoder, image_processor(encoder.config, {}))
            print(f"The pre-trained model: {folder}")


def run_replay(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mim-refiner replay",
        description="Run the step again at which a refinement stopped, watch its parts, and say where it goes wrong.",
        allow_abbrev=False,
    )
    parser.add_argument("output_dir", type=Path, help="the run's folder")
    parser.add_argument("--step", type=int, help="default: the last one of failures/")
    parser.add_argument(
        "--mixed_precision", choices=("no", "bf16"), help="default: as the run had it"
    )
    options = vars(parser.parse_args(arguments))
    print(replay(options.pop("output_dir"), **options))
