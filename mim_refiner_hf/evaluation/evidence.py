"""How sure a number is: errors by bootstrap over images, and honest verdicts on before and after.

    old = measure_mean(correct_old)                # whether each image was classified correctly
    new = measure_mean(correct_new)
    change_between(old, new).verdict               # "better", "worse" or "no clear difference"

Both sides of a comparison are drawn with the same images in every resample, so what makes an image
easy or hard for both models cancels out (a paired bootstrap; Efron and Tibshirani 1993, ch. 16).
k-means adds noise of its own, the spread over its runs.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from .scores import Score

RESAMPLES = 500
# two-sided 95 % of a normal distribution
_NORMAL_95 = 1.96


class JudgedChange(TypedDict):
    """A change as a report has it: with the ends of its 95 % interval, and the verdict in words."""

    difference: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Change:
    """What a refinement did to one score: the difference and its standard error, in its unit."""

    difference: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference."""
        reach = _NORMAL_95 * self.error
        return self.difference - reach, self.difference + reach

    def as_json(self) -> JudgedChange:
        """Difference, 95 % interval, verdict."""
        low, high = self.interval
        return {"difference": self.difference, "low": low, "high": high, "verdict": self.verdict}

    @property
    def verdict(self) -> str:
        """Whether the interval leaves out zero, and on which side; without an error, the sign."""
        low, high = self.interval
        if low > 0:
            return "better"
        return "worse" if high < 0 else "no clear difference"


def resamples(n: int, seed: int = 0) -> Iterator[NDArray[np.int64]]:
    """Row numbers (n,), with repetitions, of every resample of `n` images.

    The same `n` and seed draw the same images, which makes two measurements comparable.

    Raises:
        ValueError: for fewer than 2 images.
    """
    if n < 2:
        raise ValueError(
            f"{n} image(s) say nothing about the error of a score; at least 2 are needed"
        )
    generator = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        yield generator.integers(0, n, n)


def measure(
    statistic: Callable[[NDArray[np.int64]], float], n: int, *, spread: float = 0.0, seed: int = 0
) -> Score:
    """A statistic of `n` images and its standard error.

    Args:
        statistic: of row numbers (n,), with repetitions; called on all rows and every resample.
        n: number of images, at least 2.
        spread: standard deviation over restarts, added to the error in quadrature.
        seed: of the resamples.

    Raises:
        ValueError: for fewer than 2 images.
    """
    draws = np.array([statistic(rows) for rows in resamples(n, seed)])
    error = math.hypot(float(draws.std(ddof=1)), spread)
    return Score(float(statistic(np.arange(n))), error, spread=spread, draws=draws)


def measure_mean(per_image: NDArray[Any], *, spread: float = 0.0, seed: int = 0) -> Score:
    """`measure` of the mean of `per_image` (N,), such as whether each image was right."""
    return measure(
        lambda rows: float(per_image[rows].mean()), len(per_image), spread=spread, seed=seed
    )


def change_between(before: Score, after: Score) -> Change:
    """The change of a score: paired by its draws, which must be of the same images and seed.

    A score without draws is not a mean over images. Its errors are taken as independent: too wide
    an interval rather than too narrow a one.
    """
    difference = after.value - before.value
    if before.draws is None or after.draws is None:
        return Change(difference, math.hypot(after.standard_error, before.standard_error))
    images = float((after.draws - before.draws).std(ddof=1))
    return Change(difference, math.hypot(images, before.spread, after.spread))
