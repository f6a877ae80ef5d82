"""k-means against scikit-learn's, one process against two, memory against disk.

Merging, near-duplicates, saving, assigning.
"""

import math
import socket
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.datasets import load_digits, make_blobs
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from mim_refiner_hf.clustering import ArrayBatches, Clustering, kmeans, merged, near_duplicates
from mim_refiner_hf.clustering.lloyd import best_centroids, highest, stride
from mim_refiner_hf.clustering.merging import merge_tree
from mim_refiner_hf.clustering.row_batches import Rows, column_sums
from mim_refiner_hf.clustering.starts import greedy_starts, principal_directions, start_size


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.tensor(load_digits().data, dtype=torch.float32)


def blobs(
    count: int = 900, groups: int = 9, width: int = 12, spread: float = 1.0
) -> tuple[Tensor, Tensor]:
    rows, labels = make_blobs(count, width, centers=groups, cluster_std=spread, random_state=0)
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(labels)


def as_one_partition(first: Tensor, second: Tensor) -> bool:
    return adjusted_rand_score(first, second) == 1


@pytest.mark.parametrize("iterations", [1, 3, 50])
@pytest.mark.parametrize("num_clusters", [4, 10, 37])
def test_from_the_same_start_scikit_learn_gets_the_same(
    digits: Tensor, num_clusters: int, iterations: int
) -> None:
    # whole numbers lie just as far from two centroids
    digits = digits + 0.1 * torch.randn(digits.shape)
    initial = digits[torch.randperm(len(digits))[:num_clusters]]
    theirs = KMeans(
        num_clusters, init=initial.numpy(), n_init=1, max_iter=iterations, algorithm="lloyd"
    ).fit(digits.numpy())
    ours = kmeans(digits, num_clusters, initial=initial, iterations=iterations, spherical=False)
    assert np.array_equal(ours.assignments, theirs.labels_)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)
    assert np.allclose(ours.centroids, theirs.cluster_centers_, atol=1e-4)


def test_empty_groups_get_the_farthest_rows_as_in_scikit_learn(digits: Tensor) -> None:
    initial = digits[:8].clone()
    initial[2] = 1e3  # nobody's nearest
    initial[5] = -1e3
    theirs = KMeans(8, init=initial.numpy(), n_init=1).fit(digits.numpy())
    ours = kmeans(digits, 8, initial=initial, spherical=False)
    assert ours.counts.min() > 0
    # which empty group gets which row is free
    assert as_one_partition(ours.assignments, torch.tensor(theirs.labels_))
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)


def test_as_many_groups_as_rows_and_fewer_different_rows_than_groups() -> None:
    rows = torch.randn(12, 3)
    groups = kmeans(rows, 12, runs=2, spherical=False)
    assert sorted(groups.assignments.tolist()) == list(
        range(12)
    ) and groups.inertia == pytest.approx(0, abs=1e-9)
    same = kmeans(rows[:2].repeat(10, 1), 5, runs=2)
    assert torch.isfinite(same.centroids).all() and torch.isfinite(same.confidence).all()
    assert (same.counts > 0).sum() == 2 and same.inertia == pytest.approx(0, abs=1e-5)
    assert kmeans(rows, 1).confidence.tolist() == [1.0] * 12


def test_starts_are_as_good_as_scikit_learns_greedy_ones() -> None:
    rows, _ = blobs(2000, groups=30, width=8, spread=1.5)
    # many of each, as the inertia of one start differs by 6 % from that of the next
    starts = greedy_starts(rows, 30, 100, torch.Generator().manual_seed(0))
    ours = np.mean([torch.cdist(rows, start).min(1).values.square().sum() for start in starts])
    theirs = [
        torch.tensor(kmeans_plusplus(rows.numpy(), 30, random_state=seed)[0]) for seed in range(100)
    ]
    theirs = np.mean([torch.cdist(rows, start).min(1).values.square().sum() for start in theirs])
    plain = np.mean(
        [
            torch.cdist(rows, rows[torch.randperm(2000)[:30]]).min(1).values.square().sum()
            for _ in range(20)
        ]
    )
    assert ours < 1.03 * theirs < 0.8 * plain
    assert (
        all(len(start.unique(dim=0)) == 30 for start in starts) and len(starts.unique(dim=0)) == 100
    )


