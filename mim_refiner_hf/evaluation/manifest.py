"""What a feature store is of: its manifest, and what keeps two stores from being the same.

    manifest = store_manifest(encoder, images, processor, ["block11.cls"])
    differences(old, manifest)            # [] where the features of `old` serve, else why not

The manifest is JSON. It names all that the features depend on (weights, dtype, preprocessing, data)
by fingerprints, and says how they were computed.
"""

import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..conversion.digests import tensor_digest
from ..data.found import digest
from ..data.images import ImageDataset
from ..data.loading import Processor
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import world_size
from .features import column_widths, own_columns
from .image_shards import SetOrStream
from .int8 import computed_in
from .shard_files import STORE_FORMAT, Identity, StoreManifest

IMAGES_PER_SHARD = 8192
# of a configuration
_NO_SETTINGS = ("pooling", "features", "format_version", "erased", "erased_directions")
_PACKAGES = (
    "mim_refiner_hf",
    "torch",
    "torchvision",
    "transformers",
    "datasets",
    "pillow",
    "pyarrow",
)


def weights_fingerprint(encoder: MimRefinerModel) -> str:
    """16 hexadecimal digits of all weights and of the settings that say how they are used.

    The settings of pooling are left out: they choose among columns. So are the format of the
    folder, and what names the eraser, which is among the weights.
    """
    settings = {
        name: getattr(encoder.config, name)
        for name in MimRefinerConfig.__annotations__
        if not name.startswith("_") and name not in _NO_SETTINGS
    }

    tensors = sorted(encoder.state_dict().items())
    parts = [json.dumps(settings, sort_keys=True)]
    parts += [f"{name} {tensor_digest(tensor)}" for name, tensor in tensors]
    return digest(parts)


def data_identity(images: SetOrStream) -> Identity:
    """Name and fingerprint of the images, and of the whole data set that a subset was taken from.

    Of a stream only name, configuration and split are known beforehand.
    """
    if isinstance(images, ImageDataset):
        fingerprint = images.fingerprint
        whole = images.found.entries.digest
    else:
        fingerprint = whole = images.fingerprint
    return {"name": images.name, "fingerprint": fingerprint, "whole": whole}


def store_manifest(
    encoder: MimRefinerModel,
    images: SetOrStream,
    processor: Processor,
    columns: Sequence[str],
    shard_size: int | None = None,
    command: str | None = None,
) -> StoreManifest:
    """The manifest of a new store."""
    num_images = len(images) if isinstance(images, ImageDataset) else None
    if shard_size is None:
        # every process gets a shard
        share = math.ceil(num_images / world_size()) if num_images else IMAGES_PER_SHARD
        shard_size = min(IMAGES_PER_SHARD, share)

    return {
        "format": STORE_FORMAT,
        "encoder": {
            "name": encoder.config.name_or_path or "unnamed",
            "fingerprint": weights_fingerprint(encoder),
        },
        "dtype": computed_in(encoder),
        "preprocessing": json.loads(processor.to_json_string()),
        "data": data_identity(images),
        "num_images": num_images,
        "class_names": images.class_names,
        "columns": column_widths(columns, encoder.config),
        "own_columns": own_columns(encoder.config),
        "shard_size": shard_size,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "command": command,
    }


def differences(
    old: StoreManifest,
    new: StoreManifest,
    compared: Sequence[str] = (),
    data: str = "fingerprint",
) -> list[str]:
    """In words, what keeps the features of `new` from being those of `old`.

    More columns than asked for do not.

    Args:
        compared: settings to compare beside dtype and preprocessing.
        data: "fingerprint" for the same images, "whole" for some of the same data set.
    """
    before: Mapping[str, Any] = old
    after: Mapping[str, Any] = new
    differing = []
    for key in ("dtype", "preprocessing", *compared):
        if before[key] != after[key]:
            differing.append(f"{key} was {before[key]}, is {after[key]}")

    identities = {"data": data}
    # other weights go without saying in another dtype
    if old["dtype"] == new["dtype"]:
        identities["encoder"] = "fingerprint"
    for part, key in identities.items():
        was, now = before[part].get(key), after[part].get(key)
        if was != now:
            names = before[part]["name"], after[part]["name"]
            differing.append(f"{part} was {names[0]} ({was}), is {names[1]} ({now})")

    missing = [column for column in new["columns"] if column not in old["columns"]]
    if missing:
        differing.append(f"columns were {', '.join(old['columns'])}, now with {', '.join(missing)}")
    return differing
