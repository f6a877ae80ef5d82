"""Features of chosen images out of a folder of stores: what is there is read, what is missing is computed and kept.

    rows = read_rows(encoder, images, processor, ["block11.cls"], features=Path("features/"))
    rows.column("block11.cls")          # (N, D) fp32, row i of rows.images[i]
    rows.images, rows.labels            # the images that could be read: a broken one has no row

Reuse is by image, not by data set: a k-NN bank, the images of a split and a whole data set overlap, and no image is encoded twice by
the same weights, preprocessing and dtype for the same columns. The folder holds one store for each set of images that was missing at
some time (`feature_store.py`), under a name that is a function of what it holds, so that an interrupted command goes on where it
was. It may also be itself a store, made by `mim-refiner embed`; then nothing is added to it, and what it lacks is an error.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.loading import Loading
from ..data.sources import digest
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import wait_for_everyone
from .embed import describe, differences, embed_images
from .feature_store import MANIFEST, FeatureStore, is_intact, read_manifest
from .features import check_columns, encode_images, own_column

if TYPE_CHECKING:
    from ..data.images import ImageDataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Features of N images.

    Attributes:
        images: those that could be read, in the order asked for.
        column: name -> (N, D) fp32 on the CPU, row i of image i; read anew at each call.
        broken: {"index", "path", "reason"} of those that could not be read.
    """

    images: "ImageDataset"
    column: Callable[[str], Tensor]
    broken: Sequence[dict[str, Any]] = ()

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64, or None unless every image has a label."""
        labels = self.images.labels
        return (
            torch.from_numpy(labels) if labels is not None and bool((labels >= 0).all()) else None
        )

    def side_by_side(self, columns: Sequence[str]) -> Tensor:
        """(N, D * number of columns)."""
        return torch.cat([self.column(column) for column in columns], dim=1)


def own_columns(config: MimRefinerConfig) -> list[str]:
    """The encoder's own pooling of every block, first block first: what the profile of its blocks reads."""
    return [own_column(config, block) for block in range(config.num_hidden_layers)]


def evaluation_columns(config: MimRefinerConfig) -> list[str]:
    """What all protocols together read: `own_columns`, and the mean patch of the last block."""
    return list(dict.fromkeys([*own_columns(config), f"block{config.num_hidden_layers - 1}.mean"]))


def read_rows(
    encoder: MimRefinerModel,
    images: "ImageDataset",
    processor: Any,
    columns: Sequence[str],
    *,
    features: Path | None,
    loading: Loading = Loading(),
    desc: str = "features",
) -> Rows:
    """The features of `images`, each computed at most once in the life of the folder `features`.

    Args:
        encoder, images, processor, loading, desc: as in `extract_features`.
        columns: names as in features.py.
        features: a folder of stores, made when missing, or one store; None to compute in memory, where a broken image is an error.

    Raises:
        ValueError: for a folder that holds something else, a store of other weights, preprocessing, images or columns (it names what
            differs), features that are not finite, and images none of which can be read.
    """
    if features is None:
        found, _ = encode_images(encoder, images, processor, columns, loading=loading, desc=desc)
        return Rows(images, lambda column: finite(found[column], column, images))
    wanted = describe(
        encoder, images, processor, check_columns(columns, encoder.config), None, None
    )
    one = (features / MANIFEST).is_file()  # what `mim-refiner embed` made
    stores = [the_store(features, wanted)] if one else usable_stores(features, wanted)
    missing = np.flatnonzero(~np.isin(images.indices, known_indices(stores)))
    wait_for_everyone()  # all have looked, before one of them adds to the folder
    if len(missing) and one:
        raise ValueError(
            f"--features {features}: it lacks {len(missing)} of the {len(images)} images of {images.name}, such as "
            f"{images.describe(int(missing[0]))}; embed those into a folder beside it, and name the folder of both"
        )
    if len(missing):
        rest = images if len(missing) == len(images) else images.subset(missing)
        folder = features / store_name(
            describe(encoder, rest, processor, wanted["columns"], None, None)
        )
        stores.append(
            embed_images(encoder, rest, processor, folder, columns=columns, loading=loading)
        )
    return gather(images, stores)


def for_altered_images(features: Path | None) -> Path | None:
    """Where the features of corrupted or cropped images go: to the folder of stores; nowhere, if `features` is one store."""
    return None if features is None or (features / MANIFEST).is_file() else features


# --- which stores -------------------------------------------------------------------------------------------------------------


def store_name(manifest: dict[str, Any]) -> str:
    """A name for people and a fingerprint of all that the features depend on."""
    parts = [manifest["encoder"]["fingerprint"], manifest["dtype"], str(manifest["preprocessing"])]
    parts += [manifest["data"]["fingerprint"], *manifest["columns"]]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', Path(manifest['data']['name']).name)}-{digest(parts)}"


