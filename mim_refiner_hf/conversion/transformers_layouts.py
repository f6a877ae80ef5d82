"""How transformers' vision classes name their tensors: rows for `layouts.py`.

Names are those on disk (`encoder.layer.0.attention.attention.query`) and in memory
(`layers.0.attention.q_proj`). Of a model of two towers, text and images, the towers' names come
behind a prefix; `transformers_models.py` has brought out the configuration of the images' tower.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .claims import (
    OF_AIMV2,
    OF_BEIT,
    OF_DINOV2,
    OF_DINOV3,
    OF_PIXIO,
    OF_PLAIN_BLOCKS,
    always,
    size_by_patches,
)
from .layout import (
    CLS_TOKEN,
    POSITIONS,
    REGISTERS,
    EncoderFields,
    Layout,
    PreprocessorFields,
    Rule,
    any_positions,
    as_kernel,
    as_token,
    cls_and_patches,
    cls_and_table_rows,
    first_and_registers,
    registers_if_any,
    split_gate,
    split_qkv,
    stated,
    table_rows,
)

THEIR_BIAS_TABLE = r"relative_position_bias_table"
POSITION_INDEX = (r".*relative_position_index", "position index")
HALF: PreprocessorFields = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
"""BEiT's and SigLIP's normalisation of pixels, to [-1, 1]."""
_OF_CLIP: PreprocessorFields = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}

_PRE_NORM: EncoderFields = {
    "embedding_norm": False,
    "position_encoding": "absolute",
    "norm_placement": "pre",
    "use_cls_token": True,
    "final_norm": True,
}

# --- ViT, ViTMAE, BEiT, Data2VecVision ------------------------------------------------------------

_HF_BLOCK = r"(?:model\.)?(?:encoder\.)?layers?\.(\d+)\."
_TRANSFORMERS_RULES = (
    Rule(r"embeddings\.cls_token", CLS_TOKEN),
    Rule(r"embeddings\.position_embeddings", POSITIONS, cls_and_patches),
    Rule(
        r"embeddings\.patch_embeddings\.projection\.(weight|bias)",
        r"embeddings.patch_embeddings.\1",
    ),
    Rule(
        _HF_BLOCK + r"attention\.attention\.([qkv])(?:uery|ey|alue)\.(weight|bias)",
        r"layers.\1.attention.\2_proj.\3",
    ),
    Rule(_HF_BLOCK + r"attention\.([qkvo]_proj)\.(weight|bias)", r"layers.\1.attention.\2.\3"),
    Rule(_HF_BLOCK + r"attention\.output\.dense\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    Rule(_HF_BLOCK + r"intermediate\.dense\.(weight|bias)", r"layers.\1.mlp.fc1.\2"),
    Rule(_HF_BLOCK + r"output\.dense\.(weight|bias)", r"layers.\1.mlp.fc2.\2"),
    Rule(_HF_BLOCK + r"mlp\.(fc[12])\.(weight|bias)", r"layers.\1.mlp.\2.\3"),
    Rule(_HF_BLOCK + r"layernorm_before\.(weight|bias)", r"layers.\1.norm1.\2"),
    Rule(_HF_BLOCK + r"layernorm_after\.(weight|bias)", r"layers.\1.norm2.\2"),
    Rule(r"layernorm\.(weight|bias)", r"norm.\1"),
)
VIT = Layout(
    family="vit",
    title="transformers' ViT",
    model_types=("vit",),
    prefix=r"vit\.",
    rules=_TRANSFORMERS_RULES,
    drops=((r"decoder\..*|embeddings\.mask_token", "decoder"), (r"pooler\..*", "pooler")),
    settings=_PRE_NORM,
    claims=OF_PLAIN_BLOCKS,
)
VIT_MAE = replace(VIT, family="vit_mae", title="transformers' ViTMAE", model_types=("vit_mae",))


# the final norm is there or not: the masked-image model has one outside the encoder, mean pooling
# drops it
BEIT = Layout(
    family="beit",
    title="transformers' BEiT",
    model_types=("beit",),
    prefix=r"beit\.",
    rules=(
        *_TRANSFORMERS_RULES,
        Rule(r"pooler\.layernorm\.(weight|bias)", r"pooled_norm.\1"),
        Rule(_HF_BLOCK + r"lambda_([12])", r"layers.\1.layer_scale\2.weight"),
        Rule(
            _HF_BLOCK + rf"(?:attention\.attention\.)?relative_position_bias\.{THEIR_BIAS_TABLE}",
            r"layers.\1.attention.relative_position_bias.table",
        ),
        Rule(
            rf"(?:encoder\.relative_position_bias|shared_position_bias)\.{THEIR_BIAS_TABLE}",
            r"relative_position_bias.table",
        ),
    ),
    drops=(
        (r"lm_head\..*|embeddings\.mask_token", "decoder"),
        POSITION_INDEX,
    ),
    settings={"norm_placement": "pre", "use_cls_token": True, "embedding_norm": False},
    # 0 is BEiT's word for none
    facts={"layer_scale_init": lambda config: config.get("layer_scale_init_value") or None},
    claims=OF_BEIT,
    preprocessing=lambda contents: HALF,
)
DATA2VEC_VISION = replace(
    BEIT,
    family="data2vec_vision",
    title="transformers' Data2VecVision (data2vec 1)",
    model_types=("data2vec-vision",),
    prefix=r"data2vec_vision\.",
)


# --- DINOv2, DINOv3, DeiT, MSN, I-JEPA, Pixio: names of ViT, and what is new ----------------------

_NEWER_RULES = (
    *_TRANSFORMERS_RULES,
    Rule(r"embeddings\.register_tokens", REGISTERS, registers_if_any),
    Rule(r"embeddings\.patch_embeddings\.(weight|bias)", r"embeddings.patch_embeddings.\1"),
    Rule(
        _HF_BLOCK + r"(?:layer_|rms_)?norm([12])\.(weight|bias)",
        r"layers.\1.norm\2.\3",
    ),
    Rule(_HF_BLOCK + r"layer_scale([12])\.lambda1", r"layers.\1.layer_scale\2.weight"),
    Rule(_HF_BLOCK + r"mlp\.weights_in\.(weight|bias)", r"layers.\1.mlp.*.\2", split_gate),
    Rule(_HF_BLOCK + r"mlp\.weights_out\.(weight|bias)", r"layers.\1.mlp.fc2.\2"),
    Rule(_HF_BLOCK + r"(?:mlp|ffn)\.gate_proj\.(weight|bias)", r"layers.\1.mlp.gate.\2"),
    Rule(_HF_BLOCK + r"(?:mlp|ffn)\.up_proj\.(weight|bias)", r"layers.\1.mlp.fc1.\2"),
    Rule(_HF_BLOCK + r"(?:mlp|ffn)\.down_proj\.(weight|bias)", r"layers.\1.mlp.fc2.\2"),
    Rule(_HF_BLOCK + r"self_attn\.([qkv]_proj)\.(weight|bias)", r"layers.\1.attention.\2.\3"),
    Rule(
        _HF_BLOCK + r"(?:self_attn|attention)\.out_proj\.(weight|bias)",
        r"layers.\1.attention.o_proj.\2",
    ),
    Rule(r"norm\.(weight|bias)", r"norm.\1"),
)
_MASK_TOKEN = (r"embeddings\.mask_token", "mask token")
_POOLER = (r"pooler\..*", "pooler")


def _swiglu(config: Mapping[str, Any]) -> Any:
    """The activation: DINOv2's gated MLP has SiLU, whatever its `hidden_act` says."""
    return "silu" if config.get("use_swiglu_ffn") else config.get("hidden_act")


