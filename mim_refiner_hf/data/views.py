"""Views out: the multi-crop augmentation of the paper (Table 10) with Pillow, as uint8 tensors.

    specs = view_specs(2, 10, 224, 96, (0.25, 1.0), (0.05, 0.25), colour=True)
    views = ViewDataset(open_images("photos/"), MultiCrop(specs), seed=0)
    sampler = BatchSampler(views.source, batch_size=1024, seed=0, steps=1000)
    for batch in DataLoader(views, batch_sampler=sampler, num_workers=8):
        pixels = normalise(batch["global_views"], mean, std)      # (B, 2, 3, 224, 224) float32

Order of the operations: crop, flip, colour jitter, blur, greyscale, solarise. Each is a pure
function of explicit parameters, equal bit for bit to torchvision's Pillow path, which the authors'
code runs. The generator of an image is a pure function of (seed, epoch, index), so workers,
processes and resuming change nothing.

Of images with other numbers of channels than 3 and 1 every channel is treated as a grey image of
its own, by the same random choices; hue, saturation, greyscale and solarise, which are about
colours, are left out.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..clustering.channels import ChannelImage, Picture
from ..model.image_processing_mim_refiner import to_eight_bits
from ..runtime.seeding import random_generator
from .images import ImageDataset, Key, Sample
from .reading import read_sample
from .stream import ImageStream

ASPECT_RATIO = (3 / 4, 4 / 3)
JITTER_P = 0.8
# how far brightness, contrast and saturation are changed, and the hue turned, at most
JITTER_STRENGTHS = (0.4, 0.4, 0.2, 0.1)
# pixels, where global views have 224 of them a side; smaller views get it in proportion
BLUR_SIGMAS = (0.1, 2.0)
GREYSCALE_P = 0.2
# of decoded images, per worker
CACHE_BYTES = 256 * 2**20

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels."""
Multicrop = Callable[[Picture, np.random.Generator], dict[str, Tensor]]
"""Makes the views of one image: `MultiCrop` here, `FastMultiCrop` of `fast_views.py`."""


@dataclass(frozen=True)
class ViewSpec:
    """How one view is drawn.

    Attributes:
        size: side of its square in pixels.
        scale: range of the crop's share of the image's area.
        blur_p: probability of blur.
        solarize_p: probability of solarisation.
        colour: False leaves crop and flip only.
        flip: probability of a horizontal flip.
        local: such views are never targets.
        blur_scale: multiplies the blur's sigma.
    """

    size: int
    scale: tuple[float, float]
    blur_p: float = 0.0
    solarize_p: float = 0.0
    colour: bool = False
    flip: float = 0.5
    local: bool = False
    blur_scale: float = 1.0


def view_specs(
    global_views: int,
    local_views: int,
    global_size: int,
    local_size: int,
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    colour: bool,
    flip: float = 0.5,
) -> list[ViewSpec]:
    """The paper's views, global ones first.

    Global view 0 is always blurred; further global ones with p 0.1, and solarised with p 0.2; local
    ones are blurred with p 0.5. The sigma is the paper's at 224 px and above: on small images 2 px
    would wipe out what there is to see.
    """
    blur_scale = min(1.0, global_size / 224)
    specs = []
    for view in range(global_views):
        blur_p, solarize_p = (1.0, 0.0) if view == 0 else (0.1, 0.2)
        specs.append(
            ViewSpec(
                global_size, global_scale, blur_p, solarize_p, colour, flip, blur_scale=blur_scale
            )
        )
    local = ViewSpec(local_size, local_scale, 0.5, 0.0, colour, flip, True, blur_scale)
    return specs + [local] * local_views


# --- the operations: pure functions of an image of mode "RGB" or "L" and explicit parameters


def resized_crop(image: Image.Image, box: Box, size: int) -> Image.Image:
    """Crop, then resize to (size, size), bicubic with antialiasing.

    `resize(box=...)` would save the copy but lets pixels outside the box bleed in: other bits than
    the authors'.
    """
    top, left, height, width = box
    crop = image.crop((left, top, left + width, top + height))
    return crop.resize((size, size), Image.Resampling.BICUBIC)


def flip_horizontally(image: Image.Image) -> Image.Image:
    """Left becomes right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def adjust_brightness(image: Image.Image, factor: float) -> Image.Image:
    """Blend with black; factor 1 is the image."""
    return ImageEnhance.Brightness(image).enhance(factor)


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Blend with the image's mean grey, as `ImageEnhance.Contrast`; factor 1 is the image."""
    counts = np.array(image.convert("L").histogram())
    mean = int(counts @ np.arange(256) / counts.sum() + 0.5)
    grey = Image.new(image.mode, image.size, (mean,) * len(image.getbands()))
    return Image.blend(grey, image, factor)


