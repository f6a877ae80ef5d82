"""How images are preprocessed for an encoder: as its source says, else ImageNet's, natively sized.

image_processor(encoder.config, saved_preprocessing("facebook/vit-mae-base"))
image_processor(encoder.config, as_in_the_paper(encoder.config, stated))      # 256, then 224

Where the source states neither size nor crop, an encoder of 224 pixels gets the paper's images: the
shorter side at 256, the centre of 224. Encoders of small images see all of them, for these have no
border.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from ..model.configuration_mim_refiner import MimRefinerConfig, brief
from ..model.image_processing_mim_refiner import (
    MimRefinerImageProcessor,
    check_settings,
    sides_of,
)
from ..runtime.strangers import file_of_model, read_json
from .layout import PreprocessorFields

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
# of the resized shorter side, what the paper's crop shows
_PAPER_SHARE = 224 / 256
# pixels of a native side from which on that is what an unstated crop means
_CROPPED_FROM = 112
# ConvNeXT's kind resizes whole images from this side on, and crops smaller ones
_WARPED_FROM = 384
# Pixels of a side that a file may ask for: so many times the native ones, and so many of any model.
_TIMES_NATIVE = 4
_ALWAYS_ALLOWED = 1024


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
    height, width = config.image_hw
    whose = f"{_FILE} of the model says"
    check_settings(source, whose, max(_ALWAYS_ALLOWED, _TIMES_NATIVE * max(height, width)))
    for key in _FOREIGN:
        if source.get(key):
            raise ValueError(
                f"{whose} {key} {brief(source[key])}, which is not supported; "
                "preprocess the images yourself, and take it out"
            )

    native = {"height": height, "width": width}
    size = _sides(source.get("size"), native)
    crop = _sides(source.get("crop_size"), native)
    # files of others mean that by a height and a width, and are read by the shortest edge and the
    # centre, as in the paper
    squash = bool(source.get("squash")) and "height" in size
    if "height" in size and not source.get("do_center_crop"):
        crop = size
    if source.get("crop_pct") is not None:
        size, crop = _of_a_share(size, float(source["crop_pct"]))
    elif not source.get("size") and not source.get("do_center_crop") and crop == size:
        # neither size nor crop is stated
        side = max(crop.values())
        if side >= _CROPPED_FROM:
            size = {"shortest_edge": _around(side)}

    mean = list(MimRefinerImageProcessor.image_mean)
    std = list(MimRefinerImageProcessor.image_std)
    # ImageNet's average grey for every channel
    if config.num_channels != 3:
        mean = [sum(mean) / 3] * config.num_channels
        std = [sum(std) / 3] * config.num_channels
    mean = _per_channel(source, "image_mean", mean)
    std = _per_channel(source, "image_std", std)
    mean, std = _of_unit_pixels(source, mean, std)

    resample = source.get("resample")
    if resample is None:
        resample = MimRefinerImageProcessor.resample
    if not squash:
        size = {"shortest_edge": max(size.values())}
    return MimRefinerImageProcessor(
        size=size,
        squash=squash,
        crop_size=crop,
        image_mean=mean,
        image_std=std,
        resample=resample,
        do_convert_rgb=config.num_channels == 3,
        value_range=source.get("value_range"),
    )


def as_in_the_paper(config: MimRefinerConfig, source: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a source states, but for the size: the crop is the native one, of 8/7 of its side.

    For 224 pixels that is 256, then 224, as the authors evaluate on ImageNet and iNaturalist.
    """
    height, width = config.image_hw
    return {
        **source,
        "size": {"shortest_edge": _around(max(height, width))},
        "crop_size": {"height": height, "width": width},
        "crop_pct": None,
        "do_center_crop": True,
        "squash": False,
    }


def _around(side: int) -> int:
    """The shorter side of an image whose centre of `side` pixels is the paper's crop."""
    return round(side / _PAPER_SHARE)


def _per_channel(source: Mapping[str, Any], key: str, default: list[float]) -> list[float]:
    """The numbers under a key, one for each channel; ValueError for another number of them."""
    value = source.get(key)
    if value is None:
        return default

    numbers = list(value) if isinstance(value, list | tuple) else [value]
    if len(numbers) == 1:
        numbers *= len(default)
    if len(numbers) != len(default):
        raise ValueError(
            f"{_FILE} of the model says {key} {brief(value)}; it must be {len(default)} numbers, "
            "one for each channel that the model reads"
        )
    return numbers


def _of_unit_pixels(
    source: Mapping[str, Any], mean: list[float], std: list[float]
) -> tuple[list[float], list[float]]:
    """Mean and deviation by which pixels in 0 to 1 become what the source makes of 0 to 255.

    A source may scale by another factor, or not at all, and may not normalise. All of that is one
    line, so that training and evaluation need no other words for it.
    """
    factor = 1 / 255
    if source.get("do_rescale") is False:
        factor = 1.0
    elif source.get("rescale_factor") is not None:
        factor = float(source["rescale_factor"])
    normalises = source.get("do_normalize") is not False
    if normalises and math.isclose(factor, 1 / 255, rel_tol=1e-6):
        return mean, std

    scale = 255 * factor
    if not normalises:
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    return [value / scale for value in mean], [value / scale for value in std]


def _of_a_share(size: dict[str, int], share: float) -> tuple[dict[str, int], dict[str, int]]:
    """Size and crop where the crop is a share of the resized image, as in ConvNeXT's files."""
    side = max(size.values())
    square = {"height": side, "width": side}
    if side >= _WARPED_FROM:
        return square, square
    return {"shortest_edge": int(side / share)}, square


def for_channels(family: PreprocessorFields, channels: int) -> PreprocessorFields:
    """What a family does with colours, for so many channels; nothing where they are not alike."""
    fitted = family.copy()
    names: tuple[Literal["image_mean", "image_std"], ...] = ("image_mean", "image_std")
    for name in names:
        numbers = fitted.get(name)
        if numbers is None or len(numbers) == channels:
            continue
        if len(set(numbers)) == 1:
            fitted[name] = numbers[:1] * channels
        else:
            del fitted[name]
    return fitted


def nested_preprocessing(processor: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a `processor_config.json` says of images; empty where it says nothing."""
    nested = processor.get(_NESTED)
    return nested if isinstance(nested, Mapping) else {}


def _sides(stated_size: Any, native: dict[str, int]) -> dict[str, int]:
    """A size as a dictionary: an integer, as in old files, is a square; nothing is the native."""
    if isinstance(stated_size, int):
        return {"height": stated_size, "width": stated_size}
    return sides_of(stated_size) or native


def saved_preprocessing(name: str) -> Mapping[str, Any]:
    """The preprocessing that a folder or a Hub name states; empty where it states none."""
    return nested_preprocessing(_stated(name, PROCESSOR)) or _stated(name, _FILE)


def _stated(name: str, file: str) -> Mapping[str, Any]:
    """The object in a JSON file of a folder or a Hub name; empty where there is none."""
    path = file_of_model(name, file)
    return {} if path is None else read_json(path)
