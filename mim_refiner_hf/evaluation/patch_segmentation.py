"""Segmentation by single patches of the frozen encoder: their neighbours, or a logistic regression.

    mim-refiner evaluate MODEL --dataset camvid/ --eval_split test \
        --protocols segmentation_knn segmentation_logistic

    train, test = (open_segmentation("camvid/", split=split) for split in ("train", "test"))
    result = segmentation_knn(encoder, processor, train, test)
    print(result.scores["segmentation_knn_miou"])
    # 28.1 % ± 0.8   (10 neighbours by cosine; 95 % 26.6-29.7 %)

CAPI's protocols (arXiv 2502.08769, the released code). Images and masks are squashed to the
encoder's size, the masks by the nearest pixel. A training patch counts if the most frequent value
of its pixels is a class. A patch is known by the encoder's output, final norm included,
standardised channel by channel over the training patches that count.

- `segmentation_knn`: a patch gets what its k nearest training patches have, pixel by pixel: the
  most frequent class there, the first of several. k of 1, 3, 10, 30, by cosine or Euclidean
  distance.
- `segmentation_logistic`: a logistic regression with an L2 penalty names one class for all pixels
  of a patch, learned from the most frequent one; C of 1e-6 to 1e5 in 8 steps, L-BFGS of at most
  1 000 iterations (scikit-learn's).

k, distance and C are chosen on a tenth of the training images, which are not learned from then;
with the choice all of them are learned from. mIoU is counted over all pixels of the squashed
images.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ..data.loading import ImageProcessor, Loading
from ..data.views import normalise
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import progress_bar
from ..runtime.seeding import random_generator
from .features import frozen
from .knn import channel_statistics
from .scores import ProtocolResult, Score
from .search import nearest
from .segmentation import bootstrap_miou, check_same_classes, mean_iou, pixel_counts
from .segmentation_data import VOID, SegmentationDataset, masked_batches

PATCH_NEIGHBOURS = (1, 3, 10, 30)
DISTANCES = ("cosine", "Euclidean")
# the authors' 8 values between 1e-6 and 1e5
STRENGTHS = tuple(10.0**power for power in np.linspace(-6, 5, 8))
_ITERATIONS = 1000
_TOLERANCE = 1e-12
# of the training images, to choose on
_CHOSEN_ON = 10
# rows of a table of distances that are in memory at once
_ROWS_AT_ONCE = 1024

# Shapes below: I images, N patches an image, M and T patches to name and to learn from, D width of
# the encoder, P pixels of a patch, K classes.


class Patches(NamedTuple):
    """Patches of images, image by image and row by row.

    Attributes:
        features: of each patch (I, N, D), as the encoder gives them.
        classes: of each pixel of each patch (I, N, P); -1 for void.
    """

    features: Tensor
    classes: Tensor

    def of(self, images: NDArray[np.int64]) -> "Patches":
        """Those of some of the images."""
        return Patches(self.features[images], self.classes[images])

    def counting(self, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Those whose most frequent value is a class.

        Returns:
            Their features (T, D), classes (T, P) and most frequent class (T,).
        """
        rows = self.classes.flatten(0, 1)
        most = votes(rows.unsqueeze(2), num_classes, void_counts=True)[:, 0]
        counted = most != VOID
        return self.features.flatten(0, 1)[counted], rows[counted], most[counted]


