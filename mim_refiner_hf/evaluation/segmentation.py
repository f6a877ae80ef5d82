"""Segmentation probe: a linear layer on the patches of the frozen encoder says the class of every pixel (MIM-Refiner, C.7).

    mim-refiner evaluate MODEL --dataset camvid/ --eval_split test --protocols segmentation
    train, test = (open_segmentation("camvid/", split=split) for split in ("train", "test"))
    result = segmentation_probe(encoder=encoder, processor=processor, train_images=train, eval_images=test)
    result.scores["segmentation_miou"]           # 31.0 % ± 0.7   (learning rate 0.1; raw blocks 23, 19, 15, 11; 95 % 29.6-32.4 %)

The input keeps the encoder's native size. A patch is known by the raw outputs of the last, 5th last, 9th last and 13th last blocks side
by side (L, L-4, L-8, L-12; those that exist), standardised channel by channel. The patches' logits are upsampled bilinearly to the input,
where the cross-entropy is taken over all pixels that are not void. Training images are random crops (scale 0.25-1) and flips; evaluation
images are cropped in the centre to the input's shape. Neither several crops nor several scales are averaged.

Trained by SGD with momentum 0.9, batch 16, cosine to zero, nine learning rates at once on the same features; the best on the evaluation
images is reported, as in linear probing. mIoU is the mean over classes of intersection / union, counted over all pixels of all images.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.loading import Loading
from ..data.order import epoch_order
from ..data.views import normalise
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import progress_bar, rank
from ..runtime.seeding import random_generator
from .classifier_grid import ClassifierGrid
from .features import frozen
from .scores import ProtocolResult, Score
from .segmentation_data import VOID, Crops, SegmentationDataset

LEARNING_RATES = (
    1e-3,
    2e-3,
    5e-3,
    1e-2,
    2e-2,
    5e-2,
    0.1,
    0.2,
    0.5,
)  # of the authors' grid; times batch / 256
TRAIN_BATCH = 16
BLOCKS, BLOCK_STEP = 4, 4
RESAMPLES = 1000  # of the bootstrap


class PatchProbe:
    """The frozen encoder, the standardisation of its patches, and a grid of linear classifiers on them."""

    def __init__(
        self,
        encoder: MimRefinerModel,
        processor: Any,
        num_classes: int,
        rates: Sequence[float],
        seed: int,
    ) -> None:
        self.encoder, self.processor = encoder, processor
        depth = encoder.config.num_hidden_layers
        self.blocks = [
            depth - 1 - BLOCK_STEP * i for i in range(BLOCKS) if depth - 1 - BLOCK_STEP * i >= 0
        ]
        width = len(self.blocks) * encoder.config.hidden_size
        self.mean, self.std = (
            torch.zeros(width, device=encoder.device),
            torch.ones(width, device=encoder.device),
        )
        self.grid = ClassifierGrid(
            width, num_classes, rates, torch.Generator().manual_seed(seed), encoder.device
        )

    def patches(self, pixels: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> standardised features (B * N, D * blocks) of all patches, row by row."""
        normalised = normalise(
            pixels.to(self.encoder.device), self.processor.image_mean, self.processor.image_std
        )
        outputs = self.encoder(
            normalised, output_hidden_states=[block + 1 for block in self.blocks]
        )
        prefix = self.encoder.config.num_prefix_tokens
        tokens = torch.cat(
            [outputs.hidden_states[block + 1][:, prefix:] for block in self.blocks], dim=2
        )
        return (tokens.float().flatten(0, 1) - self.mean) / self.std

    def standardise(self, loader: DataLoader[Any]) -> None:
        """Measure mean and standard deviation of every channel over all patches of the images."""
        total, count = torch.zeros_like(self.mean, dtype=torch.float64), 0
        squares = total.clone()
        for pixels, _ in loader:
            rows = self.patches(pixels).double()
            total, squares, count = (
                total + rows.sum(dim=0),
                squares + rows.square().sum(dim=0),
                count + len(rows),
            )
        mean = total / count
        variance = squares / count - mean.square()
        self.mean, self.std = mean.float(), variance.clamp_min(0).sqrt().float() + 1e-6

    def upsample(self, logits: Tensor) -> Tensor:
        """One classifier's logits (B * N, K) on the patches -> (B, K, H, W) on the pixels."""
        rows, columns = self.encoder.config.grid
        maps = logits.view(-1, rows, columns, logits.shape[1]).permute(0, 3, 1, 2)
        return F.interpolate(
            maps, size=self.encoder.config.image_hw, mode="bilinear", align_corners=False
        )

    def train_step(self, pixels: Tensor, targets: Tensor, decay: float) -> None:
        """One step of every classifier; one at a time on the pixels, where the logits are large."""
        if not bool((targets != VOID).any()):
            return
        targets = targets.to(self.encoder.device)
        rows = self.patches(pixels)
        logits = self.grid.logits(rows)
        gradient = torch.stack(
            [self.gradient(logits[:, place], targets) for place in range(logits.shape[1])], dim=1
        )
        self.grid.step(rows, gradient, decay)

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of the mean cross-entropy over the pixels that count, at one classifier's logits (B * N, K)."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = logits.clone().requires_grad_()
            F.cross_entropy(self.upsample(leaf), targets.clone(), ignore_index=VOID).backward()
            assert leaf.grad is not None  # backward() has just filled it
            return leaf.grad

    def confusions(self, pixels: Tensor, targets: Tensor) -> NDArray[np.int32]:
        """Counts (B, C, K, K) of pixels by true class (rows) and predicted class (columns), per image and classifier."""
        logits = self.grid.logits(self.patches(pixels))
        num_classes = logits.shape[2]
        predicted = [
            self.upsample(logits[:, place]).argmax(dim=1).cpu().numpy()
            for place in range(logits.shape[1])
        ]
        return np.array(
            [
                [confusion(truth, answers[image], num_classes) for answers in predicted]
                for image, truth in enumerate(targets.numpy())
            ]
        )


