"""An encoder and its image processor fitted to the number of channels that the images have.

encoder, note = fit_channels(encoder, images)       # unchanged and "" for photos
"""

import logging
from collections.abc import Sequence

from ..clustering.channels import check_channels, is_picture
from ..conversion.channels import extend_channels
from ..conversion.preprocessing import image_processor
from ..data.channels import ChannelStatistics, channels_of, measure_channels
from ..data.images import ImageDataset
from ..data.stream import ImageStream
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.text import one_line
from ..runtime.wording import setting

logger = logging.getLogger(__name__)


def fit_channels(
    encoder: MimRefinerModel,
    images: ImageDataset | ImageStream,
    num_channels: int | None = None,
    value_range: Sequence[float] | None = None,
) -> tuple[MimRefinerModel, str]:
    """The encoder for images of so many channels, and what was done, in a line; "" for nothing.

    Args:
        encoder: with its `image_processor`; it stays as it is.
        num_channels: None for the encoder's, or, where the images are arrays, .npy files or TIFFs
            of another number than 3 and 1, for theirs.
        value_range: what becomes 0 and 255; None to measure it where it is not known.

    Raises:
        ValueError: for images that do not fit, or settings that have nothing to say of them.
    """
    own = encoder.config.num_channels
    count = own if num_channels is None else check_channels(num_channels)
    if num_channels is None and is_picture(own) and isinstance(images, ImageDataset):
        count = check_channels(channels_of(images) or own)
    if is_picture(count) and value_range is not None:
        raise ValueError(
            f"{setting('value_range', list(value_range))}: is for images of other numbers of "
            f"channels than 3 and 1; these have {count}"
        )
    if count == own and value_range is None:
        return encoder, ""

    if is_picture(count):
        return _fitted(encoder, count, None), f"{count}, {_how(own, count)}"
    if not isinstance(images, ImageDataset):
        raise ValueError(
            f"{setting('num_channels', count)}: the range of the values is measured, which takes a "
            f"data set of known length; leave out {setting('streaming')}"
        )
    known = None if value_range is None else (float(value_range[0]), float(value_range[1]))
    found = measure_channels(images, count, known)
    return _fitted(encoder, count, found), f"{count}, {_how(own, count)}{_values_text(found)}"


def fit_and_tell(
    encoder: MimRefinerModel, images: ImageDataset
) -> tuple[MimRefinerModel, ImageDataset]:
    """Encoder and images for the channels that the images have; a log line says what was done."""
    fitted, done = fit_channels(encoder, images)
    if done:
        logger.warning(
            "%s reads %d channels, the images have %s; what it makes of them is a start to refine",
            one_line(encoder.config.name_or_path or "the model"),
            encoder.config.num_channels,
            done,
        )
    return fitted, images.in_channels(fitted.config.num_channels)


def _fitted(
    encoder: MimRefinerModel, count: int, found: ChannelStatistics | None
) -> MimRefinerModel:
    """A copy for so many channels, with an image processor for what was found."""
    old = vars(encoder)["image_processor"]
    extended = extend_channels(encoder, count) if count != encoder.config.num_channels else encoder
    settings = old.to_dict()
    if found is not None:
        settings |= {"image_mean": found.mean, "image_std": found.std}
        settings["value_range"] = list(found.value_range)
    # grey is the mean of the colours, and each colour is grey
    elif len(settings["image_mean"]) != count:
        for name in ("image_mean", "image_std"):
            values = settings[name]
            settings[name] = [sum(values) / len(values)] * count
    vars(extended)["image_processor"] = image_processor(extended.config, settings)
    return extended


def _how(own: int, count: int) -> str:
    if count == own:
        return "as the start"
    rule = "added up" if count == 1 else f"in turn, times {own}/{count}"
    return f"extended from the {own} of the start (its filters {rule})"


def _values_text(found: ChannelStatistics) -> str:
    low, high = found.value_range
    clipped = f", {found.clipped:.2%} of them clipped" if found.clipped else ""
    return (
        f"; {found.dtype} values {low:g} to {high:g} become 0 to 255{clipped}; mean and deviation "
        f"of each measured on {found.num_images} images"
    )
