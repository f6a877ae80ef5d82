"""Errors and verdicts.

Bootstrap against the textbook's formulas, and verdicts that keep their promise on planted effects.
"""

import numpy as np
import pytest
from numpy.typing import NDArray

from mim_refiner_hf.evaluation.evidence import change_between, measure_mean
from mim_refiner_hf.evaluation.scores import Score


def accuracy(correct: NDArray[np.bool_], seed: int = 0, spread: float = 0.0) -> Score:
    return measure_mean(correct, seed=seed, spread=spread)


def test_error_of_a_share_is_the_binomial_one() -> None:
    correct = np.random.default_rng(0).random(2000) < 0.7
    found = accuracy(correct)
    share = correct.mean()
    draws = found.draws
    assert draws is not None
    assert found.value == share
    assert found.standard_error == pytest.approx(np.sqrt(share * (1 - share) / 2000), rel=0.1)
    assert abs(draws.mean() - share) < 4 * found.standard_error / np.sqrt(len(draws))


def test_a_paired_change_has_the_error_of_the_differences() -> None:
    rng = np.random.default_rng(1)
    before = rng.random(3000) < 0.6
    # the same images, few of them changed
    after = before ^ (rng.random(3000) < 0.05)
    change = change_between(accuracy(before), accuracy(after))
    differences = after.astype(float) - before
    assert change.difference == pytest.approx(differences.mean())
    assert change.error == pytest.approx(differences.std(ddof=1) / np.sqrt(3000), rel=0.1)
    # unpaired, it would be more than the error of one side
    assert change.error < 0.5 * accuracy(before).standard_error


@pytest.mark.parametrize(("shift", "expected"), [(0.08, "better"), (-0.08, "worse")])
def test_a_planted_effect_is_seen(shift: float, expected: str) -> None:
    noise = np.random.default_rng(2).random(2000)
    assert change_between(accuracy(noise < 0.5), accuracy(noise < 0.5 + shift)).verdict == expected


def test_without_an_effect_the_verdict_is_rarely_wrong() -> None:
    verdicts = []
    for trial in range(60):
        rng = np.random.default_rng(trial)
        verdicts.append(
            change_between(accuracy(rng.random(400) < 0.5), accuracy(rng.random(400) < 0.5)).verdict
        )
    assert verdicts.count("no clear difference") >= 52  # 57 of 60 expected at 95 %
    assert len(set(verdicts)) > 1 or verdicts.count("no clear difference") == 60


def test_spread_over_restarts_can_drown_a_difference() -> None:
    noise = np.random.default_rng(3).random(2000)
    before, after = noise < 0.5, noise < 0.54
    assert change_between(accuracy(before), accuracy(after)).verdict == "better"
    assert (
        change_between(accuracy(before, spread=0.03), accuracy(after, spread=0.03)).verdict
        == "no clear difference"
    )
    assert accuracy(before, spread=0.03).standard_error > 0.03


def test_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        accuracy(np.array([True]))
