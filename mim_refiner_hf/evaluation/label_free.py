"""How good features are, told without labels: is a photo known again from a distorted copy of it?

    views = two_views(encoder, images, encoder.image_processor, seed=0)
    found = label_free_scores(views, seed=0)
    found.scores["separation"], found.scores["retrieval"], found.rankme
    change_between(old.scores["separation"], new.scores["separation"])       # paired by photo

Every photo is encoded as it is and as a distorted copy (crop, flip, colour, blur: `global_view`).
The copy is a pure function of seed and pixels, so two encoders see the same copies. All scores but
the last compare rows that are standardised by the photos as they are.

| score               | is                                                                       |
|---------------------|--------------------------------------------------------------------------|
| `separation`        | d' of signal detection: how far, in standard deviations of the cosines   |
|                     | between different photos, the cosine of a photo and its own copy lies    |
|                     | above them; 0 for features that tell nothing                             |
| `retrieval`         | the copies are looked up among the photos: the mean of 1 / the place at  |
|                     | which the right one comes (mean reciprocal rank, MRR), 1 for always first|
| `cluster_stability` | adjusted Rand index of the groups of the photos and of the copies        |
| `rankme`            | effective rank; it falls in good refinements as well, so it is no goal,  |
|                     | but far below that of the start it tells a collapse                      |
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..clustering.cluster_count import adjusted_rand
from ..data.images import ImageDataset
from ..data.loading import ImageProcessor, Loading
from ..model.modeling_mim_refiner import MimRefinerModel
from .cluster_scores import KMeansRun, kmeans_runs, rankme
from .evidence import measure, measure_mean, resamples
from .features import encode_images, own_columns
from .knn import standardise
from .neighbour_agreement import global_view
from .report import picture_groups
from .scores import Score, as_metrics

JUDGED_IMAGES = 2000
"""Photos that are looked at, at most: every pair of them is compared."""

_RUNS = 10

# Shapes below: N photos, D the width of a feature, R resamples.


@dataclass(frozen=True, eq=False)
class TwoViews:
    """Features of N photos (N, D), and of a distorted copy of each (N, D), on the CPU."""

    plain: Tensor = field(repr=False)
    copies: Tensor = field(repr=False)

    @property
    def finite(self) -> bool:
        """Whether no feature is NaN or infinite."""
        return bool(self.plain.isfinite().all() and self.copies.isfinite().all())


@dataclass(frozen=True, eq=False)
class LabelFree:
    """What is known of features without labels; see the table above.

    Attributes:
        scores: `separation`, `retrieval`, `cluster_stability`, with errors over photos.
        rankme: the effective rank of the photos' features.
        groups: the k-means run behind the stability, on the photos as they are.
    """

    scores: dict[str, Score]
    rankme: float
    groups: KMeansRun = field(repr=False)

    @property
    def photos(self) -> int:
        """How many photos were looked at."""
        return len(self.groups.assignments)

    @property
    def metrics(self) -> dict[str, float]:
        """Every number and its standard error by name, as metrics.json has them."""
        return {**as_metrics(self.scores), "rankme": self.rankme}


def two_views(
    encoder: MimRefinerModel,
    images: ImageDataset,
    processor: ImageProcessor,
    *,
    flip: float = 0.5,
    colour: bool = True,
    seed: int = 0,
    loading: Loading = Loading(),
) -> TwoViews:
    """Features of readable photos and of their copies; several processes share the work.

    They are the last block's, pooled as the encoder pools: those that every evaluation takes.

    Args:
        flip, colour: whether a mirror image, and other colours, show the same thing.
    """
    column = own_columns(encoder.config)[-1]
    copies = global_view(processor, encoder.config.image_hw[0], flip, seed, colour)
    features = []
    for view, desc in ((processor, "photos"), (copies, "distorted copies")):
        found, _ = encode_images(encoder, images, view, [column], loading=loading, desc=desc)
        features.append(found[column])
    return TwoViews(*features)


def label_free_scores(views: TwoViews, *, seed: int = 0) -> LabelFree:
    """All that can be said of finite features without labels.

    Raises:
        ValueError: for fewer than 2 photos, and features that are not finite.
    """
    similarity = similarities(views)
    first, second = groups_of(views, seed)
    scores = {
        "separation": separation(similarity, seed),
        "retrieval": measure_mean(reciprocal_ranks(similarity), seed=seed),
        "cluster_stability": stability(first, second, seed),
    }
    return LabelFree(scores, rankme(views.plain), first)


def similarities(views: TwoViews) -> NDArray[np.float64]:
    """Cosines (N, N) of every copy, by row, with every photo, standardised by the photos."""
    plain, copies = standardise(views.plain, views.copies)
    cosines = F.normalize(copies.double(), dim=1) @ F.normalize(plain.double(), dim=1).T
    return np.asarray(cosines.numpy(), dtype=np.float64)


def separation(similarity: NDArray[np.float64], seed: int = 0) -> Score:
    """d' of the cosines (N, N) of copies with their own photo, among those with other photos.

    A resample weighs every pair by how often both photos were drawn. A photo that was drawn twice
    is no "other" photo to itself.
    """
    own = np.diagonal(similarity).copy()  # (N,)
    others = similarity.copy()
    np.fill_diagonal(others, 0.0)

    count = len(own)
    drawn = [np.bincount(rows, minlength=count) for rows in resamples(count, seed)]
    # the first row is all photos, once each
    weights = np.stack([np.ones(count, dtype=np.int64), *drawn]).astype(np.float64)  # (R + 1, N)

    pairs = weights.sum(axis=1) ** 2 - (weights**2).sum(axis=1)
    pairs = np.maximum(pairs, 1.0)
    mean = ((weights @ others) * weights).sum(axis=1) / pairs
    square = ((weights @ others**2) * weights).sum(axis=1) / pairs
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    above = weights @ own / count - mean

    # photos that are all alike have no deviation, and nothing that stands out
    values = np.divide(above, deviation, out=np.zeros_like(above), where=deviation > 1e-6)
    draws = values[1:]
    return Score(float(values[0]), float(draws.std(ddof=1)), draws=draws)


def reciprocal_ranks(similarity: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / the place (N,) at which the search for a copy finds its photo, ties at their middle."""
    own = np.diagonal(similarity)[:, None]
    nearer = (similarity > own).sum(axis=1)
    # without the photo itself
    as_near = (similarity == own).sum(axis=1) - 1
    places: NDArray[np.float64] = 1.0 + nearer + as_near / 2
    return 1.0 / places


