"""The flags that several commands have, written once: images, model, loading, seed.

parser = command_parser("embed", "Features of every image, once.")
add_model_and_images(parser, "folder, parquet or Hub name")
options = parse_model_and_images(parser, arguments)
options.model, options.dataset
"""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import get_args

from ..data.missing import refuse_missing
from ..runtime.files import refuse_missing_model
from ..runtime.precision import Precision

Work = Callable[[], None]
"""What a command does once its words are understood; only then heavy rooms are imported."""


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The parser of one command of `mim-refiner`; no flag may be brief."""
    return argparse.ArgumentParser(
        prog=f"mim-refiner {name}", description=description, allow_abbrev=False
    )


def at_least(least: int) -> Callable[[str], int]:
    """For argparse's `type`: turns a word into a whole number, `least` or more.

    argparse puts the flag's name before the message of a refusal.
    """

    def number(word: str) -> int:
        if not word.removeprefix("-").isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"{word}: must be a whole number, at least {least}")
        return int(word)

    return number


def share(word: str) -> float:
    """For argparse's `type`: turns a word into a number between 0 and 1."""
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{word}: must be between 0 and 1")
    return number


def add_model_and_images(parser: argparse.ArgumentParser, images: str) -> None:
    """`IMAGES --model MODEL`, or the other way round: `MODEL --dataset IMAGES`.

    Args:
        images: what they can be and what they are for, for --help.
    """
    parser.add_argument(
        "source", nargs="?", metavar="IMAGES", help=f"{images}; or, with --dataset, the model"
    )
    parser.add_argument(
        "--model",
        help="the encoder: model folder, Hub name, original checkpoint, or a name of the zoo "
        "(model_cards/)",
    )
    parser.add_argument("--dataset", metavar="IMAGES", help="the images, where the model is first")


def parse_model_and_images(
    parser: argparse.ArgumentParser, arguments: Sequence[str], *, needs_model: bool = True
) -> argparse.Namespace:
    """The options with `model` and `dataset`, whichever of the two came first.

    Where the command does without a model, a single word names the images.
    """
    # intermixed: a first word that may be left out is found behind the flags too
    options = parser.parse_intermixed_args(list(arguments))
    source = options.source
    del options.source
    if source is not None and options.dataset is None and not needs_model:
        options.dataset = source
    elif source is not None and options.model is None:
        options.model = source
    elif source is not None and options.dataset is None:
        options.dataset = source
    elif source is not None:
        parser.error(f"{source}: --model and --dataset name both already")

    needed = ("model", "dataset") if needs_model else ("dataset",)
    missing = [flag for flag in needed if getattr(options, flag) is None]
    if missing and not needs_model:
        parser.error("give IMAGES: a folder, a data set, or features of mim-refiner embed")
    if missing == ["dataset"]:
        parser.error("give IMAGES --model MODEL, or MODEL --dataset IMAGES; one of them is missing")
    if missing:
        parser.error(f"the following are required: {', '.join(f'--{flag}' for flag in missing)}")
    refuse_missing(options.dataset)
    refuse_missing_model(options.model)
    return options


def add_splits(parser: argparse.ArgumentParser) -> None:
    """Which part of a data set."""
    parser.add_argument("--dataset_config", help="configuration of a Hub data set")
    parser.add_argument("--split", help="split of the data set; default: train, or all of a folder")


def add_image_column(parser: argparse.ArgumentParser) -> None:
    """Which column of a table holds the images."""
    parser.add_argument(
        "--image_column", help="column of a table that holds the images; default: it is found"
    )


def add_follow_links(parser: argparse.ArgumentParser) -> None:
    """Whether links to folders are entered."""
    parser.add_argument(
        "--follow_links",
        action="store_true",
        help="enter links to folders in an image folder, wherever they lead",
    )


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Which columns of a table hold images and labels, and whether links are followed."""
    add_image_column(parser)
    parser.add_argument(
        "--label_column", help="column of a table that holds the labels; default: it is found"
    )
    add_follow_links(parser)


def add_batch_size(parser: argparse.ArgumentParser, default: int) -> None:
    """How many images at once."""
    parser.add_argument(
        "--batch_size",
        type=at_least(1),
        default=default,
        help=f"images per forward pass and process; default: {default}",
    )


def add_dtype(parser: argparse.ArgumentParser, default: str | None, auto: str = "") -> None:
    """In which numbers features are computed; None for those of the weights."""
    shown = "that of the weights" if default is None else default
    parser.add_argument(
        "--dtype",
        choices=get_args(Precision),
        default=default,
        help=f"of the computation; auto: bf16 where this machine computes it, else int8 where it "
        f"does{auto}; int8: for a CPU, checked against fp32 on a first batch; default: {shown}",
    )


def add_workers(parser: argparse.ArgumentParser, default: int | None) -> None:
    """How many processes decode; None lets the command choose."""
    shown = "one per core, at most 16" if default is None else default
    parser.add_argument(
        "--num_workers",
        type=at_least(0),
        default=default,
        help=f"processes that decode images beside this one; default: {shown}",
    )


def add_seed(parser: argparse.ArgumentParser, of: str = "everything random") -> None:
    """What the random choices are a function of."""
    parser.add_argument("--seed", type=at_least(0), default=0, help=f"of {of}; default: 0")
