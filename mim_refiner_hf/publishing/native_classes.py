"""Classes that transformers has itself: what each can say of an encoder, and its configuration.

    kind = class_of(config)                  # "Dinov2Model", or the sentence that refuses
    kind.lacks(config)                       # ["pooling='mean' (only 'cls')"]
    kind.configuration(config)               # a Dinov2Config

An encoder that came from a class goes back to that one; any other goes to the first of the table
that computes the same. The masked autoencoder's class masks at random, so its encoder becomes a
`ViTModel`, which has the same weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..model.configuration_mim_refiner import MimRefinerConfig
from .twins import layer_scale_value, refused

# Fields of the configuration that say what is computed, with the values of a plain ViT. Of "bias"
# any will do: where a class has one and the encoder has not, it is zero.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "norm_placement": ("pre",),
    "norm_type": ("layernorm",),
    "position_encoding": ("absolute",),
    "rope_places": ("centre",),
    "rope_offset": (0.0,),
    "position_resampling": ("bicubic",),
    "bias": ("all", "no_key", "no_qkv", "none"),
    "patch_bias": (True, False),
    "patch_norm": (False,),
    "use_cls_token": (True,),
    "num_register_tokens": (0,),
    "embedding_norm": (False,),
    "final_norm": (True,),
    "final_norm_affine": (True,),
    "gated_mlp": (False,),
    "mlp_norm": (False,),
    "attention_norm": (False,),
    "query_key_norm": (False,),
    "pooling_head": ("none",),
    "pooling_heads": (None,),
    "pooling_intermediate_size": (None,),
    "pooled_norm": (False,),
    "pooling": ("cls",),
    "features": ("output",),
    "erased_directions": (0,),
}
Fields = dict[str, Any]


def _nothing(config: MimRefinerConfig) -> Fields:
    return {}


def _no_problem(config: MimRefinerConfig) -> list[str]:
    return []


@dataclass(frozen=True)
class NativeClass:
    """A class of transformers, as `AutoModel` loads it.

    Args:
        name: of the class.
        model_type: of its configuration.
        allows: fields of ours that it can say otherwise than a plain ViT, with the values; None
            for any.
        layer_scale: whether it always has one; None for either.
        fields: what its configuration says beside shapes.
        problems: what else it lacks, in words.
        is_square: whether it takes no other native size.
        asks_for_sizes: whether another size needs `interpolate_pos_encoding=True`.
        any_size: whether it takes other sizes at all.
    """

    name: str
    model_type: str
    allows: Mapping[str, tuple[Any, ...] | None] = field(default_factory=dict)
    layer_scale: bool | None = False
    fields: Callable[[MimRefinerConfig], Fields] = _nothing
    problems: Callable[[MimRefinerConfig], list[str]] = _no_problem
    is_square: bool = False
    asks_for_sizes: bool = False
    any_size: Callable[[MimRefinerConfig], bool] = lambda config: True

    def lacks(self, config: MimRefinerConfig) -> list[str]:
        """Every setting of an encoder that this class has no word for, with what it can say."""
        lacking = []
        for name, values in (_PLAIN | dict(self.allows)).items():
            value = getattr(config, name)
            if values is not None and value not in values:
                lacking.append(f"{name}={value!r} (only {' or '.join(map(repr, values))})")

        scale = config.layer_scale_init
        if self.layer_scale is not None and (scale is not None) != self.layer_scale:
            only = "a number" if self.layer_scale else "None"
            lacking.append(f"layer_scale_init={scale!r} (only {only})")
        rows, columns = config.grid
        if self.is_square and rows != columns:
            lacking.append(f"image_size={config.image_size!r} (only a square)")
        return lacking + self.problems(config)

    def configuration(self, config: MimRefinerConfig) -> PreTrainedConfig:
        """The configuration of this class with which it computes what the encoder computes."""
        kind = CONFIG_MAPPING[self.model_type]
        shape: Fields = {
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size": config.intermediate_size,
            "hidden_act": config.hidden_act,
            "layer_norm_eps": float(config.layer_norm_eps),
            "rms_norm_eps": float(config.layer_norm_eps),
            "initializer_range": config.initializer_range,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "num_channels": config.num_channels,
            "num_register_tokens": config.num_register_tokens,
            "qkv_bias": config.bias in ("all", "no_key"),
        }
        fields = {name: value for name, value in shape.items() if name in kind.__annotations__}
        fields |= {"dtype": "float32", "architectures": [self.name]}
        return kind(**fields | self.fields(config))


# --- what single classes say ----------------------------------------------------------------------


def _identity_pooler(config: MimRefinerConfig) -> Fields:
    """A dense layer without a curve, which the identity makes the CLS token (`export_back.py`)."""
    return {"pooler_act": "linear"}


def _of_beit(config: MimRefinerConfig) -> Fields:
    """Positions, layer scale, and the final norm, of which `use_mean_pooling` is the switch."""
    return {
        "use_absolute_position_embeddings": config.has_absolute_positions,
        "use_relative_position_bias": config.relative_positions == "relative",
        "use_shared_relative_position_bias": config.relative_positions == "shared_relative",
        "layer_scale_init_value": layer_scale_value(config.layer_scale_init),
        "use_mean_pooling": not config.final_norm,
        "drop_path_rate": 0.0,
    }


def _beit_norms(config: MimRefinerConfig) -> list[str]:
    """The norm of the tokens goes with CLS, and that of the pooled vector with the mean."""
    is_mean = config.pooling == "mean"
    if config.pooled_norm == is_mean and config.final_norm != is_mean:
        return []
    return [
        f"final_norm={config.final_norm}, pooled_norm={config.pooled_norm} with "
        f"pooling={config.pooling!r} (only the first with 'cls', the second with 'mean')"
    ]


def _mlp_ratio(config: MimRefinerConfig) -> int | None:
    """The whole number by which Dinov2Model makes `intermediate_size` of `hidden_size`, or None."""
    # a gated one is two thirds as wide, in multiples of 8
    about = 1.5 * config.intermediate_size if config.gated_mlp else config.intermediate_size
    for ratio in {int(about / config.hidden_size), round(about / config.hidden_size)}:
        width = config.hidden_size * ratio
        if config.gated_mlp:
            width = (int(width * 2 / 3) + 7) // 8 * 8
        if width == config.intermediate_size:
            return ratio
    return None


def _whole_ratio(config: MimRefinerConfig) -> list[str]:
    if _mlp_ratio(config) is not None:
        return []
    return [
        f"intermediate_size={config.intermediate_size} (only what a whole mlp_ratio makes of "
        f"hidden_size={config.hidden_size})"
    ]


def _of_dinov2(config: MimRefinerConfig) -> Fields:
    return {"mlp_ratio": _mlp_ratio(config), "use_swiglu_ffn": config.gated_mlp}


def _only_silu(config: MimRefinerConfig) -> list[str]:
    lacking = _whole_ratio(config)
    if config.gated_mlp and config.hidden_act != "silu":
        lacking.append(f"hidden_act={config.hidden_act!r} (only 'silu' with gated_mlp=True)")
    return lacking


def _of_dinov3(config: MimRefinerConfig) -> Fields:
    assert config.rope_theta is not None
    return {
        "rope_theta": float(config.rope_theta),
        "query_bias": config.bias in ("all", "no_key"),
        "key_bias": config.bias == "all",
        "value_bias": config.bias in ("all", "no_key"),
        "proj_bias": config.bias != "none",
        "mlp_bias": config.bias != "none",
        "use_gated_mlp": config.gated_mlp,
    }


def _computed_rope(config: MimRefinerConfig) -> list[str]:
    return [] if config.rope_theta is not None else ["rope_theta=None (only a number)"]


def _of_pixio(config: MimRefinerConfig) -> Fields:
    return {"mlp_ratio": _mlp_ratio(config), "n_cls_tokens": config.num_prefix_tokens}


def _head_pools(*heads: str) -> Callable[[MimRefinerConfig], list[str]]:
    """A reader of whether what pools is the head, or without one the mean."""

    def read(config: MimRefinerConfig) -> list[str]:
        only = "attention" if config.pooling_head in heads else "mean"
        if config.pooling == only:
            return []
        return [
            f"pooling={config.pooling!r} (only {only!r} with pooling_head={config.pooling_head!r})"
        ]

    return read


def _vision_head(config: MimRefinerConfig) -> Fields:
    return {"vision_use_head": config.pooling_head != "none"}


def _of_siglip2(config: MimRefinerConfig) -> Fields:
    rows, columns = config.grid
    return _vision_head(config) | {"num_patches": rows * columns}


def _of_aimv2(config: MimRefinerConfig) -> Fields:
    return {
        "qkv_bias": config.bias == "all",
        "mlp_bias": config.bias == "all",
        "use_head": config.pooling_head != "none",
        "is_native": config.position_encoding == "sincos",
    }


# --- the table ------------------------------------------------------------------------------------

_RELATIVE = (
    "absolute",
    "relative",
    "shared_relative",
    "absolute+relative",
    "absolute+shared_relative",
)
_POOLED_BY_HEAD: dict[str, tuple[Any, ...] | None] = {
    "use_cls_token": (False,),
    "pooling_head": ("none", "attention_mlp"),
    "pooling": None,
}
_DINOV2 = NativeClass(
    "Dinov2Model",
    "dinov2",
    allows={"gated_mlp": (True, False)},
    layer_scale=True,
    fields=_of_dinov2,
    problems=_only_silu,
    is_square=True,
)
_CLASSES = (
    NativeClass("ViTModel", "vit", fields=_identity_pooler, asks_for_sizes=True),
    NativeClass(
        "BeitModel",
        "beit",
        allows={
            "position_encoding": _RELATIVE,
            "final_norm": (True, False),
            "pooled_norm": (True, False),
            "pooling": ("cls", "mean"),
        },
        layer_scale=None,
        fields=_of_beit,
        problems=_beit_norms,
        is_square=True,
        asks_for_sizes=True,
    ),
    # it pools nothing, so it does not matter where
    NativeClass(
        "Data2VecVisionModel",
        "data2vec-vision",
        allows={
            "position_encoding": _RELATIVE,
            "final_norm": (True, False),
            "features": ("output", "last_block"),
        },
        layer_scale=None,
        fields=_of_beit,
        is_square=True,
        asks_for_sizes=True,
    ),
    _DINOV2,
    NativeClass(
        "Dinov2WithRegistersModel",
        "dinov2_with_registers",
        allows={
            **_DINOV2.allows,
            "num_register_tokens": None,
            "position_resampling": ("bicubic_antialias",),
        },
        layer_scale=True,
        fields=_of_dinov2,
        problems=_only_silu,
        is_square=True,
    ),
    NativeClass(
        "DINOv3ViTModel",
        "dinov3_vit",
        allows={
            "position_encoding": ("rope",),
            # nothing is resampled
            "position_resampling": None,
            "num_register_tokens": None,
            "gated_mlp": (True, False),
        },
        layer_scale=True,
        fields=_of_dinov3,
        problems=_computed_rope,
    ),
    NativeClass(
        "DeiTModel",
        "deit",
        allows={"num_register_tokens": (1,)},
        fields=_identity_pooler,
        asks_for_sizes=True,
    ),
    NativeClass("ViTMSNModel", "vit_msn", asks_for_sizes=True),
    NativeClass(
        "IJepaModel",
        "ijepa",
        allows={"use_cls_token": (False,), "pooling": ("mean",)},
        asks_for_sizes=True,
    ),
    NativeClass(
        "PixioModel",
        "pixio",
        allows={"num_register_tokens": None, "pooling": ("prefix",)},
        fields=_of_pixio,
        problems=_whole_ratio,
        is_square=True,
    ),
    NativeClass(
        "SiglipVisionModel",
        "siglip_vision_model",
        allows=_POOLED_BY_HEAD,
        fields=_vision_head,
        problems=_head_pools("attention_mlp"),
        is_square=True,
        asks_for_sizes=True,
    ),
    NativeClass(
        "Siglip2VisionModel",
        "siglip2_vision_model",
        allows={**_POOLED_BY_HEAD, "position_resampling": ("bilinear_antialias",)},
        fields=_of_siglip2,
        problems=_head_pools("attention_mlp"),
        is_square=True,
    ),
    NativeClass(
        "CLIPVisionModel",
        "clip_vision_model",
        allows={
            "patch_bias": (False,),
            "embedding_norm": (True,),
            "final_norm": (False,),
            "pooled_norm": (True,),
        },
        is_square=True,
        asks_for_sizes=True,
    ),
    NativeClass(
        "Aimv2VisionModel",
        "aimv2_vision_model",
        allows={
            "norm_type": ("rmsnorm",),
            "position_encoding": ("absolute", "sincos"),
            "bias": ("all", "none"),
            "patch_norm": (True,),
            "use_cls_token": (False,),
            "gated_mlp": (True,),
            "pooling_head": ("none", "attention"),
            "pooling": None,
        },
        fields=_of_aimv2,
        problems=_head_pools("attention"),
        is_square=True,
        any_size=lambda config: config.position_encoding == "sincos",
    ),
)
# classes whose encoders go to another one: the first masks patches at random, and the second pools
# in its own way where it has no final norm
_INSTEAD = {"vit_mae": ("vit",), "beit": ("beit", "data2vec-vision")}


def class_of(config: MimRefinerConfig) -> NativeClass | str:
    """The class of transformers that an encoder goes to, or one sentence of why there is none."""
    source = config.source_model_type or ""
    candidates = [kind for kind in _CLASSES if kind.model_type in _INSTEAD.get(source, (source,))]
    lacking = {kind.name: kind.lacks(config) for kind in candidates or _CLASSES}
    for kind in candidates or _CLASSES:
        if not lacking[kind.name]:
            return kind

    # the one that lacks least says most about what is in the way
    nearest = min(lacking, key=lambda name: len(lacking[name]))
    reason = refused(f"transformers' {nearest}", lacking[nearest])
    assert reason is not None
    return reason


def class_named(name: str) -> NativeClass:
    """The class of this name; KeyError for another one than those here."""
    return {kind.name: kind for kind in _CLASSES}[name]
