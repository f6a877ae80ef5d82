"""The colour operations of the views on tensors, each sample with its own parameters: on the device, a batch at a time.

    table = draw_table(draws)                     # (N, 11) from `views.draw_view`, on the CPU
    views = apply_colour(views, table)            # uint8 (N, C, H, W) -> uint8, on the device of `views`

The same parameters as in `views.py` and the same 8-bit steps, in int16: a factor f is kept as round(256 (f - 1)), so every blend
is within one grey level of Pillow's. Hue is turned without going through HSV: within two levels of torchvision's on floats, and
up to 11 from Pillow's, whose 8-bit HSV is the coarser. int16 takes half the memory traffic of float32, which is what all of this
costs.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .views import ViewDraw

COLUMNS = 11  # 4 factors, 4 places of the order, sigma, grey, solarised
ORDER, SIGMA, GREY, SOLARISED = 4, 8, 9, 10
BATCH = 512  # views at a time; bounds the memory
RADIUS = 6  # of the blur, in pixels: three boxes of radius 2, which is Pillow's blur up to a sigma of 2
MAX_SIGMA, SIGMA_STEPS = 2.0, 500  # per pixel
BLOCK = 96  # pixels that one product with a band matrix filters

# Constants as tensors without dimensions: a Python number would cost a small operation more than the operation itself.
_WEIGHTS = torch.tensor([38, 75, 15]) / 128  # 0.299 R + 0.587 G + 0.114 B
_SEVEN, _EIGHT, _FIFTEEN, _HALF = (torch.tensor(value, dtype=torch.int16) for value in (7, 8, 15, 64))

Operation = Callable[[Tensor, Tensor], None]


def draw_table(draws: Sequence[ViewDraw]) -> Tensor:
    """Draws as numbers, float32 (N, 11). The places of the order hold -1 without jitter; turning the hue back is operation 4."""
    rows = []
    for draw in draws:
        factors, order = [1.0, 1.0, 1.0, 0.0], [-1.0] * 4
        for place, (operation, factor) in enumerate(draw.jitter):
            factors[operation] = factor
            order[place] = 4 if operation == 3 and factor < 0 else operation
        rows.append([*factors, *order, draw.sigma, draw.grey, draw.solarised])
    return torch.tensor(rows, dtype=torch.float32).view(len(rows), COLUMNS)


@torch.inference_mode()
def apply_colour(views: Tensor, table: Tensor) -> Tensor:
    """Jitter, blur, greyscale and solarise, in this order; new uint8 views on the same device.

    Args:
        views: uint8 (..., C, H, W), C 3 (RGB) or 1 (saturation, hue and greyscale leave it alone).
        table: float32 (..., 11) of `draw_table`, on the CPU: who gets what is decided there, without waiting for the device.
    """
    if not views.numel():
        return views
    flat, rows = views.reshape(-1, *views.shape[-3:]), table.reshape(-1, COLUMNS)
    result = torch.empty_like(flat)
    for start in range(0, len(flat), BATCH):
        chunk, part = flat[start : start + BATCH].to(torch.int16), rows[start : start + BATCH]
        _apply_rows(chunk, part.tolist(), _fixed_point(part).to(views.device), one_by_one=views.device.type == "cpu")
        result[start : start + BATCH] = chunk
    return result.view(views.shape)


def _apply_rows(views: Tensor, settings: list[list[float]], values: Tensor, one_by_one: bool) -> None:
    """All operations on int16 views (N, C, H, W) in place; `values` (5, N, 1, 1) as of `_fixed_point`.

    `one_by_one`: one view after the other, which a CPU keeps in its cache, instead of gathering those of an operation."""
    colour = views.shape[1] == 3
    for place in range(4):
        rows: dict[int, list[int]] = defaultdict(list)
        for row, setting in enumerate(settings):
            rows[int(setting[ORDER + place])].append(row)
        for number, operation in enumerate(_ADJUSTMENTS if colour else _ADJUSTMENTS[:2]):
            if number in rows:
                _on_rows(operation, views, values[min(number, 3)], rows[number], one_by_one)
    last: list[tuple[int, Operation, Tensor]] = [
        (SIGMA, blur_, values[4]),
        (GREY, greyscale_, values[0]),
        (SOLARISED, solarise_, values[0]),
    ]
    for column, operation, value in last:
        chosen = [row for row, setting in enumerate(settings) if setting[column]]
        if chosen:
            _on_rows(operation, views, value, chosen, one_by_one)


def _fixed_point(table: Tensor) -> Tensor:
    """int16 (5, N, 1, 1): round(256 (f - 1)) of brightness, contrast and saturation; the hue's turn in 1/128 of a sixth of the
    circle; sigma in 1/500 px."""
    numbers = table.double().numpy().T
    turns = np.abs(np.trunc(numbers[3] * 255)) * (6 * 128 / 255)  # Pillow turns by whole levels of 255, towards zero
    fixed = np.stack([*(numbers[:3] - 1) * 256, turns, numbers[SIGMA] * SIGMA_STEPS])
    return torch.from_numpy(np.rint(fixed).astype(np.int16))[:, :, None, None]


def _on_rows(operation: Operation, views: Tensor, values: Tensor, rows: list[int], one_by_one: bool) -> None:
    if one_by_one:
        for row in rows:
            operation(views[row : row + 1], values[row : row + 1])
    else:
        index = torch.tensor(rows, device=views.device)
        chosen = views[index]
        operation(chosen, values[index])
        views[index] = chosen


# The operations, in place: views int16 (N, C, H, W) in 0..255, values int16 (N, 1, 1) as of `_fixed_point`.


def luminance(views: Tensor) -> Tensor:
    """(N, H, W): 0.299 R + 0.587 G + 0.114 B with weights in 1/128, within one grey level; the image itself if greyscale."""
    if views.shape[1] == 1:
        return views[:, 0]
    red, green, blue = views.unbind(dim=1)
    return torch.add(_HALF, red, alpha=38).add_(green, alpha=75).add_(blue, alpha=15).bitwise_right_shift_(_SEVEN)


def _blend_(views: Tensor, change: Tensor) -> None:
    """views += floor(change / 256), where change = amount * (views - other): towards `other` or away from it."""
    views.add_(change.bitwise_right_shift_(_EIGHT)).clamp_(0, 255)


def brightness_(views: Tensor, amount: Tensor) -> None:
    """Away from black."""
    _blend_(views, views * amount.unsqueeze(1))


def contrast_(views: Tensor, amount: Tensor) -> None:
    """Away from the mean grey, rounded to a whole level as in Pillow."""
    mean = views.sum((2, 3), dtype=torch.float32) / views[0, 0].numel()  # (N, C)
    grey = (mean @ _WEIGHTS.to(mean.device) if views.shape[1] == 3 else mean[:, 0]).round_().to(torch.int16)
    _blend_(views, (views - grey.view(-1, 1, 1, 1)).mul_(amount.unsqueeze(1)))


def saturation_(views: Tensor, amount: Tensor) -> None:
    """Away from the greyscale image."""
    _blend_(views, (views - luminance(views).unsqueeze(1)).mul_(amount.unsqueeze(1)))


def hue_(views: Tensor, amount: Tensor, back: bool = False) -> None:
    """Turn the hue forward, red to green, by `amount` / 128 of a sixth of the circle, at most one; `back`: the other way.

    In HSV a channel c rises from the minimum to the maximum, stays for two sixths, and falls again. On either slope it lies
    c - next above the start of that slope, where next is the one after it in R, G, B, R; a turn by t moves it by t * chroma up a
    rising slope (previous >= next), or (1 - t) * chroma on a falling one; the clamp does the corners.
    """
    red, green, blue = views.unbind(dim=1)[::-1] if back else views.unbind(dim=1)
    low = torch.minimum(red, green)
    high = torch.maximum(red, green)
    torch.minimum(low, blue, out=low)
    torch.maximum(high, blue, out=high)
    falling = high - low  # chroma
    rising = (falling * amount).bitwise_right_shift_(_SEVEN)
    falling.sub_(rising).sub_(rising)  # (1 - 2 t) chroma: what a falling slope has beyond a rising one
    rising.add_(low)
    ahead = torch.stack([green - red, blue - green, red - blue], dim=1)  # next - c
    falls = ahead.bitwise_right_shift(_FIFTEEN).bitwise_and_(falling.unsqueeze(1))  # next - c < 0 for c: c's predecessor falls
    slope, correction = ahead.unbind(dim=1), falls.unbind(dim=1)
    for place, channel in enumerate((red, green, blue)):
        torch.sub(rising, slope[place], out=channel).add_(correction[(place + 1) % 3])
    torch.clamp(views, low.unsqueeze(1), high.unsqueeze(1), out=views)


_ADJUSTMENTS: tuple[Operation, ...] = (brightness_, contrast_, saturation_, hue_, functools.partial(hue_, back=True))


def blur_(views: Tensor, sigma: Tensor) -> None:
    """Pillow's Gaussian blur, three boxes of fractional radius, as one kernel of 13 taps per direction, edges repeated."""
    padded = F.pad(views.to(torch.float32), [RADIUS] * 4, mode="replicate")
    taps = blur_taps().to(views.device)[sigma.flatten().long()]
    band = (
        F.pad(taps, (BLOCK - 1, BLOCK - 1)).unfold(-1, BLOCK + 2 * RADIUS, 1).flip(1).unsqueeze(1)
    )  # row i: taps from place i on
    views.copy_(_smooth(_smooth(padded, band).mT, band).mT.add_(0.5))


