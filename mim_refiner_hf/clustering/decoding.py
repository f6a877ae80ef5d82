"""Encoded images in, upright 8-bit pixels out, or one sentence that says why not.

    decode_image(Path("photos/1.jpg"))                  # a PIL image of mode "RGB"
    decode_image(encoded_bytes, num_channels=1)         # of mode "L"
    decode_image(array)                                 # (H, W), (H, W, 1 or 3), (1 or 3, H, W)
    decode_image(array, num_channels=13)                # a `ChannelImage`, see `channels.py`

The package decodes images here and nowhere else, so data sets and the pipeline see the same pixels:

- The contents decide what a file is, not its name. Of an animation the first frame counts.
- EXIF rotation is applied, once; garbage in EXIF is ignored, as the pixels are intact.
- Transparency lies on white. Colour profiles are not applied.
- Values deeper than 8 bits are scaled, not clipped: see `scale_to_bytes`.
- Only regular files are read: a FIFO would hang, a device never end.
- A PNG is held to its checksums. What a damaged JPEG, GIF, TIFF or WebP still decodes to without an
  error cannot be told from a picture.

This file travels with saved models: it imports only NumPy, Pillow and torch, and `channels.py`.
"""

import io
import os
import stat
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from .channels import (
    GDAL_NODATA,
    MAX_CHANNELS,
    NPY_MAGIC,
    ChannelImage,
    Picture,
    check_channels,
    check_count,
    is_picture,
    no_data_value,
    stored_pixels,
)

ImageSource = bytes | Path | Image.Image

MAX_PIXELS = 178_956_970
"""Pixels of an image, at most: 0.5 GB decoded. It is Pillow's own default limit."""

MAX_BYTES = 2**30
"""Bytes of an encoded image, at most."""

_KNOWN = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
Image.init()
# HEIC, where its usual plugin is installed
if find_spec("pillow_heif") is not None:
    import_module("pillow_heif").register_heif_opener()

FORMATS = tuple(name for name in _KNOWN if name in Image.OPEN)
"""What is decoded. Pillow knows more, some of them programs: it would run PostScript."""

EXTENSIONS = frozenset(
    ending for ending, format in Image.registered_extensions().items() if format in FORMATS
)
"""How the names of image files end, in lower case: by it they are found in folders."""

ARRAY_EXTENSIONS = frozenset([".npy"])
"""How files of arrays end: they are looked for in folders without image files."""

# what makes an image of each EXIF orientation upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# values by which rasters mark such pixels without saying so
_USUAL_NO_DATA = (-9999.0, -32768.0, -(2.0**31))


def decode_image(
    source: ImageSource | np.ndarray | Tensor, num_channels: int = 3, name: str | None = None
) -> Picture:
    """An upright 8-bit image of mode "RGB" (`num_channels` 3) or "L" (1).

    Of another number of channels a `ChannelImage`, with the values as they are stored.

    Args:
        source: encoded bytes, a path, a PIL image, or pixels as an array or a tensor: (H, W), or
            with the channels in front or behind.
        num_channels: 1 to 16.
        name: what to call the image in messages, in place of its path.

    Raises:
        ValueError: for whatever cannot be decoded; it names the image and the reason.
    """
    check_channels(num_channels)
    try:
        if not is_picture(num_channels):
            return ChannelImage(_channels_of(source, num_channels))
        mode = mode_of(num_channels)
        image = _open(source)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS}: "
                "too large, or a trap"
            )

        # loaded before the tag is read: the TIFF reader turns the pixels itself, and drops the tag
        _load(image)
        turn = _turn(image)
        image = _on_white(_in_eight_bits(image))
        image = image if image.mode == mode else image.convert(mode)
        return image if turn is None else image.transpose(turn)

    # for broken files Pillow raises OSError, SyntaxError, struct.error, zlib.error and others
    except Exception as error:
        where = name or (str(source) if isinstance(source, Path) else "an image")
        raise ValueError(
            f"Cannot decode {where}: {_reason(error)}; replace or remove it."
        ) from error


def mode_of(num_channels: int) -> str:
    """Pillow's mode for 3 or 1 channels."""
    return "RGB" if num_channels == 3 else "L"


def count_channels(source: ImageSource | np.ndarray | Tensor) -> int | None:
    """How many channels an array, a .npy file or a TIFF has; None of a picture.

    ValueError for what cannot be read.
    """
    encoded = _encoded_pixels(source)
    pixels = None if encoded is None else stored_pixels(encoded)
    return None if pixels is None or is_picture(pixels.shape[-1]) else int(pixels.shape[-1])


def _encoded_pixels(source: ImageSource | np.ndarray | Tensor) -> Any:
    """What `stored_pixels` may read; None of what is Pillow's, of which nothing is read."""
    if isinstance(source, Path):
        many = source.suffix.lower() in (".tif", ".tiff", *ARRAY_EXTENSIONS)
        return read_file(source) if many else None
    return None if isinstance(source, Image.Image) else source


def _channels_of(source: ImageSource | np.ndarray | Tensor, num_channels: int) -> np.ndarray:
    """Pixels (H, W, `num_channels`) as they are stored."""
    # the contents decide what a file is, not its name
    source = read_file(source) if isinstance(source, Path) else source
    pixels = stored_pixels(source, num_channels)
    if pixels is None:
        image = _open(source)
        _load(image)
        turn = _turn(image)
        image = image if turn is None else image.transpose(turn)
        pixels = np.asarray(image)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return check_count(pixels, num_channels)


