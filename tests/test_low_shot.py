"""Low-shot logistic regression against scikit-learn and cyanure's objective written out; splits.

The whole protocol.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from small_encoder import fresh_encoder

from mim_refiner_hf import MimRefinerModel
from mim_refiner_hf.conversion.preprocessing import image_processor
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.evaluation.features import extract_features
from mim_refiner_hf.evaluation.low_shot import (
    PENALTY,
    centred_rows,
    draw_split,
    fit_logistic,
    low_shot,
)
from mim_refiner_hf.evaluation.scores import ProtocolResult

make_encoder = partial(fresh_encoder, image_size=8, num_channels=1)


def make_rows(
    num_classes: int, per_class: int, width: int = 12
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(num_classes).repeat(per_class)
    centres = torch.randn(num_classes, width, generator=generator)
    return centred_rows(
        centres[labels] + 0.7 * torch.randn(len(labels), width, generator=generator)
    ), labels


def cyanure_objective(
    weights: np.ndarray, rows: np.ndarray, labels: np.ndarray, strength: float
) -> float:
    """Mean multinomial loss + strength / 2 ||W||^2, one row at a time."""
    losses = []
    for row, label in zip(rows, labels, strict=True):
        logits = row @ weights
        top = logits.max()
        losses.append(top + math.log(np.exp(logits - top).sum()) - logits[label])
    return float(np.mean(losses) + strength / 2 * (weights**2).sum())


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("penalty", [PENALTY, 0.3])
def test_the_optimum_is_that_of_cyanures_objective(num_classes: int, penalty: float) -> None:
    rows, labels = make_rows(num_classes, per_class=6)
    found = fit_logistic(rows, labels, penalty=penalty)
    assert found.shape == (12, num_classes)
    strength = penalty / len(rows)  # cyanure's lambda

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).view(12, num_classes).requires_grad_()
        value = F.cross_entropy(rows @ weights, labels) + strength / 2 * weights.square().sum()
        value.backward()
        assert weights.grad is not None
        return value.item(), weights.grad.numpy().ravel()

    settings = {"maxiter": 20_000, "maxfun": 50_000, "ftol": 0, "gtol": 1e-9}
    slow = minimize(
        objective, np.zeros(12 * num_classes), jac=True, method="L-BFGS-B", options=settings
    )
    assert np.abs(found.numpy().ravel() - slow.x).max() < 2e-3 * np.abs(slow.x).max()
    ours = cyanure_objective(found.numpy(), rows.numpy(), labels.numpy(), strength)
    assert ours == pytest.approx(slow.fun, abs=1e-8)
    assert (
        cyanure_objective(1.05 * found.numpy(), rows.numpy(), labels.numpy(), strength)
        > ours + 1e-6
    )


def test_the_optimum_is_not_that_of_another_penalty() -> None:
    rows, labels = make_rows(3, per_class=4)
    weak, strong = (fit_logistic(rows, labels, penalty=penalty) for penalty in (0.1, 0.2))
    # stationary: sum of x (p - y) = -penalty W
    for weights, penalty in (
        (weak, 0.1),
        (strong, 0.2),
    ):
        slope = rows.T @ ((rows @ weights).softmax(dim=1) - F.one_hot(labels, 3))
        torch.testing.assert_close(slope, -penalty * weights, atol=1e-5, rtol=0)
    assert weak.norm() > 1.1 * strong.norm()


def test_the_optimum_is_cyanures() -> None:
    cyanure = pytest.importorskip("cyanure.estimators")
    rows, labels = make_rows(4, per_class=8)
    penalty = 0.3
    theirs = cyanure.Classifier(
        loss="multiclass-logistic",
        penalty="l2",
        fit_intercept=False,
        lambda_1=penalty / len(rows),
        tol=1e-9,
        max_iter=10_000,
        n_threads=1,
        verbose=False,
    )
    theirs.fit(rows.numpy(), labels.numpy())
    found = fit_logistic(rows, labels, penalty=penalty).numpy()
    assert (
        np.abs(found - np.asarray(theirs.coef_).reshape(found.shape)).max()
        < 1e-3 * np.abs(found).max()
    )


def test_rows_are_centred_and_of_unit_length() -> None:
    rows = centred_rows(5 + torch.randn(7, 9))
    assert rows.mean(dim=1).abs().max() < 1e-12
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(7, dtype=torch.float64))


def test_splits_hold_so_many_of_every_class_and_differ() -> None:
    labels = np.array([7, 3, 3, 7, 5, 5, 5, 3, 7, 3, 5, 7] * 3)
    splits = [draw_split(labels, 4, seed=0, split=split) for split in range(3)]
    for chosen in splits:
        assert labels[chosen].tolist() == [[3] * 4, [5] * 4, [7] * 4]
        assert len(np.unique(chosen)) == 12
    assert not np.array_equal(splits[0], splits[1]) and not np.array_equal(splits[1], splits[2])
    assert np.array_equal(draw_split(labels, 4, seed=0, split=1), splits[1])
    # fewer shots: the first of them
    assert np.array_equal(draw_split(labels, 2, seed=0, split=1), splits[1][:, :2])
    assert not np.array_equal(draw_split(labels, 4, seed=1, split=1), splits[1])
    with pytest.raises(ValueError, match="shots=13, but class 3 has only 12 images; lower shots"):
        draw_split(labels, 13, seed=0, split=0)


def run(encoder: MimRefinerModel, **changes: object) -> ProtocolResult:
    data = {
        "train_images": open_images("digits", num_channels=1),
        "eval_images": open_images("digits", split="test", num_channels=1),
    }
    return low_shot(
        encoder=encoder, processor=image_processor(encoder.config, {}), **{**data, **changes}
    )  # type: ignore[arg-type]


def test_the_protocol_is_the_mean_of_three_regressions() -> None:
    encoder = make_encoder()
    result = run(encoder, shots=(1, 5), seed=3)
    train, test = (
        open_images("digits", num_channels=1),
        open_images("digits", split="test", num_channels=1),
    )
    processor = image_processor(encoder.config, {})
    bank, found = (extract_features(encoder, images, processor) for images in (train, test))
    assert bank.labels is not None and found.labels is not None
    for shots in (1, 5):
        accuracies = []
        for split in range(3):
            chosen = torch.from_numpy(draw_split(bank.labels.numpy(), shots, 3, split).flatten())
            # before 1.6, newton-cholesky fits one class against the rest
            model = LogisticRegression(
                C=1 / PENALTY, fit_intercept=False, solver="newton-cg", tol=1e-8
            )
            model.fit(centred_rows(bank.features[chosen]), bank.labels[chosen])
            accuracies.append(model.score(centred_rows(found.features), found.labels))
        name = f"low_shot_{shots}_accuracy"
        # at most an image or two on the border
        assert result.metrics[name] == pytest.approx(np.mean(accuracies), abs=1.5 / 500)
        assert result.metrics[f"{name}_standard_error"] == pytest.approx(
            np.std(accuracies, ddof=1) / 3**0.5, abs=2 / 500
        )
    assert result.metrics["low_shot_5_accuracy"] > result.metrics["low_shot_1_accuracy"] > 0.15
    assert "5 images per class; 3 splits" in str(result)


def test_class_numbers_need_not_be_consecutive() -> None:
    train, test = (
        open_images("digits", num_channels=1),
        open_images("digits", split="test", num_channels=1),
    )
    assert train.labels is not None and test.labels is not None
    some = {
        "train_images": train.subset(np.flatnonzero(train.labels >= 7)),
        "eval_images": test.subset(np.flatnonzero(test.labels >= 7)),
    }
    assert run(make_encoder(), shots=(5,), **some).metrics["low_shot_5_accuracy"] > 0.4


def test_real_images(shared: Path) -> None:
    train, test = (
        open_images(str(shared / "data/sign-digits"), split=split) for split in ("train", "test")
    )
    encoder = make_encoder(num_channels=3, image_size=24, patch_size=8)
    result = run(encoder, train_images=train, eval_images=test, shots=(5,))
    assert 0.12 < result.metrics["low_shot_5_accuracy"] < 0.9
    assert result.metrics == run(encoder, train_images=train, eval_images=test, shots=(5,)).metrics


def test_bad_input_is_named(tmp_path: Path) -> None:
    digits = open_images("digits", num_channels=1)
    for number in range(2):
        digits[number].image.save(tmp_path / f"{number}.png")
    unlabelled = open_images(str(tmp_path), num_channels=1)
    with pytest.raises(
        ValueError,
        match="has images without a label, but low-shot classification needs one for every image",
    ):
        run(make_encoder(), train_images=unlabelled)
    with pytest.raises(
        ValueError, match=r"shots=\(0, 5\) must hold at least one number, each at least 1"
    ):
        run(make_encoder(), shots=(0, 5))
    with pytest.raises(ValueError, match="shots=500, but class"):
        run(make_encoder(), shots=(500,))
    with pytest.raises(ValueError, match="penalty=0 must be greater than 0"):
        fit_logistic(torch.zeros(2, 2), torch.tensor([0, 1]), penalty=0)