def test_restarts_find_what_many_runs_of_scikit_learn_find(digits: Tensor) -> None:
    rows, labels = blobs(900, groups=25)
    assert as_one_partition(kmeans(rows, 25, spherical=False).assignments, labels)
    theirs = KMeans(10, n_init=10, random_state=0).fit(digits.numpy())
    assert kmeans(digits, 10, spherical=False).inertia <= 1.002 * theirs.inertia_


def test_many_groups_are_found_as_well_as_by_scikit_learn() -> None:
    """There is one restart then; groups that overlap, three for each that is asked for."""
    rows, _ = blobs(9000, groups=600, width=12, spread=1.0)
    theirs = [KMeans(200, n_init=1, random_state=seed).fit(rows.numpy()) for seed in range(3)]
    found = [kmeans(rows, 200, seed=seed, spherical=False, refits=0) for seed in range(3)]
    least = np.mean([each.inertia_ for each in theirs])
    assert np.mean([each.inertia for each in found]) <= 1.002 * least


@pytest.mark.parametrize("spherical", [False, True])
def test_many_groups_that_lie_apart_are_all_found(spherical: bool) -> None:
    """From one restart, along few directions and along all: swaps find what it has missed."""
    for groups, width in ((100, 8), (150, 24)):
        rows, planted = make_blobs(3000, width, centers=groups, cluster_std=0.5, random_state=0)
        for seed in range(3):
            found = kmeans(
                torch.tensor(rows), groups, seed=seed, refits=0, runs=1, spherical=spherical
            )
            assert adjusted_rand_score(planted, found.assignments) > 0.985


def test_strides_end_lower_and_where_every_centroid_is_a_mean() -> None:
    rows, _ = blobs(6000, groups=300, width=12, spread=1.0)
    whole = Rows(rows, spherical=False)
    ends = {True: 0.0, False: 0.0}
    for seed in range(4):
        starts = greedy_starts(rows, 100, 1, torch.Generator().manual_seed(seed))
        for strides in ends:
            start = stride(whole, starts, 25, 1e-3) if strides else starts[0]
            end = best_centroids(whole, start, 50, 0.0)
            distances, labels = torch.cdist(rows, end).min(1)
            ends[strides] += float(distances.square().sum())
            means = torch.stack([rows[labels == group].mean(0) for group in range(100)])
            assert float((means - end).norm()) < 0.02 * float(end.norm())
    assert ends[True] < ends[False]


@pytest.mark.parametrize("width", [1, 383, 384, 386, 415, 416, 1000])
def test_the_highest_value_is_torchs(width: int) -> None:
    block = torch.randn(70, width)
    # of equal ones the first
    block[:20] = block[:20].round()
    values, places = highest(block)
    assert torch.equal(values, block.amax(1))
    assert torch.equal(places, torch.from_numpy(block.numpy().argmax(1)))


def test_principal_directions_are_those_of_numpy() -> None:
    """They hold 95 % of the variance; None where that takes more than half of them."""
    rows = torch.randn(3000, 40) * torch.linspace(5, 0.1, 40) ** 2 + 7
    directions = principal_directions(rows)
    assert directions is not None and directions.shape[1] <= 20
    centred = (rows - rows.mean(0)).double().numpy()
    _, lengths, theirs = np.linalg.svd(centred, full_matrices=False)
    shares = (lengths**2).cumsum() / (lengths**2).sum()
    number = directions.shape[1]
    assert shares[number - 2] < 0.95 <= shares[number - 1]
    # the same space, whatever the signs and the order
    inside = torch.from_numpy(theirs[:number]) @ directions.double()
    assert torch.linalg.svdvals(inside).min() > 0.999
    assert principal_directions(torch.randn(3000, 40)) is None


def test_along_few_directions_many_groups_end_as_low() -> None:
    """Rows whose last 30 of 40 columns are noise: the whole way takes the same rows as they are."""
    rows, _ = blobs(6000, groups=300, width=10, spread=1.0)
    rows = torch.cat([rows, 0.2 * torch.randn(6000, 30)], 1)
    found = [kmeans(rows, 200, seed=seed, spherical=False, refits=0) for seed in range(3)]
    theirs = [KMeans(200, n_init=1, random_state=seed).fit(rows.numpy()) for seed in range(3)]
    least = np.mean([each.inertia_ for each in theirs])
    assert np.mean([each.inertia for each in found]) <= 1.002 * least
    for each in found:
        means = torch.stack([rows[each.assignments == group].mean(0) for group in range(200)])
        assert float((means - each.centroids).norm()) < 0.02 * float(means.norm())


