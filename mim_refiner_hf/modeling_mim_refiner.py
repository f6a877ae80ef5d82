"""The encoder: one plain ViT for every masked-image-modeling family, as an ordinary transformers model.

    from transformers import AutoModel
    model = AutoModel.from_pretrained("outputs/quickstart/model")      # MimRefinerModel
    features = model(pixel_values).pooler_output                       # (batch, hidden_size), deterministic

Top to bottom: embeddings, attention, block, predictor, model, classifier, backbone; positions are in the file beside. The names
of the weights are the file's structure: `embeddings.*`, `layers.<block>.{norm1,attention,layer_scale1,norm2,mlp,layer_scale2}.*`,
`norm.*`, and for CAPI `predictor.*`. This file travels with every saved model, so it imports only transformers, torch and its
flat neighbours.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_mim_refiner import ROPE, MimRefinerConfig
from .positions_mim_refiner import (
    RelativePositionBias,
    RotaryPositions,
    patch_coordinates,
    relative_position_index,
    rotary_frequencies,
    sincos_position_table,
    token_coordinates,
)


def make_norm(config: MimRefinerConfig, affine: bool = True) -> nn.Module:
    """A norm over the width of the tokens, of the configured type; without weights if not `affine`."""
    kind = nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=affine)


class MimRefinerEmbeddings(nn.Module):
    """Pixels (B, C, H, W) to tokens (B, prefix + N, D): CLS, registers, patches; positions on the patches only."""

    def __init__(self, config: MimRefinerConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.hidden_size, config.patch_size
        self.patch_embeddings = nn.Conv2d(config.num_channels, dim, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.use_cls_token else None
        registers = config.num_register_tokens
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        num_patches = config.grid[0] * config.grid[1]
        positions = config.has_absolute_positions
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_patches, dim)) if positions else None
        self.norm = make_norm(config) if config.embedding_norm else None

    def positions(self, grid: tuple[int, int]) -> Tensor | None:
        """The position table (1, rows * columns, D) at `grid`: bicubic from the stored grid in fp32, cast back."""
        table = self.position_embeddings
        if table is None or grid == self.config.grid:
            return table
        rows, columns = self.config.grid
        image = table.float().reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
        return image.flatten(2).transpose(1, 2).to(table.dtype)

    def forward(self, pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.to(self.patch_embeddings.weight.dtype)
        patches = self.patch_embeddings(pixel_values)  # (B, D, rows, columns)
        grid = (patches.shape[2], patches.shape[3])
        tokens = patches.flatten(2).transpose(1, 2)
        if (positions := self.positions(grid)) is not None:
            tokens = tokens + positions
        batch = tokens.shape[0]  # not len(): that fixes the batch size when exporting
        prefix = [token.expand(batch, -1, -1) for token in (self.cls_token, self.register_tokens) if token is not None]
        tokens = torch.cat([*prefix, tokens], dim=1)
        return tokens if self.norm is None else self.norm(tokens)


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention written out, (B, heads, T, head_dim) each; returns the output (B, T, heads, head_dim) and the weights."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MimRefinerAttention(nn.Module):
    """Multi-head attention through transformers' attention interface (eager, sdpa, flash, flex), with any kind of positions."""

    def __init__(self, config: MimRefinerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.head_dim = dim // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(dim, dim, bias=config.bias != "none")
        self.k_proj = nn.Linear(dim, dim, bias=config.bias == "all")
        self.v_proj = nn.Linear(dim, dim, bias=config.bias != "none")
        self.o_proj = nn.Linear(dim, dim, bias=config.bias != "none")
        self.relative_position_bias = RelativePositionBias(config) if config.relative_positions == "relative" else None
        self.rope = RotaryPositions(self.head_dim) if config.position_encoding == ROPE else None

    def heads(self, tokens: Tensor) -> Tensor:
        """(B, T, D) -> (B, heads, T, head_dim)."""
        return tokens.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        index: Tensor | None = None,
        coordinates: Tensor | None = None,
        context: tuple[Tensor, Tensor | None] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if self.relative_position_bias is not None:
            attention_mask = self.relative_position_bias(grid, index)
        attended, places = (hidden_states, coordinates) if context is None else context
        query = self.heads(self.q_proj(hidden_states))
        key, value = self.heads(self.k_proj(attended)), self.heads(self.v_proj(attended))
        if self.rope is not None:
            query, key = self.rope(query, coordinates), self.rope(key, places)
        if attention_mask is not None:
            attention_mask = attention_mask.to(query.dtype)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(hidden_states.shape)), weights


