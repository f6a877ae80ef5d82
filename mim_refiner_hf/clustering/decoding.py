"""Encoded images in, upright 8-bit pixels out, or one sentence that says why not.

    from mim_refiner_hf.clustering.decoding import decode_image
    decode_image(Path("photos/1.jpg"))                         # a PIL image of mode "RGB"; num_channels=1 for "L"

EXIF rotation is applied (garbage in it is ignored: the pixels are intact), transparency lies on white, 16 bits are scaled to 8 (not
clipped), of an animation the first frame counts, colour profiles are not applied. The contents decide what a file is, not its name.
Only regular files are read: a FIFO would hang, a device never end. A PNG is held to its checksums; what a damaged JPEG, GIF, TIFF or
WebP still decodes to without an error cannot be told from a picture.
"""

import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

ImageSource = bytes | Path | Image.Image

MAX_PIXELS = 178_956_970
"""Pixels of an image, at most: 0.5 GB decoded. Pillow's own limit by default, kept where its `MAX_IMAGE_PIXELS` was changed."""
MAX_BYTES = 2**30
"""Bytes of an encoded image, at most."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of each EXIF orientation upright."""

Image.init()
FORMATS = tuple(
    name
    for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN
)
"""What is decoded. Pillow knows more, some of them programs: it would hand PostScript to Ghostscript."""


def decode_image(
    source: ImageSource, num_channels: int = 3, name: str | None = None
) -> Image.Image:
    """An upright 8-bit image of mode "RGB" (`num_channels` 3) or "L" (1) from encoded bytes, a path or a PIL image.

    Transparent pixels show white; 16-bit values are divided by 257, floats in [0, 1] multiplied by 255. ValueError, naming the
    path or `name` and the reason, for whatever cannot be decoded; the same words wherever it is decoded."""
    mode = mode_of(num_channels)
    try:
        image = source if isinstance(source, Image.Image) else _open(source)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS}: too large, or a trap"
            )
        turn = _turn(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _to_eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image.load()
        image = image if image.mode == mode else image.convert(mode)
        return image if turn is None else image.transpose(turn)
    except Exception as error:  # for broken files Pillow raises OSError, SyntaxError, struct.error, zlib.error, ...
        where = name or (str(source) if isinstance(source, Path) else "an image")
        raise ValueError(
            f"Cannot decode {where}: {_reason(error)}; replace or remove it."
        ) from error


def mode_of(num_channels: int) -> str:
    """Pillow's mode for 3 or 1 channels; ValueError for another number."""
    if num_channels not in (1, 3):
        raise ValueError(f"num_channels is {num_channels}; images have 3 (RGB) or 1 (greyscale).")
    return "RGB" if num_channels == 3 else "L"


def _open(source: bytes | Path) -> Image.Image:
    encoded = source if isinstance(source, bytes) else _read(source)
    if not encoded:
        raise ValueError("it is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # at half of our limit
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        if (
            image.format == "PNG"
        ):  # it carries checksums, which Pillow looks at only when asked, and then gives no pixels
            Image.open(io.BytesIO(encoded), formats=("PNG",)).verify()
        return image


def _read(path: Path) -> bytes:
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    )  # a FIFO without a writer opens, too, instead of waiting
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"it has {status.st_size} bytes, more than {MAX_BYTES}")
        return file.read()


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright; None where it is, or where its EXIF data cannot be read."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (
        Exception
    ):  # garbage in the metadata, each kind with its own error, says nothing about the pixels
        return None


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit integers ("I;16*", "I" with values above 255) or floats ("F") as mode "L"; `convert` alone would clip."""
    values = np.asarray(image, dtype=np.float64)
    top = values.max()
    scale = 1 / 257 if image.mode != "F" and (image.mode != "I" or top > 255) else 1.0
    if image.mode == "F" and top <= 1:
        scale = 255.0
    return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))


def _reason(error: Exception) -> str:
    """In one line, without the addresses that Pillow's messages hold."""
    if isinstance(error, UnidentifiedImageError):
        return f"it is no image of a known format ({', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:300] or type(error).__name__


__all__ = ["FORMATS", "MAX_BYTES", "MAX_PIXELS", "ImageSource", "decode_image", "mode_of"]
