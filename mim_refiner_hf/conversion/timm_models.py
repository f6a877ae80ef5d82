"""timm's names and its `config.json` in our words: `load_encoder("vit_base_patch16_224.mae")`.

What `timm.create_model("vit_base_patch16_224.mae")` loads is the Hub repository
`timm/vit_base_patch16_224.mae`; a folder written by `timm.models.save_for_hf` has the same two
files. Its `config.json` names the architecture and leaves the rest to timm's code, so timm is
asked: the architecture is built without memory and its number of heads, epsilon, activation and
tokens are read off it.

timm is imported where it is needed: that takes seconds.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..runtime.files import CheckpointError
from .layout import Source

# Pillow's numbers
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
# transformers' words for timm's classes
_ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh", "GELU": "gelu"}


def hub_name(name: str) -> str:
    """The Hub repository that `timm.create_model(name)` loads.

    A name with an owner, or not of timm, is given back as it is.

    Raises:
        CheckpointError: for an architecture of timm with a tag that it does not know.
    """
    if "/" in name:
        return name
    import timm

    try:
        known = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_models(f"{name.split('.')[0]}.*", pretrained=True))
        raise CheckpointError(
            f"{name} is a timm architecture with unknown weights; timm {timm.__version__} has "
            f"{tags}"
        ) from error
    if known is None or not known.hf_hub_id:
        return name
    return str(known.hf_hub_id)


def in_our_words(found: Source) -> Source:
    """A source with its JSON files translated from timm's words to ours; others as they are.

    Raises:
        CheckpointError: for an architecture that this timm does not know or cannot build, or with
            an activation that we do not have.
    """
    architecture = found.config.get("architecture")
    if architecture is None:
        return found
    model = _build(found.name, str(architecture), found.config.get("model_args") or {})
    return model_in_our_words(found, model, found.config.get("pretrained_cfg"))


def model_in_our_words(
    found: Source, model: Any, pretrained: Mapping[str, Any] | None = None
) -> Source:
    """A source with what a model of timm says of its architecture and of its preprocessing.

    Args:
        pretrained: timm's `pretrained_cfg`; None for the model's own.
    """
    config = {"model_type": f"timm.{type(model).__name__}"}
    if config["model_type"] in ("timm.VisionTransformer", "timm.Beit"):
        config |= _config_fields(found.name, model)
    if pretrained is None:
        # a model may be built for another size than its weights were trained at
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        pretrained = dict(getattr(model, "pretrained_cfg", None) or {})
        if size is not None and tuple(pretrained.get("input_size", ()))[1:] != tuple(size):
            pretrained.update(input_size=(3, *size), crop_pct=1.0)
    return replace(found, config=config, preprocessing=_preprocessor_fields(pretrained or {}))


def _build(name: str, architecture: str, arguments: Mapping[str, Any]) -> Any:
    """timm's own model without memory or weights; its entry point reads no file and no network."""
    import timm

    if not timm.is_model(architecture):
        raise CheckpointError(
            f"{name} is timm's {architecture!r}, which timm {timm.__version__} does not know; "
            "update timm"
        )
    entrypoint = timm.model_entrypoint(architecture)
    try:
        with torch.device("meta"):
            return entrypoint(pretrained=False, **{**arguments, "num_classes": 0})
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{name} is timm's {architecture!r}, which cannot be built as it says: {reason}"
        ) from error


def _activation(name: str, mlp: nn.Module) -> str | None:
    """transformers' word for the activation of timm's MLP.

    None for another kind of MLP, whose tensors will have no place.
    """
    if type(mlp).__name__ != "Mlp":
        return None
    kind = type(mlp.act).__name__
    if kind not in _ACTIVATIONS:
        allowed = ", ".join(_ACTIVATIONS)
        raise CheckpointError(f"{name} has the activation {kind}; allowed: {allowed}")
    if getattr(mlp.act, "approximate", "none") == "tanh":
        return "gelu_pytorch_tanh"
    return _ACTIVATIONS[kind]


def _config_fields(name: str, model: Any) -> dict[str, Any]:
    """The fields of `MimRefinerConfig` that timm's `VisionTransformer` or `Beit` states."""
    block = model.blocks[0]
    positions = []
    if model.pos_embed is not None:
        positions.append("absolute")
    if getattr(block.attn, "relative_position_bias_table", None) is not None:
        positions.append("relative")
    if getattr(model, "rel_pos_bias", None) is not None:
        positions.append("shared_relative")

    has_cls = model.cls_token is not None
    height, width = model.patch_embed.img_size
    return {
        "num_attention_heads": block.attn.num_heads,
        "num_hidden_layers": len(model.blocks),
        "layer_norm_eps": block.norm1.eps,
        "hidden_act": _activation(name, block.mlp),
        "image_size": height if height == width else [height, width],
        "position_encoding": "+".join(positions),
        "use_cls_token": has_cls,
        "num_register_tokens": model.num_prefix_tokens - int(has_cls),
        "final_norm": not isinstance(model.norm, nn.Identity),
        "pooling": {"token": "cls", "avg": "mean"}.get(model.global_pool),
    }


def _preprocessor_fields(pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """timm's evaluation transform in the words of `preprocessor_config.json`.

    Images are resized to 1 / `crop_pct` of the size, then their centre is cropped.
    """
    fields: dict[str, Any] = {
        "image_mean": pretrained.get("mean"),
        "image_std": pretrained.get("std"),
        "resample": _RESAMPLE.get(pretrained.get("interpolation", "")),
    }
    if pretrained.get("input_size") and pretrained.get("crop_mode", "center") == "center":
        _, height, width = pretrained["input_size"]
        shortest = math.floor(min(height, width) / pretrained.get("crop_pct", 1.0))
        fields["crop_size"] = {"height": height, "width": width}
        fields["size"] = {"shortest_edge": shortest}

    # lists, as JSON has them
    stated = {}
    for name, value in fields.items():
        if value is not None:
            stated[name] = list(value) if isinstance(value, tuple) else value
    return stated


__all__ = ["hub_name", "in_our_words", "model_in_our_words"]
