"""`embed`: the features of every image, as an array in memory or as a store in a folder.

    vectors = embed(encoder, "photos/")                  # (n, width) float32
    vectors = embed("facebook/vit-mae-base", images)     # whatever `open_images` takes
    vectors = embed(encoder, images, out="features/")    # kept; the same call again resumes

    choice = FeatureChoice(blocks=[8, 11])
    store = store_features("facebook/vit-mae-base", "photos/", Path("features/"), choice=choice)

The vectors are what the paper evaluates and what `cluster` groups: the pooled raw output of the
last block (evaluation/features.py). `mim-refiner embed` runs `store_features`.
"""

import copy
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from ..conversion import load_encoder
from ..data.broken import BROKEN
from ..data.found import MAIN_PART, Part
from ..data.images import Broken, ImageDataset, open_images
from ..data.loading import Loading
from ..data.stream import open_stream
from ..evaluation.embed import PRECISIONS, embed_images, encode_in_memory
from ..evaluation.feature_store import FeatureStore
from ..evaluation.features import OWN_FEATURES, FeatureChoice, feature_columns
from ..evaluation.image_shards import SetOrStream
from ..evaluation.int8 import in_int8, least_cosine
from ..evaluation.shard_files import StoreManifest, read_manifest
from ..runtime.device import check_int8, feature_precision, warn_of_emulation
from ..runtime.distributed import rank
from ..runtime.precision import Precision
from ..runtime.wording import setting
from .channels import fit_and_tell

logger = logging.getLogger(__name__)

# of int8 vectors with fp32 ones, as of an export in 8 bits
_LEAST_COSINE = 0.999


def embed(
    model: Any,
    images: Any,
    *,
    out: str | Path | None = None,
    skip_broken: bool = False,
    dtype: Precision | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    device: torch.device | str | None = None,
) -> NDArray[np.float32]:
    """One vector per image, row i of image i.

    Args:
        model: what `load_encoder` takes: a name, a folder, a file, a model object.
        images: what `open_images` takes: a folder, a list of paths, PIL images or arrays, a data
            set of `datasets` or torch.
        out: a folder that keeps the features as a store; finished parts are not computed again.
        skip_broken: give an image that cannot be read a row of NaN, and name it in a warning. An
            error is raised for it otherwise.
        dtype: of the computation, as of `store_features`; None for that of the weights.
        batch_size: images per forward pass.
        num_workers: processes that decode.
        device: where to compute; None for a GPU where there is one.

    Returns:
        (n, width) float32.

    Raises:
        ValueError: for images or a model that will not do, and for the first image that cannot be
            read, unless `skip_broken`.
        FileNotFoundError: for a path that leads nowhere.
    """
    loading = Loading(batch_size, num_workers, device or device_here())
    check_dtype(dtype, loading)
    encoder: Any = load_encoder(model)
    opened = open_images(images, num_channels=encoder.config.num_channels)
    encoder, opened = fit_and_tell(encoder, opened)
    columns = feature_columns(encoder.config)
    begun = None if out is None else read_manifest(Path(out))
    encoder = in_precision(encoder, opened, dtype, columns, loading, begun)

    if out is None:
        rows, broken = encode_in_memory(
            encoder,
            opened,
            encoder.image_processor,
            columns,
            loading,
            stop_at_broken=not skip_broken,
        )
        values = rows.columns[columns[0]]
        indices = np.asarray(rows.index, dtype=np.int64)
    else:
        processor = encoder.image_processor
        store = embed_images(encoder, opened, processor, out, columns=columns, loading=loading)
        values = store.features(columns[0]).numpy()
        indices = store.indices.numpy()
        broken = list(store.broken)
    if broken:
        _tell_of_broken(broken, len(opened), skip_broken)

    places = _positions(opened, indices)
    wrong = ~np.isfinite(values).all(axis=1)
    if wrong.any():
        first = opened.describe(int(places[wrong.argmax()]))
        raise ValueError(
            f"The features of {wrong.sum()} of {len(opened)} images are not finite, first those of "
            f"{first}: the model's weights are broken, or overflow in half precision."
        )
    vectors = np.full((len(opened), values.shape[1]), np.nan, dtype=np.float32)
    vectors[places] = values
    return vectors


def store_features(
    model: Any,
    images: Any,
    out: Path,
    *,
    part: Part = MAIN_PART,
    choice: FeatureChoice = OWN_FEATURES,
    dtype: Precision = "fp32",
    loading: Loading = Loading(),
    shard_size: int | None = None,
    command: str | None = None,
) -> FeatureStore:
    """Fill the store in `out`, or complete it; several processes share the work.

    Args:
        model, images: as of `embed`.
        part: of a data set that is named.
        choice: which features.
        dtype: of the computation; float32 is stored. "auto": what the features that are there have,
            else bf16 where the device computes it; the choice is printed. "int8": for a CPU,
            see evaluation/int8.py; refused for an encoder whose vectors it turns.
        loading, shard_size, command: as of `embed_images`.

    Raises:
        ValueError, FileNotFoundError: for images, a model or a folder that will not do, and where
            none of the images can be read.
    """
    check_dtype(dtype, loading)
    # says so now if the folder is something else
    begun = read_manifest(out)
    encoder: Any = load_encoder(model)
    open_source: Any = open_stream if part.streaming else open_images
    opened = open_source(
        images,
        config=part.config,
        split=part.split,
        num_channels=encoder.config.num_channels,
        options=part.options,
    )
    if isinstance(opened, ImageDataset):
        encoder, opened = fit_and_tell(encoder, opened)
    columns = choice.columns(encoder.config)
    encoder = in_precision(encoder, opened, dtype, columns, loading, begun)
    store = embed_images(
        encoder,
        opened,
        encoder.image_processor,
        out,
        columns=columns,
        loading=loading,
        shard_size=shard_size,
        command=command,
    )
    if store.broken and len(store) == 0:
        raise ValueError(
            f"None of the {len(store.broken)} images can be read, first: "
            f"{store.broken[0]['reason']} All are listed in {out / BROKEN}."
        )
    return store


