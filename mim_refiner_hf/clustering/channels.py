"""Images of any number of channels, 1 to 16: from arrays, .npy files and TIFFs of many bands.

    pixels = stored_pixels(Path("tiles/a.tif"), 13)     # (H, W, 13), as the file holds them
    image = ChannelImage(pixels)
    image.size, image.convert("RGB")                    # (W, H); a picture to look at

Photos, of 3 channels or 1, are Pillow's (`decoding.py`); what is here is for all other numbers.
Values stay as they are stored. What they mean is said by the image processor, whose `value_range`
becomes 0 to 255. A pixel for which a GeoTIFF declares that it has no data becomes 0, and an image
that has none in more than half of its pixels is refused, as is one with NaN or infinity: what stood
there is unknown.

This file travels with saved models: it imports only NumPy, Pillow and torch, and tifffile where it
is installed and a TIFF is read.
"""

import io
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

MAX_CHANNELS = 16
"""Channels of an image, at most."""

MAX_VALUES = 2**30
"""Values of an image, at most: those of 8 channels of the largest photo."""

NPY_MAGIC = b"\x93NUMPY"
_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# axes of a TIFF, as tifffile names them, that are channels wherever they occur
_CHANNEL_AXES = "SC"
# pages without a meaning: channels if somebody asks for as many
_PAGE_AXES = "IQ"
GDAL_NODATA = 42113
"""The tag in which a GeoTIFF says which value marks pixels without data."""

_NEEDS_TIFFFILE = 'pip install "mim_refiner_hf[tiff]" for TIFFs of many channels'


class ChannelImage:
    """Pixels (H, W, C) as they are stored, with what callers ask of a PIL image.

    Attributes:
        pixels: (H, W, C) of any type of numbers.
        size: (width, height), as of a PIL image.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        height, width, _ = pixels.shape
        self.size = (width, height)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.pixels, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        return f"<ChannelImage {self.pixels.shape} {self.pixels.dtype}>"

    @property
    def mode(self) -> str:
        """Number of channels and type, in the place of a PIL image's mode."""
        return f"{self.pixels.shape[-1]} channels of {self.pixels.dtype}"

    def getbands(self) -> tuple[str, ...]:
        """A name per channel."""
        return tuple(str(channel) for channel in range(self.pixels.shape[-1]))

    def in_front(self) -> np.ndarray:
        """The pixels with the channels in front, (C, H, W)."""
        return np.moveaxis(self.pixels, -1, 0)

    def tobytes(self) -> bytes:
        """All values, pixel by pixel."""
        return self.pixels.tobytes()

    def convert(self, mode: str) -> Image.Image:
        """A picture to look at: the first three channels, or of two the first.

        Stretched from the lowest to the highest value. It is for people, not for encoders.
        """
        count = 3 if self.pixels.shape[-1] >= 3 else 1
        shown = self.pixels[..., :count].astype(np.float64)
        low = float(shown.min())
        span = float(shown.max()) - low
        scale = 255 / span if span else 0.0
        grey = np.rint((shown - low) * scale).astype(np.uint8)
        if count == 1:
            grey = grey[..., 0]
        return Image.fromarray(grey).convert(mode)

    def save(self, path: Any) -> None:
        """Write the picture of `convert`."""
        self.convert("RGB").save(path)


Picture = Image.Image | ChannelImage
"""A decoded image: Pillow's of 3 channels or 1, else a `ChannelImage`."""


def as_picture(image: Picture) -> Image.Image:
    """An image as Pillow's, to look at."""
    return image.convert("RGB") if isinstance(image, ChannelImage) else image


def check_channels(num_channels: int) -> int:
    """`num_channels`; ValueError for fewer than 1 and more than 16."""
    if not 1 <= num_channels <= MAX_CHANNELS:
        raise ValueError(
            f"num_channels is {num_channels}; images have 1 to {MAX_CHANNELS} channels."
        )
    return num_channels


def is_picture(num_channels: int) -> bool:
    """Whether images of so many channels are pictures, 3 for RGB or 1 for grey: Pillow's."""
    return num_channels in (1, 3)


def blank(num_channels: int) -> Picture:
    """A small black image."""
    pixels = np.zeros((8, 8, num_channels), dtype=np.uint8)
    if is_picture(num_channels):
        return Image.fromarray(pixels.squeeze())
    return ChannelImage(pixels)


def stored_pixels(source: Any, num_channels: int | None = None) -> np.ndarray | None:
    """The pixels (H, W, C) of an array, a tensor, or the bytes of a .npy file or a TIFF.

    Args:
        source: an array or a tensor, or encoded bytes.
        num_channels: which axis of an array has the channels, the last or the first; None: the one
            that can be, and of two the shorter.

    Returns:
        None of anything else, which is Pillow's to read.

    Raises:
        ValueError: for what has no channels, or not so many, and for values that are unknown.
    """
    no_data = None
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, bytes) and source.startswith(NPY_MAGIC):
        source = np.load(io.BytesIO(source), allow_pickle=False)
    elif isinstance(source, bytes) and source.startswith(_TIFF_MAGICS):
        found = _read_tiff(source, num_channels)
        if found is None:
            return None
        source, no_data = found

    if not isinstance(source, np.ndarray):
        return None
    return _checked(_channels_last(source, num_channels), no_data)


class WrongChannels(ValueError):
    """An image has another number of channels than the others."""


def check_count(pixels: np.ndarray, num_channels: int) -> np.ndarray:
    """`pixels` (H, W, C); WrongChannels for another number of channels."""
    count = pixels.shape[-1]
    if count != num_channels:
        raise WrongChannels(f"it has {count} channels, and {num_channels} are expected")
    return pixels


