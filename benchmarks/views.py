"""How many images a core makes into views: python -m benchmarks views-cpu views-hand-over loader

The 12 views of the paper (2 of 224 px, 10 of 96 px) of JPEGs, decoding included. The peer is the
PIL way with torchvision's operations, in the order and with the numbers of the authors' kappadata,
up to normalised float tensors. `views-hand-over` decodes, crops and flips to uint8 and leaves
colour to a GPU; `views-cpu` does the rest too, and normalises. The floor is decoding alone. The
photographs are those of `MIM_REFINER_SHARED` (or ../shared); without them the rows are left out.
`loader` is the loader of a training with one worker, beside the step that takes its views.
Where other work shares the cores, `views-cpu`, many small operations, suffers most.
"""

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms as tt

from mim_refiner_hf.data.batches import batches_of_views
from mim_refiner_hf.data.fast_views import FastMultiCrop
from mim_refiner_hf.data.images import ImageDataset, decode_image, open_images
from mim_refiner_hf.data.views import MultiCrop, normalise, view_rng, view_specs

from .rows import LeftOut, Row, interleaved
from .step import HEADS, TOPK, make_refiner

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SPECS = view_specs(2, 10, 224, 96, (0.25, 1.0), (0.05, 0.25), colour=True)
IMAGES = 16
PHOTOS = (
    Path(os.environ.get("MIM_REFINER_SHARED", "../shared")) / "data/imagenet-sample/train.parquet"
)


def pil_way() -> Callable[[Image.Image], list[Tensor]]:
    """The views by torchvision on Pillow images.

    As users of kappadata get them (byol-aug of the authors' configuration).
    """

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0))))

    def pipeline(
        size: int, scale: tuple[float, float], blur_p: float, solarise_p: float
    ) -> tt.Compose:
        return tt.Compose(
            [
                tt.RandomResizedCrop(size, scale, interpolation=tt.InterpolationMode.BICUBIC),
                tt.RandomHorizontalFlip(),
                tt.RandomApply([tt.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                tt.RandomApply([tt.Lambda(blur)], blur_p),
                tt.RandomGrayscale(0.2),
                tt.RandomSolarize(128, solarise_p),
                tt.ToTensor(),
                tt.Normalize(MEAN, STD),
            ]
        )

    pipelines = [pipeline(spec.size, spec.scale, spec.blur_p, spec.solarize_p) for spec in SPECS]
    return lambda image: [make(image) for make in pipelines]


def our_way(hand_over: bool) -> Callable[[Image.Image], list[Tensor]]:
    """Our views of an image: normalised, or, with `hand_over`, as a worker leaves them."""
    multicrop = FastMultiCrop(SPECS, hand_over)
    counter = itertools.count()

    def make(image: Image.Image) -> list[Tensor]:
        views = list(multicrop(image, view_rng(0, 0, next(counter))).values())
        return views if hand_over else [normalise(view, MEAN, STD) for view in views]

    return make


def check(photo: Image.Image) -> None:
    """The same pictures before any time is taken.

    The mean differences of fast and exact views, in grey levels, of 255, are small.
    """
    exact = MultiCrop(SPECS)(photo, view_rng(0, 0, 1))
    fast = FastMultiCrop(SPECS, hand_over=False)(photo, view_rng(0, 0, 1))
    for kind, views in exact.items():
        apart = (fast[kind].float() - views.float()).abs().mean()
        assert apart < 1.0, f"fast {kind} are not the exact ones"


def photographs() -> ImageDataset:
    """500 JPEGs of some 400 px; LeftOut where they are not."""
    if not PHOTOS.is_file():
        raise LeftOut(f"there is no {PHOTOS}; MIM_REFINER_SHARED names the folder that holds data/")
    return open_images(str(PHOTOS))


def views(name: str, hand_over: bool, target: float) -> Row:
    """Seconds per image of our way and the PIL way; LeftOut without photographs."""
    table = photographs()
    places = table.indices[:: len(table) // IMAGES][:IMAGES]
    encoded = [table.found.sources[int(place)] for place in places]
    check(decode_image(encoded[0]))

    def over_all(make: Callable[[Image.Image], object]) -> Callable[[], None]:
        def run() -> None:
            for source in encoded:
                make(decode_image(source))

        return run

    measured, peer, floor = interleaved(
        *map(over_all, (our_way(hand_over), pil_way(), lambda image: image)), rounds=5
    )
    what = "decoded and cropped" if hand_over else "normalised"
    note = (
        f"{len(SPECS)} views of {IMAGES} JPEGs, {what}, {IMAGES / measured:.0f} images/s;"
        " torchvision on Pillow; floor: decoding"
    )
    return Row(name, target, measured, peer, floor, note)


def loader() -> Row:
    """Processor seconds of a batch: of the loader, its one worker and this process, and of a step.

    LeftOut without photographs.
    """
    count = 12
    batches = batches_of_views(
        photographs(),
        FastMultiCrop(SPECS, hand_over=False),
        batch_size=IMAGES,
        seed=0,
        start_step=0,
        stop_step=count + 4,
        num_workers=1,
    )
    here = psutil.Process()
    stream = iter(batches)
    # the worker has begun, and is ahead by as much as it ever is
    for _ in range(2):
        next(stream)
    time.sleep(1)
    processes = [here, *here.children()]

    def spent() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    before = spent()
    for _ in range(count):
        next(stream)
    # and once more
    time.sleep(1)
    measured = (spent() - before) / count
    for _ in stream:
        continue

    refiner = make_refiner(local=10, image_size=224, patch_size=16)
    made = [torch.randn(IMAGES, 2, 3, 224, 224), torch.randn(IMAGES, 10, 3, 96, 96)]
    index = torch.arange(IMAGES)
    draw = torch.randint(TOPK, (HEADS, 2, IMAGES))
    (step,) = interleaved(
        lambda: refiner.backward(made, index, index, topk=TOPK, draw=draw), rounds=3
    )
    note = (
        f"12 views of {IMAGES} JPEGs, normalised, by one worker: {IMAGES / measured:.0f} images/s"
        f" of a core; the step of 6 blocks of width 192 on them, {IMAGES / step:.1f} images/s"
    )
    return Row("loader", 1.0, measured, step, None, note)


ROWS: dict[str, Callable[[], Row]] = {
    "views-hand-over": lambda: views("views-hand-over", True, 270 / 46),
    "views-cpu": lambda: views("views-cpu", False, 180 / 46),
    "loader": loader,
}
"""The rows of this file by name."""
