"""Recipes from files and command lines: `training/recipes/*.yaml`, flags over them.

# training/recipes/mae-refined-l16.yaml, one field changed
recipe = read_recipe("mae-refined-l16", dataset="my_images/")
# what training/refine.py does
recipe = parse_recipe(["--recipe", "quickstart", "--seed", "1"])
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..runtime.lazy import argument_parser
from ..runtime.settings import documented, read_fields
from ..runtime.wording import in_the_shell
from .recipe import FITTED, START_FIELDS, RefineRecipe

# Fields of a recipe that say where its own data lie; another --dataset makes them void.
_DATA_FIELDS = frozenset(
    (
        "dataset_config",
        "split",
        "image_column",
        "label_column",
        "forget",
        "keep",
        "metadata",
        "eval_dataset",
        "eval_split",
    )
)


def _defaults(name: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the recipe `name`, without those that the `stated` settings make void.

    Another `dataset` has splits of its own, and a start takes the place of the recipe's.
    """
    values = {"recipe": name, **read_fields(name, RefineRecipe)}
    void: set[str] = set()
    if stated.get("dataset") not in (None, values.get("dataset")):
        void |= _DATA_FIELDS
    starts = [field for field in START_FIELDS if stated.get(field) is not None]
    if starts:
        void |= set(START_FIELDS)
    if starts and starts != ["model"]:
        # it says how a file is to be read
        void.add("family")
    return {key: value for key, value in values.items() if key not in void}


def read_recipe(name: str, **changes: Any) -> RefineRecipe:
    """The recipe `name` with some fields changed.

    With another `dataset`, its splits and configuration are not taken over, with another start
    (`model`, `pretrain`, `init_from`) not its own.
    """
    values = _defaults(name, changes)
    return RefineRecipe(**{**values, **changes})


def _help(name: str) -> str:
    texts = {field.name: field.metadata["help"] for field in fields(RefineRecipe)}
    return str(texts[name])


@dataclass
class _Flags(RefineRecipe):
    """The fields of RefineRecipe as HfArgumentParser can read them.

    It knows no choice between numbers and a word.
    """

    head_blocks: list[str] | None = documented(None, _help("head_blocks"))  # type: ignore[assignment]
    micro_batch_size: str | None = documented(None, _help("micro_batch_size"))  # type: ignore[assignment]


def _number(word: Any) -> Any:
    """ "8" -> 8; what is no whole number stays, for RefineRecipe to take or refuse."""
    if isinstance(word, str) and re.fullmatch(r"-?\d+", word):
        return int(word)
    return word


def _head_blocks(words: Any) -> Any:
    """["8", "9"] -> [8, 9] and ["auto"] -> "auto", from a command line.

    What is neither stays, for RefineRecipe to refuse.
    """
    if words == ["auto"]:
        return "auto"
    if isinstance(words, list):
        return [_number(word) for word in words]
    return words


def _with_images(words: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The words with the first one, which names the images, as `--dataset`."""
    images, *others = words
    named = [word for word in others if word.partition("=")[0] == "--dataset"]
    if named:
        parser.error(f"{images} and --dataset name both the images; give one of them")
    return ["--dataset", images, *others]


def _without_auto(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without `--field auto`, which argparse takes for no number, and these fields."""
    words = list(arguments)
    stated = []
    left_open = []

    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").replace("-", "_").partition("=")
        follows = not equals and words[:1] == ["auto"]
        if word.startswith("--") and name in FITTED and (value == "auto" or follows):
            left_open.append(name)
            words = words[1:] if follows else words
        else:
            stated.append(word)
    return stated, left_open


def parse_recipe(arguments: Sequence[str] | None = None) -> RefineRecipe:
    """The recipe a command line asks for: flags over the YAML of `--recipe`.

    Where neither recipe, model nor data is named, it is the quickstart.

    Raises:
        SystemExit: code 2, after one line that names flag, value and what is allowed.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    usage = "%(prog)s [IMAGES] [--recipe NAME] [--flag value ...]; --help lists the flags"
    parser = argument_parser(
        _Flags,
        prog="mim-refiner refine",
        description=__doc__.split("\n")[0],
        usage=usage,
        allow_abbrev=False,
    )

    # which defaults hold is known only when these have been read
    first = argparse.ArgumentParser(
        prog=parser.prog, add_help=False, allow_abbrev=False, usage=usage
    )
    for flag in ("--recipe", "--model", "--pretrain", "--init_from", "--dataset"):
        first.add_argument(flag)
    if words and not words[0].startswith("-"):
        words = _with_images(words, parser)
    start = first.parse_known_args(words)[0]
    name = start.recipe if any(vars(start).values()) else "quickstart"
    try:
        with in_the_shell():
            if name is not None:
                parser.set_defaults(**_defaults(name, vars(start)))
            stated, left_open = _without_auto(words)
            values = vars(parser.parse_args(stated))
            values |= dict.fromkeys(left_open)
            values["head_blocks"] = _head_blocks(values["head_blocks"])
            values["micro_batch_size"] = _number(values["micro_batch_size"])
            return RefineRecipe(**values)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")
