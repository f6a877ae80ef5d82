"""What every protocol returns: scores, each with its standard error and the setting it was reached with.

result = low_shot(encoder=encoder, processor=processor, train_images=train, eval_images=test)
result.metrics["low_shot_1_accuracy"]                    # a fraction of 1
print(result)                                            # low_shot_1_accuracy  41.3 % ± 1.2   (1 image per class; 3 splits)
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from ..data.images import ImageDataset


@dataclass(frozen=True)
class Score:
    """One number.

    Attributes:
        value, standard_error: fractions of 1.
        setting: in words, what it was reached with.
        per_image: whose mean `value` is, (N,), one in [0, 1] per evaluation image; None where it is not a mean over images.
        spread: the part of the standard error that does not come from the choice of evaluation images.
    """

    value: float
    standard_error: float
    setting: str = ""
    per_image: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)
    spread: float = 0.0

    def __str__(self) -> str:
        measured = f"{100 * self.value:.1f} % ± {100 * self.standard_error:.1f}"
        return f"{measured}   ({self.setting})" if self.setting else measured


@dataclass(frozen=True)
class ProtocolResult:
    """The scores of one protocol, by name."""

    scores: dict[str, Score]

    @property
    def metrics(self) -> dict[str, float]:
        """Every score's value under its name, and its standard error under `<name>_standard_error`."""
        errors = {
            f"{name}_standard_error": score.standard_error for name, score in self.scores.items()
        }
        return {name: score.value for name, score in self.scores.items()} | errors

    def __str__(self) -> str:
        width = max(map(len, self.scores), default=0)
        return "\n".join(f"{name:<{width}}  {score}" for name, score in self.scores.items())


def mean_score(values: Tensor, setting: str = "") -> Score:
    """The mean of `values` (N,), one in [0, 1] per image (1 for a correct answer), with its standard error over the images."""
    values = values.double()
    error = values.std(correction=0).item() / math.sqrt(len(values))
    return Score(values.mean().item(), error, setting, values.cpu().numpy())


def class_labels(images: "ImageDataset", protocol: str) -> NDArray[np.int64]:
    """The class of every image (N,); ValueError, naming the data set and the `protocol`, unless all have one."""
    if len(images) == 0:
        raise ValueError(f"{images.name} has no images, but {protocol} needs labelled ones")
    if images.labels is None or bool((images.labels < 0).any()):
        raise ValueError(
            f"{images.name} has images without a label, but {protocol} needs one for every image"
        )
    labels: NDArray[np.int64] = images.labels
    return labels


__all__ = ["ProtocolResult", "Score", "class_labels", "mean_score"]
