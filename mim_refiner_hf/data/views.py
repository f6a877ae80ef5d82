"""Views out: the multi-crop augmentation of the paper (Table 10; METHOD.md "Views") with Pillow, as uint8 tensors.

    multicrop = MultiCrop(view_specs(2, 10, 224, 96, (0.25, 1.0), (0.05, 0.25), colour=True))
    views = ViewDataset(open_images("photos/"), multicrop, seed=0)
    sampler = BatchSampler(views.source, batch_size=1024, seed=0, steps=1000)
    for batch in DataLoader(views, batch_sampler=sampler, num_workers=8):
        pixels = normalise(batch["global_views"], mean, std)          # (B, 2, 3, 224, 224) float32

Order of the operations: crop, flip, colour jitter, blur, greyscale, solarise. Each is a pure function of explicit parameters,
equal bit for bit to torchvision's Pillow path, which the authors' code runs. The generator of an image is a pure function of
(seed, epoch, index), so workers, processes and resuming change nothing.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..runtime.seeding import random_generator
from .images import ImageDataset, ImageStream, Key, Sample, read_sample

RATIO = (3 / 4, 4 / 3)
JITTER_P, BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.8, 0.4, 0.4, 0.2, 0.1
BLUR_SIGMA = (
    0.1,
    2.0,
)  # pixels, where global views have 224 of them a side; smaller views get it in proportion
GREYSCALE_P = 0.2
CACHE_BYTES = 256 * 2**20  # per worker

Box = tuple[int, int, int, int]
Multicrop = Callable[[Image.Image, np.random.Generator], dict[str, Tensor]]
"""Makes the views of one image: `MultiCrop` here, `FastMultiCrop` of `fast_views.py`."""


@dataclass(frozen=True)
class ViewSpec:
    """How one view is drawn: `size` of its square in pixels, `scale` = range of the crop's share of the area, probabilities of
    blur, solarisation and horizontal flip. `colour` False leaves crop and flip only. `local` views are never targets.
    `blur_scale` multiplies the blur's sigma."""

    size: int
    scale: tuple[float, float]
    blur_p: float
    solarize_p: float
    colour: bool
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
    """The paper's views, global ones first: blur with p 1 on global 0, 0.1 on further globals (solarised with p 0.2), 0.5 on
    locals. Its sigma is the paper's at 224 px and above; on small images 2 px would wipe out what there is to see."""
    blur_scale = min(1.0, global_size / 224)
    specs = []
    for view in range(global_views):
        blur_p, solarize_p = (1.0, 0.0) if view == 0 else (0.1, 0.2)
        specs.append(
            ViewSpec(
                global_size, global_scale, blur_p, solarize_p, colour, flip, blur_scale=blur_scale
            )
        )
    return (
        specs
        + [ViewSpec(local_size, local_scale, 0.5, 0.0, colour, flip, True, blur_scale)]
        * local_views
    )


# The operations: pure functions of an image of mode "RGB" or "L" and explicit parameters.


def resized_crop(image: Image.Image, box: Box, size: int) -> Image.Image:
    """Crops `box` = (top, left, height, width), then resizes to (size, size), bicubic with antialiasing.

    `resize(box=...)` would save the copy but lets pixels outside the box bleed in: other bits than the authors'."""
    top, left, height, width = box
    return image.crop((left, top, left + width, top + height)).resize(
        (size, size), Image.Resampling.BICUBIC
    )


def flip_horizontally(image: Image.Image) -> Image.Image:
    """Left becomes right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def adjust_brightness(image: Image.Image, factor: float) -> Image.Image:
    """Blends with black; factor 1 is the image."""
    return ImageEnhance.Brightness(image).enhance(factor)


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Blends with the image's mean grey; factor 1 is the image. The bits of `ImageEnhance.Contrast`."""
    counts = np.array(image.convert("L").histogram())
    mean = int(counts @ np.arange(256) / counts.sum() + 0.5)
    return Image.blend(
        Image.new(image.mode, image.size, (mean,) * len(image.getbands())), image, factor
    )