def mismatches(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """In words, why a store cannot serve; which of a data set's images it holds does not matter."""

    def whole(manifest: dict[str, Any]) -> dict[str, Any]:
        data = manifest["data"]
        return {**manifest, "data": {**data, "fingerprint": data.get("whole", data["fingerprint"])}}

    return differences(whole(old), whole(new), any_shard_size=True)


def check_features(features: Path) -> None:
    """ValueError for a folder that holds something else than features."""
    if features.exists() and not features.is_dir():
        raise ValueError(f"--features {features}: is a file; name a folder")
    read_manifest(features / "no such store" if any(features.glob(f"*/{MANIFEST}")) else features)


def the_store(folder: Path, wanted: dict[str, Any]) -> FeatureStore:
    """The store in `folder`; ValueError if it is of something else, lacks columns, or is damaged."""
    store = FeatureStore(folder)
    if lacking := [column for column in wanted["columns"] if column not in store.columns]:
        raise ValueError(
            f"--features {folder}: it lacks the column{'s' * (len(lacking) > 1)} {', '.join(lacking)} and has "
            f"{', '.join(store.columns)}; embed again into another folder, with --blocks for every block and --pooling for "
            f"{' and '.join(sorted({column.partition('.')[2] for column in wanted['columns']}))}"
        )
    if differing := mismatches(store.manifest, wanted):
        raise ValueError(
            f"--features {folder}: it holds other features: {'; '.join(differing)}; name another folder"
        )
    if not is_whole(store):
        raise ValueError(
            f"--features {folder}: it is damaged; run the command that made it again: it repairs what is broken"
        )
    return store


def usable_stores(features: Path, wanted: dict[str, Any]) -> list[FeatureStore]:
    """The complete stores below `features` that can serve; a damaged one is named, and left to `embed_images` to repair."""
    stores = []
    for folder in sorted(path.parent for path in features.glob(f"*/{MANIFEST}")):
        manifest = read_manifest(folder)
        if manifest is None or mismatches(manifest, wanted):
            continue
        try:
            store = FeatureStore(folder)
        except ValueError as error:  # begun and not finished: `embed_images` goes on with it if the same images are missing
            logger.info("%s", error)
            continue
        if is_whole(store):
            stores.append(store)
        else:
            logger.warning("%s is not what was written; it is not used", folder)
    return stores


def is_whole(store: FeatureStore) -> bool:
    """Whether every shard is, byte for byte, the one that was written."""
    return all(is_intact(store.folder, shard) for shard in range(len(store.rows_of_shards)))


def known_indices(stores: Sequence[FeatureStore]) -> NDArray[np.int64]:
    """The places in the data set that the stores know of, broken images included."""
    known = [np.empty(0, dtype=np.int64)]
    for store in stores:
        known += [
            store.indices.numpy(),
            np.array([image["index"] for image in store.broken], dtype=np.int64),
        ]
    return np.concatenate(known)


# --- reading ------------------------------------------------------------------------------------------------------------------


def finite(values: Tensor, column: str, images: "ImageDataset") -> Tensor:
    """`values` (N, D) as they are; ValueError, naming an image, where they are not finite."""
    bad = (~values.isfinite().all(dim=1)).nonzero()[:, 0]
    if len(bad):
        where = images.describe(int(bad[0]))
        raise ValueError(
            f"the features {column} of {len(bad)} of {len(values)} images are not finite, such as those of {where}; check the model"
        )
    return values


def gather(images: "ImageDataset", stores: Sequence[FeatureStore]) -> Rows:
    """The rows of `images`, wherever they are."""
    owner, row = np.full((2, len(images.found.sources)), -1, dtype=np.int64)
    for number, store in enumerate(stores):
        owner[store.indices], row[store.indices] = number, np.arange(len(store))
    owner, row = owner[images.indices], row[images.indices]
    readable, broken = images, list[dict[str, Any]]()
    if bool((owner < 0).any()):
        first = int(np.flatnonzero(owner < 0)[0])
        logger.warning(
            "%d images cannot be read and are left out, such as %s",
            (owner < 0).sum(),
            images.describe(first),
        )
        lost = set(images.indices[owner < 0].tolist())
        broken = list(
            {
                image["index"]: image
                for store in stores
                for image in store.broken
                if image["index"] in lost
            }.values()
        )
        readable = images.subset(np.flatnonzero(owner >= 0))
        row, owner = row[owner >= 0], owner[owner >= 0]
    if len(readable) == 0:
        raise ValueError(f"none of the {len(images)} images of {images.name} can be read")

    def column(name: str) -> Tensor:
        values = torch.empty(len(readable), stores[0].columns[name])
        for number, store in enumerate(stores):
            slot = np.full(len(store), -1)  # of each row of the store: where it goes
            slot[row[owner == number]] = np.flatnonzero(owner == number)
            start = 0
            for batch in store.batches(name):
                goes = torch.from_numpy(slot[start : start + len(batch)])
                values[goes[goes >= 0]] = batch[goes >= 0]
                start += len(batch)
        return finite(values, name, readable)

    return Rows(readable, column, broken)


__all__ = [
    "Rows",
    "check_features",
    "evaluation_columns",
    "for_altered_images",
    "own_columns",
    "read_rows",
]
