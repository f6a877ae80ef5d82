"""Clustering scores against clustpy and scikit-learn, k-means against scikit-learn's, RankMe
against its definition.
"""

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import facts
from safetensors.numpy import load_file
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor

from mim_refiner_hf.evaluation import cluster_accuracy, cluster_scores, kmeans_runs, rankme


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.tensor(load_digits().data[:500], dtype=torch.float32)


@pytest.mark.parametrize("case", facts("cluster-metrics", "expected.json").get("cases", []))
def test_scores_equal_clustpy_and_scikit_learn(goldens: Path, case: dict[str, Any]) -> None:
    inputs = load_file(goldens / "cluster-metrics" / "inputs.safetensors")
    labels, groups, embeddings = (
        inputs[f"{case['name']}.{name}"] for name in ("labels", "pred", "embeddings")
    )
    found = cluster_scores(labels, groups, embeddings)
    names = {
        "accuracy": "acc",
        "silhouette": "silhouette_labels",
        "davies_bouldin": "davies_bouldin_labels",
    }
    assert set(found) == {"accuracy", "nmi", "ami", "ari", "silhouette", "davies_bouldin"}
    for name, value in found.items():
        assert value == pytest.approx(case[names.get(name, name)], abs=1e-6), name


@pytest.mark.parametrize("num_groups", [2, 4, 6])
def test_accuracy_is_the_best_over_all_matches(num_groups: int) -> None:
    rng = np.random.default_rng(num_groups)
    labels, groups = rng.integers(0, 4, 60), rng.integers(0, num_groups, 60)
    slots = max(4, num_groups)
    best = max(np.mean([match[group] == label for group, label in zip(groups, labels, strict=True)])
               for match in itertools.permutations(range(slots)))  # fmt: skip
    assert cluster_accuracy(labels, groups) == pytest.approx(best)
    # ids are only names
    assert cluster_accuracy(labels * 7, groups - 100) == pytest.approx(best)


@pytest.mark.parametrize("none", [-1, -100, np.nan, None, ""])
def test_items_without_a_label_are_left_out_and_counted(
    none: Any, caplog: pytest.LogCaptureFixture
) -> None:
    truth = np.arange(60) % 4
    has_one = np.arange(60) % 5 > 0
    labels = [int(label) if one else none for label, one in zip(truth, has_one, strict=True)]
    groups = np.where(has_one, truth + 7, 0)
    assert cluster_accuracy(labels, groups) == 1.0
    assert "12 of 60 items have no label; the score is that of the other 48" in caplog.text
    with pytest.raises(ValueError, match="none of the 3 items has a label"):
        cluster_scores([none] * 3, [0, 1, 1])


def test_scores_refuse_lists_of_different_length() -> None:
    with pytest.raises(ValueError, match=r"one length, not \(3,\) and \(2,\)"):
        cluster_scores([0, 1, 2], [0, 1])


def test_kmeans_finds_what_many_full_runs_find(digits: Tensor) -> None:
    run = kmeans_runs(digits, 10, runs=20)
    points = torch.nn.functional.normalize(digits, dim=1).numpy()
    full = KMeans(10, n_init=20, random_state=0).fit(points)
    assert run.inertia <= 1.02 * full.inertia_
    distances = ((points[:, None] - run.centroids[None]) ** 2).sum(-1)  # (N, K)
    assert np.array_equal(run.assignments, distances.argmin(axis=1))
    assert run.inertia == pytest.approx(distances.min(axis=1).sum(), rel=1e-4)  # over the whole set


def test_kmeans_returns_its_best_run_and_depends_on_the_seed_alone(digits: Tensor) -> None:
    run = kmeans_runs(digits, 10, runs=5, seed=3)
    single = [kmeans_runs(digits, 10, runs=1, seed=seed) for seed in range(3, 8)]
    assert run.inertia == min(one.inertia for one in single)
    assert np.array_equal(run.all_assignments, np.stack([one.assignments for one in single]))
    assert np.array_equal(
        run.assignments, single[int(np.argmin([one.inertia for one in single]))].assignments
    )
    assert np.array_equal(
        kmeans_runs(digits * 100, 10, runs=5, seed=3).assignments, run.assignments
    )  # length does not count


def test_one_hundred_runs_take_seconds() -> None:
    centres = 2 * torch.randn(10, 96)
    features = centres[torch.arange(500) % 10] + torch.randn(500, 96)
    start = time.process_time()
    run = kmeans_runs(features, 10)
    assert time.process_time() - start < 8  # 2.5 s on one free core
    assert run.all_assignments.shape == (100, 500)
    assert cluster_accuracy(torch.arange(500) % 10, run.assignments) > 0.95


@pytest.mark.parametrize(
    ("features", "arguments", "message"),
    [
        (
            torch.randn(5, 3),
            {"num_clusters": 6},
            "num_clusters=6 must lie between 1 and the 5 items",
        ),
        (torch.randn(5, 3), {"num_clusters": 0}, "num_clusters=0"),
        (torch.randn(5, 3), {"num_clusters": 2, "runs": 0}, "runs=0"),
        (torch.full((5, 3), float("nan")), {"num_clusters": 2}, "NaN or infinity"),
    ],
)
def test_kmeans_names_bad_input(features: Tensor, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans_runs(features, **arguments)


def test_rankme_is_the_entropy_of_the_singular_values() -> None:
    features = torch.randn(200, 12) * torch.linspace(0.1, 3, 12)
    sigma = np.sqrt(np.linalg.eigvalsh((features.T @ features).double().numpy()))
    share = sigma / sigma.sum()
    assert rankme(features) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)


def test_rankme_between_collapse_and_full_rank() -> None:
    assert rankme(torch.eye(16).repeat(4, 1)) == pytest.approx(16, rel=1e-4)
    assert rankme(torch.randn(64, 1) @ torch.randn(1, 16)) == pytest.approx(1, rel=1e-3)
    assert np.isfinite(rankme(torch.zeros(8, 4)))


def test_features_of_items_without_a_label_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    generator = np.random.default_rng(0)
    labels, groups = generator.integers(0, 3, 40), generator.integers(0, 3, 40)
    points = generator.normal(size=(40, 4))
    expected = cluster_scores(labels, groups, points)
    mixed = np.concatenate([labels, np.full(9, -1)])
    order = generator.permutation(49)
    others = np.concatenate([groups, np.zeros(9, int)])
    far = np.concatenate([points, np.full((9, 4), 100.0)])
    found = cluster_scores(mixed[order], others[order], far[order])
    assert found == pytest.approx(expected)
    assert caplog.text.count("9 of 49") == 1
    with pytest.raises(ValueError, match=r"embeddings must be 40 rows, .* not \(39, 4\)"):
        cluster_scores(labels, groups, points[1:])