def adjust_saturation(image: Image.Image, factor: float) -> Image.Image:
    """Blends with the greyscale image; factor 1 is the image. Greyscale images stay as they are."""
    return image if image.mode == "L" else ImageEnhance.Color(image).enhance(factor)


def adjust_hue(image: Image.Image, turn: float) -> Image.Image:
    """Turns the hue by `turn` in [-0.5, 0.5] of a full circle, in 8-bit HSV. Greyscale images stay as they are."""
    if image.mode == "L":
        return image
    hue, saturation, value = image.convert("HSV").split()
    shift = int(turn * 255) % 256  # truncated towards zero, then wrapped, as torchvision does
    turned = ImageChops.add_modulo(hue, Image.new("L", hue.size, shift))
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def gaussian_blur(image: Image.Image, sigma: float) -> Image.Image:
    """Pillow's Gaussian blur; `sigma` in pixels."""
    return image.filter(ImageFilter.GaussianBlur(sigma))


def greyscale(image: Image.Image) -> Image.Image:
    """Luminance on every channel."""
    return image if image.mode == "L" else image.convert("L").convert("RGB")


def solarise(image: Image.Image, threshold: int = 128) -> Image.Image:
    """Inverts every value from `threshold` on."""
    return ImageOps.solarize(image, threshold)


ADJUSTMENTS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
)

# Drawing.


