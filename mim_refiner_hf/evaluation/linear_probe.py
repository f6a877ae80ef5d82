"""Linear probing: DINOv2's protocol, as the paper runs it, with its whole grid trained at once.

    result = linear_probe(encoder, processor, train_images, eval_images)
    print(result.scores["linear_probe_accuracy"])
    # 74.1 % ± 0.7   (learning rate 0.05; cls of the last 4 blocks)

The grid (MIM-Refiner, C.3 and C.8): 13 learning rates x {last block, last 4 blocks} x {CLS, CLS +
mean patch} = 52 linear classifiers, trained for 50 epochs by SGD with momentum 0.9, batch 1024,
cosine to zero, every rate times batch / 256. The classifier that is best on the evaluation images
is reported, as the protocol says: they choose among 52, so the score is a validation accuracy.

CLS is what `config.pooling` takes of each block's raw output; "+ mean patch" adds the mean of the
LAST block's patches, as DINOv2 does. Every channel is standardised with the training images' mean
and standard deviation (the authors' code does so by a batch norm).

With `augment` every step encodes new random crops and flips of its images: 50 passes of the
encoder over the data in all. Without, each image is encoded once and the classifiers train on the
stored features, many times faster.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from .knn import channel_statistics
from .scores import ProtocolResult, class_labels, mean_score

if TYPE_CHECKING:
    from ..data.images import ImageDataset

PROBE_LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3, 0.5)
LAST_BLOCKS = 4
# images per update; all of them where there are fewer
PROBE_BATCH = 1024
# share of the image's area that a random crop shows
PROBE_CROP_SCALE = (0.08, 1.0)

Columns = dict[str, Tensor]
"""Features of B images by the names of `features.py`, such as "block11.cls": (B, D) each."""


@dataclass(frozen=True)
class Training:
    """Images per update, epochs, and the seed of the order, the crops and the classifiers."""

    batch: int
    epochs: int
    seed: int


# --- the classifiers -------------------------------------------------------------------------


def feature_kinds(config: MimRefinerConfig) -> dict[str, list[str]]:
    """The columns side by side that each kind of classifier reads, by the kind's name.

    The paper's four kinds; fewer where the encoder has less than two blocks, or pools the mean
    patch anyway.
    """
    depth = config.num_hidden_layers
    pooled = [own_column(config, block) for block in range(max(depth - LAST_BLOCKS, 0), depth)]
    places = {"last block": pooled[-1:]}
    if len(pooled) > 1:
        places[f"last {len(pooled)} blocks"] = pooled

    mean = f"block{depth - 1}.mean"
    kinds = {}
    for place, columns in places.items():
        name = f"{config.pooling} of the {place}"
        kinds[name] = columns
        if mean not in columns:
            kinds[f"{name} + mean patch"] = [*columns, mean]
    return kinds


def side_by_side(features: Columns, columns: Sequence[str]) -> Tensor:
    """(B, D * number of columns)."""
    return torch.cat([features[column] for column in columns], dim=1)


class LinearProbes:
    """All classifiers of the protocol: a grid of learning rates for each kind of features.

    Args:
        kinds: as `feature_kinds` gives them.
        features: of any images, for the widths of their columns.
        rates: learning rates of each grid, scaled.
    """

    def __init__(
        self,
        kinds: dict[str, list[str]],
        features: Columns,
        num_classes: int,
        rates: Sequence[float],
        seed: int,
        device: torch.device,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.kinds = kinds
        self.grids = {}
        for kind, columns in kinds.items():
            width = sum(features[column].shape[1] for column in columns)
            self.grids[kind] = ClassifierGrid(width, num_classes, rates, generator, device)

    def train(self, batches: Iterator[tuple[Columns, Tensor]], steps: int) -> None:
        """One step of every classifier per batch; the rates follow a cosine to zero."""
        progress = progress_bar(
            batches, total=steps, hidden=rank() > 0, desc="linear probe", unit="step", leave=False
        )
        for step, (features, labels) in enumerate(progress):
            decay = 0.5 * (1 + math.cos(math.pi * step / steps))
            for kind, grid in self.grids.items():
                inputs = side_by_side(features, self.kinds[kind])
                gradient = cross_entropy_gradient(grid.logits(inputs), labels)
                grid.step(inputs, gradient, decay)

    def best(
        self, features: Columns, targets: Tensor, learning_rates: Sequence[float]
    ) -> tuple[Tensor, str]:
        """Which answers of the classifier that is right most often are right (N,), and its setting.

        `learning_rates` are those of the grids as they are told, before their scaling.
        """
        correct = {}
        for kind, grid in self.grids.items():
            answers = grid.predict(side_by_side(features, self.kinds[kind]))  # (C, N)
            for rate, predicted in zip(learning_rates, answers, strict=True):
                correct[f"learning rate {rate:g}; {kind}"] = predicted == targets
        setting = max(correct, key=lambda name: correct[name].sum().item())
        return correct[setting], setting


# --- batches ---------------------------------------------------------------------------------


class StandardisedColumns:
    """Every column minus the mean of the training images, over their standard deviation.

    The deviation is the biased one, as in a batch norm.
    """

    def __init__(self, train: Columns) -> None:
        self.statistics = {}
        for column, values in train.items():
            self.statistics[column] = channel_statistics(values, correction=0)

    def __call__(self, features: Columns) -> Columns:
        standardised = {}
        for column, values in features.items():
            mean, deviation = self.statistics[column]
            standardised[column] = (values - mean) / deviation
        return standardised


def stored_batches(
    features: Columns, labels: Tensor, training: Training
) -> Iterator[tuple[Columns, Tensor]]:
    """Batches of stored features, in the order of `epoch_order`.

    The last, partial batch of an epoch is dropped.
    """
    whole = len(labels) // training.batch * training.batch
    for epoch in range(training.epochs):
        order = torch.from_numpy(epoch_order(len(labels), training.seed, epoch))
        for rows in order[:whole].to(labels.device).split(training.batch):
            yield {column: values[rows] for column, values in features.items()}, labels[rows]


def augmented_batches(
    encoder: MimRefinerModel,
    images: "ImageDataset",
    processor: Any,
    columns: Sequence[str],
    training: Training,
    loading: Loading,
) -> Iterator[tuple[Columns, Tensor]]:
    """The same batches, each encoded anew from random resized crops and flips."""
    size = encoder.config.image_hw[0]
    crop = ViewSpec(size, PROBE_CROP_SCALE, blur_p=0.0, solarize_p=0.0, colour=False)
    value_range = getattr(processor, "value_range", None)
    views = ViewDataset(images, MultiCrop([crop]), training.seed, value_range)
    sampler = BatchSampler(
        images,
        batch_size=training.batch,
        seed=training.seed,
        steps=training.epochs * (len(images) // training.batch),
    )

    broken = BrokenImages(images, max_fraction=1)
    for drawn in DataLoader(views, batch_sampler=sampler, num_workers=loading.num_workers):
        broken.add(drawn["broken"])
        parts = []
        for pixels in drawn["global_views"][:, 0].split(loading.batch_size):
            pixels = pixels.to(encoder.device)
            pixels = normalise(pixels, processor.image_mean, processor.image_std)
            parts.append(encode(encoder, pixels, columns))
        features = {column: torch.cat([part[column] for part in parts]) for column in columns}
        yield features, drawn["label"].to(encoder.device)
    broken.share()


# --- the protocol ----------------------------------------------------------------------------


def linear_probe(
    encoder: MimRefinerModel,
    processor: Any,
    train_images: "ImageDataset",
    eval_images: "ImageDataset",
    *,
    augment: bool = True,
    epochs: int = 50,
    learning_rates: Sequence[float] = PROBE_LEARNING_RATES,
    seed: int = 0,
    features: Path | None = None,
    loading: Loading = Loading(),
) -> ProtocolResult:
    """Accuracy of the best of a grid of linear classifiers trained on frozen features.

    Args:
        encoder, processor: the model, which stays as it is, and its image processor.
        train_images, eval_images: labelled.
        augment: random crops and flips at every step; False for the fast variant on stored
            features.
        epochs: passes over the training images.
        learning_rates: of the grid, before their scaling by batch / 256. A batch holds 1024
            images, or all where there are fewer.
        seed: of the order, the crops and the classifiers' start.
        features: see `read_rows`; random crops are encoded when they are drawn and never kept.
        loading: of the passes of the encoder; the classifiers compute where it does.

    Returns:
        `linear_probe_accuracy`, of the best classifier; its setting is in the score's.

    Raises:
        ValueError: for missing labels, an encoder whose input is not square (with `augment`),
            epochs and rates that make no sense.
    """
    check_probe(encoder, train_images, eval_images, augment, epochs, learning_rates)
    kinds = feature_kinds(encoder.config)
    columns = list(dict.fromkeys(column for needed in kinds.values() for column in needed))
    train, test = (
        read_rows(
            encoder, images, processor, columns, features=features, loading=loading, desc=desc
        )
        for images, desc in ((train_images, "training images"), (eval_images, "evaluation images"))
    )
    # check_probe has refused images without labels
    assert train.labels is not None and test.labels is not None

    batch = min(PROBE_BATCH, len(train.labels))
    training = Training(batch, epochs, seed)
    with frozen(encoder, loading.device) as device:
        labels, targets = train.labels.to(device), test.labels.to(device)
        clean = {column: train.column(column).to(device) for column in columns}
        standardised = StandardisedColumns(clean)
        queries = standardised({column: test.column(column).to(device) for column in columns})

        num_classes = int(max(labels.max(), targets.max())) + 1
        rates = [rate * batch / 256 for rate in learning_rates]
        probes = LinearProbes(kinds, queries, num_classes, rates, seed, device)

        batches = stored_batches(standardised(clean), labels, training)
        if augment:
            drawn = augmented_batches(encoder, train.images, processor, columns, training, loading)
            batches = ((standardised(rows), own) for rows, own in drawn)
        probes.train(batches, steps=epochs * (len(labels) // batch))
        correct, setting = probes.best(queries, targets, learning_rates)
    return ProtocolResult({"linear_probe_accuracy": mean_score(correct, setting)})


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
    check_grid(epochs, learning_rates)
    height, width = encoder.config.image_hw
    if augment and height != width:
        raise ValueError(
            f"augment=True crops squares, but the encoder takes {height} x {width} pixels; use "
            "augment=False"
        )


def check_grid(epochs: int, learning_rates: Sequence[float]) -> None:
    """ValueError for a training of no epochs, without a rate, or with one that is not positive."""
    if epochs < 1 or not learning_rates or min(learning_rates) <= 0:
        raise ValueError(
            f"epochs={epochs} must be at least 1, and learning_rates={tuple(learning_rates)} "
            "greater than 0"
        )


__all__ = ["PROBE_LEARNING_RATES", "linear_probe"]
