"""One decoder: the pipeline and a data set see the same pixels, at any mode, depth and turn."""

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, TiffImagePlugin

from mim_refiner_hf.clustering.decoding import EXTENSIONS, decode_image, scale_to_bytes
from mim_refiner_hf.clustering.image_items import Images, find_items
from mim_refiner_hf.data.images import open_images

GDAL_NODATA = 42113

# formats that keep every pixel, and the modes that each of them can hold
LOSSLESS: dict[str, tuple[str, ...]] = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"),
    "WEBP": ("RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I;16"),
}
WITH_EXIF = ("PNG", "TIFF", "WEBP")
MODES = [(kind, mode) for kind, modes in LOSSLESS.items() for mode in modes]


def picture(mode: str, width: int, height: int, top: float, seed: int) -> Image.Image:
    """Noise of a mode; `top` is the highest value of the deep ones."""
    random = np.random.default_rng(seed)
    noise = random.random((height, width))
    if mode == "F":
        return Image.fromarray((noise * top).astype(np.float32))
    if mode == "I":
        return Image.fromarray((noise * max(top, 255)).astype(np.int32))
    if mode == "I;16":
        return Image.fromarray((noise * 65535).astype(np.uint16))
    pixels = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "CMYK":
        return Image.fromarray(pixels, "CMYK")
    if mode == "P":
        # from opaque pixels: a palette with alpha does not survive in a TIFF
        return Image.fromarray(pixels[..., :3]).convert(mode)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str, orientation: int = 1) -> bytes:
    options: dict[str, Any] = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    if orientation > 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(image: Image.Image | str) -> np.ndarray:
    assert isinstance(image, Image.Image), image
    return np.asarray(image)


@settings(max_examples=120)
@given(
    form=st.sampled_from(MODES),
    orientation=st.integers(1, 8),
    width=st.integers(1, 9),
    height=st.integers(1, 9),
    top=st.sampled_from([1.0, 255.0, 4000.0, 65535.0, 1e9]),
    num_channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_the_pipeline_and_the_data_set_see_the_same(
    form: tuple[str, str],
    orientation: int,
    width: int,
    height: int,
    top: float,
    num_channels: int,
    seed: int,
) -> None:
    kind, mode = form
    image = picture(mode, width, height, top, seed)
    orientation = orientation if kind in WITH_EXIF else 1
    content = encoded(image, kind, orientation)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{kind.lower()}"
        path.write_bytes(content)
        expected = pixels_of(open_images(folder, num_channels=num_channels)[0].image)

        with Image.open(path) as opened:
            forms: list[Any] = [str(path), path, content, opened, {"image": opened}]
            forms += [(opened, 3), {"image": {"bytes": content, "path": None}}]
            forms.append(find_items(folder)[0])
            found = Images(forms, num_channels)
            for i in range(len(forms)):
                np.testing.assert_array_equal(pixels_of(found[i]), expected, str(forms[i]))

    # and they are the pixels that were stored, turned upright
    stored = decode_image(image, num_channels)
    stored.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(stored)), expected)


