"""ConMIM's pre-training against the authors' code: two steps, gradients, updates, and views."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import GOLDENS, facts, tensors
from PIL import Image, ImageFilter, ImageOps
from safetensors.torch import load_file
from torch import Tensor

from mim_refiner_hf.clustering.channels import ChannelImage
from mim_refiner_hf.conversion import load_encoder
from mim_refiner_hf.data.paired_views import LightAndHard, light_and_hard
from mim_refiner_hf.data.views import ViewDraw, normalise
from mim_refiner_hf.model.modeling_mim_refiner import MimRefinerModel
from mim_refiner_hf.pretraining.conmim import ConmimObjective, conmim_groups
from mim_refiner_hf.pretraining.recipe import PretrainRecipe, PretrainSteps
from mim_refiner_hf.pretraining.student import replaced_input

CASE = "conmim-step"
LOSS = {"atol": 2e-5, "rtol": 0}
TOKENS = {"atol": 5e-5, "rtol": 0}
GRADIENTS = {"atol": 2e-5, "rtol": 1e-3}
WEIGHTS = {"atol": 2e-5, "rtol": 0}


def our_tensors(who: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of the authors' student or teacher under the objective's names."""
    encoder, head = {"student": ("encoder", "head"), "teacher": ("teacher", "teacher_head")}[who]
    if name == "mask_token":
        return {f"{head}.mask_token": tensor}
    if name.startswith("projectors."):
        _, number, rest = name.split(".")
        if rest == "num_batches_tracked":
            return {}
        layer, kind = divmod(int(number), 3)
        # a batch norm of ours is one of several heads
        if kind == 1:
            return {f"{head}.projector.{layer}.norm.{rest}": tensor.unsqueeze(0)}
        return {f"{head}.projector.{layer}.{rest}": tensor}

    if name.endswith("attn.qkv.weight"):
        stem = name.removesuffix("attn.qkv.weight").replace("blocks.", f"{encoder}.layers.")
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{stem}attention.{part}_proj.weight": own for part, own in parts}
    for theirs, ours in (
        ("rel_pos_bias.relative_position_bias_table", "relative_position_bias.table"),
        ("cls_token", "embeddings.cls_token"),
        ("patch_embed.proj.", "embeddings.patch_embeddings."),
        ("blocks.", "layers."),
        ("attn.q_bias", "attention.q_proj.bias"),
        ("attn.v_bias", "attention.v_proj.bias"),
        ("attn.proj.", "attention.o_proj."),
        ("gamma_1", "layer_scale1.weight"),
        ("gamma_2", "layer_scale2.weight"),
    ):
        name = name.replace(theirs, ours)
    return {f"{encoder}.{name}": tensor}


