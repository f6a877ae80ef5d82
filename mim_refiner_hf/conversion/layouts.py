"""How every known family names its tensors: one `Layout` table per family, read by `load.py`, no code per family.

To support another family, add a row and its golden test. Whatever shapes can tell (width, depth, patch size, biases, layer
scale, kinds of positions) is read off the placed tensors and is not in the tables. `settings` holds what shapes cannot tell,
`facts` where a file states it (number of heads).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .layout import (
    CLS_TOKEN,
    POSITIONS,
    Layout,
    Placed,
    Rule,
    cls_and_patches,
    patches_only,
    split_qkv,
    stated,
)

# --- timm's names: MAE and all that grew out of it, and the released MIM-Refiner encoders ------------------------------------

TIMM_BLOCKS = (
    Rule(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", r"layers.\1.attention.*_proj.\2", split_qkv),
    Rule(r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    Rule(r"blocks\.(\d+)\.(norm[12]|mlp\.fc[12])\.(weight|bias)", r"layers.\1.\2.\3"),
)
TIMM_PATCHES = Rule(r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embeddings.\1")
FINAL_NORM = Rule(r"norm\.(weight|bias)", r"norm.\1")
PRE_NORM = {"norm_placement": "pre", "use_cls_token": True, "embedding_norm": False, "final_norm": True}
POST_NORM = {"norm_placement": "post", "use_cls_token": True, "embedding_norm": True, "final_norm": False}

MAE = Layout(
    family="mae",
    title="MAE (facebookresearch/mae)",
    paths=(("model",),),
    signature=(r"^cls_token$", r"^pos_embed$", r"^blocks\.0\.attn\.qkv\.bias$", r"^norm\.weight$"),
    rules=(
        Rule(r"cls_token", CLS_TOKEN),
        Rule(r"pos_embed", POSITIONS, cls_and_patches),
        TIMM_PATCHES,
        *TIMM_BLOCKS,
        FINAL_NORM,
    ),
    drops=((r"decoder_.*|mask_token", "decoder"),),
    settings=PRE_NORM,
)
DBOT = replace(MAE, family="dbot", title="dBOT (liuxingbin/dbot)", signature=(*MAE.signature, r"^decoder_predp\."))
CROSSMAE = replace(
    MAE,
    family="crossmae",
    title="CrossMAE without final norm (TonyLianLong/CrossMAE, `wfm`)",
    signature=(r"^pos_embed$", r"^wfm\.linear\.weight$", r"^dec_norms\.0\.weight$"),
    rules=(Rule(r"cls_token", CLS_TOKEN), Rule(r"pos_embed", POSITIONS, patches_only), TIMM_PATCHES, *TIMM_BLOCKS),
    drops=((r"decoder_.*|mask_token|dec_norms\..*|wfm\..*", "decoder"),),
    settings={**PRE_NORM, "final_norm": False},
)
PLAIN_VIT = replace(MAE, family="plain_vit", title="a bare ViT state dict (MAWS, DINO, timm)", paths=((),), drops=())

RELEASED_RULES = (
    Rule(r"cls_tokens\.tokens", CLS_TOKEN),
    Rule(r"pos_embed\.embed", POSITIONS),  # a buffer (1, rows, columns, D), patches only
    TIMM_PATCHES,
    *TIMM_BLOCKS,
)
RELEASED_PRENORM = Layout(
    family="mim_refiner_prenorm",
    title="a MIM-Refiner encoder (ml-jku/MIM-Refiner: MAE, dBOT, CrossMAE refined)",
    paths=(("state_dict",), ()),
    model_types=("vit.vit",),
    signature=(r"^cls_tokens\.tokens$", r"^pos_embed\.embed$", r"^norm\.weight$"),
    rules=(*RELEASED_RULES, FINAL_NORM),
    settings=PRE_NORM,
    facts={
        "num_attention_heads": stated("ctor_kwargs", "num_attn_heads"),
        "num_hidden_layers": stated("ctor_kwargs", "depth"),
    },
)
RELEASED_POSTNORM = replace(  # old files say `norm` for `embed_norm`; unlike a final norm it stands before the blocks
    RELEASED_PRENORM,
    family="mim_refiner_postnorm",
    title="a MIM-Refiner encoder (ml-jku/MIM-Refiner: data2vec 2.0 refined)",
    model_types=("vit.data2vec2_vit",),
    signature=(r"^cls_tokens\.tokens$", r"^pos_embed\.embed$", r"^embed_norm\.weight$|^norm\.weight$.*^blocks\.0\."),
    rules=(*RELEASED_RULES, Rule(r"(?:embed_)?norm\.(weight|bias)", r"embeddings.norm.\1")),
    settings=POST_NORM,
)


# --- data2vec 2.0 (fairseq) ---------------------------------------------------------------------------------------------------


def stack_prenet(placed: Placed) -> Placed:
    """The modality's own blocks (`prenet.<i>`) run first: they become layers 0, 1, ..., and the shared ones follow."""
    depth = 1 + max((int(name.split(".")[1]) for name in placed if name.startswith("prenet.")), default=-1)
    shifted = {re.sub(r"\Alayers\.(\d+)", lambda m: f"layers.{int(m[1]) + depth}", name): t for name, t in placed.items()}
    return {re.sub(r"\Aprenet\.", "layers.", name): tensor for name, tensor in shifted.items()}


