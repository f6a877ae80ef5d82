"""How images are preprocessed for an encoder: as its source says, else ImageNet's, natively sized.

image_processor(encoder.config, saved_preprocessing("facebook/vit-mae-base"))
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.image_processing_mim_refiner import MimRefinerImageProcessor

_FILE = "preprocessor_config.json"
# where transformers 5 nests the same for models with several inputs
PROCESSOR = "processor_config.json"
_NESTED = "image_processor"
# what changes the pixels in a way that is not ours, by its key
_FOREIGN = (
    "do_flip_channel_order",
    "do_pad",
    "do_grayscale",
    "do_align_long_axis",
    "do_thumbnail",
    "rescale_offset",
)
# ConvNeXT's kind resizes whole images from this side on, and crops smaller ones
_WARPED_FROM = 384


def image_processor(
    config: MimRefinerConfig, source: Mapping[str, Any]
) -> MimRefinerImageProcessor:
    """The preprocessing that goes with an encoder.

    Args:
        config: of the encoder, for its native size and its number of channels.
        source: fields of a `preprocessor_config.json`; what it does not say is ImageNet's, at the
            native size.

    Raises:
        ValueError: naming the key, for one that is not supported, or has no such value.
    """
    for key in _FOREIGN:
        if source.get(key):
            raise ValueError(
                f"{_FILE} of the model says {key} {source[key]!r}, which is not supported; "
                "preprocess the images yourself, and take it out"
            )
    height, width = config.image_hw
    native = {"height": height, "width": width}
    size = _sides(source.get("size"), native)
    crop = _sides(source.get("crop_size"), native)
    if "height" in size and not source.get("do_center_crop"):
        crop = size
    if source.get("crop_pct") is not None:
        size, crop = _of_a_share(size, source["crop_pct"])

    mean = list(MimRefinerImageProcessor.image_mean)
    std = list(MimRefinerImageProcessor.image_std)
    # ImageNet's average grey for every channel
    if config.num_channels != 3:
        mean = [sum(mean) / 3] * config.num_channels
        std = [sum(std) / 3] * config.num_channels
    mean, std = _of_unit_pixels(
        source, source.get("image_mean", mean), source.get("image_std", std)
    )
    return MimRefinerImageProcessor(
        size={"shortest_edge": max(size.values())},
        crop_size=crop,
        image_mean=mean,
        image_std=std,
        resample=source.get("resample", MimRefinerImageProcessor.resample),
        do_convert_rgb=config.num_channels == 3,
        value_range=source.get("value_range"),
    )


def _of_unit_pixels(source: Mapping[str, Any], mean: Any, std: Any) -> tuple[Any, Any]:
    """Mean and deviation by which pixels in 0 to 1 become what the source makes of 0 to 255.

    A source may scale by another factor, or not at all, and may not normalise. All of that is one
    line, so that training and evaluation need no other words for it.
    """
    factor = 1 / 255
    if source.get("do_rescale") is False:
        factor = 1.0
    elif source.get("rescale_factor") is not None:
        factor = _positive(source, "rescale_factor")
    normalises = source.get("do_normalize") is not False
    if normalises and math.isclose(factor, 1 / 255, rel_tol=1e-6):
        return mean, std

    scale = 255 * factor
    if not normalises:
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    return [value / scale for value in mean], [value / scale for value in std]


def _of_a_share(size: dict[str, int], share: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Size and crop where the crop is a share of the resized image, as in ConvNeXT's files."""
    side = max(size.values())
    square = {"height": side, "width": side}
    if side >= _WARPED_FROM:
        return square, square
    share = _positive({"crop_pct": share}, "crop_pct")
    return {"shortest_edge": int(side / share)}, square


def _positive(source: Mapping[str, Any], key: str) -> float:
    """The number under a key; ValueError unless it is one above 0."""
    value = source[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{_FILE} of the model says {key} {value!r:.100}; it is a number above 0")
    return float(value)


def nested_preprocessing(processor: Mapping[str, Any]) -> dict[str, Any]:
    """What a `processor_config.json` says of images; empty where it says nothing."""
    nested = processor.get(_NESTED)
    return dict(nested) if isinstance(nested, Mapping) else {}


def _sides(stated_size: Any, native: dict[str, int]) -> dict[str, int]:
    """A size as a dictionary: an integer, as in old files, is a square; nothing is the native."""
    if isinstance(stated_size, int):
        return {"height": stated_size, "width": stated_size}
    return dict(stated_size or native)


def saved_preprocessing(name: str) -> dict[str, Any]:
    """The preprocessing that a folder or a Hub name states; empty where it states none."""
    if not name:
        return {}
    return nested_preprocessing(_stated(name, PROCESSOR)) or _stated(name, _FILE)


def _stated(name: str, file: str) -> dict[str, Any]:
    """The object in a JSON file of a folder or a Hub name; empty where there is none."""
    path = Path(name) / file
    found = str(path) if path.is_file() else None
    if not Path(name).exists() and name.count("/") == 1:
        try:
            found = cached_file(name, file)
        # no such model or file, or no network: the family's own preprocessing is as good
        except (OSError, ValueError):
            found = None
    if found is None:
        return {}
    stated = json.loads(Path(found).read_text(encoding="utf-8"))
    return dict(stated) if isinstance(stated, Mapping) else {}


__all__ = ["PROCESSOR", "image_processor", "nested_preprocessing", "saved_preprocessing"]
