"""data2vec 2.0 equals fairseq: masks, decoder, targets, schedules, and two whole updates; and what
of it does not depend on how the batch is cut.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import GOLDENS, facts, tensors
from safetensors.torch import load_file
from torch import Tensor, nn

from mim_refiner_hf.conversion import load_encoder
from mim_refiner_hf.pretraining.data2vec2 import Data2vec2Objective
from mim_refiner_hf.pretraining.data2vec2_student import ConvDecoder, averaged_targets
from mim_refiner_hf.pretraining.masks import exactly, inverse_blocks, squares
from mim_refiner_hf.pretraining.objective import Losses, Masks
from mim_refiner_hf.pretraining.recipe import PretrainRecipe, PretrainSteps
from mim_refiner_hf.runtime.settings import read_fields

DECODER = "modality_encoders.IMAGE.decoder."
MASKINGS = facts("data2vec2-masking").get("kinds", {"none": {}})
DECODERS = facts("data2vec2-decoder").get("kinds", {"none": {}})
RUNS = facts("data2vec2-schedules", "schedules.json").get("runs", {"none": {}})


# --- masks


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("kind", MASKINGS)
def test_squares_and_their_number_equal_fairseq(kind: str) -> None:
    case = MASKINGS[kind]
    found = load_file(GOLDENS / "data2vec2-masking/outputs.safetensors")
    grid = (case["grid"], case["grid"])
    recipe = PretrainRecipe(
        objective="data2vec2",
        image_size=4 * case["grid"],
        patch_size=4,
        mask_ratio=case["mask_prob"],
        mask_adjust=case["mask_prob_adjust"],
        mask_length=case["mask_length"],
        num_masks=case["rows"],
    )
    counts = (case["visible"], case["centres_per_row"])
    assert (recipe.num_visible, recipe.num_centres) == counts

    centres = found[f"{kind}.centres"].numpy()
    visible = squares(centres, grid, case["mask_length"])
    expected = found[f"{kind}.blocks_visible"].bool().numpy()
    assert np.array_equal(visible, expected)

    # made up to the count: nothing of the squares is lost, or nothing beside them is added
    rng = np.random.default_rng(0)
    kept = exactly(visible, rng.random(visible.shape), case["visible"])
    for places, chosen in zip(kept, visible, strict=True):
        assert len(set(places)) == case["visible"]
        inside = set(np.flatnonzero(chosen))
        assert set(places) <= inside or inside <= set(places)
        assert list(places) == sorted(places)


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("kind", MASKINGS)
def test_patches_stay_visible_as_often_as_fairseqs(kind: str) -> None:
    case = MASKINGS[kind]
    grid = (case["grid"], case["grid"])
    rows = 20_000
    places = inverse_blocks(
        grid,
        np.random.default_rng(1),
        rows=rows,
        visible=case["visible"],
        centres=case["centres_per_row"],
        length=case["mask_length"],
    )
    visible = np.zeros((rows, grid[0] * grid[1]))
    np.put_along_axis(visible, places, 1.0, axis=1)
    image = visible.reshape(rows, *grid)
    expected = load_file(GOLDENS / "data2vec2-masking/outputs.safetensors")
    expected_frequency = expected[f"{kind}.visible_frequency"].numpy()
    assert np.abs(image.mean(axis=0) - expected_frequency).max() < 0.015

    neighbours = (image[:, :, :-1] * image[:, :, 1:]).sum() / image[:, :, :-1].sum()
    statistics = case["statistics_of_20000_rows"]
    assert abs(neighbours - statistics["visible_right_neighbour_of_visible"]) < 0.015


def test_masks_and_noise_are_a_function_of_seed_step_and_sample() -> None:
    objective = small_objective()
    one = objective.masks(3, [5, 9])
    again = objective.masks(3, [9])
    assert torch.equal(one["visible"][1], again["visible"][0])
    assert torch.equal(objective.noise(one, 16)[1], objective.noise(again, 16)[0])
    for other in (objective.masks(4, [9]), objective.masks(3, [8])):
        assert not torch.equal(again["visible"], other["visible"])
        assert not torch.equal(objective.noise(again, 16), objective.noise(other, 16))
    # the masks of one image differ, and so does their noise
    assert not torch.equal(one["visible"][0, 0], one["visible"][0, 1])
    noise = objective.noise(one, 16)
    assert not torch.equal(noise[0, 0], noise[0, 1])
    assert noise.std().item() == pytest.approx(objective.recipe.mask_noise, rel=0.1)


# --- decoder and targets


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("kind", DECODERS)
def test_decoder_equals_fairseq(kind: str) -> None:
    case = DECODERS[kind]
    inputs, outputs = tensors("data2vec2-decoder")
    decoder = ConvDecoder(decoder_recipe(case), case["dim"])
    state = of_prefix(load_file(GOLDENS / "data2vec2-decoder/init.safetensors"), f"{kind}.")
    decoder.load_state_dict(decoder_names(state))

    tokens = inputs[f"{kind}.input"].requires_grad_()
    output = decoder(tokens, (case["grid"], case["grid"]))
    (output * inputs[f"{kind}.output_weight"]).sum().backward()
    close = {"atol": 5e-5, "rtol": 0}
    torch.testing.assert_close(output, outputs[f"{kind}.output"], **close)
    close = {"atol": 2e-5, "rtol": 1e-3}
    torch.testing.assert_close(tokens.grad, outputs[f"{kind}.grad_input"], **close)
    expected = decoder_names(of_prefix(outputs, f"{kind}.grad."))
    assert expected.keys() == dict(decoder.named_parameters()).keys()
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], **close, msg=name)


@pytest.mark.usefixtures("goldens")
def test_targets_equal_fairseq() -> None:
    inputs, outputs = tensors("data2vec2-targets")
    layers = list(inputs["layers"])
    count = facts("data2vec2-targets")["average_top_k_layers"]
    small = [0.001 * layer for layer in layers]
    rounded = [layer.bfloat16() for layer in layers]
    for name, chosen in {
        "targets": layers[-count:],
        "targets_all_layers": layers,
        "targets_one_layer": layers[-1:],
        "targets_of_small_layers": small[-count:],
        "targets_from_bfloat16": rounded[-count:],
    }.items():
        targets = averaged_targets(chosen)
        torch.testing.assert_close(targets, outputs[name], atol=1e-5, rtol=0, msg=name)
    cls = averaged_targets(layers[-count:]).mean(dim=1)
    torch.testing.assert_close(cls, outputs["cls_targets"], atol=1e-5, rtol=0)


# --- a step


class GivenNoise(Data2vec2Objective):
    """The method with noise that is given: by patch (b, M, N, D), 0 where it is visible."""

    def noise(self, masks: Masks, patches: int) -> Tensor:
        hidden = torch.ones(masks["noise"].shape[:3], dtype=torch.bool)
        hidden.scatter_(2, masks["visible"], False)
        shape = (*masks["visible"].shape[:2], -1, masks["noise"].shape[3])
        return masks["noise"][hidden].view(shape)


def converted(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Tensors of fairseq's encoder, weights or their gradients, under our names."""
    settings = {"model": {"num_heads": facts("data2vec2-step")["dims"]["num_heads"]}}
    torch.save({"model": state, "cfg": settings}, folder / "state.pt")
    return load_encoder(folder / "state.pt", family="data2vec2").state_dict()


