"""What a checkpoint format is: `Layout`, one per family. The formats themselves: `layouts.py`.

A layout answers five questions about a checkpoint: where in the file its weights are (`paths`), how
the family is recognised (`signature`, or `model_types` of a `config.json`), where each tensor goes
(`rules`), what is left behind on purpose (`drops`, with the reason that the report prints), and how
its images were normalised (`preprocessing`).
"""

import math
import re
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

from torch import Tensor

from ..runtime.text import one_line
from .licence import UNKNOWN, Licence

CLS_TOKEN = "embeddings.cls_token"
REGISTERS = "embeddings.register_tokens"
POSITIONS = "embeddings.position_embeddings"
# not a weight of ours: `load.py` adds it to the CLS token
CLS_POSITION = "embeddings.cls_position"
# nor is this: a table of which it is open what its first rows are for
ANY_POSITIONS = "embeddings.any_positions"

Placed = dict[str, Tensor]

# characters of a tensor's name in a message, with what is wrong with it
_LONGEST_NAME = 300


@dataclass(frozen=True)
class Source:
    """A checkpoint as it was read.

    Args:
        name: what its user calls it.
        contents: the container of the weights as it was saved.
        config, preprocessing: the JSON files beside it; empty where there are none.
        family: where the name says it; None where the weights have to.
        licence: what the card beside the weights, or the zoo, states.
        finish: what its configuration asks for once all is placed, given by our names.
    """

    name: str
    contents: Mapping[str, Any]
    config: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    family: str | None = None
    licence: Licence = UNKNOWN
    finish: Callable[[Placed], Placed] | None = None


class EncoderFields(TypedDict, total=False):
    """Fields of `MimRefinerConfig`, as far as shapes, a family or a file tell them.

    None where a field is asked for and nothing is said, or where it says that there is none.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int | None
    intermediate_size: int
    hidden_act: str | None
    gated_mlp: bool
    mlp_norm: bool
    attention_norm: bool
    query_key_norm: bool
    layer_norm_eps: float
    image_size: int | list[int]
    patch_size: int
    cut_to_patches: bool
    patch_bias: bool
    patch_norm: bool
    num_channels: int
    norm_placement: str
    norm_type: str
    position_encoding: str
    rope_theta: float | None
    rope_places: str
    rope_grid: list[int] | None
    rope_offset: float
    position_resampling: str | None
    bias: str
    layer_scale_init: float | None
    use_cls_token: bool
    num_register_tokens: int
    embedding_norm: bool
    final_norm: bool
    final_norm_affine: bool
    predictor_layers: int
    pooling_head: str
    pooling_heads: int
    pooling_intermediate_size: int
    pooled_norm: bool
    pooling: str | None
    source_model_type: str


class PreprocessorFields(TypedDict, total=False):
    """Fields of a `preprocessor_config.json`, as far as a family, or a library, states them."""

    image_mean: list[float]
    image_std: list[float]
    resample: int
    size: dict[str, int]
    crop_size: dict[str, int]
    squash: bool


def listed(names: list[str], limit: int = 8) -> str:
    """Names for an error message, the first few of a long list, each on one line and cut."""
    first = ", ".join(one_line(name)[:_LONGEST_NAME] for name in names[:limit])
    return first if len(names) <= limit else f"{first} and {len(names) - limit} more"


# --- how a tensor is placed: its target name and itself -> our names with their tensors ---------


def as_it_is(target: str, tensor: Tensor) -> Placed:
    """The tensor as it is, under its new name."""
    return {target: tensor}


def split_qkv(target: str, tensor: Tensor) -> Placed:
    """A fused (3 D, ...) projection as three (D, ...); `*` in the target stands for q, k and v."""
    parts = zip("qkv", tensor.chunk(3), strict=True)
    return {target.replace("*", name): part for name, part in parts}


def split_kv(target: str, tensor: Tensor) -> Placed:
    """A fused (2 D, ...) projection as two (D, ...); `*` in the target stands for k and v."""
    parts = zip("kv", tensor.chunk(2), strict=True)
    return {target.replace("*", name): part for name, part in parts}


def cls_and_patches(target: str, tensor: Tensor) -> Placed:
    """Positions (1, 1 + N, D) whose first row is added to the CLS token: kept for that."""
    return {CLS_POSITION: tensor[:, :1], target: tensor[:, 1:]}


def any_positions(target: str, tensor: Tensor) -> Placed:
    """Positions of the patches (1, N, D), or of CLS and registers too: `positions.py` tells."""
    return {ANY_POSITIONS: tensor[:, :0], target: tensor}


def square_positions(target: str, tensor: Tensor) -> Placed:
    """Positions (1, N, D) of a square of patches, or (1, 1 + N, D) with a first row for CLS."""
    rows = tensor.shape[1]
    if math.isqrt(rows) ** 2 == rows:
        return {target: tensor}
    return cls_and_patches(target, tensor)


def without_first_row(target: str, tensor: Tensor) -> Placed:
    """Positions (1, 1 + N, D) whose first row is never used (CrossMAE adds none to its CLS)."""
    return {target: tensor[:, 1:]}


def as_token(target: str, tensor: Tensor) -> Placed:
    """A token (D,) as (1, 1, D)."""
    return {target: tensor.reshape(1, 1, -1)}


def table_rows(target: str, tensor: Tensor) -> Placed:
    """The weight (N, D) of an embedding layer as positions (1, N, D)."""
    return {target: tensor.unsqueeze(0)}


def cls_and_table_rows(target: str, tensor: Tensor) -> Placed:
    """The same (1 + N, D) with a first row for CLS."""
    return cls_and_patches(target, tensor.unsqueeze(0))


def first_and_registers(target: str, tensor: Tensor) -> Placed:
    """Class tokens (1, n, D), of which all but the first are registers of ours."""
    return {target: tensor[:, :1]} | registers_if_any(REGISTERS, tensor[:, 1:])


def registers_if_any(target: str, tensor: Tensor) -> Placed:
    """Register tokens (1, R, D); R = 0 is transformers' word for none."""
    return {target: tensor} if tensor.shape[1] else {}


