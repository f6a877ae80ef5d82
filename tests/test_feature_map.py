"""The flat map of features.

PCA against scikit-learn's, UMAP where umap-learn is installed, and who falls back on what.
"""

import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor

from mim_refiner_hf.evaluation.feature_map import UMAP_FROM, cosine_components, flat_map
from mim_refiner_hf.publishing import cluster_page


def planted(rows: int = 150, groups: int = 3, width: int = 20) -> Tensor:
    """Rows of changing length around a few directions; row i is of group i % groups."""
    centres = F.normalize(torch.randn(groups, width), dim=1)
    return (centres[torch.arange(rows) % groups] + 0.05 * torch.randn(rows, width)) * (
        1 + torch.rand(rows, 1)
    )


class StandIn:
    """Takes UMAP's place: the settings it was given, and rows that say so."""

    settings: dict[str, object] = {}

    def __init__(self, **settings: object) -> None:
        StandIn.settings = settings

    def fit_transform(self, points: np.ndarray) -> np.ndarray:
        # Euclidean distances follow the cosine
        assert np.allclose(np.linalg.norm(points, axis=1), 1, atol=1e-5)
        return points[:, :2].astype(np.float64)


@pytest.mark.usefixtures("without_umap")
@pytest.mark.parametrize("rows", [12, 300])
def test_without_umap_it_is_scikit_learns_pca(rows: int) -> None:
    features = planted(rows).bfloat16()
    expected = PCA(5).fit_transform(F.normalize(features.float(), dim=1).double().numpy())
    ours = cosine_components(features, 5).numpy()
    # the sign of a direction is free
    assert np.allclose(np.abs(ours), np.abs(expected), atol=1e-4)
    points, method = flat_map(features)
    assert method == "PCA" and np.allclose(points, ours[:, :2], atol=1e-6)


def test_dimensions_that_are_not_there_are_zeros() -> None:
    found = cosine_components(planted(9, width=3), 8)
    assert found.shape == (9, 8) and (found[:, 3:] == 0).all() and (found[:, :2].std(0) > 0).all()
    assert flat_map(torch.ones(4, 3))[0].shape == (4, 2)


def test_with_umap_it_is_asked_from_a_hundred_images_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=StandIn))
    points, method = flat_map(planted(UMAP_FROM), seed=7)
    assert method == "UMAP" and points.shape == (UMAP_FROM, 2) and points.dtype == torch.float32
    assert StandIn.settings["random_state"] == 7 and StandIn.settings["n_components"] == 2
    assert flat_map(planted(UMAP_FROM - 1))[1] == "PCA"


def test_umap_keeps_groups_apart_and_the_seed_decides() -> None:
    pytest.importorskip("umap", reason="needs umap-learn: pip install umap-learn")
    features = planted()
    points, method = flat_map(features, seed=1)
    assert method == "UMAP" and torch.equal(points, flat_map(features, seed=1)[0])
    nearest = torch.cdist(points, points).fill_diagonal_(torch.inf).argmin(1)
    assert (nearest % 3 == torch.arange(150) % 3).float().mean() > 0.95


@pytest.mark.usefixtures("without_umap")
def test_the_page_says_how_its_map_was_made() -> None:
    square = cluster_page.unit_square(torch.tensor([[-1.0, 5], [3, 5], [1, 5]]))
    assert square.tolist() == [[0, 0], [1, 0], [0.5, 0]]
    tile = cluster_page.Tile("a.png", 0, 1.0, b"", None)
    assert "(PCA)" in cluster_page.render_page("photos", "one", [tile] * 3, planted(3), [3])
