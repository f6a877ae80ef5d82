"""How well each block of a frozen encoder reconstructs: a small MAE decoder per block.

    losses = reconstruction_losses(encoder, processor, train_images, eval_images)
    losses[11]        # of block 11; lower is better

The paper's analysis (MIM-Refiner, App. C.2, Fig. 6): decoders of two blocks, MAE's objective, 20
epochs of which 5 are warm-up, the encoder fully frozen. All decoders start from the same weights
and see the same crops and masks, so that what differs is the block they read: its raw output,
layer-normalised without weights, because blocks differ in scale and only the last has a norm. The
losses are those of short training on few images; compare them with each other, not with a
pre-training's.
"""

import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.batches import batches_of_views
from ..data.broken import BrokenImages
from ..data.loading import ImageProcessor
from ..data.views import normalise
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..pretraining.mae import reconstruction_error, visible_tokens
from ..pretraining.mae_decoder import MaeDecoder, decoder_groups, xavier_uniform
from ..pretraining.masks import mae_noise
from ..pretraining.objective import plain_crop
from ..pretraining.recipe import PretrainRecipe
from ..runtime.distributed import average_gradients, progress_bar, rank
from ..runtime.optimisation import learning_rate, set_learning_rate
from .features import Preprocess

if TYPE_CHECKING:
    from ..data.images import ImageDataset

# MAE's is 2.4e-3 at its batch of 4096
PEAK_LEARNING_RATE = 1e-3


def decoder_recipe(
    config: MimRefinerConfig, *, epochs: int, batch_size: int, flip: float, seed: int
) -> PretrainRecipe:
    """The decoders' shape and training.

    Two blocks, about half as wide as the encoder (MAE's 512 at most), in heads of 32.

    Raises:
        ValueError: for an encoder that cannot leave patches out, or whose native size is not a
            square.
    """
    if config.position_encoding != "absolute":
        raise ValueError(
            "the reconstruction loss needs absolute positions, which masked patches can be left "
            f"out of; this encoder's are {config.position_encoding}; leave the reconstruction out"
        )
    height, width = config.image_hw
    if height != width:
        raise ValueError(
            f"the reconstruction loss needs a square native size, not {height}x{width}; leave it "
            "out"
        )

    heads = max(1, min(16, config.hidden_size // 64))
    return PretrainRecipe(
        image_size=height,
        patch_size=config.patch_size,
        num_channels=config.num_channels,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        decoder_size=32 * heads,
        decoder_layers=2,
        decoder_attention_heads=heads,
        flip=flip,
        epochs=epochs,
        warmup_epochs=epochs / 4,
        batch_size=batch_size,
        seed=seed,
    )


def block_errors(
    encoder: MimRefinerModel,
    decoders: nn.ModuleList,
    pixels: Tensor,
    noise: Tensor,
    mask_ratio: float,
) -> Iterator[Tensor]:
    """The reconstruction error of every block's decoder in turn; arguments as in `mae_loss`.

    One at a time, so that backward passes in between leave the memory of one decoder's graph.
    """
    prefix = encoder.config.num_prefix_tokens
    patch = encoder.config.patch_size
    with torch.no_grad():
        tokens, _, restore = visible_tokens(encoder, pixels, noise, mask_ratio)
    masked = restore >= tokens.shape[1] - prefix

    for layer, decoder in zip(encoder.layers, decoders, strict=True):
        with torch.no_grad():
            tokens = layer(tokens)
        predicted = decoder(F.layer_norm(tokens, tokens.shape[-1:]), restore, prefix)
        yield reconstruction_error(predicted, pixels, patch, masked)


def train_decoders(
    encoder: MimRefinerModel,
    processor: ImageProcessor,
    images: "ImageDataset",
    recipe: PretrainRecipe,
    num_workers: int,
) -> nn.ModuleList:
    """One trained decoder per block, in eval mode.

    Several processes share the batches and end with the same weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        first = MaeDecoder(recipe)
        xavier_uniform(first)
    decoders = nn.ModuleList(copy.deepcopy(first) for _ in encoder.layers).to(encoder.device)

    groups = decoder_groups(decoders, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    _, warmup, total = recipe.steps(len(images))
    patches = math.prod(encoder.config.grid)

    batches = batches_of_views(
        images,
        plain_crop(recipe),
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        stop_step=total,
        num_workers=num_workers,
    )
    progress = progress_bar(
        batches, total=total, desc="decoders of all blocks", hidden=rank() > 0, leave=False
    )
    broken = BrokenImages(images)
    for step, batch in enumerate(progress):
        broken.add(batch["broken"])
        if step % 50 == 0 or step == total - 1:
            broken.share()
        views = batch["global_views"][:, 0].to(encoder.device)
        pixels = normalise(views, processor.image_mean, processor.image_std)
        noise = mae_noise(recipe.seed, step, recipe.batch_size, patches).to(encoder.device)

        set_learning_rate(optimizer, learning_rate(step, warmup, total, PEAK_LEARNING_RATE))
        optimizer.zero_grad()
        for error in block_errors(encoder, decoders, pixels, noise, recipe.mask_ratio):
            error.backward()
        average_gradients(decoders.parameters())
        optimizer.step()
    return decoders.eval()


@torch.no_grad()
def mean_errors(
    encoder: MimRefinerModel,
    decoders: nn.ModuleList,
    processor: ImageProcessor,
    images: "ImageDataset",
    recipe: PretrainRecipe,
) -> list[float]:
    """The error of every block on all `images`, under one fixed random mask per image."""
    loader = DataLoader(images, batch_size=recipe.batch_size, collate_fn=Preprocess(processor))
    generator = np.random.default_rng(recipe.seed)
    num_patches = math.prod(encoder.config.grid)

    total = torch.zeros(len(decoders), dtype=torch.float64)
    for pixels, _ in loader:
        drawn = generator.random((len(pixels), num_patches), dtype=np.float32)
        noise = torch.from_numpy(drawn).to(encoder.device)
        pixels = pixels.to(encoder.device)
        errors = list(block_errors(encoder, decoders, pixels, noise, recipe.mask_ratio))
        total += len(pixels) * torch.stack(errors).double().cpu()
    return (total / len(images)).tolist()


def reconstruction_losses(
    encoder: MimRefinerModel,
    processor: ImageProcessor,
    train_images: "ImageDataset",
    eval_images: "ImageDataset",
    *,
    epochs: int = 20,
    batch_size: int = 32,
    flip: float = 0.5,
    seed: int = 0,
    num_workers: int = 0,
) -> list[float]:
    """Mean squared error of normalised pixels of masked patches, per block (lower is better).

    Args:
        encoder: comes back in the mode it came with; computes where it is.
        processor: its image processor.
        train_images: what the decoders are trained on, in random resized crops.
        eval_images: what the errors are measured on.
        epochs: of training, a quarter of them warm-up.
        batch_size: images per update, all processes together; small, so that few images still
            make some hundred updates.
        flip: probability of a horizontal flip in training.
        seed: of weights, order, crops and masks.
        num_workers: processes that decode and crop.

    Raises:
        ValueError: for an encoder without plain absolute positions or of a size that is not
            square, for a batch larger than the data set, and for no epochs.
    """
    recipe = decoder_recipe(
        encoder.config, epochs=epochs, batch_size=batch_size, flip=flip, seed=seed
    )
    training = encoder.training
    encoder.eval()
    try:
        decoders = train_decoders(encoder, processor, train_images, recipe, num_workers)
        return mean_errors(encoder, decoders, processor, eval_images, recipe)
    finally:
        encoder.train(training)
