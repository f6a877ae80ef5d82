"""The modules for `evaluate`.

Each loads by its path without a network, and agrees with an independent implementation.
"""

import configparser
import doctest
import itertools
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.neighbors import KNeighborsClassifier

from mim_refiner_hf.evaluation import cluster_accuracy, knn_accuracy, rankme

ROOT = Path(__file__).resolve().parents[1]
METRICS = ROOT / "mim_refiner_hf/metrics"
NAMES = sorted(
    path.name for path in METRICS.iterdir() if path.is_dir() and path.name != "__pycache__"
)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Any]:
    return lambda name: evaluate.load(str(METRICS / name), cache_dir=str(tmp_path))


def test_there_is_one_for_each_score_without_a_scikit_learn_twin() -> None:
    assert NAMES == ["cluster_accuracy", "knn_accuracy", "rankme"]


@pytest.mark.parametrize("groups", [3, 4, 6])
def test_cluster_accuracy_is_that_of_the_best_of_all_matches(
    groups: int, load: Callable[[str], Any]
) -> None:
    rng = np.random.default_rng(groups)
    labels = rng.integers(0, 4, 60)
    assignments = np.where(rng.random(60) < 0.5, labels % groups, rng.integers(0, groups, 60))
    size = max(4, groups)
    best = max(
        (np.array(names)[assignments] == labels).mean()
        for names in itertools.permutations(range(size))
    )
    found = load("cluster_accuracy").compute(predictions=assignments, references=labels)
    assert found == {"cluster_accuracy": pytest.approx(best, abs=1e-12)}
    assert found["cluster_accuracy"] == cluster_accuracy(labels, assignments)


@pytest.mark.parametrize(("k", "temperature"), [(10, 0.07), (3, 0.5)])
def test_knn_accuracy_equals_scikit_learn(
    k: int, temperature: float, load: Callable[[str], Any]
) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 260)
    features = (rng.normal(size=(5, 16))[labels] + 2.0 * rng.normal(size=(260, 16))).astype(
        np.float32
    ) * np.arange(1, 17)
    features = features.astype(np.float32)
    train, test = slice(0, 200), slice(200, 260)
    scaled = (features - features[train].mean(0)) / (features[train].std(0, ddof=1) + 1e-6)

    def votes(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / temperature)

    theirs = KNeighborsClassifier(k, metric="cosine", weights=votes).fit(
        scaled[train], labels[train]
    )
    settings = {} if (k, temperature) == (10, 0.07) else {"k": k, "temperature": temperature}
    metric, bank = (
        load("knn_accuracy"),
        {"train_features": features[train], "train_labels": labels[train]},
    )
    found = metric.compute(predictions=features[test], references=labels[test], **bank, **settings)
    assert found == {
        "knn_accuracy": pytest.approx(theirs.score(scaled[test], labels[test]), abs=1e-6)
    }
    assert 0.3 < found["knn_accuracy"] < 0.99

    tensors = [
        torch.from_numpy(array)
        for array in (features[train], labels[train], features[test], labels[test])
    ]
    assert found["knn_accuracy"] == knn_accuracy(*tensors, k=k, temperature=temperature)
    for rows in (slice(200, 230), slice(230, 260)):  # and in batches, as tensors
        metric.add_batch(
            predictions=torch.from_numpy(features[rows]), references=torch.from_numpy(labels[rows])
        )
    assert metric.compute(**bank, **settings) == found


def test_rankme_is_the_entropy_of_the_singular_values(load: Callable[[str], Any]) -> None:
    features = (np.random.default_rng(0).normal(size=(80, 12)) * np.geomspace(1, 0.01, 12)).astype(
        np.float32
    )
    sigma = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    found = load("rankme").compute(predictions=features)
    assert found == {"rankme": pytest.approx(np.exp(scipy.stats.entropy(sigma)), rel=1e-4)}
    assert found["rankme"] == pytest.approx(rankme(torch.from_numpy(features)), rel=1e-6)
    assert load("rankme").compute(predictions=np.outer(np.arange(1, 9), [1.0, 2.0]))[
        "rankme"
    ] == pytest.approx(1, abs=1e-4)


def test_what_does_not_fit_is_refused(load: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match=r"Mismatch .*predictions.* \(3\).*references.* \(2\)"):
        load("cluster_accuracy").compute(predictions=[0, 1, 1], references=[0, 1])
    few = {"train_features": [[0.0, 1.0], [1.0, 0.0]], "train_labels": [0, 1]}
    with pytest.raises(ValueError, match=r"k=\(10,\) must lie between 1 and the 2 training rows"):
        load("knn_accuracy").compute(predictions=[[1.0, 1.0]], references=[0], **few)


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_the_documentation_are_true(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    load: Callable[[str], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    # the paths in the examples are relative to the checkout
    monkeypatch.chdir(ROOT)
    readme = (METRICS / name / "README.md").read_text().replace("```", "")
    described = load(name).inputs_description
    for text in (readme, described):
        examples = doctest.DocTestParser().get_doctest(
            text, {"evaluate": evaluate}, name, None, None
        )
        assert len(examples.examples) >= 2
        assert doctest.DocTestRunner().run(examples).failed == 0, capsys.readouterr().out
    inputs = [
        line.split("(")[0].strip()
        for line in described.splitlines()
        if line.startswith("    ") and " (`" in line
    ]
    inputs += [
        line.split("(")[0].strip()
        for line in described.splitlines()
        if line.startswith("    ") and " (array" in line
    ]
    for word in inputs:
        assert f"- **{word}** (" in readme, word


@pytest.mark.parametrize("name", NAMES)
def test_the_page_ships_with_the_module(name: str) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.package_data"][f"mim_refiner_hf.metrics.{name}"] == "README.md"
