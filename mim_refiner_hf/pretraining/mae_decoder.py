"""The decoder of MAE, which is thrown away: visible tokens back to the pixels of every patch.

decoder = MaeDecoder(recipe, encoder.config)
xavier_uniform(decoder)
pixels = decoder(tokens, restore, prefix=1)        # (B, N, p * p * C)
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerLayer
from ..model.positions_mim_refiner import sincos_position_table
from ..runtime.optimisation import parameter_groups
from .recipe import PretrainRecipe


class MaeDecoder(nn.Module):
    """Visible tokens back to the pixels of every patch.

    Linear, mask tokens at the gaps, a few blocks, linear.
    """

    positions: Tensor

    def __init__(self, recipe: PretrainRecipe, encoder: MimRefinerConfig | None = None) -> None:
        super().__init__()
        encoder = encoder or recipe.encoder_config()
        dim = recipe.decoder_size
        config = MimRefinerConfig(
            image_size=encoder.image_size,
            patch_size=encoder.patch_size,
            hidden_size=dim,
            num_hidden_layers=recipe.decoder_layers,
            num_attention_heads=recipe.decoder_attention_heads,
            intermediate_size=4 * dim,
        )
        config._attn_implementation = "sdpa"

        self.embed = nn.Linear(encoder.hidden_size, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.register_buffer("positions", sincos_position_table(config.grid, dim), persistent=False)
        self.layers = nn.ModuleList(MimRefinerLayer(config) for _ in range(recipe.decoder_layers))
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.predict = nn.Linear(dim, encoder.patch_size**2 * encoder.num_channels)

    def forward(self, tokens: Tensor, restore: Tensor, prefix: int) -> Tensor:
        """The pixels of every patch (B, N, p*p*C).

        Args:
            tokens: CLS, registers and visible patches (B, prefix + visible, D).
            restore: place of each patch among visible-then-masked (B, N).
            prefix: how many tokens are no patches.
        """
        tokens = self.embed(tokens)
        visible = tokens[:, prefix:]

        # mask tokens behind the visible patches, then all back to their places in the image
        gaps = self.mask_token.expand(len(tokens), restore.shape[1] - visible.shape[1], -1)
        patches = torch.cat([visible, gaps.to(visible.dtype)], dim=1)
        places = restore.unsqueeze(-1).expand(-1, -1, tokens.shape[2])
        patches = patches.gather(1, places)

        tokens = torch.cat([tokens[:, :prefix], patches + self.positions], dim=1)
        for layer in self.layers:
            tokens = layer(tokens)
        pixels: Tensor = self.predict(self.norm(tokens))[:, prefix:]
        return pixels


def xavier_uniform(module: nn.Module) -> None:
    """Give every linear layer in `module` MAE's initial weights: Xavier-uniform, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)


def decoder_groups(decoder: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of decoders; no weight decay on tensors of at most one dimension."""
    rows = []
    for name, parameter in decoder.named_parameters():
        rows.append((name, parameter, 1.0, weight_decay if parameter.ndim > 1 else 0.0))
    return parameter_groups(rows)
