"""Fill a feature store: any encoder over any images, in shards, by any number of processes.

    from mim_refiner_hf.evaluation import embed_images, feature_columns
    columns = feature_columns(encoder.config, blocks=[8, 11], poolings=["cls", "mean"], last4=True)
    store = embed_images(encoder, images, processor, "features/", columns=columns)

Shard s holds the images from s * shard_size on, and process r of n computes the shards r, r + n,
r + 2 n, ...: nothing in the files depends on how many processes there were or how often they were
interrupted. The same call again verifies what is finished and computes what is missing. The
folder's format is in `shard_files.py`.
"""

import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from ..data.broken import BROKEN
from ..data.images import Broken, ImageDataset
from ..data.loading import Loading, Processor
from ..data.sources import say_if_misstated
from ..data.stream import ImageStream
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import (
    gather_objects,
    progress_bar,
    rank,
    wait_for_everyone,
    world_size,
)
from ..runtime.files import write_json
from ..runtime.lock import check_writable, sole_run
from .feature_store import FeatureStore
from .features import check_columns, column_widths, encode, feature_columns, frozen
from .image_shards import SetOrStream, ShardBatch, ShardSampler, shard_loader
from .manifest import differences, store_manifest
from .shard_files import (
    STORE_MANIFEST,
    ShardRows,
    StoreManifest,
    images_in,
    number_of_shards,
    read_manifest,
    read_record,
    record_file,
    recorded_shards,
    shard_file,
    shard_is_intact,
    write_shard,
)

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def embed_images(
    encoder: MimRefinerModel,
    images: SetOrStream,
    processor: Processor,
    folder: str | Path,
    *,
    columns: Sequence[str] = (),
    loading: Loading = Loading(),
    shard_size: int | None = None,
    command: str | None = None,
) -> FeatureStore:
    """Encode every image once and keep its features in `folder`; several processes share the work.

    Args:
        encoder: computes in the dtype its weights have (`encoder.to(torch.bfloat16)` for bf16);
            comes back as it was.
        images: of `open_images` or `open_stream`. A broken one is listed in `broken.json` and has
            no row.
        processor: an image processor whose output has the encoder's native size.
        folder: a new one, or the store of an earlier call: finished shards are verified and kept.
            One with more columns will do.
        columns: names as in features.py; none for the encoder's own pooling of the last block.
        loading: images per forward pass, workers, and where to encode.
        shard_size: images per file; None for what `folder` has, in a new one 8192, or fewer where
            that gives every process a shard.
        command: what to run to get this store again, for the manifest.

    Returns:
        The complete store, on every process.

    Raises:
        ValueError: before anything is written, for settings and images that make no sense, and for
            a folder that holds something else or features of other weights, preprocessing, dtype,
            images or columns; it names what differs. Likewise while another run fills it. For
            features that are not finite, before the shard that would hold them is written.
    """
    folder = Path(folder)
    columns = check_columns(columns or feature_columns(encoder.config), encoder.config)
    check_embedding(images, shard_size)
    new = store_manifest(encoder, images, processor, columns, shard_size, command)

    # anyone may read a complete store
    with nullcontext() if is_complete(folder) else sole_run(folder, "out"):
        compared = [] if shard_size is None else ["shard_size"]
        manifest = claim(folder, new, compared)
        try:
            manifest = fill_store(folder, manifest, encoder, images, processor, loading)
        # such as features that are not finite
        except ValueError:
            forget_empty(folder)
            raise
        wait_for_everyone()
        if rank() == 0:
            finish(folder, manifest)
        wait_for_everyone()
    return FeatureStore(folder)


def grow_store(
    folder: Path,
    manifest: StoreManifest,
    encoder: MimRefinerModel,
    images: ImageDataset,
    processor: Processor,
    loading: Loading,
) -> None:
    """Add images to the store that grows in `folder`: in new shards, behind those that it has.

    An interrupted call leaves its finished shards to be used, so that the next one only has the
    other images to add.

    Args:
        manifest: the manifest of a store of these columns over the whole data set.
    """
    with sole_run(folder, "features"):
        growing = manifest.copy()
        growing["data"] = {**manifest["data"], "fingerprint": manifest["data"]["whole"]}
        growing["columns"] = {}
        growing["num_images"] = None
        claim(folder, growing, compared=())
        # the main process says it, for another may see what the first one has just added
        known = recorded_shards(folder)
        following = known[-1] + 1 if known else 0
        first = gather_objects(following)[0]

        size = min(manifest["shard_size"], math.ceil(len(images) / world_size()))
        sampler = ShardSampler(images, size, loading.batch_size, is_own_shard)
        columns = manifest["columns"]
        write_shards(folder, columns, encoder, sampler, processor, loading, first_shard=first)
        wait_for_everyone()