def draw_crop(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """(top, left, height, width) of a crop with `scale` x the area and a log-uniform aspect ratio in 3/4..4/3: ten tries, then
    the largest centre crop of an allowed ratio (torchvision's `RandomResizedCrop`)."""
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for _ in range(10):
        area_draw, ratio_draw, top_draw, left_draw = rng.random(4).tolist()
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area_draw)
        ratio = math.exp(low + (high - low) * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class ViewDraw:
    """Everything random about one view. `jitter`: (place in `ADJUSTMENTS`, factor) in the order of application, empty for none;
    `sigma` 0 for no blur."""

    box: Box
    flip: bool
    jitter: tuple[tuple[int, float], ...] = ()
    sigma: float = 0.0
    grey: bool = False
    solarised: bool = False


def draw_jitter(rng: np.random.Generator) -> tuple[tuple[int, float], ...]:
    """Brightness, contrast, saturation and hue in random order, each by a factor drawn uniformly."""
    brightness, contrast, saturation, hue = (2 * rng.random(4) - 1).tolist()  # in [-1, 1)
    factors = (
        1 + BRIGHTNESS * brightness,
        1 + CONTRAST * contrast,
        1 + SATURATION * saturation,
        HUE * hue,
    )
    return tuple((place, factors[place]) for place in rng.permutation(4).tolist())


def draw_view(width: int, height: int, spec: ViewSpec, rng: np.random.Generator) -> ViewDraw:
    """What is random about one view of an image of (width, height) pixels; both ways of making views draw here."""
    box, flip = draw_crop(width, height, spec.scale, rng), rng.random() < spec.flip
    if not spec.colour:
        return ViewDraw(box, flip)
    return ViewDraw(
        box,
        flip,
        jitter=draw_jitter(rng) if rng.random() < JITTER_P else (),
        sigma=spec.blur_scale * rng.uniform(*BLUR_SIGMA) if rng.random() < spec.blur_p else 0.0,
        grey=rng.random() < GREYSCALE_P,
        solarised=rng.random() < spec.solarize_p,
    )


def colour_jitter(image: Image.Image, jitter: Sequence[tuple[int, float]]) -> Image.Image:
    """The adjustments of `draw_jitter`, one after the other."""
    for place, factor in jitter:
        image = ADJUSTMENTS[place](image, factor)
    return image


def make_view(image: Image.Image, spec: ViewSpec, rng: np.random.Generator) -> Image.Image:
    """One view of an image of mode "RGB" or "L", in the same mode, (spec.size, spec.size)."""
    draw = draw_view(*image.size, spec, rng)
    view = resized_crop(image, draw.box, spec.size)
    if draw.flip:
        view = flip_horizontally(view)
    if draw.jitter:
        view = colour_jitter(view, draw.jitter)
    if draw.sigma:
        view = gaussian_blur(view, draw.sigma)
    if draw.grey:
        view = greyscale(view)
    return solarise(view) if draw.solarised else view


def view_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of all views of image `index` in an epoch: a pure function of its arguments."""
    return random_generator(seed, "views", epoch, index)


def by_kind(specs: Sequence[ViewSpec]) -> tuple[list[ViewSpec], list[ViewSpec]]:
    """(global, local) specs; ValueError if views of one kind differ in size."""
    kinds = [spec for spec in specs if not spec.local], [spec for spec in specs if spec.local]
    for group in kinds:
        if len(sizes := {spec.size for spec in group}) > 1:
            raise ValueError(
                f"Views of one kind are stacked and share one size, not {sorted(sizes)}."
            )
    return kinds


class MultiCrop:
    """All views of one image, uint8: "global_views" (G, C, S, S), "local_views" (L, C, s, s); without locals (0, C, 0, 0).

    ValueError if views of one kind differ in size."""

    def __init__(self, specs: Sequence[ViewSpec]) -> None:
        self.global_specs, self.local_specs = by_kind(specs)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        channels = len(image.getbands())
        return {
            "global_views": self._stack(image, self.global_specs, channels, rng),
            "local_views": self._stack(image, self.local_specs, channels, rng),
        }

    @staticmethod
    def _stack(
        image: Image.Image, specs: list[ViewSpec], channels: int, rng: np.random.Generator
    ) -> Tensor:
        if not specs:
            return torch.empty(0, channels, 0, 0, dtype=torch.uint8)
        size = specs[0].size
        column = Image.new(
            image.mode, (size, size * len(specs))
        )  # views one above the other leave Pillow in one copy
        for place, spec in enumerate(specs):
            column.paste(make_view(image, spec, rng), (0, place * size))
        pixels = torch.frombuffer(bytearray(column.tobytes()), dtype=torch.uint8)
        return pixels.view(len(specs), size, size, channels).permute(0, 3, 1, 2).contiguous()


class ViewDataset(Dataset[dict[str, Any]]):
    """Key of a `BatchSampler` -> {"index", "label", "broken", and what `multicrop` makes: "global_views", "local_views"}.

    A broken image is replaced as `mim_refiner_hf.data` says; the entries of those passed over are JSON under "broken" (or ""), and the
    views are drawn for the image that was asked for. Small data sets (under 256 MB decoded) stay in memory once decoded."""

    def __init__(self, source: ImageDataset | ImageStream, multicrop: Multicrop, seed: int) -> None:
        self.source, self.multicrop, self.seed = source, multicrop, seed
        self._decoded: dict[int, Sample] = {}

    def __getitem__(self, key: Key) -> dict[str, Any]:
        sample, asked, broken = read_sample(self.source, key, self._read)
        views = self.multicrop(sample.image, view_rng(self.seed, key[0], asked))
        about = {
            "index": sample.index,
            "label": sample.label,
            "broken": json.dumps(broken) if broken else "",
        }
        return {**about, **views}

    def _read(self, candidate: Any) -> Sample:
        source = self.source
        if isinstance(source, ImageStream):
            return source[candidate]
        if (sample := self._decoded.get(candidate)) is None:
            sample = source[candidate]
            width, height = sample.image.size
            # An image stays if the whole set, were it made of images like this one, fits: bounded without knowing the others.
            if width * height * source.num_channels * len(source) <= CACHE_BYTES:
                self._decoded[candidate] = sample
        return sample


def normalise(views: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (..., C, H, W) -> float32 of the same shape on the same device: (value / 255 - mean) / std per channel.

    On the CPU the bits are those of torchvision's `to_tensor` and `normalize`."""
    shape = (-1, 1, 1)
    mean_tensor = torch.tensor(mean, dtype=torch.float32, device=views.device).view(shape)
    std_tensor = torch.tensor(std, dtype=torch.float32, device=views.device).view(shape)
    return views.to(torch.float32).div_(255).sub_(mean_tensor).div_(std_tensor)