def ours_of(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """All tensors `<prefix><who>.<name>` under our names."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        who, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and who in ("student", "teacher"):
            ours.update(our_tensors(who, rest, tensor))
    return ours


def student_of(folder: Path) -> MimRefinerModel:
    """The authors' student, as a file of theirs loads."""
    state = load_file(GOLDENS / CASE / "init.safetensors")
    model = {
        name.removeprefix("student."): tensor
        for name, tensor in state.items()
        if name.startswith("student.")
    }
    torch.save({"model": model}, folder / "student.pth")
    return load_encoder(folder / "student.pth")


def golden_objective(folder: Path) -> ConmimObjective:
    """The objective with the authors' settings and weights."""
    case = facts(CASE)
    dims = case["dims"]
    first = case["steps"][0]
    recipe = PretrainRecipe(
        objective="conmim",
        image_size=dims["image_size"],
        patch_size=dims["patch_size"],
        hidden_size=dims["dim"],
        num_hidden_layers=dims["depth"],
        num_attention_heads=dims["num_heads"],
        batch_size=dims["batch_size"],
        mask_ratio=0.75,
        mask_square=2 * dims["patch_size"],
        temperature=case["objective"]["temperature"],
        projector_hidden=dims["projector_hidden"],
        projector_size=dims["projector_out"],
        learning_rate=first["lr"],
        weight_decay=first["weight_decay"],
    )
    steps = PretrainSteps(per_epoch=10, warmup=1, total=10)
    objective = ConmimObjective(recipe, steps, student_of(folder))
    start = ours_of(load_file(GOLDENS / CASE / "init.safetensors"))
    assert start.keys() == objective.state_dict().keys()
    objective.load_state_dict(start)
    return objective.train()


def golden_batch(step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Light and hard views, and the mask, of a step."""
    inputs, _ = tensors(CASE)
    views = torch.stack([inputs[f"step{step}.light"], inputs[f"step{step}.hard"]], dim=1)
    return views, {"mask": inputs[f"step{step}.mask"].bool()}


def gradients(objective: ConmimObjective) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in objective.named_parameters()
        if parameter.grad is not None
    }


def student_names(name: str) -> str:
    """One of our names for a tensor of the authors' student."""
    return next(iter(our_tensors("student", name, torch.zeros(3, 1))))


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("micro", [None, 2])
def test_two_steps_are_the_authors(tmp_path: Path, micro: int | None) -> None:
    objective = golden_objective(tmp_path)
    case = facts(CASE)
    _, expected = tensors(CASE)
    no_gradient = {student_names(name) for name in case["zero_gradient_parameters"]}
    for number, settings in enumerate(case["steps"], start=1):
        pixels, masks = golden_batch(number)
        assert masks["mask"].sum(1).tolist() == case["objective"]["masked_per_image"][number - 1]
        objective.zero_grad()
        loss = objective.backward(pixels, masks, micro)["loss"]
        torch.testing.assert_close(loss, expected[f"step{number}.loss"].to(loss), **LOSS)

        found = gradients(objective)
        prefix = f"step{number}.grad."
        theirs = {n.removeprefix(prefix): t for n, t in expected.items() if n.startswith(prefix)}
        for name, tensor in theirs.items():
            for ours, part in our_tensors("student", name, tensor).items():
                torch.testing.assert_close(found[ours], part, **GRADIENTS, msg=ours)

        trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, case["optimizer"]["clip_grad"])
        golden_norm = expected[f"step{number}.grad_norm"].to(norm)
        torch.testing.assert_close(norm, golden_norm, rtol=1e-5, atol=0)
        for group in objective.optimizers[0].param_groups:
            group["lr"] = settings["lr"]
        objective.momentum = settings["momentum"]
        objective.step_optimizers()

        state = objective.state_dict()
        after = ours_of(expected, f"after_{number}.")
        assert len(after) > len(theirs)
        for name, tensor in after.items():
            if name in no_gradient or name.replace("teacher.", "encoder.") in no_gradient:
                continue
            # it carries the noise of the parameter without a gradient
            noisy = number > 1 and name.endswith("projector.0.norm.running_mean")
            tolerance = {"atol": 1e-3, "rtol": 0} if noisy else WEIGHTS
            torch.testing.assert_close(state[name], tensor, **tolerance, msg=name)


@pytest.mark.usefixtures("goldens")
def test_tokens_and_features_are_the_authors(tmp_path: Path) -> None:
    objective = golden_objective(tmp_path)
    pixels, masks = golden_batch(1)
    _, expected = tensors(CASE)
    whole = torch.zeros_like(masks["mask"])
    for who, encoder, head, images, mask in (
        ("student", objective.encoder, objective.head, pixels[:, 0], masks["mask"]),
        ("teacher", objective.teacher, objective.teacher_head, pixels[:, 1], whole),
    ):
        with torch.no_grad():
            tokens, places = replaced_input(encoder, images, mask, head.mask_token)
            tokens = encoder.norm(encoder.encode_tokens(tokens, places))
            features = head(tokens)
        golden = expected[f"step1.{who}_tokens"]
        torch.testing.assert_close(tokens, golden, **TOKENS)
        golden = expected[f"step1.{who}_features"].view_as(features)
        unit = torch.nn.functional.normalize(golden, dim=-1)
        torch.testing.assert_close(features, unit, **TOKENS)


@pytest.mark.usefixtures("goldens")
def test_parameter_groups_are_the_authors(tmp_path: Path) -> None:
    objective = golden_objective(tmp_path)
    parts = {"encoder": objective.encoder, "head": objective.head}
    decays = {
        name: group["weight_decay"]
        for group in conmim_groups(parts, 0.5)
        for name in group["names"]
    }
    expected = {}
    for group in facts(CASE)["optimizer"]["groups"]:
        for name in group["params"]:
            for ours in our_tensors("student", name, torch.zeros(3, 1)):
                expected[ours] = group["weight_decay"]
    assert decays == expected


@pytest.mark.usefixtures("goldens")
def test_views_are_the_authors() -> None:
    case = facts("conmim-views")
    inputs, expected = tensors("conmim-views")
    pixels = inputs["image_uint8_chw"].permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    names = ("brightness", "contrast", "saturation", "hue")
    for number, view in enumerate(case["views"]):
        jitter = ()
        if view["jitter"] is not None:
            jitter = tuple(
                (place, view["jitter"][names[place]]) for place in view["jitter"]["order"]
            )
        draw = ViewDraw(
            box=tuple(view["crop_top_left_height_width"]),
            flip=view["flip"],
            jitter=jitter,
            sigma=view["blur_radius"] or 0.0,
            grey=view["grey"],
            solarised=view["solarise"],
        )
        pair = light_and_hard(image, draw, case["image_size"])
        for kind, ours in zip(("light", "hard"), pair, strict=True):
            bits = torch.from_numpy(np.array(ours)).permute(2, 0, 1)
            normed = normalise(bits, case["mean"], case["std"])
            torch.testing.assert_close(
                normed, expected[kind][number], atol=1e-5, rtol=0, msg=f"{kind} {number}"
            )


def recipe(**settings: Any) -> PretrainRecipe:
    """ConMIM for 8 x 8 patches."""
    small = {"image_size": 32, "patch_size": 4, "hidden_size": 64, "num_hidden_layers": 3}
    shape = {**small, "num_attention_heads": 2, "projector_hidden": 24, "projector_size": 8}
    return PretrainRecipe(objective="conmim", **{**shape, "mask_square": 8, **settings})


STEPS = PretrainSteps(per_epoch=1, warmup=0, total=2)


def test_masks_are_whole_squares_or_blocks() -> None:
    squares = ConmimObjective(recipe(), STEPS).masks(0, list(range(20)))["mask"]
    assert squares.dtype == torch.bool and squares.sum(dim=1).tolist() == [48] * 20
    pairs = squares.view(20, 4, 2, 4, 2)
    assert (pairs == pairs[:, :, :1, :, :1]).all()

    settings = {"mask_kind": "blocks", "mask_ratio": 0.385, "smallest_block": 4}
    blocks = ConmimObjective(recipe(**settings), STEPS).masks(0, list(range(20)))["mask"]
    counts = blocks.sum(dim=1)
    assert counts.max() == int(64 * 0.385) and counts.min() > 12


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"mask_square": 10}, "mask_square=10: must be a multiple of patch_size=4"),
        ({"mask_square": 12}, "mask_square=12: squares of 3 x 3 patches do not divide the grid"),
        ({"batch_size": 1}, "batch_size=1: ConMIM's batch norm runs over the images"),
        ({"mask_ratio": 0.99}, "a share of 0.99 masks all 16 squares"),
        (
            {"mask_kind": "blocks", "mask_ratio": 0.2, "smallest_block": 16},
            "smallest_block=16: at most 12 of the 8 x 8 patches",
        ),
    ],
)
def test_masks_that_do_not_fit_are_refused_in_one_line(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        ConmimObjective(recipe(**settings), STEPS)
    assert "\n" not in str(refused.value)


def test_fresh_weights_are_the_authors_kind() -> None:
    encoder = ConmimObjective(recipe(), STEPS).encoder
    for number, block in enumerate(encoder.layers, start=1):
        cut = 0.02 / (2 * number) ** 0.5
        for weight, bound in (
            (block.mlp.fc1.weight, 0.02),
            (block.mlp.fc2.weight, cut),
            (block.attention.o_proj.weight, cut),
        ):
            assert 0.99 * bound < weight.abs().max() <= bound * (1 + 1e-6)
        assert (block.attention.q_proj.bias == 0).all()
        torch.testing.assert_close(block.layer_scale1.weight, torch.full((64,), 0.1))
    assert (encoder.relative_position_bias.table == 0).all()
    assert encoder.relative_position_bias.table.requires_grad


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_both_views_show_the_same_crop(mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 60, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    pair = LightAndHard(24, (0.2, 1.0))
    changed = 0
    for seed in range(20):
        views = pair(image, np.random.default_rng(seed))["global_views"]
        assert views.shape == (2, 3 if mode == "RGB" else 1, 24, 24)
        again = pair(image, np.random.default_rng(seed))["global_views"]
        assert torch.equal(views, again)
        # dark enough that solarisation inverts nothing: colours do not change where things are
        light, hard = views.double().mean(dim=1).flatten(1)
        correlation = torch.corrcoef(torch.stack([light, hard]))[0, 1]
        assert correlation > 0.8
        changed += not torch.equal(views[0], views[1])
    assert changed > 10


def test_channels_of_no_picture_are_grey_images_of_the_same_crop() -> None:
    planes = np.random.default_rng(0).integers(0, 256, (40, 60, 5), dtype=np.uint8)
    views = LightAndHard(24, (0.2, 1.0))(ChannelImage(planes), np.random.default_rng(3))
    assert views["global_views"].shape == (2, 5, 24, 24)
    grey = Image.fromarray(np.ascontiguousarray(planes[..., 2]))
    alone = LightAndHard(24, (0.2, 1.0))(grey, np.random.default_rng(3))["global_views"]
    assert torch.equal(views["global_views"][0, 2], alone[0, 0])


def test_hard_colours_come_in_the_order_of_the_authors() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    draw = ViewDraw(box=(0, 0, 24, 24), flip=False, sigma=1.5, grey=True, solarised=True)
    light, hard = light_and_hard(image, draw, 24)
    expected = ImageOps.grayscale(image).convert("RGB").filter(ImageFilter.GaussianBlur(1.5))
    np.testing.assert_array_equal(np.asarray(light), pixels)
    np.testing.assert_array_equal(np.asarray(hard), np.asarray(ImageOps.solarize(expected, 128)))
    # the other way round other bits come out
    other = ImageOps.grayscale(image.filter(ImageFilter.GaussianBlur(1.5))).convert("RGB")
    assert np.asarray(other).tolist() != np.asarray(expected).tolist()
