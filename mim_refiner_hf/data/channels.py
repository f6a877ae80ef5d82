"""What the values of images with many channels mean: measured once, the same for a whole run.

    count = channels_of(images)                        # 13; None of photos
    found = measure_channels(images, 13, None)
    found.value_range, found.mean, found.std           # (0.0, 9876.0), 13 numbers, 13 numbers

One range holds for all images and channels, so that an image means the same beside any other. 8-bit
values are 0 to 255 and floats that all lie there 0 to 1; of other types the range is measured: up
to the value that one in a thousand lies above, and from 0, or from the value that one in a thousand
lies below where there are negative ones. Means and deviations are those of the values in that
range, channel by channel.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..clustering.channels import ChannelImage, WrongChannels
from ..clustering.decoding import count_channels
from ..model.image_processing_mim_refiner import to_eight_bits
from ..runtime.wording import setting
from .images import ImageDataset, evenly_spaced

# images that are looked at, evenly spaced over the data set
_LOOKED_AT = 256
# and rows and columns of each
_SIDE = 64
# in a thousand, of the values outside a measured range on either side
_OUTSIDE = 0.1


@dataclass(frozen=True)
class ChannelStatistics:
    """What was measured.

    Attributes:
        value_range: what becomes 0 and 255.
        mean, std: of each channel, with the range from 0 to 1.
        dtype: of the values.
        clipped: share of the values outside the range.
        num_images: that were looked at.
    """

    value_range: tuple[float, float]
    mean: list[float]
    std: list[float]
    dtype: str
    clipped: float
    num_images: int


def channels_of(images: ImageDataset) -> int | None:
    """The number of channels of arrays, .npy files and TIFFs, by the first that can be read.

    None where they are pictures, of 3 channels or 1.
    """
    for place in images.indices[:_LOOKED_AT].tolist():
        # a broken image says nothing of the others; whoever decodes will tell of it
        try:
            return count_channels(images.found.sources[place])
        except ValueError:
            continue
    return None


def measure_channels(
    images: ImageDataset, num_channels: int, value_range: tuple[float, float] | None
) -> ChannelStatistics:
    """Range, means and deviations of images with `num_channels` channels.

    Args:
        value_range: the range where it is known; None to measure it.

    Raises:
        ValueError: for an image with another number of channels, for images of several types, for
            a range of 8-bit values, and where no image can be read.
    """
    values = _some_values(evenly_spaced(images, _LOOKED_AT).in_channels(num_channels))
    kinds = sorted({str(part.dtype) for part in values})
    if len(kinds) > 1:
        raise ValueError(
            f"{images.name} holds values of {' and '.join(kinds)}: which is black and which is "
            "white is then unclear; give all images in one type."
        )
    if kinds == ["uint8"] and value_range not in (None, (0.0, 255.0)):
        raise ValueError(
            f"{setting('value_range', value_range)}: these images have 8 bits, which run from 0 to "
            "255; leave it out"
        )

    together = np.concatenate([part.reshape(-1, num_channels) for part in values])
    low, high = value_range or _range_of(together)
    outside = float(((together < low) | (together > high)).mean())
    scaled = to_eight_bits(together, (low, high)) / 255
    # a channel that is the same everywhere tells nothing, and is not blown up
    std = np.maximum(scaled.std(axis=0), 1 / 255)
    mean = scaled.mean(axis=0)
    return ChannelStatistics(
        (low, high), mean.tolist(), std.tolist(), kinds[0], outside, len(values)
    )


def _some_values(images: ImageDataset) -> list[np.ndarray]:
    """Every so many-th pixel of each image, (rows, columns, C)."""
    values = []
    reason = ""
    for place in range(len(images)):
        try:
            image: Any = images[place].image
        except ValueError as error:
            # one that cannot be read is told of later; one of another kind says that the set is
            # not what it is taken for
            if isinstance(error.__cause__, WrongChannels):
                raise
            reason = reason or str(error)
            continue
        assert isinstance(image, ChannelImage)
        rows, columns = image.pixels.shape[:2]
        step_down = -(-rows // _SIDE)
        step_right = -(-columns // _SIDE)
        values.append(image.pixels[::step_down, ::step_right].copy())
    if not values:
        raise ValueError(f"None of {len(images)} images of {images.name} can be read: {reason}")
    return values


def _range_of(values: np.ndarray) -> tuple[float, float]:
    """What becomes 0 and 255, see the top of this file."""
    if values.dtype == np.uint8:
        return 0.0, 255.0
    lowest = float(values.min())
    highest = float(values.max())
    if values.dtype.kind in "fb" and lowest >= 0 and highest <= 1:
        return 0.0, 1.0

    low = 0.0 if lowest >= 0 else float(np.percentile(values, _OUTSIDE))
    high = float(np.percentile(values, 100 - _OUTSIDE))
    return low, high if high > low else low + 1.0
