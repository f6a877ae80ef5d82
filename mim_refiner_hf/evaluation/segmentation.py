"""Segmentation probe: a linear layer on the patches of the frozen encoder classifies every pixel.

    mim-refiner evaluate MODEL --dataset camvid/ --eval_split test --protocols segmentation

    train, test = (open_segmentation("camvid/", split=split) for split in ("train", "test"))
    result = segmentation_probe(encoder, processor, train, test)
    print(result.scores["segmentation_miou"])
    # 31.0 % ± 0.7   (learning rate 0.1; raw blocks 23, 19, 15, 11; 95 % 29.6-32.4 %)

MIM-Refiner, C.7. The input keeps the encoder's native size. A patch is known by the raw outputs of
the last, 5th last, 9th last and 13th last blocks side by side (L, L-4, L-8, L-12; those that
exist), standardised channel by channel. The patches' logits are upsampled bilinearly to the input,
where the cross-entropy is taken over all pixels that are not void. Training images are random
crops (scale 0.25-1) and flips. Evaluation images are seen in one of two ways, neither of them at
several scales:

- "whole", the paper's text: cropped in the centre to the input's shape;
- "slide", the authors' released settings and mmsegmentation's mode of that name: at their own size,
  by windows of the input's shape 170 pixels apart (at 224; the last one ends with the image), whose
  logits are averaged where they overlap. A smaller image is padded at the right and bottom, with
  zeros after normalisation. (The authors upsample a window's logits by the nearest patch; here it
  is bilinear, as in training.)

Trained by SGD with momentum 0.9, batch 16, cosine to zero, nine learning rates at once on the same
features; the best on the evaluation images is reported, as in linear probing. mIoU is the mean
over classes of intersection / union, counted over all pixels of all images.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.loading import ImageProcessor, Loading
from ..data.order import epoch_order
from ..data.views import normalise
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import progress_bar
from ..runtime.seeding import random_generator
from .classifier_grid import ClassifierGrid
from .features import frozen
from .linear_probe import check_grid
from .scores import ProtocolResult, Score
from .segmentation_data import VOID, Crops, OwnSize, SegmentationDataset, masked_batches

# of the authors' grid; times batch / 256
SEGMENTATION_RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5)
# images per update; all of them where there are fewer
SEGMENTATION_TRAIN_BATCH = 16
# how many blocks a patch is known by, and how far they are apart
PROBED_BLOCKS = 4
BLOCK_STEP = 4
MIOU_RESAMPLES = 1000
# from one window to the next, as a share of the window
WINDOW_STEP = 170 / 224

Inference = Literal["whole", "slide"]

# Shapes below: B images, N patches an image, D width of the features side by side, C classifiers,
# K classes.


# --- the classifiers -------------------------------------------------------------------------


class PatchProbe:
    """The frozen encoder, the standardisation of its patches, and a grid of linear classifiers.

    Args:
        rates: learning rates of the grid, scaled.
    """

    def __init__(
        self,
        encoder: MimRefinerModel,
        processor: ImageProcessor,
        num_classes: int,
        rates: Sequence[float],
        seed: int,
    ) -> None:
        self.encoder = encoder
        self.processor = processor
        last = encoder.config.num_hidden_layers - 1
        self.blocks = list(range(last, -1, -BLOCK_STEP))[:PROBED_BLOCKS]

        width = len(self.blocks) * encoder.config.hidden_size
        self.mean = torch.zeros(width, device=encoder.device)
        self.std = torch.ones(width, device=encoder.device)
        generator = torch.Generator().manual_seed(seed)
        self.grid = ClassifierGrid(width, num_classes, rates, generator, encoder.device)

    def patches(self, pixels: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> standardised features (B * N, D) of all patches, row by row."""
        return self.patches_of(self.normalised(pixels))

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> what the encoder takes, on its device."""
        pixels = pixels.to(self.encoder.device)
        return normalise(pixels, self.processor.image_mean, self.processor.image_std)

    def patches_of(self, pixels: Tensor) -> Tensor:
        """`patches` of normalised pixels."""
        # entry 0 of the hidden states is the embeddings
        recorded = [block + 1 for block in self.blocks]
        states = self.encoder(pixels, output_hidden_states=recorded).hidden_states

        prefix = self.encoder.config.num_prefix_tokens
        tokens = torch.cat([states[place][:, prefix:] for place in recorded], dim=2)  # (B, N, D)
        return (tokens.float().flatten(0, 1) - self.mean) / self.std

    def measure_channels(self, loader: DataLoader[Any]) -> None:
        """Set mean and standard deviation of every channel, over all patches of the images.

        They are summed batch by batch: all patches would not fit into memory.
        """
        count = 0
        total = torch.zeros_like(self.mean, dtype=torch.float64)
        squares = torch.zeros_like(total)
        for pixels, _ in loader:
            rows = self.patches(pixels).double()
            count += len(rows)
            total += rows.sum(dim=0)
            squares += rows.square().sum(dim=0)

        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        self.mean = mean.float()
        self.std = variance.sqrt().float() + 1e-6

    def upsample(self, logits: Tensor) -> Tensor:
        """One classifier's logits (B * N, K) on the patches -> (B, K, H, W) on the pixels."""
        rows, columns = self.encoder.config.grid
        maps = logits.view(-1, rows, columns, logits.shape[1]).permute(0, 3, 1, 2)
        size = self.encoder.config.image_hw
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)

    def train_step(self, pixels: Tensor, targets: Tensor, decay: float) -> None:
        """One step of every classifier; none where all pixels are void.

        On the pixels, where the logits are large, the classifiers come one at a time.
        """
        if not bool((targets != VOID).any()):
            return
        targets = targets.to(self.encoder.device)
        rows = self.patches(pixels)
        per_classifier = self.grid.logits(rows).unbind(dim=1)
        gradients = [self.gradient(logits, targets) for logits in per_classifier]
        self.grid.step(rows, torch.stack(gradients, dim=1), decay)

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of the mean cross-entropy over the pixels that count, at one classifier's logits."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = logits.clone().requires_grad_()
            F.cross_entropy(self.upsample(leaf), targets.clone(), ignore_index=VOID).backward()
            # backward() has just filled it
            assert leaf.grad is not None
            return leaf.grad

    def confusions(self, pixels: Tensor, targets: Tensor) -> NDArray[np.int32]:
        """Per image and classifier the table of `pixel_counts`, (B, C, K, K)."""
        logits = self.grid.logits(self.patches(pixels))  # (B * N, C, K)
        tables = []
        for of_one in logits.unbind(dim=1):
            answers = self.upsample(of_one).argmax(dim=1).cpu().numpy()  # (B, H, W)
            pairs = zip(targets.numpy(), answers, strict=True)
            tables.append([pixel_counts(truth, said, logits.shape[2]) for truth, said in pairs])
        return np.array(tables).swapaxes(0, 1)

    def slide(self, pixels: Tensor, targets: Tensor, batch_size: int) -> NDArray[np.int32]:
        """Of one image at its own size, by windows: per classifier the table, (C, K, K).

        Args:
            pixels: uint8 (C, H, W).
            targets: (H, W).
            batch_size: windows per forward pass.
        """
        height, width = self.encoder.config.image_hw
        normalised = self.normalised(pixels[None])[0]
        missing = [max(0, width - pixels.shape[2]), max(0, height - pixels.shape[1])]
        padded = F.pad(normalised, (0, missing[0], 0, missing[1]))

        tops = window_starts(padded.shape[1], height)
        lefts = window_starts(padded.shape[2], width)
        corners = list(product(tops, lefts))
        windows = torch.stack([padded[:, y : y + height, x : x + width] for y, x in corners])
        parts = [self.grid.logits(self.patches_of(part)) for part in windows.split(batch_size)]
        logits = torch.cat(parts).unflatten(0, (len(corners), -1))  # (windows, N, C, K)

        tables = []
        for of_one in logits.unbind(dim=2):
            # the mean over the windows is largest where their sum is
            total = padded.new_zeros(of_one.shape[2], *padded.shape[1:])
            for (y, x), on_patches in zip(corners, of_one, strict=True):
                total[:, y : y + height, x : x + width] += self.upsample(on_patches)[0]
            answers = total.argmax(dim=0)[: targets.shape[0], : targets.shape[1]]
            tables.append(pixel_counts(targets.numpy(), answers.cpu().numpy(), logits.shape[3]))
        return np.array(tables)


