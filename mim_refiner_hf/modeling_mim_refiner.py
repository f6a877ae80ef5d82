"""The encoder: one plain ViT for every masked-image-modeling family, as an ordinary transformers model.

    from transformers import AutoModel
    model = AutoModel.from_pretrained("outputs/quickstart/model")      # MimRefinerModel
    features = model(pixel_values).pooler_output                       # (batch, hidden_size), deterministic

Top to bottom: embeddings, attention, block, model, classifier, backbone. The names of the weights are the file's structure:
`embeddings.*`, `layers.<block>.{norm1,attention,layer_scale1,norm2,mlp,layer_scale2}.*`, `norm.*`. This file travels with every
saved model, so it imports only transformers, torch and the configuration beside it.
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
from transformers.utils.output_capturing import capture_outputs

from .configuration_mim_refiner import MimRefinerConfig


def sincos_position_table(grid: tuple[int, int], dim: int) -> Tensor:
    """MAE's fixed 2-D sine-cosine positions, (1, rows * columns, dim); `dim` must be a multiple of 4 (arXiv 2111.06377)."""
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    halves = []
    for axis in (columns, rows):  # MAE puts the width first
        angles = axis.reshape(-1, 1).double() * omega
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float().unsqueeze(0)


def relative_position_index(grid: tuple[int, int], device: torch.device) -> Tensor:
    """BEiT's row of the bias table for every (query, key), (1 + N, 1 + N): patch offsets, then CLS->patch, patch->CLS, CLS->CLS."""
    rows, columns = grid
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    patches = (row[:, None] - row + rows - 1) * (2 * columns - 1) + (column[:, None] - column + columns - 1)  # (N, N)
    offsets = (2 * rows - 1) * (2 * columns - 1)
    top = F.pad(torch.full_like(patches[:1], offsets), (1, 0), value=offsets + 2)
    return torch.cat([top, F.pad(patches, (1, 0), value=offsets + 1)])


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
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps) if config.embedding_norm else None

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


class RelativePositionBias(nn.Module):
    """BEiT's learned attention bias: `table` ((2 rows - 1)(2 columns - 1) + 3, heads), the last three rows for CLS."""

    def __init__(self, config: MimRefinerConfig) -> None:
        super().__init__()
        self.config = config
        rows, columns = config.grid
        self.table = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * columns - 1) + 3, config.num_attention_heads))

    def forward(self, grid: tuple[int, int], index: Tensor) -> Tensor:
        """The bias (1, heads, T, T) at `grid`; other grids than the stored one get the table resized bilinearly, as in BEiT."""
        table: Tensor = self.table
        if grid != self.config.grid:
            rows, columns = (2 * n - 1 for n in self.config.grid)
            offsets = table[:-3].reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
            offsets = F.interpolate(offsets, size=(2 * grid[0] - 1, 2 * grid[1] - 1), mode="bilinear", align_corners=False)
            table = torch.cat([offsets.flatten(2)[0].T, table[-3:]])
        start = 0 if self.config.use_cls_token else 1
        bias = table[index[start:, start:]].permute(2, 0, 1)  # (heads, T, T) without registers
        registers, cls = self.config.num_register_tokens, int(self.config.use_cls_token)
        if registers:  # registers have no place on the grid: no bias from or to them
            bias = torch.cat([bias[:, :cls], bias.new_zeros(bias.shape[0], registers, bias.shape[2]), bias[:, cls:]], dim=1)
            bias = torch.cat([bias[..., :cls], bias.new_zeros(*bias.shape[:2], registers), bias[..., cls:]], dim=2)
        return bias.unsqueeze(0)


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
    """Multi-head self-attention through transformers' attention interface (eager, sdpa, flash, flex)."""

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

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        grid: tuple[int, int] | None,
        index: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if self.relative_position_bias is not None:
            attention_mask = self.relative_position_bias(grid, index)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
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
    """One block: pre-norm `x + f(norm(x))` (MAE) or post-norm `norm(x + f(x))` (data2vec 2.0)."""

    def __init__(self, config: MimRefinerConfig) -> None:
        super().__init__()
        self.pre_norm = config.norm_placement == "pre"
        scaled = config.layer_scale_init is not None
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = MimRefinerAttention(config)
        self.layer_scale1 = LayerScale(config) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MimRefinerMLP(config)
        self.layer_scale2 = LayerScale(config) if scaled else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        index: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if self.pre_norm:
            attended, _ = self.attention(self.norm1(hidden_states), attention_mask, grid, index, **kwargs)
            hidden_states = hidden_states + self.layer_scale1(attended)
            return hidden_states + self.layer_scale2(self.mlp(self.norm2(hidden_states)))
        attended, _ = self.attention(hidden_states, attention_mask, grid, index, **kwargs)
        hidden_states = self.norm1(hidden_states + self.layer_scale1(attended))
        return self.norm2(hidden_states + self.layer_scale2(self.mlp(hidden_states)))


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
    _can_record_outputs = {"hidden_states": MimRefinerLayer, "attentions": MimRefinerAttention}
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
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_norm else nn.Identity()
        self.post_init()

    def pool(self, tokens: Tensor) -> Tensor:
        """One vector per image, (B, T, D) -> (B, D): the CLS token, or the mean of the patches (`config.pooling`)."""
        if self.config.pooling == "cls":
            return tokens[:, 0]
        return tokens[:, self.config.num_prefix_tokens :].mean(dim=1)

    def check_size(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> tuple[int, int]:
        """The patch grid of this batch, or a ValueError that says what size is expected."""
        _, channels, height, width = pixel_values.shape
        patch = self.config.patch_size
        if channels != self.config.num_channels:
            raise ValueError(f"pixel_values has {channels} channels; this model was built for {self.config.num_channels}")
        if height % patch or width % patch:
            raise ValueError(f"pixel_values is {height}x{width}; height and width must be multiples of the patch size {patch}")
        if not interpolate_pos_encoding and (height, width) != self.config.image_hw:
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
        index = bias = None
        if self.config.relative_positions != "none":
            index = relative_position_index(grid, hidden_states.device)
        if self.relative_position_bias is not None:
            bias = self.relative_position_bias(grid, index)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=bias, grid=grid, index=index, **kwargs)
        output = self.norm(hidden_states)
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


__all__ = ["MimRefinerBackbone", "MimRefinerForImageClassification", "MimRefinerModel", "MimRefinerPreTrainedModel"]
