"""Features of chosen images, each computed at most once in the life of a folder.

    rows = read_rows(encoder, images, processor, ["block11.cls"], features=Path("features/"))
    rows.column("block11.cls")          # (N, D) fp32, row i of rows.images[i]
    rows.images, rows.labels            # the images that could be read: a broken one has no row

Reuse is by image, not by data set: a k-NN bank, the images of a split and a whole data set overlap,
and no image is encoded twice by the same weights, preprocessing and dtype for the same columns. The
folder holds one store for each encoder, preprocessing and whole data set, under a name that is a
function of these. The store grows: images that it lacks are appended as new shards. So an
interrupted command goes on where it was.

The folder may also be itself a store, made by `mim-refiner embed`; then nothing is added to it, and
what it lacks is an error.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.found import digest
from ..data.images import Broken, ImageDataset, fully_labelled
from ..data.loading import Loading, Processor
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import wait_for_everyone
from ..runtime.text import one_line
from ..runtime.wording import setting
from .embed import grow_store, intact_shards
from .feature_store import FeatureStore
from .features import check_columns, encode_images, own_columns
from .manifest import differences, store_manifest
from .shard_files import (
    STORE_MANIFEST,
    StoreManifest,
    columns_of_shard,
    read_manifest,
    recorded_shards,
    refuse_not_finite,
    shard_is_intact,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageRows:
    """Features of N images.

    Attributes:
        images: those that could be read, in the order asked for.
        read: (name of a column, slice of the images) -> (n, D) fp32 on the CPU; read anew at each
            call, and only what is asked for.
        broken: {"index", "path", "reason"} of those that could not be read.
    """

    images: ImageDataset
    read: Callable[[str, slice], Tensor]
    broken: Sequence[Broken] = ()

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64, or None unless every image has a label."""
        if self.images.labels is None or not fully_labelled(self.images):
            return None
        return torch.from_numpy(self.images.labels)

    def column(self, name: str) -> Tensor:
        """(N, D) fp32, row i of image i."""
        return self.read(name, slice(None))

    def side_by_side(self, columns: Sequence[str]) -> "StoredRows":
        """(N, D * number of columns), to be read some rows at a time."""
        return StoredRows(self, tuple(columns))


@dataclass(frozen=True)
class StoredRows:
    """Columns side by side, (N, D) in all, of which consecutive rows are read at a time.

    `rows[start:end]` is (n, D) fp32; `rows[:]` all of it.
    """

    source: ImageRows
    columns: tuple[str, ...]

    @property
    def shape(self) -> torch.Size:
        """(N, D)."""
        return torch.Size([len(self), self[0:0].shape[1]])

    def __len__(self) -> int:
        return len(self.source.images)

    def __getitem__(self, part: slice, /) -> Tensor:
        parts = [self.source.read(column, part) for column in self.columns]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def evaluation_columns(config: MimRefinerConfig, *, per_block: bool = True) -> list[str]:
    """What all protocols together read: of all blocks, or only of the last 4, and the output.

    The probes read the mean patches of the last 4 and of the output too.
    """
    own = own_columns(config)
    pooled = own if per_block else own[-4:]
    depth = config.num_hidden_layers
    means = [f"block{block}.mean" for block in range(max(depth - 4, 0), depth)]
    outputs = [f"output.{config.pooling}", "output.mean"]
    return list(dict.fromkeys([*pooled, *means, *outputs]))


def read_rows(
    encoder: MimRefinerModel,
    images: ImageDataset,
    processor: Processor,
    columns: Sequence[str],
    *,
    features: Path | None,
    loading: Loading = Loading(),
    desc: str = "features",
) -> ImageRows:
    """The features of `images`, read from the folder `features` where it has them.

    Args:
        encoder, images, processor, loading, desc: as in `extract_features`.
        columns: names as in features.py.
        features: a folder of stores, made when missing, or one store; None to compute in memory,
            where a broken image is an error.

    Raises:
        ValueError: for a folder that holds something else, a store of other weights, preprocessing,
            images or columns (it names what differs), features that are not finite, and images none
            of which can be read.
    """
    columns = check_columns(columns, encoder.config)
    if features is None:
        found, _ = encode_images(encoder, images, processor, columns, loading=loading, desc=desc)
        for column, values in found.items():
            refuse_not_finite(values.numpy(), column, lambda row: images.describe(row))
        return ImageRows(images, lambda column, part: found[column][part])

    manifest = store_manifest(encoder, images, processor, columns)
    if is_one_store(features):
        one = open_one_store(features, manifest)
        missing = missing_places(images, one)
        if len(missing):
            raise ValueError(
                f"{setting('features', features)}: it lacks {len(missing)} of the {len(images)} "
                f"images of {images.name}, such as {images.describe(int(missing[0]))}; embed those "
                "into a folder beside it, and name the folder of both"
            )
        return gather_rows(images, one)

    folder = features / store_name(manifest)
    store = open_growing_store(folder, columns)
    missing = missing_places(images, store)
    # all have looked, before one of them adds to the folder
    wait_for_everyone()
    if len(missing):
        rest = images.subset(missing)
        grow_store(folder, manifest, encoder, rest, processor, loading)
        store = open_growing_store(folder, columns)
    return gather_rows(images, store)


