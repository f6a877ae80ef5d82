"""k-NN classification against the authors' code and a slow reading of the protocol."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import facts, tensors
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from mim_refiner_hf.evaluation import knn, knn_accuracy, knn_predict, search, standardise

Golden = tuple[dict[str, Tensor], dict[str, Tensor], dict]


@pytest.fixture(scope="module")
def golden(goldens: Path) -> Golden:
    return *tensors("knn"), facts("knn", "expected.json")


def slow_knn(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, k: int, temperature: float
) -> list[int]:
    """One test row at a time, in float64."""
    train_x = train_x / np.linalg.norm(train_x, axis=1, keepdims=True)
    predicted = []
    for row in test_x:
        similarity = train_x @ (row / np.linalg.norm(row))
        votes = np.zeros(train_y.max() + 1)
        for neighbour in np.argsort(-similarity)[:k]:
            votes[train_y[neighbour]] += math.exp(similarity[neighbour] / temperature)
        predicted.append(int(votes.argmax()))
    return predicted


def test_accuracy_equals_the_authors(golden: Golden) -> None:
    inputs, _, expected = golden
    data = [inputs[name] for name in ("train_x", "train_y", "test_x", "test_y")]
    for k, accuracy in expected["eval_knn_torchhub"].items():
        found = knn_accuracy(*data, k=int(k), temperature=expected["tau"])
        assert found == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize("standardised", [True, False])
def test_every_k_and_temperature_equal_the_authors(golden: Golden, standardised: bool) -> None:
    inputs, _, expected = golden
    accuracies = expected["multiclass_knn" if standardised else "multiclass_knn_no_standardisation"]
    settings = [key.split(",") for key in accuracies]
    ks = sorted({int(k) for k, _ in settings})
    temperatures = sorted({float(tau) for _, tau in settings})

    train_x, test_x = inputs["train_x"], inputs["test_x"]
    if standardised:
        train_x, test_x = standardise(train_x, test_x)
    found = knn_predict(train_x, inputs["train_y"], test_x, k=ks, temperature=temperatures)
    assert {f"{k},{tau:g}" for k, tau in found} == set(accuracies)
    for (k, tau), predicted in found.items():
        accuracy = (predicted == inputs["test_y"]).float().mean().item()
        assert accuracy == pytest.approx(accuracies[f"{k},{tau:g}"], abs=1e-6)


# in one tile, in several, in tiles of fewer rows than there are neighbours
@pytest.mark.parametrize("bank", [2**14, 100, 13])
def test_predictions_equal_the_authors_in_any_tiles(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, bank: int
) -> None:
    inputs, outputs, expected = golden
    train_x, test_x = standardise(inputs["train_x"], inputs["test_x"])
    # rows in several tiles, the last one short
    tile = next(size for size in (37, 36) if len(test_x) % size)
    monkeypatch.setattr(search, "QUERIES_AT_ONCE", tile)
    monkeypatch.setattr(search, "BANK_AT_ONCE", bank)

    ks = [int(k) for k in expected["eval_knn_torchhub"]]
    found = knn_predict(train_x, inputs["train_y"], test_x, k=ks, temperature=(expected["tau"],))
    for (k, tau), predicted in found.items():
        assert torch.equal(predicted, outputs[f"predictions.k{k}.t{tau:g}"])


@pytest.mark.parametrize("k", [1, 7, 40, 500])
@pytest.mark.parametrize("columns", [500, 1031, 4096])
def test_the_search_by_blocks_is_a_sort(columns: int, k: int) -> None:
    distinct = torch.randn(5, columns)
    values, places = search.largest(distinct, k)
    order = distinct.argsort(dim=1, descending=True)[:, :k]
    assert torch.equal(places, order) and torch.equal(values, distinct.gather(1, order))
    ties = torch.randint(4, (5, columns)).float()
    values, places = search.largest(ties, k)
    assert torch.equal(values, ties.sort(dim=1, descending=True).values[:, :k])
    # of equal entries the first
    assert torch.equal(places, ties.sort(dim=1, descending=True, stable=True).indices[:, :k])


# the last more than a tile holds
@pytest.mark.parametrize("k", [1, 7, 90])
@pytest.mark.parametrize("order", ["random", "nearer and nearer", "farther and farther", "ties"])
def test_the_search_over_tiles_is_a_sort(
    monkeypatch: pytest.MonkeyPatch, order: str, k: int
) -> None:
    monkeypatch.setattr(search, "BANK_AT_ONCE", 70)
    angles = torch.rand(500, dtype=torch.float64) * 3
    if order == "ties":
        angles = angles.round(decimals=1)
    elif order != "random":
        angles = angles.sort(descending=order == "nearer and nearer").values
    bank, rows = (
        torch.stack([angles.cos(), angles.sin()], dim=1),
        torch.tensor([[2.0, 0.0], [1.0, 0.01]], dtype=torch.float64),
    )
    values, places = search.nearest(rows, bank, k)
    cosines = torch.cosine_similarity(rows[:, None], bank[None], dim=2)
    torch.testing.assert_close(
        values, cosines.sort(dim=1, descending=True).values[:, :k], atol=1e-12, rtol=0
    )
    torch.testing.assert_close(values, cosines.gather(1, places), atol=1e-12, rtol=0)
    assert all(len(row.unique()) == k for row in places)


@pytest.mark.parametrize("k", [1, 7, 90, 500])
@pytest.mark.parametrize("tile", [70, 2**14])
def test_of_equal_neighbours_the_first_come_first(
    monkeypatch: pytest.MonkeyPatch, tile: int, k: int
) -> None:
    monkeypatch.setattr(search, "BANK_AT_ONCE", tile)
    # 16 different rows, whose cosines are exact
    bank, rows = (torch.randint(2, (count, 4)) * 2.0 - 1 for count in (500, 30))
    expected = (rows @ bank.T / 4).sort(dim=1, descending=True, stable=True)
    values, places = search.nearest(rows, bank, k)
    assert torch.equal(values, expected.values[:, :k])
    assert torch.equal(places, expected.indices[:, :k])


def test_neighbours_equal_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BANK_AT_ONCE", 300)
    bank, rows = torch.randn(2000, 12), torch.randn(50, 12)
    values, places = search.nearest(rows, bank, 20)
    slow = NearestNeighbors(n_neighbors=20, metric="cosine", algorithm="brute").fit(bank.numpy())
    distances, expected = slow.kneighbors(rows.numpy())
    assert places.tolist() == expected.tolist()
    np.testing.assert_allclose(values.numpy(), 1 - distances, atol=1e-6)


def test_no_row_is_a_neighbour_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "QUERIES_AT_ONCE", 30)
    monkeypatch.setattr(search, "BANK_AT_ONCE", 50)
    rows = torch.randn(101, 3, dtype=torch.float64)
    values, places = search.nearest(rows, rows, 100, exclude_self=True)
    cosines = torch.cosine_similarity(rows[:, None], rows[None], dim=2).fill_diagonal_(-math.inf)
    expected, order = cosines.sort(dim=1, descending=True)
    torch.testing.assert_close(values, expected[:, :100], atol=1e-12, rtol=0)
    assert torch.equal(places, order[:, :100])


def test_the_spread_is_the_unbiased_standard_deviation() -> None:
    train, test = 3 * torch.randn(500, 6) + 7, torch.randn(10, 6)
    mean, std = train.double().mean(dim=0), train.double().std(dim=0) + 1e-6
    for found, rows in zip(standardise(train, test), (train, test), strict=True):
        torch.testing.assert_close(found, ((rows - mean) / std).float(), atol=1e-5, rtol=0)


def test_statistics_of_tiles_are_those_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    # far from zero, where a sum of squares would lose digits; the mean drifts from tile to tile
    rows = torch.randn(503, 6) + torch.arange(503)[:, None] / 50 + 1000
    monkeypatch.setattr(knn, "_ROWS_AT_ONCE", 64)
    for correction in (0, 1):
        mean, deviation = knn.channel_statistics(rows, correction)
        torch.testing.assert_close(mean, rows.double().mean(dim=0).float(), rtol=1e-6, atol=0)
        expected = rows.double().std(dim=0, correction=correction).float()
        torch.testing.assert_close(deviation, expected, rtol=1e-5, atol=0)


def test_a_sharp_temperature_neither_overflows_nor_changes_the_vote(golden: Golden) -> None:
    inputs, _, _ = golden
    found = knn_predict(
        inputs["train_x"], inputs["train_y"], inputs["test_x"], temperature=(0.01,)
    )[10, 0.01]
    slow = slow_knn(
        *(inputs[name].double().numpy() for name in ("train_x",)),
        inputs["train_y"].numpy(),
        inputs["test_x"].double().numpy(),
        10,
        0.01,
    )
    assert found.tolist() == slow


def test_uniform_votes_that_tie_go_to_the_lowest_class() -> None:
    train_x = torch.tensor([[1.0, 0.1], [1.0, -0.2], [0.1, 1.0], [-0.2, 1.0]])
    test_x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = knn_predict(
        train_x, torch.tensor([3, 1, 2, 0]), test_x, k=(2, 4), temperature=(math.inf,)
    )
    assert found[2, math.inf].tolist() == [1, 0]
    assert found[4, math.inf].tolist() == [0, 0]


def test_a_constant_channel_does_not_matter() -> None:
    train, test = torch.randn(40, 6), torch.randn(10, 6)
    train[:, 2] = test[:, 2] = 5.0
    standard_train, standard_test = standardise(train, test)
    assert standard_train.isfinite().all() and standard_test[:, 2].abs().max() == 0
    torch.testing.assert_close(standard_train[:, :2].std(dim=0), torch.ones(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (41,)}, r"k=\(41,\) must lie between 1 and the 40 training rows"),
        ({"k": (0,)}, "must lie between 1"),
        ({"temperature": (0.0,)}, r"temperature=\(0\.0,\) must be positive"),
        ({"test_x": torch.zeros(3, 5)}, r"of one width, not \(40, 6\) and \(3, 5\)"),
        ({"test_x": torch.zeros(0, 6)}, "at least one training and one test row"),
        ({"train_y": torch.zeros(39, dtype=torch.int64)}, "one label per training row"),
        ({"train_y": torch.full((40,), -1)}, "negative labels"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {
        "train_x": torch.randn(40, 6),
        "train_y": torch.arange(40) % 4,
        "test_x": torch.randn(3, 6),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        knn_predict(**arguments)
