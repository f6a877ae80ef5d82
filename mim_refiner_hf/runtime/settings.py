"""Settings: documented fields of a dataclass, their types checked, and YAML files that hold them.

epochs: float = documented(20, "Epochs of the refinement.")
values = read_fields("mae-l16", RefineRecipe)               # training/recipes/mae-l16.yaml, unknown fields refused
"""

import re
import types
from dataclasses import field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


def documented(default: Any, text: str) -> Any:
    """A dataclass field with its documentation; lists become factories."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type; an int passes for a float, a bool for neither."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(_is(value, part) for part in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is Literal:
        return isinstance(value, str)  # which ones, `_ALLOWED` says
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(
            value, bool
        )
    return isinstance(value, kind)


def check_types(recipe: Any) -> None:
    """Raise a ValueError unless every field of a recipe holds its annotated type; YAML and Python do not look at types."""
    for name, kind in get_type_hints(type(recipe)).items():
        value = getattr(recipe, name)
        if not _is(value, kind):
            allowed = (
                kind.__name__
                if isinstance(kind, type) and get_origin(kind) is None
                else str(kind).replace("typing.", "")
            )
            raise ValueError(f"--{name} {value!r}: must be of the type {allowed}")


def recipe_file(name: str, flag: str = "recipe") -> Path:
    """The YAML file of a recipe: a path, or a name in `training/recipes/` (shipped with the package as `mim_refiner_hf.recipes`)."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise FileNotFoundError(f"--{flag} {name}: no such file")
        return Path(name)
    folders = [
        Path(__file__).parents[2] / "training" / "recipes",
        Path(str(resources.files("mim_refiner_hf"))) / "recipes",
    ]
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    if not (folder / f"{name}.yaml").is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise FileNotFoundError(
            f"--{flag} {name}: unknown; there are {known}; or give the path of a .yaml file"
        )
    return folder / f"{name}.yaml"


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3 for text; here it is the number that it is on the command line."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_fields(name: str, kind: type, flag: str = "recipe") -> dict[str, Any]:
    """The fields of a YAML recipe, checked against the dataclass `kind`; `flag` is what asked for it, for messages."""
    path = recipe_file(name, flag)
    try:
        values = yaml.load(path.read_text(), _YamlLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--{flag} {name}: {path} is not valid YAML ({' '.join(str(error).split())})"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"--{flag} {name}: {path} must hold one `field: value` per line")
    if unknown := sorted(map(str, set(values) - {f.name for f in fields(kind)})):
        raise ValueError(
            f"--{flag} {name}: {path} has unknown field(s) {', '.join(unknown)}; --help lists them all"
        )
    return values


__all__ = ["check_types", "documented", "read_fields", "recipe_file"]
