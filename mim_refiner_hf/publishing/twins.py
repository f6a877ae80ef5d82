"""What all twins of an encoder share: its weights under other names, its preprocessing as a native class, settings they lack.

A twin is the same function in another library's format (`export_timm.py`, `export_native.py`, `export_onnx.py`). Each of those
modules has three functions, which `export.py` calls in this order: `refusal`, `write`, `load`.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessor

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.image_processing_mim_refiner import MimRefinerImageProcessor
from ..model.modeling_mim_refiner import MimRefinerModel

Names = Iterable[tuple[str, str]]
"""(pattern of our name, replacement) rows; every name must match one in full."""
Twin = Callable[[Tensor], Mapping[str, Tensor]]
"""A reloaded twin: pixels (B, C, H, W) -> "tokens" (B, prefix + N, D) and, where it pools, "features" (B, D)."""


def complete_state(encoder: MimRefinerModel) -> dict[str, Tensor]:
    """All weights in fp32, with a bias of zeros where a linear layer has none: the same function, in formats that want one."""
    state = {name: tensor.detach().float() for name, tensor in encoder.state_dict().items()}
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear) and module.bias is None:
            state[f"{name}.bias"] = torch.zeros(module.out_features)
    return state


def rename(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The tensors under the names of another format, contiguous; a KeyError for a tensor that it has no place for."""
    renamed = {}
    for name, tensor in state.items():
        match, target = next(
            (
                (match, target)
                for pattern, target in names
                if (match := re.fullmatch(pattern, name))
            ),
            (None, ""),
        )
        if match is None:
            raise KeyError(f"no place for {name}")
        renamed[match.expand(target)] = tensor.contiguous()
    return renamed


def unsupported(config: MimRefinerConfig) -> list[str]:
    """Settings that neither timm's nor transformers' plain ViTs have, in words."""
    lacking = [
        (
            config.norm_placement == "post",
            "norm of the sum, norm(x + f(x)) (norm_placement='post', data2vec 2.0)",
        ),
        (config.embedding_norm, "norm before the first block (embedding_norm=True)"),
        (config.norm_type != "layernorm", f"norm but a LayerNorm (norm_type={config.norm_type!r})"),
        (
            "rope" in config.position_encoding,
            f"rotary positions (position_encoding={config.position_encoding!r})",
        ),
        (
            config.final_norm and not config.final_norm_affine,
            "final norm without weights (final_norm_affine=False)",
        ),
        (
            config.features == "last_block" and config.final_norm,
            "pooling before the final norm (features='last_block')",
        ),
        (
            config.pooling not in ("cls", "mean"),
            f"pooling but of CLS or patches (pooling={config.pooling!r})",
        ),
    ]
    return [words for lacks, words in lacking if lacks]


def refused(architecture: str, lacking: list[str]) -> str | None:
    """One sentence that says what `architecture` lacks; None if it lacks nothing."""
    if not lacking:
        return None
    return f"{architecture} has no {', and no '.join(lacking)}; --to onnx takes every encoder"


def native_processor(processor: MimRefinerImageProcessor) -> CLIPImageProcessor:
    """transformers' own class for our preprocessing: shortest edge, centre crop, rescale, normalise; the same pixels.

    CLIP's is the native class with exactly our steps and backends (ViT's own resizes to a square and does not crop).
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


__all__ = [
    "Names",
    "Twin",
    "complete_state",
    "native_processor",
    "refused",
    "rename",
    "unsupported",
]
