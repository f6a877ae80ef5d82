"""The grid of linear classifiers against a loop of single ones under torch's SGD.

The linear probe on digits and CIFAR-10.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_encoder import fresh_encoder
from torch import Tensor, nn

from mim_refiner_hf import MimRefinerModel
from mim_refiner_hf.conversion import load_encoder
from mim_refiner_hf.conversion.preprocessing import image_processor
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

make_encoder = partial(fresh_encoder, image_size=8, num_channels=1)

RATES = (0.05, 0.5, 5.0)


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
    last, mean = "output.cls", "output.mean"
    four = ["block2.cls", "block3.cls", "block4.cls", "block5.cls"]
    means = ["block2.mean", "block3.mean", "block4.mean", "block5.mean"]
    expected = [[last], [last, mean], four, [*four, *means]]
    assert list(feature_kinds(config).values()) == expected
    normed = [*four[:3], last]
    expected = [[last], [last, mean], normed, [*normed, mean]]
    assert list(feature_kinds(config, "dinov2").values()) == expected
    assert list(feature_kinds(make_encoder(pooling="mean").config).values()) == [
        ["output.mean"],
        ["block0.mean", "block1.mean"],
    ]
    assert list(feature_kinds(make_encoder(num_hidden_layers=1).config).values()) == [
        ["output.cls"],
        ["output.cls", "output.mean"],
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


def by_hand(encoder: MimRefinerModel, images: ImageDataset, variant: str) -> dict[str, Tensor]:
    """The four kinds of features, from the tokens of the encoder and torch's own norm."""
    processor = image_processor(encoder.config, {})
    pictures = [images[i].image for i in range(len(images))]
    pixels = processor(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        out = encoder(pixels, output_hidden_states=True)
    raw = list(out.hidden_states[1:])
    output = out.last_hidden_state
    cls = [tokens[:, 0] for tokens in raw]
    means = [tokens[:, 1:].mean(dim=1) for tokens in raw]
    if variant == "dinov2":
        norm = nn.LayerNorm(32, eps=encoder.config.layer_norm_eps)
        norm.load_state_dict(encoder.norm.state_dict())
        cls = [norm(tokens)[:, 0].detach() for tokens in raw]
        means = [output[:, 1:].mean(dim=1)]
    mean = output[:, 1:].mean(dim=1)
    return {
        "cls of the last block": output[:, 0],
        "cls of the last block + mean patch": torch.cat([output[:, 0], mean], dim=1),
        "cls of the last 2 blocks": torch.cat(cls, dim=1),
        "cls of the last 2 blocks + mean patch": torch.cat([*cls, *means], dim=1),
    }


def slow_probe(
    encoder: MimRefinerModel, epochs: int, rates: tuple[float, ...], seed: int, variant: str
) -> dict[tuple[str, float], list[float]]:
    """The accuracy of every classifier of the grid on its own, after every epoch.

    Torch's own layers and optimiser, the schedule written out; the starts are drawn in the same
    order.
    """
    train, test = digits("train"), digits("test")
    one, other = (by_hand(encoder, images, variant) for images in (train, test))
    labels, targets = torch.from_numpy(train.labels), torch.from_numpy(test.labels)
    batch, generator = 1024, torch.Generator().manual_seed(seed)
    # one batch an epoch; a tenth of them warms up
    warmup = round(0.1 * epochs) if variant == "paper" else 0
    end = 1e-6 if variant == "paper" else 0.0
    accuracies: dict[tuple[str, float], list[float]] = {}
    for kind, x in one.items():
        start = 0.01 * torch.randn(x.shape[1], 1, 10, generator=generator)[:, 0]
        for rate in rates:
            norm = nn.BatchNorm1d(x.shape[1], affine=False)
            layer = nn.Linear(*start.shape)
            with torch.no_grad():
                layer.weight.copy_(start.T)
                layer.bias.zero_()
            model = nn.Sequential(norm if variant == "paper" else nn.Identity(), layer)
            peak = rate * batch / 256
            optimizer = torch.optim.SGD(layer.parameters(), lr=peak, momentum=0.9)
            for epoch in range(epochs):
                value = peak * (epoch + 1) / (warmup + 1)
                if epoch >= warmup:
                    share = (epoch - warmup) / (epochs - warmup)
                    value = end + (peak - end) * 0.5 * (1 + math.cos(math.pi * share))
                optimizer.param_groups[0]["lr"] = value
                order = torch.from_numpy(epoch_order(len(labels), seed, epoch))[:batch]
                optimizer.zero_grad()
                F.cross_entropy(model.train()(x[order]), labels[order]).backward()
                optimizer.step()
                with torch.no_grad():
                    right = model.eval()(other[kind]).argmax(dim=1) == targets
                accuracies.setdefault((kind, rate), []).append(right.double().mean().item())
    return accuracies


@pytest.mark.parametrize("variant", ["paper", "dinov2"])
def test_the_probe_equals_a_loop_of_single_classifiers(variant: str) -> None:
    encoder = make_encoder().train()
    rates = (0.001, 0.3)
    epochs = 40
    result = run(encoder, epochs=epochs, learning_rates=rates, seed=5, variant=variant)
    assert encoder.training
    slow = slow_probe(encoder.eval(), epochs, rates, seed=5, variant=variant)
    # the best epoch, or the last one
    chosen = {key: max(told) if variant == "paper" else told[-1] for key, told in slow.items()}
    best = max(chosen.values())
    name = "linear_probe_accuracy" if variant == "paper" else "linear_probe_dinov2_accuracy"
    accuracy = result.metrics[name]
    assert accuracy == pytest.approx(best, abs=1.5 / 500)
    assert result.metrics[f"{name}_standard_error"] == pytest.approx(
        (best * (1 - best) / 500) ** 0.5, abs=1e-3
    )
    setting = result.scores[name].setting.removeprefix("learning rate ")
    rate, kind, epoch = setting.split("; ")
    of_this = slow[kind, float(rate)][int(epoch.removeprefix("epoch ")) - 1]
    assert of_this == pytest.approx(best, abs=1.5 / 500)
    # the choice mattered
    # features of random weights: without a batch norm 40 updates move little
    assert accuracy > {"paper": 0.5, "dinov2": 0.2}[variant]
    assert min(chosen.values()) < accuracy - 0.05


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
        run(make_encoder(), augment=True, epochs=40, seed=seed, **images) for seed in (0, 0, 1)
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
