"""An encoder as a model that transformers has itself: loads without this package and custom code.

    model = AutoModel.from_pretrained("out/vit")                   # a class of the table below
    processor = AutoImageProcessor.from_pretrained("out/vit")      # CLIPImageProcessor, same pixels

| encoder                                              | class                 | `pooler_output`   |
|------------------------------------------------------|-----------------------|-------------------|
| absolute positions and a final norm (MAE, DINO)      | `ViTModel`            | CLS, by an        |
|                                                      |                       | identity pooler   |
| relative positions or layer scale, and a final norm  | `BeitModel`,          | CLS               |
|                                                      | no mean pooling       |                   |
| no final norm (CrossMAE, data2vec-vision)            | `Data2VecVisionModel` | none: token 0     |

The weights carry the names on the Hub (`encoder.layer.0.attention.attention.query.weight`), which
transformers 4 reads as well.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModel, BeitConfig, Data2VecVisionConfig, PreTrainedConfig, ViTConfig

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.image_processing_mim_refiner import MimRefinerImageProcessor
from ..model.modeling_mim_refiner import MimRefinerModel
from .twins import (
    Names,
    Twin,
    add_cls_position,
    complete_state,
    layer_scale_value,
    native_processor,
    refused,
    rename,
    unsupported,
)

_OURS = r"layers\.(\d+)\."
_TABLE = "relative_position_bias_table"
_NATIVE_NAMES: Names = (
    (r"embeddings\.cls_token", r"embeddings.cls_token"),
    (r"embeddings\.position_embeddings", r"embeddings.position_embeddings"),
    (r"embeddings\.patch_embeddings\.(weight|bias)", r"embeddings.patch_embeddings.projection.\1"),
    (
        _OURS + r"attention\.q_proj\.(weight|bias)",
        r"encoder.layer.\1.attention.attention.query.\2",
    ),
    (_OURS + r"attention\.k_proj\.(weight|bias)", r"encoder.layer.\1.attention.attention.key.\2"),
    (
        _OURS + r"attention\.v_proj\.(weight|bias)",
        r"encoder.layer.\1.attention.attention.value.\2",
    ),
    (_OURS + r"attention\.o_proj\.(weight|bias)", r"encoder.layer.\1.attention.output.dense.\2"),
    (_OURS + r"norm1\.(weight|bias)", r"encoder.layer.\1.layernorm_before.\2"),
    (_OURS + r"norm2\.(weight|bias)", r"encoder.layer.\1.layernorm_after.\2"),
    (_OURS + r"mlp\.fc1\.(weight|bias)", r"encoder.layer.\1.intermediate.dense.\2"),
    (_OURS + r"mlp\.fc2\.(weight|bias)", r"encoder.layer.\1.output.dense.\2"),
    (_OURS + r"layer_scale([12])\.weight", r"encoder.layer.\1.lambda_\2"),
    (
        _OURS + r"attention\.relative_position_bias\.table",
        rf"encoder.layer.\1.attention.attention.relative_position_bias.{_TABLE}",
    ),
    (r"relative_position_bias\.table", rf"encoder.relative_position_bias.{_TABLE}"),
    (r"norm\.(weight|bias)", r"layernorm.\1"),
    (r"(pooler\.dense\.(?:weight|bias))", r"\1"),
)


def _is_plain_vit(config: MimRefinerConfig) -> bool:
    """Whether `ViTModel` is meant, and not BEiT's kin."""
    is_absolute = config.position_encoding == "absolute"
    return is_absolute and config.final_norm and config.layer_scale_init is None


def refusal(config: MimRefinerConfig) -> str | None:
    """Why transformers has no such encoder, or None."""
    lacking = unsupported(config)
    if not config.use_cls_token:
        lacking.append("way to leave out the CLS token (use_cls_token=False)")
    elif config.pooling == "mean":
        lacking.append("mean of the normalised patches (pooling='mean')")
    if config.num_register_tokens:
        lacking.append(f"registers (num_register_tokens={config.num_register_tokens})")

    if _is_plain_vit(config):
        return refused("transformers' ViTModel", lacking)
    if config.grid[0] != config.grid[1]:
        lacking.append(f"grid but a square one (image_size={config.image_size})")
    return refused("transformers' BeitModel", lacking)


def _native_config(config: MimRefinerConfig) -> PreTrainedConfig:
    """The configuration of the native class that computes the same."""
    shape: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "initializer_range": config.initializer_range,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        "dtype": "float32",
    }
    if _is_plain_vit(config):
        return ViTConfig(**shape, pooler_act="linear", architectures=["ViTModel"])

    # `use_mean_pooling` is the switch of the final norm in these two
    native = BeitConfig if config.final_norm else Data2VecVisionConfig
    return native(
        **shape,
        use_absolute_position_embeddings=config.has_absolute_positions,
        use_relative_position_bias=config.relative_positions == "relative",
        use_shared_relative_position_bias=config.relative_positions == "shared_relative",
        layer_scale_init_value=layer_scale_value(config.layer_scale_init),
        use_mean_pooling=not config.final_norm,
        drop_path_rate=0.0,
        architectures=["BeitModel" if config.final_norm else "Data2VecVisionModel"],
    )


def write(folder: Path, encoder: MimRefinerModel, processor: MimRefinerImageProcessor) -> None:
    """Write `config.json`, `model.safetensors` and `preprocessor_config.json` of native classes."""
    config = encoder.config
    state = complete_state(encoder)
    add_cls_position(state)
    if _is_plain_vit(config):
        # AutoModel always builds a pooler, random if the file has none: x I + 0 is the CLS token
        state["pooler.dense.weight"] = torch.eye(config.hidden_size)
        state["pooler.dense.bias"] = torch.zeros(config.hidden_size)
    else:
        # BEiT has no key bias; it adds q.b to all scores of a query, which softmax does not see
        for block in range(config.num_hidden_layers):
            del state[f"layers.{block}.attention.k_proj.bias"]

    weights = rename(state, _NATIVE_NAMES)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _native_config(config).save_pretrained(folder)
    native_processor(processor).save_pretrained(folder)


def load(folder: Path) -> dict[str, Twin]:
    """The folder as `AutoModel` loads it; a ValueError if a tensor is missing or left over."""
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    if any(info.values()):
        raise ValueError(f"transformers does not place every tensor: {info}")

    def twin(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        output = model(pixels)
        outputs = {"tokens": output.last_hidden_state}
        if output.pooler_output is not None:
            outputs["features"] = output.pooler_output
        return outputs

    return {"AutoModel": twin}
