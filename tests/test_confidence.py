"""Confidence: what it says is what second clusterings do; its file; what it is for a new row."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mim_refiner_hf.clustering import ArrayBatches, Clustering, kmeans, merged, train_heads
from mim_refiner_hf.clustering.confidence import (
    Calibration,
    agreement,
    fitted,
    renamed,
    second_clusterings,
)


def cloud(rows: int = 800, width: int = 12) -> Tensor:
    """One cloud: k-means cuts it up, each time elsewhere."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def far_apart() -> Tensor:
    """Four groups that nobody could confuse."""
    generator = torch.Generator().manual_seed(0)
    return 10 * torch.eye(4).repeat(50, 1) + 0.1 * torch.randn(200, 4, generator=generator)


def stays(groups: Clustering, rows: Tensor, seeds: range, share: float = 1.0) -> Tensor:
    """Of each row how often it stays in its group, learnt by other seeds from a share of them."""
    number = len(groups.centroids)
    seconds = []
    for seed in seeds:
        part = rows[torch.randperm(len(rows))[: round(share * len(rows))]]
        seconds.append(kmeans(part, number, seed=seed, refits=0).assign(rows)[0])
    return agreement(groups.assignments, seconds, number)


@pytest.mark.parametrize("number", [5, 12])
def test_the_confidence_is_the_share_that_stays(number: int) -> None:
    rows = cloud()
    groups = kmeans(rows, number)
    share = stays(groups, rows, range(100, 116))
    of_part = stays(groups, rows, range(100, 116), share=2 / 3)
    # one number between both
    confidence = float(groups.confidence.mean())
    assert float(of_part.mean()) - 0.05 < confidence < float(share.mean()) + 0.05
    sure = groups.confidence > groups.confidence.median()
    assert share[sure].mean() > share[~sure].mean()


def test_groups_far_apart_are_sure_and_their_borders_are_not() -> None:
    rows = far_apart()
    groups = kmeans(rows, 4)
    assert groups.confidence.min() > 0.95
    border = groups.centroids[:2].mean(0)
    _, confidence = groups.assign(torch.stack([border, groups.centroids[2]]))
    assert confidence[0] < 0.6 < 0.95 < confidence[1]


def test_cluster_heads_have_it_too(tmp_path: Path) -> None:
    rows = cloud(300)
    groups = train_heads(rows, 5, heads=2, steps=20, refits=2)
    alone = train_heads(rows, 5, heads=2, steps=20, refits=0)
    assert torch.equal(groups.assignments, alone.assignments)
    assert groups.calibration is not None and alone.calibration is None
    groups.save(tmp_path / "groups.safetensors")
    labels, confidence = Clustering.load(tmp_path / "groups.safetensors").assign(rows)
    assert torch.equal(labels, groups.assignments)
    torch.testing.assert_close(confidence, groups.confidence, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="refits=-1 must be at least 0"):
        train_heads(rows, 5, refits=-1)


def test_it_is_kept_in_the_file_and_old_files_load(tmp_path: Path) -> None:
    rows = cloud(200)
    groups = kmeans(rows, 6)
    path = tmp_path / "groups.safetensors"
    groups.save(path)
    loaded = Clustering.load(path)
    assert loaded.calibration is not None and groups.calibration is not None
    assert loaded.calibration.slope == groups.calibration.slope
    assert torch.equal(loaded.calibration.offsets, groups.calibration.offsets)
    torch.testing.assert_close(loaded.assign(rows)[1], groups.confidence)

    # a file of format 1 holds no calibration: there the confidence is the posterior
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata()) | {"format": "mim_refiner_hf.clustering.1"}
    tensors = load_file(path)
    del tensors["calibration.offsets"], metadata["slope"]
    save_file(tensors, path, metadata=metadata)
    old = Clustering.load(path)
    assert old.calibration is None
    expected = replace(groups, calibration=None).assign(rows)[1]
    torch.testing.assert_close(old.assign(rows)[1], expected)


def test_it_is_a_function_of_the_seed_and_the_same_from_batches() -> None:
    rows = cloud(300)
    first = kmeans(rows, 5, seed=3)
    torch.manual_seed(1)
    assert torch.equal(first.confidence, kmeans(rows, 5, seed=3).confidence)
    streamed = kmeans(ArrayBatches(rows, rows_per_batch=70), 5, seed=3)
    torch.testing.assert_close(streamed.confidence, first.confidence, rtol=0, atol=1e-4)


def test_edges() -> None:
    assert kmeans(cloud(12), 1).confidence.tolist() == [1.0] * 12
    two = kmeans(torch.eye(2), 2)
    assert bool(two.confidence.isfinite().all())
    alike = kmeans(torch.ones(30, 4), 3)
    assert bool(((alike.confidence > 0) & (alike.confidence <= 1)).all())
    given = kmeans(cloud(60), 3, initial=cloud(3))
    assert given.calibration is not None
    with pytest.raises(ValueError, match="refits=-1 must be at least 0"):
        kmeans(cloud(60), 3, refits=-1)


def test_joined_groups_keep_a_calibration() -> None:
    groups = kmeans(cloud(), 6)
    coarse = merged(groups, 2)
    assert coarse.calibration is not None and len(coarse.calibration.offsets) == 2
    _, confidence = coarse.assign(cloud())
    assert bool(((confidence > 0) & (confidence < 1)).all())
    joined = Calibration(1.0, torch.tensor([1.0, 2.0, 4.0])).joined(
        torch.tensor([0, 0, -1]), torch.tensor([3, 1, 0])
    )
    assert joined.offsets.tolist() == [1.25]


def test_groups_are_matched_one_to_one() -> None:
    first = torch.tensor([0, 0, 0, 1, 1, 2])
    second = torch.tensor([2, 2, 1, 0, 0, 0])
    # group 0 shares two rows with 1 and one with 2; each name is given once
    assert renamed(second, first, 3).tolist() == [0, 0, -1, 1, 1, 1]
    assert agreement(first, [second, first], 3).tolist() == [1, 1, 0.5, 1, 1, 0.5]


def test_three_of_four_second_clusterings_learn_from_some_rows() -> None:
    sizes = []

    def again(part: Tensor, seed: int) -> Tensor:
        sizes.append(len(part))
        return torch.zeros(60, dtype=torch.int64)

    second_clusterings(cloud(60), 3, again, 4, seed=0, resample=False)
    assert sizes == [60, 40, 40, 40]


def test_nearer_to_the_border_is_never_surer() -> None:
    odds = torch.linspace(0, 5, 100)
    falling = 1 - odds / 6
    calibration = fitted(torch.zeros(100, dtype=torch.int64), odds, falling, 1)
    assert calibration.slope == 0
