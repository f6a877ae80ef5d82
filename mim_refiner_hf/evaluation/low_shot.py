"""Low-shot classification: logistic regression on 1, 2 or 5 labelled images per class.

    result = low_shot(encoder, processor, train_images, eval_images)
    result.metrics["low_shot_1_accuracy"]

MIM-Refiner, Sec. 5.2 and C.5. The features are the CLS token after the last block, without the
final norm; as in MSN's protocol, which the paper follows, every row is centred and L2-normalised.
The mean over three splits is reported. The paper's splits are MSN's lists of ImageNet files, given
as `split_files`; without any, splits are drawn from the seed, which works on any labelled data.

The paper solves the regression with `cyanure`, whose objective for n rows x and weights W (D, K),
without an intercept, is

    1/n sum_i cross_entropy(x_i W, y_i) + lambda/2 ||W||^2        with lambda = 0.00025 / n.

It is strictly convex, so any solver finds the same W. scikit-learn's
`LogisticRegression(C=..., fit_intercept=False)` minimises C sum_i cross_entropy + 1/2 ||W||^2: the
same with C = 1 / (lambda n) = 4000. With two classes it keeps one vector w, which stands for
W = (-w/2, w/2) with ||W||^2 = ||w||^2 / 2: there C = 2 / (lambda n).
"""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ..data.loading import Loading, Processor
from ..data.split_files import listed_places
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.seeding import random_generator
from ..runtime.text import one_line
from ..runtime.wording import setting
from .feature_cache import ImageRows, read_rows
from .features import own_column
from .knn import standardise
from .scores import ProtocolResult, Score, class_labels, mean_score

if TYPE_CHECKING:
    from ..data.images import ImageDataset

logger = logging.getLogger(__name__)

# lambda * n, of MSN's and the authors' evaluation
PENALTY = 0.00025
SPLITS = 3
SHOTS = (1, 2, 5)
# of the largest entry of the gradient of the mean loss
GRADIENT_TOLERANCE = 1e-8
MAX_ITERATIONS = 1000


def centred_rows(features: Tensor) -> Tensor:
    """Rows (N, D) minus their own mean, then of unit length, in double precision."""
    features = features.double()
    return F.normalize(features - features.mean(dim=1, keepdim=True), dim=1)


def fit_logistic(features: Tensor, labels: Tensor, *, penalty: float = PENALTY) -> Tensor:
    """Weights (D, K) of the multinomial logistic regression without intercept.

    They are the optimum of the objective at the top of this file, by scikit-learn's Newton-CG in
    double precision: at so weak a penalty, and with features that are almost parallel, it needs
    ten iterations where L-BFGS needs thousands.

    Args:
        features: rows (N, D), taken as they are.
        labels: their classes (N,): every number from 0 to K - 1, at least two of them.
        penalty: lambda * n; greater than 0.
    """
    if penalty <= 0:
        raise ValueError(
            f"penalty={penalty} must be greater than 0: without it, separable classes have no "
            "optimum"
        )

    two_classes = int(labels.max()) == 1
    strength = 2 if two_classes else 1
    solver = LogisticRegression(
        C=strength / penalty,
        fit_intercept=False,
        solver="newton-cg",
        tol=GRADIENT_TOLERANCE,
        max_iter=MAX_ITERATIONS,
    )
    fitted = solver.fit(features.double().numpy(), labels.numpy())
    weights = torch.from_numpy(fitted.coef_.T)
    if two_classes:
        return torch.cat([-weights / 2, weights / 2], dim=1)
    return weights


def probe_accuracy(bank: Tensor, values: Tensor, rows: Tensor, asked: Tensor) -> float:
    """How often a linear probe names the values of rows: logistic regression, standardised.

    Args:
        bank: rows that it learns from (N, D).
        values: theirs (N,), any whole numbers.
        rows: (M, D).
        asked: theirs (M,).
    """
    kinds, numbers = values.unique(return_inverse=True)
    answers = kinds[:1].expand(len(rows))
    if len(kinds) > 1:
        bank, rows = standardise(bank, rows)
        weights = fit_logistic(bank, numbers, penalty=1.0)
        answers = kinds[(rows.double() @ weights).argmax(dim=1)]
    return float((answers == asked).double().mean())


