"""The features that `cluster` groups: encoded now, kept until done, or read from a store.

    known = encoded(encoder, images, loading, Path("groups"))      # goes on where it was stopped
    known = from_store(FeatureStore("features/"))                  # of mim-refiner embed: no model
    known.images, known.features, known.kept, known.broken
    pipe = FeaturePipeline(known)
    entries = pipe(known.images, num_clusters=None)                # encodes nothing

While a command with an output folder encodes, finished parts lie in a feature store beside it,
`.<out>.features`. The same command, killed and run again, reads them; when the groups are written
the store is removed. Who wants to keep features makes them with `mim-refiner embed`.
"""

import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clustering.cluster_count import Proposal
from ..clustering.k_means import Clustering
from ..clustering.pipeline_image_clustering import (
    ImageClusteringPipeline,
    ImageInGroup,
    UnreadImage,
)
from ..data.found import Entries, FoundImages
from ..data.images import ImageDataset, open_images
from ..data.loading import Loading
from ..evaluation.embed import embed_images, encode_in_memory
from ..evaluation.feature_store import FeatureStore
from ..evaluation.features import feature_columns
from ..evaluation.manifest import differences, store_manifest
from ..evaluation.shard_files import StoreManifest, read_manifest, read_record, recorded_shards
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.pace import duration
from ..runtime.text import one_line, spelt_out
from ..runtime.wording import setting

logger = logging.getLogger(__name__)

# images of a part that is kept: what a kill costs at most
_PART = 256
# beyond so many parts they grow instead
_MOST_PARTS = 400


@dataclass(frozen=True)
class KnownFeatures:
    """Features of n images.

    Attributes:
        images: the n images, those that cannot be read included.
        features: (m, D) fp32 of those that could be read.
        kept: their places among the images.
        broken: {"index", "image", "error"} of each of the others.
    """

    images: ImageDataset
    features: Tensor
    kept: list[int]
    broken: list[UnreadImage]


class FeaturePipeline(ImageClusteringPipeline):
    """The pipeline where the features are there already; it has no model, and encodes nothing."""

    def __init__(self, known: KnownFeatures) -> None:
        # nothing of a model is to be set up, so the base class does not come in
        self.known = known
        self._batch_size = None
        self.number_called = setting("num_clusters")

    def encode(
        self, items: Sequence[Any], **settings: Any
    ) -> tuple[Tensor, list[int], list[UnreadImage]]:
        """What is known of the images."""
        known = self.known
        if not known.kept:
            first = known.broken[0]
            raise ValueError(
                f"None of the {len(known.images)} images can be read; "
                f"the first, {first['image']}: {first['error']}"
            )
        return known.features, known.kept, known.broken

    def grouped_as(self, clustering: Clustering, why: Proposal) -> list[ImageInGroup]:
        """What a call returns and sets, where the groups of all rows are there already."""
        known = self.known
        self._keep(known.features, clustering, known.broken, why)
        rows = zip(
            known.kept,
            clustering.assignments.tolist(),
            clustering.confidence.tolist(),
            strict=True,
        )
        return [
            {"image": index, "index": index, "cluster": group, "score": score}
            for index, group, score in rows
        ]


# --- encoded now ----------------------------------------------------------------------------------


