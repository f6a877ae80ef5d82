"""An encoder as a timm model: `model.safetensors` under timm's names and timm's `config.json`.

    # or "hf-hub:user/name" once it is pushed
    timm.create_model("local-dir:out/timm", pretrained=True)
    # `architecture` and `model_args` stand in config.json
    weights = "out/timm/model.safetensors"
    timm.create_model(architecture, checkpoint_path=weights, **model_args)

`model(pixels)` gives our `pooler_output`, `model.forward_features(pixels)` our `last_hidden_state`.
timm's ViTs have norms with an epsilon of 1e-6; a source that states another one (1e-12 in
transformers' own configurations) differs by that alone.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.image_utils import PILImageResampling

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.image_processing_mim_refiner import MimRefinerImageProcessor
from ..model.modeling_mim_refiner import MimRefinerModel
from .export_timm_eva import (
    END_NAMES,
    eva_architecture,
    eva_model_args,
    eva_refusal,
    eva_state_dict,
    fuse_ends,
    is_eva,
    ratio_of,
    rms_epsilon_gap,
    shared_gaps,
    takes_any_size,
)
from .twins import (
    Names,
    Twin,
    add_cls_position,
    complete_state,
    layer_scale_value,
    refused,
    rename,
    unsupported,
)

# (width, depth) -> timm's word; all else is called a base model, with its shape in `model_args`
_SIZES = {
    (192, 12): "tiny",
    (384, 12): "small",
    (768, 12): "base",
    (1024, 24): "large",
    (1280, 32): "huge",
}

# what timm's `VisionTransformer` and `Beit` have beyond transformers' plain ViTs
_BESIDE = (
    "embedding_norm",
    "pooled_norm",
    "pooling",
    "norm_type",
    "query_key_norm",
    "patch_norm",
    # at the native size, which is the only one of timm's tables
    "sincos",
)
_BESIDE_OF_BEIT = ("pooled_norm",)
# ours, and timm's word for it
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "gelu_new": "gelu_tanh",
}
_POOLINGS = {"cls": "token", "mean": "avg", "attention": "map", "prefix": "token"}
_BETWEEN_EPSILONS = 5e-6

_COMMON_NAMES: Names = (
    (r"embeddings\.patch_embeddings\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"embeddings\.cls_token", r"cls_token"),
    (r"embeddings\.position_embeddings", r"pos_embed"),
    (r"layers\.(\d+)\.attention\.o_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (r"layers\.(\d+)\.attention\.(qkv\.\w+|[qv]_bias)", r"blocks.\1.attn.\2"),
    (r"layers\.(\d+)\.attention\.([qk]_norm\.\w+)", r"blocks.\1.attn.\2"),
    (r"layers\.(\d+)\.(norm[12]|mlp\.fc[12])\.(weight|bias)", r"blocks.\1.\2.\3"),
    *END_NAMES,
)
_VIT_NAMES: Names = (
    *_COMMON_NAMES,
    (r"embeddings\.patch_norm\.(weight|bias)", r"patch_embed.norm.\1"),
    (r"layers\.(\d+)\.mlp\.gate\.(weight|bias)", r"blocks.\1.mlp.fc1_g.\2"),
    (r"layers\.(\d+)\.mlp\.fc1_x\.(weight|bias)", r"blocks.\1.mlp.fc1_x.\2"),
    (r"embeddings\.register_tokens", r"reg_token"),
    (r"embeddings\.distillation_token", r"dist_token"),
    (r"layers\.(\d+)\.layer_scale([12])\.weight", r"blocks.\1.ls\2.gamma"),
)
_BEIT_NAMES: Names = (
    *_COMMON_NAMES,
    (r"layers\.(\d+)\.layer_scale([12])\.weight", r"blocks.\1.gamma_\2"),
    (
        r"layers\.(\d+)\.attention\.relative_position_bias\.table",
        r"blocks.\1.attn.relative_position_bias_table",
    ),
    (r"relative_position_bias\.table", r"rel_pos_bias.relative_position_bias_table"),
)


def _is_beit(config: MimRefinerConfig) -> bool:
    """Whether timm's `Beit` is meant (relative positions) and not its `VisionTransformer`."""
    return config.relative_positions != "none"


def _is_aim(config: MimRefinerConfig) -> bool:
    """Whether AIMv2's blocks are meant: RMSNorm with 1e-5, and a gate beside the first layer."""
    return (
        config.patch_norm
        and config.norm_type == "rmsnorm"
        and config.layer_norm_eps > _BETWEEN_EPSILONS
        and config.gated_mlp
        and config.hidden_act == "silu"
    )


