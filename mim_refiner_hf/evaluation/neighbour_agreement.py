"""Agreement of neighbours under augmentation: how good features are, without labels.

view = global_view(processor, size=224)
seen = extract_features(encoder, images, view)
neighbour_agreement(features, seen.features).mean()       # 0 to 1; by chance k / (N - 1)
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from ..clustering.channels import ChannelImage
from ..data.loading import ImageProcessor
from ..data.views import ViewSpec, channel_views, make_view, view_specs
from ..model.image_processing_mim_refiner import to_eight_bits
from ..runtime.seeding import random_generator
from .knn import standardise
from .search import nearest

if TYPE_CHECKING:
    from ..clustering.channels import Picture

# of each image, in the agreement and in k-NN by the paper's protocol
NUM_NEIGHBOURS = 10
# of the view behind the agreement: the paper's global views (Table 10)
AGREEMENT_SCALE = (0.25, 1.0)


def neighbour_agreement(first: Tensor, second: Tensor, k: int = NUM_NEIGHBOURS) -> Tensor:
    """How many of an image's k nearest other images stay the same in another view of all images.

    Row i of `first` and `second` (N, D) is image i in one view and in the other. Neighbours are
    searched among the same view of all images, by cosine of standardised features. The mutual
    k-NN alignment of Huh et al. 2024 (arXiv 2405.07987, App. A), with two views for two models.

    The other view is the paper's first global one (`global_view`): crop, flip, colour, blur. What
    an image shows survives that, its colours and their places do not. So neighbours that agree are
    neighbours for what they show, which is what labels would tell; views that only crop and flip
    leave the colours to go by.

    Returns:
        The share per image (N,), 0 to 1; by chance k / (N - 1).

    Raises:
        ValueError: for shapes that differ, or fewer than k + 1 images.
    """
    if first.dim() != 2 or first.shape != second.shape:
        raise ValueError(
            f"both views need features (N, D) of one shape, not {(*first.shape,)} and "
            f"{(*second.shape,)}"
        )
    if not 1 <= k < len(first):
        raise ValueError(f"k={k} must lie between 1 and {len(first) - 1}, one less than the images")

    one, other = (nearest_others(view, k) for view in (first, second))  # (N, k)
    shared = (one.unsqueeze(2) == other.unsqueeze(1)).any(dim=2)
    return shared.float().mean(dim=1)


def nearest_others(features: Tensor, k: int) -> Tensor:
    """The k nearest other rows of each row, (N, D) -> (N, k), by standardised cosine."""
    points, _ = standardise(features, features[:0])
    _, places = nearest(points, points, k, exclude_self=True)
    return places


@dataclass
class RandomView:
    """An image processor that shows the encoder a random view of each image, as refinement does.

    The view is a pure function of seed and pixels: workers and processes change nothing.
    """

    processor: ImageProcessor
    spec: ViewSpec
    seed: int

    def __call__(self, images: "Sequence[Picture]", *, return_tensors: str) -> Mapping[str, Tensor]:
        views = [self._view(image) for image in images]
        return self.processor(views, return_tensors=return_tensors)

    def _view(self, image: "Picture") -> Image.Image | np.ndarray:
        rng = self._generator(image)
        if not isinstance(image, ChannelImage):
            return make_view(image, self.spec, rng)
        pixels = to_eight_bits(image.pixels, getattr(self.processor, "value_range", None))
        (view,) = channel_views(ChannelImage(pixels), [self.spec], rng)
        return view.transpose(1, 2, 0)

    def to_json_string(self) -> str:
        """All that the pixels depend on, for the manifest of a feature store."""
        settings = json.loads(self.processor.to_json_string())
        return json.dumps(settings | {"view": asdict(self.spec), "seed": self.seed})

    def _generator(self, image: "Picture") -> np.random.Generator:
        return random_generator(self.seed, "block analysis", zlib.crc32(image.tobytes()))


def global_view(
    processor: ImageProcessor, size: int, flip: float = 0.5, seed: int = 0, colour: bool = True
) -> RandomView:
    """The view behind `neighbour_agreement`: the paper's first global one.

    Without `colour` it is cropped and flipped only.
    """
    (spec,) = view_specs(1, 0, size, size, AGREEMENT_SCALE, AGREEMENT_SCALE, colour, flip)
    return RandomView(processor, spec, seed)
