"""The grid of linear classifiers against a loop of single ones under torch's SGD.

The linear probe on digits and CIFAR-10.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel
from mim_refiner_hf.conversion import load_encoder
from mim_refiner_hf.conversion.load import image_processor
from mim_refiner_hf.data.images import ImageDataset, open_images
from mim_refiner_hf.data.loading import Loading
from mim_refiner_hf.data.order import epoch_order
from mim_refiner_hf.evaluation.classifier_grid import ClassifierGrid, cross_entropy_gradient
from mim_refiner_hf.evaluation.features import encode_images
from mim_refiner_hf.evaluation.linear_probe import (
    PROBE_LEARNING_RATES,
    Training,
    augmented_batches,
    feature_kinds,
    linear_probe,
    side_by_side,
)

RATES = (0.05, 0.5, 5.0)


def make_encoder(**changes: Any) -> MimRefinerModel:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    return MimRefinerModel(
        MimRefinerConfig(
            **{**shape, "image_size": 8, "patch_size": 4, "num_channels": 1, **changes}
        )
    ).eval()


def digits(split: str) -> ImageDataset:
    return open_images("digits", split=split, num_channels=1)


def run(encoder: MimRefinerModel, **changes: Any) -> Any:
    data = {"train_images": digits("train"), "eval_images": digits("test"), "augment": False}
    return linear_probe(
        encoder=encoder, processor=image_processor(encoder.config, {}), **{**data, **changes}
    )


def train_alone(start: Tensor, rate: float, batches: list[tuple[Tensor, Tensor]]) -> nn.Linear:
    """One classifier under torch's own SGD and cosine schedule; start (D, K)."""
    layer = nn.Linear(*start.shape)
    with torch.no_grad():
        layer.weight.copy_(start.T)
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches), eta_min=0)
    for features, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(layer(features), labels).backward()
        optimizer.step()
        schedule.step()
    return layer