def step_objective(folder: Path, **changes: Any) -> GivenNoise:
    """The networks of data2vec2-step, with rates and momenta of its two updates."""
    case = facts("data2vec2-step")
    dims, objective, optimizer = case["dims"], case["objective"], case["optimizer"]
    recipe = PretrainRecipe(
        objective="data2vec2",
        image_size=dims["image_size"],
        patch_size=dims["patch_size"],
        hidden_size=dims["dim"],
        num_hidden_layers=dims["depth"],
        num_attention_heads=dims["num_heads"],
        decoder_size=dims["decoder_dim"],
        decoder_layers=dims["decoder_layers"],
        decoder_kernel=dims["decoder_kernel"],
        decoder_groups=dims["decoder_groups"],
        num_masks=dims["clone_batch"],
        batch_size=dims["batch_size"],
        target_layers=objective["average_top_k_layers"],
        mask_ratio=objective["mask_prob"],
        mask_adjust=objective["mask_prob_adjust"],
        mask_length=objective["mask_length"],
        mask_noise=objective["mask_noise_std"],
        cls_weight=objective["cls_loss"] * dims["batch_size"] * dims["clone_batch"],
        weight_decay=optimizer["weight_decay"],
        clip_norm=optimizer["clip_norm"],
        **changes,
    )
    ours = GivenNoise(recipe, PretrainSteps(1, 0, 2)).train()
    init = load_file(GOLDENS / "data2vec2-step/init.safetensors")
    student = of_prefix(init, "student.")
    ours.encoder.load_state_dict(converted(student, folder))
    ours.decoder.load_state_dict(decoder_names(of_prefix(student, DECODER)))
    ours.teacher.load_state_dict(converted(of_prefix(init, "teacher."), folder))

    steps = case["steps"]
    ours.learning_rate = lambda step: steps[step]["lr"]
    ours.momentum_after = lambda updates: steps[updates - 1]["ema_decay"]
    return ours


