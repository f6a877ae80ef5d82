"""The proposed number of groups.

Planted ones found, no answer where there is none, the measures against scikit-learn's.
"""

import math
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_rand_score, silhouette_score
from torch import Tensor

from mim_refiner_hf.clustering.cluster_count import (
    adjusted_rand,
    propose_num_clusters,
    silhouette,
)

# it takes half a minute to import
pytestmark = pytest.mark.usefixtures("without_umap")


def planted(groups: int, width: int = 24, apart: float = 9.0, rows: int = 600) -> Tensor:
    centres = F.normalize(torch.randn(groups, width), dim=1) * apart / 2**0.5
    return centres[torch.arange(rows) % groups] + torch.randn(rows, width)


@pytest.mark.parametrize("groups", [2, 3, 5, 11, 20])
def test_planted_groups_are_found(groups: int) -> None:
    proposal = propose_num_clusters(planted(groups))
    assert proposal.clear, proposal.reason
    assert proposal.num_clusters == groups
    assert proposal.interval is not None and proposal.interval[0] <= groups <= proposal.interval[1]
    assert [entry["k"] for entry in proposal.evidence] == sorted(
        {entry["k"] for entry in proposal.evidence}
    )


@pytest.mark.parametrize("width", [8, 64])
def test_a_uniform_ball_has_no_clear_answer(width: int) -> None:
    rows = F.normalize(torch.randn(800, width), dim=1) * torch.rand(800, 1) ** (1 / width)
    proposal = propose_num_clusters(rows)
    assert not proposal.clear and len(proposal.reason) > 20


def test_groups_that_overlap_are_not_counted_with_confidence() -> None:
    proposal = propose_num_clusters(planted(6, apart=1.5))
    assert not proposal.clear


def test_given_candidates_are_the_ones_tried() -> None:
    proposal = propose_num_clusters(planted(4), candidates=[3, 8, 4])
    assert [entry["k"] for entry in proposal.evidence] == [3, 4, 8] and proposal.num_clusters == 4
    for wrong in ([1, 3], [400], []):
        with pytest.raises(ValueError, match="candidates"):
            propose_num_clusters(planted(4), candidates=wrong)


def test_the_seed_alone_decides_and_the_sample_is_bounded() -> None:
    rows = planted(5, rows=900)
    first, second = (propose_num_clusters(rows, seed=3, max_samples=400) for _ in range(2))
    assert first == second and first.num_clusters == 5
    assert first.evidence[-1]["k"] <= 40


def test_bad_rows_and_few_rows_are_told() -> None:
    few = propose_num_clusters(torch.randn(7, 4))
    assert (
        few.num_clusters is None
        and few.interval is None
        and not few.clear
        and "7 rows" in few.reason
    )
    with pytest.raises(ValueError, match="1 of 40 rows hold NaN"):
        propose_num_clusters(torch.randn(40, 4).index_fill_(0, torch.tensor([5]), math.nan))
    same = propose_num_clusters(torch.ones(60, 4))
    assert same.num_clusters is None and not same.clear


class StandIn:
    """Takes UMAP's place: the first columns."""

    def __init__(self, n_components: int, **settings: object) -> None:
        self.columns = n_components

    def fit_transform(self, points: np.ndarray) -> np.ndarray:
        return points[:, : self.columns]


def test_umap_is_evidence_and_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = planted(4, rows=200)
    without = propose_num_clusters(rows, candidates=[3, 4, 5])
    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=StandIn))
    found = propose_num_clusters(rows, candidates=[3, 4, 5])
    assert all("silhouette_umap" in entry for entry in found.evidence)
    assert [{**entry, "silhouette_umap": 0} for entry in found.evidence] == [
        {**entry, "silhouette_umap": 0} for entry in without.evidence
    ]
    assert (found.num_clusters, found.interval, found.clear) == (
        without.num_clusters,
        without.interval,
        without.clear,
    )


def test_the_silhouette_after_umap_is_highest_for_planted_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "umap")
    pytest.importorskip("umap", reason="needs umap-learn: pip install umap-learn")
    evidence = propose_num_clusters(planted(3, rows=150), candidates=[2, 3, 5]).evidence
    assert max(evidence, key=lambda entry: entry["silhouette_umap"])["k"] == 3


def test_measures_equal_scikit_learns() -> None:
    rows, one, two = torch.randn(80, 5), torch.randint(6, (80,)), torch.randint(4, (80,))
    one[:3] = torch.tensor([7, 8, 8])  # a group of one, an empty one
    one[one == 2] = 3
    assert silhouette(torch.cdist(rows, rows), one, 9) == pytest.approx(
        silhouette_score(rows, one), abs=1e-5
    )
    assert adjusted_rand(one, two) == pytest.approx(adjusted_rand_score(one, two))
    assert adjusted_rand(one, one) == 1 == adjusted_rand(one * 0, one * 0)