def scale_to_bytes(values: np.ndarray, no_data: float | None = None) -> np.ndarray:
    """Pixels of any depth as uint8, by one rule for all.

    - uint8 stays as it is; of booleans, True is 255.
    - uint16 runs from 0 to 65535, whatever occurs in it.
    - Other integers run from 0 to 255 if all of them lie there, else from 0 to 65535.
    - Floats run from 0 to 1, else from 0 to 255, else from 0 to 65535: the first of these ranges
      that holds all values. They may overshoot it by a twentieth, as resampled pictures do.
    - What fits no range (negative or larger values: heights, decibels, 32-bit counts) is stretched
      from its lowest to its highest value.

    Pixels without data become black and have no part in the choice of the range: NaN, infinity,
    -9999, -32768, -2**31, values from 1e38 on, and `no_data`, which a file may name.

    Raises:
        ValueError: for values that are no numbers, or when no pixel has data.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return np.where(values, 255, 0).astype(np.uint8)
    if values.dtype.kind not in "uif":
        raise ValueError(f"its values are {values.dtype}, not numbers")

    numbers = values.astype(np.float64)
    # NaN is not below 1e38 either
    valid = (np.abs(numbers) < 1e38) & ~np.isin(numbers, _USUAL_NO_DATA)
    if no_data is not None:
        valid &= numbers != no_data
    if not valid.any():
        raise ValueError("none of its pixels has data")

    low, high = _value_range(values.dtype, numbers[valid])
    scaled = (np.where(valid, numbers, low) - low) * (255 / (high - low))
    return np.where(valid, np.clip(np.rint(scaled), 0, 255), 0).astype(np.uint8)


def _value_range(kind: np.dtype, numbers: np.ndarray) -> tuple[float, float]:
    """What becomes black and what becomes white, see `scale_to_bytes`."""
    if kind.kind == "u" and kind.itemsize == 2:
        return 0.0, 65535.0

    is_float = kind.kind == "f"
    tops = (1.0, 255.0, 65535.0) if is_float else (255.0, 65535.0)
    slack = 0.05 if is_float else 0.0
    lowest = float(numbers.min())
    highest = float(numbers.max())
    for top in tops:
        if lowest >= -slack * highest and highest <= (1 + slack) * top:
            return 0.0, top
    return lowest, max(highest, lowest + 1e-12 * abs(lowest))


def _open(source: ImageSource | np.ndarray | Tensor) -> Image.Image:
    """An image whose pixels need not be loaded yet."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, Tensor):
        return _from_array(source.detach().cpu().numpy())
    if isinstance(source, np.ndarray):
        return _from_array(source)

    encoded = source if isinstance(source, bytes) else read_file(source)
    if not encoded:
        raise ValueError("it is empty")
    if encoded.startswith(NPY_MAGIC):
        return _from_array(np.load(io.BytesIO(encoded), allow_pickle=False))
    with warnings.catch_warnings():
        # Pillow warns at half of our limit
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        # Pillow looks at the checksums only when asked, and then gives no pixels
        if image.format == "PNG":
            Image.open(io.BytesIO(encoded), formats=("PNG",)).verify()
        return image


def read_file(path: Path) -> bytes:
    """The bytes of a regular file, `MAX_BYTES` at most; ValueError of any other."""
    # O_NONBLOCK: a FIFO without a writer opens, too, instead of waiting
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"it has {status.st_size} bytes, more than {MAX_BYTES}")
        return file.read()


def _load(image: Image.Image) -> None:
    """Read the pixels. Memory mapping, of named files, mistakes the sides of a turned TIFF."""
    if not isinstance(image, ImageFile.ImageFile):
        image.load()
        return
    filename = image.filename
    image.filename = ""
    try:
        image.load()
    finally:
        image.filename = filename


def _from_array(pixels: np.ndarray) -> Image.Image:
    """An image of pixels (H, W), or with 1 or 3 channels behind or in front."""
    shape = pixels.shape
    if pixels.ndim == 3 and shape[-1] not in (1, 3) and shape[0] in (1, 3):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim != 2 and not (pixels.ndim == 3 and pixels.shape[-1] in (1, 3)):
        raise ValueError(
            f"its shape is {shape}; pixels are (height, width), with 1 or 3 channels if any, or "
            f"where all images have as many, up to {MAX_CHANNELS}"
        )
    if pixels.size == 0:
        raise ValueError("it is empty")

    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(np.ascontiguousarray(scale_to_bytes(pixels)))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright; None where it is, or where its EXIF data cannot be read."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    # garbage in the metadata, each kind with its own error, says nothing about the pixels
    except Exception:
        return None


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit ("I;16"), 32-bit ("I") and float ("F") images as mode "L"; others as they are."""
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    values = np.asarray(image)
    grey = scale_to_bytes(values, _no_data_of(image))

    # the one value that a PNG may declare transparent; its pixels lie on white
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _no_data_of(image: Image.Image) -> float | None:
    """The value that marks pixels without data, where a GeoTIFF names one."""
    tags = getattr(image, "tag_v2", {})
    return no_data_value(tags[GDAL_NODATA]) if GDAL_NODATA in tags else None


def _on_white(image: Image.Image) -> Image.Image:
    """An image without transparency: whatever shows through is white."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _reason(error: Exception) -> str:
    """In one line, without the addresses that Pillow's messages hold."""
    if isinstance(error, UnidentifiedImageError):
        formats = ", ".join(FORMATS)
        return f"it is no image of a known format ({formats}), or of a kind that cannot be read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:300] or type(error).__name__