# --- splits ----------------------------------------------------------------------------------


def draw_split(labels: NDArray[np.int64], shots: int, seed: int, split: int) -> NDArray[np.int64]:
    """Places of `shots` images of every class (K, shots), classes ascending.

    A pure function of its arguments. The first columns are the split of fewer shots: what more
    labels bring is measured on the same images.

    Raises:
        ValueError: for a class with fewer images.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < shots:
        scarce = classes[counts.argmin()]
        raise ValueError(
            f"shots={shots}, but class {scarce} has only {counts.min()} images; lower shots"
        )

    shuffled = random_generator(seed, "low-shot", split).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    first = np.cumsum(counts) - counts
    chosen: NDArray[np.int64] = by_class[first[:, None] + np.arange(shots)]
    return chosen


def shots_of_all(images: "ImageDataset") -> Sequence[int]:
    """Those of 1, 2 and 5 images that every class has; which are left out is said."""
    labels = class_labels(images, "low-shot classification")
    classes, counts = np.unique(labels, return_counts=True)
    least = counts.min()
    shots = [count for count in SHOTS if count <= least]
    if len(shots) < len(SHOTS):
        logger.warning(
            "low_shot: class %s has %d images in %s, so more per class are not measured",
            _called(images, classes[counts.argmin()]),
            least,
            one_line(images.name),
        )
    return shots


def _called(images: "ImageDataset", number: int) -> str:
    """What a class is called; its number where the data has no names."""
    return str(number) if images.class_names is None else one_line(images.class_names[number])


def encoded_splits(
    images: "ImageDataset", read: Callable[["ImageDataset"], ImageRows], shots: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], ImageRows]:
    """The splits, and the features of all images in them, each encoded once.

    Only chosen images are read; where some are broken, the splits are drawn anew from the others.

    Returns:
        Classes (K,), the splits (SPLITS, K, shots) as places among the encoded images, and those.
    """
    while True:
        labels = class_labels(images, "low-shot classification")
        splits = np.stack([draw_split(labels, shots, seed, split) for split in range(SPLITS)])
        used, places = np.unique(splits, return_inverse=True)
        rows = read(images.subset(used))
        if len(rows.images) == len(used):
            return np.unique(labels), places.reshape(splits.shape), rows

        broken = np.setdiff1d(images.indices[used], rows.images.indices)
        images = images.subset(np.flatnonzero(~np.isin(images.indices, broken)))


def listed_split(images: "ImageDataset", file: Path) -> NDArray[np.int64]:
    """Places of the images of a list (K, shots), classes ascending.

    Raises:
        ValueError: unless the list has equally many images of every class; else as of
            `listed_places`.
    """
    places = listed_places(images, file)
    labels = class_labels(images, "low-shot classification")
    classes, counts = np.unique(labels[places], return_counts=True)
    lacking = np.setdiff1d(labels, classes)

    if len(lacking) or counts.min() < counts.max():
        scarce, least = classes[counts.argmin()], counts.min()
        if len(lacking):
            scarce, least = lacking[0], 0
        raise ValueError(
            f"{setting('split_file', file)}: has {least} images of class "
            f"{_called(images, scarce)} and up to "
            f"{counts.max()} of others; low-shot classification needs equally many of each"
        )
    order = np.argsort(labels[places], kind="stable")
    split: NDArray[np.int64] = places[order].reshape(len(classes), -1)
    return split


def encoded_lists(
    images: "ImageDataset",
    read: Callable[["ImageDataset"], ImageRows],
    listed: Sequence[NDArray[np.int64]],
) -> tuple[list[NDArray[np.int64]], ImageRows]:
    """Listed splits (K, shots) as places among the encoded images, and those, each encoded once.

    ValueError for a listed image that cannot be read.
    """
    used = np.unique(np.concatenate([split.ravel() for split in listed]))
    rows = read(images.subset(used))
    if len(rows.images) < len(used):
        raise ValueError(
            f"{len(used) - len(rows.images)} of the listed images cannot be read; the lists leave "
            "no choice of others"
        )
    return [np.searchsorted(used, split) for split in listed], rows


# --- the protocol ----------------------------------------------------------------------------


def low_shot(
    encoder: MimRefinerModel,
    processor: Processor,
    train_images: "ImageDataset",
    eval_images: "ImageDataset",
    *,
    shots: Sequence[int] | None = None,
    split_files: Sequence[Path] = (),
    seed: int = 0,
    features: Path | None = None,
    loading: Loading = Loading(),
) -> ProtocolResult:
    """Accuracy of a logistic regression on so many images per class, the mean of three splits.

    Args:
        encoder, processor: the model and its image processor; see `extract_features`.
        train_images: labelled; only the chosen ones are encoded.
        eval_images: labelled.
        shots: images per class, each at least 1; None: of 1, 2 and 5 what every class has, said
            where that is not all. With `split_files`, what these hold.
        split_files: lists of file names, see `listed_places`, one for each split; splits with
            equally many images per class are averaged.
        seed: of the splits that are drawn.
        features: see `read_rows`.
        loading: as in `extract_features`; the regression is solved on the CPU.

    Returns:
        `low_shot_<shots>_accuracy` for each of `shots`; the standard error is that of the mean
        over splits.

    Raises:
        ValueError: for missing labels, or a class with too few images.
    """
    if shots is None:
        shots = SHOTS if split_files else shots_of_all(train_images)
    check_low_shot(train_images, eval_images, shots)
    listed = [listed_split(train_images, file) for file in split_files]
    column = own_column(encoder.config, encoder.config.num_hidden_layers - 1)

    def read(images: "ImageDataset") -> ImageRows:
        return read_rows(encoder, images, processor, [column], features=features, loading=loading)

    if listed:
        names = np.unique(class_labels(train_images, "low-shot classification"))
        splits, bank = encoded_lists(train_images, read, listed)
    else:
        names, drawn, bank = encoded_splits(train_images, read, max(shots), seed)
        splits = []
        for count in shots:
            splits += [split[:, :count] for split in drawn]
    test = read(eval_images)
    # check_low_shot has refused images without labels
    assert test.labels is not None
    rows = centred_rows(bank.column(column))
    targets = centred_rows(test.column(column))

    classes = torch.from_numpy(names)
    correct: dict[int, list[NDArray[np.float64]]] = {}
    for split in splits:
        count = split.shape[1]
        numbers = torch.arange(len(classes)).repeat_interleave(count)
        weights = fit_logistic(rows[split.flatten()], numbers)
        predicted = classes[(targets @ weights).argmax(dim=1)]
        answers = (predicted == test.labels).double().numpy()
        correct.setdefault(count, []).append(answers)

    origin = "listed" if listed else "drawn"
    scores = {}
    for count, of_splits in sorted(correct.items()):
        score = mean_of_splits(np.stack(of_splits), count, origin)
        scores[f"low_shot_{count}_accuracy"] = score
    return ProtocolResult(scores)


def mean_of_splits(correct: NDArray[np.float64], shots: int, origin: str) -> Score:
    """The score of a table of right (1) and wrong (0) answers, (splits, N).

    Of a single split, the error is that over images.
    """
    splits = len(correct)
    per_image = correct.mean(axis=0)
    images = "image" if shots == 1 else "images"
    plural = "split" if splits == 1 else "splits"
    setting = f"{shots} {images} per class; {splits} {plural}, {origin}"
    if splits == 1:
        return mean_score(torch.from_numpy(per_image), setting)
    error = float(correct.mean(axis=1).std(ddof=1)) / math.sqrt(splits)
    return Score(float(per_image.mean()), error, setting, per_image, spread=error)


def check_low_shot(
    train_images: "ImageDataset", eval_images: "ImageDataset", shots: Sequence[int]
) -> None:
    """ValueError, in one sentence, for what `low_shot` cannot run on."""
    if not shots or min(shots) < 1:
        raise ValueError(f"shots={tuple(shots)} must hold at least one number, each at least 1")
    labels = class_labels(train_images, "low-shot classification")
    class_labels(eval_images, "low-shot classification")
    if labels.min() == labels.max():
        raise ValueError(
            f"{train_images.name} has images of one class only, but low-shot classification needs "
            "two or more"
        )
