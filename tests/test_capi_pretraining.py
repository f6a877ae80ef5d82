"""CAPI's pre-training against the authors' code: three steps, gradients, updates, and its parts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import GOLDENS, facts, tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from mim_refiner_hf import MimRefinerConfig, cli
from mim_refiner_hf.conversion import load_encoder
from mim_refiner_hf.model.modeling_mim_refiner import MimRefinerModel
from mim_refiner_hf.model.positions_mim_refiner import patch_coordinates, rotary_frequencies
from mim_refiner_hf.pretraining.capi import CapiObjective, capi_groups
from mim_refiner_hf.pretraining.capi_start import head_beside, load_for_capi
from mim_refiner_hf.pretraining.capi_student import encode_visible, predict, predicted_logits
from mim_refiner_hf.pretraining.objective import Masks
from mim_refiner_hf.pretraining.recipe import PretrainRecipe, PretrainSteps
from mim_refiner_hf.runtime.settings import read_fields

CASE = "capi-step"
LOSS = {"atol": 1e-5, "rtol": 0}
TARGETS = {"atol": 2e-5, "rtol": 0}
TOKENS = {"atol": 2e-4, "rtol": 1e-4}
GRADIENTS = {"atol": 1e-5, "rtol": 1e-3}
WEIGHTS = {"atol": 5e-6, "rtol": 1e-6}


def our_name(name: str) -> str:
    """The objective's name of a tensor of the authors' `student`, `student_ema` or `teacher`."""
    who, _, rest = name.partition(".")
    if who == "teacher":
        return rest.replace("head.layer.", "clustering.layer.")
    encoder, head = {
        "student": ("encoder", "head"),
        "student_ema": ("teacher", "teacher_head"),
    }[who]
    for theirs, ours in (
        ("head.last_layer.", f"{head}."),
        ("backbone.registers", f"{encoder}.embeddings.register_tokens"),
        ("backbone.patch_embed.", f"{encoder}.embeddings.patch_embeddings."),
        ("backbone.mask_token", f"{encoder}.predictor.mask_token"),
        ("backbone.encoder.blocks.", f"{encoder}.layers."),
        ("backbone.decoder.blocks.", f"{encoder}.predictor.blocks."),
        ("residual1.norm.", "norm1."),
        ("residual2.norm.", "norm2."),
        ("residual1.fn.rope.freqs", "attention.rope.frequencies"),
        ("residual1.fn.proj.", "attention.o_proj."),
        ("residual1.fn.", "attention."),
        ("residual2.fn.", "mlp."),
    ):
        rest = rest.replace(theirs, ours)
    return rest


def saved(folder: Path, who: str) -> Path:
    """The authors' student or its moving average as a file of theirs."""
    state = load_file(GOLDENS / CASE / "init.safetensors")
    prefix = f"{who}."
    own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    save_file(own, folder / f"{who}.safetensors")
    return folder / f"{who}.safetensors"


def golden_objective(folder: Path, stochastic_depth: float = 0.0) -> CapiObjective:
    """The objective with the authors' settings and weights."""
    case = facts(CASE)
    optimizer = case["optimizer"]
    rates = optimizer["lr_schedule"]
    momenta = optimizer["momentum_schedule"]
    clustering = case["clustering_optimizer"]
    assert rates["warmup_iters"] == momenta["warmup_iters"]
    assert rates["warmup_iters"] == clustering["lr_schedule"]["warmup_iters"]
    recipe = PretrainRecipe(
        objective="capi",
        image_size=case["image"][0],
        patch_size=case["patch"],
        hidden_size=case["dim"],
        num_hidden_layers=case["depth"],
        num_attention_heads=case["heads"],
        # the case has fewer images than prototypes, which a recipe may not
        batch_size=max(case["B"], case["K"]),
        mask_ratio=case["mask_ratio"],
        predicted_share=case["sub"],
        prototypes=case["K"],
        registers=case["registers"],
        predictor_layers=case["dec"],
        student_temperature=case["student_temp"],
        clustering_temperature=case["pred_temp"],
        target_temperature=case["target_temp"],
        sinkhorn_iterations=case["n_sk_iter"],
        stochastic_depth=stochastic_depth,
        learning_rate=rates["base_value"],
        end_learning_rate=float(rates["final_value"]),
        weight_decay=optimizer["weight_decay"],
        clustering_learning_rate=clustering["lr_schedule"]["base_value"],
        clustering_weight_decay=clustering["weight_decay"],
        momentum_start=momenta["start_warmup_value"],
        momentum_after_warmup=momenta["base_value"],
        momentum_end=momenta["final_value"],
        truncated_cosine=rates["truncate_cos"],
    )
    total = optimizer["total_iters"]
    steps = PretrainSteps(per_epoch=total, warmup=rates["warmup_iters"], total=total)
    encoder = load_for_capi(str(saved(folder, "student")))
    # an image that is no square: the file does not state its size
    encoder.config.image_size = list(case["image"])
    objective = CapiObjective(recipe, steps, encoder)

    state = load_file(GOLDENS / CASE / "init.safetensors")
    ours = {our_name(name): tensor for name, tensor in state.items()}
    assert ours.keys() == objective.state_dict().keys()
    objective.load_state_dict(ours)
    return objective.train()


