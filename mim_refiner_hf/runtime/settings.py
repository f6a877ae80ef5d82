"""Settings: documented dataclass fields, checked against their annotations, and YAML files of them.

    @dataclass
    class Recipe:
        epochs: PositiveFloat = documented(30, "Epochs.")
        flip: Share = documented(0.5, "Probability of a horizontal flip.")
        swap: Literal["all", "none"] = documented("all", "What the neighbour replaces.")

        def __post_init__(self) -> None:
            check_fields(self)        # ValueError: flip=1.5: must be between 0 and 1

    values = read_fields("mae-refined-l16", RefineRecipe)   # training/recipes/mae-refined-l16.yaml

A YAML recipe that states `base: d2v2-refined-l16` holds the fields of that recipe and, over them,
its own; `eval_split: null` takes one of the base away.

The configuration's `huggingface_hub.dataclasses.strict` is not used here. It raises an error of two
lines that is no ValueError and names neither flag nor value, it refuses 1 where 1.0 is meant, and
what a field allows would have to stand in its metadata, all of which HfArgumentParser hands on to
argparse.
"""

import logging
import math
import re
import types
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .files import shipped_folder
from .text import one_line
from .versions import check_format
from .wording import setting

logger = logging.getLogger(__name__)

# --- what a field may hold


@dataclass(frozen=True)
class Allowed:
    """Which values of its type a field takes, and how a refusal ends: "must be <words>"."""

    words: str
    holds: Callable[[Any], bool]


def minimum(low: float) -> Allowed:
    """`low` or more."""
    return Allowed(f"at least {low:g}", lambda value: value >= low)


def between(low: int, high: int) -> Allowed:
    """A whole number from `low` to `high`."""
    return Allowed(f"at least {low} and at most {high}", lambda value: low <= value <= high)


PositiveInt = Annotated[int, minimum(1)]
NonNegativeInt = Annotated[int, minimum(0)]
# what generators take; scikit-learn's no more
Seed = Annotated[int, between(0, 2**32 - 1)]
NonNegativeFloat = Annotated[
    float, Allowed("at least 0, and finite", lambda value: 0 <= value < math.inf)
]
PositiveFloat = Annotated[
    float, Allowed("a number greater than 0", lambda value: 0 < value < math.inf)
]
Rate = Annotated[float, Allowed("greater than 0 and at most 1000", lambda value: 0 < value <= 1000)]
# of networks and of images, several times what is published: what is larger has no end
Width = Annotated[int, between(1, 2**16)]
Depth = Annotated[int, between(1, 1024)]
Share = Annotated[float, Allowed("between 0 and 1", lambda value: 0 <= value <= 1)]
ShareBelowOne = Annotated[
    float, Allowed("at least 0 and less than 1", lambda value: 0 <= value < 1)
]
ShareAboveZero = Annotated[
    float, Allowed("greater than 0 and at most 1", lambda value: 0 < value <= 1)
]

ShareBetween = Annotated[
    float, Allowed("greater than 0 and less than 1", lambda value: 0 < value < 1)
]


def documented(default: Any, text: str) -> Any:
    """A dataclass field with the text that `--help` shows; a list is copied for every object."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def check_fields(settings: Any) -> None:
    """Raise a ValueError unless every field of a dataclass holds what its annotation says.

    An annotation is a type, a Literal, a type with an `Allowed` (Annotated), a list of these, or a
    union of them. An int passes for a float; a bool passes for neither.
    """
    annotations = get_type_hints(type(settings), include_extras=True)
    for known in fields(settings):
        name = known.name
        value = getattr(settings, name)
        parts = _parts(annotations[name])

        of_this_type = [part for part in parts if _is_of(value, part)]
        if not of_this_type:
            kinds = " | ".join(map(_type_name, parts))
            raise ValueError(f"{setting(name, value)}: must be of the type {kinds}")

        if not any(_allows(part, value) for part in of_this_type):
            words = [_words(part) for part in parts if part is not types.NoneType]
            raise ValueError(f"{setting(name, value)}: must be {', or '.join(words)}")


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; of anything else, itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value has the type; neither Literals' choices nor `Allowed` are looked at."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _is_of(value, get_args(kind)[0])
    if origin is list:
        item_kind = get_args(kind)[0]
        return isinstance(value, list) and all(_is_of(item, item_kind) for item in value)
    if origin is Literal:
        return isinstance(value, str)

    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, kind)


def _allows(kind: Any, value: Any) -> bool:
    """Whether a value of the type is one that its Literal or `Allowed` takes."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is Annotated:
        return all(rule.holds(value) for rule in get_args(kind)[1:])
    return True


def _words(kind: Any) -> str:
    """What a part of an annotation takes, as the end of "must be"."""
    if get_origin(kind) is Annotated:
        return " and ".join(rule.words for rule in get_args(kind)[1:])
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    return _type_name(kind)


