"""timm's names and its `config.json` in our words: `load_encoder("vit_base_patch16_224.mae")`.

What `timm.create_model("vit_base_patch16_224.mae")` loads is the Hub repository
`timm/vit_base_patch16_224.mae`; a folder written by `timm.models.save_for_hf` has the same two
files. Its `config.json` names the architecture and leaves the rest to timm's code, so timm is
asked: the architecture is built without memory and its number of heads, epsilon, activation and
tokens are read off it.

timm is imported where it is needed: that takes seconds.
"""

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..model.configuration_mim_refiner import brief
from ..model.image_processing_mim_refiner import check_settings
from ..runtime.files import CheckpointError
from ..runtime.text import one_line
from .birder_models import is_birder
from .layout import EncoderFields, PreprocessorFields, Source
from .timm_eva import eva_fields, eva_finish

# of an argument of timm's models, in either direction; `depth` is compared with the weights
_LARGEST_ARGUMENT = 2**16
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_KINDS = ("timm.VisionTransformer", "timm.VisionTransformerDistilled", "timm.Beit", "timm.Eva")
_POOLINGS = {"token": "cls", "avg": "mean", "map": "attention"}
# Pillow's numbers
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
# where the norms of timm's blocks stand, in our words
_BLOCKS = {
    "Block": "pre",
    "EvaBlock": "pre",
    "ResPostBlock": "branch",
    "EvaBlockPostNorm": "branch",
}
_NORMS = {"LayerNorm": "layernorm", "LayerNormFp32": "layernorm", "RmsNorm": "rmsnorm"}
# transformers' words for timm's classes
_ACTIVATIONS = {
    "QuickGELU": "quick_gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "GELU": "gelu",
    "SiLU": "silu",
}


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
    if architecture is None or is_birder(found.contents):
        return found
    pretrained = found.config.get("pretrained_cfg")
    if pretrained is not None and not isinstance(pretrained, Mapping):
        raise CheckpointError(
            f"{found.name} has pretrained_cfg {brief(pretrained)}; it must be an object, {{..}}"
        )
    arguments = found.config.get("model_args") or {}
    _check_arguments(found, arguments)

    try:
        model = _build(found.name, str(architecture), arguments)
        return model_in_our_words(found, model, pretrained)
    except CheckpointError:
        raise
    # a stranger's arguments make timm raise nearly anything, or build what cannot be read
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{found.name} is timm's {brief(architecture)}, which cannot be built as it says: "
            f"{one_line(reason)[:200]}; correct its config.json"
        ) from error


def _check_arguments(found: Source, arguments: Any) -> None:
    """CheckpointError for arguments of a timm model that no plain ViT has, or that are too large.

    Only those are built: a stranger's numbers, given to any architecture, would have no end.
    """
    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    known: set[str] = set()
    for kind in (VisionTransformer, Beit, Eva):
        known |= inspect.signature(kind).parameters.keys()
    if not isinstance(arguments, Mapping):
        raise CheckpointError(
            f"{found.name} cannot be built as it says: model_args is {brief(arguments)}; it must "
            "be an object, {..}"
        )

    blocks = {match[1] for match in map(_BLOCK.match, map(str, found.contents)) if match}
    for key, value in arguments.items():
        most = len(blocks) if key == "depth" else _LARGEST_ARGUMENT
        numbers = value if isinstance(value, list) else [value]
        wrong = [n for n in numbers if isinstance(n, int | float) and not abs(n) <= most]
        if key not in known or len(numbers) > 2 or wrong:
            raise CheckpointError(
                f"{found.name} cannot be built as it says: model_args has {brief(key)} "
                f"{brief(value)}; allowed are the arguments of timm's VisionTransformer, Beit and "
                f"Eva, with numbers up to {most}"
            )


def model_in_our_words(
    found: Source, model: Any, pretrained: Mapping[str, Any] | None = None
) -> Source:
    """A source with what a model of timm says of its architecture and of its preprocessing.

    Args:
        pretrained: timm's `pretrained_cfg`; None for the model's own.
    """
    model_type = f"timm.{type(model).__name__}"
    fields: EncoderFields = {}
    finish = None
    if model_type in _KINDS:
        fields |= _config_fields(found.name, model)
    if model_type == "timm.Eva":
        fields |= eva_fields(found.name, model)
        finish = eva_finish(model)

    if pretrained is None:
        # a model may be built for another size than its weights were trained at
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        pretrained = dict(getattr(model, "pretrained_cfg", None) or {})
        if size is not None and tuple(pretrained.get("input_size", ()))[1:] != tuple(size):
            pretrained.update(input_size=(3, *size), crop_pct=1.0)
    preprocessing = _preprocessor_fields(pretrained or {})
    config = {"model_type": model_type, **fields}
    return replace(found, config=config, preprocessing=preprocessing, finish=finish)


def _build(name: str, architecture: str, arguments: Mapping[str, Any]) -> Any:
    """timm's own model without memory or weights; its entry point reads no file and no network."""
    import timm

    if not timm.is_model(architecture):
        raise CheckpointError(
            f"{name} is timm's {brief(architecture)}, which timm {timm.__version__} does not know; "
            "update timm"
        )
    with torch.device("meta"):
        return timm.model_entrypoint(architecture)(
            pretrained=False, **{**arguments, "num_classes": 0}
        )


