"""How many images a core makes into views: python -m benchmarks.views ../shared/data/imagenet-sample/train.parquet

The 12 views of the paper (2 of 224 px, 10 of 96 px) of JPEGs, one process, one thread, processor time, medians of interleaved
rounds. The peer is the PIL way with torchvision's operations, in the order and with the numbers of the authors' kappadata, up to
normalised float tensors. `hand-over` decodes, crops and flips to uint8 and leaves colour to a GPU; `all on the CPU` does the rest
too, and normalises. Prints target, measured, peer and ratio; `--images` and `--rounds` make it shorter or surer. Where other work
shares the cores, only the ratios mean something, and those of `all on the CPU`, many small operations, suffer most.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from threadpoolctl import threadpool_limits
from torch import Tensor
from torchvision import transforms as tt
from torchvision.transforms import functional as tv

from mim_refiner_hf.data import decode_image, open_images
from mim_refiner_hf.refinement.fast_views import FastMultiCrop
from mim_refiner_hf.refinement.views import MultiCrop, normalise, view_rng, view_specs

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPECS = view_specs(2, 10, 224, 96, (0.25, 1.0), (0.05, 0.25), colour=True)
TARGETS = {"hand-over": 270 / 46, "all on the CPU": 180 / 46, "exact": 1.0}


class Row(NamedTuple):
    """One comparison: seconds per image of ours and of the peer, the ratio promised, and the seconds of decoding alone."""

    name: str
    target: float
    measured: float
    peer: float
    floor: float
    note: str

    @property
    def ratio(self) -> float:
        """How many times faster than the peer."""
        return self.peer / self.measured


def pil_way() -> Callable[[Image.Image], list[Tensor]]:
    """The views by torchvision on Pillow images, as users of kappadata get them (byol-aug of the authors' configuration)."""

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0))))

    def pipeline(size: int, scale: tuple[float, float], blur_p: float, solarise_p: float) -> tt.Compose:
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


def finished(multicrop: MultiCrop | FastMultiCrop) -> Callable[[Image.Image], list[Tensor]]:
    """Our views of an image, normalised."""
    generators = (view_rng(0, 0, index) for index in range(2**31))
    return lambda image: [normalise(views, MEAN, STD) for views in multicrop(image, next(generators)).values()]


def rows(dataset: str, images: int = 40, rounds: int = 5) -> list[Row]:
    """One row per way; the views are compared first: the exact ones by hand with torchvision's operations, fast with exact."""
    table = open_images(dataset)
    encoded = [table.found.sources[int(place)] for place in table.indices[:: max(1, len(table) // images)][:images]]
    photo = decode_image(encoded[0])
    _check(photo)
    hand_over = FastMultiCrop(SPECS, hand_over=True)
    ways: dict[str, Callable[[Image.Image], object]] = {
        "decode": lambda image: image,
        "peer": pil_way(),
        "exact": finished(MultiCrop(SPECS)),
        "all on the CPU": finished(FastMultiCrop(SPECS, hand_over=False)),
        "hand-over": lambda image: hand_over(image, view_rng(0, 0, 0)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        for turn in range(rounds + 1):  # the first is not counted
            for name, way in ways.items():
                start = time.process_time()
                for source in encoded:
                    way(decode_image(source))
                if turn:
                    seconds[name].append((time.process_time() - start) / len(encoded))
    torch.set_num_threads(threads)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    note = f"12 views of a JPEG, {len(encoded)} images; the peer is torchvision on Pillow"
    return [Row(name, TARGETS[name], median[name], median["peer"], median["decode"], note) for name in TARGETS]


def _check(photo: Image.Image) -> None:
    """The same pictures before any time is taken: mean differences in grey levels of fast and exact views, of 255."""
    exact, fast = (make(photo, view_rng(0, 0, 1)) for make in (MultiCrop(SPECS), FastMultiCrop(SPECS, hand_over=False)))
    for kind, views in exact.items():
        assert (fast[kind].float() - views.float()).abs().mean() < 1.0, kind
    crop = FastMultiCrop([SPECS[0]], hand_over=True)(photo, view_rng(0, 0, 1))["global_views"][0]
    assert crop.shape == (3, 224, 224) and np.array(tv.to_pil_image(crop)).std() > 0


def main(dataset: str, images: int, rounds: int) -> None:
    """Print the rows."""
    print(f"{'row':<16}{'target':>9}{'measured':>12}{'peer':>12}{'ratio':>8}{'decoding':>12}  met")
    for row in rows(dataset, images, rounds):
        rates = [f"{1 / value:.0f} im/s" for value in (row.measured, row.peer, row.floor)]
        met = "yes" if row.ratio >= row.target else "no"
        print(f"{row.name:<16}{row.target:>8.2f}x{rates[0]:>12}{rates[1]:>12}{row.ratio:>7.2f}x{rates[2]:>12}  {met}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="parquet file or folder of JPEGs, such as ../shared/data/imagenet-sample/train.parquet")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    main(arguments.dataset, arguments.images, arguments.rounds)