def test_the_grid_equals_single_classifiers_under_torchs_sgd() -> None:
    batches = [(torch.randn(16, 6), torch.randint(4, (16,))) for _ in range(30)]
    grid = ClassifierGrid(6, 4, RATES, torch.Generator().manual_seed(0))
    start = grid.weight.clone()
    assert torch.equal(start[:, 0], start[:, 2]) and 0.005 < start[:, 0].std() < 0.02
    for step, (features, labels) in enumerate(batches):
        decay = 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        grid.step(features, cross_entropy_gradient(grid.logits(features), labels), decay)
    test = torch.randn(2500, 6)
    for place, rate in enumerate(RATES):
        alone = train_alone(start[:, place], rate, batches)
        torch.testing.assert_close(
            grid.weight[:, place].T, alone.weight.detach(), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(grid.bias[place], alone.bias.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            grid.logits(test)[:, place], alone(test).detach(), atol=1e-4, rtol=1e-4
        )
        assert (grid.predict(test)[place] == alone(test).argmax(dim=1)).float().mean() > 0.998


def test_the_papers_grid() -> None:
    assert len(PROBE_LEARNING_RATES) == 13 and (
        min(PROBE_LEARNING_RATES),
        max(PROBE_LEARNING_RATES),
    ) == (1e-4, 0.5)
    config = make_encoder(num_hidden_layers=6).config
    last, mean = "block5.cls", "block5.mean"
    four = ["block2.cls", "block3.cls", "block4.cls", last]
    assert list(feature_kinds(config).values()) == [[last], [last, mean], four, [*four, mean]]
    assert list(feature_kinds(make_encoder(pooling="mean").config).values()) == [
        ["block1.mean"],
        ["block0.mean", "block1.mean"],
    ]
    assert list(feature_kinds(make_encoder(num_hidden_layers=1).config).values()) == [
        ["block0.cls"],
        ["block0.cls", "block0.mean"],
    ]


def test_features_are_raw_block_outputs_and_the_last_mean_patch() -> None:
    encoder, images = make_encoder(num_hidden_layers=3), digits("train").subset(range(5))
    processor = image_processor(encoder.config, {})
    found, _ = encode_images(
        encoder, images, processor, ["block1.cls", "block2.cls", "block2.mean"], loading=Loading(2)
    )
    with torch.no_grad():
        pixels = processor([images[i].image for i in range(5)], return_tensors="pt").pixel_values
        hidden = encoder(pixels, output_hidden_states=True).hidden_states
    expected = torch.cat([hidden[2][:, 0], hidden[3][:, 0], hidden[3][:, 1:].mean(dim=1)], dim=1)
    torch.testing.assert_close(side_by_side(found, list(found)), expected, atol=1e-5, rtol=0)


def slow_probe(
    encoder: MimRefinerModel, epochs: int, rates: tuple[float, ...], seed: int
) -> dict[tuple[str, float], float]:
    """Every classifier of the grid on its own, from features standardised by hand.

    The starts are drawn in the same order.
    """
    train, test = digits("train"), digits("test")
    kinds = feature_kinds(encoder.config)
    columns = list(dict.fromkeys(name for names in kinds.values() for name in names))
    with torch.no_grad():
        one, other = (
            encode_images(
                encoder, images, image_processor(encoder.config, {}), columns, loading=Loading(100)
            )[0]
            for images in (train, test)
        )
    labels, targets = torch.from_numpy(train.labels), torch.from_numpy(test.labels)
    batch, generator, accuracies = 1024, torch.Generator().manual_seed(seed), {}
    for kind, names in kinds.items():
        x, y = side_by_side(one, names), side_by_side(other, names)
        mean, std = x.mean(dim=0), x.var(dim=0, correction=0).sqrt() + 1e-6
        x, y = (x - mean) / std, (y - mean) / std
        start = 0.01 * torch.randn(x.shape[1], 1, 10, generator=generator)[:, 0]
        orders = [
            torch.from_numpy(epoch_order(len(labels), seed, epoch))[:batch]
            for epoch in range(epochs)
        ]
        for rate in rates:
            layer = train_alone(
                start, rate * batch / 256, [(x[order], labels[order]) for order in orders]
            )
            accuracies[kind, rate] = (layer(y).argmax(dim=1) == targets).double().mean().item()
    return accuracies


def test_the_probe_equals_a_loop_of_single_classifiers() -> None:
    encoder = make_encoder().train()
    result = run(encoder, epochs=6, learning_rates=(0.01, 0.3), seed=5)
    assert encoder.training
    slow = slow_probe(encoder.eval(), 6, (0.01, 0.3), seed=5)
    best = max(slow.values())
    accuracy = result.metrics["linear_probe_accuracy"]
    assert accuracy == pytest.approx(best, abs=1.5 / 500)
    assert result.metrics["linear_probe_accuracy_standard_error"] == pytest.approx(
        (best * (1 - best) / 500) ** 0.5, abs=1e-3
    )
    rate, kind = (
        result.scores["linear_probe_accuracy"].setting.removeprefix("learning rate ").split("; ")
    )
    assert slow[kind, float(rate)] == pytest.approx(best, abs=1.5 / 500)
    assert accuracy > 0.5 and min(slow.values()) < accuracy - 0.05  # the choice mattered


def test_augmented_batches_are_crops_in_the_same_order() -> None:
    encoder, images = make_encoder(), digits("train").subset(range(50))
    training = Training(batch=20, epochs=2, seed=4)
    columns = ["block1.cls"]
    processor = image_processor(encoder.config, {})
    batches = [
        list(augmented_batches(encoder, images, processor, columns, training, Loading(size)))
        for size in (20, 7)
    ]
    labels = torch.from_numpy(images.labels)
    orders = [torch.from_numpy(epoch_order(50, 4, epoch)) for epoch in range(2)]
    assert [own.tolist() for _, own in batches[0]] == [
        labels[order[i : i + 20]].tolist() for order in orders for i in (0, 20)
    ]
    for (one, _), (other, _) in zip(*batches, strict=True):
        torch.testing.assert_close(one["block1.cls"], other["block1.cls"], atol=1e-5, rtol=0)
    plain, _ = encode_images(encoder, images, image_processor(encoder.config, {}), columns)
    assert (batches[0][0][0]["block1.cls"] - plain["block1.cls"][orders[0][:20]]).abs().max() > 2e-3


def test_augmentation_trains_and_repeats_itself() -> None:
    images = {
        "train_images": digits("train").subset(range(300)),
        "eval_images": digits("test").subset(range(200)),
    }
    results = [
        run(make_encoder(), augment=True, epochs=12, seed=seed, **images) for seed in (0, 0, 1)
    ]
    assert results[0].metrics == results[1].metrics
    assert results[0].metrics["linear_probe_accuracy"] > 0.4


def test_real_images_and_a_real_encoder(shared: Path) -> None:
    train, test = (
        open_images(str(shared / "data/cifar10"), split=split).subset(range(0, size, step))
        for split, size, step in (("train", 20000, 100), ("test", 4000, 40))
    )
    encoder = load_encoder(str(shared / "models/mae-tiny-cifar10"))
    result = run(encoder, train_images=train, eval_images=test, epochs=20)
    assert 0.2 < result.metrics["linear_probe_accuracy"] < 0.6


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="epochs=0 must be at least 1"):
        run(make_encoder(), epochs=0)
    with pytest.raises(ValueError, match=r"learning_rates=\(0\.1, 0\) greater than 0"):
        run(make_encoder(), learning_rates=(0.1, 0))
    with pytest.raises(ValueError, match="the encoder takes 8 x 12 pixels; use augment=False"):
        run(make_encoder(image_size=[8, 12]), augment=True)
    with pytest.raises(
        ValueError, match="digits has no images, but linear probing needs labelled ones"
    ):
        run(make_encoder(), train_images=digits("train").subset([]))
