"""The colour operations of the views on arrays, each view with its own parameters.

    table = draw_table(draws)               # (N, 11) from `views.draw_view`, on the CPU
    views = apply_colour(views, table)      # uint8 (N, C, H, W) -> uint8, on the device of `views`

The same parameters as in `views.py` and the same 8-bit steps, in int16, which takes half the memory
traffic of float32; that is what all of this costs. A factor f is kept as round(256 (f - 1)), so
every blend is within one grey level of Pillow's. Hue is turned without going through HSV: within
two levels of torchvision's on floats, and up to 11 from Pillow's, whose 8-bit HSV is the coarser.

Each operation is written once. A device gets tensors (N, C, H, W), all views of a batch that want
it. A CPU gets one view (C, H, W) after the other, which stays in its cache, as NumPy arrays, whose
small operations start in a quarter of the time; where OpenCV is there, it blurs them (extra
`views`), in a third of the time and with the same levels but for the rounding of a tie.
"""

import functools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .views import ViewDraw

logger = logging.getLogger(__name__)

# columns of a table: 4 factors, 4 places of the order, sigma, grey, solarised
NUM_COLUMNS = 11
ORDER, SIGMA, GREY, SOLARISED = 4, 8, 9, 10
# places in the order of a view's operations after the 4 of the jitter
GREY_PLACE, BLUR_PLACE, SOLARISE_PLACE = 4, 5, 6
NUM_PLACES = 7
# views at a time on a device; bounds the memory
VIEWS_AT_ONCE = 512
# weights of red, green and blue, in 1/128
LUMINANCE = (38, 75, 15)
# of the blur, in pixels: three boxes of radius 2, which is Pillow's blur up to a sigma of 2
RADIUS = 6
MAX_SIGMA = 2.0
# per pixel
SIGMA_STEPS = 500
# pixels of a side that one product with a band matrix filters: on a device, and of one view on a
# CPU, where fewer zeros are multiplied in 0.7 of the time
BAND = 96
VIEW_BAND = 48

Array = Any
"""int16, in 0..255: a tensor (N, C, H, W), or a NumPy array (C, H, W)."""
Amount = Any
"""A whole number of a view: int16 (N, 1, 1, 1) beside a tensor, an int beside an array."""
Operation = Callable[[Array, Amount], None]
Order = dict[int, tuple[Operation, int]]
"""What is done to a view: operations with their amounts, by place, 0 to 6."""


def draw_table(draws: Sequence[ViewDraw]) -> Tensor:
    """Draws as numbers, float32 (N, 11).

    The places of the order hold -1 without jitter; turning the hue back is operation 4.
    """
    rows = []
    for draw in draws:
        factors = [1.0, 1.0, 1.0, 0.0]
        order = [-1.0] * 4
        for place, (operation, factor) in enumerate(draw.jitter):
            turns_back = operation == 3 and factor < 0
            factors[operation] = factor
            order[place] = 4 if turns_back else operation
        rows.append([*factors, *order, draw.sigma, draw.grey, draw.solarised])
    return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(len(rows), NUM_COLUMNS))


@torch.inference_mode()
def apply_colour(views: Tensor, table: Tensor) -> Tensor:
    """Jitter, blur, greyscale and solarise, in this order; new uint8 views on the same device.

    Args:
        views: uint8 (..., C, H, W), C 3 (RGB), or others (saturation, hue and greyscale leave
            them alone, and but for 1 solarise).
        table: float32 (..., 11) of `draw_table`, on the CPU: who gets what is decided there,
            without waiting for the device.
    """
    if not views.numel():
        return views
    flat = views.reshape(-1, *views.shape[-3:])
    orders = operations(table, views.shape[-3])
    result = torch.empty_like(flat)

    if views.device.type == "cpu":
        for view, order, done in zip(flat.numpy(), orders, result.numpy(), strict=True):
            done[...] = colour_view_(view.astype(np.int16, order="C"), order)
        return result.view(views.shape)

    for start in range(0, len(flat), VIEWS_AT_ONCE):
        chunk = flat[start : start + VIEWS_AT_ONCE].to(torch.int16)
        colour_batch_(chunk, orders[start : start + VIEWS_AT_ONCE])
        result[start : start + VIEWS_AT_ONCE] = chunk
    return result.view(views.shape)