IMAGE = r"modality_encoders\.IMAGE\."
DATA2VEC2 = Layout(
    family="data2vec2",
    title="data2vec 2.0 for images (fairseq)",
    paths=(("model",),),
    signature=(rf"^{IMAGE}extra_tokens$", rf"^{IMAGE}context_encoder\.norm\.weight$", r"^blocks\.0\."),
    rules=(
        Rule(rf"{IMAGE}extra_tokens", CLS_TOKEN),
        Rule(rf"{IMAGE}fixed_positional_encoder\.positions", POSITIONS),
        Rule(rf"{IMAGE}local_encoder\.proj\.(weight|bias)", r"embeddings.patch_embeddings.\1"),
        Rule(rf"{IMAGE}context_encoder\.norm\.(weight|bias)", r"embeddings.norm.\1"),
        *(
            Rule(rf"{IMAGE}context_encoder\.{rule.pattern}", rule.target.replace("layers", "prenet"), rule.how)
            for rule in TIMM_BLOCKS
        ),
        *TIMM_BLOCKS,
    ),
    drops=((r"_ema\..*", "moving average of the training"), (rf"{IMAGE}decoder\..*", "decoder")),
    settings=POST_NORM,
    facts={"num_attention_heads": stated("cfg", "model", "num_heads")},
    finish=stack_prenet,
)


# --- transformers: names on disk (`encoder.layer.0.attention.attention.query`) and in memory (`layers.0.attention.q_proj`) ----

