"""birder's files in our words: its RoPE ViTs, with what they say of images and classes.

    found = birder_in_our_words(read_source("rope_vit_reg4_b14_capi-places365.pt", None), None)
    found.config["image_size"], found.config["rope_places"]      # [224, 224], "index"
    found.preprocessing["image_mean"]                            # the file's rgb_stats

A file is a dictionary of `state` (the weights), `signature` (size of images, number of classes),
`rgb_stats`, `class_to_idx` and at times `config`, in which settings of the network are overridden;
of a safetensors file they stand in the header, as JSON. Neither says which network it is, and other
ViTs of birder have the same tensors, without the turned queries and keys: so the name of the file
has to say it, as the published ones do, or the caller.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..model.configuration_mim_refiner import LARGEST_SIDE, brief, is_number
from ..model.image_processing_mim_refiner import check_settings
from ..runtime.files import CheckpointError
from ..runtime.strangers import parse_json
from ..runtime.text import one_line
from .layout import EncoderFields, PreprocessorFields, Source, listed

BIRDER = "birder"
"""The family, and the `model_type` of a source in our words."""

_FACTS = ("signature", "rgb_stats", "class_to_idx", "config")
_NETWORK = re.compile(r"(?:^|[^a-z0-9])rope_vit_")
# networks of that name whose pooling or epsilon no tensor tells
_OTHERWISE = re.compile(r"_(aps|c1)(?=_|$)")
_NEEDED = ("conv_proj.weight", "pos_embedding", "encoder.block.0.attn.qkv.weight")
_BICUBIC = 3
_MOST_CLASSES = 2**20
# of the two widths that are published, the one of which `shapes.py` knows no heads
_HEADS_OF_WIDTH = {896: 16}

# settings that a file may override: those that are fields of ours
_FIELDS = {
    "num_heads": "num_attention_heads",
    "norm_layer_eps": "layer_norm_eps",
    "rope_temperature": "rope_theta",
    "pt_grid_size": "rope_grid",
}
# those that tensors tell, or that are of training alone
_TOLD_BY_TENSORS = {
    "pos_embed_special_tokens",
    "patch_size",
    "num_layers",
    "hidden_dim",
    "mlp_dim",
    "drop_path_rate",
    "num_reg_tokens",
    "class_token",
    "attn_pool_head",
    "norm_layer_type",
    "mlp_layer_type",
}


def contents_of_header(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]
) -> Mapping[str, Any]:
    """What a safetensors file holds, as birder's torch files hold it where it is birder's.

    Raises:
        CheckpointError: for a fact that is no JSON.
    """
    if "birder_version" not in header:
        return tensors

    contents: dict[str, Any] = {"state": tensors, "birder_version": header["birder_version"]}
    for key in _FACTS:
        if key not in header:
            continue
        try:
            contents[key] = parse_json(header[key])
        except ValueError as error:
            raise CheckpointError(
                f"{path}: {key} in its header is not valid JSON: {one_line(error)[:200]}; get it "
                "again"
            ) from error
    return contents


def is_birder(contents: Mapping[str, Any]) -> bool:
    """Whether these are the contents of a file of birder."""
    return "birder_version" in contents and isinstance(contents.get("state"), Mapping)


def birder_in_our_words(found: Source, family: str | None) -> Source:
    """A file of birder with its facts in our words; any other source as it is.

    Args:
        found: as it was read.
        family: that the caller, or the zoo, states.

    Raises:
        CheckpointError: for another network, and for a file that does not say, or says what
            cannot be, of the size of its images and of how their pixels are normalised.
    """
    if not is_birder(found.contents) or family not in (None, BIRDER):
        return found
    state = dict(found.contents["state"])
    _check_network(found.name, state, family)
    channels, height, width = _image_shape(found)
    mean_and_std = _mean_and_std(found, channels)

    fields: EncoderFields = {
        "image_size": [height, width],
        "norm_type": "layernorm" if "norm.bias" in state else "rmsnorm",
        "hidden_act": "gelu",
        "pooling_head": "none",
        "num_attention_heads": _HEADS_OF_WIDTH.get(len(state["conv_proj.weight"])),
    }
    if any(".mlp.fc1_g." in name for name in state):
        fields["hidden_act"] = "silu"
    if any(name.startswith("attn_pool.") for name in state):
        fields["pooling_head"] = "attention_patches"
    config = {"model_type": BIRDER, **fields, **_overridden(found)}

    preprocessing: PreprocessorFields = {
        "size": {"height": height, "width": width},
        "squash": True,
        "resample": _BICUBIC,
        **mean_and_std,
    }
    patch = state["conv_proj.weight"].shape[-1]
    _fold_positions(found.name, state, (height // max(patch, 1)) * (width // max(patch, 1)))
    contents = {**found.contents, "state": state}
    return replace(found, contents=contents, config=config, preprocessing=preprocessing)


def class_names(found: Source) -> list[str]:
    """The names of the classes of a file of birder, in the order of its classifier's outputs.

    Raises:
        CheckpointError: where numbers are left out or stand twice.
    """
    numbers = found.contents.get("class_to_idx")
    stated = list(numbers.items()) if isinstance(numbers, Mapping) else []
    names: dict[int, str] = {}
    for name, number in stated:
        if is_number(number, 0, _MOST_CLASSES):
            names[number] = str(name)

    if not stated or sorted(names) != list(range(len(stated))):
        raise CheckpointError(
            f"{found.name}: class_to_idx is {brief(numbers)}; it must give every class a number of "
            "its own, from 0 on; get the file again"
        )
    return [names[number] for number in range(len(names))]


def _check_network(name: str, state: Mapping[str, Any], family: str | None) -> None:
    """A CheckpointError for a network that is no RoPE ViT of the kind that is known here."""
    missing = [key for key in _NEEDED if not isinstance(state.get(key), Tensor)]
    if missing or state["conv_proj.weight"].ndim != 4:
        what = listed(missing or ["conv_proj.weight as a convolution"])
        raise CheckpointError(
            f"{name} is a file of birder, but of another network than a RoPE ViT: it has no {what}"
            f", but {listed(list(state), 4) or 'nothing'}; give one of its rope_vit_* files"
        )

    if family is not None:
        return
    stem = Path(name).name
    other = _OTHERWISE.search(Path(stem).stem)
    if not _NETWORK.search(stem) or other:
        part = f" ('{other[1]}' is another pooling or norm)" if other else ""
        raise CheckpointError(
            f"{name} is a file of birder, which does not say of which network, and its name is not "
            f"that of a RoPE ViT known here, rope_vit_*{part}; if it is one, pass "
            f"family={BIRDER!r}"
        )


def _image_shape(found: Source) -> tuple[int, int, int]:
    """Channels, height and width of images, out of the signature; CheckpointError without one."""
    signature = found.contents.get("signature")
    shape: Any = None
    try:
        shape = signature["inputs"][0]["data_shape"]  # type: ignore[index]
        _, channels, height, width = shape
    # whatever stands there, it is no shape of images
    except (KeyError, IndexError, TypeError, ValueError):
        channels = height = width = None

    if not all(is_number(side, 1, LARGEST_SIDE) for side in (channels, height, width)):
        stated = signature if shape is None else shape
        raise CheckpointError(
            f"{found.name} is a file of birder without a signature that states the shape of its "
            f"images: {brief(stated)}, expected inputs[0].data_shape "
            "[0, channels, height, width]; get it again"
        )
    return channels, height, width


def _mean_and_std(found: Source, channels: int) -> PreprocessorFields:
    """`rgb_stats` as a preprocessor's settings; CheckpointError without them."""
    stats = found.contents.get("rgb_stats")
    numbers = []
    for key in ("mean", "std"):
        value = stats.get(key) if isinstance(stats, Mapping) else None
        if not isinstance(value, list | tuple) or len(value) != channels:
            raise CheckpointError(
                f"{found.name} is a file of birder whose rgb_stats {brief(stats)} do not state "
                f"{key} by {channels} numbers; get it again"
            )
        numbers.append(list(value))

    fields: PreprocessorFields = {"image_mean": numbers[0], "image_std": numbers[1]}
    try:
        check_settings(fields, f"{found.name}: rgb_stats say")
    except ValueError as error:
        raise CheckpointError(f"{error}; get it again") from error
    return fields