def step_input(step: int) -> tuple[Tensor, Masks]:
    """Images (b, 1, C, S, S) and masks of one of the two updates, from 1."""
    inputs, _ = tensors("data2vec2-step")
    dims = facts("data2vec2-step")["dims"]
    shape = (dims["batch_size"], dims["clone_batch"], -1)
    masked = inputs[f"step{step}.mask"].bool()
    visible = (~masked).nonzero()[:, 1].view(*shape)
    noise = inputs[f"step{step}.mask_noise"].unflatten(0, shape[:2])
    return inputs[f"step{step}.pixel_values"].unsqueeze(1), {"visible": visible, "noise": noise}


def of_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of a name that begins with `prefix`, without it."""
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def decoder_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """fairseq's `blocks.0.0.weight` and `proj.bias` under our names."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        ours = f"layers.{parts[1]}.{parts[3]}" if parts[0] == "blocks" else f"project.{parts[1]}"
        renamed[ours] = tensor
    return renamed


def decoder_recipe(case: dict[str, Any]) -> PretrainRecipe:
    return PretrainRecipe(
        objective="data2vec2",
        hidden_size=4 * case["decoder_groups"],
        num_attention_heads=1,
        decoder_size=case["decoder_dim"],
        decoder_layers=case["decoder_layers"],
        decoder_kernel=case["decoder_kernel"],
        decoder_groups=case["decoder_groups"],
    )


def expected_tensors(who: str, prefix: str, folder: Path) -> dict[str, Tensor]:
    """The golden's tensors of student or teacher under our names, decoder included."""
    _, outputs = tensors("data2vec2-step")
    init = load_file(GOLDENS / "data2vec2-step/init.safetensors")
    state = of_prefix(outputs, f"{prefix}{who}.")
    # positions have no gradient, and no update
    table = "modality_encoders.IMAGE.fixed_positional_encoder.positions"
    state.setdefault(table, init[f"{who}.{table}"])
    named = {f"encoder.{name}": tensor for name, tensor in converted(state, folder).items()}
    for name, tensor in decoder_names(of_prefix(state, DECODER)).items():
        named[f"decoder.{name}"] = tensor
    return named


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("micro", [None, 1])
def test_two_updates_equal_fairseq(micro: int | None, tmp_path: Path) -> None:
    ours = step_objective(tmp_path)
    _, outputs = tensors("data2vec2-step")
    for step in (1, 2):
        pixels, masks = step_input(step)
        ours.set_schedules(step - 1)
        ours.zero_grad()
        losses = ours.backward(pixels, masks, micro)
        for name, theirs in (
            ("loss", "loss"),
            ("regression", "loss_regression"),
            ("cls", "loss_cls"),
        ):
            golden = outputs[f"step{step}.{theirs}"]
            torch.testing.assert_close(losses[name], golden, atol=2e-5, rtol=0, msg=name)

        _, _outputs = tensors("data2vec2-step")
        grads = {
            f"grad.student.{n}": t for n, t in of_prefix(_outputs, f"step{step}.grad.").items()
        }
        compare_gradients(ours, grads, tmp_path)
        parameters = [p for group in ours.optimizers[0].param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, ours.recipe.clip_norm)
        torch.testing.assert_close(norm, outputs[f"step{step}.grad_norm"], atol=0, rtol=1e-5)

        ours.step_optimizers()
        compare_weights(ours, step, tmp_path)


