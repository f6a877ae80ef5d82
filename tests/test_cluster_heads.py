"""Cluster heads against slow loops, scikit-learn and SciPy; the consensus.

Saving, merging, assigning; pipeline and command.
"""

import csv
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from mim_refiner_hf import (
    ImageClusteringPipeline,
    MimRefinerConfig,
    MimRefinerImageProcessor,
    MimRefinerModel,
    cli,
)
from mim_refiner_hf.clustering import Clustering, cluster_heads, kmeans, merged
from mim_refiner_hf.clustering.cluster_heads import (
    BETA,
    nearest_neighbours,
    pair_losses,
    self_trained,
    surest,
    train_heads,
)
from mim_refiner_hf.clustering.prototype_heads import (
    PrototypeHeads,
    best_match,
    class_logits,
    standardised,
)
from mim_refiner_hf.evaluation import cluster_accuracy
from mim_refiner_hf.publishing import save_model_folder

FEW = {"heads": 3, "steps": 20}


def blobs(count: int = 300, groups: int = 5, width: int = 8) -> tuple[Tensor, Tensor]:
    rows, labels = make_blobs(count, width, centers=groups, random_state=0)
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(labels)


@pytest.fixture(scope="module")
def groups() -> Clustering:
    """Five groups of the blobs."""
    return train_heads(blobs()[0], 5, **FEW)


def slow_loss(student: Tensor, teacher: Tensor, prior: Tensor, weights: list[float]) -> Tensor:
    """One head's loss, pair by pair. Probabilities (2 n, C), prior (C,)."""
    n, total = len(weights), 0.0
    for i in range(n):
        for one, other in ((i, i + n), (i + n, i)):
            joint = sum(
                (student[one, c] * teacher[other, c]) ** BETA / prior[c] for c in range(len(prior))
            )
            total = total - weights[i] * torch.log(joint) / (2 * n)
    return total


def test_loss_and_gradients_are_those_of_separate_heads() -> None:
    torch.manual_seed(0)
    heads, classes, width, n = 3, 4, 6, 5
    points = F.normalize(torch.randn(2 * n, width, dtype=torch.float64), dim=1)
    stacked = torch.randn(heads, classes, width, dtype=torch.float64, requires_grad=True)
    teachers = class_logits(
        points, torch.randn(heads, classes, width, dtype=torch.float64), 0.1
    ).log_softmax(2)
    prior = torch.rand(heads, 1, classes, dtype=torch.float64).softmax(2)
    losses = pair_losses(class_logits(points, stacked, 0.1).log_softmax(2), teachers, prior)
    losses.sum().backward()

    agreement = teachers.exp()[:, :n] * teachers.exp()[:, n:]
    weights = [float(sum(agreement[h, i].sum() for h in range(heads)) / heads) for i in range(n)]
    for h in range(heads):
        module = torch.nn.Linear(width, classes, bias=False, dtype=torch.float64)
        module.weight.data = stacked.detach()[h].clone()
        cosines = torch.stack(
            [F.cosine_similarity(points, row[None]) for row in module.weight], dim=1
        )
        loss = slow_loss((cosines / 0.1).softmax(1), teachers[h].exp(), prior[h, 0], weights)
        loss.backward()
        torch.testing.assert_close(losses[h], loss)
        torch.testing.assert_close(stacked.grad[h], module.weight.grad)  # type: ignore[index]


def test_neighbours_are_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = F.normalize(torch.randn(90, 7, generator=torch.Generator().manual_seed(0)), dim=1)
    # blocks of 16 rows, the last one smaller
    monkeypatch.setattr(cluster_heads, "SIMILARITIES", 90 * 16)
    expected = (
        NearestNeighbors(n_neighbors=6, metric="cosine")
        .fit(rows.numpy())
        .kneighbors(return_distance=False)
    )
    assert np.array_equal(nearest_neighbours(rows, 6), expected)


@pytest.mark.parametrize("size", [1, 2, 9, 60])
def test_the_best_match_is_scipys(size: int) -> None:
    table = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    assert np.array_equal(best_match(table), linear_sum_assignment(table.numpy(), maximize=True)[1])


