"""How sure a number is: standard errors by bootstrap over images, and a verdict on before/after that is honest about noise.

    old = measure(lambda rows: correct_old[rows].mean(), n=len(correct_old))
    new = measure(lambda rows: correct_new[rows].mean(), n=len(correct_new))
    compare(old, new).verdict                                  # "better", "worse" or "no clear difference"

Both sides of a comparison are drawn with the same images in every resample, so what makes an image easy or hard for both models
cancels out (a paired bootstrap; Efron and Tibshirani 1993, ch. 16). k-means adds noise of its own, the spread over its runs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 500
Z = 1.96  # two-sided 95 % of a normal distribution


@dataclass(frozen=True)
class Measured:
    """A score and how far another sample of images would move it.

    Attributes:
        value: the score on the images at hand.
        error: standard error, from images and from `spread`.
        draws: the score on every resample (RESAMPLES,).
        spread: standard deviation over restarts of the algorithm itself; 0 where it has none.
    """

    value: float
    error: float
    draws: NDArray[np.float64] = field(repr=False)
    spread: float = 0.0


@dataclass(frozen=True)
class Change:
    """What a refinement did to one score: `difference` with its standard `error`, both in the score's unit."""

    difference: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference."""
        return self.difference - Z * self.error, self.difference + Z * self.error

    @property
    def verdict(self) -> str:
        """Whether the interval leaves out zero, and on which side; without any error there is nothing to go by but the sign."""
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "no clear difference"


def measure(
    statistic: Callable[[NDArray[np.int64]], float], n: int, *, spread: float = 0.0, seed: int = 0
) -> Measured:
    """A statistic of `n` images and its standard error.

    Args:
        statistic: of row numbers (n,), with repetitions; called on all rows and on every resample.
        n: number of images, at least 2.
        spread: standard deviation over restarts, added to the error in quadrature.
        seed: of the resamples; the same `n` and seed draw the same images, which makes two measurements comparable.

    Raises:
        ValueError: for fewer than 2 images.
    """
    if n < 2:
        raise ValueError(
            f"{n} image(s) say nothing about the error of a score; at least 2 are needed"
        )
    rng = np.random.default_rng(seed)
    draws = np.array([statistic(rng.integers(0, n, n)) for _ in range(RESAMPLES)])
    value = float(statistic(np.arange(n)))
    return Measured(value, math.hypot(float(draws.std(ddof=1)), spread), draws, spread)


def compare(before: Measured, after: Measured) -> Change:
    """The change from `before` to `after`, measured on the same images with the same seed."""
    images = float((after.draws - before.draws).std(ddof=1))
    return Change(after.value - before.value, math.hypot(images, before.spread, after.spread))


__all__ = ["Change", "Measured", "compare", "measure"]
