"""What a checkpoint format is: `Layout`, one per family, with the rules that place its tensors. The formats: `layouts.py`.

A layout answers five questions about a checkpoint: where in the file its weights are (`paths`), how the family is recognised
(`signature`, or `model_types` of a `config.json`), where each tensor goes (`rules`), what is left behind on purpose (`drops`,
with the reason that the report prints), and how its images were normalised (`preprocessing`).
"""

import math
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

CLS_TOKEN = "embeddings.cls_token"
CLS_POSITION = "embeddings.cls_position"  # not a weight of ours: `load.py` adds it to the CLS token
POSITIONS = "embeddings.position_embeddings"

Placed = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """What was read: the weights' container as it was saved, the JSON files beside it (empty where there are none), and the family
    where the name says it (None where the weights have to)."""

    name: str
    contents: Mapping[str, Any]
    config: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    family: str | None = None


def listed(names: list[str], limit: int = 8) -> str:
    """Names for an error message, the first few of a long list."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def copy(target: str, tensor: Tensor) -> Placed:
    """The tensor as it is, under its new name."""
    return {target: tensor}


def split_qkv(target: str, tensor: Tensor) -> Placed:
    """A fused (3 D, ...) projection as three (D, ...), `*` in the target standing for q, k and v."""
    return {
        target.replace("*", name): part for name, part in zip("qkv", tensor.chunk(3), strict=True)
    }


def cls_and_patches(target: str, tensor: Tensor) -> Placed:
    """Positions (1, 1 + N, D) whose first row the family adds to its CLS token: kept, to be folded into that token."""
    return {CLS_POSITION: tensor[:, :1], target: tensor[:, 1:]}


def any_positions(target: str, tensor: Tensor) -> Placed:
    """Positions of the patches alone (1, N, D), or of CLS and patches (1, 1 + N, D): on a square grid only one fits."""
    rows = tensor.shape[1]
    return {target: tensor} if math.isqrt(rows) ** 2 == rows else cls_and_patches(target, tensor)


def patches_only(target: str, tensor: Tensor) -> Placed:
    """Positions (1, 1 + N, D) whose first row the family never uses (CrossMAE's encoder adds none to its CLS token)."""
    return {target: tensor[:, 1:]}


class Rule(NamedTuple):
    """Source names that match `pattern` in full go to `target` (a replacement with groups), by way of `how`."""

    pattern: str
    target: str
    how: Callable[[str, Tensor], Placed] = copy


def stated(*path: str) -> Callable[[Mapping[str, Any]], Any]:
    """A fact that the file itself states at `path` of its nested dictionaries; None where it does not."""

    def read(contents: Mapping[str, Any]) -> Any:
        value: Any = contents
        for key in path:
            value = vars(value) if isinstance(value, Namespace) else value
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    return read


def nothing(contents: Mapping[str, Any]) -> Mapping[str, Any]:
    """No word on the preprocessing: ImageNet's mean and standard deviation at the native size."""
    return {}


@dataclass(frozen=True)
class Layout:
    """One family's checkpoint format.

    Args:
        family: its name in `load_encoder(family=...)` and in the report.
        title: what it is, in words, for error messages.
        rules: where each tensor goes; the first rule that matches a name is taken.
        paths: nested keys under which the state dict may lie, `()` for the file itself; the first that exists is taken.
        signature: patterns searched in the list of tensor names, one per line in file order; all must be found.
        model_types: `model_type` values of a `config.json`, or `kind`s that the authors' training files state, of this family.
        prefix: pattern removed from the beginning of every name before anything else.
        drops: (pattern, reason) of tensors that an encoder does not need.
        settings: fields of `MimRefinerConfig` that the family fixes.
        facts: fields of `MimRefinerConfig` that the file (or its `config.json`) may state, and how to read them.
        preprocessing: what the family, or its file, says of its preprocessing, in the words of `preprocessor_config.json`.
        finish: a last renaming over all that was placed.
    """

    family: str
    title: str
    rules: tuple[Rule, ...]
    paths: tuple[tuple[str, ...], ...] = ((),)
    signature: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    prefix: str = ""
    drops: tuple[tuple[str, str], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)
    preprocessing: Callable[[Mapping[str, Any]], Mapping[str, Any]] = nothing
    finish: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def recognises(self, names: list[str]) -> list[str]:
        """The names that carry this family's signature, one for each of its patterns; empty if any is not found."""
        lines = "\n".join(names)
        found = [re.search(pattern, lines, re.MULTILINE | re.DOTALL) for pattern in self.signature]
        starts = [match.start() for match in found if match is not None]
        return (
            [names[lines.count("\n", 0, start)] for start in starts]
            if len(starts) == len(found)
            else []
        )

    def own_name(self, name: str) -> str:
        """The name without the family's prefix."""
        return re.sub(rf"\A(?:{self.prefix})", "", name)

    def reason_to_drop(self, name: str) -> str | None:
        """Why a tensor of this name is left behind on purpose; None if it is not."""
        name = self.own_name(name)
        return next((reason for pattern, reason in self.drops if re.fullmatch(pattern, name)), None)

    def place(self, name: str, tensor: Tensor) -> Placed | str | None:
        """Where this tensor goes: our names with their tensors, or the reason why it is dropped, or None if it is unknown."""
        if (reason := self.reason_to_drop(name)) is not None:
            return reason
        name = self.own_name(name)
        for rule in self.rules:
            if match := re.fullmatch(rule.pattern, name):
                return rule.how(match.expand(rule.target), tensor)
        return None
