"""The profile of an encoder's blocks against slow, plain versions of each measurement, and what `--head_blocks auto` makes of it."""

import dataclasses
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel, RefineRecipe, load_encoder
from mim_refiner_hf.data import ImageDataset, ImageStream, open_images, open_stream
from mim_refiner_hf.evaluation import (
    BlockProfile,
    block_analysis,
    block_profile,
    draw_block_profile,
    knn_accuracy,
    profile_table,
    propose_head_blocks,
)
from mim_refiner_hf.evaluation.block_analysis import (
    RandomView,
    assemble,
    attention_distances,
    neighbour_agreement,
    relative_improvements,
)
from mim_refiner_hf.evaluation.reconstruction import (
    block_errors,
    decoder_recipe,
    mean_errors,
    reconstruction_losses,
    train_decoders,
)
from mim_refiner_hf.pretraining.mae import MaeDecoder, mae_loss
from mim_refiner_hf.publishing.hub import save_model_folder
from mim_refiner_hf.refinement import run as run_module
from mim_refiner_hf.refinement.head_choice import check_measurable
from mim_refiner_hf.refinement.run import run
from mim_refiner_hf.refinement.views import ViewSpec, make_view, view_specs

SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}


def make_encoder(**changes: Any) -> MimRefinerModel:
    """A tiny encoder with random values in every tensor."""
    torch.manual_seed(0)
    encoder = MimRefinerModel(MimRefinerConfig(**{**SHAPE, "image_size": 16, "patch_size": 4, **changes})).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def make_processor(height: int = 16, width: int = 16) -> MimRefinerImageProcessor:
    return MimRefinerImageProcessor(size={"height": height, "width": width}, do_center_crop=False)


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return open_images("digits").subset(range(120))


def without_labels(images: ImageDataset) -> ImageDataset:
    found = images.found._replace(labels=None, class_names=None)
    return ImageDataset(found, indices=images.indices)


def profile_of(scores: list[float], labelled: bool = True) -> list[BlockProfile]:
    """A profile whose k-NN accuracy, or without labels agreement, is `scores`; the other one says the opposite."""
    others = [1 - score for score in scores]
    accuracies, agreements = (scores, others) if labelled else (None, scores)
    return assemble(accuracies, agreements, None, [torch.randn(5, 3) for _ in scores], [1.0] * len(scores))


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
def test_neighbour_agreement_equals_the_slow_one_in_any_chunks(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first = torch.randn(40, 8) * torch.arange(1, 9)
    second = first + 0.7 * torch.randn(40, 8) * torch.arange(1, 9)
    expected = slow_agreement(first.double().numpy(), second.double().numpy(), k)
    assert 0.05 < expected < 0.9
    assert neighbour_agreement(first, second, k).mean().item() == pytest.approx(expected, abs=1e-6)
    monkeypatch.setattr(block_analysis, "SIMILARITIES_AT_ONCE", 7 * 40)
    assert neighbour_agreement(first, second, k).mean().item() == pytest.approx(expected, abs=1e-6)


def test_neighbour_agreement_is_one_for_equal_views_and_chance_for_unrelated_ones() -> None:
    features = torch.randn(400, 16)
    assert neighbour_agreement(features, features * 2 + 1).mean() == 1
    assert neighbour_agreement(features, torch.randn(400, 16)).mean().item() == pytest.approx(10 / 399, abs=0.01)
    with pytest.raises(ValueError, match=r"k=10 must lie between 1 and 9"):
        neighbour_agreement(features[:10], features[:10])
    with pytest.raises(ValueError, match=r"one shape, not \(400, 16\) and \(399, 16\)"):
        neighbour_agreement(features, features[1:])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.2, 0.5, 0.6, 0.45], [None, 1, 1 / 3, -0.5]),  # paper, App. C.2: divided by the largest change
        ([-0.9, -0.5, -0.4, -0.2], [None, 1, 0.25, 0.5]),  # a loss that falls
        ([0.8, 0.6, 0.5], [None, -1, -0.5]),  # nothing improves
        ([0.5, 0.5], [None, 0]),
        ([0.5], [None]),
    ],
)
def test_relative_improvements(values: list[float], expected: list[float | None]) -> None:
    assert relative_improvements(values) == [value if value is None else pytest.approx(value) for value in expected]