def test_heads_that_only_number_their_classes_otherwise_agree() -> None:
    """Permuted copies with a little noise.

    The consensus finds the permutations, and is the grouping of each.
    """
    rows, _ = blobs()
    rows = F.normalize(rows, dim=1)
    torch.manual_seed(0)
    prototypes = kmeans(rows, 5, runs=3).centroids
    orders = torch.stack([torch.randperm(5) for _ in range(4)])
    copies = torch.stack([prototypes[order] + 0.01 * torch.randn(5, 8) for order in orders])
    heads = PrototypeHeads(
        copies,
        torch.zeros(8),
        torch.ones(8),
        torch.arange(5).repeat(4, 1),
        torch.tensor([2.0, 1, 3, 4]),
    )
    found = heads.aligned(rows, 0.1)
    # the best head's numbers are kept
    assert torch.equal(found.groups[1], torch.arange(5))
    assert torch.equal(
        torch.stack([orders[h].argsort()[orders[1]] for h in range(4)]), found.groups.argsort(1)
    )
    labels, confidence = found.assign(rows, 0.1)
    probabilities = class_logits(standardised(rows, found.mean, found.scale), copies, 0.1).softmax(
        2
    )
    mean = torch.stack([probabilities[h][:, found.groups[h].argsort()] for h in range(4)]).mean(0)
    torch.testing.assert_close(confidence, mean.max(1).values)
    assert torch.equal(labels, mean.argmax(1))
    assert adjusted_rand_score(labels, found.only(3).assign(rows, 0.1)[0]) > 0.98


def test_planted_groups_are_found_and_where_one_channel_drowns_the_rest_k_means_fails() -> None:
    """Four groups in twelve channels that differ little, and one channel that differs much and says
    nothing.
    """
    rows, labels = blobs()
    assert cluster_accuracy(labels, train_heads(rows, 5, **FEW).assignments) > 0.99
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(100)
    rows = 3 * F.one_hot(labels, 12).float() + 0.5 * torch.randn(400, 12, generator=generator)
    rows = torch.cat([rows, 12 * (2 * torch.rand(400, 1, generator=generator) - 1)], dim=1)
    heads, plain = train_heads(rows, 4, heads=4, steps=60), kmeans(rows, 4)
    assert (
        cluster_accuracy(labels, heads.assignments)
        > cluster_accuracy(labels, plain.assignments) + 0.2
    )


