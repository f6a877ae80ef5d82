"""CAPI's pre-training against the authors' code: three steps, gradients, updates, and its parts."""

from pathlib import Path

import pytest
import torch
from golden_cases import GOLDENS, facts, tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from mim_refiner_hf.conversion import load_encoder
from mim_refiner_hf.model.modeling_mim_refiner import MimRefinerModel
from mim_refiner_hf.pretraining.capi import CapiObjective
from mim_refiner_hf.pretraining.capi_student import encode, places_of, predict
from mim_refiner_hf.pretraining.objective import Masks
from mim_refiner_hf.pretraining.recipe import PretrainRecipe, PretrainSteps

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


def network(folder: Path, who: str) -> MimRefinerModel:
    """The encoder of the authors' student or teacher, as a file of theirs loads to go on with."""
    state = load_file(GOLDENS / CASE / "init.safetensors")
    prefix = f"{who}."
    own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    save_file(own, folder / f"{who}.safetensors")
    return load_encoder(folder / f"{who}.safetensors", family="capi_whole")


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
    encoder = network(folder, "student")
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


def compare(
    ours: dict[str, Tensor], prefix: str, tolerance: dict[str, float], count: int | None = None
) -> None:
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
        objective.step_optimizers(step)
        if any(name.startswith(f"after{step}.") for name in expected):
            compare(objective.state_dict(), f"after{step}.", WEIGHTS)


@pytest.mark.usefixtures("goldens")
def test_the_student_sees_and_predicts_what_the_authors_does(tmp_path: Path) -> None:
    objective = golden_objective(tmp_path)
    encoder = objective.encoder
    pixels, masks = golden_batch("step0")
    _, expected = tensors(CASE)
    with torch.no_grad():
        output, coordinates = encode(encoder, pixels[:, 0], masks["visible"])
        places = places_of(encoder.config.grid, masks["predicted"])
        predictions = predict(encoder, output, coordinates, places)
        logits = objective.head(predictions)
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
def test_parameter_groups_are_the_authors() -> None:
    groups = facts("capi-schedules", "schedules.json")["param_groups"]
    print(groups if isinstance(groups, list) else list(groups.items())[:3])
