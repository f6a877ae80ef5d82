"""How images are preprocessed for an encoder: as its source says, else ImageNet's, natively sized.

image_processor(encoder.config, saved_preprocessing("facebook/vit-mae-base"))
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.image_processing_mim_refiner import MimRefinerImageProcessor

_FILE = "preprocessor_config.json"


def image_processor(
    config: MimRefinerConfig, source: Mapping[str, Any]
) -> MimRefinerImageProcessor:
    """The preprocessing that goes with an encoder.

    Args:
        config: of the encoder, for its native size and its number of channels.
        source: fields of a `preprocessor_config.json`; what it does not say is ImageNet's, at the
            native size.
    """
    height, width = config.image_hw
    native = {"height": height, "width": width}
    size = _sides(source.get("size"), native)
    crop = _sides(source.get("crop_size"), native)
    if "height" in size and not source.get("do_center_crop"):
        crop = size

    mean = list(MimRefinerImageProcessor.image_mean)
    std = list(MimRefinerImageProcessor.image_std)
    # ImageNet's average grey for every channel
    if config.num_channels != 3:
        mean = [sum(mean) / 3] * config.num_channels
        std = [sum(std) / 3] * config.num_channels
    return MimRefinerImageProcessor(
        size={"shortest_edge": max(size.values())},
        crop_size=crop,
        image_mean=source.get("image_mean", mean),
        image_std=source.get("image_std", std),
        resample=source.get("resample", MimRefinerImageProcessor.resample),
        do_convert_rgb=config.num_channels == 3,
        value_range=source.get("value_range"),
    )


def _sides(stated_size: Any, native: dict[str, int]) -> dict[str, int]:
    """A size as a dictionary: an integer, as in old files, is a square; nothing is the native."""
    if isinstance(stated_size, int):
        return {"height": stated_size, "width": stated_size}
    return dict(stated_size or native)


def saved_preprocessing(name: str) -> dict[str, Any]:
    """The `preprocessor_config.json` of a folder or a Hub name; empty where there is none."""
    if not name:
        return {}
    path = Path(name) / _FILE
    found = str(path) if path.is_file() else None
    if not Path(name).exists() and name.count("/") == 1:
        try:
            found = cached_file(name, _FILE)
        # no such model or file, or no network: the family's own preprocessing is as good
        except (OSError, ValueError):
            found = None
    if found is None:
        return {}
    stated = json.loads(Path(found).read_text(encoding="utf-8"))
    return dict(stated) if isinstance(stated, Mapping) else {}


__all__ = ["image_processor", "saved_preprocessing"]
