"""How every known family names its tensors: one `Layout` per family, read by `load.py`.

Those of transformers' own classes are in `transformers_layouts.py`.

To support another family, add a layout and its golden test. Whatever shapes can tell (width, depth,
patch size, biases, layer scale, kinds of positions) is read off the placed tensors (`shapes.py`)
and is not here. `settings` holds what shapes cannot tell, `facts` where a file states it (number of
heads). The file is long because families are read beside each other, most of them in terms of one
that stands above.
"""

import re
from collections.abc import Collection
from dataclasses import replace

import torch

from .birder_models import BIRDER
from .layout import (
    CLS_TOKEN,
    POSITIONS,
    REGISTERS,
    EncoderFields,
    Layout,
    Placed,
    Rule,
    any_positions,
    by_blocks,
    cls_and_patches,
    split_gate,
    split_kv,
    split_qkv,
    square_positions,
    stated,
    without_first_row,
)
from .transformers_layouts import HALF, POSITION_INDEX, THEIR_BIAS_TABLE, TRANSFORMERS_LAYOUTS

# --- timm's names: MAE and all that grew out of it ----------------------------------------------

_TIMM_BLOCKS = (
    Rule(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", r"layers.\1.attention.*_proj.\2", split_qkv),
    Rule(r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    Rule(r"blocks\.(\d+)\.(norm[12]|mlp\.fc[12])\.(weight|bias)", r"layers.\1.\2.\3"),
)
# what only some of timm's classes have within a block
_TIMM_OPTIONS = (
    Rule(r"blocks\.(\d+)\.attn\.((?:[qk]_)?norm)\.(weight|bias)", r"layers.\1.attention.\2.\3"),
    Rule(r"blocks\.(\d+)\.mlp\.norm\.(weight|bias)", r"layers.\1.mlp.norm.\2"),
    Rule(r"blocks\.(\d+)\.mlp\.fc1_g\.(weight|bias)", r"layers.\1.mlp.gate.\2"),
    Rule(r"blocks\.(\d+)\.mlp\.fc1_x\.(weight|bias)", r"layers.\1.mlp.fc1.\2"),
)
_PATCHES = Rule(r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embeddings.\1")
_FINAL_NORM = Rule(r"norm\.(weight|bias)", r"norm.\1")
_CLS = Rule(r"cls_token", CLS_TOKEN)
_ABSOLUTE: EncoderFields = {"embedding_norm": False, "position_encoding": "absolute"}
# CrossMAE's ends with a norm or without
_PRE_NORM_ANY_END: EncoderFields = {**_ABSOLUTE, "norm_placement": "pre", "use_cls_token": True}
_PRE_NORM: EncoderFields = {**_PRE_NORM_ANY_END, "final_norm": True}
_POST_NORM: EncoderFields = {
    **_ABSOLUTE,
    "norm_placement": "post",
    "use_cls_token": True,
    "final_norm": False,
    "embedding_norm": True,
}

MAE = Layout(
    family="mae",
    title="MAE (facebookresearch/mae)",
    paths=(("model",),),
    signature=(r"^patch_embed\.proj\.", r"^blocks\.\d+\.attn\.qkv\."),
    rules=(
        _CLS,
        Rule(r"pos_embed", POSITIONS, cls_and_patches),
        _PATCHES,
        *_TIMM_BLOCKS,
        _FINAL_NORM,
    ),
    drops=((r"decoder_.*|mask_token", "decoder"),),
    settings=_PRE_NORM,
)
DBOT = replace(
    MAE,
    family="dbot",
    title="dBOT (liuxingbin/dbot)",
    signature=(*MAE.signature, r"^decoder_predp\."),
)
# with weighted feature maps (`wfm`, as released) the blocks end without a norm, else with one
CROSSMAE = replace(
    MAE,
    family="crossmae",
    title="CrossMAE (TonyLianLong/CrossMAE)",
    signature=(*MAE.signature, r"^decoder_blocks\.\d+\.cross_attn\.|^dec_norms\.|^wfm\."),
    rules=(
        _CLS,
        Rule(r"pos_embed", POSITIONS, without_first_row),
        _PATCHES,
        *_TIMM_BLOCKS,
        _FINAL_NORM,
    ),
    drops=((r"decoder_.*|mask_token|dec_norms\..*|wfm\..*", "decoder"),),
    settings=_PRE_NORM_ANY_END,
)
IBOT = replace(
    MAE,
    family="ibot",
    title="iBOT's or DINO's training file, its teacher (bytedance/ibot, facebookresearch/dino)",
    paths=(("teacher",),),
    signature=(
        r"^(module\.)?backbone\.patch_embed\.proj\.",
        r"^(module\.)?backbone\.blocks\.\d+\.attn\.qkv\.",
    ),
    prefix=r"(?:module\.)?(?:backbone\.)?",
    drops=((r"head\d*\..*", "projection head"), (r"masked_embed", "mask token")),
)
IJEPA = replace(
    MAE,
    family="ijepa",
    title="I-JEPA, its target encoder (facebookresearch/ijepa)",
    paths=(("target_encoder",),),
    signature=(r"^(module\.)?patch_embed\.proj\.", r"^(module\.)?blocks\.\d+\.attn\.qkv\."),
    prefix=r"module\.",
    rules=(Rule(r"pos_embed", POSITIONS), _PATCHES, *_TIMM_BLOCKS, _FINAL_NORM),
    drops=(),
    settings={**_PRE_NORM, "use_cls_token": False},
)


# --- bare ViTs, and timm's own models (`timm_models.py` reads their config.json) ----------------

# timm's training keeps an average of the weights beside them, and takes that
_BARE = (("state_dict_ema",), ("state_dict",), ())


def _whole(layout: Layout) -> Layout:
    """A masked autoencoder with its decoder, in another container than its authors'."""
    signature = (*layout.signature, r"^decoder_embed\.")
    return replace(layout, family=f"{layout.family}_whole", paths=_BARE, signature=signature)


WHOLE_MAES = (_whole(DBOT), _whole(CROSSMAE), _whole(MAE))

_CLASSIFIER_HEAD = (r"(?:head|head_dist)\..*", "classifier")
# of the mean of the patches; the blocks then end without a norm
_POOLED_NORM = Rule(r"fc_norm\.(weight|bias)", r"pooled_norm.\1")
_PRE_TRANSFORMER_NORM = Rule(r"norm_pre\.(weight|bias)", r"embeddings.norm.\1")
_ATTENTION_POOLING = (
    Rule(r"attn_pool\.latent", "attention_pooling.query"),
    Rule(r"attn_pool\.q\.(weight|bias)", r"attention_pooling.q_proj.\1"),
    Rule(r"attn_pool\.kv\.(weight|bias)", r"attention_pooling.*_proj.\1", split_kv),
    Rule(r"attn_pool\.proj\.(weight|bias)", r"attention_pooling.o_proj.\1"),
    Rule(r"attn_pool\.(norm|mlp\.fc[12])\.(weight|bias)", r"attention_pooling.\1.\2"),
)


def _split_packed_gates(placed: Placed) -> Placed:
    """First layers of MLPs (2 W, D) of which the second takes W: gate and first layer in one."""
    split: Placed = {}
    for name, tensor in placed.items():
        inner = placed.get(re.sub(r"fc1\.(weight|bias)$", "fc2.weight", name))
        is_first = name.endswith(("mlp.fc1.weight", "mlp.fc1.bias"))
        if is_first and inner is not None and inner.ndim == 2 and len(tensor) == 2 * inner.shape[1]:
            split |= split_gate(name.replace("fc1", "*"), tensor)
        else:
            split[name] = tensor
    return split


def _without_idle_pooling(placed: Placed) -> Placed:
    """Attention pooling without a projection of the query and an MLP that do nothing.

    So AIMv2's goes to timm (`export_timm_eva.py`).
    """
    pool = "attention_pooling."
    query = placed.get(f"{pool}q_proj.weight")
    silent = [placed.get(pool + name) for name in ("q_proj.bias", "mlp.fc2.weight", "mlp.fc2.bias")]
    if query is None or query.ndim != 2 or query.shape[0] != query.shape[1]:
        return placed
    if any(tensor is None or tensor.any() for tensor in silent):
        return placed
    if not torch.equal(query, torch.eye(len(query), dtype=query.dtype)):
        return placed

    idle = [f"{pool}q_proj.", f"{pool}norm.", f"{pool}mlp."]
    # biases that timm has to have, and the blocks have not
    for name in (f"{pool}k_proj.bias", f"{pool}v_proj.bias"):
        of_blocks = name.replace("attention_pooling", "layers.0.attention")
        if name in placed and of_blocks not in placed and not placed[name].any():
            idle.append(name)
    return {name: value for name, value in placed.items() if not name.startswith(tuple(idle))}


def _as_timm_has_it(placed: Placed) -> Placed:
    return _without_idle_pooling(_split_packed_gates(placed))


_LAYER_SCALE = Rule(
    r"blocks\.(\d+)\.(?:ls|gamma_)([12])(?:\.gamma)?", r"layers.\1.layer_scale\2.weight"
)
PLAIN_VIT = Layout(
    family="plain_vit",
    title="a bare ViT state dict (MAWS, DINO, timm)",
    paths=_BARE,
    model_types=("timm.VisionTransformer", "timm.VisionTransformerDistilled"),
    signature=MAE.signature,
    rules=(
        _CLS,
        Rule(r"reg_token|dist_token", REGISTERS),
        Rule(r"pos_embed", POSITIONS, any_positions),
        _PATCHES,
        Rule(r"patch_embed\.norm\.(weight|bias)", r"embeddings.patch_norm.\1"),
        *_TIMM_BLOCKS,
        *_TIMM_OPTIONS,
        _LAYER_SCALE,
        _FINAL_NORM,
        _POOLED_NORM,
        _PRE_TRANSFORMER_NORM,
        *_ATTENTION_POOLING,
    ),
    drops=(_CLASSIFIER_HEAD,),
    settings={"position_encoding": "absolute", "norm_placement": "pre"},
    finish=_as_timm_has_it,
)
# registers came with DINOv2, whose authors resize the table of these models with antialiasing
PLAIN_VIT_REGISTERS = replace(
    PLAIN_VIT,
    family="plain_vit_registers",
    title="a bare ViT state dict with registers (timm)",
    model_types=(),
    signature=(*MAE.signature, r"^reg_token$"),
    settings={**PLAIN_VIT.settings, "position_resampling": "bicubic_antialias"},
)
_OF_BACKBONE = r"(?:module\.)?(?:backbone\.)?"
DINOV2_ORIGINAL = replace(
    PLAIN_VIT,
    family="dinov2_original",
    title="DINOv2, released or its training's teacher (facebookresearch/dinov2)",
    paths=(("teacher",), ("model",), *_BARE),
    model_types=(),
    signature=(
        rf"^{_OF_BACKBONE}patch_embed\.proj\.",
        rf"^{_OF_BACKBONE}mask_token$",
        rf"^{_OF_BACKBONE}blocks\.\d+\.ls1\.gamma$",
    ),
    prefix=_OF_BACKBONE,
    rules=(
        Rule(r"register_tokens", REGISTERS),
        Rule(r"blocks\.(\d+)\.mlp\.w12\.(weight|bias)", r"layers.\1.mlp.*.\2", split_gate),
        Rule(r"blocks\.(\d+)\.mlp\.w3\.(weight|bias)", r"layers.\1.mlp.fc2.\2"),
        *PLAIN_VIT.rules,
    ),
    drops=((r"mask_token", "mask token"), (r"(?:dino|ibot)_head\..*", "projection head")),
    settings={**_PRE_NORM, "source_model_type": "dinov2"},
    finish=None,
)
DINOV2_ORIGINAL_REGISTERS = replace(
    DINOV2_ORIGINAL,
    family="dinov2_original_registers",
    title="DINOv2 with registers (facebookresearch/dinov2)",
    signature=(*DINOV2_ORIGINAL.signature, rf"^{_OF_BACKBONE}register_tokens$"),
    settings={
        **_PRE_NORM,
        "position_resampling": "bicubic_antialias",
        "source_model_type": "dinov2_with_registers",
    },
)


# --- BEiT's names: qkv without bias, biases of q and v alone, relative positions shared or not ---

PLAIN_BEIT = Layout(
    family="plain_beit",
    title="a bare BEiT state dict (timm)",
    paths=_BARE,
    model_types=("timm.Beit",),
    signature=(*MAE.signature, r"^blocks\.\d+\.attn\.[qv]_bias$"),
    rules=(
        _CLS,
        Rule(r"pos_embed", POSITIONS, cls_and_patches),
        _PATCHES,
        Rule(r"blocks\.(\d+)\.attn\.([qv])_bias", r"layers.\1.attention.\2_proj.bias"),
        Rule(
            rf"blocks\.(\d+)\.attn\.{THEIR_BIAS_TABLE}",
            r"layers.\1.attention.relative_position_bias.table",
        ),
        Rule(rf"rel_pos_bias\.{THEIR_BIAS_TABLE}", r"relative_position_bias.table"),
        *_TIMM_BLOCKS,
        _LAYER_SCALE,
        _FINAL_NORM,
        _POOLED_NORM,
    ),
    drops=(_CLASSIFIER_HEAD, POSITION_INDEX),
    settings={"norm_placement": "pre", "use_cls_token": True, "embedding_norm": False},
    preprocessing=lambda contents: HALF,
)
# rotary positions stand in no tensor, or in another order (`timm_models.py` looks at them)
TIMM_EVA = replace(
    PLAIN_VIT,
    family="timm_eva",
    title="timm's Eva (EVA-02, RoPE-ViT, DINOv3, Sapiens2)",
    model_types=("timm.Eva",),
    signature=(),
    rules=(
        Rule(r"blocks\.(\d+)\.attn\.([qv])_bias", r"layers.\1.attention.\2_proj.bias"),
        Rule(
            r"blocks\.(\d+)\.attn\.([qkv])_proj\.(weight|bias)",
            r"layers.\1.attention.\2_proj.\3",
        ),
        Rule(r"rope\.freqs", "layers.*.attention.rope.frequencies", by_blocks),
        *PLAIN_VIT.rules,
    ),
    settings={"norm_placement": "pre"},
)
CONMIM = replace(
    PLAIN_BEIT,
    family="conmim",
    title="ConMIM (TencentARC/ConMIM)",
    paths=(("model",),),
    model_types=(),
    drops=((r"lm_head\..*|projectors\..*|mask_token", "pre-training head"), POSITION_INDEX),
    settings={**PLAIN_BEIT.settings, "final_norm": True},
    preprocessing=lambda contents: (
        {} if stated("args", "imagenet_default_mean_and_std")(contents) else HALF
    ),
    reads_student=True,
)
# whose blocks for its CLS token serve the pre-training alone
BEIT_V2 = replace(
    CONMIM,
    family="beit_v2",
    title="BEiT v2 (microsoft/unilm)",
    signature=(*PLAIN_BEIT.signature, r"^cls_pt_layers\."),
    drops=((r"lm_head\..*|cls_pt_layers\..*|mask_token", "pre-training head"), POSITION_INDEX),
    preprocessing=lambda contents: {},
    reads_student=False,
)
# never recognised: a file that holds both is read as the authors fine-tune it, from `model`
CONMIM_EMA = replace(
    CONMIM,
    family="conmim_ema",
    title="ConMIM's moving average, to be asked for",
    paths=(("model_ema",),),
    signature=(),
)


# --- the released MIM-Refiner encoders, and MAE-CT ----------------------------------------------

_RELEASED_RULES = (
    Rule(r"cls_tokens\.tokens", CLS_TOKEN),
    # a buffer (1, rows, columns, D) of the patches
    Rule(r"pos_embed\.embed", POSITIONS),
    _PATCHES,
    *_TIMM_BLOCKS,
)
RELEASED_PRENORM = Layout(
    family="mim_refiner_prenorm",
    title="a MIM-Refiner encoder (ml-jku/MIM-Refiner: MAE, dBOT, CrossMAE refined)",
    paths=(("state_dict",), ()),
    model_types=("vit.vit",),
    signature=(r"^(cls_tokens\.tokens|pos_embed\.embed)$", r"^norm\."),
    rules=(*_RELEASED_RULES, _FINAL_NORM),
    settings=_PRE_NORM,
    facts={
        "num_attention_heads": stated("ctor_kwargs", "num_attn_heads"),
        "num_hidden_layers": stated("ctor_kwargs", "depth"),
    },
)
# old files say `norm` for `embed_norm`; unlike a final norm it stands before the blocks
RELEASED_POSTNORM = replace(
    RELEASED_PRENORM,
    family="mim_refiner_postnorm",
    title="a MIM-Refiner encoder (ml-jku/MIM-Refiner: data2vec 2.0 refined)",
    model_types=("vit.data2vec2_vit",),
    signature=(
        r"^(cls_tokens\.tokens|pos_embed\.embed)$",
        r"^embed_norm\.|^norm\..*^blocks\.\d+\.",
    ),
    rules=(*_RELEASED_RULES, Rule(r"(?:embed_)?norm\.(weight|bias)", r"embeddings.norm.\1")),
    settings=_POST_NORM,
)
# a CLS token, and positions of the patches alone: of a bare file it would be a guess, so its family
# is asked for, or named by the zoo
MAE_CT = replace(
    RELEASED_PRENORM,
    family="maect",
    title="MAE-CT (ml-jku/MAE-CT)",
    model_types=(),
    signature=(),
    rules=(
        _CLS,
        Rule(r"pos_embed", POSITIONS, square_positions),
        *RELEASED_PRENORM.rules,
    ),
)
# its ViT-B/16 were tuned, and evaluated, on the mean of the patches
MAE_CT_MEAN = replace(
    MAE_CT,
    family="maect_mean",
    title="MAE-CT's ViT-B/16 (ml-jku/MAE-CT)",
    settings={**_PRE_NORM, "pooling": "mean"},
)


# --- data2vec 2.0 (fairseq) ---------------------------------------------------------------------


def _stack_prenet(names: Collection[str]) -> dict[str, str]:
    """The modality's own blocks run first: they become layers 0, 1, ..., the shared ones follow."""
    own = [int(name.split(".")[1]) for name in names if name.startswith("prenet.")]
    depth = max(own, default=-1) + 1

    stacked = {}
    for name in names:
        part, _, rest = name.partition(".")
        stacked[name] = name
        if part == "layers":
            block, _, rest = rest.partition(".")
            stacked[name] = f"layers.{int(block) + depth}.{rest}"
        elif part == "prenet":
            stacked[name] = f"layers.{rest}"
    return stacked


_IMAGE = r"modality_encoders\.IMAGE\."
DATA2VEC2 = Layout(
    family="data2vec2",
    title="data2vec 2.0 for images (fairseq)",
    paths=(("model",),),
    signature=(rf"^{_IMAGE}", r"^blocks\.\d+\."),
    rules=(
        Rule(rf"{_IMAGE}extra_tokens", CLS_TOKEN),
        Rule(rf"{_IMAGE}fixed_positional_encoder\.positions", POSITIONS),
        Rule(rf"{_IMAGE}local_encoder\.proj\.(weight|bias)", r"embeddings.patch_embeddings.\1"),
        Rule(rf"{_IMAGE}context_encoder\.norm\.(weight|bias)", r"embeddings.norm.\1"),
        *(
            Rule(
                rf"{_IMAGE}context_encoder\.{rule.pattern}",
                rule.target.replace("layers", "prenet"),
                rule.how,
            )
            for rule in _TIMM_BLOCKS
        ),
        *_TIMM_BLOCKS,
    ),
    drops=((r"_ema\..*", "moving average of the training"), (rf"{_IMAGE}decoder\..*", "decoder")),
    settings=_POST_NORM,
    facts={"num_attention_heads": stated("cfg", "model", "num_heads")},
    rename=_stack_prenet,
)


# --- CAPI ---------------------------------------------------------------------------------------


def _capi_blocks(theirs: str, ours: str) -> tuple[Rule, ...]:
    """The blocks of CAPI's encoder or predictor: residual attention and MLP, with RMSNorm."""
    attention = rf"{theirs}\.residual1\."
    mlp = rf"{theirs}\.residual2\."
    return (
        Rule(attention + r"norm\.weight", rf"{ours}.norm1.weight"),
        Rule(attention + r"fn\.([qkv])_proj\.weight", rf"{ours}.attention.\2_proj.weight"),
        Rule(attention + r"fn\.proj\.weight", rf"{ours}.attention.o_proj.weight"),
        Rule(attention + r"fn\.rope\.freqs", rf"{ours}.attention.rope.frequencies"),
        Rule(mlp + r"norm\.weight", rf"{ours}.norm2.weight"),
        Rule(mlp + r"fn\.(fc[12])\.weight", rf"{ours}.mlp.\2.weight"),
    )


# the image-level vector, `global_repr`, is read off after the predictor's first block: it is kept
CAPI = Layout(
    family="capi",
    title="CAPI (facebookresearch/capi)",
    signature=(
        r"^(?:backbone\.)?registers$",
        r"^(?:backbone\.)?encoder\.blocks\.0\.residual1\.fn\.rope\.freqs$",
    ),
    prefix=r"backbone\.",
    rules=(
        Rule(r"registers", "embeddings.register_tokens"),
        Rule(r"patch_embed\.(weight|bias)", r"embeddings.patch_embeddings.\1"),
        *_capi_blocks(r"encoder\.blocks\.(\d+)", r"layers.\1"),
        Rule(r"mask_token", "predictor.mask_token"),
        *_capi_blocks(r"decoder\.blocks\.(0)", r"predictor.blocks.\1"),
    ),
    drops=(
        (r"head\..*", "clustering head"),
        (r"decoder\.blocks\.[1-9]\d*\..*", "predictor after its first block"),
    ),
    settings={
        "norm_placement": "pre",
        "norm_type": "rmsnorm",
        "layer_norm_eps": 1e-5,
        "position_encoding": "rope",
        "bias": "none",
        "use_cls_token": False,
        "embedding_norm": False,
        "final_norm": True,
        "final_norm_affine": False,
    },
)

# to go on with CAPI, which needs the whole predictor: asked for by name
CAPI_WHOLE = replace(
    CAPI,
    family="capi_whole",
    title="CAPI with its whole predictor (facebookresearch/capi)",
    signature=(),
    rules=(*CAPI.rules, *_capi_blocks(r"decoder\.blocks\.(\d+)", r"predictor.blocks.\1")),
    drops=CAPI.drops[:1],
)


# --- birder: the RoPE ViTs of its CAPI models; `birder_models.py` reads what a file states --------

_BIRDER_BLOCK = r"encoder\.block\.(\d+)\."
BIRDER_ROPE_VIT = Layout(
    family=BIRDER,
    title="a RoPE ViT of birder (birder-project/birder), such as its CAPI models",
    paths=(("state",),),
    model_types=(BIRDER,),
    rules=(
        Rule(r"class_token", CLS_TOKEN),
        Rule(r"reg_tokens", REGISTERS),
        Rule(r"pos_embedding", POSITIONS),
        Rule(r"conv_proj\.(weight|bias)", r"embeddings.patch_embeddings.\1"),
        Rule(
            _BIRDER_BLOCK + r"attn\.qkv\.(weight|bias)",
            r"layers.\1.attention.*_proj.\2",
            split_qkv,
        ),
        Rule(_BIRDER_BLOCK + r"attn\.proj\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
        Rule(_BIRDER_BLOCK + r"(norm[12])\.(weight|bias)", r"layers.\1.\2.\3"),
        Rule(_BIRDER_BLOCK + r"mlp\.(?:0|fc1_x)\.(weight|bias)", r"layers.\1.mlp.fc1.\2"),
        Rule(_BIRDER_BLOCK + r"mlp\.fc1_g\.(weight|bias)", r"layers.\1.mlp.gate.\2"),
        Rule(_BIRDER_BLOCK + r"mlp\.(?:3|fc2)\.(weight|bias)", r"layers.\1.mlp.fc2.\2"),
        _FINAL_NORM,
        *_ATTENTION_POOLING,
        Rule(r"attn_pool\.mlp\.0\.(weight|bias)", r"attention_pooling.mlp.fc1.\1"),
        Rule(r"attn_pool\.mlp\.3\.(weight|bias)", r"attention_pooling.mlp.fc2.\1"),
    ),
    drops=((r"classifier\.(?:weight|bias)", "classifier"),),
    settings={
        "norm_placement": "pre",
        "layer_norm_eps": 1e-6,
        "embedding_norm": False,
        "position_encoding": "absolute+rope",
        "rope_theta": 100.0,
        "rope_places": "index",
    },
)


# --- our own -------------------------------------------------------------------------------------

OURS = Layout(
    family="mim_refiner",
    title="a model folder of this package",
    model_types=("mim_refiner",),
    prefix=r"encoder\.",
    rules=(Rule(r"(.+)", r"\1"),),
)

# the more specific signature comes first
LAYOUTS: tuple[Layout, ...] = (
    OURS,
    *TRANSFORMERS_LAYOUTS,
    RELEASED_POSTNORM,
    RELEASED_PRENORM,
    MAE_CT,
    MAE_CT_MEAN,
    DATA2VEC2,
    DINOV2_ORIGINAL_REGISTERS,
    DINOV2_ORIGINAL,
    IBOT,
    IJEPA,
    CAPI,
    CAPI_WHOLE,
    BIRDER_ROPE_VIT,
    BEIT_V2,
    CONMIM,
    CONMIM_EMA,
    DBOT,
    CROSSMAE,
    MAE,
    *WHOLE_MAES,
    PLAIN_BEIT,
    TIMM_EVA,
    PLAIN_VIT_REGISTERS,
    PLAIN_VIT,
)

CLASSIFIER = r"(?:.*\.)?(?:head|head_dist|classifier|cls_classifier)\.(?:weight|bias)"
"""Tensors that only a fine-tuned classifier has, in any family."""
DECODER = r"(?:module\.)?(?:decoder.*|mask_token|dec_norms\..*|wfm\..*)"
"""Names of a masked autoencoder's decoder, in any family."""
