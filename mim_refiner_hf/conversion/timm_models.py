"""timm's names and its `config.json` in our words, so that `load_encoder("vit_base_patch16_224.mae")` needs no more than its layout.

What `timm.create_model("vit_base_patch16_224.mae")` loads is the Hub repository `timm/vit_base_patch16_224.mae`; a folder written by
`timm.models.save_for_hf` has the same two files. Its `config.json` names the architecture and leaves the rest to timm's code, so
timm is asked: the architecture is built without memory and its number of heads, epsilon, activation and tokens are read off it.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..runtime.files import CheckpointError
from .layout import Source

RESAMPLE = {
    "nearest": 0,
    "lanczos": 1,
    "bilinear": 2,
    "bicubic": 3,
    "box": 4,
    "hamming": 5,
}  # Pillow's numbers


def hub_name(name: str) -> str:
    """The Hub repository that `timm.create_model(name)` loads; a name with an owner, or not of timm, as it is.

    Raises:
        CheckpointError: for an architecture of timm with a tag that it does not know.
    """
    if "/" in name:
        return name
    import timm  # here, because it takes seconds and only timm's models need it

    try:
        known = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_models(f"{name.split('.')[0]}.*", pretrained=True))
        raise CheckpointError(
            f"{name} is a timm architecture with unknown weights; timm {timm.__version__} has {tags}"
        ) from error
    return str(known.hf_hub_id) if known is not None and known.hf_hub_id else name


def in_our_words(found: Source) -> Source:
    """The same source with its `config.json` and preprocessing translated from timm's to ours; any other one as it is.

    Raises:
        CheckpointError: for an architecture that this timm does not know or cannot build, or with an activation we do not have.
    """
    architecture = found.config.get("architecture")
    if architecture is None:
        return found
    model = build(found.name, str(architecture), found.config.get("model_args") or {})
    config = {"model_type": f"timm.{type(model).__name__}"}
    if config["model_type"] in ("timm.VisionTransformer", "timm.Beit"):
        config |= facts(found.name, model)
    return replace(
        found, config=config, preprocessing=preprocessing(found.config.get("pretrained_cfg") or {})
    )


def build(name: str, architecture: str, arguments: Mapping[str, Any]) -> Any:
    """timm's own model, without memory or weights: its entry point reads no file and no network when not `pretrained`."""
    import timm

    if not timm.is_model(architecture):
        raise CheckpointError(
            f"{name} is timm's {architecture!r}, which timm {timm.__version__} does not know; update timm"
        )
    try:
        with torch.device("meta"):
            return timm.model_entrypoint(architecture)(
                pretrained=False, **{**arguments, "num_classes": 0}
            )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{name} is timm's {architecture!r}, which cannot be built as it says: {reason}"
        ) from error


def activation(name: str, mlp: nn.Module) -> str | None:
    """transformers' word for the activation of timm's MLP; None for another kind of MLP, whose tensors will have no place."""
    if type(mlp).__name__ != "Mlp":
        return None
    kind, words = (
        type(mlp.act).__name__,
        {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh", "GELU": "gelu"},
    )
    if kind not in words:
        raise CheckpointError(f"{name} has the activation {kind}; allowed: {', '.join(words)}")
    return "gelu_pytorch_tanh" if getattr(mlp.act, "approximate", "none") == "tanh" else words[kind]


def facts(name: str, model: Any) -> dict[str, Any]:
    """The fields of `MimRefinerConfig` that timm's `VisionTransformer` or `Beit` states."""
    block = model.blocks[0]
    absolute = "absolute" if model.pos_embed is not None else ""
    per_block = (
        "relative" if getattr(block.attn, "relative_position_bias_table", None) is not None else ""
    )
    shared = "shared_relative" if getattr(model, "rel_pos_bias", None) is not None else ""
    height, width = model.patch_embed.img_size
    return {
        "num_attention_heads": block.attn.num_heads,
        "num_hidden_layers": len(model.blocks),
        "layer_norm_eps": block.norm1.eps,
        "hidden_act": activation(name, block.mlp),
        "image_size": height if height == width else [height, width],
        "position_encoding": "+".join(kind for kind in (absolute, per_block, shared) if kind),
        "use_cls_token": model.cls_token is not None,
        "num_register_tokens": model.num_prefix_tokens - (model.cls_token is not None),
        "final_norm": not isinstance(model.norm, nn.Identity),
        "pooling": {"token": "cls", "avg": "mean"}.get(model.global_pool),
    }


def preprocessing(pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """timm's evaluation transform in the words of `preprocessor_config.json`: resize to 1 / `crop_pct`, then crop the centre."""
    words: dict[str, Any] = {
        "image_mean": pretrained.get("mean"),
        "image_std": pretrained.get("std"),
        "resample": RESAMPLE.get(pretrained.get("interpolation", "")),
    }
    if pretrained.get("input_size") and pretrained.get("crop_mode", "center") == "center":
        _, height, width = pretrained["input_size"]
        words["crop_size"] = {"height": height, "width": width}
        words["size"] = {
            "shortest_edge": math.floor(min(height, width) / pretrained.get("crop_pct", 1.0))
        }
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in words.items()
        if value is not None
    }
