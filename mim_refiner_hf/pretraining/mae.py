"""Masked autoencoding (MAE, arXiv 2111.06377): starting weights for a refinement, from pixels.

    accelerate launch training/pretrain.py --recipe pretrain-digits --output_dir outputs/digits-mae

    recipe = PretrainRecipe(image_size=32, patch_size=4, hidden_size=192)
    encoder = pretrain_mae(recipe, open_images("my_images/"))

Three quarters of the patches are taken away, our own encoder sees the rest, and a small decoder,
which is thrown away afterwards, predicts the normalised pixels of the missing ones. The loss is
their mean squared error.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..conversion.load import image_processor
from ..data.broken import MAX_BAD_FRACTION, BrokenImages
from ..data.images import ImageDataset
from ..data.order import BatchSampler
from ..data.views import MultiCrop, ViewDataset, normalise, view_specs
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerLayer, MimRefinerModel
from ..model.positions_mim_refiner import sincos_position_table
from ..runtime.distributed import average_gradients, progress_bar, rank, world_size
from ..runtime.launch import job_of_processes
from ..runtime.optimisation import encoder_groups, freeze, learning_rate, set_learning_rate
from ..runtime.settings import (
    Allowed,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
    ShareAboveZero,
    check_fields,
    documented,
)
from ..runtime.wording import setting

logger = logging.getLogger(__name__)

MaskRatio = Annotated[float, Allowed("between 0 and 1, both excluded", lambda ratio: 0 < ratio < 1)]


@dataclass
class PretrainRecipe:
    """Shape of the encoder and of the training; the defaults are MAE's for a ViT-B/16.

    Raises:
        ValueError: at construction, in one line: which flag, which value, what is allowed.
    """

    image_size: int = documented(224, "Side of the square input in pixels.")
    patch_size: int = documented(16, "Side of a patch; must divide image_size.")
    num_channels: int = documented(3, "3 for RGB, 1 for greyscale, 1 to 16 of arrays.")
    hidden_size: int = documented(768, "Width of the encoder; its MLPs are 4 times as wide.")
    num_hidden_layers: int = documented(12, "Blocks of the encoder.")
    num_attention_heads: int = documented(12, "Attention heads per block; must divide hidden_size.")
    decoder_size: PositiveInt = documented(512, "Width of the decoder, which is thrown away.")
    decoder_layers: PositiveInt = documented(8, "Blocks of the decoder.")
    decoder_attention_heads: PositiveInt = documented(
        16, "Attention heads per block of the decoder."
    )
    mask_ratio: MaskRatio = documented(0.75, "Share of the patches taken away.")
    scale: ShareAboveZero = documented(0.2, "Smallest share of the image's area in a crop.")
    flip: Share = documented(0.5, "Probability of a horizontal flip.")
    epochs: PositiveInt = documented(800, "Epochs.")
    warmup_epochs: NonNegativeFloat = documented(40.0, "Epochs of linear learning-rate warm-up.")
    batch_size: PositiveInt = documented(4096, "Images per update, all processes together.")
    learning_rate: PositiveFloat = documented(1.5e-4, "Base learning rate; times batch_size / 256.")
    weight_decay: NonNegativeFloat = documented(0.05, "Weight decay.")
    seed: NonNegativeInt = documented(
        0, "Weights, order, crops and masks are pure functions of it."
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"{setting('warmup_epochs', self.warmup_epochs)}: must be less than "
                f"{setting('epochs', self.epochs)}"
            )
        if self.decoder_size % 4 or self.decoder_size % self.decoder_attention_heads:
            raise ValueError(
                f"{setting('decoder_size', self.decoder_size)}: must be a multiple of 4 and of "
                f"{setting('decoder_attention_heads')}"
            )
        # contradictions of the encoder's own fields
        self.encoder_config()

    def encoder_config(self) -> MimRefinerConfig:
        """Configuration of the encoder; MLP ratio 4."""
        return MimRefinerConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=4 * self.hidden_size,
        )


class MaeDecoder(nn.Module):
    """Visible tokens back to the pixels of every patch.

    Linear, mask tokens at the gaps, a few blocks, linear.
    """

    positions: Tensor

    def __init__(self, recipe: PretrainRecipe) -> None:
        super().__init__()
        encoder = recipe.encoder_config()
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


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """Images (B, C, H, W) to patches (B, N, patch * patch * C), row by row."""
    batch, channels, height, width = pixels.shape
    grid = pixels.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def visible_tokens(
    encoder: MimRefinerModel, pixels: Tensor, noise: Tensor, mask_ratio: float
) -> tuple[Tensor, Tensor]:
    """What the encoder gets to see: CLS, registers and the patches with the smallest `noise`.

    Args:
        pixels: normalised images (B, C, H, W) of the native size.
        noise: uniform numbers (B, N), one per patch.

    Returns:
        tokens, embedded with their positions (B, prefix + visible, D), and the place of each
        patch among visible-then-masked (B, N).
    """
    prefix = encoder.config.num_prefix_tokens
    order = noise.argsort(dim=1)
    keep = int(noise.shape[1] * (1 - mask_ratio))

    tokens = encoder.embeddings(pixels)
    places = order[:, :keep, None].expand(-1, -1, tokens.shape[2])
    visible = tokens[:, prefix:].gather(1, places)
    return torch.cat([tokens[:, :prefix], visible], dim=1), order.argsort(dim=1)


def reconstruction_error(predicted: Tensor, pixels: Tensor, patch: int, masked: Tensor) -> Tensor:
    """Mean squared error on the masked patches, whose pixels are normalised per patch.

    Args:
        predicted: (B, N, p*p*C).
        pixels: normalised images (B, C, H, W).
        masked: which patches count (B, N).
    """
    target = patchify(pixels, patch)
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    normalised = (target - mean) / (variance + 1e-6).sqrt()
    error = (predicted.float() - normalised).square().mean(dim=-1)  # (B, N)
    return error[masked].mean()


def mae_loss(
    encoder: MimRefinerModel, decoder: MaeDecoder, pixels: Tensor, noise: Tensor, mask_ratio: float
) -> Tensor:
    """MAE's loss: the error of what encoder and decoder make of the visible patches.

    Args: see `visible_tokens`.
    """
    prefix = encoder.config.num_prefix_tokens
    tokens, restore = visible_tokens(encoder, pixels, noise, mask_ratio)
    masked = restore >= tokens.shape[1] - prefix
    for layer in encoder.layers:
        tokens = layer(tokens)
    predicted = decoder(encoder.norm(tokens), restore, prefix)
    return reconstruction_error(predicted, pixels, encoder.config.patch_size, masked)


def xavier_uniform(module: nn.Module) -> None:
    """Give every linear layer in `module` MAE's initial weights: Xavier-uniform, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)


