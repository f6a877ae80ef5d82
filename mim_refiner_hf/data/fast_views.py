"""Views out, the fast way (`--views fast`): the same draws as `views.py`, other arithmetic.

    multicrop = FastMultiCrop(specs, hand_over=True)          # specs of `view_specs`
    views = ViewDataset(images, multicrop, seed=0)
    batch = next(iter(DataLoader(views, batch_sampler=sampler, num_workers=8)))
    pixels = finished_views(batch, "global", device)          # (B, 2, 3, 224, 224) uint8 there

A worker decodes, crops, resizes and flips on uint8 tensors. With `hand_over` it leaves the colour
operations to the device, which does a whole batch at a time (`colour.py`); without, as on a machine
that has only CPUs, it does them itself, view by view. A view is the one that the exact way makes of
the same (seed, epoch, index), but for interpolation and rounding.

`python -m benchmarks views-cpu views-hand-over` compares their speed; `tests/test_fast_views.py`
bounds the differences.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..clustering.channels import Picture
from .colour import apply_colour, colour_view_, draw_table, operations
from .views import ViewDraw, ViewSpec, by_kind, draw_view

VIEW_KINDS: tuple[Literal["global"], Literal["local"]] = ("global", "local")


class FastMultiCrop:
    """All views of one image, as `MultiCrop`.

    With `hand_over` "global_views" and "local_views" are cropped and flipped only; "global_draws"
    (G, 11) and "local_draws" (L, 11), of `draw_table`, say what `finished_views` has to do to them.

    Raises:
        ValueError: if views of one kind differ in size.
    """

    def __init__(self, specs: Sequence[ViewSpec], hand_over: bool) -> None:
        self.kinds = dict(zip(VIEW_KINDS, by_kind(specs), strict=True))
        self.hand_over = hand_over and any(spec.colour for spec in specs)

    def __call__(self, image: Picture, rng: np.random.Generator) -> dict[str, Tensor]:
        pixels = torch.from_numpy(np.array(image))
        if pixels.ndim == 2:
            pixels = pixels.unsqueeze(-1)
        height, width, channels = pixels.shape

        item = {}
        for kind, specs in self.kinds.items():
            size = specs[0].size if specs else 0
            draws = [draw_view(width, height, spec, rng) for spec in specs]
            table = draw_table(draws)
            orders = operations(table, channels)
            if self.hand_over:
                item[f"{kind}_draws"] = table
                orders = [{} for _ in specs]

            views = torch.empty(len(specs), channels, size, size, dtype=torch.uint8)
            for view, draw, order in zip(views.numpy(), draws, orders, strict=True):
                crop: np.ndarray = fast_resized_crop(pixels, draw, size)
                if order:
                    crop = colour_view_(crop.astype(np.int16, order="C"), order)
                view[...] = crop
            item[f"{kind}_views"] = views
        return item


def fast_resized_crop(pixels: Tensor, draw: ViewDraw, size: int) -> NDArray[np.uint8]:
    """uint8 (H, W, C) -> (C, size, size), channels last in memory: crop, resize, flip of a draw.

    torch's uint8 kernel has Pillow's filter (bicubic with antialiasing) and 16-bit weights; it is
    faster on a crop that is copied out first.
    """
    top, left, height, width = draw.box
    crop = pixels[top : top + height, left : left + width].contiguous()
    crop = crop.permute(2, 0, 1).unsqueeze(0)
    resized = F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)
    view: NDArray[np.uint8] = resized[0].numpy()
    return view[..., ::-1] if draw.flip else view


def finished_views(
    batch: Mapping[str, Tensor], kind: Literal["global", "local"], device: torch.device | str
) -> Tensor:
    """uint8 (B, V, C, H, W) on the device, of a batch of either way of making views.

    What was handed over unfinished is finished there.
    """
    views = batch[f"{kind}_views"].to(device, non_blocking=True)
    draws = batch.get(f"{kind}_draws")
    return views if draws is None else apply_colour(views, draws)