def for_altered_images(features: Path | None) -> Path | None:
    """Where features of corrupted or cropped images go: to the folder of stores, if it is one."""
    return None if features is None or is_one_store(features) else features


# --- which store ----------------------------------------------------------------------------------


def check_features(features: Path) -> None:
    """ValueError for a folder that holds something else than features."""
    if features.exists() and not features.is_dir():
        raise ValueError(f"{setting('features', features)}: is a file; name a folder")
    if not any(features.glob(f"*/{STORE_MANIFEST}")):
        read_manifest(features)


def is_one_store(features: Path) -> bool:
    """Whether `features` is itself a store, as `mim-refiner embed` makes it."""
    return (features / STORE_MANIFEST).is_file()


def store_name(manifest: StoreManifest) -> str:
    """A name for people, and a fingerprint of all that the features depend on."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(manifest["data"]["name"]).name)
    parts = [manifest["encoder"]["fingerprint"], manifest["dtype"], str(manifest["preprocessing"])]
    return f"{name}-{digest([*parts, manifest['data']['whole']])}"


def open_growing_store(folder: Path, columns: Sequence[str]) -> FeatureStore | None:
    """The store in `folder`, of the intact shards that have `columns`; None where there is none.

    Damaged shards are named and removed: their images count as missing.
    """
    if read_manifest(folder) is None:
        return None
    intact = intact_shards(folder, recorded_shards(folder))
    shards = []
    for shard in sorted(intact):
        if set(columns) <= columns_of_shard(folder, shard).keys():
            shards.append(shard)
    return FeatureStore(folder, shards)


def open_one_store(folder: Path, manifest: StoreManifest) -> FeatureStore:
    """The store in `folder`; ValueError if it is of something else, has less, or is damaged."""
    store = FeatureStore(folder)
    lacking = [column for column in manifest["columns"] if column not in store.columns]
    if lacking:
        plural = "s" if len(lacking) > 1 else ""
        poolings = sorted({column.partition(".")[2] for column in manifest["columns"]})
        raise ValueError(
            f"{setting('features', folder)}: it lacks the column{plural} {', '.join(lacking)} and "
            f"has {', '.join(store.columns)}; embed again into another folder, with "
            f"{setting('blocks')} for every block and {setting('pooling')} for "
            f"{' and '.join(poolings)}"
        )

    differing = differences(store.manifest, manifest, data="whole")
    if differing:
        raise ValueError(
            f"{setting('features', folder)}: it holds other features: {'; '.join(differing)}; "
            "name another folder"
        )

    if not all(shard_is_intact(folder, shard) for shard in store.shards):
        raise ValueError(
            f"{setting('features', folder)}: it is damaged; run the command that made it again: "
            "it repairs what is broken"
        )
    return store


def missing_places(images: ImageDataset, store: FeatureStore | None) -> NDArray[np.int64]:
    """The positions of the images that the store does not know, not even as broken."""
    if store is None:
        return np.arange(len(images))
    broken = np.array([image["index"] for image in store.broken], dtype=np.int64)
    known = np.concatenate([store.indices.numpy(), broken])
    return np.flatnonzero(~np.isin(images.indices, known))


# --- reading --------------------------------------------------------------------------------------


def gather_rows(images: ImageDataset, store: FeatureStore | None) -> ImageRows:
    """The rows of `images`, wherever they are in the store."""
    # it was there, or has just been made
    assert store is not None
    # place in the data set -> row of the store
    row_of = np.full(len(images.found.sources), -1, dtype=np.int64)
    row_of[store.indices] = np.arange(len(store))
    rows = row_of[images.indices]

    readable = rows >= 0
    if not readable.any():
        raise ValueError(f"none of the {len(images)} images of {images.name} can be read")
    left = images
    if not readable.all():
        left = images.subset(np.flatnonzero(readable))
        first = one_line(images.describe(int(readable.argmin())))
        lost = len(images) - len(left)
        logger.warning("%d images cannot be read and are left out, such as %s", lost, first)

    unreadable = set(images.indices[~readable].tolist())
    broken = {image["index"]: image for image in store.broken if image["index"] in unreadable}
    return ImageRows(
        left,
        lambda name, part: read_part(store, name, rows[readable], left, part),
        list(broken.values()),
    )


def read_part(
    store: FeatureStore, name: str, rows: NDArray[np.int64], images: ImageDataset, part: slice
) -> Tensor:
    """Those of the given rows (N,) of a column that a slice of the images has, (n, D).

    ValueError, naming an image, where they are not finite.
    """
    values = store.rows(name, rows[part])
    first = part.indices(len(rows))[0]
    refuse_not_finite(values.numpy(), name, lambda row: images.describe(first + row))
    return values