def operations(table: Tensor, channels: int) -> list[Order]:
    """What is done to each view of a table (..., 11)."""
    usable = len(_ADJUSTMENTS) if channels == 3 else 2
    orders = []
    for row in table.reshape(-1, NUM_COLUMNS).tolist():
        # Pillow turns by whole levels of 255, towards zero; six sixths of a circle, in 1/128
        levels = abs(math.trunc(row[3] * 255))
        turn = round(levels * 6 * 128 / 255)
        amounts = [*(round(256 * (factor - 1)) for factor in row[:3]), turn]
        order: Order = {}
        for place, number in enumerate(map(int, row[ORDER : ORDER + 4])):
            if 0 <= number < usable:
                order[place] = _ADJUSTMENTS[number], amounts[min(number, 3)]

        # grey before the blur, which then has one channel to do: they may change places
        grey = row[GREY] and channels == 3
        sigma = round(row[SIGMA] * SIGMA_STEPS)
        if grey:
            order[GREY_PLACE] = greyscale_, 0
        if sigma:
            order[BLUR_PLACE] = blur_grey_ if grey else blur_, sigma
        if row[SOLARISED] and channels in (1, 3):
            order[SOLARISE_PLACE] = solarise_, 0
        orders.append(order)
    return orders


def colour_view_(view: NDArray[np.int16], order: Order) -> NDArray[np.int16]:
    """The operations of one view (C, H, W), in place."""
    for operation, amount in order.values():
        operation(view, amount)
    return view


def colour_batch_(views: Tensor, orders: Sequence[Order]) -> None:
    """The operations of all views (N, C, H, W), in place.

    Place by place, for all views at once that have the same operation there.
    """
    for place in range(NUM_PLACES):
        chosen: dict[Operation, list[tuple[int, int]]] = defaultdict(list)
        for row, order in enumerate(orders):
            if place in order:
                operation, amount = order[place]
                chosen[operation].append((row, amount))

        for operation, pairs in chosen.items():
            index, amounts = torch.tensor(pairs, device=views.device).unbind(dim=1)
            part = views[index]
            operation(part, amounts.to(torch.int16).view(-1, 1, 1, 1))
            views[index] = part


# --- the operations, in place


def _planes(views: Array) -> tuple[Array, Array, Array]:
    """Red, green and blue, (..., 1, H, W) each."""
    return views[..., 0:1, :, :], views[..., 1:2, :, :], views[..., 2:3, :, :]


def luminance(views: Array) -> Array:
    """0.299 R + 0.587 G + 0.114 B, (..., 1, H, W), within one grey level.

    The weights are in 1/128. Of a greyscale image, and of channels that are no colours, themselves.
    """
    if views.shape[-3] != 3:
        return views
    red, green, blue = _planes(views)
    grey = red * LUMINANCE[0]
    grey += green * LUMINANCE[1]
    grey += blue * LUMINANCE[2]
    grey += 64
    grey >>= 7
    return grey


def _blend_(views: Array, change: Array, amount: Amount) -> None:
    """views += floor(change / 256), with change = amount * (views - other): away from `other`."""
    change >>= 8
    views += change
    if isinstance(views, Tensor):
        views.clamp_(0, 255)
    # towards `other` it stays within bounds
    elif amount > 0:
        np.maximum(views, _plane(views.shape[1:], 0), out=views)
        np.minimum(views, _plane(views.shape[1:], 255), out=views)


@functools.cache
def _plane(size: tuple[int, int], value: int) -> NDArray[np.int16]:
    """(H, W) of one value: NumPy's minimum with an array is four times as fast as with a number."""
    return np.full(size, value, dtype=np.int16)


def brightness_(views: Array, amount: Amount) -> None:
    """Away from black."""
    _blend_(views, views * amount, amount)