@pytest.mark.parametrize("share", [0.01, 0.5, 0.8, 1.0])
def test_the_surest_rows_of_each_group_are_those_of_a_slow_loop(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(7, (100,), generator=generator)
    labels[labels == 3] = 4  # a group without rows
    labels[17] = 7  # and one of a single row
    confidence = torch.rand(100, generator=generator)
    expected = set()
    for group in range(8):
        rows = [row for row in range(100) if labels[row] == group]
        rows.sort(key=lambda row: -float(confidence[row]))
        expected.update(rows[: int(np.ceil(share * len(rows)))])
    assert set(surest(labels, confidence, share).nonzero()[:, 0].tolist()) == expected


def test_self_training_is_a_cosine_classifier_on_the_surest_rows() -> None:
    """Against a module, its optimiser and a loop over the same draws."""
    rows, _ = blobs()
    heads = train_heads(rows, 5, **FEW, self_training=0).heads
    assert heads is not None
    units = F.normalize(rows, dim=1)
    found = self_trained(units, heads, 0.8, torch.Generator().manual_seed(3))

    labels, confidence = heads.assign(units, 0.1)
    kept = surest(labels, confidence, 0.8)
    inputs = standardised(units, heads.mean, heads.scale)[kept]
    targets = labels[kept]
    module = torch.nn.Linear(8, 5, bias=False)
    means = [F.normalize(inputs[targets == group].sum(0), dim=0) for group in range(5)]
    module.weight.data = torch.stack(means)
    optimiser = torch.optim.AdamW(module.parameters(), 1e-2, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(3)
    for step in range(300):
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 + np.cos(np.pi * step / 300)) / 2
        picks = torch.randint(len(inputs), (512,), generator=generator)
        similarity = [F.cosine_similarity(inputs[picks], row[None]) for row in module.weight]
        scores = torch.stack(similarity, dim=1) / 0.1
        loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(scores, targets[picks])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.testing.assert_close(found.prototypes[0], module.weight.detach(), atol=1e-4, rtol=1e-4)
    assert torch.equal(found.groups, torch.arange(5)[None])


def test_self_training_leaves_one_head_of_the_groups_that_have_rows() -> None:
    rows = torch.eye(3).repeat_interleave(10, dim=0)  # three different rows
    agreed = train_heads(rows, 6, **FEW, self_training=0)
    groups = train_heads(rows, 6, **FEW)
    assert agreed.heads is not None and groups.heads is not None
    assert len(agreed.heads.prototypes) == 3 and len(groups.heads.prototypes) == 1
    assert torch.equal(groups.heads.groups[0], agreed.assignments.unique())
    assert torch.equal(groups.assignments, agreed.assignments)
    assert len(groups.centroids) == 6


def test_the_same_seed_gives_the_same(groups: Clustering) -> None:
    torch.manual_seed(99)  # must not matter
    again, other = train_heads(blobs()[0], 5, **FEW), train_heads(blobs()[0], 5, **FEW, seed=1)
    assert torch.equal(again.assignments, groups.assignments) and torch.equal(
        again.confidence, groups.confidence
    )
    assert groups.heads is not None and other.heads is not None
    assert torch.equal(again.heads.prototypes, groups.heads.prototypes)  # type: ignore[union-attr]
    assert not torch.equal(other.heads.prototypes, groups.heads.prototypes)


def test_the_result_is_a_clustering(groups: Clustering, tmp_path: Path) -> None:
    rows, _ = blobs()
    assert groups.counts.sum() == 300 and groups.counts.min() > 0
    assert bool((groups.confidence > 0).all()) and bool((groups.confidence <= 1).all())
    units = F.normalize(rows, dim=1)
    means = torch.stack(
        [F.normalize(units[groups.assignments == group].mean(0), dim=0) for group in range(5)]
    )
    torch.testing.assert_close(groups.centroids, means)
    assert groups.inertia == pytest.approx(
        float((units - means[groups.assignments]).square().sum()), rel=1e-4
    )
    assert all(len(members) == 4 for members in groups.exemplars(rows, per_group=4))
    groups.save(tmp_path / "groups.safetensors")
    loaded = Clustering.load(tmp_path / "groups.safetensors")
    assert loaded.heads is not None and groups.heads is not None
    for name, tensor in vars(groups.heads).items():
        assert torch.equal(getattr(loaded.heads, name), tensor), name
    for found in (groups, loaded):
        labels, confidence = found.assign(rows)
        assert torch.equal(labels, groups.assignments)
        torch.testing.assert_close(confidence, groups.confidence)
    with pytest.raises(ValueError, match="width 3, but the groups were made of width 8"):
        loaded.assign(torch.zeros(2, 3))


def test_joined_groups_add_their_probabilities(groups: Clustering) -> None:
    rows, _ = blobs()
    coarse = merged(replace(groups, calibration=None), 2)
    assert coarse.heads is not None and groups.heads is not None
    new = torch.stack([coarse.assignments[groups.assignments == group][0] for group in range(5)])
    probabilities = class_logits(
        standardised(F.normalize(rows, dim=1), groups.heads.mean, groups.heads.scale),
        groups.heads.prototypes,
        0.1,
    ).softmax(2)
    fine = groups.heads.consensus(probabilities)
    labels, confidence = coarse.assign(rows)
    expected = torch.stack([fine[:, new == group].sum(1) for group in range(2)], dim=1)
    torch.testing.assert_close(confidence, expected.max(1).values)
    assert torch.equal(labels, expected.argmax(1))


def test_empty_groups_are_told_and_can_be_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = torch.eye(3).repeat_interleave(10, dim=0)  # three different rows
    with caplog.at_level(logging.WARNING):
        groups = train_heads(rows, 6, **FEW)
    filled = int((groups.counts > 0).sum())
    assert filled <= 3 and f"{6 - filled} of 6 groups are empty" in caplog.text
    number = torch.full((6,), -1)
    number[groups.counts > 0] = torch.arange(filled)
    left = groups.joined(number)
    assert len(left.centroids) == filled and left.counts.min() > 0
    assert torch.equal(left.assign(rows)[0], left.assignments)


@pytest.mark.parametrize(
    ("features", "arguments", "message"),
    [
        (torch.zeros(5), {}, "must be (rows, width)"),
        (torch.full((5, 2), torch.nan), {}, "5 of 5 rows hold NaN"),
        (torch.ones(5, 2), {"num_clusters": 6}, "num_clusters=6 must lie between 2 and the 5 rows"),
        (torch.ones(5, 2), {"num_clusters": 1}, "for one group take k-means"),
        (torch.ones(5, 2), {"heads": 0}, "heads=0 must be at least 1"),
        (torch.ones(5, 2), {"neighbours": 0}, "neighbours=0 must be at least 1"),
        (torch.ones(5, 2), {"steps": -1}, "steps=-1 must be at least 1"),
        (torch.ones(5, 2), {"self_training": 1.5}, "self_training=1.5 must lie between 0 and 1"),
        (torch.ones(5, 2), {"self_training": float("nan")}, "self_training=nan must lie"),
    ],
)
def test_bad_input_is_named(features: Tensor, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as error:
        train_heads(features, **{"num_clusters": 2, **arguments})
    assert message in str(error.value)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 noisy images of three colours, in turn."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(30):
        pixels = 200 * np.eye(3)[i % 3] + random.integers(0, 50, (16, 16, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    folder = tmp_path_factory.mktemp("models") / "model"
    processor = MimRefinerImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    save_model_folder(
        folder, MimRefinerModel(MimRefinerConfig(**shape, image_size=16, patch_size=8)), processor
    )
    return folder


@pytest.mark.slow
def test_the_pipeline_groups_by_heads_and_keeps_them(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    assert {"cluster_heads.py", "prototype_heads.py"} <= {
        path.name for path in model.glob("*.py")
    }  # they travel
    encoder = MimRefinerModel.from_pretrained(model)
    pipe = ImageClusteringPipeline(
        model=encoder, image_processor=MimRefinerImageProcessor.from_pretrained(model)
    )
    entries = pipe(photos, num_clusters=3, method="heads")
    assert (
        adjusted_rand_score([i % 3 for i in range(30)], [entry["cluster"] for entry in entries])
        == 1
    )
    assert pipe.clustering.heads is not None and pipe.summary["sizes"] == [10, 10, 10]
    pipe.clustering.save(tmp_path / "groups.safetensors")
    paths = sorted(map(str, photos.glob("*.png")))[6:12]
    again = pipe(paths, clustering=Clustering.load(tmp_path / "groups.safetensors"))
    assert [entry["cluster"] for entry in again] == [entry["cluster"] for entry in entries[6:12]]
    with pytest.raises(ValueError, match="method is 'means'; allowed are 'kmeans', 'heads'"):
        pipe(photos, num_clusters=3, method="means")
    with pytest.raises(
        ValueError, match="num_clusters is 1 for 30 images; allowed are 2 to 30 with method 'heads'"
    ):
        pipe(photos, num_clusters=1, method="heads")


@pytest.mark.slow
def test_the_command_groups_by_heads(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "cluster",
        str(photos),
        "--model",
        str(model),
        "--out",
        str(tmp_path / "groups"),
        "--method",
        "heads",
    ]
    assert (
        cli.main([*words, "--num_clusters", "31"]) == 2
        and "allowed are 2 to 30" in capsys.readouterr().err
    )
    assert cli.main([*words, "--num_clusters", "3"]) == 0
    with (tmp_path / "groups" / "groups.csv").open() as file:
        found = list(csv.DictReader(file))
    assert (
        adjusted_rand_score(
            [int(Path(row["path"]).stem) % 3 for row in found], [row["cluster"] for row in found]
        )
        == 1
    )
    assert json.loads((tmp_path / "groups" / "summary.json").read_text())["num_clusters"] == 3
    with pytest.raises(SystemExit) as error:
        cli.main([*words, "--method", "means"])
    assert error.value.code == 2


def test_a_file_of_k_means_stays_one(tmp_path: Path) -> None:
    plain = kmeans(blobs()[0], 5)
    replace(plain).save(tmp_path / "groups.safetensors")
    assert Clustering.load(tmp_path / "groups.safetensors").heads is None