def adjust_saturation(image: Image.Image, factor: float) -> Image.Image:
    """Blend with the greyscale image; factor 1 is the image. Greyscale images stay as they are."""
    return image if image.mode == "L" else ImageEnhance.Color(image).enhance(factor)


def adjust_hue(image: Image.Image, turn: float) -> Image.Image:
    """Turn the hue by `turn` in [-0.5, 0.5] of a full circle, in 8-bit HSV; not of greyscale."""
    if image.mode == "L":
        return image
    hue, saturation, value = image.convert("HSV").split()
    # truncated towards zero, then wrapped, as torchvision does
    shift = int(turn * 255) % 256
    turned = ImageChops.add_modulo(hue, Image.new("L", hue.size, shift))
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


ADJUSTMENTS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
)


def colour_jitter(image: Image.Image, jitter: Sequence[tuple[int, float]]) -> Image.Image:
    """The adjustments of `draw_jitter`, one after the other."""
    for place, factor in jitter:
        image = ADJUSTMENTS[place](image, factor)
    return image


def gaussian_blur(image: Image.Image, sigma: float) -> Image.Image:
    """Pillow's Gaussian blur; `sigma` in pixels."""
    return image.filter(ImageFilter.GaussianBlur(sigma))


def greyscale(image: Image.Image) -> Image.Image:
    """Luminance on every channel."""
    return image if image.mode == "L" else image.convert("L").convert("RGB")


def solarise(image: Image.Image, threshold: int = 128) -> Image.Image:
    """Invert every value from `threshold` on."""
    return ImageOps.solarize(image, threshold)


# --- drawing what is random


@dataclass(frozen=True)
class ViewDraw:
    """Everything random about one view.

    Attributes:
        jitter: (place in `ADJUSTMENTS`, factor) in the order of application, empty for none.
        sigma: of the blur, in pixels; 0 for none.
    """

    box: Box
    flip: bool
    jitter: tuple[tuple[int, float], ...] = ()
    sigma: float = 0.0
    grey: bool = False
    solarised: bool = False