Method = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From features (T, D), classes (T, P) and main class (T,) of what is learned from, and features
(M, D), to the classes of all pixels of the latter (M, P)."""


def votes(classes: Tensor, num_classes: int, *, void_counts: bool = False) -> Tensor:
    """The most frequent of k classes at each place, the first of several: (M, k, P) -> (M, P).

    Void is no answer unless it counts, in which case it can be; only void gives class 0.
    """
    # void, which is -1, stands in front
    counts = torch.zeros(
        len(classes), num_classes + 1, classes.shape[2], dtype=torch.int16, device=classes.device
    )
    counts.scatter_add_(1, (classes + 1).long(), torch.ones_like(classes, dtype=torch.int16))
    if void_counts:
        return counts.argmax(dim=1) - 1
    return counts[:, 1:].argmax(dim=1)


def nearest_by(queries: Tensor, bank: Tensor, k: int, distance: str) -> Tensor:
    """Places of the k rows of the bank (T, D) that are nearest to each query (M, D): (M, k).

    Euclidean distances are not searched in tiles as cosines are: that finds the same rows, but puts
    near-equal ones in another order, and so a vote could fall otherwise.
    """
    if distance == "cosine":
        return nearest(queries, bank, k)[1]
    squares = bank.square().sum(dim=1)
    places = []
    for part in queries.split(_ROWS_AT_ONCE):
        # but for the query's own square, which changes no order
        apart = torch.addmm(squares, part, bank.T, alpha=-2)
        places.append(apart.topk(k, dim=1, largest=False).indices)
    return torch.cat(places)


def by_neighbours(
    features: Tensor,
    classes: Tensor,
    main: Tensor,
    queries: Tensor,
    *,
    k: int,
    distance: str,
    num_classes: int,
) -> Tensor:
    """A `Method`: the vote of the k nearest patches, pixel by pixel."""
    places = nearest_by(queries, features, min(k, len(features)), distance)
    parts = [votes(classes[part], num_classes) for part in places.split(_ROWS_AT_ONCE)]
    return torch.cat(parts)


def by_regression(
    features: Tensor, classes: Tensor, main: Tensor, queries: Tensor, *, strength: float
) -> Tensor:
    """A `Method`: the class that a logistic regression gives a patch, for all its pixels."""
    solver = LogisticRegression(C=strength, solver="lbfgs", tol=_TOLERANCE, max_iter=_ITERATIONS)
    with warnings.catch_warnings():
        # the protocol ends there
        warnings.simplefilter("ignore", ConvergenceWarning)
        solver.fit(features.cpu().numpy(), main.cpu().numpy())
    said = torch.from_numpy(solver.predict(queries.cpu().numpy()))
    return said.unsqueeze(1).expand(-1, classes.shape[1])


def segmentation_knn(
    encoder: MimRefinerModel,
    processor: ImageProcessor,
    train_images: SegmentationDataset,
    eval_images: SegmentationDataset,
    *,
    seed: int = 0,
    loading: Loading = Loading(batch_size=64),
) -> ProtocolResult:
    """mIoU of the classes that the nearest training patches have.

    Args:
        encoder, processor: the model, which stays as it is, and its image processor, of which only
            mean and std are used.
        train_images, eval_images: with the same classes; see `open_segmentation`.
        seed: of the tenth and the bootstrap.
        loading: of the passes of the encoder; all patches are held in memory.

    Returns:
        `segmentation_knn_miou`, a fraction of 1, with the standard error of a bootstrap over the
        evaluation images.

    Raises:
        ValueError: for empty data, fewer than 2 training images, and different classes.
    """
    count = len(train_images.class_names)
    methods: dict[str, Method] = {}
    for distance in DISTANCES:
        for k in PATCH_NEIGHBOURS:
            noun = "neighbour" if k == 1 else "neighbours"
            methods[f"{k} {noun}, {distance}"] = partial(
                by_neighbours, k=k, distance=distance, num_classes=count
            )
    name = "segmentation_knn"
    return _measured(name, methods, encoder, processor, train_images, eval_images, seed, loading)


def segmentation_logistic(
    encoder: MimRefinerModel,
    processor: ImageProcessor,
    train_images: SegmentationDataset,
    eval_images: SegmentationDataset,
    *,
    seed: int = 0,
    loading: Loading = Loading(batch_size=64),
) -> ProtocolResult:
    """mIoU of a logistic regression on the patches.

    Arguments and errors as of `segmentation_knn`, and a ValueError for patches of one class only;
    returns `segmentation_logistic_miou`.
    """
    methods: dict[str, Method] = {}
    for strength in STRENGTHS:
        methods[f"C {strength:.2g}"] = partial(by_regression, strength=strength)
    name = "segmentation_logistic"
    return _measured(name, methods, encoder, processor, train_images, eval_images, seed, loading)


def _measured(
    name: str,
    methods: dict[str, Method],
    encoder: MimRefinerModel,
    processor: ImageProcessor,
    train_images: SegmentationDataset,
    eval_images: SegmentationDataset,
    seed: int,
    loading: Loading,
) -> ProtocolResult:
    """The score of the method that is best on a tenth of the training images."""
    check_same_classes(train_images, eval_images, name)
    if len(train_images) < 2:
        raise ValueError(
            f"{train_images.name} has {len(train_images)} training image, but {name} chooses its "
            "settings on some of them; give 2 or more"
        )
    count = len(train_images.class_names)
    train = encoded_patches(encoder, processor, train_images, loading)
    test = encoded_patches(encoder, processor, eval_images, loading)
    order = random_generator(seed, "patch segmentation").permutation(len(train_images))
    held = max(len(order) // _CHOSEN_ON, 1)

    progress = progress_bar(methods, desc=name, unit="setting", leave=False)
    rest, tenth = train.of(np.sort(order[held:])), train.of(np.sort(order[:held]))
    mious = {}
    for setting in progress:
        tables = _tables(methods[setting], rest, tenth, count, name)
        mious[setting] = float(mean_iou(tables.sum(axis=0)))
    best = max(mious, key=lambda setting: mious[setting])

    tables = _tables(methods[best], train, test, count, name)
    error, low, high = bootstrap_miou(tables, seed)
    value = float(mean_iou(tables.sum(axis=0)))
    text = f"{best}; 95 % {100 * low:.1f}-{100 * high:.1f} %"
    return ProtocolResult({f"{name}_miou": Score(value, error, text)})


def _tables(
    method: Method, train: Patches, test: Patches, num_classes: int, name: str
) -> NDArray[np.int32]:
    """Per image of `test` the table of `pixel_counts` (I, K, K)."""
    features, classes, main = train.counting(num_classes)
    if len(main.unique()) < 2:
        raise ValueError(
            f"{name} needs patches of two classes or more, and the {len(train.features)} images to "
            f"learn from have {len(main.unique())}; give more images"
        )
    mean, deviation = channel_statistics(features, correction=0)
    queries = (test.features.flatten(0, 1) - mean) / deviation
    said = method((features - mean) / deviation, classes, main, queries)

    answers = said.reshape(len(test.features), -1).cpu().numpy()
    truths = test.classes.flatten(1).cpu().numpy()
    pairs = zip(truths, answers, strict=True)
    return np.array([pixel_counts(truth, answer, num_classes) for truth, answer in pairs])


def encoded_patches(
    encoder: MimRefinerModel,
    processor: ImageProcessor,
    images: SegmentationDataset,
    loading: Loading,
) -> Patches:
    """The patches of all images, squashed to the encoder's size; on its device."""
    side = encoder.config.patch_size
    loader = masked_batches(images, encoder.config, loading, squash=True)
    features = []
    classes = []
    with frozen(encoder, loading.device) as device:
        prefix = encoder.config.num_prefix_tokens
        progress = progress_bar(loader, desc="patches", unit="batch", leave=False)
        for pixels, targets in progress:
            pixels = normalise(pixels.to(device), processor.image_mean, processor.image_std)
            output = encoder(pixels).last_hidden_state[:, prefix:]
            features.append(output.float())
            # (I, H, W) to rows of pixels of a patch (I, N, P)
            cut = targets.unfold(1, side, side).unfold(2, side, side)
            classes.append(cut.reshape(len(cut), -1, side**2).to(device))
    return Patches(torch.cat(features), torch.cat(classes))