class MimRefinerMLP(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, config: MimRefinerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias != "none")
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias != "none")

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (BEiT's gamma, data2vec-vision's lambda)."""

    def __init__(self, config: MimRefinerConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.weight


class MimRefinerLayer(GradientCheckpointingLayer):
    """One block: pre-norm `x + f(norm(x))` (MAE) or post-norm `norm(x + f(x))` (data2vec 2.0).

    `forward` takes tokens (B, T, D) and where they are: an `attention_mask` that holds a position bias, the `grid` and `index`
    of a bias per block, or the `coordinates` (T, 2) or (B, T, 2) of rope. With `context`, other tokens and their coordinates,
    it attends to those instead of its own.
    """

    def __init__(self, config: MimRefinerConfig) -> None:
        super().__init__()
        self.pre_norm = config.norm_placement == "pre"
        scaled = config.layer_scale_init is not None
        self.norm1 = make_norm(config)
        self.attention = MimRefinerAttention(config)
        self.layer_scale1 = LayerScale(config) if scaled else nn.Identity()
        self.norm2 = make_norm(config)
        self.mlp = MimRefinerMLP(config)
        self.layer_scale2 = LayerScale(config) if scaled else nn.Identity()

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if self.pre_norm:
            attended, _ = self.attention(self.norm1(hidden_states), **kwargs)
            hidden_states = hidden_states + self.layer_scale1(attended)
            return hidden_states + self.layer_scale2(self.mlp(self.norm2(hidden_states)))
        attended, _ = self.attention(hidden_states, **kwargs)
        hidden_states = self.norm1(hidden_states + self.layer_scale1(attended))
        return self.norm2(hidden_states + self.layer_scale2(self.mlp(hidden_states)))


class MimRefinerPredictor(nn.Module):
    """CAPI's predictor (arXiv 2502.08769): says what the encoder would see at places, by cross-attention to what it has seen."""

    def __init__(self, config: MimRefinerConfig) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.blocks = nn.ModuleList(MimRefinerLayer(config) for _ in range(config.predictor_layers))
        self.norm = make_norm(config, config.final_norm_affine)

    def forward(self, output: Tensor, coordinates: Tensor, places: Tensor, **kwargs: Any) -> Tensor:
        """The encoder's `output` (B, T, D) at `coordinates` ([B,] T, 2) -> predictions (B, N, D) at `places` ([B,] N, 2)."""
        tokens = self.mask_token.expand(output.shape[0], places.shape[-2], -1)
        for block in self.blocks:
            tokens = block(tokens, coordinates=places, context=(output, coordinates), **kwargs)
        return self.norm(tokens)


class MimRefinerPreTrainedModel(PreTrainedModel):
    """What all classes of this file share: configuration, weight initialisation, supported attention kernels."""

    config: MimRefinerConfig
    config_class = MimRefinerConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _no_split_modules = ["MimRefinerEmbeddings", "MimRefinerLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # of the encoder's blocks, not of the predictor's
        "hidden_states": OutputRecorder(MimRefinerLayer, layer_name="layers"),
        "attentions": OutputRecorder(MimRefinerAttention, index=1, layer_name="layers"),
    }
    _input_embed_layer = "patch_embeddings"

    @property
    def _supports_flash_attn(self) -> bool:  # type: ignore[override]  # flash and flex kernels take no additive bias
        return self.config.relative_positions == "none"

    @property
    def _supports_flex_attn(self) -> bool:  # type: ignore[override]
        return self.config.relative_positions == "none"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MimRefinerEmbeddings):
            for token in (module.cls_token, module.register_tokens):
                if token is not None:
                    init.trunc_normal_(token, std=std)
            if module.position_embeddings is not None and self.config.hidden_size % 4 == 0:
                init.copy_(module.position_embeddings, sincos_position_table(self.config.grid, self.config.hidden_size))
            elif module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, RelativePositionBias):
            init.trunc_normal_(module.table, std=std)
        elif isinstance(module, RotaryPositions):
            init.copy_(module.frequencies, rotary_frequencies(module.frequencies.shape[1]))
        elif isinstance(module, MimRefinerPredictor):
            init.trunc_normal_(module.mask_token, std=std)
        elif isinstance(module, LayerScale):
            init.constant_(module.weight, float(self.config.layer_scale_init or 0.0))


