"""An encoder as a model that transformers has itself: a folder that loads without this package and without custom code.

    model = AutoModel.from_pretrained("out/vit")                        # ViTModel, BeitModel or Data2VecVisionModel
    processor = AutoImageProcessor.from_pretrained("out/vit")           # CLIPImageProcessor: the same pixels as ours

| encoder                                                  | class                                  | `pooler_output`             |
|----------------------------------------------------------|----------------------------------------|-----------------------------|
| absolute positions and a final norm (MAE, dBOT, DINO)    | `ViTModel`                             | CLS, by an identity pooler  |
| relative positions or layer scale, and a final norm      | `BeitModel`, `use_mean_pooling=False`  | CLS                         |
| no final norm (CrossMAE, data2vec-vision)                | `Data2VecVisionModel`                  | none: take token 0          |

The weights carry the names on the Hub (`encoder.layer.0.attention.attention.query.weight`), which transformers 4 reads as well.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModel, BeitConfig, Data2VecVisionConfig, PreTrainedConfig, ViTConfig

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.image_processing_mim_refiner import MimRefinerImageProcessor
from ..model.modeling_mim_refiner import MimRefinerModel
from .twins import Names, Twin, complete_state, native_processor, refused, rename, unsupported

LAYER, TABLE = r"layers\.(\d+)\.", "relative_position_bias_table"
NAMES: Names = (
    (r"embeddings\.cls_token", r"embeddings.cls_token"),
    (r"embeddings\.position_embeddings", r"embeddings.position_embeddings"),
    (r"embeddings\.patch_embeddings\.(weight|bias)", r"embeddings.patch_embeddings.projection.\1"),
    (LAYER + r"attention\.q_proj\.(weight|bias)", r"encoder.layer.\1.attention.attention.query.\2"),
    (LAYER + r"attention\.k_proj\.(weight|bias)", r"encoder.layer.\1.attention.attention.key.\2"),
    (LAYER + r"attention\.v_proj\.(weight|bias)", r"encoder.layer.\1.attention.attention.value.\2"),
    (LAYER + r"attention\.o_proj\.(weight|bias)", r"encoder.layer.\1.attention.output.dense.\2"),
    (LAYER + r"norm1\.(weight|bias)", r"encoder.layer.\1.layernorm_before.\2"),
    (LAYER + r"norm2\.(weight|bias)", r"encoder.layer.\1.layernorm_after.\2"),
    (LAYER + r"mlp\.fc1\.(weight|bias)", r"encoder.layer.\1.intermediate.dense.\2"),
    (LAYER + r"mlp\.fc2\.(weight|bias)", r"encoder.layer.\1.output.dense.\2"),
    (LAYER + r"layer_scale([12])\.weight", r"encoder.layer.\1.lambda_\2"),
    (
        LAYER + r"attention\.relative_position_bias\.table",
        rf"encoder.layer.\1.attention.attention.relative_position_bias.{TABLE}",
    ),
    (r"relative_position_bias\.table", rf"encoder.relative_position_bias.{TABLE}"),
    (r"norm\.(weight|bias)", r"layernorm.\1"),
    (r"(pooler\.dense\.(?:weight|bias))", r"\1"),
)


def is_plain_vit(config: MimRefinerConfig) -> bool:
    """Whether `ViTModel` is meant, and not BEiT's kin."""
    return (
        config.position_encoding == "absolute"
        and config.final_norm
        and config.layer_scale_init is None
    )


def refusal(config: MimRefinerConfig) -> str | None:
    """Why transformers has no such encoder, or None."""
    lacking = unsupported(config)
    if not config.use_cls_token:
        lacking.append("way to leave out the CLS token (use_cls_token=False)")
    elif config.pooling == "mean":
        lacking.append("mean of the normalised patches (pooling='mean')")
    if config.num_register_tokens:
        lacking.append(f"registers (num_register_tokens={config.num_register_tokens})")
    if is_plain_vit(config):
        return refused("transformers' ViTModel", lacking)
    if config.grid[0] != config.grid[1]:
        lacking.append(f"grid but a square one (image_size={config.image_size})")
    return refused("transformers' BeitModel", lacking)


def native_config(config: MimRefinerConfig) -> PreTrainedConfig:
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
    if is_plain_vit(config):
        return ViTConfig(**shape, pooler_act="linear", architectures=["ViTModel"])
    native = BeitConfig if config.final_norm else Data2VecVisionConfig
    return native(
        **shape,
        use_absolute_position_embeddings=config.has_absolute_positions,
        use_relative_position_bias=config.relative_positions == "relative",
        use_shared_relative_position_bias=config.relative_positions == "shared_relative",
        layer_scale_init_value=0.0
        if config.layer_scale_init is None
        else float(config.layer_scale_init or 1.0),  # 0: none
        use_mean_pooling=not config.final_norm,  # the switch of the final norm in these two
        drop_path_rate=0.0,
        architectures=["BeitModel" if config.final_norm else "Data2VecVisionModel"],
    )


def write(folder: Path, encoder: MimRefinerModel, processor: MimRefinerImageProcessor) -> None:
    """Write `config.json`, `model.safetensors` (fp32) and `preprocessor_config.json`, all of native classes."""
    config, state = encoder.config, complete_state(encoder)
    if (
        positions := state.get("embeddings.position_embeddings")
    ) is not None:  # ours is folded into the CLS token
        state["embeddings.position_embeddings"] = torch.cat(
            [positions.new_zeros(1, 1, config.hidden_size), positions], dim=1
        )
    if is_plain_vit(
        config
    ):  # AutoModel always builds a pooler, random if the file has none: x I + 0 is the CLS token
        state |= {
            "pooler.dense.weight": torch.eye(config.hidden_size),
            "pooler.dense.bias": torch.zeros(config.hidden_size),
        }
    else:  # a key bias adds q.b to all scores of a query: softmax does not see it, and BEiT has none
        for block in range(config.num_hidden_layers):
            del state[f"layers.{block}.attention.k_proj.bias"]
    save_file(rename(state, NAMES), folder / "model.safetensors", metadata={"format": "pt"})
    native_config(config).save_pretrained(folder)
    native_processor(processor).save_pretrained(folder)


def load(folder: Path) -> dict[str, Twin]:
    """The folder as `AutoModel` loads it; a ValueError if a tensor is missing or left over."""
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    if any(info.values()):
        raise ValueError(f"transformers does not place every tensor: {info}")

    def twin(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        output = model(pixels)
        pooled = output.pooler_output
        return {"tokens": output.last_hidden_state} | (
            {} if pooled is None else {"features": pooled}
        )

    return {"AutoModel": twin}


__all__ = ["load", "refusal", "write"]
