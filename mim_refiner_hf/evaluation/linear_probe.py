"""Linear probing: DINOv2's protocol, as the paper runs it (MIM-Refiner, C.3 and C.8), with its whole grid trained at once.

    result = linear_probe(encoder=encoder, processor=processor, train_images=train, eval_images=test)
    result.scores["linear_probe_accuracy"]            # 74.1 % ± 0.7   (learning rate 0.05; cls of the last 4 blocks)

The grid: 13 learning rates x {last block, last 4 blocks} x {CLS, CLS + mean patch} = 52 linear classifiers, trained for 50 epochs by
SGD with momentum 0.9, batch 1024, cosine to zero, every rate times batch / 256. The classifier that is best on the evaluation images is
reported, as the protocol says: they choose among 52, so the score is a validation accuracy.

CLS is what `config.pooling` takes of each block's raw output; "+ mean patch" adds the mean of the LAST block's patches, as DINOv2 does.
Every channel is standardised with the training images' mean and standard deviation (the authors' code does so by a batch norm).

With `augment` every step encodes new random crops and flips of its images: 50 passes of the encoder over the data in all. Without, each
image is encoded once and the classifiers train on the stored features, many times faster.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.broken import BrokenImages
from ..data.loading import Loading
from ..data.order import BatchSampler, epoch_order
from ..data.views import MultiCrop, ViewDataset, ViewSpec, normalise
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import progress_bar, rank
from .classifier_grid import ClassifierGrid, cross_entropy_gradient
from .feature_cache import read_rows
from .features import encode, frozen, own_column
from .scores import ProtocolResult, class_labels, mean_score

if TYPE_CHECKING:
    from ..data.images import ImageDataset

LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3, 0.5)
LAST_BLOCKS = 4
TRAIN_BATCH = 1024
CROP_SCALE = (0.08, 1.0)

Columns = dict[str, Tensor]
"""Features of B images by the names of `features.py`, such as "block11.cls": (B, D) each."""


def feature_kinds(config: MimRefinerConfig) -> dict[str, list[str]]:
    """The columns side by side that each kind of classifier reads, by the kind's name.

    The paper's four kinds; fewer where the encoder has less than two blocks, or pools the mean patch anyway.
    """
    depth = config.num_hidden_layers
    blocks = range(max(depth - LAST_BLOCKS, 0), depth)
    pooled = [own_column(config, block) for block in blocks]
    mean = f"block{depth - 1}.mean"
    kinds = {}
    for columns in (pooled[-1:], pooled) if len(pooled) > 1 else (pooled,):
        where = "last block" if len(columns) == 1 else f"last {len(columns)} blocks"
        kinds[f"{config.pooling} of the {where}"] = columns
        if mean not in columns:
            kinds[f"{config.pooling} of the {where} + mean patch"] = [*columns, mean]
    return kinds


def side_by_side(features: Columns, columns: Sequence[str]) -> Tensor:
    """(B, D * number of columns)."""
    return torch.cat([features[column] for column in columns], dim=1)


class Standardise:
    """Subtracts the mean of the training features and divides by their standard deviation + 1e-6, channel by channel."""

    def __init__(self, train: Columns) -> None:
        self.centre = {column: values.mean(dim=0) for column, values in train.items()}
        self.spread = {
            column: values.std(dim=0, correction=0) + 1e-6 for column, values in train.items()
        }

    def __call__(self, features: Columns) -> Columns:
        return {
            column: (values - self.centre[column]) / self.spread[column]
            for column, values in features.items()
        }


def stored_batches(
    features: Columns, labels: Tensor, *, batch: int, epochs: int, seed: int
) -> Iterator[tuple[Columns, Tensor]]:
    """Batches of stored features; the order is `epoch_order`'s, the last partial batch of an epoch is dropped."""
    for epoch in range(epochs):
        order = torch.from_numpy(epoch_order(len(labels), seed, epoch)).to(labels.device)
        for rows in order[: len(order) // batch * batch].split(batch):
            yield {column: values[rows] for column, values in features.items()}, labels[rows]


def augmented_batches(
    encoder: MimRefinerModel,
    images: "ImageDataset",
    processor: Any,
    columns: Sequence[str],
    *,
    batch: int,
    epochs: int,
    seed: int,
    loading: Loading,
) -> Iterator[tuple[Columns, Tensor]]:
    """The same batches, each encoded anew from random resized crops and flips."""
    size = encoder.config.image_hw[0]
    crop = MultiCrop([ViewSpec(size, CROP_SCALE, blur_p=0.0, solarize_p=0.0, colour=False)])
    sampler = BatchSampler(
        images, batch_size=batch, seed=seed, steps=epochs * (len(images) // batch)
    )
    broken = BrokenImages(images, max_fraction=1)
    for views in DataLoader(
        ViewDataset(images, crop, seed), batch_sampler=sampler, num_workers=loading.num_workers
    ):
        broken.add(views["broken"])
        parts = []
        for pixels in views["global_views"][:, 0].split(loading.batch_size):
            normalised = normalise(
                pixels.to(encoder.device), processor.image_mean, processor.image_std
            )
            parts.append(encode(encoder, normalised, columns))
        yield (
            {column: torch.cat([part[column] for part in parts]) for column in columns},
            views["label"].to(encoder.device),
        )
    broken.share()


def linear_probe(
    *,
    encoder: MimRefinerModel,
    processor: Any,
    train_images: "ImageDataset",
    eval_images: "ImageDataset",
    augment: bool = True,
    epochs: int = 50,
    learning_rates: Sequence[float] = LEARNING_RATES,
    seed: int = 0,
    features: Path | None = None,
    loading: Loading = Loading(),
) -> ProtocolResult:
    """Accuracy on `eval_images` of the best of a grid of linear classifiers trained on `train_images`.

    Args:
        encoder, processor: the model, which stays as it is, and its image processor.
        train_images, eval_images: labelled.
        augment: random crops and flips at every step; False for the fast variant on stored features.
        epochs: passes over the training images.
        learning_rates: of the grid, before their scaling by batch / 256. A batch holds 1024 images, or all where there are fewer.
        seed: of the order, the crops and the classifiers' start.
        features: see `read_rows`; random crops are encoded when they are drawn and never kept.
        loading: images per pass of the encoder, processes that decode and crop, and where encoder and classifiers compute.

    Returns:
        `linear_probe_accuracy`, of the best classifier; its setting is in the score's.

    Raises:
        ValueError: for missing labels, an encoder whose input is not square (with `augment`), epochs and rates that make no sense.
    """
    check_probe(encoder, train_images, eval_images, augment, epochs, learning_rates)
    kinds = feature_kinds(encoder.config)
    columns = list(dict.fromkeys(column for columns in kinds.values() for column in columns))
    train, found = (
        read_rows(
            encoder,
            images,
            processor,
            columns,
            features=features,
            loading=loading,
            desc=desc,
        )
        for images, desc in ((train_images, "training images"), (eval_images, "evaluation images"))
    )
    assert train.labels is not None and found.labels is not None  # check_probe says so
    training: dict[str, Any] = {
        "batch": (batch := min(TRAIN_BATCH, len(train.labels))),
        "epochs": epochs,
        "seed": seed,
    }
    with frozen(encoder, loading.device) as home:
        labels, targets = train.labels.to(home), found.labels.to(home)
        clean = {column: train.column(column).to(home) for column in columns}
        standardise = Standardise(clean)
        tested = standardise({column: found.column(column).to(home) for column in columns})
        num_classes, rates = (
            int(max(labels.max(), targets.max())) + 1,
            [rate * batch / 256 for rate in learning_rates],
        )
        grids = start_grids(kinds, tested, num_classes, rates, seed, home)
        if augment:
            views = augmented_batches(
                encoder, train.images, processor, columns, **training, loading=loading
            )
            batches: Iterator[tuple[Columns, Tensor]] = (
                (standardise(drawn), own) for drawn, own in views
            )
        else:
            batches = stored_batches(standardise(clean), labels, **training)
        train_grids(grids, kinds, batches, steps=epochs * (len(labels) // batch))
        return best_classifier(grids, kinds, learning_rates, tested, targets)


def check_probe(
    encoder: MimRefinerModel,
    train_images: "ImageDataset",
    eval_images: "ImageDataset",
    augment: bool,
    epochs: int,
    learning_rates: Sequence[float],
) -> None:
    """ValueError, in one sentence, for what `linear_probe` cannot run on."""
    for images in (train_images, eval_images):
        class_labels(images, "linear probing")
    if epochs < 1 or not learning_rates or min(learning_rates) <= 0:
        raise ValueError(
            f"epochs={epochs} must be at least 1, and learning_rates={tuple(learning_rates)} greater than 0"
        )
    height, width = encoder.config.image_hw
    if augment and height != width:
        raise ValueError(
            f"augment=True crops squares, but the encoder takes {height} x {width} pixels; use augment=False"
        )


def start_grids(
    kinds: dict[str, list[str]],
    found: Columns,
    num_classes: int,
    rates: Sequence[float],
    seed: int,
    device: torch.device,
) -> dict[str, ClassifierGrid]:
    """One grid of untrained classifiers per kind, all drawn from one generator."""
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: ClassifierGrid(
            sum(found[column].shape[1] for column in read), num_classes, rates, generator, device
        )
        for kind, read in kinds.items()
    }


def best_classifier(
    grids: dict[str, ClassifierGrid],
    kinds: dict[str, list[str]],
    learning_rates: Sequence[float],
    found: Columns,
    targets: Tensor,
) -> ProtocolResult:
    """The accuracy of the classifier that is right most often about the standardised features `found`."""
    correct = {
        (kind, rate): answers == targets
        for kind, grid in grids.items()
        for rate, answers in zip(
            learning_rates, grid.predict(side_by_side(found, kinds[kind])), strict=True
        )
    }
    kind, rate = max(correct, key=lambda setting: correct[setting].sum().item())
    return ProtocolResult(
        {
            "linear_probe_accuracy": mean_score(
                correct[kind, rate], f"learning rate {rate:g}; {kind}"
            )
        }
    )


def train_grids(
    grids: dict[str, ClassifierGrid],
    kinds: dict[str, list[str]],
    batches: Iterator[tuple[Columns, Tensor]],
    steps: int,
) -> None:
    """One step of every classifier per batch of standardised features; the rates follow a cosine to zero over `steps`."""
    progress = progress_bar(
        batches, total=steps, hidden=rank() > 0, desc="linear probe", unit="step", leave=False
    )
    for step, (features, labels) in enumerate(progress):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        for kind, grid in grids.items():
            inputs = side_by_side(features, kinds[kind])
            grid.step(inputs, cross_entropy_gradient(grid.logits(inputs), labels), decay)


__all__ = ["linear_probe"]
