"""The commands that train, and the one that looks at a step that failed: refine, pretrain, replay.

Heavy rooms are imported when a command runs, so that `mim-refiner --help` is quick.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .flags import add_splits, add_workers, command_parser, share

if TYPE_CHECKING:
    from transformers import HfArgumentParser


def run_refine(arguments: Sequence[str]) -> None:
    """`mim-refiner refine`; its flags are the fields of RefineRecipe."""
    from ..refinement.recipe_files import parse_recipe
    from ..runs.refine import refine

    refine(parse_recipe(arguments))


def _pretrain_parser() -> "HfArgumentParser":
    """The fields of PretrainRecipe, and where images and model are."""
    from transformers import HfArgumentParser

    from ..data.broken import MAX_BAD_FRACTION
    from ..pretraining.mae import PretrainRecipe

    parser = HfArgumentParser(
        PretrainRecipe,  # type: ignore[arg-type]
        description="Pre-train an encoder by masked autoencoding.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", help="name in training/recipes/ or path of a YAML file")
    parser.add_argument(
        "--dataset", default="digits", help="image folder, parquet, Hub name, or 'digits' (bundled)"
    )
    add_splits(parser)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/pretrained"),
        help="folder for the model; default: outputs/pretrained",
    )
    add_workers(parser, 2)
    parser.add_argument(
        "--max_bad_fraction",
        type=share,
        default=MAX_BAD_FRACTION,
        help=f"stop when more than this share of the images is broken; default: {MAX_BAD_FRACTION}",
    )
    return parser


def run_pretrain(arguments: Sequence[str]) -> None:
    """`mim-refiner pretrain`; its flags are the fields of PretrainRecipe and some of its own."""
    from ..conversion.load import image_processor
    from ..data.images import open_images
    from ..pretraining.mae import PretrainRecipe, pretrain_mae
    from ..publishing.hub import check_model_folder, save_model_folder
    from ..runtime.launch import job_of_processes
    from ..runtime.lock import sole_run
    from ..runtime.settings import read_fields

    parser = _pretrain_parser()
    # which defaults hold is known only when --recipe has been read
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    name = first.parse_known_args(arguments)[0].recipe
    if name is not None:
        parser.set_defaults(**read_fields(name, PretrainRecipe))
    recipe, options = parser.parse_args_into_dataclasses(list(arguments))

    check_model_folder(options.output_dir)
    images = open_images(
        options.dataset,
        config=options.dataset_config,
        split=options.split,
        num_channels=recipe.num_channels,
    )
    with sole_run(options.output_dir, "output_dir", beside=True):
        accelerator = job_of_processes()
        encoder = pretrain_mae(
            recipe, images, accelerator, options.num_workers, options.max_bad_fraction
        )
        if accelerator.is_main_process:
            processor = image_processor(encoder.config, {})
            save_model_folder(options.output_dir, encoder, processor)
            print(f"The pre-trained model: {options.output_dir}")


def run_replay(arguments: Sequence[str]) -> None:
    """`mim-refiner replay`."""
    from ..runs.replay import replay

    parser = command_parser(
        "replay",
        "Run the step again at which a refinement stopped, watch its parts, and say where it goes "
        "wrong.",
    )
    parser.add_argument("output_dir", type=Path, help="the run's folder")
    parser.add_argument("--step", type=int, help="default: the last one of failures/")
    parser.add_argument(
        "--mixed_precision", choices=("no", "bf16"), help="default: as the run had it"
    )
    options = parser.parse_args(arguments)
    print(replay(options.output_dir, step=options.step, mixed_precision=options.mixed_precision))


__all__ = ["run_pretrain", "run_refine", "run_replay"]