def contrast_(views: Array, amount: Amount) -> None:
    """Away from the mean grey, rounded to a whole level as in Pillow.

    Of channels that are no colours, each away from its own mean.
    """
    mean: Amount
    if isinstance(views, Tensor):
        mean = luminance(views).mean((-2, -1), keepdim=True, dtype=torch.float32)
        mean = mean.round_().to(torch.int16)
    else:
        # the mean of the weighted sums is the weighted sum of the means
        means = np.add.reduce(views.reshape(len(views), -1), axis=1, dtype=np.int32) / views[0].size
        if len(views) in (1, 3):
            mean = int((means @ LUMINANCE / 128 if len(views) == 3 else means[0]) + 0.5)
        else:
            mean = (means + 0.5).astype(np.int16)[:, None, None]
    change = views - mean
    change *= amount
    _blend_(views, change, amount)


def saturation_(views: Array, amount: Amount) -> None:
    """Away from the greyscale image."""
    change = views - luminance(views)
    change *= amount
    _blend_(views, change, amount)


def hue_(views: Array, amount: Amount, back: bool = False) -> None:
    """Turn the hue forward, red to green, by `amount` / 128 of a sixth of the circle, at most one.

    In HSV a channel c rises from the minimum to the maximum, stays for two sixths, and falls again.
    On either slope it lies c - next above the start of that slope, where next is the one after it
    in R, G, B, R. A turn by t moves it by t * chroma up a rising slope (previous >= next), or (1 -
    t) * chroma on a falling one; the clamp does the corners.

    Args:
        back: turn the other way.
    """
    xp: Any = torch if isinstance(views, Tensor) else np
    red, green, blue = _planes(views)[::-1] if back else _planes(views)
    low = xp.minimum(red, green)
    high = xp.maximum(red, green)
    xp.minimum(low, blue, out=low)
    xp.maximum(high, blue, out=high)

    # what a falling slope has beyond a rising one: (1 - 2 t) chroma
    falling = high - low
    rising = falling * amount
    rising >>= 7
    falling -= rising
    falling -= rising
    rising += low

    # next - c
    ahead = (green - red, blue - green, red - blue)
    for place, channel in enumerate((red, green, blue)):
        # all ones where c's predecessor lies above next: c falls
        falls = ahead[(place + 1) % 3] >> 15
        falls &= falling
        xp.subtract(rising, ahead[place], out=channel)
        channel += falls
        xp.maximum(channel, low, out=channel)
        xp.minimum(channel, high, out=channel)


_hue_back_ = functools.partial(hue_, back=True)
_ADJUSTMENTS: tuple[Operation, ...] = (brightness_, contrast_, saturation_, hue_, _hue_back_)


def blur_(views: Array, sigma: Amount) -> None:
    """Pillow's Gaussian blur as one kernel of 13 taps per direction, edges repeated.

    Args:
        sigma: in 1/500 px.
    """
    if not isinstance(views, Tensor):
        _blur_view_(views, int(sigma))
        return
    padded = F.pad(views.to(torch.float32), [RADIUS] * 4, mode="replicate")
    taps = blur_taps().to(views.device)[sigma.flatten().long()]
    # row i: taps from i on
    band = F.pad(taps, (BAND - 1, BAND - 1)).unfold(-1, BAND + 2 * RADIUS, 1).flip(1).unsqueeze(1)
    views.copy_(_smooth(_smooth(padded, band).mT, band).mT.add_(0.5))


@functools.cache
def opencv() -> Any:
    """OpenCV's module, or None where it is missing or cannot be loaded, which is said."""
    if find_spec("cv2") is None:
        return None
    try:
        import cv2
    except ImportError as error:
        logger.warning("OpenCV cannot be loaded, so views are blurred without it: %s", error)
        return None
    return cv2