def _overridden(found: Source) -> dict[str, object]:
    """The settings that the file overrides; CheckpointError for one that is not known here."""
    stated = found.contents.get("config")
    if stated is None:
        return {}
    if not isinstance(stated, Mapping):
        raise CheckpointError(f"{found.name}: config is {brief(stated)}, no dictionary")

    fields = {}
    for key, value in stated.items():
        if key in _FIELDS and value is not None:
            fields[_FIELDS[key]] = list(value) if isinstance(value, tuple) else value
        elif key not in _FIELDS and key not in _TOLD_BY_TENSORS:
            allowed = ", ".join([*_FIELDS, *sorted(_TOLD_BY_TENSORS)])
            raise CheckpointError(
                f"{found.name}: config overrides {brief(key)}, which is not known here; allowed: "
                f"{allowed}"
            )
    return fields


def _fold_positions(name: str, state: dict[str, Any], patches: int) -> None:
    """Positions of registers and CLS added to these tokens, those of the patches left; in place.

    The table's rows are for registers, CLS and patches, in this order, or for patches alone.
    """
    table = state["pos_embedding"]
    tokens = [key for key in ("reg_tokens", "class_token") if isinstance(state.get(key), Tensor)]
    # what is misshapen will be named where all shapes are checked
    if table.ndim != 3 or any(state[key].ndim != 3 for key in tokens):
        return
    special = sum(state[key].shape[1] for key in tokens)
    rows = table.shape[1]
    if rows not in (patches, patches + special):
        made = f"{patches} patches"
        if special:
            made += f", beside {special} tokens that are none"
        raise CheckpointError(
            f"{name}: pos_embedding has {rows} rows, but its signature makes {made}; get it again"
        )
    if rows == patches or any(state[key].shape[2] != table.shape[2] for key in tokens):
        return

    start = 0
    for key in tokens:
        count = state[key].shape[1]
        state[key] = state[key] + table[:, start : start + count]
        start += count
    state["pos_embedding"] = table[:, start:]
