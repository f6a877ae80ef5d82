"""A score and its standard error; what every protocol returns is a few of them, by name.

result = low_shot(encoder=encoder, processor=processor, train_images=train, eval_images=test)
result.metrics["low_shot_1_accuracy"]                    # a fraction of 1
print(result)               # low_shot_1_accuracy  41.3 % ± 1.2   (1 image per class; 3 splits)
"""

import logging
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..data.columns import label_of
from ..data.images import ImageDataset, fully_labelled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """One number, and how far another sample of images would move it.

    Attributes:
        value: the score on the images at hand; of most scores a fraction of 1.
        standard_error: of `value`, from the choice of images and from `spread`.
        setting: in words, what it was reached with.
        per_image: whose mean `value` is, (N,), one in [0, 1] per evaluation image; None where it is
            not a mean over images.
        spread: the part of the standard error that does not come from the choice of evaluation
            images, such as that over restarts of an algorithm.
        draws: the score on every resample of the images, where it was bootstrapped
            (`evidence.measure`).
    """

    value: float
    standard_error: float
    setting: str = ""
    per_image: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)
    spread: float = 0.0
    draws: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        measured = f"{100 * self.value:.1f} % ± {100 * self.standard_error:.1f}"
        return f"{measured}   ({self.setting})" if self.setting else measured


def as_metrics(scores: dict[str, Score]) -> dict[str, float]:
    """Each value under its score's name, then the errors under `<name>_standard_error`."""
    metrics = {name: score.value for name, score in scores.items()}
    for name, score in scores.items():
        metrics[f"{name}_standard_error"] = score.standard_error
    return metrics


@dataclass(frozen=True)
class ProtocolResult:
    """The scores of one protocol, by name."""

    scores: dict[str, Score]

    @property
    def metrics(self) -> dict[str, float]:
        """As `as_metrics` gives them."""
        return as_metrics(self.scores)

    def __str__(self) -> str:
        width = max(map(len, self.scores), default=0)
        return "\n".join(f"{name:<{width}}  {score}" for name, score in self.scores.items())


def mean_score(values: Tensor, setting: str = "") -> Score:
    """The mean of `values` (N,), one in [0, 1] per image, and its standard error over images."""
    values = values.double()
    error = values.std(correction=0).item() / math.sqrt(len(values))
    return Score(values.mean().item(), error, setting, values.cpu().numpy())


def class_labels(images: ImageDataset, protocol: str) -> NDArray[np.int64]:
    """The class of every image (N,); ValueError, naming the `protocol`, unless all have one."""
    if len(images) == 0:
        raise ValueError(f"{images.name} has no images, but {protocol} needs labelled ones")
    if images.labels is None or not fully_labelled(images):
        raise ValueError(
            f"{images.name} has images without a label, but {protocol} needs one for every image"
        )
    labels: NDArray[np.int64] = images.labels
    return labels


def labelled_rows(labels: ArrayLike) -> NDArray[np.bool_]:
    """Which of N labels are one (N,), see `data.columns.label_of`; how many are none is said.

    Raises:
        ValueError: where none is.
    """
    values = np.asarray(labels)
    if values.dtype.kind in "iuf":
        # NaN is not 0 or more
        has_one = values >= 0
        odd = values[has_one] % 1 != 0
        if odd.any():
            raise ValueError(
                f"a label is {values[has_one][odd][0]}, but labels are whole numbers or words"
            )
    else:
        has_one = np.array([label_of(value) is not None for value in values.tolist()])
    missing = len(values) - int(has_one.sum())
    if missing == len(values):
        raise ValueError(f"none of the {missing} items has a label")
    if missing:
        logger.warning(
            "%d of %d items have no label; the score is that of the other %d",
            missing,
            len(values),
            len(values) - missing,
        )
    return np.asarray(has_one, dtype=np.bool_)