def _fresh(recipe: PretrainRecipe) -> tuple[MimRefinerModel, MaeDecoder]:
    """Encoder and decoder with MAE's initial weights, a pure function of the recipe."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder = MimRefinerModel(recipe.encoder_config())
        decoder = MaeDecoder(recipe)
        xavier_uniform(encoder)
        xavier_uniform(decoder)
    return encoder, decoder


def decoder_groups(decoder: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of decoders; no weight decay on tensors of at most one dimension."""
    matrices = [parameter for parameter in decoder.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in decoder.parameters() if parameter.ndim <= 1]
    return [
        {"params": matrices, "lr_scale": 1.0, "weight_decay": weight_decay},
        {"params": vectors, "lr_scale": 1.0, "weight_decay": 0.0},
    ]


def mae_batches(
    recipe: PretrainRecipe,
    images: ImageDataset,
    processor: Any,
    device: torch.device,
    num_workers: int,
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of every batch of a training: crops (b, C, S, S) and noise (b, N).

    The crops are normalised as `processor` does.

    Raises:
        ValueError: for a batch larger than the data set; at the call, not at the first batch.
    """
    steps = recipe.epochs * (len(images) // recipe.batch_size)
    specs = view_specs(
        global_views=1,
        local_views=0,
        global_size=recipe.image_size,
        local_size=recipe.image_size,
        global_scale=(recipe.scale, 1.0),
        local_scale=(1.0, 1.0),
        colour=False,
        flip=recipe.flip,
    )
    sampler = BatchSampler(
        images,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        steps=steps,
        rank=rank(),
        world_size=world_size(),
    )
    loader = DataLoader(
        ViewDataset(images, MultiCrop(specs), recipe.seed),
        batch_sampler=sampler,
        num_workers=num_workers,
    )
    noise_shape = (recipe.batch_size, math.prod(recipe.encoder_config().grid))
    mean, std = processor.image_mean, processor.image_std

    # a generator of its own: what stands above runs at the call
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        broken = BrokenImages(images, max_bad_fraction)
        for step, batch in enumerate(loader):
            broken.add(batch["broken"])
            if step % 50 == 0 or step == steps - 1:
                broken.share()
            # drawn for all processes and cut, so their number does not change it
            generator = np.random.default_rng([recipe.seed, step])
            noise = torch.from_numpy(generator.random(noise_shape, dtype=np.float32))
            own = noise.tensor_split(world_size())[rank()].to(device)
            yield normalise(batch["global_views"][:, 0].to(device), mean, std), own

    return batches()


def pretrain_mae(
    recipe: PretrainRecipe,
    images: ImageDataset,
    accelerator: Accelerator | None = None,
    num_workers: int = 0,
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> MimRefinerModel:
    """Train an encoder on `images` from nothing; in eval mode, the same on every process.

    Raises:
        ValueError: for a batch larger than the data set, or more broken images than
            `max_bad_fraction` of all.
        FloatingPointError: for a loss that is not finite.
    """
    accelerator = accelerator or job_of_processes()
    device = accelerator.device
    per_epoch = len(images) // recipe.batch_size
    steps = recipe.epochs * per_epoch
    warmup = round(recipe.warmup_epochs * per_epoch)
    peak = recipe.learning_rate * recipe.batch_size / 256

    encoder, decoder = _fresh(recipe)
    encoder.to(device).train()
    decoder.to(device).train()
    freeze(encoder, blocks=0)
    groups = encoder_groups(encoder, 1.0, recipe.weight_decay)
    groups += decoder_groups(decoder, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)

    # the preprocessing that the model is used with afterwards
    processor = image_processor(encoder.config, {})
    batches = mae_batches(recipe, images, processor, device, num_workers, max_bad_fraction)
    hidden = not accelerator.is_main_process
    progress = progress_bar(batches, total=steps, desc="pre-training (MAE)", hidden=hidden)
    for step, (pixels, noise) in enumerate(progress):
        set_learning_rate(optimizer, learning_rate(step, warmup, steps, peak))
        with accelerator.autocast():
            loss = mae_loss(encoder, decoder, pixels, noise, recipe.mask_ratio)
        optimizer.zero_grad()
        loss.backward()
        average_gradients([*encoder.parameters(), *decoder.parameters()])
        optimizer.step()
        if step % 50 == 0:
            _check_loss(loss.item(), step)
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    _check_loss(loss.item(), steps - 1)
    logger.info("pre-trained %d steps, last loss %.3f", steps, loss.item())
    return encoder.eval().requires_grad_(True)


def _check_loss(loss: float, step: int) -> None:
    """FloatingPointError for a loss that is not finite; looked at now and then, for it stays so."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss of the pre-training is {loss} by step {step}; nothing is kept; lower its "
            "learning_rate, or train without mixed precision"
        )


__all__ = [
    "MaeDecoder",
    "PretrainRecipe",
    "decoder_groups",
    "mae_batches",
    "mae_loss",
    "patchify",
    "pretrain_mae",
    "reconstruction_error",
    "visible_tokens",
    "xavier_uniform",
]
