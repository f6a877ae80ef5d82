"""Recipes from files and command lines: `training/recipes/*.yaml`, flags over them, and what no arguments mean.

recipe = read_recipe("mae-l16", dataset="my_images/")               # training/recipes/mae-l16.yaml, one field changed
recipe = parse_recipe(["--recipe", "quickstart", "--seed", "1"])    # what training/refine.py does
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import HfArgumentParser

from ..runtime.settings import documented, read_fields
from .recipe import START_FIELDS, RefineRecipe

# Fields of a recipe that say where its own data lie; another --dataset makes them void.
DATA_FIELDS = frozenset(("dataset_config", "split", "eval_dataset", "eval_split"))


def _defaults(name: str, dataset: str | None, init_from: str | None) -> dict[str, Any]:
    """The fields of the recipe `name`, without those that say where its own data lie if `dataset` replaces it, and without its
    starting weights if `init_from` does."""
    values = {"recipe": name, **read_fields(name, RefineRecipe)}
    void = DATA_FIELDS if dataset is not None and dataset != values.get("dataset") else frozenset()
    if init_from is not None:
        void |= {*START_FIELDS, "family"}
    return {key: value for key, value in values.items() if key not in void}


def read_recipe(name: str, **changes: Any) -> RefineRecipe:
    """The recipe `name` with some fields changed; with another `dataset`, its splits and configuration are not taken over, with
    `init_from` not its starting weights."""
    return RefineRecipe(
        **{**_defaults(name, changes.get("dataset"), changes.get("init_from")), **changes}
    )


def _help(name: str) -> str:
    return str(next(field for field in fields(RefineRecipe) if field.name == name).metadata["help"])


@dataclass
class _Flags(RefineRecipe):
    """The fields of RefineRecipe as HfArgumentParser can read them: it knows no choice between numbers and a word."""

    head_blocks: list[str] | None = documented(None, _help("head_blocks"))  # type: ignore[assignment]
    micro_batch_size: str | None = documented(None, _help("micro_batch_size"))  # type: ignore[assignment]


def _number(word: Any) -> Any:
    """ "8" -> 8; what is no whole number stays, for RefineRecipe to take or refuse."""
    return int(word) if isinstance(word, str) and re.fullmatch(r"-?\d+", word) else word


def _head_blocks(given: Any) -> Any:
    """["8", "9"] -> [8, 9] and ["auto"] -> "auto", from a command line; what is neither stays, for RefineRecipe to refuse."""
    if given == ["auto"]:
        return "auto"
    return [_number(word) for word in given] if isinstance(given, list) else given


def parse_recipe(arguments: Sequence[str] | None = None) -> RefineRecipe:
    """The recipe a command line asks for: flags over the YAML of `--recipe`; neither recipe, model nor data: the quickstart.

    Raises:
        SystemExit: code 2, after one line that names flag, value and what is allowed.
    """
    usage = "%(prog)s [--recipe NAME] [--flag value ...]; --help lists the flags"
    parser = HfArgumentParser(
        _Flags, description=__doc__.split("\n")[0], usage=usage, allow_abbrev=False
    )  # type: ignore[arg-type]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=usage)
    for flag in ("--recipe", "--model", "--pretrain", "--init_from", "--dataset"):
        first.add_argument(flag)
    start = first.parse_known_args(arguments)[0]
    name = start.recipe if any(vars(start).values()) else "quickstart"
    try:
        if name is not None:
            parser.set_defaults(**_defaults(name, start.dataset, start.init_from))
        values = vars(parser.parse_args(arguments))
        numbers = {
            "head_blocks": _head_blocks(values["head_blocks"]),
            "micro_batch_size": _number(values["micro_batch_size"]),
        }
        return RefineRecipe(**{**values, **numbers})
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")


__all__ = ["parse_recipe", "read_recipe"]
