"""The profile of an encoder's blocks against slow, plain versions of each measurement."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_encoder import make_encoder, make_processor, open_digits
from torch import Tensor, nn

from mim_refiner_hf import load_encoder
from mim_refiner_hf.data.images import ImageDataset, open_images
from mim_refiner_hf.data.loading import Loading
from mim_refiner_hf.data.views import ViewSpec, make_view, view_specs
from mim_refiner_hf.evaluation import (
    block_profile,
    draw_block_profile,
    knn_accuracy,
    profile_table,
    search,
)
from mim_refiner_hf.evaluation.block_analysis import (
    assemble,
    attention_distances,
    relative_improvements,
)
from mim_refiner_hf.evaluation.neighbour_agreement import RandomView, neighbour_agreement
from mim_refiner_hf.evaluation.reconstruction import (
    block_errors,
    decoder_recipe,
    mean_errors,
    reconstruction_losses,
    train_decoders,
)
from mim_refiner_hf.pretraining.mae import mae_loss
from mim_refiner_hf.pretraining.mae_decoder import MaeDecoder


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return open_digits()


def without_labels(images: ImageDataset) -> ImageDataset:
    found = images.found._replace(labels=None, class_names=None)
    return ImageDataset(found, indices=images.indices)


# ---- the measurements


def slow_agreement(first: np.ndarray, second: np.ndarray, k: int) -> float:
    """One image at a time, in float64."""

    def neighbours(features: np.ndarray, row: int) -> set[int]:
        points = (features - features.mean(0)) / (features.std(0, ddof=1) + 1e-6)
        cosine = points @ points[row] / np.linalg.norm(points, axis=1) / np.linalg.norm(points[row])
        return set([other for other in np.argsort(-cosine).tolist() if other != row][:k])

    shared = [len(neighbours(first, row) & neighbours(second, row)) for row in range(len(first))]
    return float(np.mean(shared)) / k


@pytest.mark.parametrize("k", [1, 5])
def test_neighbour_agreement_equals_the_slow_one_in_any_chunks(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = torch.randn(40, 8) * torch.arange(1, 9)
    second = first + 0.7 * torch.randn(40, 8) * torch.arange(1, 9)
    expected = slow_agreement(first.double().numpy(), second.double().numpy(), k)
    assert 0.05 < expected < 0.9
    assert neighbour_agreement(first, second, k).mean().item() == pytest.approx(expected, abs=1e-6)
    monkeypatch.setattr(search, "QUERIES_AT_ONCE", 7)
    monkeypatch.setattr(search, "BANK_AT_ONCE", 16)
    assert neighbour_agreement(first, second, k).mean().item() == pytest.approx(expected, abs=1e-6)


def test_neighbour_agreement_is_one_for_equal_views_and_chance_for_unrelated_ones() -> None:
    features = torch.randn(400, 16)
    assert neighbour_agreement(features, features * 2 + 1).mean() == 1
    assert neighbour_agreement(features, torch.randn(400, 16)).mean().item() == pytest.approx(
        10 / 399, abs=0.01
    )
    with pytest.raises(ValueError, match=r"k=10 must lie between 1 and 9"):
        neighbour_agreement(features[:10], features[:10])
    with pytest.raises(ValueError, match=r"one shape, not \(400, 16\) and \(399, 16\)"):
        neighbour_agreement(features, features[1:])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # paper, App. C.2: divided by the largest change
        (
            [0.2, 0.5, 0.6, 0.45],
            [None, 1, 1 / 3, -0.5],
        ),
        ([-0.9, -0.5, -0.4, -0.2], [None, 1, 0.25, 0.5]),  # a loss that falls
        ([0.8, 0.6, 0.5], [None, -1, -0.5]),  # nothing improves
        ([0.5, 0.5], [None, 0]),
        ([0.5], [None]),
    ],
)
def test_relative_improvements(values: list[float], expected: list[float | None]) -> None:
    assert relative_improvements(values) == [
        value if value is None else pytest.approx(value) for value in expected
    ]


def test_attention_distance_of_uniform_attention_is_the_mean_distance() -> None:
    """Without queries every token attends to all.

    3 x 2 patches of 4 px, one CLS that has no place.
    """
    encoder = make_encoder(image_size=[12, 8], num_register_tokens=2)
    for layer in encoder.layers[:2]:
        nn.init.zeros_(layer.attention.q_proj.weight)
        nn.init.zeros_(layer.attention.q_proj.bias)
    places = [(4 * row, 4 * column) for row in range(3) for column in range(2)]
    mean = np.mean([np.hypot(a[0] - b[0], a[1] - b[1]) for a in places for b in places])
    found = attention_distances(encoder, torch.randn(10, 3, 12, 8))
    assert len(found) == 4
    assert found[:2] == [pytest.approx(mean, rel=1e-5)] * 2
    assert all(abs(value - mean) > 1e-3 for value in found[2:])
    assert encoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("positions", ["absolute", "shared_relative"])
def test_attention_distance_equals_the_slow_one(positions: str) -> None:
    encoder, pixels = make_encoder(position_encoding=positions), torch.randn(3, 3, 16, 16)
    found = attention_distances(encoder, pixels)
    encoder.set_attn_implementation("eager")
    with torch.no_grad():
        weights = (
            encoder(pixels, output_attentions=True).attentions[2].double().numpy()
        )  # (3, 2, 17, 17)
    distances = []
    for image in weights:
        for head in image:
            for query in range(16):
                shares = head[query + 1, 1:] / head[query + 1, 1:].sum()
                to = [
                    np.hypot(4 * (query // 4 - key // 4), 4 * (query % 4 - key % 4))
                    for key in range(16)
                ]
                distances.append(float(shares @ to))
    assert found[2] == pytest.approx(np.mean(distances), rel=1e-5)


def test_a_view_is_a_function_of_seed_and_pixels(digits: ImageDataset) -> None:
    spec = ViewSpec(16, (0.3, 1.0), 0.5, 0.0, True)
    images = [digits[i].image for i in range(6)]
    view = RandomView(make_processor(), spec, seed=1)
    pixels = view(images, return_tensors="pt")["pixel_values"]
    alone = torch.cat(
        [view([image], return_tensors="pt")["pixel_values"] for image in reversed(images)]
    ).flip(0)
    assert torch.equal(pixels, alone)
    one = make_processor()(
        [make_view(images[2], spec, view._generator(images[2]))], return_tensors="pt"
    )["pixel_values"]
    assert torch.equal(pixels[2:3], one)
    other = dataclasses.replace(view, seed=2)(images, return_tensors="pt")["pixel_values"]
    assert not torch.equal(pixels, other)


# ---- reconstruction


def pixels_and_noise() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, 16, 16), torch.rand(6, 16)


def test_the_last_block_reconstructs_as_a_mae_with_a_plain_norm() -> None:
    """The encoder's final norm made plain is the norm that the decoders read through."""
    encoder = make_encoder()
    nn.init.ones_(encoder.norm.weight)
    nn.init.zeros_(encoder.norm.bias)
    recipe = decoder_recipe(encoder.config, epochs=1, batch_size=8, flip=0.5, seed=0)
    decoders = nn.ModuleList(MaeDecoder(recipe) for _ in encoder.layers)
    pixels, noise = pixels_and_noise()
    errors = list(block_errors(encoder, decoders, pixels, noise, 0.75))
    assert len(errors) == 4
    torch.testing.assert_close(
        errors[-1], mae_loss(encoder, decoders[-1], pixels, noise, 0.75), atol=1e-4, rtol=0
    )
    shorter = make_encoder()
    # an encoder that ends after block 1
    shorter.layers = shorter.layers[:2]
    nn.init.ones_(shorter.norm.weight)
    nn.init.zeros_(shorter.norm.bias)
    torch.testing.assert_close(
        errors[1], mae_loss(shorter, decoders[1], pixels, noise, 0.75), atol=1e-4, rtol=0
    )


