"""Groups that people have put together: who was given stays, the others go to the nearest, and the
confidence is the share of second clusterings that agree; against NumPy, SciPy and scikit-learn.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, logsumexp
from sklearn.cluster import KMeans

from mim_refiner_hf.clustering import Clustering
from mim_refiner_hf.clustering.given_groups import group_as_given, log_odds_of


def blobs(
    count: int, groups: int, noise: float, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (N, 12) around directions, and their true groups (N,)."""
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(groups, 12, generator=generator), dim=1)
    labels = torch.arange(count) % groups
    return directions[labels] + noise * torch.randn(count, 12, generator=generator), labels


def unit(rows: torch.Tensor) -> np.ndarray:
    return F.normalize(rows, dim=1).double().numpy()


def test_given_rows_stay_and_others_go_to_the_nearest_mean() -> None:
    rows, labels = blobs(300, 5, 0.25)
    given = labels.clone()
    given[200:] = -1
    # by hand to where the features would not have them
    given[:7] = 3
    groups = group_as_given(rows, given, 5)

    known = given >= 0
    means = np.stack([unit(rows)[(given == group).numpy()].mean(0) for group in range(5)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    expected = np.where(known, given, (unit(rows) @ means.T).argmax(1))
    assert groups.assignments.tolist() == expected.tolist()
    np.testing.assert_allclose(groups.centroids.numpy(), means, atol=1e-6)
    squares = ((unit(rows) - means[expected]) ** 2).sum()
    assert groups.inertia == pytest.approx(squares, rel=1e-5)

    again, _ = groups.assign(rows)
    assert torch.equal(again[~known], groups.assignments[~known])


def test_log_odds_of_any_group_are_those_of_the_posterior() -> None:
    rows, labels = blobs(50, 4, 0.4)
    centres = F.normalize(torch.randn(4, 12), dim=1)
    asked = labels.roll(1)
    found = log_odds_of(F.normalize(rows, dim=1), centres, asked, 0.07)

    logits = unit(rows) @ unit(centres).T / 0.07
    own = log_softmax(logits, axis=1)[np.arange(50), asked]
    others = np.where(np.eye(4, dtype=bool)[asked], -np.inf, log_softmax(logits, axis=1))
    np.testing.assert_allclose(found, own - logsumexp(others, axis=1), atol=1e-3)


def test_the_confidence_is_the_share_of_second_clusterings_that_agree() -> None:
    """Second clusterings that had no part in it, by scikit-learn from two thirds of the rows."""
    rows, labels = blobs(900, 6, 0.5, seed=3)
    given = labels.clone()
    given[600:] = -1
    groups = group_as_given(rows, given, 6)
    points = unit(rows)

    stays = []
    for seed in range(20):
        chosen = np.random.default_rng(100 + seed).permutation(900)[:600]
        start = groups.centroids.double().numpy()
        second = KMeans(6, init=start, n_init=1).fit(points[chosen])
        directions = second.cluster_centers_
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        stays.append((points @ directions.T).argmax(1) == groups.assignments.numpy())
    shares = np.mean(stays, axis=0)

    confidence = groups.confidence.numpy()
    assert abs(confidence.mean() - shares.mean()) < 0.05
    order = confidence.argsort()
    gaps = [abs(confidence[part].mean() - shares[part].mean()) for part in np.array_split(order, 5)]
    assert np.mean(gaps) < 0.07, gaps
    # the posterior alone is not that
    assert groups.calibration is not None


def test_a_row_that_was_moved_by_hand_is_not_sure() -> None:
    rows, labels = blobs(200, 4, 0.15)
    given = labels.clone()
    given[0] = 2
    groups = group_as_given(rows, given, 4)
    assert groups.assignments[0] == 2
    assert groups.confidence[0] < 0.3 < 0.8 < groups.confidence[1:].median()


@pytest.mark.parametrize("groups", [1, 2])
def test_few_rows_and_few_groups(groups: int) -> None:
    rows, labels = blobs(groups, groups, 0.1)
    found = group_as_given(rows, labels, groups)
    assert found.assignments.tolist() == list(range(groups))
    assert bool(((found.confidence > 0) & (found.confidence <= 1)).all())


def test_it_is_saved_as_other_groups_are(tmp_path: Path) -> None:
    rows, labels = blobs(90, 3, 0.3)
    groups = group_as_given(rows, labels, 3)
    groups.save(tmp_path / "g.safetensors")
    new, _ = blobs(20, 3, 0.3, seed=9)
    for one, two in zip(
        Clustering.load(tmp_path / "g.safetensors").assign(new), groups.assign(new), strict=True
    ):
        assert torch.equal(one, two)


def test_the_result_does_not_depend_on_the_run() -> None:
    rows, labels = blobs(120, 3, 0.6)
    one = group_as_given(rows, labels, 3, seed=4).confidence
    assert torch.equal(one, group_as_given(rows, labels, 3, seed=4).confidence)


@pytest.mark.parametrize(
    "given", [[0, 0, 1, 5], [0, 0, 0, -1], [0, 1, 1], [-1, -1, -1, -1]], ids=str
)
def test_groups_that_cannot_be_are_refused(given: list[int]) -> None:
    with pytest.raises(ValueError, match=r"given has shape .* but must hold a group from 0 to 1"):
        group_as_given(torch.randn(4, 3), torch.tensor(given), 2)


def test_rows_that_are_not_finite_are_refused() -> None:
    rows = torch.randn(4, 3)
    rows[2, 1] = torch.nan
    with pytest.raises(ValueError, match="1 of 4 rows hold NaN"):
        group_as_given(rows, torch.tensor([0, 1, 0, 1]), 2)