def test_attention_distance_of_uniform_attention_is_the_mean_distance() -> None:
    """Without queries every token attends to all; 3 x 2 patches of 4 px, one CLS that has no place."""
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
        weights = encoder(pixels, output_attentions=True).attentions[2].double().numpy()  # (3, 2, 17, 17)
    distances = []
    for image in weights:
        for head in image:
            for query in range(16):
                shares = head[query + 1, 1:] / head[query + 1, 1:].sum()
                to = [np.hypot(4 * (query // 4 - key // 4), 4 * (query % 4 - key % 4)) for key in range(16)]
                distances.append(float(shares @ to))
    assert found[2] == pytest.approx(np.mean(distances), rel=1e-5)


def test_a_view_is_a_function_of_seed_and_pixels(digits: ImageDataset) -> None:
    spec = ViewSpec(16, (0.3, 1.0), 0.5, 0.0, True)
    images = [digits[i].image for i in range(6)]
    view = RandomView(make_processor(), spec, seed=1)
    pixels = view(images, return_tensors="pt")["pixel_values"]
    alone = torch.cat([view([image], return_tensors="pt")["pixel_values"] for image in reversed(images)]).flip(0)
    assert torch.equal(pixels, alone)
    one = make_processor()([make_view(images[2], spec, view._generator(images[2]))], return_tensors="pt")["pixel_values"]
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
    torch.testing.assert_close(errors[-1], mae_loss(encoder, decoders[-1], pixels, noise, 0.75), atol=1e-4, rtol=0)
    shorter = make_encoder()
    shorter.layers = shorter.layers[:2]  # an encoder that ends after block 1
    nn.init.ones_(shorter.norm.weight)
    nn.init.zeros_(shorter.norm.bias)
    torch.testing.assert_close(errors[1], mae_loss(shorter, decoders[1], pixels, noise, 0.75), atol=1e-4, rtol=0)


def test_decoders_learn_and_the_encoder_does_not(digits: ImageDataset) -> None:
    encoder, processor = make_encoder(), make_processor()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    recipe = decoder_recipe(encoder.config, epochs=12, batch_size=30, flip=0.0, seed=0)
    few = dataclasses.replace(recipe, epochs=1, warmup_epochs=0)
    train, test = digits.subset(range(90)), digits.subset(range(90, 120))
    untrained = mean_errors(encoder, train_decoders(encoder, processor, train, few, 0), processor, test, recipe)
    losses = reconstruction_losses(encoder, processor, train, test, epochs=12, batch_size=30, flip=0.0)
    assert len(losses) == 4 and all(loss < 0.9 * start for loss, start in zip(losses, untrained, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert losses == reconstruction_losses(encoder, processor, train, test, epochs=12, batch_size=30, flip=0.0)


def test_reconstruction_is_refused_where_patches_cannot_be_left_out(digits: ImageDataset) -> None:
    for changes, message in (
        ({"position_encoding": "relative"}, r"needs absolute positions.*are relative"),
        ({"image_size": [16, 8]}, r"square native size, not 16x8"),
    ):
        encoder = make_encoder(**changes)
        with pytest.raises(ValueError, match=message):
            reconstruction_losses(encoder, make_processor(), digits, digits)
    with pytest.raises(ValueError, match=r"batch_size 32 .*20 images"):
        reconstruction_losses(make_encoder(), make_processor(), digits.subset(range(20)), digits)


# ---- the profile


def test_profile_of_every_block(digits: ImageDataset) -> None:
    encoder, processor = make_encoder().train(), make_processor()
    train, test = digits.subset(range(80)), digits.subset(range(80, 120))
    profile = block_profile(encoder, processor, train, test, reconstruction_epochs=1, batch_size=17)
    assert [block.block for block in profile] == [0, 1, 2, 3]
    assert encoder.training

    outputs: list[Tensor] = []
    hook = encoder.layers[2].register_forward_hook(lambda module, inputs, output: outputs.append(output[:, 0].detach()))
    for images in (train, test):
        encoder(processor([images[i].image for i in range(len(images))], return_tensors="pt")["pixel_values"])
    hook.remove()
    bank, found = outputs
    expected = knn_accuracy(bank, torch.from_numpy(train.labels), found, torch.from_numpy(test.labels))
    assert profile[2].knn_accuracy == pytest.approx(expected, abs=1e-6)
    features = found.double().numpy()
    assert profile[2].feature_mean == pytest.approx(features.mean(), abs=1e-5)
    assert profile[2].feature_variance == pytest.approx(features.var(axis=0, ddof=1).mean(), rel=1e-4)
    accuracies = [block.knn_accuracy for block in profile]
    assert [block.knn_improvement for block in profile] == relative_improvements(accuracies)
    losses = [block.reconstruction_loss for block in profile]
    assert [block.reconstruction_improvement for block in profile] == relative_improvements([-loss for loss in losses])
    assert profile == block_profile(encoder, processor, train, test, reconstruction_epochs=1, batch_size=40)


def test_profile_without_labels(digits: ImageDataset, tmp_path: Path) -> None:
    images = without_labels(digits)
    encoder, processor = make_encoder(), make_processor()
    profile = block_profile(encoder, processor, images.subset(range(60)), images.subset(range(60, 120)), seed=3)
    assert {block.knn_accuracy for block in profile} == {block.reconstruction_loss for block in profile} == {None}
    (spec,) = view_specs(1, 0, 16, 16, (0.25, 1.0), (0.25, 1.0), colour=True)
    pictures, sides = [images[i].image for i in range(60, 120)], []
    for shown in (processor, RandomView(processor, spec, seed=3)):
        with torch.no_grad():
            outputs = encoder(shown(pictures, return_tensors="pt")["pixel_values"], output_hidden_states=True)
        sides.append(outputs.hidden_states[2][:, 0].double().numpy())  # CLS after block 1
    assert profile[1].neighbour_agreement == pytest.approx(slow_agreement(*sides, k=10), abs=0.01)
    table = profile_table(profile)
    assert "k-NN" not in table and "reconstruction" not in table and "neighbour agreement" in table
    draw_block_profile(profile, tmp_path / "blocks.png", [2, 3])
    with Image.open(tmp_path / "blocks.png") as picture:
        assert picture.size == (3 * 396, 352)  # three panels: features, attention, variance
    with pytest.raises(ValueError, match=r"eval_images has 10 images"):
        block_profile(make_encoder(), make_processor(), images, images.subset(range(10)))


def test_table_is_markdown() -> None:
    lines = profile_table(profile_of([0.25, 0.5, 0.375])).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:3] == ["block", "k-NN accuracy", "its improvement"]
    assert [row[:3] for row in cells[2:]] == [["0", "25.0%", ""], ["1", "50.0%", "+1.00"], ["2", "37.5%", "-0.50"]]


# ---- which blocks get a head


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    ("scores", "frozen", "first"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 0, 4),  # the last is best: the last third
        ([0.1, 0.2, 0.3, 0.6, 0.5, 0.4], 0, 3),  # the best lies before the last third: from there on
        ([0.1, 0.2, 0.3, 0.605, 0.5, 0.6], 0, 4),  # not by more than noise
        ([0.9, 0.2, 0.3, 0.4, 0.5, 0.4], 0, 3),  # far too early: the last half
        ([0.1, 0.2, 0.3, 0.6, 0.5, 0.4], 4, 4),  # frozen blocks carry none
        ([0.1, 0.2, 0.3, 0.6, 0.5, 0.4], 5, 5),
        ([0.3, 0.2], 0, 0),
        ([0.3], 0, 0),
    ],
)
def test_proposal(scores: list[float], frozen: int, first: int, labelled: bool) -> None:
    profile = profile_of(scores, labelled)
    blocks, reason = propose_head_blocks(profile, frozen)
    assert blocks == list(range(first, len(scores)))
    assert reason.startswith(
        "k-NN accuracy is best in block" if labelled else "agreement of neighbours under augmentation is best in"
    )
    assert ("blocks are frozen" in reason) == (frozen > 0)


def test_proposal_tells_its_evidence() -> None:
    _, reason = propose_head_blocks(profile_of([0.1, 0.2, 0.3, 0.6, 0.5, 0.4]))
    assert reason == (
        "k-NN accuracy is best in block 3 (60.0 %) and falls to 40.0 % in block 5, before the last third of the blocks: heads from "
        "there on"
    )
    _, reason = propose_head_blocks(profile_of([0.1, 0.2, 0.3, 0.6, 0.7, 0.65]))
    assert reason == (
        "k-NN accuracy is best in block 4 (70.0 %) and falls to 65.0 % in block 5: the last third of the blocks, 4 to 5, includes it"
    )
    with pytest.raises(ValueError, match=r"frozen=6 of 6 blocks"):
        propose_head_blocks(profile_of([0.1] * 6), frozen=6)


# ---- in a run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model_folder(folder, make_encoder(), make_processor())
    return str(folder)


@pytest.fixture
def recipe(model: str, tmp_path: Path) -> Callable[..., RefineRecipe]:
    """A refinement of 3 + 3 steps on digits, with some fields changed."""

    def changed(output: str = "out", **changes: Any) -> RefineRecipe:
        fields: dict[str, Any] = {
            "model": model,
            "dataset": "digits",
            "head_blocks": "auto",
            "eval_fraction": 0.0,
            "projector_dim": 16,
            "predictor_dim": 16,
            "embedding_dim": 8,
            "queue_size": 64,
            "topk": 5,
            "local_views": 1,
            "colour": False,
            "flip": 0.0,
            "batch_size": 32,
            "max_steps": 3,
            "warmup_epochs": 0,
            "num_workers": 0,
            "log_every": 1,
            "report_to": "none",
            "output_dir": str(tmp_path / output),
        }
        return RefineRecipe(**{**fields, **changes})

    return changed


def losses(recipe: RefineRecipe) -> list[float]:
    lines = [json.loads(line) for line in (Path(recipe.output_dir) / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_auto_measures_chooses_says_why_and_is_kept(
    recipe: Callable[..., RefineRecipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = recipe()
    run(dataclasses.replace(asked, stage="warmup"))  # stops between the stages
    printed = capsys.readouterr().out
    assert "what measuring all blocks proposes (auto; by default 2, output)" in printed
    assert (Path(asked.output_dir) / "blocks.png").stat().st_size > 0
    assert json.loads((Path(asked.output_dir) / "recipe.json").read_text())["head_blocks"] == "auto"

    def again(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("measured a second time")

    monkeypatch.setattr(run_module, "choose_head_blocks", again)
    result = run(asked)
    assert result is not None
    choice = json.loads((Path(asked.output_dir) / "metrics.json").read_text())["head_choice"]
    assert f"Heads on blocks {', '.join(map(str, choice['blocks']))}: {choice['reason']}" in printed
    profile = [BlockProfile(**block) for block in choice["profile"]]
    assert propose_head_blocks(profile) == (choice["blocks"], choice["reason"])
    assert result.metrics["recipe"]["head_blocks"] == "auto"

    named = recipe("named", head_blocks=choice["blocks"])
    run(named)
    assert losses(named) == losses(asked)  # the same run, to the last bit
    with pytest.raises(ValueError, match=r"another recipe \(head_blocks was auto, is \[2, 3\]"):
        run(dataclasses.replace(asked, head_blocks=[2, 3]))


def test_auto_reads_what_the_heads_read_and_leaves_frozen_blocks_alone(
    recipe: Callable[..., RefineRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, Any] = {}
    choose = run_module.choose_head_blocks

    def watched(recipe: RefineRecipe, encoder: MimRefinerModel, *arguments: Any) -> dict[str, Any]:
        chosen.update(choose(recipe, encoder, *arguments), pooling=encoder.config.pooling)
        return chosen

    monkeypatch.setattr(run_module, "choose_head_blocks", watched)
    run(recipe(freeze_blocks=3, pooling="mean", max_steps=1))
    assert chosen["blocks"] == [3]
    assert chosen["pooling"] == "mean"


def test_auto_needs_images_to_measure(recipe: Callable[..., RefineRecipe], digits: ImageDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--head_blocks auto: 49 images are too few to measure, 50"):
        check_measurable(digits.subset(range(49)))
    check_measurable(digits.subset(range(50)))
    for i in range(40):
        (tmp_path / "few").mkdir(exist_ok=True)
        digits[i].image.save(tmp_path / f"few/{i}.png")
    assert isinstance(open_stream(str(tmp_path / "few")), ImageStream)
    with pytest.raises(ValueError, match=r"--head_blocks auto: 40 images are too few"):
        run(recipe(dataset=str(tmp_path / "few")))
    with pytest.raises(ValueError, match=r"--head_blocks auto: a stream cannot be measured.*--eval_dataset"):
        run(recipe(dataset=str(tmp_path / "few"), streaming=True))
    assert not (tmp_path / "out").exists()


# ---- on the real small model, and as a reader runs it


def test_a_real_small_mae_has_the_profile_in_its_readme(shared: Path) -> None:
    """Its k-NN per block rises over the first four blocks and stays; 10 000 + 2000 images there, 250 + 100 here."""
    encoder = load_encoder(shared / "models/mae-tiny-cifar10")
    data = shared / "data/cifar10"
    train = open_images(str(data / "train.parquet")).subset(range(0, 20000, 80))
    test = open_images(str(data / "test.parquet")).subset(range(0, 4000, 40))
    accuracies = [block.knn_accuracy for block in block_profile(encoder, encoder.image_processor, train, test)]
    assert None not in accuracies
    assert max(accuracies[6:]) > accuracies[0] + 0.03
    assert 0.2 < accuracies[-1] < 0.45


def test_example_prints_table_and_proposal(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[1] / "examples/block_profile.py"
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", [str(script), "--model", model, "--limit", "90", "--output", str(picture)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0 and picture.stat().st_size > 0
    printed = capsys.readouterr().out
    assert "60 images as k-NN bank, 30 measured" in printed
    assert len([line for line in printed.splitlines() if line.startswith("|")]) == 2 + SHAPE["num_hidden_layers"]
    assert "Heads on blocks " in printed and "is best in block " in printed