def compare_gradients(ours: GivenNoise, grads: dict[str, Tensor], folder: Path) -> None:
    """Every gradient, those of the keys' biases as well, which are nothing."""
    init = load_file(GOLDENS / "data2vec2-step/init.safetensors")
    state = of_prefix(grads, "grad.student.")
    table = "modality_encoders.IMAGE.fixed_positional_encoder.positions"
    state[table] = init[f"student.{table}"]
    expected = {f"encoder.{n}": t for n, t in converted(state, folder).items()}
    expected |= {f"decoder.{n}": t for n, t in decoder_names(of_prefix(state, DECODER)).items()}
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert expected.keys() - trained.keys() == {"encoder.embeddings.position_embeddings"}
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-5, rtol=1e-3, msg=name)


def compare_weights(ours: GivenNoise, step: int, folder: Path) -> None:
    """Student, decoder and teacher after an update; a key's bias walks at random under Adam."""
    state = ours.state_dict()
    student = expected_tensors("student", f"after_{step}.", folder)
    teacher = expected_tensors("teacher", f"after_{step}.", folder)
    teacher = {name.replace("encoder.", "teacher.", 1): tensor for name, tensor in teacher.items()}
    assert state.keys() == student.keys() | teacher.keys()
    for name, tensor in (student | teacher).items():
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(state[name], tensor, atol=2e-5, rtol=0, msg=name)


@pytest.mark.usefixtures("goldens")
def test_parts_of_the_step_equal_fairseq(tmp_path: Path) -> None:
    ours = step_objective(tmp_path)
    _, outputs = tensors("data2vec2-step")
    pixels, masks = step_input(1)
    dims = facts("data2vec2-step")["dims"]
    with torch.no_grad():
        targets = ours.targets(pixels[:, 0])
        cls, predicted, hidden = ours.predictions(pixels[:, 0], masks)
    torch.testing.assert_close(targets, outputs["step1.targets"], atol=1e-5, rtol=0)
    expected_cls = outputs["step1.student_tokens"][:, 0]
    torch.testing.assert_close(cls.flatten(0, 1), expected_cls, atol=5e-5, rtol=0)
    index = hidden.flatten(0, 1).unsqueeze(-1).expand(-1, -1, dims["dim"])
    expected = outputs["step1.decoder_output"].gather(1, index)
    torch.testing.assert_close(predicted.flatten(0, 1), expected, atol=5e-5, rtol=0)


# --- schedules


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("run", RUNS)
def test_rates_and_momenta_equal_fairseq(run: str) -> None:
    case = RUNS[run]
    # an epoch of one update, so that epochs are updates
    recipe = PretrainRecipe(
        objective="data2vec2",
        learning_rate=case["lr"],
        epochs=case["max_update"],
        warmup_epochs=case["warmup"],
        momentum_start=case["ema_start"],
        momentum_end=case["ema_end"],
        momentum_epochs=case["ema_anneal_end_step"],
        hidden_size=16,
        num_attention_heads=1,
        decoder_size=16,
    )
    steps = recipe.steps(recipe.batch_size)
    assert steps == PretrainSteps(1, case["warmup"], case["max_update"])
    ours = Data2vec2Objective(recipe, steps)
    for update, rate, momentum in case["rows_update_lr_emadecay"]:
        if update < case["max_update"]:
            assert ours.learning_rate(update) == pytest.approx(rate, rel=1e-9, abs=1e-22)
        if momentum is not None:
            assert ours.momentum_after(update) == pytest.approx(momentum, rel=1e-9)


