"""An encoder in the words of timm's `Eva`, the class of EVA-02, RoPE-ViT, DINOv3 and Sapiens2.

    is_eva(config)              # whether timm's `VisionTransformer` is too plain for it
    eva_state_dict(encoder)     # the weights under timm's names, heads in timm's order
    eva_model_args(config)      # what is said beside a plain ViT's arguments

`export_timm.py` writes them. What was read of a model of this class goes back to its blocks:
the attention without a bias of the keys where there is none, gate and first layer packed where no
norm stands inside the MLP, and neighbouring channels turned where the places are whole numbers.
"""

import math
from typing import Any

import timm
import torch
from torch import Tensor

from ..conversion.timm_eva import head_order, in_order
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from .twins import Names, complete_state, refused, rename, unsupported

# fields that this class has and a plain ViT has not
_BESIDE = (
    "embedding_norm",
    "rope",
    "norm_type",
    "branch",
    "gated_mlp",
    "mlp_norm",
    "attention_norm",
    "query_key_norm",
    "pooled_norm",
    "pooling",
)
_BETWEEN_EPSILONS = 5e-6
_ROPE_TYPES = {"centre": "dinov3", "index_axial": "cat", "index_mixed": "mixed"}

END_NAMES: Names = (
    (r"embeddings\.norm\.(weight|bias)", r"norm_pre.\1"),
    (r"norm\.(weight|bias)", r"norm.\1"),
    (r"pooled_norm\.(weight|bias)", r"fc_norm.\1"),
    (r"attention_pooling\.query", r"attn_pool.latent"),
    (r"attention_pooling\.(q|kv)_proj\.(weight|bias)", r"attn_pool.\1.\2"),
    (r"attention_pooling\.o_proj\.(weight|bias)", r"attn_pool.proj.\1"),
    (r"attention_pooling\.(norm|mlp\.fc[12])\.(weight|bias)", r"attn_pool.\1.\2"),
)
"""Of what stands before and behind the blocks, as all of timm's classes call it."""
_LAYER = r"layers\.(\d+)\."
_NAMES: Names = (
    (r"embeddings\.patch_embeddings\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"embeddings\.cls_token", r"cls_token"),
    (r"embeddings\.register_tokens", r"reg_token"),
    (r"embeddings\.position_embeddings", r"pos_embed"),
    (_LAYER + r"attention\.o_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (_LAYER + r"attention\.((?:[qk]_)?norm)\.(weight|bias)", r"blocks.\1.attn.\2.\3"),
    (_LAYER + r"attention\.(qkv\.\w+|[qv]_bias)", r"blocks.\1.attn.\2"),
    (_LAYER + r"(norm[12]|mlp\.(?:fc1|fc1_g|fc1_x|norm|fc2))\.(weight|bias)", r"blocks.\1.\2.\3"),
    (_LAYER + r"layer_scale([12])\.weight", r"blocks.\1.gamma_\2"),
    (r"rope\.freqs", r"rope.freqs"),
    *END_NAMES,
)


def is_eva(config: MimRefinerConfig) -> bool:
    """Whether the encoder has what timm's `Eva` has and its `VisionTransformer` has not.

    One that lacks nothing but biases of its keys goes there too, where that can say the rest.
    """
    # its `VisionTransformer` alone has a norm of the patches
    if config.relative_positions != "none" or config.patch_norm:
        return False
    asked = (
        config.has_rope
        or config.norm_placement == "branch"
        or config.gated_mlp
        or config.mlp_norm
        or config.attention_norm
        or (config.final_norm and config.pooled_norm)
        or config.pooling_heads is not None
        or config.pooling_intermediate_size is not None
    )
    return asked or (config.bias == "no_key" and eva_refusal(config) is None)


def eva_refusal(config: MimRefinerConfig) -> str | None:
    """Why timm has no such encoder, or None."""
    lacking = unsupported(config, beside=_BESIDE)
    if config.has_border_registers:
        lacking.append("rotary positions of stored frequencies as CAPI's (rope_theta=None)")
    elif config.has_rope and config.rope_places not in _ROPE_TYPES:
        lacking.append(f"rotary positions as birder's (rope_places={config.rope_places!r})")
    lacking += _norm_gaps(config) + shared_gaps(config)

    activation = "silu" if config.gated_mlp else "gelu"
    if config.hidden_act != activation:
        gated = f" with gated_mlp={config.gated_mlp}"
        lacking.append(f"activation but {activation}{gated} (hidden_act={config.hidden_act!r})")
    return refused("timm's Eva, its ViT with rotary positions,", lacking)


def _norm_gaps(config: MimRefinerConfig) -> list[str]:
    """Norms that this class has, but not with what else the encoder has, in words."""
    lacking = []
    scaled = config.layer_scale_init is not None
    if config.norm_placement == "branch" and scaled:
        lacking.append("layer scale where norms end the branches (norm_placement='branch')")
    if config.norm_placement == "branch" and config.query_key_norm:
        lacking.append("norms of queries and keys where norms end the branches")

    # of one architecture alone, Sapiens2, which has a layer scale
    if config.norm_type == "rmsnorm" and (config.norm_placement != "pre" or not scaled):
        lacking.append("RMSNorm but before branches with a layer scale (norm_type='rmsnorm')")
    return lacking + rms_epsilon_gap(config)


def rms_epsilon_gap(config: MimRefinerConfig) -> list[str]:
    """An epsilon that no argument of timm's models states, in words."""
    if config.norm_type == "rmsnorm" and config.layer_norm_eps > _BETWEEN_EPSILONS:
        return [f"RMSNorm with this epsilon (layer_norm_eps={config.layer_norm_eps})"]
    return []


def shared_gaps(config: MimRefinerConfig) -> list[str]:
    """What this class and timm's `VisionTransformer` both lack of what they have, in words."""
    lacking = []
    if config.embedding_norm and config.patch_bias:
        lacking.append("bias of the patches before a norm (patch_bias=True, embedding_norm=True)")

    pooling = config.pooling
    known = {"cls": ("none",), "mean": ("none",), "attention": ("attention", "attention_mlp")}
    if pooling not in known:
        lacking.append(f"pooling but of CLS, patches or attention (pooling={pooling!r})")
    elif config.pooling_head not in known[pooling]:
        heads = f"(pooling={pooling!r}, pooling_head={config.pooling_head!r})"
        lacking.append(f"attention pooling of this kind {heads}")
    elif config.pooling_head == "attention_mlp" and (config.gated_mlp or config.mlp_norm):
        lacking.append("attention pooling whose MLP is gated or has a norm")
    return lacking


def eva_architecture(config: MimRefinerConfig, size: str) -> str:
    """timm's name of such a model of this size, else of its base model.

    The name decides what no argument can: RMSNorm (Sapiens2), the epsilon of norms, 1e-5 in
    DINOv3's and Perception Encoder's models alone, and None, which timm takes for that model's own
    default of `ref_feat_shape` (rotary positions of type "cat" alone read it) or of `init_values`.
    """
    patch = config.patch_size
    scaled = config.layer_scale_init is not None
    if config.norm_type == "rmsnorm":
        return _known(f"vit_{size}_patch{patch}_sapiens2", "vit_base_patch16_sapiens2")
    default_grid_harms = config.rope_places == "index_axial" and config.rope_grid is None
    if config.layer_norm_eps > _BETWEEN_EPSILONS and scaled:
        return _known(f"vit_{size}_patch{patch}_dinov3", "vit_base_patch16_dinov3")
    if config.layer_norm_eps > _BETWEEN_EPSILONS and not default_grid_harms:
        return "vit_pe_spatial_base_patch16_512"
    if config.rope_grid is not None:
        return _known(f"eva02_{size}_patch{patch}_{config.image_hw[0]}", "eva02_base_patch14_224")
    if scaled:
        kind = "rope_mixed" if config.rope_places == "index_mixed" else "rope"
        return _known(f"vit_{size}_patch{patch}_{kind}_224", f"vit_base_patch16_{kind}_224")
    return "eva_giant_patch14_224"


def _known(name: str, other: str) -> str:
    return name if timm.is_model(name) else other


def takes_any_size(config: MimRefinerConfig) -> bool:
    """Whether timm resizes positions as the encoder does."""
    return not config.has_absolute_positions or config.position_resampling == "bicubic_antialias"


def ratio_of(inner: int, width: int) -> float:
    """`inner / width` as timm takes it: it multiplies and cuts off, which must not give less."""
    ratio = inner / width
    if int(width * ratio) < inner:
        return math.nextafter(ratio, math.inf)
    return ratio


def eva_model_args(config: MimRefinerConfig) -> dict[str, Any]:
    """The constructor's arguments beside those of a plain ViT."""
    optional: dict[str, Any] = {}
    if config.has_rope:
        optional |= {
            "rope_type": _ROPE_TYPES[config.rope_places],
            "rope_temperature": float(config.rope_theta or 10.0),
            "rope_rotate_half": config.rope_places == "centre",
            "rope_grid_indexing": "ij",
            "rope_grid_offset": float(config.rope_offset),
        }
    if config.rope_grid is not None:
        optional["ref_feat_shape"] = list(config.rope_grid)
    if config.pooling_heads is not None:
        optional["attn_pool_num_heads"] = config.pooling_heads
    if config.pooling_intermediate_size is not None:
        inner = config.pooling_intermediate_size
        optional["attn_pool_mlp_ratio"] = ratio_of(inner, config.hidden_size)
    if config.norm_placement == "branch":
        optional["use_post_norm"] = True
    if config.query_key_norm:
        optional["qk_norm"] = True
    if config.norm_type == "rmsnorm":
        # as none of these of that architecture
        optional |= {
            "num_kv_heads": config.num_attention_heads,
            "qk_norm": config.query_key_norm,
            "attn_only_layer_scale": False,
        }
    if config.layer_scale_init is not None:
        optional["init_values"] = float(config.layer_scale_init)
    return {
        "qkv_bias": config.bias in ("all", "no_key"),
        "qkv_fused": True,
        # of timm's two only one has a bias of the keys
        "attn_type": "rope" if config.bias == "all" else "eva",
        "swiglu_mlp": config.gated_mlp,
        "swiglu_align_to": 0,
        "scale_mlp": config.mlp_norm,
        "scale_attn_inner": config.attention_norm,
        "class_token": config.use_cls_token,
        "num_reg_tokens": config.num_register_tokens,
        "no_embed_class": True,
        "use_abs_pos_emb": config.has_absolute_positions,
        "use_rot_pos_emb": config.has_rope,
        **optional,
        "use_pre_transformer_norm": config.embedding_norm,
        "use_post_transformer_norm": config.final_norm,
        "use_fc_norm": config.pooled_norm,
        "dynamic_img_size": takes_any_size(config),
    }


def eva_state_dict(encoder: MimRefinerModel) -> dict[str, Tensor]:
    """The weights under timm's names."""
    config = encoder.config
    state = complete_state(encoder)
    fuse_ends(state, config)
    frequencies = []
    for block in range(config.num_hidden_layers):
        _fuse_attention(state, config, f"layers.{block}.attention.")
        if config.gated_mlp:
            _fuse_gate(state, config, f"layers.{block}.mlp.")
        if config.rope_places == "index_mixed":
            frequencies.append(state.pop(f"layers.{block}.attention.rope.frequencies"))
    if frequencies:
        state["rope.freqs"] = torch.stack(frequencies, dim=1)
    return rename(state, _NAMES)


def fuse_ends(state: dict[str, Tensor], config: MimRefinerConfig) -> None:
    """What stands before and behind the blocks as timm's classes have it; in place."""
    if config.embedding_norm:
        del state["embeddings.patch_embeddings.bias"]
    if config.pooling == "attention" and config.pooling_head == "attention":
        state |= _idle_pooling_parts(config)
    if config.pooling == "attention":
        for kind in ("weight", "bias"):
            pair = [state.pop(f"attention_pooling.{name}_proj.{kind}") for name in "kv"]
            state[f"attention_pooling.kv_proj.{kind}"] = torch.cat(pair)


def _idle_pooling_parts(config: MimRefinerConfig) -> dict[str, Tensor]:
    """Weights of what timm's attention pooling has beyond AIMv2's, with which it does nothing.

    The query is projected by the identity, and the MLP adds zero.
    """
    width = config.hidden_size
    inner = config.intermediate_size
    parts = {
        "q_proj.weight": torch.eye(width),
        "q_proj.bias": torch.zeros(width),
        "norm.weight": torch.ones(width),
        "mlp.fc1.weight": torch.zeros(inner, width),
        "mlp.fc1.bias": torch.zeros(inner),
        "mlp.fc2.weight": torch.zeros(width, inner),
        "mlp.fc2.bias": torch.zeros(width),
    }
    if config.norm_type == "layernorm":
        parts["norm.bias"] = torch.zeros(width)
    return {f"attention_pooling.{name}": tensor for name, tensor in parts.items()}


def _fuse_attention(state: dict[str, Tensor], config: MimRefinerConfig, attention: str) -> None:
    """Queries, keys and values of a block in one, heads in timm's order of channels; in place."""
    projections = {}
    for which in "qkv":
        for kind in ("weight", "bias"):
            projections[which, kind] = state.pop(f"{attention}{which}_proj.{kind}")

    if config.has_rope and config.rope_places != "centre":
        head_dim = config.hidden_size // config.num_attention_heads
        order = head_order(head_dim, neighbours=True, columns_first=False).argsort()
        for (which, kind), tensor in projections.items():
            if which != "v":
                projections[which, kind] = in_order(tensor, order)
        for name in state:
            if name.startswith((f"{attention}q_norm.", f"{attention}k_norm.")):
                state[name] = in_order(state[name], order)

    state[f"{attention}qkv.weight"] = torch.cat([projections[which, "weight"] for which in "qkv"])
    if config.bias == "all":
        state[f"{attention}qkv.bias"] = torch.cat([projections[which, "bias"] for which in "qkv"])
    elif config.bias == "no_key":
        state[f"{attention}q_bias"] = projections["q", "bias"]
        state[f"{attention}v_bias"] = projections["v", "bias"]


def _fuse_gate(state: dict[str, Tensor], config: MimRefinerConfig, mlp: str) -> None:
    """The gate and the first layer of a block's MLP as timm has them; in place."""
    for kind in ("weight", "bias"):
        gate = state.pop(f"{mlp}gate.{kind}")
        inner = state.pop(f"{mlp}fc1.{kind}")
        if config.mlp_norm:
            state[f"{mlp}fc1_g.{kind}"] = gate
            state[f"{mlp}fc1_x.{kind}"] = inner
        else:
            state[f"{mlp}fc1.{kind}"] = torch.cat([gate, inner])