def encoded(
    encoder: MimRefinerModel, images: ImageDataset, loading: Loading, out: Path | None
) -> KnownFeatures:
    """Encode the images; with `out`, what an interrupted call had finished is read instead."""
    channels = encoder.config.num_channels
    opened = ImageDataset(images.found, num_channels=channels, indices=images.indices)
    columns = feature_columns(encoder.config)
    processor = vars(encoder)["image_processor"]
    if out is None:
        rows, broken = encode_in_memory(
            encoder, opened, processor, columns, loading, stop_at_broken=False
        )
        features = torch.from_numpy(rows.columns[columns[0]])
        return _known(opened, features, rows.index, broken)

    folder = features_folder(out)
    size = max(_PART, -(-len(opened) // _MOST_PARTS))
    done = _finished(folder, store_manifest(encoder, opened, processor, columns, size))
    if done < len(opened):
        _say_how_long(encoder, opened, loading, len(opened) - done)
    try:
        store = embed_images(
            encoder, opened, processor, folder, columns=columns, loading=loading, shard_size=size
        )
    except ValueError as error:
        # who groups images has asked for no column
        raise ValueError(str(error).replace(f"features {columns[0]} of", "features of")) from error
    features = store.features(columns[0])
    return _known(opened, features, store.indices.tolist(), store.broken)


def features_folder(out: Path) -> Path:
    """Where the features lie until the groups in `out` are written."""
    whole = out.absolute()
    return whole.with_name(f".{whole.name}.features")


def _finished(folder: Path, wanted: StoreManifest) -> int:
    """How many images are encoded already; what is of other images or another model is removed."""
    try:
        manifest = read_manifest(folder)
        other = manifest is not None and differences(manifest, wanted, ("shard_size",))
    except ValueError as error:
        other = [str(error)]
    if other:
        logger.warning("%s is of another model or other images: it is made anew", folder)
        shutil.rmtree(folder)
        return 0

    records = [read_record(folder, shard) for shard in recorded_shards(folder)]
    done = sum(record["rows"] + len(record["broken"]) for record in records if record)
    if done:
        total = wanted["num_images"]
        say(f"{done} of {total} images were encoded by the run before and are not encoded again")
    return done


def _say_how_long(
    encoder: MimRefinerModel, images: ImageDataset, loading: Loading, left: int
) -> None:
    """How long the images that are left will take, by a first batch of them."""
    first = min(len(images), loading.batch_size)
    # that few are encoded sooner than measured
    if left <= 2 * first:
        return
    batch = images.subset(range(first))
    begin = time.perf_counter()
    columns = feature_columns(encoder.config)
    processor = vars(encoder)["image_processor"]
    encode_in_memory(encoder, batch, processor, columns, loading, stop_at_broken=False)
    speed = first / (time.perf_counter() - begin)
    say(
        f"{left} images at about {speed:.3g} a second, by a first batch: "
        f"about {duration(left / speed)}, then the groups"
    )


def say(line: str) -> None:
    """A line for people, where the progress is shown."""
    print(line, file=sys.stderr, flush=True)


def _known(
    images: ImageDataset, features: Tensor, indices: Sequence[int], broken: Sequence[Any]
) -> KnownFeatures:
    """From places in the whole data set to places among `images`."""
    place_of = {int(index): place for place, index in enumerate(images.indices)}
    lost: list[UnreadImage] = [
        {"index": place_of[image["index"]], "image": image["path"], "error": image["reason"]}
        for image in broken
    ]
    return KnownFeatures(images, features, [place_of[int(index)] for index in indices], lost)


# --- from a store ---------------------------------------------------------------------------------


def from_store(store: FeatureStore) -> KnownFeatures:
    """What a store of `mim-refiner embed` holds; its images are looked for where they were."""
    column = store.manifest["own_columns"][-1]
    if column not in store.columns:
        column = next(iter(store.columns))
        logger.warning("%s: the column %s makes the groups", store.folder, column)

    indices = store.indices.tolist() + [image["index"] for image in store.broken]
    paths = store.paths + [image["path"] for image in store.broken]
    images = _images_behind(store, indices, paths)
    lost = _lost(images)
    if lost:
        logger.warning(
            "%d of %d images are no longer where they were, such as %s: they are in groups.csv, "
            "without a picture",
            len(lost),
            len(paths),
            one_line(images.describe(lost[0])),
        )

    readable = len(store)
    broken: list[UnreadImage] = [
        {"index": readable + place, "image": image["path"], "error": image["reason"]}
        for place, image in enumerate(store.broken)
    ]
    return KnownFeatures(images, store.features(column), list(range(readable)), broken)


def _images_behind(store: FeatureStore, indices: list[int], paths: list[str]) -> ImageDataset:
    """The images of a store, in its order: the data set itself where it is unchanged."""
    data = store.manifest["data"]
    if Path(data["name"]).expanduser().exists():
        try:
            whole = open_images(data["name"])
        except (ValueError, FileNotFoundError):
            whole = None
        if whole is not None and whole.found.entries.digest == data["whole"]:
            return ImageDataset(whole.found, indices=np.array(indices, dtype=np.int64))

    sources = [Path(path) for path in paths]
    entries = Entries.of(paths, map(spelt_out, paths))
    return ImageDataset(FoundImages(sources, None, None, data["name"], entries))


def _lost(images: ImageDataset) -> list[int]:
    """The places of images that are no file any more."""
    if not isinstance(images.found.sources, list):
        return []
    lost = []
    for place, index in enumerate(images.indices):
        source = images.found.sources[int(index)]
        if isinstance(source, Path) and not source.is_file():
            lost.append(place)
    return lost