def confusion(
    targets: NDArray[np.int64], predicted: NDArray[np.int64], num_classes: int
) -> NDArray[np.int32]:
    """Counts (K, K) of pixels by true and predicted class, void left out."""
    counted = targets != VOID
    pairs = targets[counted] * num_classes + predicted[counted]
    counts: NDArray[np.int32] = (
        np.bincount(pairs, minlength=num_classes**2)
        .reshape(num_classes, num_classes)
        .astype(np.int32)
    )
    return counts


def mean_iou(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Mean intersection over union of confusion tables (..., K, K), over the classes that occur in truth or prediction."""
    hit = np.diagonal(counts, axis1=-2, axis2=-1).astype(np.float64)
    union = counts.sum(axis=-1) + counts.sum(axis=-2) - hit
    present = union > 0
    iou: NDArray[np.float64] = np.divide(hit, union, out=np.zeros_like(hit), where=present)
    means: NDArray[np.float64] = iou.sum(axis=-1) / present.sum(axis=-1)
    return means


def bootstrap_miou(per_image: NDArray[np.int32], seed: int) -> tuple[float, float, float]:
    """Standard error and the ends of the 95 % interval of the mIoU of tables (N, K, K), images drawn anew 1000 times."""
    images, num_classes, _ = per_image.shape
    drawn = random_generator(seed, "bootstrap").multinomial(
        images, np.full(images, 1 / images), size=RESAMPLES
    )
    flat = per_image.reshape(images, -1).astype(np.float64)
    tables = (drawn.astype(np.float64) @ flat).reshape(RESAMPLES, num_classes, num_classes)
    values = mean_iou(tables)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(values.std(ddof=1)), float(low), float(high)


def segmentation_probe(
    *,
    encoder: MimRefinerModel,
    processor: Any,
    train_images: SegmentationDataset,
    eval_images: SegmentationDataset,
    epochs: int = 50,
    learning_rates: Sequence[float] = LEARNING_RATES,
    seed: int = 0,
    loading: Loading = Loading(batch_size=64),
) -> ProtocolResult:
    """mIoU on `eval_images` of the best of a few linear segmentation probes trained on `train_images`.

    Args:
        encoder, processor: the model, which stays as it is, and its image processor, of which only mean and std are used.
        train_images, eval_images: with the same classes; see `open_segmentation`.
        epochs: passes over the training images, each of which encodes new crops.
        learning_rates: tried at once, before their scaling by batch / 256 (a batch holds 16 images).
        seed: of the order, the crops, the classifiers' start and the bootstrap.
        loading: images per pass of the encoder in evaluation, processes that decode and crop, and where to compute.

    Returns:
        `segmentation_miou`, a fraction of 1, with the standard error of a bootstrap over the evaluation images.

    Raises:
        ValueError: for empty data, different classes, and settings that make no sense.
    """
    check_segmentation(encoder, train_images, eval_images, epochs, learning_rates)
    batch = min(TRAIN_BATCH, len(train_images))
    train, found = (
        Crops(train_images, encoder.config, seed),
        Crops(eval_images, encoder.config, seed),
    )
    keys = [
        [(epoch, int(place)) for place in rows]
        for epoch in range(epochs)
        for rows in np.split(
            epoch_order(len(train_images), seed, epoch), range(batch, len(train_images), batch)
        )
        if len(rows) == batch
    ]
    with frozen(encoder, loading.device):
        rates = [rate * batch / 256 for rate in learning_rates]
        probe = PatchProbe(encoder, processor, len(train_images.class_names), rates, seed)
        passes: dict[str, Any] = {
            "batch_size": loading.batch_size,
            "num_workers": loading.num_workers,
        }
        probe.standardise(DataLoader(train, sampler=range(len(train_images)), **passes))
        loader = DataLoader(train, batch_sampler=keys, num_workers=loading.num_workers)
        progress = progress_bar(
            loader, hidden=rank() > 0, desc="segmentation probe", unit="step", leave=False
        )
        for step, (pixels, targets) in enumerate(progress):
            probe.train_step(
                pixels, targets, decay=0.5 * (1 + math.cos(math.pi * step / len(keys)))
            )
        evaluation = DataLoader(found, sampler=range(len(eval_images)), **passes)
        tables = np.concatenate(
            [probe.confusions(pixels, targets) for pixels, targets in evaluation]
        )  # (N, C, K, K)
    mious = mean_iou(tables.sum(axis=0))
    best = int(mious.argmax())
    error, low, high = bootstrap_miou(tables[:, best], seed)
    setting = (
        f"learning rate {learning_rates[best]:g}; raw blocks {', '.join(map(str, probe.blocks))}; "
        f"95 % {100 * low:.1f}-{100 * high:.1f} %"
    )
    return ProtocolResult({"segmentation_miou": Score(float(mious[best]), error, setting)})


def check_segmentation(
    encoder: MimRefinerModel,
    train_images: SegmentationDataset,
    eval_images: SegmentationDataset,
    epochs: int,
    learning_rates: Sequence[float],
) -> None:
    """ValueError, in one sentence, for what `segmentation_probe` cannot run on."""
    height, width = encoder.config.image_hw
    if height != width:
        raise ValueError(
            f"the segmentation probe crops squares, but the encoder takes {height} x {width} pixels"
        )
    for images in (train_images, eval_images):
        if len(images) == 0:
            raise ValueError(f"{images.name} has no images, but the segmentation probe needs some")
    if train_images.class_names != eval_images.class_names:
        raise ValueError(
            f"{train_images.name} and {eval_images.name} have different classes; they must be the same, in order"
        )
    if epochs < 1 or not learning_rates or min(learning_rates) <= 0:
        raise ValueError(
            f"epochs={epochs} must be at least 1, and learning_rates={tuple(learning_rates)} greater than 0"
        )


__all__ = ["mean_iou", "segmentation_probe"]
