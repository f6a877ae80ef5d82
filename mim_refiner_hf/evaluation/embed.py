"""Fill a feature store: any encoder over any images, in shards, by any number of processes, resumable at every shard.

    from mim_refiner_hf.evaluation import embed_images, feature_columns, stored_features
    columns = feature_columns(encoder.config, blocks=[8, 11], poolings=["cls", "mean"], last4=True)
    store = embed_images(encoder, images, processor, "features/", columns=columns)
    found = stored_features(encoder, images, processor, "features/")     # `extract_features` that never computes twice

Shard s holds the images from s * shard_size on, and process r of n computes shards r, r + n, r + 2 n, ...: nothing in the files
depends on how many processes there were or how often they were interrupted. The same call again verifies what is finished and
computes what is missing. The folder's format is in `feature_store.py`.
"""

import importlib.metadata
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..conversion.digests import digest as digest_of_tensor
from ..data.broken import BROKEN
from ..data.images import ImageDataset
from ..data.loading import Loading
from ..data.sources import digest
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import progress_bar, rank, wait_for_everyone, world_size
from ..runtime.files import write_json
from ..runtime.lock import check_writable, sole_run
from .feature_store import (
    FORMAT,
    MANIFEST,
    FeatureStore,
    feature_set,
    is_intact,
    number_of_shards,
    read_manifest,
    read_record,
    record_file,
    write_shard,
)
from .features import (
    FeatureSet,
    blocks_of,
    check_blocks,
    check_columns,
    encode,
    feature_columns,
    frozen,
    own_column,
)
from .image_shards import Batch, Images, ShardSampler, shard_loader

logger = logging.getLogger(__name__)

SHARD_SIZE = 8192  # images
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKAGES = (
    "mim_refiner_hf",
    "torch",
    "torchvision",
    "transformers",
    "datasets",
    "pillow",
    "pyarrow",
)


def embed_images(
    encoder: MimRefinerModel,
    images: Images,
    processor: Any,
    folder: str | Path,
    *,
    columns: Sequence[str] = (),
    loading: Loading = Loading(),
    shard_size: int | None = None,
    command: str | None = None,
) -> FeatureStore:
    """Encode every image once and keep its features in `folder`; several processes share the work.

    Args:
        encoder: computes in the dtype its weights have (`encoder.to(torch.bfloat16)` for bf16); comes back as it was.
        images: of `open_images` or `open_stream`. A broken one is listed in `broken.json` and has no row.
        processor: an image processor whose output has the encoder's native size.
        folder: a new one, or the store of an earlier call: finished shards are verified and kept. One with more columns will do.
        columns: names as in features.py; none for the encoder's own pooling of the last block.
        loading: as in `extract_features`.
        shard_size: images per file; None for what `folder` has, in a new one 8192, or fewer where that gives every process a shard.
        command: what to run to get this store again, for the manifest.

    Returns:
        The complete store, on every process.

    Raises:
        ValueError: before anything is written, for settings and images that make no sense, and for a folder that holds something
            else or features of other weights, preprocessing, dtype, images or columns; it names what differs. Likewise while
            another run fills it.
    """
    folder = Path(folder)
    columns = check_columns(columns or feature_columns(encoder.config), encoder.config)
    check_settings(images, loading, shard_size)
    new = describe(encoder, images, processor, columns, shard_size, command)
    with (
        nullcontext() if is_complete(folder) else sole_run(folder, "--out")
    ):  # anyone may read a complete store
        manifest = claim(folder, new, shard_size is None)
        num_images = fill(folder, manifest, encoder, images, processor, loading)
        wait_for_everyone()
        if rank() == 0:
            finish(folder, manifest | {"num_images": num_images})
        wait_for_everyone()
    return FeatureStore(folder)


def stored_features(
    encoder: MimRefinerModel,
    images: Images,
    processor: Any,
    folder: str | Path,
    *,
    blocks: Sequence[int] | None = None,
    loading: Loading = Loading(),
) -> FeatureSet:
    """`extract_features`, by way of a store: read from `folder` where it holds them, computed and kept there where it does not.

    Arguments and errors as in `extract_features` and `embed_images`. A broken image has no row: see `feature_set`.
    """
    own = [own_column(encoder.config, block) for block in range(encoder.config.num_hidden_layers)]
    columns = [own[block] for block in (*check_blocks(blocks or (), len(own)), -1)]
    return feature_set(
        embed_images(encoder, images, processor, folder, columns=columns, loading=loading),
        blocks or (),
        own,
    )