@pytest.mark.parametrize(("number", "groups"), [(1000, 120), (300, 150)])
def test_rows_that_few_directions_or_few_rows_tell_little_of(number: int, groups: int) -> None:
    """One column holds 95 % of the variance, yet groups are as wide along all others."""
    rows, _ = blobs(number, groups=5, width=8)
    rows[:, 0] *= 8
    theirs = [KMeans(groups, n_init=1, random_state=seed).fit(rows.numpy()) for seed in range(2)]
    found = kmeans(rows, groups, spherical=False, refits=0)
    assert found.counts.min() > 0
    assert found.inertia <= 1.01 * np.mean([each.inertia_ for each in theirs])


@pytest.mark.parametrize("offset", [1e4, 1e5])
def test_rows_far_from_zero_are_told_apart(offset: float) -> None:
    rows, labels = blobs()
    rows = rows + offset
    for source in (rows, ArrayBatches(rows, rows_per_batch=130)):
        found = kmeans(source, 9, spherical=False)
        assert as_one_partition(found.assignments, labels)
        near = (rows - found.centroids[found.assignments]).double()
        assert found.inertia == pytest.approx(float(near.square().sum()), rel=1e-3)
        assert torch.equal(found.assign(rows)[0], found.assignments)
    again = kmeans(rows, 9, spherical=False, initial=found.centroids, refits=0)
    assert torch.equal(again.assignments, found.assignments)