def _is_distilled(config: MimRefinerConfig) -> bool:
    """Whether timm's `VisionTransformerDistilled` is meant, pooled by the mean of two tokens."""
    return (
        config.pooling == "prefix"
        and config.use_cls_token
        and config.num_register_tokens == 1
        and not config.pooled_norm
    )


def _rows_before_patches(config: MimRefinerConfig) -> int:
    """Rows of timm's positions for other tokens; models with registers leave them out."""
    if _is_distilled(config):
        return 2
    return int(config.use_cls_token and config.num_register_tokens == 0)


def refusal(config: MimRefinerConfig) -> str | None:
    """Why timm has no such encoder, or None."""
    if is_eva(config):
        return eva_refusal(config)
    if not _is_beit(config):
        return refused("timm's VisionTransformer", _lacking_of_vit(config))

    lacking = unsupported(config, beside=_BESIDE_OF_BEIT)
    if config.hidden_act != "gelu":
        lacking.append(f"activation but GELU (hidden_act={config.hidden_act!r})")
    if config.final_norm and config.pooled_norm:
        lacking.append("second norm (final_norm=True, pooled_norm=True)")
    if not config.final_norm and not config.pooled_norm:
        lacking.append("way to leave out the final norm (final_norm=False)")
    if not config.use_cls_token:
        lacking.append("way to leave out the CLS token (use_cls_token=False)")
    if config.num_register_tokens:
        lacking.append(f"registers (num_register_tokens={config.num_register_tokens})")
    return refused("timm's Beit, its ViT with relative positions,", lacking)


def _lacking_of_vit(config: MimRefinerConfig) -> list[str]:
    """What timm's `VisionTransformer` has not, in words."""
    beside: tuple[str, ...] = _BESIDE
    if _is_aim(config):
        beside = (*beside, "gated_mlp")
    lacking = unsupported(config, beside)
    if not _is_aim(config):
        lacking += rms_epsilon_gap(config)
    if config.hidden_act not in _ACTIVATIONS:
        allowed = ", ".join(_ACTIVATIONS)
        lacking.append(f"activation but {allowed} (hidden_act={config.hidden_act!r})")
    if _is_distilled(config):
        return lacking
    return lacking + shared_gaps(config)


def timm_state_dict(encoder: MimRefinerModel) -> dict[str, Tensor]:
    """The weights under timm's names: q, k and v fused, positions with a row for CLS."""
    config = encoder.config
    if is_eva(config):
        return eva_state_dict(encoder)
    is_beit = _is_beit(config)
    state = complete_state(encoder)
    for block in range(config.num_hidden_layers):
        attention = f"layers.{block}.attention."
        weights = [state.pop(f"{attention}{name}_proj.weight") for name in "qkv"]
        biases = [state.pop(f"{attention}{name}_proj.bias") for name in "qkv"]
        state[f"{attention}qkv.weight"] = torch.cat(weights)
        # BEiT has no key bias; it adds q.b to all scores of a query, which softmax does not see
        if is_beit:
            state[f"{attention}q_bias"] = biases[0]
            state[f"{attention}v_bias"] = biases[2]
        elif config.bias in ("all", "no_key"):
            state[f"{attention}qkv.bias"] = torch.cat(biases)

    if not is_beit:
        state = _as_arguments_say(state, encoder)
    fuse_ends(state, config)
    if config.position_encoding == "sincos":
        table = encoder.embeddings.positions(config.grid)
        assert table is not None
        state["embeddings.position_embeddings"] = table.float()
    for _ in range(_rows_before_patches(config)):
        add_cls_position(state)
    return rename(state, _BEIT_NAMES if is_beit else _VIT_NAMES)


def _as_arguments_say(state: Mapping[str, Tensor], encoder: MimRefinerModel) -> dict[str, Tensor]:
    """What the arguments of timm's `VisionTransformer` leave out or call otherwise, so."""
    config = encoder.config
    added = state.keys() - encoder.state_dict().keys()
    unbiased = re.compile(r"layers\.\d+\.(?:attention\.o_proj|mlp\.\w+)\.bias")
    renamed = {}
    for name, tensor in state.items():
        if config.bias == "none" and name in added and unbiased.fullmatch(name):
            continue
        if _is_aim(config):
            name = re.sub(r"(layers\.\d+\.mlp\.fc1)\b", r"\1_x", name)
        if _is_distilled(config):
            name = name.replace("register_tokens", "distillation_token")
        renamed[name] = tensor
    return renamed