# --- what a store is of -------------------------------------------------------------------------------------------------------


def check_settings(images: Images, loading: Loading, shard_size: int | None) -> None:
    """ValueError for numbers that make no sense, and for a data set without images."""
    for name, value, least in (
        ("batch_size", loading.batch_size, 1),
        ("num_workers", loading.num_workers, 0),
        ("shard_size", shard_size, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    if (
        not len(images)
        if isinstance(images, ImageDataset)
        else next(iter(images.stream), None) is None
    ):
        raise ValueError(f"{images.name} has no images, so there is nothing to embed")


def weights_fingerprint(encoder: MimRefinerModel) -> str:
    """16 hexadecimal digits of all weights, and of the settings that say how they are used (but for those of pooling)."""
    names = {name for name in MimRefinerConfig.__annotations__ if not name.startswith("_")} - {
        "pooling",
        "features",
    }
    settings = {name: getattr(encoder.config, name) for name in names}
    tensors = sorted(encoder.state_dict().items())
    return digest(
        [
            json.dumps(settings, sort_keys=True),
            *(f"{name} {digest_of_tensor(tensor)}" for name, tensor in tensors),
        ]
    )


def data_fingerprint(images: Images) -> str:
    """16 hexadecimal digits that tell data sets apart; of a stream only name, configuration and split are known beforehand."""
    if isinstance(images, ImageDataset):
        return images.fingerprint
    return digest([images.name, str(images.stream.info.config_name), str(images.stream.split)])


def whole_fingerprint(images: Images) -> str:
    """`data_fingerprint` of the data set that a subset was taken from: `index` counts its images."""
    return (
        images.found.entries.digest
        if isinstance(images, ImageDataset)
        else data_fingerprint(images)
    )


def describe(
    encoder: MimRefinerModel,
    images: Images,
    processor: Any,
    columns: Sequence[str],
    shard_size: int | None,
    command: str | None,
) -> dict[str, Any]:
    """The manifest of a new store."""
    config, depth = encoder.config, encoder.config.num_hidden_layers
    num_images = len(images) if isinstance(images, ImageDataset) else None
    return {
        "format": FORMAT,
        "encoder": {
            "name": config.name_or_path or "unnamed",
            "fingerprint": weights_fingerprint(encoder),
        },
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "preprocessing": json.loads(processor.to_json_string()),
        "data": {
            "name": images.name,
            "fingerprint": data_fingerprint(images),
            "whole": whole_fingerprint(images),
        },
        "num_images": num_images,
        "class_names": images.class_names,
        "columns": {
            column: config.hidden_size * max(1, len(blocks_of(column, depth))) for column in columns
        },
        "own_columns": [own_column(config, block) for block in range(depth)],
        "shard_size": shard_size
        or (min(SHARD_SIZE, -(-num_images // world_size())) if num_images else SHARD_SIZE),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "command": command,
    }


def differences(old: dict[str, Any], new: dict[str, Any], any_shard_size: bool) -> list[str]:
    """In words, what keeps the features of `new` from being those of `old`; more columns than asked for do not."""
    keys = ["dtype", "preprocessing"] + ["shard_size"] * (not any_shard_size)
    found = [f"{key} was {old[key]}, is {new[key]}" for key in keys if old[key] != new[key]]
    parts = ["data"] + ["encoder"] * (
        old["dtype"] == new["dtype"]
    )  # other weights go without saying in another dtype
    for part in parts:
        was, now = (f"{side[part]['name']} ({side[part]['fingerprint']})" for side in (old, new))
        if old[part]["fingerprint"] != new[part]["fingerprint"]:
            found.append(f"{part} was {was}, is {now}")
    if missing := [column for column in new["columns"] if column not in old["columns"]]:
        found.append(f"columns were {', '.join(old['columns'])}, now with {', '.join(missing)}")
    return found


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a store with nothing left to compute."""
    try:
        FeatureStore(folder)
    except (FileNotFoundError, ValueError):
        return False
    return True


def claim(folder: Path, new: dict[str, Any], any_shard_size: bool) -> dict[str, Any]:
    """The manifest of the store in `folder`, which is `new` where there was none; ValueError where it is of something else."""
    old = read_manifest(folder)
    if old is None:
        check_writable(folder, "--out")
    elif differing := differences(old, new, any_shard_size):
        raise ValueError(
            f"{folder} holds other features: {'; '.join(differing)}; name another folder, or remove this one"
        )
    wait_for_everyone()  # all have looked
    if old is None and rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MANIFEST, new)
    wait_for_everyone()
    return new if old is None else old


# --- filling the store --------------------------------------------------------------------------------------------------------


def intact_shards(folder: Path, shards: Iterable[int]) -> set[int]:
    """Those of `shards` that are finished and as they were written; a damaged one is named and loses its record."""
    intact = set()
    for shard in shards:
        if is_intact(folder, shard):
            intact.add(shard)
        elif (record := record_file(folder, shard)).exists():
            logger.warning(
                "shard %d in %s is not what was written; computing it again", shard, folder
            )
            record.unlink()
    return intact


def fill(
    folder: Path,
    manifest: dict[str, Any],
    encoder: MimRefinerModel,
    images: Images,
    processor: Any,
    loading: Loading,
) -> int:
    """Compute those of this process's shards that are not finished; returns how many images there are, broken ones included."""
    size, processes, first = manifest["shard_size"], world_size(), rank()
    count = number_of_shards(manifest)
    recorded = sorted(
        shard
        for path in (folder / "records").glob("*.json")
        if (shard := int(path.stem)) % processes == first
    )
    verifying = progress_bar(
        recorded, hidden=first > 0 or not recorded, desc="verifying", unit=" shards", leave=False
    )
    intact = intact_shards(folder, verifying)
    total = None  # of a stream nobody knows
    if count is not None:
        todo = [shard for shard in range(first, count, processes) if shard not in intact]
        if not todo:
            return int(manifest["num_images"])
        total = sum(min(size, manifest["num_images"] - shard * size) for shard in todo)
    sampler = ShardSampler(
        images,
        size,
        loading.batch_size,
        lambda shard: shard % processes == first and shard not in intact,
    )
    desc = "features" if processes == 1 else f"features, process 1 of {processes}"
    with (
        frozen(encoder, loading.device) as device,
        progress_bar(total=total, hidden=first > 0, desc=desc, unit=" images") as bar,
    ):
        loader = shard_loader(
            sampler, processor, num_workers=loading.num_workers, pin_memory=device.type == "cuda"
        )
        for shard, batches in itertools.groupby(loader, key=lambda batch: batch.shard):
            write_shard(
                folder,
                shard,
                *encode_shard(encoder, batches, manifest["columns"], device, bar.update),
            )
    assert sampler.num_images is not None  # the loader came to the end of the stream
    return sampler.num_images


def encode_shard(
    encoder: MimRefinerModel,
    batches: Iterable[Batch],
    columns: dict[str, int],
    device: torch.device,
    done: Callable[[int], Any],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rows and broken images of one shard, for `write_shard`; `done` is told of the images as they are finished."""
    rows: list[tuple[int, int, str]] = []
    broken: list[dict[str, Any]] = []
    features = {
        column: [np.empty((0, width), dtype=np.float32)] for column, width in columns.items()
    }
    for batch in batches:
        if batch.pixel_values is not None:
            pixel_values = batch.pixel_values.to(device, non_blocking=True)
            for column, vectors in encode(encoder, pixel_values, list(columns)).items():
                features[column].append(vectors.cpu().numpy())
        rows += batch.rows
        broken += batch.broken
        done(len(batch.rows) + len(batch.broken))
    names = {name: [row[i] for row in rows] for i, name in enumerate(("index", "label", "path"))}
    return names | {column: np.concatenate(parts) for column, parts in features.items()}, broken


def finish(folder: Path, manifest: dict[str, Any]) -> None:
    """Note the number of images, and list the broken ones in `broken.json`."""
    records = [read_record(folder, shard) for shard in range(number_of_shards(manifest) or 0)]
    broken = {"images": [image for record in records if record for image in record["broken"]]}
    for path, content in ((folder / BROKEN, broken), (folder / MANIFEST, manifest)):
        if (
            not path.is_file() or json.loads(path.read_text()) != content
        ):  # a complete store is only read
            write_json(path, content)


__all__ = ["embed_images", "stored_features"]