def _channels_last(pixels: np.ndarray, num_channels: int | None) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (H, W, C)."""
    shape = pixels.shape
    if pixels.ndim == 2:
        return pixels[..., None]
    if pixels.ndim != 3:
        raise ValueError(f"its shape is {shape}; pixels are (height, width, channels)")

    last = shape[2] if shape[2] <= MAX_CHANNELS else 0
    first = shape[0] if shape[0] <= MAX_CHANNELS else 0
    if num_channels is None:
        in_front = bool(first) and (not last or first < last)
    else:
        in_front = first == num_channels != last
    if not last and not first:
        raise ValueError(
            f"its shape is {shape}; pixels are (height, width, channels), with at most "
            f"{MAX_CHANNELS} channels behind or in front"
        )
    if in_front or not last:
        pixels = np.moveaxis(pixels, 0, -1)
    return np.ascontiguousarray(pixels)


def _checked(pixels: np.ndarray, no_data: float | None) -> np.ndarray:
    """Pixels whose values are all known; see the top of this file."""
    if pixels.size == 0:
        raise ValueError("it is empty")
    if pixels.size > MAX_VALUES:
        raise ValueError(f"it has {pixels.size} values, more than {MAX_VALUES}")
    if pixels.dtype.kind not in "uifb":
        raise ValueError(f"its values are {pixels.dtype}, not numbers")

    if no_data is not None:
        alike = np.isnan(pixels) if np.isnan(no_data) else pixels == no_data
        missing = alike.all(axis=-1)
        if missing.mean() > 0.5:
            raise ValueError(f"{missing.mean():.0%} of its pixels have no data ({no_data:g})")
        pixels = np.where(missing[..., None], np.zeros((), pixels.dtype), pixels)
    if pixels.dtype.kind == "f":
        wrong = int(pixels.size - np.isfinite(pixels).sum())
        if wrong:
            raise ValueError(f"{wrong} of its {pixels.size} values are NaN or infinite")
    return pixels


# --- TIFF


def _read_tiff(encoded: bytes, num_channels: int | None) -> tuple[np.ndarray, float | None] | None:
    """Pixels with the channels behind, and the value for no data; None of a picture.

    A picture is what Pillow reads: one page of grey or RGB, with transparency or without. Which of
    a file's pages are channels is said by its metadata (OME, ImageJ), or by `num_channels`.
    """
    try:
        import tifffile
    except ImportError:
        return _read_tiff_without_help(encoded, num_channels)

    with tifffile.TiffFile(io.BytesIO(encoded)) as file:
        series = file.series[0]
        page = file.pages[0]
        # tags of the first page, which is never a mere frame
        tags: Any = page.tags  # type: ignore[union-attr]
        if num_channels is None and _is_tiff_of_a_picture(series, tags):
            return None
        if int(np.prod(series.shape)) > MAX_VALUES:
            raise ValueError(f"its shape is {series.shape}, more than {MAX_VALUES} values")

        axes = _axes_of(series, num_channels)
        try:
            pixels = series.asarray().reshape([size for _, size in axes])
        except (ValueError, ImportError) as error:
            raise ValueError(f"{error}; {_NEEDS_TIFFFILE}") from error
        tag = tags.get(GDAL_NODATA)
        no_data = no_data_value(tag.value) if tag else None

    names = "".join(name for name, _ in axes)
    channels = names.replace("Y", "").replace("X", "")
    pixels = np.moveaxis(pixels, names.index(channels), -1) if channels else pixels[..., None]
    return np.ascontiguousarray(pixels), no_data


def _is_tiff_of_a_picture(series: Any, tags: Any) -> bool:
    """One page of grey or RGB, the rest of its samples being transparency."""
    extra = tags.get("ExtraSamples")
    transparent = [kind for kind in (extra.value if extra else ()) if int(kind) in (1, 2)]
    sizes = dict(zip(series.axes, series.shape, strict=True))
    samples = int(sizes.get("S", 1)) - len(transparent)
    return is_picture(samples) and int(sizes.get("C", 1)) == 1


def _axes_of(series: Any, num_channels: int | None) -> list[tuple[str, int]]:
    """Names and sizes of a series' axes: Y, X and at most one of channels.

    ValueError where others have more than one entry.
    """
    all_axes = zip(series.axes, series.shape, strict=True)
    axes = [(name, size) for name, size in all_axes if size > 1 or name in "YX"]
    others = [(name, size) for name, size in axes if name not in "YX"]
    usual = _CHANNEL_AXES if num_channels is None else _CHANNEL_AXES + _PAGE_AXES
    if len(others) > 1 or any(name not in usual for name, _ in others):
        raise ValueError(
            f"its axes are {series.axes} with sizes {series.shape}; an image has rows (Y), columns "
            "(X) and channels (S or C), so give slices and times as files of their own"
        )
    return axes


def no_data_value(stated: object) -> float | None:
    """The value that marks pixels without data, of what a GeoTIFF states; None for no number."""
    try:
        return float(str(stated).strip("\0 "))
    except ValueError:
        return None


def _read_tiff_without_help(
    encoded: bytes, num_channels: int | None
) -> tuple[np.ndarray, float | None] | None:
    """What Pillow can read of a TIFF; ValueError where tifffile is needed."""
    try:
        image = Image.open(io.BytesIO(encoded), formats=("TIFF",))
        alone = getattr(image, "n_frames", 1) == 1
        known = image.mode in ("1", "L", "P", "RGB", "I;16", "I", "F")
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"Pillow cannot read it ({type(error).__name__}); {_NEEDS_TIFFFILE}"
        ) from (error)
    if num_channels is None or (known and alone):
        return None
    raise ValueError(f"it is of mode {image.mode!r}; {_NEEDS_TIFFFILE}")
