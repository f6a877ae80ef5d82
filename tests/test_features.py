"""Frozen features against hooks on the blocks, and the evaluation of an encoder that is built on
them.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from small_encoder import fresh_encoder
from torch.utils.flop_counter import FlopCounterMode

from mim_refiner_hf import MimRefinerImageProcessor
from mim_refiner_hf.data.loading import Loading
from mim_refiner_hf.evaluation import (
    Evaluation,
    FeatureSet,
    KMeansRun,
    cluster_scores,
    comparison_table,
    draw_clusters,
    evaluate_encoder,
    evaluate_pixels,
    extract_features,
    kmeans_runs,
    knn_accuracy,
    pictures,
    rankme,
    report,
)
from mim_refiner_hf.evaluation.features import encode

make_encoder = partial(fresh_encoder, num_hidden_layers=3, patch_size=8)


class Sample(NamedTuple):
    image: Image.Image
    label: int
    index: int


class Images(torch.utils.data.Dataset):
    """Plain pictures of four kinds: one colour per class, with noise."""

    name, class_names = "colours", ["red", "green", "blue", "grey"]

    def __init__(
        self, indices: range | list[int], labelled: bool = True, noise: float = 60
    ) -> None:
        self.indices, self.labelled, self.noise = list(indices), labelled, noise
        self.labels = np.array([index % 4 for index in self.indices]) if labelled else None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Sample:
        index = self.indices[i]
        colour = ([200, 60, 60], [60, 200, 60], [60, 60, 200], [128, 128, 128])[index % 4]
        pixels = (
            np.random.default_rng(index)
            .normal(colour, self.noise, (20, 18, 3))
            .clip(0, 255)
            .astype(np.uint8)
        )
        return Sample(Image.fromarray(pixels), index % 4 if self.labelled else -1, index)

    def subset(self, indices: list[int]) -> "Images":
        return Images([self.indices[i] for i in indices], self.labelled, self.noise)


@pytest.fixture(scope="module")
def processor() -> MimRefinerImageProcessor:
    return MimRefinerImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_equal_hooked_block_outputs(
    processor: MimRefinerImageProcessor, pooling: str, num_workers: int
) -> None:
    encoder, images = make_encoder(pooling=pooling), Images(range(11))
    torch.nn.init.normal_(encoder.norm.weight)  # a final norm that would show
    found = extract_features(
        encoder, images, processor, blocks=[2, 0], loading=Loading(4, num_workers)
    )
    outputs: dict[int, torch.Tensor] = {}
    for block, layer in enumerate(encoder.layers):
        layer.register_forward_hook(
            lambda _module, _inputs, output, block=block: outputs.__setitem__(block, output)
        )
    with torch.no_grad():
        encoder(**processor([images[i].image for i in range(11)], return_tensors="pt"))
    expected = {
        block: tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(1)
        for block, tokens in outputs.items()
    }
    assert list(found.blocks) == [0, 2]
    for block in (0, 2):
        torch.testing.assert_close(found.blocks[block], expected[block], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.features, expected[2], atol=1e-5, rtol=0)
    assert found.labels is not None and found.labels.tolist() == [i % 4 for i in range(11)]


@pytest.mark.parametrize(
    "changes",
    [{"pooling": "cls"}, {"pooling": "mean"}, {"num_register_tokens": 2, "norm_placement": "post"}],
)
def test_patches_pass_the_last_block_only_where_a_column_reads_them(
    changes: dict[str, Any],
) -> None:
    encoder, pixels, work = make_encoder(**changes), torch.randn(2, 3, 16, 16), []
    poolings = ["cls", "register"] if "num_register_tokens" in changes else ["cls"]
    prefix = [f"{place}.{pooling}" for place in ("block2", "output") for pooling in poolings]
    with torch.no_grad():
        plain = encoder(pixels, output_hidden_states=True)
        for columns in (["block0.mean", *prefix], ["block2.mean", *prefix]):
            with FlopCounterMode(display=False) as flops:
                found = encode(encoder, pixels, columns)
            work.append(flops.get_total_flops())
            for column in columns:
                place, pooling = column.split(".")
                tokens = (
                    plain.last_hidden_state
                    if place == "output"
                    else plain.hidden_states[int(place[5:]) + 1]
                )
                torch.testing.assert_close(
                    found[column], encoder.pool(tokens, pooling), atol=1e-6, rtol=1e-5
                )
    assert work[0] == work[1] if changes.get("pooling") == "mean" else work[0] < 0.9 * work[1]


@pytest.mark.parametrize("training", [True, False])
def test_the_encoder_comes_back_as_it_was(
    processor: MimRefinerImageProcessor, training: bool
) -> None:
    encoder = make_encoder().train(training).to(torch.bfloat16)
    weights = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    modes = []
    encoder.layers[0].register_forward_hook(
        lambda module, *_: modes.append((module.training, torch.is_grad_enabled()))
    )
    found = extract_features(encoder, Images(range(3)), processor)
    assert modes == [(False, False)] and encoder.training is training
    assert found.features.dtype == torch.float32 and not found.blocks
    assert all(torch.equal(weights[name], tensor) for name, tensor in encoder.state_dict().items())

    def fail(*_: Any) -> None:
        raise RuntimeError("broken block")

    encoder.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken block"):
        extract_features(encoder, Images(range(3)), processor)
    assert encoder.training is training


def test_labels_are_none_without_labels(processor: MimRefinerImageProcessor) -> None:
    assert (
        extract_features(make_encoder(), Images(range(3), labelled=False), processor).labels is None
    )


def test_features_name_bad_input(processor: MimRefinerImageProcessor) -> None:
    with pytest.raises(ValueError, match="has no images"):
        extract_features(make_encoder(), Images([]), processor)
    with pytest.raises(
        ValueError, match="blocks has 3, but the encoder's blocks are numbered 0 to 2"
    ):
        extract_features(make_encoder(), Images(range(3)), processor, blocks=[3])


def test_evaluation_is_the_sum_of_its_protocols(processor: MimRefinerImageProcessor) -> None:
    evaluation = evaluate_encoder(
        make_encoder(), processor, Images(range(120)), Images(range(200, 300))
    )
    bank = extract_features(make_encoder(), Images(range(120)), processor, blocks=[0, 1, 2])
    held_out = extract_features(
        make_encoder(), Images(range(200, 300)), processor, blocks=[0, 1, 2]
    )
    assert bank.labels is not None and held_out.labels is not None
    knn = [
        knn_accuracy(bank.blocks[b], bank.labels, held_out.blocks[b], held_out.labels)
        for b in range(3)
    ]
    run = kmeans_runs(held_out.features, 4)
    scores = [cluster_scores(held_out.labels, groups) for groups in run.all_assignments]
    best = cluster_scores(held_out.labels, run.assignments)
    assert evaluation.metrics.pop("knn_per_block") == pytest.approx(knn)
    assert evaluation.metrics == pytest.approx(
        {
            "knn_accuracy": knn[-1],
            "cluster_accuracy": best["accuracy"],
            **{name: best[name] for name in ("nmi", "ami", "ari")},
            "cluster_accuracy_mean": np.mean([one["accuracy"] for one in scores]),
            "nmi_mean": np.mean([one["nmi"] for one in scores]),
            "rankme": rankme(held_out.features),
        },
        rel=1e-4,
    )
    assert evaluation.metrics["knn_accuracy"] > 0.5
    assert np.array_equal(evaluation.assignments, run.assignments)


@pytest.mark.parametrize("labelled", [(True, False), (False, True), (False, False)])
def test_without_labels_on_both_sides_only_rankme(
    processor: MimRefinerImageProcessor, labelled: tuple[bool, bool]
) -> None:
    found = evaluate_encoder(
        make_encoder(), processor, Images(range(8), labelled[0]), Images(range(32), labelled[1])
    )
    assert set(found.metrics) == {"rankme"}
    assert len(set(found.assignments)) == 4  # sqrt(32 / 2)


def test_blocks_are_only_evaluated_when_asked_for(processor: MimRefinerImageProcessor) -> None:
    found = evaluate_encoder(
        make_encoder(), processor, Images(range(20)), Images(range(20)), per_block=False
    )
    assert "knn_per_block" not in found.metrics and "knn_accuracy" in found.metrics


def test_the_bank_is_evenly_spaced() -> None:
    assert report.evenly_spaced(Images(range(100)), 4).indices == [0, 25, 50, 75]
    assert report.evenly_spaced(Images(range(7)), 4).indices == [0, 1, 3, 5]
    assert report.evenly_spaced(Images(range(4)), 4).indices == [0, 1, 2, 3]


def test_comparison_table_is_aligned_and_in_percentage_points() -> None:
    before = {"knn_accuracy": 0.956, "rankme": 30.0, "knn_per_block": [0.9, 0.956], "nmi": 0.8}
    lines = comparison_table(
        before, {"knn_accuracy": 0.992, "rankme": 25.55, "knn_per_block": [0.9, 0.992]}
    ).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[3:] for line in lines if "k-NN" in line] == [
        ["95.6", "%", "99.2", "%", "+3.6", "points"]
    ]
    assert [line.split()[-3:] for line in lines if "RankMe" in line] == [["30.0", "25.6", "-4.4"]]
    assert len(lines) == 4


def test_raw_pixels_have_a_column_of_their_own() -> None:
    before, after = ({"knn_accuracy": share, "rankme": 3.0} for share in (0.9, 0.95))
    lines = comparison_table(before, after, pixels={"knn_accuracy": 0.972}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["metric", "raw", "pixels", "before", "after", "change"]
    (row,) = (line.split() for line in lines if "k-NN" in line)
    assert row[3:] == ["97.2", "%", "90.0", "%", "95.0", "%", "+5.0", "points"]


def test_raw_pixels_are_measured_as_scikit_learn_would(
    processor: MimRefinerImageProcessor,
) -> None:
    bank, images = Images(range(40)), Images(range(40, 64), noise=90)
    found = evaluate_pixels(processor, bank, images)

    def rows(of: Images) -> np.ndarray:
        pictures = [of[i].image for i in range(len(of))]
        return processor(pictures, return_tensors="np")["pixel_values"].reshape(len(of), -1)

    scaler = StandardScaler().fit(rows(bank))
    neighbours = KNeighborsClassifier(
        10, metric="cosine", weights=lambda far: np.exp((1 - far) / 0.07)
    ).fit(scaler.transform(rows(bank)), bank.labels)
    expected = neighbours.score(scaler.transform(rows(images)), images.labels)
    assert found["knn_accuracy"] == pytest.approx(expected, abs=1e-6)
    assert expected > 0 and 0 < found["nmi"] <= 1 and "cluster_accuracy" in found


def test_the_picture_shows_each_group_from_its_centre_outwards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    images = Images(range(9))
    # of unit vectors around two centres
    angles = torch.tensor([0.5, 0.1, 0.3, 1.5, 1.4, 1.2, 0.2, 1.6, 0.0])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    centroids = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    assignments = (angles > 1).numpy().astype(np.int64)
    groups = KMeansRun(assignments, centroids, 0.0, assignments[None].astype(np.int32))
    rows = []
    caption = pictures.group_caption
    monkeypatch.setattr(
        pictures, "group_caption", lambda *given: rows.append(given[-1].tolist()) or caption(*given)
    )
    shown = Evaluation(
        {}, FeatureSet(features, labels=torch.tensor([i % 4 for i in range(9)])), groups
    )
    draw_clusters(images, shown, tmp_path / "out" / "clusters.png")
    assert rows == [[8, 1, 6, 2, 0], [7, 3, 4, 5]] or rows == [[8, 1, 6, 2, 0], [3, 7, 4, 5]]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["clusters.png"]
    with Image.open(tmp_path / "out" / "clusters.png") as picture:
        reds = (
            np.asarray(picture.convert("RGB")).astype(int) @ [1, -1, 0] > 60
        ).sum()  # class 0 is image 0, 4 and 8
    assert reds > 3 * 1500


def test_captions_name_the_majority_class_and_its_share() -> None:
    labels = torch.tensor([0, 0, 1, 3])
    assert (
        pictures.group_caption(Images(range(4)), labels, np.array([0, 1, 2, 3]))
        == "red: 50 %\n4 images"
    )
    assert pictures.group_caption(Images(range(4)), None, np.array([2])) == "1 image"


def test_a_picture_of_many_groups_stays_small(tmp_path: Path) -> None:
    features = torch.randn(120, 8)
    assignments = np.arange(120) % 60
    groups = KMeansRun(
        assignments, np.zeros((60, 8), dtype=np.float32), 0.0, assignments[None].astype(np.int32)
    )
    draw_clusters(
        Images(range(120)), Evaluation({}, FeatureSet(features), groups), tmp_path / "clusters.png"
    )
    with Image.open(tmp_path / "clusters.png") as picture:
        assert max(picture.size) < 4000


def test_rule_of_thumb_for_the_number_of_groups() -> None:
    assert [report.picture_groups(n) for n in (1, 2, 18, 200, 800, 10**6)] == [1, 1, 3, 10, 20, 20]