# DINOv2, and what the classes after it are told from
_NEWER = Layout(
    family="dinov2",
    title="transformers' DINOv2",
    model_types=("dinov2",),
    prefix=r"dinov2\.",
    rules=_NEWER_RULES,
    drops=(_MASK_TOKEN,),
    settings=_PRE_NORM,
    facts={"hidden_act": _swiglu},
    claims=OF_DINOV2,
)
# the names tell it without a config.json, whose other values are the class's own and ours
DINOV2 = replace(
    _NEWER,
    signature=(
        r"^(?:\w+\.)?embeddings\.position_embeddings$",
        r"^(?:\w+\.)?encoder\.layer\.\d+\.layer_scale1\.lambda1$",
    ),
)
DINOV2_WITH_REGISTERS = replace(
    DINOV2,
    family="dinov2_with_registers",
    title="transformers' DINOv2 with registers",
    model_types=("dinov2_with_registers",),
    signature=(*DINOV2.signature, r"^(?:\w+\.)?embeddings\.register_tokens$"),
    prefix=r"dinov2_with_registers\.",
    settings={**_PRE_NORM, "position_resampling": "bicubic_antialias"},
    claims={**OF_DINOV2, "num_register_tokens": stated("num_register_tokens")},
)
DINOV3 = replace(
    _NEWER,
    family="dinov3",
    title="transformers' DINOv3",
    model_types=("dinov3_vit",),
    prefix=r"dinov3_vit\.",
    settings={**_PRE_NORM, "position_encoding": "rope"},
    facts={"rope_theta": stated("rope_theta")},
    claims=OF_DINOV3,
)
# the distillation token is a register of ours; the pooler is of a classification that is not there
DEIT = replace(
    _NEWER,
    family="deit",
    title="transformers' DeiT",
    model_types=("deit",),
    prefix=r"deit\.",
    rules=(
        Rule(r"embeddings\.distillation_token", REGISTERS),
        Rule(r"embeddings\.position_embeddings", POSITIONS, any_positions),
        *_NEWER_RULES,
    ),
    drops=(_MASK_TOKEN, _POOLER),
    facts={},
    claims={**OF_PLAIN_BLOCKS, "num_register_tokens": always(1)},
)
VIT_MSN = replace(
    _NEWER,
    family="vit_msn",
    title="transformers' ViTMSN",
    model_types=("vit_msn",),
    prefix=r"vit\.",
    facts={},
    claims=OF_PLAIN_BLOCKS,
)
TRANSFORMERS_IJEPA = replace(
    _NEWER,
    family="ijepa_transformers",
    title="transformers' I-JEPA",
    model_types=("ijepa",),
    prefix=r"ijepa\.",
    rules=(Rule(r"embeddings\.position_embeddings", POSITIONS), *_NEWER_RULES),
    drops=(_MASK_TOKEN, _POOLER),
    settings={**_PRE_NORM, "use_cls_token": False},
    facts={},
    claims=OF_PLAIN_BLOCKS,
)
PIXIO = replace(
    _NEWER,
    family="pixio",
    title="transformers' Pixio",
    model_types=("pixio",),
    prefix=r"pixio\.",
    rules=(
        Rule(r"embeddings\.cls_token", CLS_TOKEN, first_and_registers),
        Rule(r"embeddings\.position_embeddings", POSITIONS, any_positions),
        *_NEWER_RULES,
    ),
    settings={**_PRE_NORM, "pooling": "prefix"},
    facts={},
    claims=OF_PIXIO,
)