class MimRefinerModel(MimRefinerPreTrainedModel):
    """The encoder without any head: pixels in, tokens and one feature vector per image out."""

    def __init__(self, config: MimRefinerConfig) -> None:
        super().__init__(config)
        self.embeddings = MimRefinerEmbeddings(config)
        shared = config.relative_positions == "shared_relative"
        self.relative_position_bias = RelativePositionBias(config) if shared else None
        self.layers = nn.ModuleList(MimRefinerLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.final_norm_affine) if config.final_norm else nn.Identity()
        self.predictor = MimRefinerPredictor(config) if config.predictor_layers else None
        self.post_init()

    def pool(self, tokens: Tensor) -> Tensor:
        """One vector per image from the tokens of any block, (B, T, D) -> (B, D), as `config.pooling` says.

        "cls" and "register" take that token, "mean" the mean of the patches. So does "global_repr": the predictor was trained
        to read the encoder's output and nothing else, and what it reads there is `pooler_output`.
        """
        if self.config.pooling in ("cls", "register"):
            return tokens[:, 0 if self.config.pooling == "cls" else int(self.config.use_cls_token)]
        return tokens[:, self.config.num_prefix_tokens :].mean(dim=1)

    def drop_predictor(self) -> None:
        """Let go of the predictor, for an encoder that is trained on without it."""
        self.predictor, self.config.predictor_layers = None, 0

    def check_size(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> tuple[int, int]:
        """The patch grid of this batch, or a ValueError that says what size is expected."""
        _, channels, height, width = pixel_values.shape
        patch = self.config.patch_size
        if channels != self.config.num_channels:
            raise ValueError(f"pixel_values has {channels} channels; this model was built for {self.config.num_channels}")
        if height % patch or width % patch:
            raise ValueError(f"pixel_values is {height}x{width}; height and width must be multiples of the patch size {patch}")
        sized = self.config.position_encoding != ROPE  # rope has no table that belongs to one size
        if sized and not interpolate_pos_encoding and (height, width) != self.config.image_hw:
            raise ValueError(
                f"pixel_values is {height}x{width} but the model's native size is {'x'.join(map(str, self.config.image_hw))}; "
                "resize the image, or pass interpolate_pos_encoding=True"
            )
        return height // patch, width // patch

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode a batch of images.

        Args:
            pixel_values: normalised images (B, C, H, W).
            interpolate_pos_encoding: accept any H, W that the patch size divides, by resizing the position tables.
            kwargs: `output_hidden_states` (True, or a list of indices to record only those; entry 0 is the embeddings, entry i
                the raw output of block i - 1, before the final norm), `output_attentions` (eager only), `return_dict`.

        Returns:
            last_hidden_state (B, prefix + N, D), final norm included; pooler_output (B, D), see `config.pooling` and `config.features`.
        """
        grid = self.check_size(pixel_values, bool(interpolate_pos_encoding))
        hidden_states = self.embeddings(pixel_values)
        index = bias = coordinates = None
        if self.config.relative_positions != "none":
            index = relative_position_index(grid, hidden_states.device)
        if self.relative_position_bias is not None:
            bias = self.relative_position_bias(grid, index)
        if self.config.position_encoding == ROPE:
            coordinates = token_coordinates(patch_coordinates(grid, hidden_states.device), self.config.num_register_tokens)
        places = {"attention_mask": bias, "grid": grid, "index": index, "coordinates": coordinates}
        for layer in self.layers:
            hidden_states = layer(hidden_states, **places, **kwargs)
        output = self.norm(hidden_states)
        if self.config.pooling == "global_repr":
            assert self.predictor is not None and coordinates is not None  # the configuration asks for both
            pooled = self.predictor(output, coordinates, coordinates[self.config.num_register_tokens :], **kwargs).mean(dim=1)
        else:
            pooled = self.pool(hidden_states if self.config.features == "last_block" else output)
        return BaseModelOutputWithPooling(last_hidden_state=output, pooler_output=pooled)


class MimRefinerForImageClassification(MimRefinerPreTrainedModel):
    """The encoder with a linear classifier on `pooler_output`."""

    def __init__(self, config: MimRefinerConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.encoder = MimRefinerModel(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels) if self.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits (B, num_labels), and the loss where `labels` (B,) are given; `kwargs` as in `MimRefinerModel.forward`."""
        outputs = self.encoder(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MimRefinerBackbone(BackboneMixin, MimRefinerPreTrainedModel):
    """Feature maps of chosen blocks for dense tasks: raw block outputs, and the encoder's output for the last stage."""

    def __init__(self, config: MimRefinerConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.encoder = MimRefinerModel(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BackboneOutput:
        """`feature_maps`: one (B, D, rows, columns) per entry of `out_features`; `kwargs` as in `MimRefinerModel.forward`."""
        outputs = self.encoder(pixel_values, **kwargs)
        rows, columns = (size // self.config.patch_size for size in pixel_values.shape[2:])
        tokens = (*outputs.hidden_states[:-1], outputs.last_hidden_state)
        maps = tuple(
            tokens[self.stage_names.index(stage)][:, self.config.num_prefix_tokens :]
            .transpose(1, 2)
            .reshape(pixel_values.shape[0], -1, rows, columns)
            for stage in self.out_features
        )
        return BackboneOutput(feature_maps=maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


__all__ = [
    "MimRefinerBackbone",
    "MimRefinerForImageClassification",
    "MimRefinerLayer",
    "MimRefinerModel",
    "MimRefinerPreTrainedModel",
    "MimRefinerPredictor",
]
