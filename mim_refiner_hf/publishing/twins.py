"""What all twins of an encoder share.

A twin is the same function in another library's format (`export_timm.py`, `export_native.py`,
`export_onnx.py`). Each of those modules has three functions, which `export.py` calls in this order:
`refusal`, `write`, `load`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessor

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.image_processing_mim_refiner import MimRefinerImageProcessor
from ..model.modeling_mim_refiner import MimRefinerModel
from .choices import EXPORT_FORMATS

Names = Iterable[tuple[str, str]]
"""(pattern of our name, replacement) rows; every name must match one in full."""
Twin = Callable[[Tensor], Mapping[str, Tensor]]
"""A reloaded twin: pixels (B, C, H, W) -> "tokens" (B, T, D) and, where it pools, "features"."""

# fields that are True or False, in words
_NORMS_AND_GATES = {
    "gated_mlp": "gated MLP",
    "mlp_norm": "norm inside the MLP",
    "attention_norm": "norm before the projection of the attention",
    "query_key_norm": "norms of queries and keys",
    "patch_norm": "norm of the patches before their positions",
    "pooled_norm": "norm of the pooled vector",
}


def module_of(to: str) -> Any:
    """The module of one of `EXPORT_FORMATS`."""
    return import_module(f".{EXPORT_FORMATS[to]}", __package__)


def why_not_exported(config: MimRefinerConfig, to: str) -> str | None:
    """Why an encoder cannot be exported to one of `EXPORT_FORMATS`, in a sentence, or None."""
    reason: str | None = module_of(to).refusal(config)
    return reason


def complete_state(encoder: MimRefinerModel) -> dict[str, Tensor]:
    """All weights in fp32, a bias of zeros where a layer has none.

    The function is the same, in formats that want a bias.
    """
    state = {name: tensor.detach().float() for name, tensor in encoder.state_dict().items()}
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is None:
            state[f"{name}.bias"] = torch.zeros(len(module.weight))
    return state


def add_cls_position(state: dict[str, Tensor]) -> None:
    """Put a row of zeros for CLS before the positions, where there are any; in place.

    Ours is folded into the CLS token.
    """
    name = "embeddings.position_embeddings"
    positions = state.get(name)  # (1, N, D)
    if positions is not None:
        row = positions.new_zeros(1, 1, positions.shape[2])
        state[name] = torch.cat([row, positions], dim=1)


def rename(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The tensors under the names of another format; KeyError for one that has no place in it."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, target in names:
            match = re.fullmatch(pattern, name)
            if match:
                renamed[match.expand(target)] = tensor.contiguous()
                break
        else:
            raise KeyError(f"no place for {name}")
    return renamed


def layer_scale_value(layer_scale_init: float | None) -> float:
    """Our setting in timm's and BEiT's words, where 0 says that there is no layer scale."""
    if layer_scale_init is None:
        return 0.0
    return float(layer_scale_init or 1.0)


def unsupported(config: MimRefinerConfig, beside: Collection[str] = ()) -> list[str]:
    """Settings that neither timm's nor transformers' plain ViTs have, in words.

    Args:
        beside: what a class has beyond a plain ViT: fields of the configuration, "rope", and
            "branch" for norms at the ends of branches.
    """
    lacking: dict[str, str] = {}
    if config.norm_placement == "post":
        lacking["norm_placement"] = (
            "norm of the sum, norm(x + f(x)) (norm_placement='post', data2vec 2.0)"
        )
    if config.norm_placement == "branch":
        lacking["branch"] = "norm at the end of a branch, x + norm(f(x)) (norm_placement='branch')"

    if config.embedding_norm:
        lacking["embedding_norm"] = "norm before the first block (embedding_norm=True)"
    if config.norm_type != "layernorm":
        lacking["norm_type"] = f"norm but a LayerNorm (norm_type={config.norm_type!r})"

    if config.has_rope:
        lacking["rope"] = f"rotary positions (position_encoding={config.position_encoding!r})"
    if config.position_encoding == "sincos":
        lacking["sincos"] = "computed table of positions (position_encoding='sincos')"

    for name, words in _NORMS_AND_GATES.items():
        if getattr(config, name):
            lacking[name] = f"{words} ({name}=True)"

    if config.final_norm and not config.final_norm_affine:
        lacking["final_norm_affine"] = "final norm without weights (final_norm_affine=False)"
    if config.features == "last_block" and config.final_norm:
        lacking["features"] = "pooling before the final norm (features='last_block')"

    if config.erased_directions:
        lacking["erased_directions"] = (
            f"eraser behind the last block (erased_directions={config.erased_directions}, of "
            "--forget)"
        )

    if config.pooling not in ("cls", "mean"):
        lacking["pooling"] = f"pooling but of CLS or patches (pooling={config.pooling!r})"
    elif config.pooling_head != "none":
        lacking["pooling"] = f"attention pooling (pooling_head={config.pooling_head!r})"
    return [words for name, words in lacking.items() if name not in beside]


def refused(architecture: str, lacking: list[str]) -> str | None:
    """One sentence that says what `architecture` lacks; None if it lacks nothing."""
    if not lacking:
        return None
    return f"{architecture} has no {', and no '.join(lacking)}; --to onnx takes every encoder"


def native_processor(processor: MimRefinerImageProcessor) -> CLIPImageProcessor:
    """transformers' own class for our preprocessing, with the same pixels.

    Shortest edge, centre crop, rescale, normalise: CLIP's is the native class with exactly these
    steps and our backends (ViT's own resizes to a square and does not crop).
    """
    settings = processor.to_dict()
    fields = (
        "size",
        "crop_size",
        "image_mean",
        "image_std",
        "resample",
        "do_convert_rgb",
        "do_resize",
        "do_center_crop",
    )
    return CLIPImageProcessor(**{name: settings[name] for name in fields})