def groups_of(views: TwoViews, seed: int = 0) -> tuple[KMeansRun, KMeansRun]:
    """The groups of the photos, and those of their copies, as many as a picture shows."""
    number = picture_groups(len(views.plain))
    first = kmeans_runs(views.plain, number, runs=_RUNS, seed=seed)
    second = kmeans_runs(views.copies, number, runs=_RUNS, seed=seed)
    return first, second


def stability(first: KMeansRun, second: KMeansRun, seed: int = 0) -> Score:
    """How far two clusterings of the same photos agree; its error also over runs of k-means."""
    one, other = (torch.from_numpy(run.assignments) for run in (first, second))
    runs = zip(first.all_assignments, second.all_assignments, strict=True)
    agreements = [adjusted_rand(torch.from_numpy(old), torch.from_numpy(new)) for old, new in runs]

    def agreement(rows: NDArray[np.int64]) -> float:
        return adjusted_rand(one[rows], other[rows])

    return measure(agreement, len(one), spread=float(np.std(agreements)), seed=seed)


def relative_change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """How far weights moved, as a share of their length: 0 for none, 1 for as far as they are long.

    Tensors that are the same to the bit, such as those of frozen blocks, are left out of both, and
    those that only one side has in this shape, such as an eraser's.
    """
    moved, length = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for name in before.keys() & after.keys():
        old, new = (side[name].detach().cpu().double() for side in (before, after))
        if old.shape == new.shape and not torch.equal(old, new):
            moved += (new - old).square().sum()
            length += old.square().sum()
    if moved == 0:
        return 0.0
    # weights that were all 0 moved by as much as can be
    return float((moved / length).sqrt()) if length > 0 else float("inf")