def check_dtype(asked: Precision | None, loading: Loading) -> None:
    """Raise a ValueError for an unknown name, and for int8 on a GPU; before a model is loaded."""
    if asked is not None and asked not in get_args(Precision):
        raise ValueError(
            f"{setting('dtype', asked)}: must be one of {', '.join(get_args(Precision))}"
        )
    if asked == "int8":
        check_int8(setting("dtype", asked), _device_type(loading))


def in_precision(
    encoder: Any,
    images: SetOrStream,
    asked: Precision | None,
    columns: Sequence[str],
    loading: Loading,
    begun: StoreManifest | None = None,
) -> Any:
    """The encoder as it is to compute; a copy, where that changes its weights.

    Args:
        images: of which a first batch is computed in int8 and in fp32.
        asked: as `check_dtype` lets it pass; None for the numbers that the weights are in.
        columns: the features to compute.
        begun: the manifest of the features that are there, for "auto".

    Raises:
        ValueError: where the cosine of a vector in int8 with the one in fp32 is below 0.999; and
            for "auto" on a GPU where the features that are there are in int8.
    """
    if asked is None:
        return encoder
    precision, may_change = _precision(asked, begun, _device_type(loading))
    number_type = PRECISIONS.get(precision, torch.float32)
    if encoder.dtype != number_type:
        encoder = copy.deepcopy(encoder).to(number_type)
    if precision != "int8":
        return encoder

    quick = in_int8(encoder)
    cosine, count = least_cosine(encoder, quick, images, columns, loading)
    compared = f"on the first {count} images the cosine of int8 with fp32 features is"
    named = setting("dtype", "int8")
    if not cosine >= _LEAST_COSINE:
        if may_change:
            if rank() == 0:
                reason = f"{compared} down to {cosine:.5f}, below {_LEAST_COSINE}"
                print(f"{setting('dtype', 'auto')}: fp32, for {reason}", flush=True)
            return encoder
        if math.isnan(cosine):
            raise ValueError(f"{named}: {compared} not a number; the model's weights are broken")
        raise ValueError(
            f"{named}: {compared} down to {cosine:.5f}, below {_LEAST_COSINE}; int8 spoils this "
            "encoder, use bf16 or fp32"
        )
    if rank() == 0 and count:
        print(f"{named}: {compared} at least {cosine:.5f}", flush=True)
    return quick


def _precision(asked: Precision, begun: StoreManifest | None, device: str) -> tuple[str, bool]:
    """In which numbers to compute: "int8", or a name in `PRECISIONS`; and whether fp32 will do too.

    What was chosen is said, as is bfloat16 that is only emulated.

    Args:
        begun: the manifest of the features that are there.
    """
    precision = str(feature_precision(asked, device))
    may_change = asked == "auto" and begun is None
    if asked == "auto":
        why = {
            "bf16": f"as this {device} computes bfloat16",
            "int8": f"as this {device} computes int8, and bfloat16 not",
            "fp32": f"as this {device} is not known to compute bfloat16 or int8",
        }[precision]
        names = {str(kind).removeprefix("torch."): name for name, kind in PRECISIONS.items()}
        names["int8"] = "int8"
        if begun is not None and begun["dtype"] in names:
            precision = names[begun["dtype"]]
            why = "as the features that are there"
            if precision == "int8" and device != "cpu":
                raise ValueError(
                    f"{setting('dtype', 'auto')}: the features that are there are in int8, which "
                    f"is for a CPU, and this computes on {device}; name another folder"
                )
        if rank() == 0:
            print(f"{setting('dtype', 'auto')}: {precision}, {why}", flush=True)
    if precision == "bf16" and rank() == 0:
        warn_of_emulation(setting("dtype", precision), device)
    if precision == "int8" and asked == "auto":
        check_int8(setting("dtype", precision), device)
    return precision, may_change


def _device_type(loading: Loading) -> str:
    return torch.device(loading.device or "cpu").type


def device_here() -> str:
    """Where to compute."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _positions(images: ImageDataset, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where images with these places in the whole data set stand among `images`."""
    position = np.full(len(images.found.sources), -1, dtype=np.int64)
    position[images.indices] = np.arange(len(images))
    return position[indices]


def _tell_of_broken(broken: Sequence[Broken], total: int, skip: bool) -> None:
    first = f"{len(broken)} of {total} images cannot be read, first: {broken[0]['reason']}"
    if not skip:
        raise ValueError(f"{first} Or give {setting('skip_broken', True)}: NaN in its row.")
    if rank() == 0:
        logger.warning("%s Their rows are NaN", first)