def _type_name(kind: Any) -> str:
    """A part of an annotation as it is written in Python, without its rules."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if kind is types.NoneType:
        return "None"
    if isinstance(kind, type) and get_origin(kind) is None:
        return kind.__name__
    return str(kind).replace("typing.", "")


# --- recipes: YAML files of fields


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3 for text; here it is the number that it is on the command line."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def recipe_name(name: str, prefix: str = "") -> str:
    """The name of a recipe today, which is that of the model it makes.

    Before, `mae-l16` was the recipe that refines this model, and data2vec 2.0 had two spellings.

    Args:
        prefix: what names of its kind begin with, as "pretrain-", and may be left out.
    """
    name = name.replace("data2vec2-", "d2v2-")
    if prefix:
        return prefix + name.removeprefix(prefix)
    return re.sub(r"^(mae|d2v2|dbot|crossmae)-(l16|h14|2b14)$", r"\1-refined-\2", name)


def recipe_file(name: str, asked: str = "", prefix: str = "") -> Path:
    """The YAML file of a recipe: its path, or its name in `training/recipes/`, which is installed.

    An old name is said in a line.

    Args:
        asked: what asked for it, the beginning of the message; empty for the setting `recipe`.
        prefix: as of `recipe_name`.

    Raises:
        FileNotFoundError: naming the recipes that there are.
    """
    asked = asked or setting("recipe", name)
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise FileNotFoundError(f"{asked}: no such file")
        return Path(name)

    folder = shipped_folder("recipes", in_repository="training/recipes")
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    # what is of another kind has fields that are refused by name
    for spelling in (recipe_name(name, prefix), name):
        if spelling in names:
            if spelling not in (name, prefix + name):
                logger.warning("%s: the recipe is called %s now", asked, spelling)
            return folder / f"{spelling}.yaml"

    # many of one kind would bury the others
    of_its_kind = [each for each in names if each.startswith(prefix)]
    known = ", ".join(each for each in of_its_kind if not each.startswith("ablation-"))
    ablations = "" if prefix else ", and ablation-..."
    raise FileNotFoundError(
        f"{asked}: unknown; there are {known}{ablations}; or give the path of a .yaml file"
    )


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that an earlier version wrote, by today's names.

    `keep` was the number of checkpoints.
    """
    if isinstance(values.get("keep"), int):
        values["save_total_limit"] = values.pop("keep")
    return values


def read_fields(name: str, kind: type, flag: str = "recipe") -> dict[str, Any]:
    """The fields of a YAML recipe and of the recipes that it is based on.

    Args:
        kind: the dataclass whose fields they are; its `recipe_prefix`, if it has one, is what names
            of its recipes begin with.
        flag: what asked for the recipe, for messages.

    Raises:
        ValueError, FileNotFoundError: in one line, naming the file and what is wrong in it.
    """
    asked = setting(flag, name)
    allowed = {each.name for each in fields(kind)}
    prefix = getattr(kind, "recipe_prefix", "")
    path = recipe_file(name, asked, prefix)
    values: dict[str, Any] = {}
    read: list[Path] = []

    while True:
        read.append(path.resolve())
        own = _read_yaml(path, asked)
        base = own.pop("base", None)
        # a run's recipe.json states it
        check_format("recipe", own.pop("format_version", None), path)
        if "keep" in own and "keep" not in with_new_names(own):
            logger.warning("%s: %s has keep, which is called save_total_limit now", asked, path)
        unknown = sorted(map(str, set(own) - allowed))
        if unknown:
            raise ValueError(
                f"{asked}: {path} has unknown field(s) {', '.join(unknown)}; --help lists them all"
            )

        # what was read before stands over its base
        values = {**own, **values}
        if base is None:
            # a run that began under an old name lies in the folder of that name
            if "output_dir" in values and recipe_name(name, prefix) != name:
                values["output_dir"] = f"outputs/{name}"
            return values

        path = _base_file(base, path, asked, prefix)
        if path.resolve() in read:
            circle = " -> ".join(each.stem for each in [*read, path])
            raise ValueError(f"{asked}: the bases go in a circle: {circle}")


def _base_file(base: Any, beside: Path, asked: str, prefix: str) -> Path:
    """The file that `base:` names; a path counts from the folder of the file that states it."""
    if not isinstance(base, str):
        raise ValueError(f"{asked}: {beside} has base {base!r}; it must be the name of a recipe")
    if base.endswith((".yaml", ".yml")):
        base = str(beside.parent / base)
    return recipe_file(base, f"{asked}: {beside} has base {base}", prefix)


def _read_yaml(path: Path, asked: str) -> dict[str, Any]:
    """One YAML file of `field: value` lines; ValueError for anything else."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _YamlLoader) or {}
    # its reader makes numbers and dates as it goes, and calls itself for what is nested
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = one_line(error)[:300]
        raise ValueError(f"{asked}: {path} is not valid YAML ({reason})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{asked}: {path} must hold one `field: value` per line")
    return values