@pytest.mark.parametrize("kind", ["JPEG", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_is_turned_once(kind: str, orientation: int) -> None:
    rows, columns = np.mgrid[:32, :48]
    upright = np.where((rows < 16) & (columns < 24), 250, 5).astype(np.uint8)
    stored = Image.fromarray(upright)
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(back[orientation]))
    found = decode_image(encoded(stored.convert("RGB"), kind, orientation), 1)
    assert found.size == (48, 32)
    assert np.abs(np.asarray(found).astype(int) - upright).mean() < 8


@settings(max_examples=100)
@given(
    kind=st.sampled_from(["uint8", "uint16", "int16", "int32", "float16", "float32", "float64"]),
    channels=st.sampled_from([0, 1, 3]),
    first=st.booleans(),
    as_tensor=st.booleans(),
    seed=st.integers(0, 99),
)
def test_arrays_are_decoded_like_pictures(
    kind: str, channels: int, first: bool, as_tensor: bool, seed: int
) -> None:
    """(H, W), channels behind or in front, NumPy or torch: the same pixels."""
    shape = (5, 7, channels) if channels else (5, 7)
    values = np.random.default_rng(seed).random(shape)
    if "float" not in kind:
        values = values * min(np.iinfo(kind).max, 65535)
    values = values.astype(kind)

    given: Any = np.moveaxis(values, -1, 0) if channels and first else values
    if as_tensor:
        given = torch.from_numpy(np.ascontiguousarray(given))
    image = Images([given], 3)[0]
    grey = values if channels else values[..., None]
    expected = np.broadcast_to(scale_to_bytes(grey), (5, 7, 3))
    np.testing.assert_array_equal(pixels_of(image), expected)


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([False, True], "bool", [0, 255]),
        ([0, 257, 65535], "uint16", [0, 1, 255]),
        ([0, 7, 255], "int32", [0, 7, 255]),
        ([0, 257 * 90, 65535], "int32", [0, 90, 255]),
        ([0, 2**30, 2**31 - 1], "int64", [0, 128, 255]),
        ([0, 0.5, 1], "float32", [0, 128, 255]),
        ([-0.01, 0.5, 1.04], "float32", [0, 128, 255]),
        ([0, 90, 254.6], "float32", [0, 90, 255]),
        ([0, 257 * 90, 65535], "float32", [0, 90, 255]),
        ([-1, 0, 1], "float32", [0, 128, 255]),
        ([-30, -15, 0], "float32", [0, 128, 255]),
        ([np.nan, 0.2, 1], "float32", [0, 51, 255]),
        ([np.inf, -np.inf, -3.4028235e38, 0.2], "float32", [0, 0, 0, 51]),
        ([-9999, 0.2, 1], "float32", [0, 51, 255]),
        ([-7, 0.2, 1], "float32, no data -7", [0, 51, 255]),
        ([5e6, 5e6], "float32", [0, 0]),
    ],
)
def test_the_rule_of_depths(values: list[float], kind: str, expected: list[int]) -> None:
    dtype, _, no_data = kind.partition(", no data ")
    row = np.array(values, dtype=np.float64).astype(dtype)
    assert scale_to_bytes(row, float(no_data) if no_data else None).tolist() == expected


def test_a_geotiff_names_its_no_data() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[GDAL_NODATA] = 2
    tags[GDAL_NODATA] = "-1234"
    buffer = io.BytesIO()
    Image.fromarray(np.array([[-1234, 0.2, 1]], np.float32)).save(buffer, "TIFF", tiffinfo=tags)
    assert np.asarray(decode_image(buffer.getvalue(), 1)).tolist() == [[0, 51, 255]]


def test_the_transparent_value_of_sixteen_bits_is_white() -> None:
    buffer = io.BytesIO()
    deep = Image.fromarray(np.array([[1000, 30000]], np.uint16))
    deep.save(buffer, "PNG", transparency=1000)
    assert np.asarray(decode_image(buffer.getvalue(), 1)).tolist() == [[255, 117]]


@pytest.mark.parametrize("shape", [(4, 5, 4), (2, 4, 5), (5,), (1, 3, 4, 5), (0, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Cannot decode an image: it") as error:
        decode_image(np.zeros(shape, np.uint8))
    assert "\n" not in str(error.value)
    expected = str(error.value)
    if len(shape) not in (2, 3):
        # in a list it may be one of a pair: images, and their labels
        expected = (
            f"an array of shape {shape} is not one image, which has height and width, and channels "
            "if any; labels come as (image, label) in the list"
        )
    assert str(Images([np.zeros(shape, np.uint8)], 3)[0]) == expected


def test_other_numbers_of_channels_and_values_are_refused() -> None:
    with pytest.raises(ValueError, match="num_channels is 17; images have 1 to 16"):
        decode_image(np.zeros((4, 5), np.uint8), 17)
    with pytest.raises(ValueError, match="its values are complex128, not numbers"):
        decode_image(np.zeros((4, 5), complex))
    with pytest.raises(ValueError, match="none of its pixels has data"):
        decode_image(np.full((4, 5), np.nan))


def test_items_without_a_picture_say_so() -> None:
    items = [
        {"text": "a"},
        {"image": {"bytes": None, "path": "a.png"}},
        7,
        "data:image/png;base64,",
    ]
    said = [str(sentence) for sentence in (Images(items, 3)[i] for i in range(4))]
    assert all("holds none" in sentence for sentence in said[:3])
    assert "it is empty" in said[3]


def test_the_endings_are_those_of_what_is_decoded() -> None:
    assert {".jpg", ".jpe", ".jfif", ".jp2", ".png", ".tiff", ".webp", ".pgm"} <= EXTENSIONS
    assert not EXTENSIONS & {".eps", ".pdf", ".ps", ".mpg", ".h5"}