BLOCK = r"(?:encoder\.layer|layers)\.(\d+)\."
TABLE = r"relative_position_bias_table"
TRANSFORMERS_RULES = (
    Rule(r"embeddings\.cls_token", CLS_TOKEN),
    Rule(r"embeddings\.position_embeddings", POSITIONS, cls_and_patches),
    Rule(r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"embeddings.patch_embeddings.\1"),
    Rule(BLOCK + r"attention\.attention\.([qkv])(?:uery|ey|alue)\.(weight|bias)", r"layers.\1.attention.\2_proj.\3"),
    Rule(BLOCK + r"attention\.([qkvo]_proj)\.(weight|bias)", r"layers.\1.attention.\2.\3"),
    Rule(BLOCK + r"attention\.output\.dense\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    Rule(BLOCK + r"intermediate\.dense\.(weight|bias)", r"layers.\1.mlp.fc1.\2"),
    Rule(BLOCK + r"output\.dense\.(weight|bias)", r"layers.\1.mlp.fc2.\2"),
    Rule(BLOCK + r"mlp\.(fc[12])\.(weight|bias)", r"layers.\1.mlp.\2.\3"),
    Rule(BLOCK + r"layernorm_before\.(weight|bias)", r"layers.\1.norm1.\2"),
    Rule(BLOCK + r"layernorm_after\.(weight|bias)", r"layers.\1.norm2.\2"),
    Rule(r"layernorm\.(weight|bias)", r"norm.\1"),
)
VIT = Layout(
    family="vit",
    title="transformers' ViT",
    model_types=("vit",),
    prefix=r"vit\.",
    rules=TRANSFORMERS_RULES,
    drops=((r"decoder\..*|embeddings\.mask_token", "decoder"), (r"pooler\..*", "pooler")),
    settings=PRE_NORM,
)
VIT_MAE = replace(VIT, family="vit_mae", title="transformers' ViTMAE", model_types=("vit_mae",))


def beit_positions(config: Mapping[str, Any]) -> str | None:
    """BEiT's three switches as our `position_encoding`; None where no `config.json` states them."""
    switches = {
        "absolute": "use_absolute_position_embeddings",
        "relative": "use_relative_position_bias",
        "shared_relative": "use_shared_relative_position_bias",
    }
    return "+".join(kind for kind, switch in switches.items() if config.get(switch)) or None


BEIT = Layout(  # the final norm is there or not: the masked-image model has one outside the encoder, mean pooling drops it
    family="beit",
    title="transformers' BEiT",
    model_types=("beit",),
    prefix=r"beit\.",
    rules=(
        *TRANSFORMERS_RULES,
        Rule(BLOCK + r"lambda_([12])", r"layers.\1.layer_scale\2.weight"),
        Rule(
            BLOCK + rf"(?:attention\.attention\.)?relative_position_bias\.{TABLE}",
            r"layers.\1.attention.relative_position_bias.table",
        ),
        Rule(rf"(?:encoder\.relative_position_bias|shared_position_bias)\.{TABLE}", r"relative_position_bias.table"),
    ),
    drops=(
        (r"pooler\..*", "pooler"),
        (r"lm_head\..*|embeddings\.mask_token", "decoder"),
        (r".*relative_position_index", "position index"),
    ),
    settings={"norm_placement": "pre", "use_cls_token": True, "embedding_norm": False},
    facts={
        "position_encoding": beit_positions,
        "layer_scale_init": lambda config: config.get("layer_scale_init_value") or None,  # 0 is BEiT's word for none
        "final_norm": lambda config: True if config.get("use_mean_pooling") is False else None,
    },
)
DATA2VEC_VISION = replace(
    BEIT,
    family="data2vec_vision",
    title="transformers' Data2VecVision (data2vec 1)",
    model_types=("data2vec-vision",),
    prefix=r"data2vec_vision\.",
)
OURS = Layout(
    family="mim_refiner",
    title="a model folder of this package",
    model_types=("mim_refiner",),
    prefix=r"encoder\.",
    rules=(Rule(r"(.+)", r"\1"),),
)

LAYOUTS: tuple[Layout, ...] = (  # the more specific signature first
    OURS,
    VIT_MAE,
    VIT,
    BEIT,
    DATA2VEC_VISION,
    RELEASED_POSTNORM,
    RELEASED_PRENORM,
    DATA2VEC2,
    DBOT,
    CROSSMAE,
    MAE,
    PLAIN_VIT,
)

CLASSIFIER = r"(?:.*\.)?(?:head|head_dist|fc_norm|classifier|cls_classifier)\.(?:weight|bias)"
"""Tensors that only a fine-tuned classifier has, in any family."""
DECODER = r"(?:module\.)?(?:decoder.*|mask_token|dec_norms\..*|wfm\..*)"
"""Names of a masked autoencoder's decoder, in any family."""
