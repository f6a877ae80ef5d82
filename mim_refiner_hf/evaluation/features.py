"""Frozen features of a whole image set: the pass over the images that every protocol starts from.

    from mim_refiner_hf.evaluation import extract_features
    found = extract_features(encoder, images, processor, blocks=[3])
    found.features            # (N, D) fp32 on the CPU: pooled raw output of the last block
    found.blocks[3]           # (N, D) the same of block 3, 0-based

The features are what the paper evaluates (MIM-Refiner, Sec. 5.2): the CLS token after the last
block WITHOUT the final norm, or what else the encoder's `config.pooling` takes. Only "attention"
and "global_repr" are read from the encoder's output, final norm included: they know nothing else,
and earlier blocks give the mean of the patches.

A kind of feature has a name, `<place>.<pooling>`, under which a feature store (`feature_store.py`)
keeps it as a column:

| place   | is                                                                  |
|---------|---------------------------------------------------------------------|
| block11 | raw output of block 11 (0-based), without the final norm            |
| last4   | raw outputs of the last 4 blocks side by side (4 D), paper table 13 |
| output  | the encoder's output, final norm included                           |

with pooling cls, mean (of the patches), register (the first one), prefix (the mean of CLS and
registers), or, for `output` alone, attention and global_repr.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.broken import BrokenImages
from ..data.images import ImageDataset, Sample
from ..data.loading import ImageProcessor, Loading, Processor
from ..data.order import BatchSampler
from ..data.views import MultiCrop, ViewDataset, ViewSpec, normalise
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel, prefix_tokens_only
from ..model.poolings_mim_refiner import LEARNED_POOLINGS, Pooling
from ..runtime.distributed import all_gather, progress_bar, rank, world_size

# share of the image's area that a random crop shows
RANDOM_CROP_SCALE = (0.08, 1.0)

# Shapes below: N images, B images of a batch, D the width of the encoder.


@dataclass
class FeatureSet:
    """What one pass over N images gives.

    Attributes:
        features: (N, D) fp32 on the CPU, pooled raw output of the last block.
        blocks: the same for each requested block, keyed by its 0-based number.
        labels: (N,) int64, or None unless every image has a label.
    """

    features: Tensor
    blocks: dict[int, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None


# --- batches of images ----------------------------------------------------------------------------


@dataclass
class Preprocess:
    """Collates samples into (pixels (B, C, H, W), labels (B,)) inside the loader's workers."""

    processor: Processor

    def __call__(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        prepared = self.processor([sample.image for sample in samples], return_tensors="pt")
        labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
        return prepared["pixel_values"], labels


def pixel_batches(
    images: ImageDataset, processor: Processor, loading: Loading, *, pin_memory: bool = False
) -> DataLoader[Any]:
    """Pixels (B, C, H, W) and labels (B,) of all images in their order, batch by batch."""
    return DataLoader(
        images,
        batch_size=loading.batch_size,
        num_workers=loading.num_workers,
        collate_fn=Preprocess(processor),
        pin_memory=pin_memory,
    )


def random_crops(
    encoder: MimRefinerModel,
    images: ImageDataset,
    processor: ImageProcessor,
    loading: Loading,
    *,
    batch: int,
    steps: int,
    seed: int,
) -> Iterator[tuple[Iterator[Tensor], Tensor]]:
    """The batches of a training on random resized crops and flips, new ones at each step.

    Where an image is broken, another stands in for it.

    Yields:
        The normalised pixels of a batch in parts of `loading.batch_size`, each made when it is
        asked for, and the labels (B,), both where the encoder is.
    """
    crop = ViewSpec(encoder.config.image_hw[0], RANDOM_CROP_SCALE)
    views = ViewDataset(images, MultiCrop([crop]), seed, getattr(processor, "value_range", None))
    sampler = BatchSampler(images, batch_size=batch, seed=seed, steps=steps)
    broken = BrokenImages(images, max_fraction=1)

    def normalised(pixels: Tensor) -> Tensor:
        pixels = pixels.to(encoder.device)
        return normalise(pixels, processor.image_mean, processor.image_std)

    for drawn in DataLoader(views, batch_sampler=sampler, num_workers=loading.num_workers):
        broken.add(drawn["broken"])
        parts = drawn["global_views"][:, 0].split(loading.batch_size)
        yield map(normalised, parts), drawn["label"].to(encoder.device)
    broken.share()


class FeatureChoice(NamedTuple):
    """Which features of an encoder are meant; the fields are arguments of `feature_columns`."""

    blocks: Sequence[int | Literal["output"]] = ()
    poolings: Sequence[Pooling] = ()
    last4: bool = False

    def columns(self, config: MimRefinerConfig) -> list[str]:
        """Their names as columns."""
        return feature_columns(config, self.blocks, self.poolings, last4=self.last4)


OWN_FEATURES = FeatureChoice()


# --- columns: names of features -------------------------------------------------------------------


def check_blocks(blocks: Sequence[int], depth: int) -> list[int]:
    """`blocks` sorted, each once; ValueError for a block that the encoder does not have."""
    for block in blocks:
        if not 0 <= block < depth:
            raise ValueError(
                f"blocks has {block}, but the encoder's blocks are numbered 0 to {depth - 1}"
            )
    return sorted(set(blocks))


def blocks_of(column: str, depth: int) -> list[int]:
    """The blocks whose raw outputs a column holds side by side; none for the encoder's output."""
    place = column.partition(".")[0]
    if place == "output":
        return []
    if place == "last4":
        return list(range(depth - 4, depth))
    return [int(place.removeprefix("block"))]


def column_widths(columns: Sequence[str], config: MimRefinerConfig) -> dict[str, int]:
    """How many numbers an image has in each column: those of all its blocks together."""
    widths = {}
    for column in columns:
        side_by_side = len(blocks_of(column, config.num_hidden_layers)) or 1
        widths[column] = config.hidden_size * side_by_side
    return widths


def check_columns(columns: Sequence[str], config: MimRefinerConfig) -> list[str]:
    """`columns`, each once; ValueError for one that is none, or that this encoder cannot give."""
    depth = config.num_hidden_layers
    poolings = get_args(Pooling)

    for column in columns:
        place, _, pooling = column.partition(".")
        if not re.fullmatch(r"block-?\d+|last4|output", place) or pooling not in poolings:
            raise ValueError(
                f"{column!r} names no feature: give block<number>, last4 or output, a dot, and one "
                f"of {', '.join(poolings)}, such as 'block{depth - 1}.mean'"
            )
        if place == "last4" and depth < 4:
            raise ValueError(
                f"last4 takes the last 4 blocks, but the encoder has {depth}; name single blocks"
            )
        check_blocks(blocks_of(column, depth), depth)

        missing = config.missing_for(pooling)  # type: ignore[arg-type]
        if missing:
            raise ValueError(f"pooling {pooling!r}: the encoder has {missing}; use 'mean'")
        if pooling in LEARNED_POOLINGS and (place, config.pooling) != ("output", pooling):
            weights = "CAPI's predictor" if pooling == "global_repr" else "attention pooling"
            raise ValueError(
                f"{column!r}: {weights} reads only the output, as the encoder's own pooling; use "
                "'mean'"
            )
    return list(dict.fromkeys(columns))


def own_column(config: MimRefinerConfig, block: int) -> str:
    """The column of a block under the encoder's own pooling: what `FeatureSet` holds."""
    if config.pooling not in LEARNED_POOLINGS:
        return f"block{block}.{config.pooling}"
    if block == config.num_hidden_layers - 1:
        return f"output.{config.pooling}"
    return f"block{block}.mean"


def own_columns(config: MimRefinerConfig) -> list[str]:
    """`own_column` of every block, first block first: what the profile of its blocks reads."""
    return [own_column(config, block) for block in range(config.num_hidden_layers)]


def feature_columns(
    config: MimRefinerConfig,
    blocks: Sequence[int | Literal["output"]] = (),
    poolings: Sequence[Pooling] = (),
    *,
    last4: bool = False,
) -> list[str]:
    """Every chosen place under every chosen pooling, as names of columns.

    Args:
        config: of the encoder.
        blocks: 0-based numbers of blocks, or "output"; none for the place that the encoder's own
            features come from, which is the last block (for `LEARNED_POOLINGS` the output).
        poolings: none for the encoder's own (of a block, the mean for `LEARNED_POOLINGS`).
        last4: the last 4 blocks side by side, too.

    Raises:
        ValueError: for a block or a pooling that the encoder does not have.
    """
    places = ["output" if block == "output" else f"block{block}" for block in blocks]
    if not places:
        places = [own_columns(config)[-1].partition(".")[0]]
    if last4:
        places.append("last4")

    columns = []
    for place in places:
        own = str(config.pooling)
        if own in LEARNED_POOLINGS and place != "output":
            own = "mean"
        chosen: list[str] = list(poolings) or [own]
        columns += [f"{place}.{pooling}" for pooling in chosen]
    return check_columns(columns, config)


# --- the forward pass -----------------------------------------------------------------------------


@contextmanager
def frozen(encoder: MimRefinerModel, device: torch.device | str | None) -> Iterator[torch.device]:
    """The encoder in eval mode, without gradient, on `device` (None: where it is).

    Afterwards it is in the mode and on the device that it came with.
    """
    home = encoder.device
    training = encoder.training
    device = home if device is None else torch.device(device)
    encoder.train(False).to(device)
    try:
        with torch.inference_mode():
            yield device
    finally:
        encoder.train(training).to(home)


def reads_last_patches(columns: Sequence[str], config: MimRefinerConfig) -> bool:
    """Whether a column is made from the patches of the last block or of the output."""
    depth = config.num_hidden_layers
    for column in columns:
        blocks = blocks_of(column, depth)
        of_patches = column.partition(".")[2] not in ("cls", "register", "prefix")
        if of_patches and (not blocks or depth - 1 in blocks):
            return True
    return False


def encode(
    encoder: MimRefinerModel, pixel_values: Tensor, columns: Sequence[str]
) -> dict[str, Tensor]:
    """One forward pass over (B, C, H, W), in the dtype of the weights.

    Only the blocks that a column needs are recorded, and the patches pass through the last one only
    where a column reads them.

    Returns:
        Every column (B, D), or (B, 4 D) for last4, in fp32.
    """
    depth = encoder.config.num_hidden_layers
    blocks = {column: blocks_of(column, depth) for column in columns}
    # entry 0 of the hidden states is the embeddings
    recorded = sorted({block + 1 for block in itertools.chain(*blocks.values())})
    all_tokens = reads_last_patches(columns, encoder.config)
    with nullcontext() if all_tokens else prefix_tokens_only(encoder):
        outputs = encoder(pixel_values, output_hidden_states=recorded or None)

    features = {}
    for column in columns:
        pooling: Any = column.partition(".")[2]
        if pooling in LEARNED_POOLINGS:
            features[column] = outputs.pooler_output.float()
            continue
        tokens = [outputs.hidden_states[block + 1] for block in blocks[column]]
        pooled = [encoder.pool(each, pooling) for each in tokens or [outputs.last_hidden_state]]
        features[column] = torch.cat(pooled, dim=1).float()
    return features


# --- the pass over the images ---------------------------------------------------------------------


def share_of(images: ImageDataset) -> ImageDataset:
    """The images that this process encodes: every n-th of n processes, the same number on each.

    Where they do not divide evenly, the last image is encoded by several.
    """
    if world_size() == 1:
        return images
    padded = math.ceil(len(images) / world_size()) * world_size()
    own = np.arange(rank(), padded, world_size())
    return images.subset(own.clip(max=len(images) - 1))


def gathered(own: Tensor, total: int, device: torch.device) -> Tensor:
    """The rows of all processes in the data set's order, on the CPU.

    Row i is row i // n of process i % n, of n processes.
    """
    if world_size() == 1:
        return own
    everything = all_gather(own.to(device)).cpu()
    return everything.unflatten(0, (world_size(), -1)).transpose(0, 1).flatten(0, 1)[:total]


def encode_images(
    encoder: MimRefinerModel,
    images: ImageDataset,
    processor: Processor,
    columns: Sequence[str],
    *,
    loading: Loading = Loading(),
    desc: str = "features",
) -> tuple[dict[str, Tensor], Tensor]:
    """Every column of N images, and their labels; several processes share the work.

    Arguments and errors as in `extract_features`; `columns` are names as in the table above.

    Returns:
        Columns (N, D) in fp32 and labels (N,), -1 for none, on the CPU, in the data set's order.
    """
    if len(images) == 0:
        raise ValueError("the data set has no images, so there is nothing to extract features from")
    pooled: dict[str, list[Tensor]] = {column: [] for column in columns}
    labels: list[Tensor] = []

    with frozen(encoder, loading.device) as device:
        on_gpu = device.type == "cuda"
        loader = pixel_batches(share_of(images), processor, loading, pin_memory=on_gpu)
        progress = progress_bar(loader, desc=desc, unit="batch", leave=False)
        for pixel_values, batch_labels in progress:
            pixel_values = pixel_values.to(device, non_blocking=True)
            for column, vectors in encode(encoder, pixel_values, list(pooled)).items():
                pooled[column].append(vectors.cpu())
            labels.append(batch_labels)

    total = len(images)
    features = {}
    for column, parts in pooled.items():
        features[column] = gathered(torch.cat(parts), total, device)
    return features, gathered(torch.cat(labels), total, device)


def extract_features(
    encoder: MimRefinerModel,
    images: ImageDataset,
    processor: Processor,
    *,
    blocks: Sequence[int] | None = None,
    loading: Loading = Loading(),
    desc: str = "features",
) -> FeatureSet:
    """Encode every image once, in the data set's order, without gradient and in eval mode.

    Several processes share the work.

    Args:
        encoder: stays in the mode (training or eval) and on the device it came with.
        images: N images; decoding and `processor` run in the loader's workers.
        processor: an image processor whose output has the encoder's native size.
        blocks: 0-based blocks whose pooled raw output is kept too; only these are recorded.
        loading: images per forward pass, workers, and where to encode.
        desc: text of the progress bar.

    Raises:
        ValueError: for an empty data set or a block that does not exist.
    """
    own = own_columns(encoder.config)
    chosen = check_blocks(blocks or (), len(own))
    columns = sorted({own[block] for block in (*chosen, -1)})
    features, labels = encode_images(
        encoder, images, processor, columns, loading=loading, desc=desc
    )
    return FeatureSet(
        features=features[own[-1]],
        blocks={block: features[own[block]] for block in chosen},
        labels=labels if bool((labels >= 0).all()) else None,
    )
