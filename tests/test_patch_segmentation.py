"""Segmentation by single patches against scikit-learn's neighbours and a regression's gradient."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from test_segmentation import make_encoder, make_table, open_camvid

from mim_refiner_hf.conversion.preprocessing import image_processor
from mim_refiner_hf.data.loading import Loading
from mim_refiner_hf.evaluation import patch_segmentation
from mim_refiner_hf.evaluation.patch_segmentation import (
    Patches,
    by_neighbours,
    by_regression,
    encoded_patches,
    segmentation_knn,
    segmentation_logistic,
    votes,
)
from mim_refiner_hf.evaluation.segmentation import mean_iou
from mim_refiner_hf.evaluation.segmentation_data import VOID, open_segmentation


def test_votes_equal_counting() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(-1, 4, (40, 7, 5))
    found = votes(torch.from_numpy(classes), 4)
    with_void = votes(torch.from_numpy(classes), 4, void_counts=True)
    for row in range(40):
        for place in range(5):
            cast = classes[row, :, place].tolist()
            best = max(range(4), key=lambda label: (cast.count(label), -label))
            assert found[row, place] == best
            best = max(range(-1, 4), key=lambda label: (cast.count(label), -label))
            assert with_void[row, place] == best


@pytest.mark.parametrize(("distance", "metric"), [("cosine", "cosine"), ("Euclidean", "euclidean")])
@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_equal_scikit_learns(k: int, distance: str, metric: str) -> None:
    rng = np.random.default_rng(1)
    bank = rng.normal(size=(300, 6)).astype(np.float32)
    queries = rng.normal(size=(50, 6)).astype(np.float32)
    # one classifier for each pixel of a patch
    classes = rng.integers(0, 3, (300, 4))
    settings = {"k": k, "distance": distance, "num_classes": 3}
    tensors = [torch.from_numpy(each) for each in (bank, classes, classes[:, 0], queries)]
    found = by_neighbours(*tensors, **settings)  # type: ignore[arg-type]
    for pixel in range(4):
        plain = KNeighborsClassifier(k, metric=metric, algorithm="brute")
        plain.fit(bank, classes[:, pixel])
        assert found[:, pixel].tolist() == plain.predict(queries).tolist()


def test_regression_stands_at_the_optimum_of_its_objective() -> None:
    torch.manual_seed(0)
    features = torch.randn(200, 5)
    main = (features[:, 0] + 0.5 * torch.randn(200) > 0).long() + (features[:, 1] > 0).long()
    queries = torch.randn(300, 5)
    said = by_regression(features, main.unsqueeze(1).expand(-1, 9), main, queries, strength=0.3)
    assert said.shape == (300, 9) and (said == said[:, :1]).all()

    # C * sum of cross-entropies + half the squared weights, by Newton's steps of L-BFGS in torch
    weight = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def objective() -> Any:
        solver.zero_grad()
        logits = features.double() @ weight.T + bias
        loss = 0.3 * torch.nn.functional.cross_entropy(logits, main, reduction="sum")
        loss = loss + 0.5 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    expected = (queries.double() @ weight.T + bias).argmax(dim=1)
    assert (said[:, 0] == expected).float().mean() > 0.99


def test_patches_are_those_of_the_squashed_image(tmp_path: Path) -> None:
    mask = np.kron(np.arange(8).reshape(2, 4) % 3, np.ones((30, 20)))
    images = open_segmentation(make_table(tmp_path, [mask], ["a", "b", "void"]))
    encoder = make_encoder(image_size=16, patch_size=4)
    processor = image_processor(encoder.config, {})
    found = encoded_patches(encoder, processor, images, Loading())
    assert found.features.shape == (1, 16, 32) and found.classes.shape == (1, 16, 16)
    # two rows of four patches each show one cell of the mask
    expected = np.kron(np.arange(8).reshape(2, 4) % 3, np.ones((2, 1)))
    expected[expected == 2] = VOID
    assert (found.classes == torch.from_numpy(expected).view(1, 16, 1)).all()
    features, classes, main = found.counting(2)
    counted = expected.ravel() >= 0
    assert torch.equal(features, found.features[0][torch.from_numpy(counted)])
    assert main.tolist() == expected.ravel()[counted].tolist() and classes.shape == (len(main), 16)


def camvid_patches(shared: Path) -> tuple[Any, Any, Any, dict[str, Any]]:
    encoder = make_encoder().train()
    train, test = open_camvid(shared, "train[:30]"), open_camvid(shared, "test[:12]")
    settings = {"processor": image_processor(encoder.config, {}), "seed": 0}
    return encoder, train, test, settings


def test_camvid_by_neighbours_as_scikit_learn_has_it(shared: Path) -> None:
    encoder, train, test, settings = camvid_patches(shared)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patch_segmentation, "PATCH_NEIGHBOURS", (1,))
        patched.setattr(patch_segmentation, "DISTANCES", ("Euclidean",))
        result = segmentation_knn(encoder, train_images=train, eval_images=test, **settings)
    assert encoder.training
    score = result.scores["segmentation_knn_miou"]
    assert score.setting.startswith("1 neighbour, Euclidean; 95 % ")

    parts: list[Patches] = [
        encoded_patches(encoder, settings["processor"], images, Loading())
        for images in (train, test)
    ]
    features, classes, _ = parts[0].counting(11)
    scaler = StandardScaler().fit(features.double().numpy())
    plain = KNeighborsClassifier(1, algorithm="brute")
    plain.fit(scaler.transform(features.numpy()), np.arange(len(features)))
    places = plain.predict(scaler.transform(parts[1].features.flatten(0, 1).numpy()))
    said = classes.clamp_min(0).numpy()[places].ravel()
    truth = parts[1].classes.numpy().ravel()
    counted = truth >= 0
    expected = jaccard_score(truth[counted], said[counted], average="macro")
    assert score.value == pytest.approx(expected, abs=2e-3)
    assert 0.1 < score.value < 0.6 and 0 < score.standard_error < 0.05


def test_camvid_chooses_and_repeats(shared: Path) -> None:
    encoder, train, test, settings = camvid_patches(shared)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patch_segmentation, "_ITERATIONS", 30)
        results = [
            protocol(encoder, train_images=train, eval_images=test, **settings)
            for protocol in (segmentation_knn, segmentation_logistic, segmentation_logistic)
        ]
    knn, logistic, again = results
    assert again.metrics == logistic.metrics
    chance = mean_iou(np.ones((11, 11), dtype=np.int32))
    for result in (knn, logistic):
        (score,) = result.scores.values()
        assert score.value > float(chance) + 0.05
    assert logistic.scores["segmentation_logistic_miou"].setting.startswith("C ")


def test_bad_input_is_named(shared: Path, tmp_path: Path) -> None:
    encoder, train, _, settings = camvid_patches(shared)
    one = open_camvid(shared, "train[:1]")
    with pytest.raises(ValueError, match="has 1 training image, but segmentation_knn chooses"):
        segmentation_knn(encoder, train_images=one, eval_images=train, **settings)
    table = make_table(tmp_path, [np.zeros((8, 8))] * 3, ["a", "b"])
    flat = open_segmentation(table)
    with pytest.raises(ValueError, match="segmentation_logistic needs patches of two classes"):
        segmentation_logistic(encoder, train_images=flat, eval_images=flat, **settings)
    with pytest.raises(ValueError, match="have different classes"):
        segmentation_knn(encoder, train_images=flat, eval_images=train, **settings)
