"""timm's class `Eva` in our words: EVA-02, RoPE-ViT, Perception Encoder, DINOv3, Sapiens2.

    eva_fields(name, model)     # {"position_encoding": "absolute+rope", "rope_theta": 10000.0, ..}
    eva_finish(model)           # what puts the channels of its heads in our order

Rotary positions turn pairs of channels of the queries and keys. timm pairs neighbours,
(2 i, 2 i + 1), or halves, (i, i + d / 2), and counts either rows or columns first; our model pairs
halves and counts rows first. A score is a sum over the channels of a head, in any order: those of
queries and keys are put in ours when they are loaded. Where several heads of queries share one of
keys and values (Sapiens2), each gets a copy of it, and a layer scale of the attention alone becomes
one of both branches, of ones for the MLP: the function is the same, and trains as a plain ViT does.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..runtime.files import CheckpointError
from .layout import EncoderFields, Placed

_KNOWN = (
    "of this class, EVA-02 (eva02_*), RoPE-ViT (vit_*_rope_*), Perception Encoder (vit_pe_*), "
    "DINOv3 (vit_*_dinov3) and Sapiens2 (vit_*_sapiens2) load"
)
_TURNED = re.compile(r".*\.attention\.[qk]_(?:proj|norm)\.(?:weight|bias)")
_SHARED = re.compile(r"layers\.(\d+)\.attention\.[kv]_proj\.(?:weight|bias)")


def eva_fields(name: str, model: Any) -> EncoderFields:
    """The fields of the configuration that only this class of timm has; its positions among them.

    Raises:
        CheckpointError: for settings of the class that ours has no word for; it names them.
    """
    lacking = _lacking(model.rope)
    if lacking:
        raise CheckpointError(
            f"{name} is timm's Eva with {' and '.join(lacking)}, which is not known here; {_KNOWN}"
        )

    kinds = []
    fields: EncoderFields = {}
    if model.pos_embed is not None:
        kinds.append("absolute")
        # as timm resizes it
        fields["position_resampling"] = "bicubic_antialias"
    if model.rope is not None:
        kinds.append("rope")
        fields |= _rope_fields(model.rope)

    pool = model.attn_pool
    if pool is not None and pool.num_heads != model.blocks[0].attn.num_heads:
        fields["pooling_heads"] = pool.num_heads
    return {**fields, "position_encoding": "+".join(kinds)}


def _rope_fields(rope: Any) -> EncoderFields:
    """The rotary positions of a model whose settings are all known."""
    kind = type(rope).__name__
    if kind == "RotaryEmbeddingMixed":
        return {"rope_places": "index_mixed"}
    theta = float(rope.temperature)
    if kind == "RotaryEmbeddingDinoV3":
        return {"rope_theta": theta}

    grid = rope.ref_feat_shape
    return {
        "rope_theta": theta,
        "rope_places": "index_axial",
        "rope_grid": None if grid is None else list(grid),
        "rope_offset": float(rope.grid_offset),
    }


def _lacking(rope: Any) -> list[str]:
    """What rotary positions have that ours have no word for, in timm's words; None for no such."""
    kind = type(rope).__name__
    if rope is None or kind == "RotaryEmbeddingMixed":
        return []
    if kind not in ("RotaryEmbeddingCat", "RotaryEmbeddingDinoV3"):
        return [f"{kind} positions"]

    known: dict[str, str | float | None] = {"normalize_coords": "separate"}
    if kind == "RotaryEmbeddingCat":
        known |= {"grid_type": "index"}
    else:
        known |= {"grid_offset": 0.0, "min_period": None, "max_period": None}
    lacking = []
    for key, value in known.items():
        theirs = getattr(rope, key, value)
        if theirs != value:
            lacking.append(f"rotary positions of {key}={theirs!r} (only {value!r})")
    return lacking


def eva_finish(model: Any) -> Callable[[Placed], Placed]:
    """What turns the placed tensors of such a model into ours."""
    groups = [getattr(block.attn, "num_kv_groups", 1) for block in model.blocks]
    head_dim = model.blocks[0].attn.head_dim
    attention_alone = _scales_attention_alone(model.blocks[0])
    turn = _turn_of(model)

    def finish(placed: Placed) -> Placed:
        arranged = {}
        for name, tensor in placed.items():
            match = _SHARED.fullmatch(name)
            # what is misshapen, or of a block too many, is named where all shapes are checked
            if match and int(match[1]) < len(groups) and tensor.ndim > 0:
                tensor = _repeated(tensor, head_dim, groups[int(match[1])])
            arranged[name] = tensor if turn is None else turn(name, tensor)
            if attention_alone and name.endswith(".layer_scale1.weight"):
                ones = torch.ones_like(tensor)
                arranged[name.replace("layer_scale1", "layer_scale2")] = ones
        return arranged

    return finish


def _scales_attention_alone(block: Any) -> bool:
    return getattr(block, "gamma_1", None) is not None and block.gamma_2 is None


def _repeated(tensor: Tensor, head_dim: int, times: int) -> Tensor:
    """Rows (heads * d, ...) of keys or values with every head so many times."""
    if times == 1 or len(tensor) % head_dim:
        return tensor
    heads = tensor.unflatten(0, (-1, head_dim))  # (heads, d, ...)
    return heads.repeat_interleave(times, dim=0).flatten(0, 1)


def _turn_of(model: Any) -> Callable[[str, Tensor], Tensor] | None:
    """What puts the channels of a tensor of this name in our order; None where they are."""
    rope = model.rope
    if rope is None:
        return None
    is_mixed = type(rope).__name__ == "RotaryEmbeddingMixed"
    columns_first = rope.grid_indexing == "xy"
    order = head_order(
        model.blocks[0].attn.head_dim,
        neighbours=not getattr(rope, "rotate_half", False),
        columns_first=columns_first and not is_mixed,
    )

    def turn(name: str, tensor: Tensor) -> Tensor:
        # what is misshapen is named where all shapes are checked
        fits = tensor.ndim > 0 and len(tensor) % len(order) == 0
        if _TURNED.fullmatch(name) and fits:
            return in_order(tensor, order)
        if name.endswith(".rope.frequencies") and columns_first:
            return tensor.flip(0)
        return tensor

    return turn


def head_order(head_dim: int, *, neighbours: bool, columns_first: bool) -> Tensor:
    """Which of their channels is each of our channels of a head, (head_dim,).

    Args:
        neighbours: they pair (2 i, 2 i + 1), and not (i, i + head_dim / 2) as we do.
        columns_first: their first pairs are turned by the column of a patch.
    """
    pairs = torch.arange(head_dim // 2)
    if columns_first:
        pairs = pairs.roll(head_dim // 4)
    if neighbours:
        return torch.cat([2 * pairs, 2 * pairs + 1])
    return torch.cat([pairs, pairs + head_dim // 2])


def in_order(tensor: Tensor, order: Tensor) -> Tensor:
    """Rows (heads * d, ...) of a projection, those of each head in this order (d,)."""
    return tensor.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)
