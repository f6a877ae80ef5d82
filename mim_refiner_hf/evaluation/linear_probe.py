"""Linear probing: DINOv2's protocol, as the paper runs it, with its whole grid trained at once.

    result = linear_probe(encoder, processor, train_images, eval_images)
    print(result.scores["linear_probe_accuracy"])
    # 74.1 % ± 0.7   (learning rate 0.05; cls of the last 4 blocks; epoch 48)

The grid (MIM-Refiner, C.3 and C.8): 13 learning rates x {last block, last 4 blocks} x {CLS, CLS +
mean patch} = 52 linear classifiers, trained for 50 epochs by SGD with momentum 0.9, batch 1024,
every rate times batch / 256. The classifier that is best on the evaluation images is reported, as
the protocol says: they choose among 52, so the score is a validation accuracy.

Two variants of it:

- "paper", as the authors' released code has it: the last block is the encoder's output, final norm
  included; of the last 4 blocks, raw, the mean patches stand beside the CLS of all four; a batch
  norm without weights stands before each classifier; rates warm up over a tenth of the updates and
  fall as a cosine to 1e-6; the best epoch counts.
- "dinov2", as DINOv2's code has it: all blocks behind the final norm, the mean patch only of the
  last one; no batch norm; rates fall as a cosine to 0; the last epoch counts.

CLS is what `config.pooling` takes. The batch norm normalises a training batch by the statistics of
that batch, and evaluation images by their moving averages.

With `augment` every step encodes new random crops and flips of its images: 50 passes of the
encoder over the data in all. Without, each image is encoded once and the classifiers train on the
stored features, many times faster.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..data.loading import ImageProcessor, Loading
from ..data.order import epoch_order
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import progress_bar
from ..runtime.optimisation import learning_rate
from .classifier_grid import ClassifierGrid, cross_entropy_gradient
from .feature_cache import read_rows
from .features import encode, frozen, own_column, random_crops
from .scores import ProtocolResult, class_labels, mean_score

if TYPE_CHECKING:
    from ..data.images import ImageDataset

PROBE_LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3, 0.5)
LAST_BLOCKS = 4
# images per update; all of them where there are fewer
PROBE_BATCH = 1024
# of the updates, with the paper's variant
WARMUP_SHARE = 0.1

Variant = Literal["paper", "dinov2"]
Columns = dict[str, Tensor]
"""Features of B images by the names of `features.py`, such as "block11.cls": (B, D) each."""


@dataclass(frozen=True)
class Training:
    """Images per update, epochs, and the seed of the order, the crops and the classifiers."""

    batch: int
    epochs: int
    seed: int


# --- the classifiers -------------------------------------------------------------------------


def feature_kinds(config: MimRefinerConfig, variant: Variant = "paper") -> dict[str, list[str]]:
    """The columns side by side that each kind of classifier reads, by the kind's name.

    The four kinds of the protocol; fewer where the encoder has less than two blocks, or pools the
    mean patch anyway.
    """
    depth = config.num_hidden_layers
    last = f"output.{config.pooling}"
    blocks = range(max(depth - LAST_BLOCKS, 0), depth)
    pooled = [own_column(config, block) for block in blocks]
    means = [f"block{block}.mean" for block in blocks]
    if variant == "dinov2":
        pooled[-1] = last
        means = ["output.mean"]

    kinds = {}
    places = {"last block": ([last], ["output.mean"])}
    if len(pooled) > 1:
        places[f"last {len(pooled)} blocks"] = (pooled, means)
    for place, (columns, patches) in places.items():
        name = f"{config.pooling} of the {place}"
        kinds[name] = columns
        if not set(patches) & set(columns):
            kinds[f"{name} + mean patch"] = [*columns, *patches]
    return kinds


def side_by_side(features: Columns, columns: Sequence[str]) -> Tensor:
    """(B, D * number of columns)."""
    return torch.cat([features[column] for column in columns], dim=1)


class Best(NamedTuple):
    """Which answers of a classifier are right (N,), how many, and which classifier it is."""

    correct: Tensor
    hits: int
    setting: str


class LinearProbes:
    """All classifiers of the protocol: a grid of learning rates for each kind of features.

    Args:
        kinds: as `feature_kinds` gives them.
        features: of any images: their widths count, and where they are.
        learning_rates: of each grid, before their scaling by batch / 256.
    """

    def __init__(
        self,
        kinds: dict[str, list[str]],
        features: Columns,
        num_classes: int,
        learning_rates: Sequence[float],
        training: Training,
        variant: Variant = "paper",
    ) -> None:
        generator = torch.Generator().manual_seed(training.seed)
        scale = training.batch / 256
        device = next(iter(features.values())).device
        self.kinds = kinds
        self.learning_rates = learning_rates
        self.variant = variant
        self.rates = [rate * scale for rate in learning_rates]

        self.grids = {}
        self.norms: dict[str, nn.Module] = {}
        for kind, columns in kinds.items():
            width = sum(features[column].shape[1] for column in columns)
            self.grids[kind] = ClassifierGrid(width, num_classes, self.rates, generator, device)
            self.norms[kind] = nn.Identity()
            if variant == "paper":
                self.norms[kind] = nn.BatchNorm1d(width, affine=False, device=device)

    def decay(self, step: int, steps: int) -> Tensor:
        """What the schedule multiplies each rate by at a step, (C, 1)."""
        if self.variant == "dinov2":
            shares = [0.5 * (1 + math.cos(math.pi * step / steps))] * len(self.rates)
        else:
            warmup = round(WARMUP_SHARE * steps)
            shares = [learning_rate(step, warmup, steps, rate) / rate for rate in self.rates]
        device = next(iter(self.grids.values())).bias.device
        return torch.tensor(shares, device=device)[:, None]

    def train(
        self, batches: Iterator[tuple[Columns, Tensor]], steps: int, epochs: int
    ) -> Iterator[int]:
        """One step of every classifier per batch; yields the number of every epoch that is done."""
        progress = progress_bar(batches, total=steps, desc="linear probe", unit="step", leave=False)
        for step, (features, labels) in enumerate(progress):
            decay = self.decay(step, steps)
            for kind, grid in self.grids.items():
                inputs = self.norms[kind].train()(side_by_side(features, self.kinds[kind]))
                gradient = cross_entropy_gradient(grid.logits(inputs), labels)
                grid.step(inputs, gradient, decay)
            if (step + 1) % (steps // epochs) == 0:
                yield (step + 1) // (steps // epochs)

    def best(self, features: Columns, targets: Tensor) -> Best:
        """Which answers of the classifier that is right most often are right, and its setting."""
        best: Best | None = None
        for kind, grid in self.grids.items():
            inputs = self.norms[kind].eval()(side_by_side(features, self.kinds[kind]))
            correct = grid.predict(inputs) == targets  # (C, N)
            for place, count in enumerate(correct.sum(dim=1).tolist()):
                if best is None or count > best.hits:
                    rate = self.learning_rates[place]
                    best = Best(correct[place], count, f"learning rate {rate:g}; {kind}")
        assert best is not None
        return best


# --- batches ---------------------------------------------------------------------------------


def with_final_norm(encoder: MimRefinerModel, features: Columns) -> Columns:
    """Raw outputs of blocks behind the encoder's final norm, as DINOv2 reads all of them."""
    normed = {}
    for column, values in features.items():
        is_output = column.startswith("output.")
        normed[column] = values if is_output else encoder.norm(values)
    return normed


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
    processor: ImageProcessor,
    columns: Sequence[str],
    training: Training,
    loading: Loading,
) -> Iterator[tuple[Columns, Tensor]]:
    """The same batches, each encoded anew from random resized crops and flips."""
    steps = training.epochs * (len(images) // training.batch)
    crops = random_crops(
        encoder, images, processor, loading, batch=training.batch, steps=steps, seed=training.seed
    )
    for parts, labels in crops:
        encoded = [encode(encoder, pixels, columns) for pixels in parts]
        yield {column: torch.cat([part[column] for part in encoded]) for column in columns}, labels


# --- the protocol ----------------------------------------------------------------------------


def linear_probe(
    encoder: MimRefinerModel,
    processor: ImageProcessor,
    train_images: "ImageDataset",
    eval_images: "ImageDataset",
    *,
    augment: bool = True,
    variant: Variant = "paper",
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
        variant: see the table at the top of this file.
        epochs: passes over the training images.
        learning_rates: of the grid, before their scaling by batch / 256. A batch holds 1024
            images, or all where there are fewer.
        seed: of the order, the crops and the classifiers' start.
        features: see `read_rows`; random crops are encoded when they are drawn and never kept.
        loading: of the passes of the encoder; the classifiers compute where it does.

    Returns:
        `linear_probe_accuracy`, or `linear_probe_dinov2_accuracy`, of the best classifier; its
        setting is in the score's.

    Raises:
        ValueError: for missing labels, an encoder whose input is not square (with `augment`),
            epochs and rates that make no sense.
    """
    check_probe(encoder, train_images, eval_images, augment, epochs, learning_rates)
    kinds = feature_kinds(encoder.config, variant)
    columns = list(dict.fromkeys(itertools.chain(*kinds.values())))
    read = partial(read_rows, encoder, processor=processor, columns=columns)
    train = read(train_images, features=features, loading=loading, desc="training images")
    test = read(eval_images, features=features, loading=loading, desc="evaluation images")
    # check_probe has refused images without labels
    assert train.labels is not None and test.labels is not None

    batch = min(PROBE_BATCH, len(train.labels))
    training = Training(batch, epochs, seed)
    with frozen(encoder, loading.device) as device:
        labels, targets = train.labels.to(device), test.labels.to(device)
        queries = {column: test.column(column).to(device) for column in columns}
        num_classes = int(max(labels.max(), targets.max())) + 1

        if augment:
            batches = augmented_batches(
                encoder, train.images, processor, columns, training, loading
            )
        else:
            clean = {column: train.column(column).to(device) for column in columns}
            batches = stored_batches(clean, labels, training)
        if variant == "dinov2":
            queries = with_final_norm(encoder, queries)
            batches = ((with_final_norm(encoder, rows), own) for rows, own in batches)

        probes = LinearProbes(kinds, queries, num_classes, learning_rates, training, variant)
        best: Best | None = None
        for epoch in probes.train(batches, epochs * (len(labels) // batch), epochs):
            if variant == "dinov2" and epoch < epochs:
                continue
            of_epoch = probes.best(queries, targets)
            if best is None or of_epoch.hits > best.hits:
                best = of_epoch._replace(setting=f"{of_epoch.setting}; epoch {epoch}")
    assert best is not None
    name = "linear_probe_accuracy" if variant == "paper" else f"linear_probe_{variant}_accuracy"
    return ProtocolResult({name: mean_score(best.correct, best.setting)})


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
    if augment:
        check_square(encoder)


def check_square(encoder: MimRefinerModel) -> None:
    """ValueError for an encoder whose input is no square, which `augment` crops."""
    height, width = encoder.config.image_hw
    if height != width:
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