def window_starts(side: int, window: int) -> list[int]:
    """Where the windows along a side of an image begin; the last one ends with the image."""
    step = round(window * WINDOW_STEP)
    count = math.ceil(max(side - window, 0) / step) + 1
    return [min(number * step, max(side - window, 0)) for number in range(count)]


# --- the score -------------------------------------------------------------------------------


def pixel_counts(
    targets: NDArray[np.int64], predicted: NDArray[np.int64], num_classes: int
) -> NDArray[np.int32]:
    """How many pixels of each true class (rows) got each class (columns), (K, K); no void."""
    counted = targets != VOID
    pairs = targets[counted] * num_classes + predicted[counted]
    counts = np.bincount(pairs, minlength=num_classes**2).astype(np.int32)
    return counts.reshape(num_classes, num_classes)


def mean_iou(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Mean intersection over union of tables (..., K, K) as `pixel_counts` gives them.

    Over the classes that occur in truth or prediction.
    """
    hit = np.diagonal(counts, axis1=-2, axis2=-1).astype(np.float64)
    union = counts.sum(axis=-1) + counts.sum(axis=-2) - hit
    present = union > 0
    iou = np.divide(hit, union, out=np.zeros_like(hit), where=present)
    means: NDArray[np.float64] = iou.sum(axis=-1) / present.sum(axis=-1)
    return means


def bootstrap_miou(per_image: NDArray[np.int32], seed: int) -> tuple[float, float, float]:
    """Standard error of the mIoU, and the ends of its 95 % interval.

    Args:
        per_image: a table for each image (N, K, K); the images are drawn anew 1000 times.
    """
    images, num_classes, _ = per_image.shape
    rng = random_generator(seed, "bootstrap")
    # how often each image is drawn in each resample
    drawn = rng.multinomial(images, np.full(images, 1 / images), size=MIOU_RESAMPLES)

    flat = per_image.reshape(images, -1).astype(np.float64)
    tables = drawn.astype(np.float64) @ flat
    values = mean_iou(tables.reshape(MIOU_RESAMPLES, num_classes, num_classes))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(values.std(ddof=1)), float(low), float(high)


# --- the protocol ----------------------------------------------------------------------------


def segmentation_probe(
    encoder: MimRefinerModel,
    processor: ImageProcessor,
    train_images: SegmentationDataset,
    eval_images: SegmentationDataset,
    *,
    epochs: int = 50,
    learning_rates: Sequence[float] = SEGMENTATION_RATES,
    inference: Inference = "whole",
    seed: int = 0,
    loading: Loading = Loading(batch_size=64),
) -> ProtocolResult:
    """mIoU of the best of a few linear segmentation probes.

    Args:
        encoder, processor: the model, which stays as it is, and its image processor, of which only
            mean and std are used.
        train_images, eval_images: with the same classes; see `open_segmentation`.
        epochs: passes over the training images, each of which encodes new crops.
        learning_rates: tried at once, before their scaling by batch / 256 (a batch holds 16
            images).
        inference: how evaluation images are seen: "whole" or "slide".
        seed: of the order, the crops, the classifiers' start and the bootstrap.
        loading: of the passes in evaluation; the classifiers compute where the encoder does.

    Returns:
        `segmentation_miou`, or `segmentation_slide_miou`, a fraction of 1, with the standard error
        of a bootstrap over the evaluation images.

    Raises:
        ValueError: for empty data, different classes, and settings that make no sense.
    """
    check_segmentation(encoder, train_images, eval_images, epochs, learning_rates)
    batch = min(SEGMENTATION_TRAIN_BATCH, len(train_images))
    keys = crop_keys(len(train_images), batch, epochs, seed)
    crops = Crops(train_images, encoder.config, seed)

    with frozen(encoder, loading.device):
        rates = [rate * batch / 256 for rate in learning_rates]
        probe = PatchProbe(encoder, processor, len(train_images.class_names), rates, seed)
        probe.measure_channels(masked_batches(train_images, encoder.config, loading))

        loader = DataLoader(crops, batch_sampler=keys, num_workers=loading.num_workers)
        progress = progress_bar(loader, desc="segmentation probe", unit="step", leave=False)
        for step, (pixels, targets) in enumerate(progress):
            decay = 0.5 * (1 + math.cos(math.pi * step / len(keys)))
            probe.train_step(pixels, targets, decay)

        if inference == "whole":
            batches = masked_batches(eval_images, encoder.config, loading)
            measured = [probe.confusions(pixels, truth) for pixels, truth in batches]
            tables = np.concatenate(measured)  # (N, C, K, K)
        else:
            tables = by_windows(probe, eval_images, loading)

    mious = mean_iou(tables.sum(axis=0))
    best = int(mious.argmax())
    error, low, high = bootstrap_miou(tables[:, best], seed)
    setting = (
        f"learning rate {learning_rates[best]:g}; raw blocks {', '.join(map(str, probe.blocks))}; "
        f"95 % {100 * low:.1f}-{100 * high:.1f} %"
    )
    name = "segmentation_miou"
    if inference == "slide":
        name = "segmentation_slide_miou"
        setting = f"windows, {setting}"
    return ProtocolResult({name: Score(float(mious[best]), error, setting)})


def by_windows(
    probe: PatchProbe, images: SegmentationDataset, loading: Loading
) -> NDArray[np.int32]:
    """The tables of all images by `PatchProbe.slide`, (N, C, K, K)."""
    own_size = OwnSize(images, probe.encoder.config)
    # one by one, for their sizes differ
    loader = DataLoader(own_size, batch_size=None, num_workers=loading.num_workers)
    return np.array([probe.slide(pixels, truth, loading.batch_size) for pixels, truth in loader])


def crop_keys(images: int, batch: int, epochs: int, seed: int) -> list[list[tuple[int, int]]]:
    """The keys (epoch, image) of every training batch; partial batches are dropped."""
    keys = []
    for epoch in range(epochs):
        order = epoch_order(images, seed, epoch).tolist()
        for start in range(0, images - batch + 1, batch):
            keys.append([(epoch, place) for place in order[start : start + batch]])
    return keys


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
    check_same_classes(train_images, eval_images, "the segmentation probe")
    check_grid(epochs, learning_rates)


def check_same_classes(
    train_images: SegmentationDataset, eval_images: SegmentationDataset, protocol: str
) -> None:
    """ValueError, naming the `protocol`, for a part without images, and for different classes."""
    for images in (train_images, eval_images):
        if len(images) == 0:
            raise ValueError(f"{images.name} has no images, but {protocol} needs some")
    if train_images.class_names != eval_images.class_names:
        raise ValueError(
            f"{train_images.name} and {eval_images.name} have different classes; they must be the "
            "same, in order"
        )