def _smooth(padded: Tensor, band: Tensor) -> Tensor:
    """(N, C, length + 12, M) -> (N, C, length, M): products with band (N, 1, BLOCK, BLOCK + 12), which move along the length."""
    length = padded.shape[2] - 2 * RADIUS
    blocks = []
    for start in range(0, length, BLOCK):
        rows = min(BLOCK, length - start)
        near = padded[:, :, start : start + rows + 2 * RADIUS]
        blocks.append(band[:, :, :rows, : rows + 2 * RADIUS] @ near)
    return torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0]


@functools.cache
def blur_taps() -> Tensor:
    """float32 (1001, 13), each of sum 1: for every sigma up to 2 in steps of 1/500 px, the box of fractional radius of Pillow's
    `GaussianBlur` (Gwosdek et al. 2011), convolved with itself twice."""
    kernels = []
    for sigma in np.arange(MAX_SIGMA * SIGMA_STEPS + 1) / SIGMA_STEPS:
        variance = sigma**2 / 3  # of one box
        whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)  # 0 or 1; its radius is whole + edge
        edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
        distance = np.abs(np.arange(-2, 3))
        box = np.where(distance <= whole, 1.0, np.where(distance == whole + 1, edge, 0.0)) / (2 * (whole + edge) + 1)
        kernels.append(np.convolve(np.convolve(box, box), box))
    return torch.from_numpy(np.stack(kernels).astype(np.float32))


def greyscale_(views: Tensor, _: Tensor) -> None:
    """Luminance on every channel."""
    views.copy_(luminance(views).unsqueeze(1).expand_as(views))


def solarise_(views: Tensor, _: Tensor) -> None:
    """Invert every value from 128 on: whichever of value and inverse is the smaller."""
    torch.minimum(views, 255 - views, out=views)


__all__ = ["apply_colour", "draw_table"]