@pytest.mark.parametrize("count", [0, 1, 63, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_column_sums_are_those_in_fp64(count: int, dtype: torch.dtype) -> None:
    rows = (torch.randn(count, 5) + 1e4).to(dtype)
    expected = rows.sum(0, dtype=torch.float64)
    assert column_sums(rows).dtype == torch.float64
    torch.testing.assert_close(column_sums(rows), expected, rtol=1e-6, atol=0)


def test_rows_of_any_size_are_as_good_or_refused() -> None:
    rows, _ = blobs()
    expected = kmeans(rows, 9, refits=0)
    for size in (1e-30, 1e30):
        assert torch.equal(kmeans(rows * size, 9, refits=0).assignments, expected.assignments)
        with pytest.raises(ValueError, match="square is not exact in fp32; bring all to values"):
            kmeans(rows * size, 9, spherical=False)
    column = kmeans(rows[:, :1], 100, spherical=False, refits=1)
    assert column.counts.min() > 0 and column.confidence.isfinite().all()


def test_the_sample_for_the_starts_is_bounded() -> None:
    sizes = {2: 4096, 200: 8000, 1000: 20_000, 6553: 131_060, 10_000: 131_072, 100_000: 400_000}
    assert {count: start_size(count) for count in sizes} == sizes


def test_spherical_is_dhillon_and_modhas_loop(digits: Tensor) -> None:
    rows = F.normalize(digits.double(), dim=1)
    initial = digits[torch.randperm(len(digits))[:7]]
    centroids = F.normalize(initial.double(), dim=1)
    for _ in range(6):
        labels = (rows @ centroids.T).argmax(1)
        centroids = torch.stack(
            [F.normalize(rows[labels == group].sum(0), dim=0) for group in range(7)]
        )
    labels = (rows @ centroids.T).argmax(1)
    ours = kmeans(
        digits * torch.rand(len(digits), 1).add(0.1), 7, initial=initial, iterations=6, tolerance=0
    )
    assert torch.equal(ours.assignments, labels)
    assert torch.allclose(ours.centroids, centroids.float(), atol=1e-5)
    assert ours.inertia == pytest.approx(
        float((2 - 2 * (rows * centroids[labels]).sum(1)).sum()), rel=1e-5
    )


@pytest.mark.parametrize("spherical", [True, False])
def test_without_refits_confidence_is_the_posterior_of_round_normal_groups(spherical: bool) -> None:
    rows, labels = blobs(spread=4.0)
    groups = kmeans(rows, 9, spherical=spherical, refits=0)
    points = F.normalize(rows, dim=1) if spherical else rows
    log = -torch.cdist(points, groups.centroids).square() / 2 / groups.temperature
    assert torch.allclose(groups.confidence, log.softmax(1).max(1).values, atol=1e-3)
    assert (groups.confidence > 1 / 9 - 1e-6).all() and (groups.confidence <= 1).all()
    if not spherical:
        assert groups.temperature == pytest.approx(16, rel=0.15)  # the planted variance
        agreed = torch.tensor(
            [labels[groups.assignments == group].bincount().argmax() for group in range(9)]
        )
        right = (agreed[groups.assignments] == labels).float()
        assert groups.confidence.mean() == pytest.approx(
            float(right.mean()), abs=0.05
        )  # it means what it says


@pytest.mark.parametrize("spherical", [True, False])
def test_assigning_the_same_rows_again_changes_nothing(digits: Tensor, spherical: bool) -> None:
    groups = kmeans(digits, 20, runs=3, spherical=spherical)
    assignments, confidence = groups.assign(digits)
    assert torch.equal(assignments, groups.assignments) and torch.allclose(
        confidence, groups.confidence, atol=1e-5
    )


def test_saved_and_loaded_it_is_the_same(digits: Tensor, tmp_path: Path) -> None:
    groups = kmeans(digits, 10, runs=2)
    groups.save(tmp_path / "new" / "groups.safetensors")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["groups.safetensors"]
    loaded = Clustering.load(tmp_path / "new" / "groups.safetensors")
    for name in ("assignments", "centroids", "confidence"):
        assert torch.equal(getattr(loaded, name), getattr(groups, name))
    assert (loaded.inertia, loaded.spherical, loaded.temperature) == (
        groups.inertia,
        True,
        groups.temperature,
    )
    assert torch.equal(loaded.assign(digits[:50])[0], groups.assignments[:50])


def test_loading_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a file"):
        Clustering.load(tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        Clustering.load(tmp_path / "broken.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no clustering"):
        Clustering.load(tmp_path / "model.safetensors")


def test_exemplars_are_the_rows_nearest_to_the_centroids() -> None:
    rows, _ = blobs(200)
    groups = kmeans(rows, 9)
    found = groups.exemplars(rows, per_group=4)
    for group, members in enumerate(found):
        mine = (groups.assignments == group).nonzero().flatten()
        cosines = F.normalize(rows[mine], dim=1) @ groups.centroids[group]
        assert members == mine[cosines.argsort(descending=True)[:4]].tolist()
    assert sorted(
        row for members in groups.exemplars(rows, per_group=200) for row in members
    ) == list(range(200))
    with pytest.raises(ValueError, match="199 rows, but 200 were clustered"):
        groups.exemplars(rows[1:])


@pytest.mark.parametrize("number", [10, 100])
@pytest.mark.parametrize("spherical", [True, False])
def test_from_disk_as_in_memory(
    digits: Tensor, tmp_path: Path, spherical: bool, number: int
) -> None:
    np.save(tmp_path / "features.npy", digits.numpy())
    datasets.Dataset.from_dict({"features": digits.tolist()}).to_parquet(
        tmp_path / "features.parquet"
    )
    table = datasets.Dataset.from_parquet(
        str(tmp_path / "features.parquet"), cache_dir=str(tmp_path / "cache")
    )
    sources = [
        np.load(tmp_path / "features.npy", mmap_mode="r"),
        table.with_format("torch")["features"],
    ]
    expected = kmeans(digits, number, runs=4, spherical=spherical)
    for source in sources:
        batches = ArrayBatches(source, rows_per_batch=130)
        found = kmeans(batches, number, runs=4, spherical=spherical)
        assert torch.equal(found.assignments, expected.assignments)
        assert torch.allclose(found.centroids, expected.centroids, atol=1e-4)
        assert found.inertia == pytest.approx(expected.inertia, rel=1e-6)


def test_half_precision_files_are_read_in_batches(digits: Tensor, tmp_path: Path) -> None:
    """float16 through numpy, bfloat16, which numpy has not, through torch.

    Digits are exact in both.
    """
    digits.half().numpy().tofile(tmp_path / "rows.f16")
    digits.bfloat16().view(torch.int16).numpy().tofile(tmp_path / "rows.bf16")
    float16 = np.memmap(tmp_path / "rows.f16", np.float16, "r", shape=tuple(digits.shape))
    bfloat16 = torch.from_file(
        str(tmp_path / "rows.bf16"), size=digits.numel(), dtype=torch.bfloat16
    ).view(digits.shape)
    expected = kmeans(digits, 10, runs=4, spherical=False)
    for source in (float16, bfloat16):
        found = kmeans(ArrayBatches(source, rows_per_batch=130), 10, runs=4, spherical=False)
        assert torch.equal(found.assignments, expected.assignments)
        assert found.inertia == pytest.approx(expected.inertia, rel=1e-6)


def test_bf16_rows_give_the_groups_of_fp32(digits: Tensor) -> None:
    rows, labels = blobs(900, spread=0.5)
    assert as_one_partition(kmeans(rows.bfloat16(), 9).assignments, labels)
    low, full = kmeans(digits.bfloat16(), 10, spherical=False), kmeans(digits, 10, spherical=False)
    assert low.inertia == pytest.approx(full.inertia, rel=1e-4)  # digits are exact in bf16


CASES = {
    "spherical": {"num_clusters": 10, "runs": 4},
    "euclidean": {"num_clusters": 10, "runs": 4, "spherical": False},
    "empty": {"num_clusters": 6, "spherical": False},
    "every second row": {"num_clusters": 10, "runs": 4},
    "many": {"num_clusters": 100, "spherical": False},
}


def cluster_share(rank: int, processes: int, case: str) -> Clustering:
    """Clusters this process's part of the digits; the parts differ in size.

    One process takes them one after the other.
    """
    rows = torch.tensor(load_digits().data, dtype=torch.float32)
    parts = (rows[0::2], rows[1::2]) if case == "every second row" else (rows[:1000], rows[1000:])
    share = ArrayBatches(torch.cat(parts) if processes == 1 else parts[rank], rows_per_batch=300)
    initial = (
        rows[:6].clone().index_fill_(0, torch.tensor([1, 4]), 1e3) if case == "empty" else None
    )
    return kmeans(share, **CASES[case], initial=initial)


def process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    for case in CASES:
        cluster_share(rank, 2, case).save(Path(folder) / f"{case}-{rank}.safetensors")
    try:
        kmeans(
            ArrayBatches(torch.full((5, 2), float("nan") if rank else 1.0)), 2
        )  # stops both, not one
    except ValueError as error:
        save_file(
            {"refused": torch.ones(1)},
            Path(folder) / f"refused-{rank}.safetensors",
            metadata={"error": str(error)},
        )
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = int(probe.getsockname()[1])
    torch.multiprocessing.start_processes(
        process, (port, str(tmp_path)), nprocs=2, start_method="fork"
    )
    for case in CASES:
        expected = cluster_share(0, 1, case)
        found = [Clustering.load(tmp_path / f"{case}-{rank}.safetensors") for rank in range(2)]
        assert torch.equal(found[0].centroids, found[1].centroids)
        assert torch.allclose(found[0].centroids, expected.centroids, atol=1e-4), case
        assert torch.equal(torch.cat([part.assignments for part in found]), expected.assignments), (
            case
        )
        assert torch.allclose(
            torch.cat([part.confidence for part in found]), expected.confidence, atol=1e-4
        )
        assert found[0].inertia == found[1].inertia == pytest.approx(expected.inertia, rel=1e-6)
    assert all(load_file(tmp_path / f"refused-{rank}.safetensors") for rank in range(2))


def test_equal_counts_merge_as_in_scipys_ward_tree() -> None:
    centroids = torch.randn(12, 5)
    groups = Clustering(torch.arange(12), centroids, torch.ones(12), 0.0, spherical=False)
    theirs = linkage(centroids.double().numpy(), "ward")
    assert np.allclose(merge_tree(groups), theirs, atol=1e-6)
    for count in (1, 3):
        joined = merged(groups, count)
        assert len(joined.centroids) == count == len(joined.counts.nonzero())
        assert as_one_partition(
            joined.assignments, torch.tensor(fcluster(theirs, count, "maxclust"))
        )
    # SciPy before 1.15 cuts a tree of twelve into fewer groups than it is asked for near twelve
    assert merged(groups, 12).assignments.tolist() == list(range(12))


def test_merging_costs_least_inertia_and_tells_how_much() -> None:
    rows, _ = blobs(400, groups=8, spread=3.0)
    groups = kmeans(rows, 8, spherical=False)

    def inertia(labels: Tensor) -> float:
        return sum(
            float((rows[labels == g] - rows[labels == g].mean(0)).square().sum())
            for g in labels.unique()
        )

    options = {}
    for a in range(8):
        for b in range(a):
            joined = torch.where(groups.assignments == a, b, groups.assignments)
            options[inertia(joined)] = joined
    found = merged(groups, 7)
    assert as_one_partition(found.assignments, options[min(options)])
    assert found.inertia == pytest.approx(min(options), rel=1e-4)
    assert torch.allclose(
        found.centroids,
        torch.stack([rows[found.assignments == g].mean(0) for g in range(7)]),
        atol=1e-4,
    )
    round_groups = merged(kmeans(rows, 8), 3)
    points = F.normalize(rows, dim=1)
    assert torch.allclose(round_groups.centroids.norm(dim=1), torch.ones(3), atol=1e-5)
    assert (
        round_groups.inertia
        >= float((points - round_groups.centroids[round_groups.assignments]).square().sum()) - 1e-3
    )
    with pytest.raises(ValueError, match="num_clusters=9 must lie between 1 and the 8 groups"):
        merged(groups, 9)


def slow_duplicates(rows: Tensor, threshold: float) -> list[list[int]]:
    rows = F.normalize(rows, dim=1)
    groups: list[set[int]] = []
    for i in range(len(rows)):
        near = {j for j in range(i + 1) if float(rows[i] @ rows[j]) >= threshold or j == i}
        touched = [group for group in groups if group & near]
        groups = [group for group in groups if not group & near] + [near.union(*touched)]
    return sorted(sorted(group) for group in groups if len(group) > 1)


@pytest.mark.parametrize("block", [7, 64, 2048])
def test_near_duplicates_are_a_slow_loops(block: int) -> None:
    # few dimensions: chains of neighbours, over several blocks
    rows = torch.randn(120, 4)
    rows[100:] = rows[:20] * 3
    expected = slow_duplicates(rows, 0.97)
    assert len(expected) > 5 and any(len(group) > 2 for group in expected)
    assert near_duplicates(rows, 0.97, block=block) == expected
    assert near_duplicates(torch.ones(300, 3), 0.99, block=block) == [list(range(300))]
    assert near_duplicates(torch.eye(6), block=block) == []


@pytest.mark.parametrize(
    ("features", "arguments", "message"),
    [
        (
            torch.randn(5, 3),
            {"num_clusters": 6},
            "num_clusters=6 must lie between 1 and the 5 rows",
        ),
        (torch.randn(5, 3), {"num_clusters": 0}, "num_clusters=0"),
        (torch.randn(5, 3), {"num_clusters": 2, "runs": 0}, "runs=0 must be at least 1"),
        (torch.randn(5, 3), {"num_clusters": 2, "iterations": 0}, "iterations=0"),
        (
            torch.randn(5, 3),
            {"num_clusters": 2, "initial": torch.randn(2, 4)},
            r"initial has shape \(2, 4\)",
        ),
        (
            torch.tensor([[1.0, math.nan], [1, 2], [math.inf, 1]]),
            {"num_clusters": 2},
            "2 of 3 rows hold NaN or infinity",
        ),
        (torch.randn(5), {"num_clusters": 2}, r"shape \(5,\)"),
        (torch.randn(0, 3), {"num_clusters": 1}, "no rows"),
    ],
)
def test_bad_input_is_named(features: Tensor, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans(features, **arguments)


def test_new_rows_must_fit() -> None:
    groups = kmeans(torch.randn(20, 3), 2)
    with pytest.raises(ValueError, match="width 4, but the groups were made of width 3"):
        groups.assign(torch.randn(5, 4))
    with pytest.raises(ValueError, match="1 of 2 rows hold NaN"):
        groups.assign(torch.tensor([[1.0, 2, 3], [math.nan, 1, 1]]))
    with pytest.raises(ValueError, match="threshold=0"):
        near_duplicates(torch.randn(4, 3), 0)


def test_a_wrong_length_of_batches_is_told() -> None:
    class Wrong(ArrayBatches):
        def __len__(self) -> int:
            return 2 * len(self.array)

        def __iter__(self):  # type: ignore[no-untyped-def]
            yield self.array

    with pytest.raises(ValueError, match="gave 10 rows, but their length says 20"):
        kmeans(Wrong(torch.randn(10, 3)), 2)
