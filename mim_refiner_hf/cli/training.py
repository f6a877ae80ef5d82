"""The commands that train, and the one that looks at a step that failed: refine, pretrain, replay.

Heavy rooms are imported when a command runs, so that `mim-refiner --help` is quick.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.missing import refuse_missing
from ..runtime.files import refuse_missing_model, refuse_no_run
from ..runtime.lazy import argument_parser
from .flags import Work, add_splits, command_parser

if TYPE_CHECKING:
    from transformers import HfArgumentParser

    from ..model.modeling_mim_refiner import MimRefinerModel


def parse_refine(arguments: Sequence[str]) -> Work:
    """`mim-refiner refine`; its flags are the fields of RefineRecipe."""
    from ..refinement.recipe_files import parse_recipe

    recipe = parse_recipe(arguments)
    refuse_missing(recipe.dataset)
    refuse_missing_model(recipe.model)

    def work() -> None:
        from ..runs.refine import refine

        refine(recipe)

    return work


def _pretrain_parser() -> "HfArgumentParser":
    """The fields of PretrainRecipe and LoopOptions, and where images and model are."""
    from ..pretraining.loop_options import LoopOptions
    from ..pretraining.recipe import PretrainRecipe

    parser = argument_parser(
        PretrainRecipe,
        LoopOptions,
        description="Pre-train an encoder on images without labels. The same command goes on "
        "where it was stopped.",
        prog="mim-refiner pretrain",
        usage="%(prog)s [IMAGES] [--recipe NAME] [--flag value ...]; --help lists the flags",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", help="name in training/recipes/ or path of a YAML file")
    parser.add_argument(
        "--dataset", default="digits", help="image folder, parquet, Hub name, or 'digits' (bundled)"
    )
    add_splits(parser)
    parser.add_argument(
        "--init_from",
        metavar="ENCODER",
        help="go on from this encoder: model folder, Hub name, file, or a name of the zoo; it "
        "brings its shape",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/pretrained"),
        help="folder for the model; default: outputs/pretrained",
    )
    parser.add_argument(
        "--streaming",
        action="store_true",
        help="read the images in passing, without a download first; needs --max_steps",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the plan and end")
    parser.set_defaults(num_workers=2)
    return parser


def parse_pretrain(arguments: Sequence[str]) -> Work:
    """`mim-refiner pretrain`; its flags are the fields of PretrainRecipe and some of its own."""
    words = list(arguments)
    # which defaults hold is known only when these have been read
    first = argparse.ArgumentParser(prog="mim-refiner pretrain", add_help=False, allow_abbrev=False)
    for flag in ("--recipe", "--dataset", "--init_from", "--objective"):
        first.add_argument(flag)
    named = first.parse_known_args(words)[0]
    if words and not words[0].startswith("-"):
        if named.dataset is not None:
            first.error(f"{words[0]} and --dataset name both the images; give one of them")
        named.dataset = words[0]
        words = ["--dataset", *words]
    if not {"-h", "--help"} & set(words):
        if named.dataset is not None:
            refuse_missing(named.dataset)
        refuse_missing_model(named.init_from)

    from ..pretraining.recipe import PretrainRecipe
    from ..runtime.settings import read_fields

    parser = _pretrain_parser()
    if named.recipe is not None:
        parser.set_defaults(**read_fields(named.recipe, PretrainRecipe))
    if named.init_from is None or {"-h", "--help"} & set(words):
        return _pretrain_work(parser, words, None)

    # the encoder to go on from gives the defaults: it is loaded before the words can be read
    def work() -> None:
        encoder = _start(named.init_from, named.objective, parser)
        _pretrain_work(parser, words, encoder)()

    return work


def _pretrain_work(
    parser: "HfArgumentParser", words: Sequence[str], encoder: "MimRefinerModel | None"
) -> Work:
    """What the words ask for, once every default is known."""
    recipe, options, where, unknown = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    refuse_missing(where.dataset)

    def work() -> None:
        from ..runs.pretrain import run_pretraining

        run_pretraining(
            recipe,
            where.output_dir,
            dataset=where.dataset,
            dataset_config=where.dataset_config,
            split=where.split,
            streaming=where.streaming,
            init_from=where.init_from,
            encoder=encoder,
            options=options,
            dry_run=where.dry_run,
        )

    return work


def _start(source: str, objective: str | None, parser: "HfArgumentParser") -> "MimRefinerModel":
    """The encoder to go on from, whose shape becomes the parser's defaults."""
    from ..conversion import load_encoder
    from ..pretraining.capi_start import load_for_capi
    from ..runs.pretrain import shape_of

    objective = objective or parser.get_default("objective")
    load = load_for_capi if objective == "capi" else load_encoder
    encoder = load(source)
    parser.set_defaults(**shape_of(encoder.config, objective))
    return encoder


def parse_replay(arguments: Sequence[str]) -> Work:
    """`mim-refiner replay`."""
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
    refuse_no_run(options.output_dir)

    def work() -> None:
        from ..runs.replay import replay

        report = replay(
            options.output_dir, step=options.step, mixed_precision=options.mixed_precision
        )
        print(report)

    return work