def golden_batch(prefix: str) -> tuple[Tensor, Masks]:
    """Views and masks of a step."""
    case = facts(CASE)
    inputs, _ = tensors(CASE)
    patches = inputs[f"{prefix}.masks"][0].numel()
    images = inputs[f"{prefix}.images"]
    masks = {
        "visible": inputs[f"{prefix}.visible_indices"].view(case["B"], -1) % patches,
        "predicted": inputs[f"{prefix}.predict_indices"].view(case["B"], -1) % patches,
    }
    masked = inputs[f"{prefix}.masks"].flatten(1).bool()
    assert not masked.gather(1, masks["visible"]).any()
    assert masked.gather(1, masks["predicted"]).all()
    return images.unsqueeze(1), masks


def compare(ours: dict[str, Tensor], prefix: str, tolerance: dict[str, float]) -> None:
    """All goldens under `prefix` with what we have under our names."""
    _, expected = tensors(CASE)
    theirs = {
        our_name(name.removeprefix(prefix)): tensor
        for name, tensor in expected.items()
        if name.startswith(prefix)
    }
    assert theirs
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor.to(ours[name].dtype), **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def gradients(objective: CapiObjective) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in objective.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("micro", [None, 2])
def test_three_steps_are_the_authors(tmp_path: Path, micro: int | None) -> None:
    objective = golden_objective(tmp_path)
    _, expected = tensors(CASE)
    used = facts(CASE)["used_at_step"]
    for step in range(len(used["lr"])):
        pixels, masks = golden_batch(f"step{step}")
        objective.set_schedules(step)
        rates = [optimizer.param_groups for optimizer in objective.optimizers]
        assert rates[0][0]["lr"] == pytest.approx(used["lr"][step] * rates[0][0]["lr_scale"])
        assert rates[1][0]["lr"] == pytest.approx(used["clustering_lr"][step])
        assert objective.momentum == pytest.approx(used["momentum"][step])

        objective.zero_grad()
        losses = objective.backward(pixels, masks, micro)
        for ours, theirs in (
            ("prediction_loss", "loss"),
            ("clustering_loss", "clustering_loss"),
            ("target_entropy", "target_entropy"),
        ):
            golden = expected[f"step{step}.{theirs}"].to(losses[ours].dtype)
            torch.testing.assert_close(losses[ours], golden, **LOSS)

        features = objective.teacher_patches(pixels[:, 0], micro)
        targets = objective.clustering.assign(features, masks["predicted"]).targets
        golden = expected[f"step{step}.targets"]
        torch.testing.assert_close(targets.flatten(0, 1), golden, **TARGETS)
        if f"step{step}.teacher_patches" in expected:
            torch.testing.assert_close(features, expected[f"step{step}.teacher_patches"], **TOKENS)
        if any(name.startswith(f"step{step}.grad.") for name in expected):
            compare(gradients(objective), f"step{step}.grad.", GRADIENTS)
        objective.step_optimizers()
        if any(name.startswith(f"after{step}.") for name in expected):
            compare(objective.state_dict(), f"after{step}.", WEIGHTS)


@pytest.mark.usefixtures("goldens")
def test_the_student_sees_and_predicts_what_the_authors_does(tmp_path: Path) -> None:
    objective = golden_objective(tmp_path)
    encoder = objective.encoder
    pixels, masks = golden_batch("step0")
    _, expected = tensors(CASE)
    with torch.no_grad():
        output, coordinates = encode_visible(encoder, pixels[:, 0], masks["visible"])
        places = patch_coordinates(encoder.config.grid, pixels.device)[masks["predicted"]]
        predictions = predict(encoder, output, coordinates, places)
        logits = predicted_logits(encoder, objective.head, pixels[:, 0], masks)
    patches = output[:, encoder.config.num_register_tokens :]
    torch.testing.assert_close(patches, expected["step0.student_patches"], **TOKENS)
    torch.testing.assert_close(predictions.flatten(0, 1), expected["step0.predictions"], **TOKENS)
    torch.testing.assert_close(logits.flatten(0, 1), expected["step0.logits"], **TOKENS)


