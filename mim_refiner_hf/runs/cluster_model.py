"""The encoder that `cluster` groups images by: the one asked for, or one that suits photos.

encoder = choose_encoder(None)                   # facebook/dino-vits16, and says so
warn_of_misfit(encoder, images)                  # 16-pixel digits on photos: a line says it
"""

import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from ..clustering.channels import as_picture
from ..conversion import load_encoder
from ..data.images import ImageDataset, evenly_spaced
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.files import CheckpointError
from ..runtime.wording import setting
from .cluster_features import say

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "facebook/dino-vits16"
"""A ViT-S/16 by DINO: 22 million parameters, 224 pixels, Apache-2.0, no labels seen."""

# images that are looked at before all are encoded
_LOOKED_AT = 16
# a photo this many times as wide as what the model sees, where that is small, loses what it shows
_FAR_BELOW = 4
_SMALL_SIDE = 96
# means of the channels so many of the model's standard deviations away from its mean
_FAR_MEAN = 1.5
# data sets of photos of all kinds, by parts of their names
_GENERAL = ("imagenet", "lvd", "laion", "cc12m", "datacomp", "places", "coco", "inaturalist")


def choose_encoder(model: Any) -> MimRefinerModel:
    """What `load_encoder` makes of `model`; of None, the default, if it can be had.

    Raises:
        ValueError: where the default is neither in the Hub's cache nor to be downloaded.
    """
    if model is not None:
        return load_encoder(model)
    try:
        encoder = load_encoder(DEFAULT_MODEL)
    except (ConnectionError, CheckpointError, OSError) as error:
        raise ValueError(
            f"No {setting('model')} is given, and the default, {DEFAULT_MODEL}, cannot be had: "
            f"give {setting('model', 'NAME')}, a model folder or a name that is in the Hub's "
            "cache, or run it once with a network"
        ) from error
    say(f"The model: {DEFAULT_MODEL}, for photos of all kinds, as no {setting('model')} is given")
    return encoder


def warn_of_misfit(encoder: MimRefinerModel, images: ImageDataset) -> None:
    """One line for each sign that the encoder was not made for such images."""
    looked_at = _some(images)
    if not looked_at:
        return
    name = encoder.config.name_or_path or "the model"
    reasons = [_too_small(encoder, looked_at), _other_channels(encoder, looked_at)]
    reasons.append(_other_images(encoder, images))
    for reason in reasons:
        if reason:
            logger.warning("%s may not suit these images: %s", name, reason)


def _some(images: ImageDataset) -> list[Image.Image]:
    """A few images that can be read, in RGB."""
    few = evenly_spaced(images, _LOOKED_AT)
    coloured = ImageDataset(few.found, indices=few.indices)
    images_read = []
    for place in range(len(coloured)):
        try:
            images_read.append(as_picture(coloured[place].image))
        # broken ones are told later, all of them
        except ValueError:
            continue
    return images_read


def _too_small(encoder: MimRefinerModel, looked_at: Sequence[Image.Image]) -> str:
    side = encoder.config.image_size
    seen = max(side) if isinstance(side, list | tuple) else side
    shown = round(statistics.median([min(image.size) for image in looked_at]))
    if seen >= _SMALL_SIDE or shown < _FAR_BELOW * seen:
        return ""
    return f"it sees {seen} x {seen} pixels, and theirs are about {shown} wide or high"


def _other_channels(encoder: MimRefinerModel, looked_at: Sequence[Image.Image]) -> str:
    pixels = [np.asarray(image.resize((8, 8)), dtype=np.float64) / 255 for image in looked_at]
    values = np.concatenate([image.reshape(-1, image.shape[-1]) for image in pixels])
    spread = np.abs(values - values.mean(1, keepdims=True)).mean()
    if encoder.config.num_channels == 1:
        return "it knows grey images only, and these have colours" if spread > 0.02 else ""

    processor = vars(encoder)["image_processor"]
    mean = np.asarray(processor.image_mean)
    scale = np.asarray(processor.image_std)
    if len(mean) != values.shape[1]:
        return ""
    away = float(np.abs((values.mean(0) - mean) / scale).max())
    if away <= _FAR_MEAN:
        return ""
    return (
        f"their mean colour is {away:.1f} standard deviations away from what it was trained on "
        "(image_mean, image_std)"
    )


def _other_images(encoder: MimRefinerModel, images: ImageDataset) -> str:
    """By the data sets that its card names, where it is a folder with one."""
    card = Path(encoder.config.name_or_path or "") / "README.md"
    if not encoder.config.name_or_path or not card.is_file():
        return ""
    # a card is written by anyone: one that cannot be read is no reason to stop
    try:
        stated = ModelCard.load(card).data.to_dict().get("datasets")
    except (OSError, ValueError, yaml.YAMLError) as error:
        kind = type(error).__name__
        return f"its card cannot be read ({kind}), so what it was trained on is unknown"
    if isinstance(stated, str):
        stated = [stated]
    names = [str(name) for name in stated or []]
    known = [name.lower() for name in names]
    if not known or images.name.lower() in known:
        return ""
    if any(part in name for name in known for part in _GENERAL):
        return ""
    return f"its card says that it was trained on {', '.join(names)}"