def split_gate(target: str, tensor: Tensor) -> Placed:
    """A fused (2 W, ...) gate and first layer of an MLP; `*` in the target stands for them."""
    gate, inner = tensor.chunk(2)
    return {target.replace("*", "gate"): gate, target.replace("*", "fc1"): inner}


def by_blocks(target: str, tensor: Tensor) -> Placed:
    """A tensor (2, L, ...) of all blocks as L of (2, ...); `*` stands for the number of a block."""
    parts = tensor.unbind(1)
    return {target.replace("*", str(block)): part for block, part in enumerate(parts)}


def as_kernel(target: str, tensor: Tensor) -> Placed:
    """A linear layer (D, P * P * C) over the pixels of a patch, as a convolution (D, C, P, P).

    Which C is not in the shape: 3 where that makes a square, else the least that does.
    """
    width, pixels = tensor.shape
    for channels in (3, *range(1, pixels + 1)):
        side = math.isqrt(pixels // channels)
        if side**2 * channels == pixels:
            break
    return {target: tensor.reshape(width, side, side, channels).permute(0, 3, 1, 2)}


class Rule(NamedTuple):
    """Names that match `pattern` in full go to `target` (with its groups), by way of `how`."""

    pattern: str
    target: str
    how: Callable[[str, Tensor], Placed] = as_it_is


def stated(*path: str) -> Callable[[Mapping[str, Any]], Any]:
    """A reader of what a file states at `path` of its nested dictionaries; None if nothing."""

    def read(contents: Mapping[str, Any]) -> Any:
        value: Any = contents
        for key in path:
            if isinstance(value, Namespace):
                value = vars(value)
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    return read


def _nothing(contents: Mapping[str, Any]) -> PreprocessorFields:
    """No word on the preprocessing: ImageNet's mean and deviation at the native size."""
    return {}


@dataclass(frozen=True)
class Layout:
    """One family's checkpoint format.

    Args:
        family: its name in `load_encoder(family=...)` and in the report.
        title: what it is, in words, for error messages.
        rules: where each tensor goes; the first rule that matches a name is taken.
        paths: nested keys under which the state dict may lie, `()` for the file itself; the first
            that exists is taken.
        signature: patterns searched in the list of tensor names, one name a line in file order;
            all must be found.
        model_types: `model_type` values of a `config.json`, or `kind`s that the authors' training
            files state, of this family.
        prefix: pattern removed from the beginning of every name before anything else.
        drops: (pattern, reason) of tensors that an encoder does not need.
        settings: fields of `MimRefinerConfig` that the family fixes.
        facts: fields of `MimRefinerConfig` that the file (or its `config.json`) may state, and how
            to read them.
        claims: what a `config.json` says of the weights, to be compared with them (`claims.py`).
        preprocessing: what the family, or its file, says of its preprocessing, in the words of
            `preprocessor_config.json`.
        rename: names of all that was placed -> what they are called in the end.
        finish: a last change of what was placed, given by our names.
        reads_student: whether its authors go on from its own path where a moving average lies
            beside it.
    """

    family: str
    title: str
    rules: tuple[Rule, ...]
    paths: tuple[tuple[str, ...], ...] = ((),)
    signature: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    prefix: str = ""
    drops: tuple[tuple[str, str], ...] = ()
    settings: EncoderFields = field(default_factory=EncoderFields)
    facts: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)
    claims: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)
    preprocessing: Callable[[Mapping[str, Any]], PreprocessorFields] = _nothing
    rename: Callable[[Collection[str]], Mapping[str, str]] | None = None
    finish: Callable[[Placed], Placed] | None = None
    reads_student: bool = False

    def recognises(self, names: list[str]) -> list[str]:
        """The names that match the signature, one for each pattern; empty if any is not found."""
        lines = "\n".join(names)
        carriers = []
        for pattern in self.signature:
            match = re.search(pattern, lines, re.MULTILINE | re.DOTALL)
            if match is None:
                return []
            carriers.append(names[lines.count("\n", 0, match.start())])
        return carriers

    def _own_name(self, name: str) -> str:
        """The name without the family's prefix."""
        return re.sub(rf"\A(?:{self.prefix})", "", name)

    def reason_to_drop(self, name: str) -> str | None:
        """Why a tensor of this name is left behind on purpose; None if it is not."""
        name = self._own_name(name)
        for pattern, reason in self.drops:
            if re.fullmatch(pattern, name):
                return reason
        return None

    def place(self, name: str, tensor: Tensor) -> Placed | None:
        """Our names for a tensor of the file, with what belongs there; None if it is unknown."""
        name = self._own_name(name)
        for rule in self.rules:
            match = re.fullmatch(rule.pattern, name)
            if match:
                return rule.how(match.expand(rule.target), tensor)
        return None