# --- towers of models of text and images ----------------------------------------------------------


_OTHER_TOWER = (
    (r"text_model\..*|text_projection\..*", "text tower"),
    (r"visual_projection\..*", "projection to the text's space"),
    (r"logit_(?:scale|bias)", "scale of the similarities"),
    (r"embeddings\.position_ids", "position index"),
)
SIGLIP = Layout(
    family="siglip",
    title="the vision tower of transformers' SigLIP",
    model_types=("siglip", "siglip_vision_model"),
    prefix=r"vision_model\.",
    rules=(
        Rule(r"embeddings\.patch_embedding\.(weight|bias)", r"embeddings.patch_embeddings.\1"),
        Rule(r"embeddings\.position_embedding\.weight", POSITIONS, table_rows),
        *_NEWER_RULES,
        Rule(r"post_layernorm\.(weight|bias)", r"norm.\1"),
        Rule(r"head\.probe", "attention_pooling.query"),
        Rule(
            r"head\.attention\.in_proj_(weight|bias)",
            r"attention_pooling.*_proj.\1",
            split_qkv,
        ),
        Rule(r"head\.attention\.out_proj\.(weight|bias)", r"attention_pooling.o_proj.\1"),
        Rule(r"head\.layernorm\.(weight|bias)", r"attention_pooling.norm.\1"),
        Rule(r"head\.(mlp\.fc[12]\.(?:weight|bias))", r"attention_pooling.\1"),
    ),
    drops=_OTHER_TOWER,
    settings={**_PRE_NORM, "use_cls_token": False},
    claims={**OF_PLAIN_BLOCKS, "pooling_head": stated("vision_use_head")},
    preprocessing=lambda contents: HALF,
)
# reads patches that were cut out beforehand, by a linear layer; images of any shape
SIGLIP2 = replace(
    SIGLIP,
    family="siglip2",
    title="the vision tower of transformers' SigLIP 2 (NaFlex)",
    model_types=("siglip2", "siglip2_vision_model"),
    rules=(
        Rule(
            r"embeddings\.patch_embedding\.weight",
            r"embeddings.patch_embeddings.weight",
            as_kernel,
        ),
        *SIGLIP.rules,
    ),
    settings={**SIGLIP.settings, "position_resampling": "bilinear_antialias"},
    claims={**SIGLIP.claims, "image_size": size_by_patches},
)
# its last norm is for the pooled vector alone
CLIP = Layout(
    family="clip",
    title="the vision tower of transformers' CLIP",
    model_types=("clip", "clip_vision_model"),
    prefix=r"vision_model\.",
    rules=(
        Rule(r"embeddings\.class_embedding", CLS_TOKEN, as_token),
        Rule(r"embeddings\.patch_embedding\.weight", r"embeddings.patch_embeddings.weight"),
        Rule(r"embeddings\.position_embedding\.weight", POSITIONS, cls_and_table_rows),
        *_NEWER_RULES,
        Rule(r"pre_layrnorm\.(weight|bias)", r"embeddings.norm.\1"),
        Rule(r"post_layernorm\.(weight|bias)", r"pooled_norm.\1"),
    ),
    drops=_OTHER_TOWER,
    settings={
        **_PRE_NORM,
        "embedding_norm": True,
        "patch_bias": False,
        "final_norm": False,
        "pooled_norm": True,
        "pooling": "cls",
    },
    claims=OF_PLAIN_BLOCKS,
    preprocessing=lambda contents: _OF_CLIP,
)
AIMV2 = Layout(
    family="aimv2",
    title="the vision tower of transformers' AIMv2",
    model_types=("aimv2", "aimv2_vision_model"),
    prefix=r"vision_model\.",
    rules=(
        Rule(r"embeddings\.patch_embed\.(weight|bias)", r"embeddings.patch_embeddings.\1"),
        Rule(r"embeddings\.position_embedding\.weight", POSITIONS, table_rows),
        Rule(r"embeddings\.rms_norm\.weight", "embeddings.patch_norm.weight"),
        *_NEWER_RULES,
        Rule(r"rms_norm\.weight", "norm.weight"),
        Rule(r"head\.cls_token", "attention_pooling.query"),
        Rule(r"head\.([kv]_proj)\.(weight|bias)", r"attention_pooling.\1.\2"),
        Rule(r"head\.output_proj\.(weight|bias)", r"attention_pooling.o_proj.\1"),
    ),
    drops=_OTHER_TOWER,
    settings={
        **_PRE_NORM,
        "use_cls_token": False,
        "norm_type": "rmsnorm",
        "patch_norm": True,
    },
    facts={
        "layer_norm_eps": stated("rms_norm_eps"),
        "position_encoding": lambda config: "sincos" if config.get("is_native") else "absolute",
    },
    claims=OF_AIMV2,
    preprocessing=lambda contents: _OF_CLIP,
)

TRANSFORMERS_LAYOUTS = (
    VIT_MAE,
    VIT,
    BEIT,
    DATA2VEC_VISION,
    DINOV2_WITH_REGISTERS,
    DINOV2,
    DINOV3,
    DEIT,
    VIT_MSN,
    TRANSFORMERS_IJEPA,
    PIXIO,
    SIGLIP,
    SIGLIP2,
    CLIP,
    AIMV2,
)