def kept_of(drawn: Tensor, batch: int) -> Tensor:
    """The authors' lists of kept images (residuals, n) as (batch, residuals)."""
    kept = torch.zeros(batch, len(drawn), dtype=torch.bool)
    for residual, images in enumerate(drawn):
        kept[images, residual] = True
    return kept


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("micro", [None, 1, 4])
def test_stochastic_depth_is_the_authors(tmp_path: Path, micro: int | None) -> None:
    inputs, expected = tensors(CASE)
    drawn = inputs["droppath.kept"].long()
    objective = golden_objective(tmp_path, stochastic_depth=0.2)
    pixels, masks = golden_batch("droppath")
    losses = objective.backward(pixels, {**masks, "kept": kept_of(drawn, len(pixels))}, micro)
    golden = expected["droppath.loss"].to(losses["prediction_loss"].dtype)
    torch.testing.assert_close(losses["prediction_loss"], golden, **LOSS)
    compare(gradients(objective), "droppath.grad.", GRADIENTS)


@pytest.mark.usefixtures("goldens")
def test_parameter_groups_are_the_authors(tmp_path: Path) -> None:
    objective = golden_objective(tmp_path)
    parts = {"encoder": objective.encoder, "head": objective.head}
    found = {}
    for group in capi_groups(parts, 1.0):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            shape = list(parameter.shape)
            found[name] = (group["lr_scale"], group["weight_decay"], shape)

    expected = {}
    for name, facts_of_it in facts("capi-schedules", "schedules.json")["param_groups"].items():
        numbers = (facts_of_it["lr_multiplier"], facts_of_it["wd_multiplier"])
        expected[our_name(f"student.{name}")] = (*numbers, facts_of_it["shape"])
    assert found == expected


def recipe(**settings: Any) -> PretrainRecipe:
    """CAPI for 8 x 8 patches and 16 images a batch."""
    small = {"image_size": 32, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1}
    shape = {**small, "num_attention_heads": 2, "registers": 4, "predictor_layers": 1}
    return PretrainRecipe(objective="capi", **{**shape, "batch_size": 16, **settings})


STEPS = PretrainSteps(per_epoch=1, warmup=0, total=2)