def timm_architecture(config: MimRefinerConfig) -> str:
    """timm's name of the model of this size, patch and resolution, else of its base model.

    No argument states the epsilon of norms: of its plain ViTs those of CLIP have 1e-5.
    """
    size = _SIZES.get((config.hidden_size, config.num_hidden_layers), "base")
    if is_eva(config):
        return eva_architecture(config, size)
    kind, end, usual = "vit", "", "base_patch16"
    if _is_beit(config):
        kind = "beit"
    elif _is_aim(config):
        kind, usual = "aimv2", "large_patch14"
    elif _is_distilled(config):
        kind, size, usual = "deit", f"{size}_distilled", "base_distilled_patch16"
    elif config.layer_norm_eps > _BETWEEN_EPSILONS:
        end = "_clip"
    name = f"{kind}_{size}_patch{config.patch_size}{end}_{config.image_hw[0]}"
    if timm.is_model(name):
        return name
    return f"{kind}_{usual}{end}_224"


def timm_model_args(config: MimRefinerConfig) -> dict[str, Any]:
    """The constructor's arguments, all of them: the architecture's name alone decides nothing."""
    shared: dict[str, Any] = {
        "img_size": list(config.image_hw),
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "num_classes": 0,
        "global_pool": _POOLINGS[str(config.pooling)],
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": ratio_of(config.intermediate_size, config.hidden_size),
    }
    if is_eva(config):
        return shared | eva_model_args(config)

    shared["qkv_bias"] = True
    shared["init_values"] = layer_scale_value(config.layer_scale_init)
    if _is_beit(config):
        return shared | {
            "use_abs_pos_emb": config.has_absolute_positions,
            "use_rel_pos_bias": config.relative_positions == "relative",
            "use_shared_rel_pos_bias": config.relative_positions == "shared_relative",
            "use_fc_norm": config.pooled_norm,
        }

    optional: dict[str, Any] = {}
    # AIMv2's name says it, and of others no default but this
    if config.norm_type == "rmsnorm" and not _is_aim(config):
        optional["norm_layer"] = "rmsnorm"
    if config.patch_norm and not _is_aim(config):
        optional["embed_norm_layer"] = config.norm_type
    if config.query_key_norm:
        optional["qk_norm"] = True
    if config.pooling == "attention":
        optional["pool_include_prefix"] = True

    registers = 0 if _is_distilled(config) else config.num_register_tokens
    plain = {
        "qkv_bias": config.bias in ("all", "no_key"),
        "proj_bias": config.bias != "none",
        "class_token": config.use_cls_token,
        "reg_tokens": registers,
        "no_embed_class": registers > 0,
        "pre_norm": config.embedding_norm,
        # timm's final norm comes before the pooling or, as `fc_norm`, after it
        "final_norm": config.final_norm or config.pooled_norm,
        "fc_norm": config.pooled_norm,
        "act_layer": _ACTIVATIONS[config.hidden_act],
    }
    return shared | optional | plain


def _pretrained_cfg(
    config: MimRefinerConfig, processor: MimRefinerImageProcessor
) -> dict[str, Any]:
    """What `timm.data.resolve_model_data_config` reads: our preprocessing in timm's words."""
    # timm divides and cuts off: the quotient must not be less than the size
    crop = max(config.image_hw)
    size = int(processor.size["shortest_edge"])
    crop_pct = crop / size
    if math.floor(crop / crop_pct) < size:
        crop_pct = math.nextafter(crop_pct, 0)

    return {
        "input_size": [config.num_channels, *config.image_hw],
        "fixed_input_size": not (is_eva(config) and takes_any_size(config)),
        "interpolation": PILImageResampling(processor.resample).name.lower(),
        "crop_pct": crop_pct,
        "crop_mode": "center",
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def write(folder: Path, encoder: MimRefinerModel, processor: MimRefinerImageProcessor) -> None:
    """Write `model.safetensors` (fp32) and `config.json` as timm pushes them to the Hub."""
    config = encoder.config
    weights = timm_state_dict(encoder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    content = {
        "architecture": timm_architecture(config),
        "num_classes": 0,
        "num_features": config.hidden_size,
        "model_args": timm_model_args(config),
        "pretrained_cfg": _pretrained_cfg(config, processor),
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> dict[str, Twin]:
    """Both ways in which timm's users load the folder; timm raises unless every tensor fits."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    by_file = timm.create_model(
        config["architecture"],
        checkpoint_path=str(folder / "model.safetensors"),
        **config["model_args"],
    )
    by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True)

    def twin(model: Any) -> Twin:
        model.eval()
        return lambda pixels: {"tokens": model.forward_features(pixels), "features": model(pixels)}

    return {"checkpoint_path": twin(by_file), "local-dir": twin(by_folder)}