def encode_in_memory(
    encoder: MimRefinerModel,
    images: ImageDataset,
    processor: Processor,
    columns: Sequence[str],
    loading: Loading,
    *,
    stop_at_broken: bool,
) -> tuple[ShardRows, list[Broken]]:
    """What `embed_images` writes, kept in memory: rows of the readable images, and the others.

    Args:
        stop_at_broken: go no further than the batch with the first image that cannot be read.
    """
    check_embedding(images, None)
    sampler = ShardSampler(images, len(images), loading.batch_size, lambda shard: True)
    met: list[Broken] = []

    def until_broken(batches: Iterable[ShardBatch]) -> Iterator[ShardBatch]:
        for batch in batches:
            yield batch
            met.extend(batch.broken)
            if met and stop_at_broken:
                return

    widths = column_widths(columns, encoder.config)
    total = len(images)
    with (
        frozen(encoder, loading.device) as device,
        progress_bar(total=total, desc="features", unit=" images", leave=False) as bar,
    ):
        loader = shard_loader(sampler, processor, loading.num_workers, device)
        return encode_shard(encoder, until_broken(loader), widths, device, bar.update)


# --- the store to fill ----------------------------------------------------------------------------


def check_embedding(images: SetOrStream, shard_size: int | None) -> None:
    """ValueError for shards without images, and for a data set without."""
    if shard_size is not None and shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}; it must be at least 1")
    if isinstance(images, ImageDataset):
        is_empty = len(images) == 0
    else:
        is_empty = next(iter(images.stream), None) is None
    if is_empty:
        raise ValueError(f"{images.name} has no images, so there is nothing to embed")


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a store with nothing left to compute."""
    try:
        FeatureStore(folder)
    except (FileNotFoundError, ValueError):
        return False
    return True


def claim(folder: Path, new: StoreManifest, compared: Sequence[str]) -> StoreManifest:
    """The manifest of the store in `folder`, which is `new` where there was none.

    ValueError where it is of something else; arguments as in `differences`.
    """
    old = read_manifest(folder)
    if old is None:
        check_writable(folder, "out")
    else:
        differing = differences(old, new, compared)
        if differing:
            raise ValueError(
                f"{folder} holds other features: {'; '.join(differing)}; "
                "name another folder, or remove this one"
            )
        # shards are counted up to it; of a stream it is not known before its end
        stated, counted = old["num_images"], new["num_images"]
        if stated != counted and None not in (stated, counted):
            raise ValueError(
                f"{folder / STORE_MANIFEST} is damaged: its num_images is {stated}, but the data "
                f"set has {counted}; make the features again"
            )

    wait_for_everyone()  # all have looked
    if old is None and rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STORE_MANIFEST, new)
    wait_for_everyone()
    return new if old is None else old


def forget_empty(folder: Path) -> None:
    """Take the manifest out of a store without a finished shard: it is of a model that will not do.

    In a job of several processes it stays: another one may just finish a shard.
    """
    if world_size() == 1 and not recorded_shards(folder):
        (folder / STORE_MANIFEST).unlink(missing_ok=True)


# --- filling the store ----------------------------------------------------------------------------


def is_own_shard(shard: int) -> bool:
    """Whether this process computes a shard."""
    return shard % world_size() == rank()


def intact_shards(folder: Path, shards: Iterable[int]) -> set[int]:
    """Those of `shards` that are finished and as written; a damaged one is named and removed."""
    intact = set()
    for shard in shards:
        if shard_is_intact(folder, shard):
            intact.add(shard)
        elif record_file(folder, shard).exists():
            logger.warning(
                "shard %d in %s is not what was written; computing it again", shard, folder
            )
            for path in (record_file(folder, shard), shard_file(folder, shard)):
                path.unlink(missing_ok=True)
    return intact


def fill_store(
    folder: Path,
    manifest: StoreManifest,
    encoder: MimRefinerModel,
    images: SetOrStream,
    processor: Processor,
    loading: Loading,
) -> StoreManifest:
    """Compute those of this process's shards that are not finished.

    Returns the manifest with what the end of a stream told: how many images there are, broken ones
    included, and which classes.
    """
    recorded = list(filter(is_own_shard, recorded_shards(folder)))
    bar = progress_bar(recorded, hidden=not recorded, desc="verifying", unit=" shards", leave=False)
    intact = intact_shards(folder, bar)

    stated = manifest["num_images"]
    # of a stream nobody knows it but who has read all
    if isinstance(images, ImageStream) and stated != images_in(folder):
        manifest = {**manifest, "num_images": None}
    size = manifest["shard_size"]
    count = number_of_shards(manifest)
    total = None  # of a stream nobody knows
    if count is not None and manifest["num_images"] is not None:
        todo = [shard for shard in filter(is_own_shard, range(count)) if shard not in intact]
        if not todo:
            return manifest
        total = sum(min(size, manifest["num_images"] - shard * size) for shard in todo)

    sampler = ShardSampler(
        images,
        size,
        loading.batch_size,
        lambda shard: is_own_shard(shard) and shard not in intact,
    )
    write_shards(folder, manifest["columns"], encoder, sampler, processor, loading, total=total)
    # the loader came to the end of the stream
    assert sampler.num_images is not None
    say_if_misstated(str(folder / STORE_MANIFEST), stated, sampler.num_images)
    return {**manifest, "num_images": sampler.num_images, "class_names": images.class_names}


def write_shards(
    folder: Path,
    columns: dict[str, int],
    encoder: MimRefinerModel,
    sampler: ShardSampler,
    processor: Processor,
    loading: Loading,
    *,
    total: int | None = None,
    first_shard: int = 0,
) -> None:
    """Encode the sampler's images and write its shards, numbered from `first_shard` on.

    `total` is the number of images for the progress bar.
    """
    desc = "features"
    if world_size() > 1:
        desc = f"features, process 1 of {world_size()}"

    with (
        frozen(encoder, loading.device) as device,
        progress_bar(total=total, desc=desc, unit=" images") as bar,
    ):
        loader = shard_loader(sampler, processor, loading.num_workers, device)
        for shard, batches in itertools.groupby(loader, key=lambda batch: batch.shard):
            rows, broken = encode_shard(encoder, batches, columns, device, bar.update)
            write_shard(folder, first_shard + shard, rows, broken)


def encode_shard(
    encoder: MimRefinerModel,
    batches: Iterable[ShardBatch],
    columns: dict[str, int],
    device: torch.device,
    done: Callable[[int], object],
) -> tuple[ShardRows, list[Broken]]:
    """Rows and broken images of one shard, for `write_shard`.

    `done` is told the number of images as they are finished.
    """
    rows = ShardRows([], [], [], {})
    broken: list[Broken] = []
    # an empty part, in case that all images are broken
    parts = {column: [np.empty((0, width), dtype=np.float32)] for column, width in columns.items()}
    for batch in batches:
        if batch.pixel_values is not None:
            pixel_values = batch.pixel_values.to(device, non_blocking=True)
            for column, vectors in encode(encoder, pixel_values, list(columns)).items():
                parts[column].append(vectors.cpu().numpy())
        for index, label, path in batch.rows:
            rows.index.append(index)
            rows.label.append(label)
            rows.path.append(path)
        broken += batch.broken
        done(len(batch.rows) + len(batch.broken))

    for column, of_column in parts.items():
        rows.columns[column] = np.concatenate(of_column)
    return rows, broken


def finish(folder: Path, manifest: StoreManifest) -> None:
    """Write the whole manifest, and list the broken images in `broken.json`."""
    broken: list[Broken] = []
    for shard in range(number_of_shards(manifest) or 0):
        record = read_record(folder, shard)
        broken += record["broken"] if record else []
    contents = {BROKEN: {"images": broken}, STORE_MANIFEST: manifest}
    for name, content in contents.items():
        path = folder / name
        # a complete store is only read
        if not path.is_file() or json.loads(path.read_text()) != content:
            write_json(path, content)