def _activation(name: str, mlp: nn.Module) -> str | None:
    """transformers' word for the activation of timm's MLP.

    None for another kind of MLP, whose tensors will have no place.
    """
    if type(mlp).__name__ not in ("Mlp", "GluMlp", "SwiGLU"):
        return None
    if getattr(mlp, "gate_last", False):
        raise CheckpointError(f"{name} has an MLP whose gate comes last; ours comes first")
    kind = type(mlp.act).__name__
    if kind not in _ACTIVATIONS:
        allowed = ", ".join(_ACTIVATIONS)
        raise CheckpointError(f"{name} has the activation {kind}; allowed: {allowed}")
    if getattr(mlp.act, "approximate", "none") == "tanh":
        return "gelu_pytorch_tanh"
    return _ACTIVATIONS[kind]


def _pooling(name: str, model: Any) -> str | None:
    """Our word for timm's pooling; None where it has none."""
    pool = str(model.global_pool)
    if pool and pool not in _POOLINGS:
        raise CheckpointError(
            f"{name} has global_pool={brief(pool)}; allowed: {', '.join(_POOLINGS)}, or '' for none"
        )
    if type(model).__name__ == "VisionTransformerDistilled":
        return "prefix"

    # weights that pool read all tokens of its `Eva`
    includes = getattr(model, "pool_include_prefix", pool == "map")
    reads = {("avg", True): "with", ("map", False): "without"}.get((pool, bool(includes)))
    if reads and model.num_prefix_tokens:
        raise CheckpointError(
            f"{name} pools the patches {reads} CLS and registers (global_pool={pool!r}, "
            f"pool_include_prefix={includes}), which is not known here; load it with another "
            "global_pool, such as 'token', or of patches alone 'avg'"
        )
    return _POOLINGS.get(pool)


def _one_of(name: str, what: str, module: nn.Module, known: Mapping[str, str]) -> str:
    """Our word for the class of a part of timm's model; CheckpointError for one without."""
    kind = type(module).__name__
    if kind not in known:
        raise CheckpointError(f"{name} has timm's {kind} as {what}; allowed: {', '.join(known)}")
    return known[kind]


def _config_fields(name: str, model: Any) -> EncoderFields:
    """The fields of `MimRefinerConfig` that timm's `VisionTransformer` or `Beit` states."""
    block = model.blocks[0]
    placement = _one_of(name, "blocks", block, _BLOCKS)
    positions = []
    if model.pos_embed is not None:
        positions.append("absolute")
    if getattr(block.attn, "relative_position_bias_table", None) is not None:
        positions.append("relative")
    if getattr(model, "rel_pos_bias", None) is not None:
        positions.append("shared_relative")

    has_cls = model.cls_token is not None
    # as the authors of registers resize the table, and timm any
    has_registers = getattr(model, "reg_token", None) is not None
    resampling = "bicubic_antialias" if has_registers else None
    height, width = model.patch_embed.img_size
    size = height if height == width else [height, width]
    return {
        "num_attention_heads": block.attn.num_heads,
        "num_hidden_layers": len(model.blocks),
        "norm_placement": placement,
        "norm_type": _one_of(name, "norms", block.norm1, _NORMS),
        "layer_norm_eps": block.norm1.eps,
        "hidden_act": _activation(name, block.mlp),
        "image_size": size,
        "position_encoding": "+".join(positions),
        "position_resampling": resampling,
        "use_cls_token": has_cls,
        "num_register_tokens": model.num_prefix_tokens - int(has_cls),
        "final_norm": not isinstance(model.norm, nn.Identity),
        "pooling": _pooling(name, model),
        "patch_bias": model.patch_embed.proj.bias is not None,
    }


def _preprocessor_fields(pretrained: Mapping[str, Any]) -> PreprocessorFields:
    """timm's evaluation transform in the words of `preprocessor_config.json`.

    Images are resized to 1 / `crop_pct` of the size, then their centre is cropped.
    """
    fields: PreprocessorFields = {}
    # lists, as JSON has them
    mean = pretrained.get("mean")
    if mean is not None:
        fields["image_mean"] = list(mean) if isinstance(mean, tuple) else mean
    std = pretrained.get("std")
    if std is not None:
        fields["image_std"] = list(std) if isinstance(std, tuple) else std
    resample = _RESAMPLE.get(str(pretrained.get("interpolation")))
    if resample is not None:
        fields["resample"] = resample

    size = pretrained.get("input_size")
    if size and pretrained.get("crop_mode", "center") == "center":
        if not isinstance(size, list | tuple) or len(size) != 3:
            raise CheckpointError(
                f"pretrained_cfg of the model says input_size {brief(size)}; it must be "
                "(channels, height, width)"
            )
        _, height, width = size
        fields["crop_size"] = {"height": height, "width": width}
        share = 1.0 if pretrained.get("crop_pct") is None else pretrained["crop_pct"]
        check_settings({**fields, "crop_pct": share}, "pretrained_cfg of the model says")
        fields["size"] = {"shortest_edge": math.floor(min(height, width) / share)}
    return fields
