"""Frozen features of a whole image set: the one pass over the images that every evaluation protocol starts from.

    from mim_refiner_hf.evaluation import extract_features
    found = extract_features(encoder, images, processor, blocks=range(encoder.config.num_hidden_layers))
    found.features            # (N, D) fp32 on the CPU: pooled raw output of the last block
    found.blocks[3]           # (N, D) the same of block 3, 0-based

The features are what the paper evaluates (MIM-Refiner, Sec. 5.2): the CLS token after the last block WITHOUT the final norm, or
what else the encoder's `config.pooling` takes. Only "global_repr" is read from the encoder's output, final norm included: CAPI's
predictor knows nothing else, and earlier blocks give the mean of the patches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..distributed import all_gather, progress_bar, rank, world_size
from ..modeling_mim_refiner import MimRefinerModel

if TYPE_CHECKING:
    from ..data import ImageDataset, Sample


@dataclass
class FeatureSet:
    """What one pass over N images gives.

    Attributes:
        features: (N, D) fp32 on the CPU, pooled raw output of the last block (for "global_repr": see above).
        blocks: the same for each requested block, keyed by its 0-based number.
        labels: (N,) int64, or None unless every image has a label.
    """

    features: Tensor
    blocks: dict[int, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None


@dataclass
class Preprocess:
    """Collates samples into (pixel_values (B, C, H, W), labels (B,)) inside the loader's workers."""

    processor: Any

    def __call__(self, samples: "Sequence[Sample]") -> tuple[Tensor, Tensor]:
        pixels: Tensor = self.processor([sample.image for sample in samples], return_tensors="pt")["pixel_values"]
        return pixels, torch.tensor([sample.label for sample in samples], dtype=torch.int64)


def check_blocks(blocks: Sequence[int], depth: int) -> list[int]:
    """`blocks` sorted and without repetition; ValueError for a block that the encoder does not have."""
    for block in blocks:
        if not 0 <= block < depth:
            raise ValueError(f"blocks has {block}, but the encoder's blocks are numbered 0 to {depth - 1}")
    return sorted(set(blocks))


def share_of(images: "ImageDataset") -> "ImageDataset":
    """The images that this process encodes: every n-th of n processes, the same number on each (the last ones may be doubled)."""
    if world_size() == 1:
        return images
    own = np.arange(rank(), rank() + math.ceil(len(images) / world_size()) * world_size(), world_size())
    return images.subset(own.clip(max=len(images) - 1))


def gathered(own: Tensor, total: int, device: torch.device) -> Tensor:
    """The rows of all processes in the data set's order, on the CPU: row i is row i // n of process i % n."""
    if world_size() == 1:
        return own
    everything = all_gather(own.to(device)).cpu()
    return everything.unflatten(0, (world_size(), -1)).transpose(0, 1).flatten(0, 1)[:total]


def extract_features(
    encoder: MimRefinerModel,
    images: "ImageDataset",
    processor: Any,
    *,
    blocks: Sequence[int] | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    desc: str = "features",
) -> FeatureSet:
    """Encode every image once, in the data set's order, without gradient and in eval mode; several processes share the work.

    Args:
        encoder: stays in the mode (training or eval) and on the device it came with.
        images: N images; decoding and `processor` run in the loader's workers.
        processor: an image processor whose output has the encoder's native size.
        blocks: 0-based blocks whose pooled raw output is kept too; only these are recorded.
        batch_size: images per forward pass.
        num_workers: processes that decode and preprocess; 0 for none beside this one.
        device: where to encode; None for where the encoder is.
        desc: text of the progress bar.

    Raises:
        ValueError: for an empty data set or a block that does not exist.
    """
    if len(images) == 0:
        raise ValueError("the data set has no images, so there is nothing to extract features from")
    depth = encoder.config.num_hidden_layers
    wanted = check_blocks(blocks or (), depth)
    recorded = sorted({*wanted, depth - 1})
    home, training = encoder.device, encoder.training
    device = torch.device(device) if device is not None else home
    loader = DataLoader(
        share_of(images),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=Preprocess(processor),
        pin_memory=device.type == "cuda",
    )
    pooled: dict[int, list[Tensor]] = {block: [] for block in recorded}
    labels: list[Tensor] = []
    encoder.train(False).to(device)
    try:
        with torch.inference_mode():
            for pixel_values, batch_labels in progress_bar(loader, hidden=rank() > 0, desc=desc, unit="batch", leave=False):
                pixel_values = pixel_values.to(device, non_blocking=True)
                outputs = encoder(pixel_values, output_hidden_states=[block + 1 for block in recorded])
                for block in recorded:
                    reads_predictor = block == depth - 1 and encoder.config.pooling == "global_repr"
                    tokens = outputs.hidden_states[block + 1]  # entry 0 is the embeddings; entries not asked for are None
                    vectors = outputs.pooler_output if reads_predictor else encoder.pool(tokens)
                    pooled[block].append(vectors.float().cpu())
                labels.append(batch_labels)
    finally:
        encoder.train(training).to(home)
    features = {block: gathered(torch.cat(batches), len(images), device) for block, batches in pooled.items()}
    all_labels = gathered(torch.cat(labels), len(images), device)
    return FeatureSet(
        features=features[depth - 1],
        blocks={block: features[block] for block in wanted},
        labels=all_labels if bool((all_labels >= 0).all()) else None,
    )


__all__ = ["FeatureSet", "extract_features"]