def test_masks_have_exact_counts() -> None:
    made = CapiObjective(recipe(predicted_share=0.1), STEPS)
    masks = made.masks(0, list(range(50)))
    visible, predicted = masks["visible"], masks["predicted"]
    masked = int(64 * 0.65)
    assert visible.shape == (50, 64 - masked) and predicted.shape == (50, int(masked * 0.1))
    assert (visible.diff(dim=1) > 0).all()
    for seen, named in zip(visible.tolist(), predicted.tolist(), strict=True):
        assert len(set(seen) | set(named)) == len(seen) + len(named)
    # of the 16 images of the batch a fifth is left out, and of each branch others
    kept = made.masks(0, list(range(16)))["kept"]
    assert kept.shape == (16, 4) and kept.sum(dim=0).tolist() == [12] * 4
    assert len(kept.T.unique(dim=0)) > 1


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"image_size": 16, "predicted_share": 0.05}, "of a grid of 4 x 4 patches 10 are masked"),
        ({"prototypes": 17}, "prototypes=17: .*an entropy of at least 0.06 of 2.83 nats"),
        ({"prototypes": 1025, "positionwise": False}, "give 1024 or fewer"),
        ({"batch_size": 1}, "batch_size=1: CAPI shares patches out among the images"),
        ({"registers": 6}, "registers=6: must be a multiple of 4"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        CapiObjective(recipe(**{"predicted_share": 0.1, **settings}), STEPS)
    assert "\n" not in str(refused.value)


def test_an_encoder_without_rope_is_refused() -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = MimRefinerModel(MimRefinerConfig(image_size=32, patch_size=4, **shape))
    with pytest.raises(ValueError, match="position_encoding=absolute: CAPI needs rope"):
        CapiObjective(recipe(predicted_share=0.1), STEPS, encoder)


def test_prototypes_follow_the_batch(caplog: pytest.LogCaptureFixture) -> None:
    made = CapiObjective(recipe(predicted_share=0.1), STEPS)
    assert made.clustering.layer.out_features == 16
    assert "CAPI takes 16 prototypes: of 16384 the targets would be noise" in caplog.text
    plain = CapiObjective(recipe(predicted_share=0.1, positionwise=False), STEPS)
    assert plain.clustering.layer.out_features == 16 * 64


def test_fresh_weights_are_the_authors_kind() -> None:
    made = CapiObjective(recipe(predicted_share=0.1, hidden_size=128, num_attention_heads=4), STEPS)
    encoder = made.encoder
    bound = (6 / (128 + 512)) ** 0.5
    drawn = encoder.layers[0].mlp.fc1.weight
    assert bound * 0.98 < drawn.abs().max() < bound
    # the patch embedding counts as a linear layer of 3 x 4 x 4 pixels
    kernel = encoder.embeddings.patch_embeddings.weight
    bound = (6 / (128 + 48)) ** 0.5
    assert bound * 0.98 < kernel.abs().max() < bound
    assert encoder.embeddings.register_tokens.std().item() == pytest.approx(0.02, rel=0.15)
    assert made.head.weight_v.std().item() == pytest.approx(0.02, rel=0.1)
    assert (made.head.weight_g == 1).all() and (made.clustering.layer.bias == 0).all()
    assert made.clustering.layer.weight.std().item() == pytest.approx(1, rel=0.1)
    frequencies = rotary_frequencies(32)
    torch.testing.assert_close(encoder.layers[0].attention.rope.frequencies, frequencies)


def test_what_ships_has_the_part_of_the_predictor_that_is_read(tmp_path: Path) -> None:
    made = CapiObjective(recipe(predicted_share=0.1, predictor_layers=3), STEPS)
    made.shipped().save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert encoder.config.predictor_layers == 1 and len(made.teacher.predictor.blocks) == 3
    encoder.config.pooling = "global_repr"
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        output, coordinates = encode_visible(made.teacher, pixels)
        predictor = made.teacher.predictor
        predictor.blocks = predictor.blocks[:1]
        read = predictor(output, coordinates, coordinates[4:]).mean(dim=1)
        torch.testing.assert_close(encoder(pixels).pooler_output, read)


@pytest.mark.usefixtures("goldens")
def test_it_goes_on_from_a_file_of_the_authors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = facts(CASE)
    encoder = load_for_capi(str(saved(tmp_path, "student_ema")))
    assert encoder.config.predictor_layers == case["dec"]
    settings = {"predicted_share": 0.1, "predictor_layers": case["dec"], "prototypes": case["K"]}
    made = CapiObjective(recipe(**settings, batch_size=case["K"]), STEPS, encoder)

    state = load_file(GOLDENS / CASE / "init.safetensors")
    for name, tensor in state.items():
        if name.startswith("student_ema."):
            for who in ("student", "student_ema"):
                ours = our_name(f"{who}.{name.removeprefix('student_ema.')}")
                assert torch.equal(made.state_dict()[ours], tensor), ours

    # a head of other prototypes is of no use, a predictor of another depth neither
    assert not caplog.text
    settings = {"predicted_share": 0.1, "predictor_layers": case["dec"] + 1, "prototypes": 3}
    made = CapiObjective(recipe(**settings), STEPS, encoder)
    assert f"names {case['K']} prototypes, not 3" in caplog.text
    assert len(made.encoder.predictor.blocks) == case["dec"] + 1


def test_any_other_encoder_brings_no_head(tmp_path: Path) -> None:
    CapiObjective(recipe(predicted_share=0.1), STEPS).shipped().save_pretrained(tmp_path)
    assert head_beside(load_for_capi(str(tmp_path))) == {}


def command(objective: str, output: Path, **flags: Any) -> list[str]:
    """The words of a pre-training of one step on the bundled digits."""
    words = ["pretrain", "digits", "--objective", objective, "--output_dir", str(output)]
    own = {"epochs": 1, "max_steps": 1, "warmup_epochs": 0, "batch_size": 16, "num_workers": 0}
    for name, value in {**own, **flags}.items():
        words += [f"--{name}", str(value)]
    return words


def test_the_command_goes_on_from_a_model_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2}
    own = {"predictor_layers": 2, "predicted_share": 0.2}
    first = {**shape, **own, "registers": 4, "prototypes": 8}
    assert cli.main(command("capi", tmp_path / "first", **first)) == 0
    again = command("capi", tmp_path / "again", **own, init_from=tmp_path / "first")
    assert cli.main(again) == 0
    written = json.loads((tmp_path / "again/recipe.json").read_text())
    # registers come with the encoder, the depth of the predictor does not
    assert (written["registers"], written["predictor_layers"]) == (4, 2)
    assert load_encoder(tmp_path / "again").config.num_register_tokens == 4
    capsys.readouterr()

    assert cli.main([*again, "--registers", "8", "--output_dir", str(tmp_path / "no")]) == 2
    assert "has 4; leave --registers out" in capsys.readouterr().err
    conmim = {**shape, "mask_square": 4, "projector_hidden": 8, "projector_size": 4}
    assert cli.main(command("conmim", tmp_path / "conmim", **conmim)) == 0
    other = command("capi", tmp_path / "no", **own, init_from=tmp_path / "conmim")
    assert cli.main(other) == 2
    error = capsys.readouterr().err
    assert "its positions are shared_relative" in error and error.count("error:") == 1


def test_the_recipe_has_the_authors_steps() -> None:
    recipe = PretrainRecipe(**read_fields("pretrain-capi-l14", PretrainRecipe))
    # of the images of ImageNet-22K
    assert recipe.steps(14_197_122) == PretrainSteps(866, 50_000, 500_000)
