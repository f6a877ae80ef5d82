"""Low-shot classification: logistic regression on 1, 2 or 5 labelled images per class (MIM-Refiner, Sec. 5.2 and C.5).

    result = low_shot(encoder=encoder, processor=processor, train_images=train, eval_images=test)
    result.metrics["low_shot_1_accuracy"]

The features are the CLS token after the last block, without the final norm; as in MSN's protocol, which the paper follows, every
row is centred and L2-normalised. The mean over three splits is reported. The paper's splits are lists of ImageNet files; here a
split is drawn from the seed, which works on any labelled data.

The paper solves the regression with `cyanure`, whose objective for n rows x and weights W (D, K), without an intercept, is

    1/n sum_i cross_entropy(x_i W, y_i) + lambda/2 ||W||^2        with lambda = 0.00025 / n.

It is strictly convex, so any solver finds the same W. scikit-learn's `LogisticRegression(C=..., fit_intercept=False)` minimises
C sum_i cross_entropy + 1/2 ||W||^2: the same with C = 1 / (lambda n) = 4000. With two classes it keeps one vector w, which stands for
W = (-w/2, w/2) with ||W||^2 = ||w||^2 / 2: there C = 2 / (lambda n).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ..data.loading import Loading
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.seeding import random_generator
from .feature_cache import Rows, read_rows
from .features import own_column
from .scores import ProtocolResult, Score, class_labels

if TYPE_CHECKING:
    from ..data.images import ImageDataset

PENALTY = 0.00025  # lambda * n, of MSN's and the authors' evaluation
SPLITS = 3
TOLERANCE, MAX_ITERATIONS = 1e-8, 1000  # of the largest entry of the gradient of the mean loss


def centred_rows(features: Tensor) -> Tensor:
    """Rows (N, D) minus their own mean, then of unit length, in double precision."""
    features = features.double()
    return F.normalize(features - features.mean(dim=1, keepdim=True), dim=1)


def fit_logistic(features: Tensor, labels: Tensor, *, penalty: float = PENALTY) -> Tensor:
    """Weights (D, K) of the multinomial logistic regression without intercept: the optimum of the objective above.

    Args:
        features: rows (N, D), taken as they are.
        labels: their classes (N,): every number from 0 to K - 1, at least two of them.
        penalty: lambda * n; greater than 0.

    scikit-learn's Newton-CG in double precision: at so weak a penalty, and with features that are almost parallel, it needs ten
    iterations where L-BFGS needs thousands.
    """
    if penalty <= 0:
        raise ValueError(
            f"penalty={penalty} must be greater than 0: without it, separable classes have no optimum"
        )
    c = (2 if int(labels.max()) == 1 else 1) / penalty
    solver = LogisticRegression(
        C=c, fit_intercept=False, solver="newton-cg", tol=TOLERANCE, max_iter=MAX_ITERATIONS
    )
    weights = torch.from_numpy(solver.fit(features.double().numpy(), labels.numpy()).coef_.T)
    return weights if weights.shape[1] > 1 else torch.cat([-weights / 2, weights / 2], dim=1)


def draw_split(labels: NDArray[np.int64], shots: int, seed: int, split: int) -> NDArray[np.int64]:
    """Places of `shots` images of every class, (K, shots), classes ascending: a pure function of its arguments.

    The first columns are the split of fewer shots: what more labels bring is measured on the same images.

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


def encoded_splits(
    images: "ImageDataset", read: Callable[["ImageDataset"], Rows], shots: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], Rows]:
    """Classes (K,), the splits (SPLITS, K, shots) as places among the encoded images, and those.

    Only chosen images are read; where some are broken, the splits are drawn anew from the others.
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


def low_shot(
    *,
    encoder: MimRefinerModel,
    processor: Any,
    train_images: "ImageDataset",
    eval_images: "ImageDataset",
    shots: Sequence[int] = (1, 2, 5),
    seed: int = 0,
    features: Path | None = None,
    loading: Loading = Loading(),
) -> ProtocolResult:
    """Accuracy on `eval_images` of a logistic regression on so many `train_images` per class, the mean of three splits.

    Args:
        encoder, processor: the model and its image processor; see `extract_features`.
        train_images: labelled; only the chosen ones are encoded.
        eval_images: labelled.
        shots: images per class, each at least 1.
        seed: of the splits.
        features: see `read_rows`.
        loading: as in `extract_features`; the regression is solved on the CPU.

    Returns:
        `low_shot_<shots>_accuracy` for each of `shots`; the standard error is that of the mean over splits.

    Raises:
        ValueError: for missing labels, or a class with too few images.
    """
    if not shots or min(shots) < 1:
        raise ValueError(f"shots={tuple(shots)} must hold at least one number, each at least 1")
    labels = class_labels(train_images, "low-shot classification")
    class_labels(eval_images, "low-shot classification")
    if labels.min() == labels.max():
        raise ValueError(
            f"{train_images.name} has images of one class only, but low-shot classification needs two or more"
        )
    column = own_column(encoder.config, encoder.config.num_hidden_layers - 1)

    def read(images: "ImageDataset") -> Rows:
        return read_rows(encoder, images, processor, [column], features=features, loading=loading)

    names, places, bank = encoded_splits(train_images, read, max(shots), seed)
    found = read(eval_images)
    assert found.labels is not None  # class_labels says so
    rows, targets = centred_rows(bank.column(column)), centred_rows(found.column(column))
    classes = torch.from_numpy(names)
    scores = {}
    for count in shots:
        numbers = torch.arange(len(classes)).repeat_interleave(count)
        correct = []
        for split in range(SPLITS):
            weights = fit_logistic(rows[places[split, :, :count].flatten()], numbers)
            predicted = classes[(targets @ weights).argmax(dim=1)]
            correct.append((predicted == found.labels).double().numpy())
        error = float(np.std([answers.mean() for answers in correct], ddof=1)) / math.sqrt(SPLITS)
        images = "image" if count == 1 else "images"
        setting = f"{count} {images} per class; {SPLITS} splits"
        per_image = np.mean(correct, axis=0)
        scores[f"low_shot_{count}_accuracy"] = Score(
            float(per_image.mean()), error, setting, per_image, spread=error
        )
    return ProtocolResult(scores)


__all__ = ["centred_rows", "draw_split", "fit_logistic", "low_shot"]