# of our recipes, those that have a run in the authors' schedules
RECIPES = {"base": "b16", "large": "l16", "huge": "h16", "huge14": "h14"}
IMAGENET = 1_281_167


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("run", RECIPES)
def test_recipes_have_the_authors_schedules(run: str) -> None:
    if run not in RUNS:
        pytest.skip(f"this set of goldens has no run {run}")
    name = f"pretrain-d2v2-{RECIPES[run]}"
    recipe = PretrainRecipe(**read_fields(name, PretrainRecipe))
    case = RUNS[run]
    per_epoch, warmup, total = recipe.steps(IMAGENET)
    assert (warmup, total) == (case["warmup"], case["max_update"])
    assert recipe.learning_rate == case["lr"]
    momentum = (recipe.momentum_start, recipe.momentum_end)
    assert momentum == (case["ema_start"], case["ema_end"])
    assert round(recipe.momentum_epochs * per_epoch) == case["ema_anneal_end_step"]


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("kind", ["base", "large", "huge14"])
def test_recipes_have_the_authors_masks(kind: str) -> None:
    if kind not in MASKINGS:
        pytest.skip(f"this set of goldens has no masks {kind}")
    name = f"pretrain-d2v2-{RECIPES[kind]}"
    recipe = PretrainRecipe(**read_fields(name, PretrainRecipe))
    case = MASKINGS[kind]
    found = (recipe.num_visible, recipe.num_centres, recipe.mask_length)
    assert found == (case["visible"], case["centres_per_row"], case["mask_length"])


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize(("key", "decay_all"), [("effective", True), ("intended", False)])
def test_weight_decay_equals_fairseq(key: str, decay_all: bool) -> None:
    """How many tensors decay, in a model with as many blocks as theirs."""
    table = facts("data2vec2-schedules", "schedules.json")["weight_decay"][key]
    changes = {
        "num_hidden_layers": sum(name.endswith(".norm1.weight") for name in table),
        "decoder_layers": sum(name.endswith(".0.weight") for name in table),
        "target_layers": 1,
        "weight_decay": max(table.values()),
    }
    ours = small_objective(**changes, decay_all=decay_all)
    found: dict[float, int] = {}
    for group in ours.optimizers[0].param_groups:
        decay = group["weight_decay"]
        found[decay] = found.get(decay, 0) + len(group["params"])
    # a fused qkv is three tensors of ours
    expected: dict[float, int] = {}
    for name, decay in table.items():
        expected[decay] = expected.get(decay, 0) + (3 if ".qkv." in name else 1)
    assert found == expected


# --- what the batch is cut into


def small_objective(**changes: Any) -> Data2vec2Objective:
    settings = {
        "objective": "data2vec2",
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "decoder_size": 16,
        "decoder_layers": 2,
        "decoder_groups": 4,
        "num_masks": 3,
        "target_layers": 2,
        "batch_size": 6,
    }
    recipe = PretrainRecipe(**{**settings, **changes})
    return Data2vec2Objective(recipe, PretrainSteps(4, 1, 8)).train()


def gradients(objective: Data2vec2Objective, micro: int | None) -> tuple[Losses, dict[str, Tensor]]:
    pixels = torch.randn(6, 1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    objective.zero_grad()
    losses = objective.backward(pixels, objective.masks(0, range(6)), micro)
    named = objective.named_parameters()
    return losses, {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_change_nothing(micro: int) -> None:
    whole, expected = gradients(small_objective(), None)
    cut, found = gradients(small_objective(), micro)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, atol=1e-6, rtol=1e-5, msg=name)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_the_teacher_follows_the_student() -> None:
    objective = small_objective()
    before = {n: t.clone() for n, t in objective.teacher.named_parameters()}
    # the first update has a rate of 0: only the second moves the weights
    for step in (0, 1):
        objective.set_schedules(step)
        gradients(objective, None)
        objective.step_optimizers()
    momentum = objective.momentum_after(2)
    student = dict(objective.encoder.named_parameters())
    for name, tensor in objective.teacher.named_parameters():
        expected = momentum * before[name] + (1 - momentum) * student[name]
        torch.testing.assert_close(tensor, expected.detach(), atol=1e-6, rtol=0, msg=name)
    moved = [not torch.equal(student[n], t) for n, t in before.items() if "position" not in n]
    assert all(moved)