def view_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of all views of image `index` in an epoch."""
    return random_generator(seed, "views", epoch, index)


def draw_view(width: int, height: int, spec: ViewSpec, rng: np.random.Generator) -> ViewDraw:
    """What is random about one view of an image of (width, height) pixels, exact or fast."""
    box = draw_crop(width, height, spec.scale, rng)
    flip = rng.random() < spec.flip
    if not spec.colour:
        return ViewDraw(box, flip)

    jitter = draw_jitter(rng) if rng.random() < JITTER_P else ()
    sigma = spec.blur_scale * rng.uniform(*BLUR_SIGMAS) if rng.random() < spec.blur_p else 0.0
    grey = rng.random() < GREYSCALE_P
    solarised = rng.random() < spec.solarize_p
    return ViewDraw(box, flip, jitter, sigma, grey, solarised)


def draw_crop(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """A crop with `scale` x the area and a log-uniform aspect ratio in 3/4..4/3.

    Ten tries, then the largest centre crop of an allowed ratio (torchvision's `RandomResizedCrop`).
    """
    low, high = map(math.log, ASPECT_RATIO)
    for _ in range(10):
        area_draw, ratio_draw, top_draw, left_draw = rng.random(4).tolist()
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area_draw)
        ratio = math.exp(low + (high - low) * ratio_draw)
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w

    w = min(width, round(height * ASPECT_RATIO[1]))
    h = min(height, round(width / ASPECT_RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_jitter(rng: np.random.Generator) -> tuple[tuple[int, float], ...]:
    """Brightness, contrast, saturation and hue in random order, by uniformly drawn factors."""
    # each in [-strength, strength)
    changes = np.multiply(JITTER_STRENGTHS, 2 * rng.random(4) - 1)
    # a factor of 1 changes nothing, nor does a turn of 0
    factors = np.add(changes, (1, 1, 1, 0)).tolist()
    return tuple((place, factors[place]) for place in rng.permutation(4).tolist())


# --- views of an image


def make_view(image: Image.Image, spec: ViewSpec, rng: np.random.Generator) -> Image.Image:
    """One view of an image of mode "RGB" or "L", in the same mode, (spec.size, spec.size)."""
    return drawn_view(image, draw_view(*image.size, spec, rng), spec.size)


def drawn_view(image: Image.Image, draw: ViewDraw, size: int) -> Image.Image:
    """The view that a draw describes, (size, size)."""
    view = resized_crop(image, draw.box, size)
    if draw.flip:
        view = flip_horizontally(view)

    if draw.jitter:
        view = colour_jitter(view, draw.jitter)
    if draw.sigma:
        view = gaussian_blur(view, draw.sigma)
    if draw.grey:
        view = greyscale(view)
    if draw.solarised:
        view = solarise(view)
    return view


def channel_views(
    image: ChannelImage, specs: Sequence[ViewSpec], rng: np.random.Generator
) -> list[np.ndarray]:
    """Views of 8-bit pixels of any number of channels, each uint8 (C, size, size)."""
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in image.in_front()]
    views = []
    for spec in specs:
        draw = replace(draw_view(*image.size, spec, rng), solarised=False)
        views.append(np.stack([np.asarray(drawn_view(plane, draw, spec.size)) for plane in planes]))
    return views


def by_kind(specs: Sequence[ViewSpec]) -> tuple[list[ViewSpec], list[ViewSpec]]:
    """(global, local) specs; ValueError if views of one kind differ in size."""
    kinds = [spec for spec in specs if not spec.local], [spec for spec in specs if spec.local]
    for group in kinds:
        sizes = {spec.size for spec in group}
        if len(sizes) > 1:
            raise ValueError(
                f"Views of one kind are stacked and share one size, not {sorted(sizes)}."
            )
    return kinds


class MultiCrop:
    """All views of one image, uint8: "global_views" (G, C, S, S), "local_views" (L, C, s, s).

    Without locals (0, C, 0, 0). ValueError if views of one kind differ in size.
    """

    def __init__(self, specs: Sequence[ViewSpec]) -> None:
        self.global_specs, self.local_specs = by_kind(specs)

    def __call__(self, image: Picture, rng: np.random.Generator) -> dict[str, Tensor]:
        return {
            "global_views": self._stack(image, self.global_specs, rng),
            "local_views": self._stack(image, self.local_specs, rng),
        }

    @staticmethod
    def _stack(image: Picture, specs: list[ViewSpec], rng: np.random.Generator) -> Tensor:
        channels = len(image.getbands())
        if not specs:
            return torch.empty(0, channels, 0, 0, dtype=torch.uint8)
        if isinstance(image, ChannelImage):
            return torch.from_numpy(np.stack(channel_views(image, specs, rng)))

        # views one above the other leave Pillow in one copy
        size = specs[0].size
        column = Image.new(image.mode, (size, size * len(specs)))
        for place, spec in enumerate(specs):
            column.paste(make_view(image, spec, rng), (0, place * size))
        pixels = torch.frombuffer(bytearray(column.tobytes()), dtype=torch.uint8)
        return pixels.view(len(specs), size, size, channels).permute(0, 3, 1, 2).contiguous()


class ViewDataset(Dataset[dict[str, Any]]):
    """Key of a `BatchSampler` -> the views of its image, with its index and label.

    A broken image is replaced as `images.py` says; the views are drawn for the image that was asked
    for. Small data sets (under 256 MB decoded) stay in memory once decoded.

    Args:
        value_range: of images that are no pictures, what becomes 0 and 255: see `to_eight_bits`.

    Returns of an item:
        index, label: of the sample.
        broken: JSON of the entries of the images that were passed over; "" for none.
        global_views, local_views: what `multicrop` makes, and what else it makes.
    """

    def __init__(
        self,
        source: ImageDataset | ImageStream,
        multicrop: Multicrop,
        seed: int,
        value_range: Sequence[float] | None = None,
    ) -> None:
        self.source = source
        self.value_range = value_range
        self.multicrop = multicrop
        self.seed = seed
        self._decoded: dict[int, Sample] = {}

    def __getitem__(self, key: Key) -> dict[str, Any]:
        sample, asked, broken = read_sample(self.source, key, self._read)
        views = self.multicrop(sample.image, view_rng(self.seed, key[0], asked))
        reports = json.dumps(broken) if broken else ""
        return {"index": sample.index, "label": sample.label, "broken": reports, **views}

    def _read(self, candidate: Any) -> Sample:
        source = self.source
        if isinstance(source, ImageStream):
            return self._with_bytes(source[candidate])
        sample = self._decoded.get(candidate)
        if sample is None:
            sample = self._with_bytes(source[candidate])
            width, height = sample.image.size
            # An image stays if the whole set, were it made of images like this one, would fit: that
            # is bounded without knowing the others.
            if width * height * source.num_channels * len(source) <= CACHE_BYTES:
                self._decoded[candidate] = sample
        return sample

    def _with_bytes(self, sample: Sample) -> Sample:
        """The sample with 8-bit values."""
        image = sample.image
        if not isinstance(image, ChannelImage):
            return sample
        return sample._replace(image=ChannelImage(to_eight_bits(image.pixels, self.value_range)))


def normalise(views: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (..., C, H, W) -> float32, on the same device: (value / 255 - mean) / std per channel.

    On the CPU the bits are those of torchvision's `to_tensor` and `normalize`.
    """
    mean_tensor = torch.tensor(mean, dtype=torch.float32, device=views.device).view(-1, 1, 1)
    std_tensor = torch.tensor(std, dtype=torch.float32, device=views.device).view(-1, 1, 1)
    return views.to(torch.float32).div_(255).sub_(mean_tensor).div_(std_tensor)