def test_decoders_learn_and_the_encoder_does_not(digits: ImageDataset) -> None:
    encoder, processor = make_encoder(), make_processor()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    recipe = decoder_recipe(encoder.config, epochs=12, batch_size=30, flip=0.0, seed=0)
    few = dataclasses.replace(recipe, epochs=1, warmup_epochs=0)
    train, test = digits.subset(range(90)), digits.subset(range(90, 120))
    untrained = mean_errors(
        encoder, train_decoders(encoder, processor, train, few, 0), processor, test, recipe
    )
    losses = reconstruction_losses(
        encoder, processor, train, test, epochs=12, batch_size=30, flip=0.0
    )
    assert len(losses) == 4 and all(
        loss < 0.9 * start for loss, start in zip(losses, untrained, strict=True)
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert losses == reconstruction_losses(
        encoder, processor, train, test, epochs=12, batch_size=30, flip=0.0
    )


def test_reconstruction_is_refused_where_patches_cannot_be_left_out(digits: ImageDataset) -> None:
    for changes, message in (
        ({"position_encoding": "relative"}, r"needs absolute positions.*are relative"),
        ({"image_size": [16, 8]}, r"square native size, not 16x8"),
    ):
        encoder = make_encoder(**changes)
        with pytest.raises(ValueError, match=message):
            reconstruction_losses(encoder, make_processor(), digits, digits)
    with pytest.raises(ValueError, match=r"batch_size=32: .*20 images"):
        reconstruction_losses(make_encoder(), make_processor(), digits.subset(range(20)), digits)


# ---- the profile


def test_profile_of_every_block(digits: ImageDataset) -> None:
    encoder, processor = make_encoder().train(), make_processor()
    train, test = digits.subset(range(80)), digits.subset(range(80, 120))
    profile = block_profile(
        encoder, processor, train, test, reconstruction_epochs=1, loading=Loading(17)
    )
    assert [block.block for block in profile] == [0, 1, 2, 3]
    assert encoder.training

    outputs: list[Tensor] = []
    hook = encoder.layers[2].register_forward_hook(
        lambda module, inputs, output: outputs.append(output[:, 0].detach())
    )
    for images in (train, test):
        encoder(
            processor([images[i].image for i in range(len(images))], return_tensors="pt")[
                "pixel_values"
            ]
        )
    hook.remove()
    bank, found = outputs
    expected = knn_accuracy(
        bank, torch.from_numpy(train.labels), found, torch.from_numpy(test.labels)
    )
    assert profile[2].knn_accuracy == pytest.approx(expected, abs=1e-6)
    features = found.double().numpy()
    assert profile[2].feature_mean == pytest.approx(features.mean(), abs=1e-5)
    assert profile[2].feature_variance == pytest.approx(
        features.var(axis=0, ddof=1).mean(), rel=1e-4
    )
    accuracies = [block.knn_accuracy for block in profile]
    assert [block.knn_improvement for block in profile] == relative_improvements(accuracies)
    losses = [block.reconstruction_loss for block in profile]
    assert [block.reconstruction_improvement for block in profile] == relative_improvements(
        [-loss for loss in losses]
    )
    assert profile == block_profile(
        encoder, processor, train, test, reconstruction_epochs=1, loading=Loading(40)
    )


def test_profile_without_labels(digits: ImageDataset, tmp_path: Path) -> None:
    images = without_labels(digits)
    encoder, processor = make_encoder(), make_processor()
    profile = block_profile(
        encoder, processor, images.subset(range(60)), images.subset(range(60, 120)), seed=3
    )
    assert (
        {block.knn_accuracy for block in profile}
        == {block.reconstruction_loss for block in profile}
        == {None}
    )
    (spec,) = view_specs(1, 0, 16, 16, (0.25, 1.0), (0.25, 1.0), colour=True)
    pictures, sides = [images[i].image for i in range(60, 120)], []
    for shown in (processor, RandomView(processor, spec, seed=3)):
        with torch.no_grad():
            outputs = encoder(
                shown(pictures, return_tensors="pt")["pixel_values"], output_hidden_states=True
            )
        sides.append(outputs.hidden_states[2][:, 0].double().numpy())  # CLS after block 1
    assert profile[1].neighbour_agreement == pytest.approx(slow_agreement(*sides, k=10), abs=0.01)
    table = profile_table(profile)
    assert "k-NN" not in table and "reconstruction" not in table and "neighbour agreement" in table
    draw_block_profile(profile, tmp_path / "blocks.png", [2, 3])
    with Image.open(tmp_path / "blocks.png") as picture:
        # three panels: features, attention, variance
        assert picture.size == (3 * 396, 352)
    with pytest.raises(ValueError, match=r"eval_images has 10 images"):
        block_profile(make_encoder(), make_processor(), images, images.subset(range(10)))


def test_table_is_markdown() -> None:
    profile = assemble(
        [0.25, 0.5, 0.375], [0.75, 0.5, 0.625], None, [torch.randn(5, 3)] * 3, [1.0] * 3
    )
    lines = profile_table(profile).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:3] == ["block", "k-NN accuracy", "its improvement"]
    assert [row[:3] for row in cells[2:]] == [
        ["0", "25.0%", ""],
        ["1", "50.0%", "+1.00"],
        ["2", "37.5%", "-0.50"],
    ]


# ---- on the real small model


@pytest.mark.slow
def test_a_real_small_mae_has_the_profile_in_its_readme(shared: Path) -> None:
    """Its k-NN per block rises over the first four blocks and stays.

    10 000 + 2000 images there, 250 + 100 here.
    """
    encoder = load_encoder(shared / "models/mae-tiny-cifar10")
    data = shared / "data/cifar10"
    train = open_images(str(data / "train.parquet")).subset(range(0, 20000, 80))
    test = open_images(str(data / "test.parquet")).subset(range(0, 4000, 40))
    accuracies = [
        block.knn_accuracy for block in block_profile(encoder, encoder.image_processor, train, test)
    ]
    assert None not in accuracies
    assert max(accuracies[6:]) > accuracies[0] + 0.03
    assert 0.2 < accuracies[-1] < 0.45