def _blur_view_(view: NDArray[np.int16], sigma: int) -> None:
    """`blur_` of one view (C, H, W): repeated edges are folded into the matrices, not padded."""
    cv2 = opencv()
    if cv2 is not None:
        taps = blur_taps()[sigma].numpy()
        for plane in view:
            cv2.sepFilter2D(plane, cv2.CV_16S, taps, taps, plane, borderType=cv2.BORDER_REPLICATE)
        return

    channels, height, width = view.shape
    bands = {length: _bands(sigma, length) for length in {height, width}}
    pixels = torch.from_numpy(view.transpose(1, 0, 2).astype(np.float32, order="C"))

    rows = pixels.view(height, -1)  # (H, C W)
    down = torch.empty_like(rows)
    for part, near, band in bands[height]:
        torch.mm(band, rows[near], out=down[part])

    # the input is not needed any more
    across = rows.view(-1, width)  # (H C, W)
    down = down.view(-1, width)
    for part, near, band in bands[width]:
        torch.mm(down[:, near], band.T, out=across[:, part])
    view[...] = across.add_(0.5).view(height, channels, width).numpy().transpose(1, 0, 2)


def _bands(sigma: int, length: int) -> list[tuple[slice, slice, Tensor]]:
    """Blocks of a length: their places, the places that their blur reads, and its matrix.

    The matrix has one row per place. What would lie outside is added to the edge.
    """
    size = min(VIEW_BAND, length)
    wide = np.zeros((size, size + 2 * RADIUS + 1), dtype=np.float32)
    wide[:, : 2 * RADIUS + 1] = blur_taps()[sigma].numpy()
    # read with rows one shorter, each begins one place further
    wide = wide.reshape(-1)[: size * (size + 2 * RADIUS)].reshape(size, -1)

    blocks = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = max(0, start - RADIUS)
        last = min(length, stop + RADIUS)
        whole = wide[: stop - start, : stop - start + 2 * RADIUS]

        before = first - start + RADIUS
        after = whole.shape[1] - (stop + RADIUS - last)
        band = whole[:, before:after].copy()
        band[:, 0] += whole[:, :before].sum(1)
        band[:, -1] += whole[:, after:].sum(1)
        blocks.append((slice(start, stop), slice(first, last), torch.from_numpy(band)))
    return blocks


def _smooth(padded: Tensor, band: Tensor) -> Tensor:
    """(N, C, length + 12, M) -> (N, C, length, M), by products that move along the length.

    Args:
        band: (N, 1, BAND, BAND + 12).
    """
    length = padded.shape[2] - 2 * RADIUS
    blocks = []
    for start in range(0, length, BAND):
        rows = min(BAND, length - start)
        near = padded[:, :, start : start + rows + 2 * RADIUS]
        blocks.append(band[:, :, :rows, : rows + 2 * RADIUS] @ near)
    return torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0]


@functools.cache
def blur_taps() -> Tensor:
    """The kernel of every sigma up to 2 in steps of 1/500 px, float32 (1001, 13), each of sum 1.

    Pillow's `GaussianBlur` is a box of fractional radius, applied three times (Gwosdek et al.
    2011); here it is convolved with itself twice.
    """
    distance = np.abs(np.arange(-2, 3))
    kernels = []
    for sigma in np.arange(MAX_SIGMA * SIGMA_STEPS + 1) / SIGMA_STEPS:
        # the radius of one box is whole + edge, where whole is 0 or 1
        variance = sigma**2 / 3
        whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
        numerator = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
        edge = numerator / (6 * (variance - (whole + 1) ** 2))

        box = np.where(distance == whole + 1, edge, 0.0)
        box[distance <= whole] = 1.0
        box /= 2 * (whole + edge) + 1
        kernels.append(np.convolve(np.convolve(box, box), box))
    return torch.from_numpy(np.stack(kernels).astype(np.float32))


def blur_grey_(views: Array, sigma: Amount) -> None:
    """`blur_` of views whose channels are all the same."""
    grey, others = views[..., :1, :, :], views[..., 1:, :, :]
    blur_(grey, sigma)
    others[...] = grey


def greyscale_(views: Array, _: Amount) -> None:
    """Luminance on every channel."""
    views[...] = luminance(views)


def solarise_(views: Array, _: Amount) -> None:
    """Invert every value from 128 on: whichever of value and inverse is the smaller."""
    xp: Any = torch if isinstance(views, Tensor) else np
    xp.minimum(views, 255 - views, out=views)
