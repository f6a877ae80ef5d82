"""Two views of one crop, light and in hard colours: what ConMIM's two networks see.

    views = ViewDataset(images, LightAndHard(224, (0.08, 1.0)), seed=0)
    light, hard = views[key]["global_views"]        # uint8 (C, 224, 224) each

The image is flipped before it is cropped, as in the authors' code, and the hard colours are jitter,
greyscale, blur and solarisation in this order.
"""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..clustering.channels import ChannelImage, Picture
from .views import (
    ViewDraw,
    ViewSpec,
    colour_jitter,
    draw_view,
    flip_horizontally,
    gaussian_blur,
    greyscale,
    resized_crop,
    solarise,
)

_BLUR_P = 0.1
_SOLARISE_P = 0.2


def light_and_hard(
    image: Image.Image, draw: ViewDraw, size: int
) -> tuple[Image.Image, Image.Image]:
    """The crop of a draw as it is, and with the draw's colours; (size, size), mode kept.

    Args:
        image: of mode "RGB" or "L".
        draw: its box is one of the image after the flip.
    """
    if draw.flip:
        image = flip_horizontally(image)
    light = resized_crop(image, draw.box, size)

    hard = light
    if draw.jitter:
        hard = colour_jitter(hard, draw.jitter)
    if draw.grey:
        hard = greyscale(hard)
    if draw.sigma:
        hard = gaussian_blur(hard, draw.sigma)
    if draw.solarised:
        hard = solarise(hard)
    return light, hard


class LightAndHard:
    """An image's two views, uint8: "global_views" (2, C, S, S), light first, and no local ones.

    Of images that are no pictures the channels are grey images of their own, as in `views.py`.

    Args:
        size: side of the views in pixels.
        scale: range of the crop's share of the image's area.
        flip: probability of a horizontal flip.
    """

    def __init__(self, size: int, scale: tuple[float, float], flip: float = 0.5) -> None:
        blur_scale = min(1.0, size / 224)
        self.spec = ViewSpec(
            size, scale, _BLUR_P, _SOLARISE_P, colour=True, flip=flip, blur_scale=blur_scale
        )

    def __call__(self, image: Picture, rng: np.random.Generator) -> dict[str, Tensor]:
        draw = draw_view(image.size[0], image.size[1], self.spec, rng)
        if isinstance(image, ChannelImage):
            draw = replace(draw, solarised=False)
            planes = [Image.fromarray(np.ascontiguousarray(each)) for each in image.in_front()]
            pairs = [light_and_hard(plane, draw, self.spec.size) for plane in planes]
            views = np.stack([np.stack(planes) for planes in zip(*pairs, strict=True)])
        else:
            pair = light_and_hard(image, draw, self.spec.size)
            channels = [np.asarray(view).reshape(*view.size, -1) for view in pair]
            views = np.stack(channels).transpose(0, 3, 1, 2)

        pixels = torch.from_numpy(np.ascontiguousarray(views))
        nothing = torch.empty(0, pixels.shape[1], 0, 0, dtype=torch.uint8)
        return {"global_views": pixels, "local_views": nothing}
