"""What the shapes of an encoder's tensors tell of its configuration.

fields = read_shapes("out/model", placed)      # {"hidden_size": 1024, "patch_size": 16, ...}
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..model.configuration_mim_refiner import brief
from ..runtime.files import CheckpointError
from .layout import CLS_POSITION, CLS_TOKEN, POSITIONS, REGISTERS, EncoderFields, listed

KERNEL = "embeddings.patch_embeddings.weight"
BIAS_TABLE = "relative_position_bias.table"

HEADS_OF_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 2560: 32}
"""Attention heads of the published plain ViTs: head dim 64 up to L, 80 for H and 2B."""


def most_frequent(values: Iterable[Any]) -> Any:
    """The most frequent value: one misshapen tensor among many must not pass for the rule."""
    return Counter(values).most_common(1)[0][0]


def read_shapes(name: str, placed: Mapping[str, Tensor]) -> EncoderFields:
    """Every field of the configuration that tensors tell; a feature is there if any of its is.

    Args:
        name: of the source, for error messages.
        placed: the tensors under our names.
    """
    kernel = placed.get(KERNEL, torch.empty(0))
    if kernel.ndim != 4 or not kernel.numel():
        what = "is missing"
        if KERNEL in placed:
            what = f"is {brief(list(kernel.shape))}, expected (D, C, P, P)"
        raise CheckpointError(
            f"{name} has no patch embedding: {KERNEL} {what}; it has {listed(list(placed))}"
        )
    _, channels, patch, _ = kernel.shape
    depth = _read_depth(name, placed)
    norms = [tensor.numel() for tensor in _ending(placed, ".norm1.weight")]
    width = most_frequent([len(kernel), *norms])
    inner_widths = [len(weight) for weight in _ending(placed, ".mlp.fc1.weight") if weight.ndim]
    registers = placed.get(REGISTERS, torch.empty(0))
    gated = any(".mlp.gate." in key for key in placed)
    pooled_norm = any(key.startswith("pooled_norm.") for key in placed)
    predictor_blocks = {key.split(".")[2] for key in placed if key.startswith("predictor.blocks.")}

    fields: EncoderFields = {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch,
        "intermediate_size": most_frequent(inner_widths or [width]),
        "gated_mlp": gated,
        "mlp_norm": bool(_ending(placed, ".mlp.norm.weight")),
        "attention_norm": bool(_ending(placed, ".attention.norm.weight")),
        "query_key_norm": bool(_ending(placed, ".attention.q_norm.weight")),
        "patch_norm": "embeddings.patch_norm.weight" in placed,
        "num_hidden_layers": depth,
        "num_attention_heads": HEADS_OF_WIDTH.get(width),
        "use_cls_token": CLS_TOKEN in placed or CLS_POSITION in placed,
        "num_register_tokens": registers.numel() // max(width, 1),
        "predictor_layers": len(predictor_blocks),
        "embedding_norm": any(key.startswith("embeddings.norm.") for key in placed),
        "final_norm": any(key.startswith("norm.") for key in placed),
        "bias": _biases(placed),
        "layer_scale_init": 0.1 if any(".layer_scale" in key for key in placed) else None,
        "position_encoding": _position_encoding(placed),
    }
    # every published one is SwiGLU
    if gated:
        fields["hidden_act"] = "silu"
    # a norm of its own is of the mean of the patches; CLIP's layout knows of its other one
    if pooled_norm:
        fields |= {"pooled_norm": True, "pooling": "mean"}
    if any(key.startswith("attention_pooling.") for key in placed):
        has_mlp = any(key.startswith("attention_pooling.mlp.") for key in placed)
        fields["pooling_head"] = "attention_mlp" if has_mlp else "attention"
        inner = placed.get("attention_pooling.mlp.fc1.weight")
        if inner is not None and inner.ndim and len(inner) != fields["intermediate_size"]:
            fields["pooling_intermediate_size"] = len(inner)
    return fields | _heads_and_size(placed, width, patch)


def _read_depth(name: str, placed: Mapping[str, Tensor]) -> int:
    """The number of blocks, of which none may be absent."""
    matches = [re.match(r"layers\.(\d+)\.", key) for key in placed]
    blocks = {int(match[1]) for match in matches if match}
    last = max(blocks, default=0)
    if not blocks or last + 1 != len(blocks):
        of_the_last = [key for key in placed if key.startswith(f"layers.{last}.")]
        raise CheckpointError(
            f"{name} has {len(blocks)} transformer blocks, not one after the other; the last is "
            f"{listed(of_the_last)}"
        )
    return len(blocks)


def _ending(placed: Mapping[str, Tensor], suffix: str) -> list[Tensor]:
    """The tensors whose names end with `suffix`."""
    return [tensor for name, tensor in placed.items() if name.endswith(suffix)]


def _biases(placed: Mapping[str, Tensor]) -> str:
    """Which linear layers have a bias, as far as those of attention say."""
    if _ending(placed, ".attention.k_proj.bias"):
        return "all"
    if _ending(placed, ".attention.q_proj.bias") or _ending(placed, ".attention.v_proj.bias"):
        return "no_key"
    return "no_qkv" if _ending(placed, ".attention.o_proj.bias") else "none"


def _position_encoding(placed: Mapping[str, Tensor]) -> str:
    """The kinds of positions that have a table, joined by `+`; empty where none has."""
    kinds = []
    if POSITIONS in placed:
        kinds.append("absolute")
    # a table that all blocks share stands outside of them
    if BIAS_TABLE in placed:
        kinds.append("shared_relative")
    elif _ending(placed, BIAS_TABLE):
        kinds.append("relative")
    return "+".join(kinds)


def _heads_and_size(placed: Mapping[str, Tensor], width: int, patch: int) -> EncoderFields:
    """The number of heads and the size of images, where tables of positions tell them."""
    fields: EncoderFields = {}
    grid: tuple[int, int] | None = None

    # norms of queries and keys: (head dim)
    normed = [tensor.numel() for tensor in _ending(placed, ".attention.q_norm.weight")]
    if normed:
        fields["num_attention_heads"] = width // max(most_frequent(normed), 1)

    # rotary positions: (2, head dim) frequencies in each block, or (2, heads, head dim / 2)
    frequencies = _ending(placed, ".rope.frequencies")
    by_heads = [tensor.shape[1] for tensor in frequencies if tensor.ndim == 3]
    if by_heads:
        fields["num_attention_heads"] = most_frequent(by_heads)
    head_dims = [tensor.numel() // 2 for tensor in frequencies if tensor.ndim != 3]
    if head_dims:
        fields["num_attention_heads"] = width // max(most_frequent(head_dims), 1)

    # relative positions: (2 n - 1)^2 offsets in a grid of n x n and three rows for CLS, by heads
    for table in _ending(placed, BIAS_TABLE):
        rows, *heads = table.shape
        side = math.isqrt(max(rows - 3, 0))
        if side % 2 and side**2 == rows - 3 and len(heads) == 1:
            fields["num_attention_heads"] = heads[0]
            grid = ((side + 1) // 2, (side + 1) // 2)

    # absolute positions: (1, N, D) on a square, or (1, rows, columns, D); others are misshapen
    positions = placed.get(POSITIONS, torch.empty(0))
    if positions.numel() and positions.ndim == 3:
        side = math.isqrt(positions.shape[1])
        grid = (side, side)
    elif positions.numel() and positions.ndim == 4:
        grid = (positions.shape[1], positions.shape[2])

    if grid is not None:
        height, width = grid[0] * patch, grid[1] * patch
        fields["image_size"] = height if height == width else [height, width]
    return fields
