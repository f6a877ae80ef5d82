"""MAE pre-training: the loss of transformers' ViTMAE from the same weights, and a training that
learns and repeats itself.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mim_refiner_hf import MimRefinerModel
from mim_refiner_hf.conversion.preprocessing import image_processor
from mim_refiner_hf.data.batches import batches_of_views
from mim_refiner_hf.data.images import ImageDataset, open_images
from mim_refiner_hf.data.order import BatchSampler
from mim_refiner_hf.data.views import MultiCrop, ViewDataset, normalise, view_specs
from mim_refiner_hf.pretraining import mae
from mim_refiner_hf.pretraining.loop import pretrain
from mim_refiner_hf.pretraining.mae import MaeObjective, mae_loss, patchify
from mim_refiner_hf.pretraining.mae_decoder import MaeDecoder, decoder_groups, xavier_uniform
from mim_refiner_hf.pretraining.recipe import PretrainRecipe
from mim_refiner_hf.runtime.optimisation import (
    encoder_groups,
    freeze,
    learning_rate,
    set_learning_rate,
)

SMALL = {"patch_size": 4, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
DECODER = {"decoder_size": 32, "decoder_layers": 2, "decoder_attention_heads": 2}


def sincos_table(side: int, dim: int) -> Tensor:
    """The positions of the original MAE, written out: zero for CLS.

    Sine and cosine of the column, then of the row.
    """
    table, quarter = torch.zeros(1, 1 + side**2, dim), dim // 4
    for place in range(side**2):
        row, column = divmod(place, side)
        for k in range(quarter):
            angles = [coordinate / 10000 ** (k / quarter) for coordinate in (column, row)]
            waves = [wave(angle) for angle in angles for wave in (math.sin, math.cos)]
            table[0, 1 + place, k::quarter] = torch.tensor(waves)
    return table


def their_names(encoder: MimRefinerModel, decoder: MaeDecoder) -> dict[str, Tensor]:
    """Our weights under ViTMAE's names.

    Our tables have no place for CLS, theirs begin with a zero for it.
    """
    renamed = (
        ("embeddings.patch_embeddings.", "embeddings.patch_embeddings.projection."),
        ("norm1.", "layernorm_before."),
        ("norm2.", "layernorm_after."),
    )
    state: dict[str, Tensor] = {}
    for prefix, module in (("vit.", encoder), ("decoder.", decoder)):
        for name, tensor in module.state_dict().items():
            for ours, theirs in renamed:
                name = name.replace(ours, theirs)
            state[prefix + name] = tensor
    state["vit.layernorm.weight"], state["vit.layernorm.bias"] = (
        state.pop("vit.norm.weight"),
        state.pop("vit.norm.bias"),
    )
    positions = state.pop("vit.embeddings.position_embeddings")
    state["vit.embeddings.position_embeddings"] = torch.cat(
        [torch.zeros_like(positions[:, :1]), positions], dim=1
    )
    side = math.isqrt(positions.shape[1])
    state["decoder.decoder_pos_embed"] = sincos_table(side, decoder.mask_token.shape[2])
    for ours, theirs in (
        ("embed", "decoder_embed"),
        ("norm", "decoder_norm"),
        ("predict", "decoder_pred"),
        ("layers", "decoder_layers"),
    ):
        state = {
            name.replace(f"decoder.{ours}.", f"decoder.{theirs}."): tensor
            for name, tensor in state.items()
        }
    return state


def build(
    mask_ratio: float, seed: int = 0
) -> tuple[MimRefinerModel, MaeDecoder, ViTMAEForPreTraining]:
    """Encoder, decoder, and transformers' model with their weights, all of them random, biases and
    norms included.
    """
    torch.manual_seed(seed)
    recipe = PretrainRecipe(image_size=16, **SMALL, **DECODER, mask_ratio=mask_ratio)
    encoder, decoder = MimRefinerModel(recipe.encoder_config()), MaeDecoder(recipe)
    with torch.no_grad():
        for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
            if "position" not in name:
                parameter.normal_(std=0.2).add_(float("norm" in name and name.endswith("weight")))
    config = ViTMAEConfig(
        image_size=16,
        **SMALL,
        intermediate_size=4 * SMALL["hidden_size"],
        decoder_hidden_size=DECODER["decoder_size"],
        decoder_num_hidden_layers=DECODER["decoder_layers"],
        decoder_num_attention_heads=DECODER["decoder_attention_heads"],
        decoder_intermediate_size=4 * DECODER["decoder_size"],
        mask_ratio=mask_ratio,
        norm_pix_loss=True,
        layer_norm_eps=1e-6,
    )
    theirs = ViTMAEForPreTraining(config)
    theirs.load_state_dict(their_names(encoder, decoder))
    return encoder.train(), decoder.train(), theirs.train()


@pytest.mark.parametrize("mask_ratio", [0.75, 0.5, 0.9])
def test_loss_and_gradients_equal_transformers(mask_ratio: float) -> None:
    encoder, decoder, theirs = build(mask_ratio)
    pixels, noise = torch.randn(5, 3, 16, 16), torch.rand(5, 16)
    loss = mae_loss(encoder, decoder, pixels, noise, mask_ratio)
    expected = theirs(pixels, noise=noise).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    torch.testing.assert_close(
        encoder.embeddings.cls_token.grad,
        gradients["vit.embeddings.cls_token"],
        atol=1e-5,
        rtol=1e-4,
    )
    torch.testing.assert_close(
        decoder.mask_token.grad, gradients["decoder.mask_token"], atol=1e-5, rtol=1e-4
    )
    for ours, name in (
        (
            encoder.embeddings.patch_embeddings.weight,
            "vit.embeddings.patch_embeddings.projection.weight",
        ),
        (encoder.layers[0].attention.q_proj.weight, "vit.layers.0.attention.q_proj.weight"),
        (encoder.norm.weight, "vit.layernorm.weight"),
        (decoder.layers[1].mlp.fc2.bias, "decoder.decoder_layers.1.mlp.fc2.bias"),
        (decoder.predict.weight, "decoder.decoder_pred.weight"),
    ):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


def test_loss_looks_at_masked_patches_only() -> None:
    """The encoder sees nothing of a masked patch, and the loss is the mean over the masked ones."""
    encoder, decoder, _ = build(0.75)
    pixels, noise = (
        torch.randn(1, 3, 16, 16),
        torch.linspace(0, 1, 16).unsqueeze(0),
    )  # patches 0-3 stay visible
    changed = pixels.clone()
    # patch 15, masked: a target and nothing else
    changed[:, :, 12:, 12:] = torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        first, second = (mae_loss(encoder, decoder, x, noise, 0.75) for x in (pixels, changed))
    targets = [patchify(x, 4)[0, 15] for x in (pixels, changed)]
    normalised = [(t - t.mean()) / (t.var() + 1e-6).sqrt() for t in targets]
    # both losses share the predictions, p of patch 15 among them, so that 12 (l2 - l1) is the
    # difference of the means of (p - t2)^2 and (p - t1)^2
    with torch.no_grad():
        prediction = _prediction_of_last_patch(encoder, decoder, pixels)
    change = (prediction - normalised[1]).square().mean() - (
        prediction - normalised[0]
    ).square().mean()
    torch.testing.assert_close(12 * (second - first), change, atol=1e-4, rtol=0)


def _prediction_of_last_patch(
    encoder: MimRefinerModel, decoder: MaeDecoder, pixels: Tensor
) -> Tensor:
    """With patches 0-3 visible in their order nothing has to be shuffled."""
    tokens = encoder.embeddings(pixels)[:, :5]
    for layer in encoder.layers:
        tokens = layer(tokens)
    predicted: Tensor = decoder(encoder.norm(tokens), torch.arange(16).unsqueeze(0), 1)
    return predicted[0, 15]


def test_patchify_equals_transformers() -> None:
    _, _, theirs = build(0.75)
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(patchify(pixels, 4), theirs.patchify(pixels))


def test_patches_are_row_by_row_also_where_not_square() -> None:
    pixels = torch.arange(2 * 8 * 12).float().reshape(1, 2, 8, 12)
    patches = patchify(pixels, 4)
    assert patches.shape == (1, 6, 32)
    assert torch.equal(patches[0, 4].reshape(4, 4, 2), pixels[0, :, 4:8, 4:8].permute(1, 2, 0))


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return open_images("digits").subset(range(256))


def tiny_recipe(**changes: Any) -> PretrainRecipe:
    settings = {
        "image_size": 16,
        **SMALL,
        **DECODER,
        "scale": 0.8,
        "flip": 0.0,
        "epochs": 10,
        "warmup_epochs": 1,
    }
    return PretrainRecipe(**{**settings, "batch_size": 64, "learning_rate": 1e-2, **changes})


def fresh_objective() -> MaeObjective:
    recipe = tiny_recipe()
    return MaeObjective(recipe, recipe.steps(256))


def test_loss_falls_and_the_result_is_ready_to_use(
    digits: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []

    def recorded(*arguments: Any) -> Tensor:
        loss = mae_loss(*arguments)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(mae, "mae_loss", recorded)
    encoder = pretrain(tiny_recipe(), digits).shipped()
    assert len(losses) == 10 * (256 // 64)
    assert np.mean(losses[-8:]) < 0.85 * np.mean(losses[:4]), losses
    assert not encoder.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    fresh = fresh_objective().encoder
    for (name, before), after in zip(fresh.named_parameters(), encoder.parameters(), strict=True):
        # all but the fixed positions was trained
        assert torch.equal(before, after) == ("position" in name), name


def test_no_position_table_is_constant() -> None:
    """A table of zeros trains to nothing: no patch would know where it is."""
    fresh = fresh_objective()
    for table in (fresh.encoder.embeddings.position_embeddings, fresh.decoder.positions):
        distances = torch.cdist(table[0], table[0]) + 10 * torch.eye(16)
        # every place has a vector of its own
        assert distances.min() > 0.5


def plain_loop(recipe: PretrainRecipe, images: ImageDataset) -> MimRefinerModel:
    """MAE as it was before there was a loop for all methods, written out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder, decoder = MimRefinerModel(recipe.encoder_config()), MaeDecoder(recipe)
        xavier_uniform(encoder)
        xavier_uniform(decoder)
    encoder.train()
    freeze(encoder, blocks=0)
    groups = encoder_groups(encoder, 1.0, recipe.weight_decay)
    groups += decoder_groups(decoder, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)

    per_epoch = len(images) // recipe.batch_size
    steps, warmup = recipe.epochs * per_epoch, round(recipe.warmup_epochs * per_epoch)
    size, whole = recipe.image_size, (1.0, 1.0)
    specs = view_specs(1, 0, size, size, (recipe.scale, 1.0), whole, False, recipe.flip)
    sampler = BatchSampler(images, batch_size=recipe.batch_size, seed=recipe.seed, steps=steps)
    views = ViewDataset(images, MultiCrop(specs), recipe.seed)
    processor = image_processor(encoder.config, {})
    for step, batch in enumerate(DataLoader(views, batch_sampler=sampler)):
        shape = (recipe.batch_size, (size // recipe.patch_size) ** 2)
        drawn = np.random.default_rng([recipe.seed, step]).random(shape, dtype=np.float32)
        pixels = normalise(batch["global_views"][:, 0], processor.image_mean, processor.image_std)
        loss = mae_loss(encoder, decoder, pixels, torch.from_numpy(drawn), recipe.mask_ratio)
        optimizer.zero_grad()
        loss.backward()
        peak = recipe.learning_rate * recipe.batch_size / 256
        set_learning_rate(optimizer, learning_rate(step, warmup, steps, peak))
        optimizer.step()
    return encoder


def test_the_loop_of_all_methods_gives_the_bits_of_the_plain_one(digits: ImageDataset) -> None:
    recipe = tiny_recipe(epochs=2, flip=0.5, scale=0.5, seed=3)
    expected = plain_loop(recipe, digits).state_dict()
    for name, tensor in pretrain(recipe, digits).shipped().state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_several_crops_of_an_image_are_as_many_images() -> None:
    recipe = tiny_recipe(crops_per_image=2, batch_size=6, end_learning_rate=0.0)
    objective = MaeObjective(recipe, recipe.steps(60))
    masks = objective.masks(3, range(6))
    pixels = torch.randn(6, 2, 3, recipe.image_size, recipe.image_size)
    found = {}
    for size in (None, 4):
        objective.zero_grad()
        loss = objective.backward(pixels, masks, size)["loss"]
        found[size] = (loss, objective.encoder.layers[0].mlp.fc1.weight.grad.clone())
    torch.testing.assert_close(found[4], found[None], atol=1e-6, rtol=1e-5)

    # each image's second crop has noise of its own, and all twelve count alike
    patches = masks["noise"].shape[1] // 2
    noise = masks["noise"].view(12, patches)
    assert len(noise.unique(dim=0)) == 12
    objective.zero_grad()
    loss = mae_loss(
        objective.encoder, objective.decoder, pixels.flatten(0, 1), noise, recipe.mask_ratio
    )
    loss.backward()
    gradient = objective.encoder.layers[0].mlp.fc1.weight.grad
    torch.testing.assert_close(found[None], (loss.detach(), gradient), atol=1e-6, rtol=1e-5)

    # the views differ, and the rate is that of twice the images; it goes to the end that is stated
    images = open_images("digits").subset(range(60))
    views = next(
        iter(
            batches_of_views(
                images, objective.crops(), batch_size=6, seed=0, stop_step=1, num_workers=0
            )
        )
    )
    first, second = views["global_views"].unbind(dim=1)
    assert len(first) == 6 and not torch.equal(first, second)
    one = MaeObjective(tiny_recipe(batch_size=12), tiny_recipe(batch_size=12).steps(120))
    assert one.steps == objective.steps
    objective.set_schedules(objective.steps.warmup)
    one.set_schedules(objective.steps.warmup)
    rates = [each.optimizers[0].param_groups[0]["lr"] for each in (objective, one)]
    assert rates[0] == rates[1]
    last = objective.steps.total - 1
    share = 0.5 * (
        1 + math.cos(math.pi * (last - one.steps.warmup) / (last + 1 - one.steps.warmup))
    )
    objective.set_schedules(last)
    assert objective.optimizers[0].param_groups[0]["lr"] == pytest.approx(rates[0] * share)


def test_same_seed_same_weights(digits: ImageDataset) -> None:
    def weights(seed: int) -> Tensor:
        # the global generator has no say
        torch.manual_seed(np.random.default_rng().integers(1000))
        encoder = pretrain(tiny_recipe(epochs=2, seed=seed), digits).shipped()
        return torch.cat([parameter.detach().flatten() for parameter in encoder.parameters()])

    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_greyscale_images_pretrain_a_one_channel_encoder(digits: ImageDataset) -> None:
    grey = ImageDataset(digits.found, num_channels=1, indices=digits.indices[:128])
    encoder = pretrain(tiny_recipe(epochs=2, num_channels=1), grey).shipped()
    assert encoder.config.num_channels == 1
    assert all(parameter.isfinite().all() for parameter in encoder.parameters())


def test_a_mask_of_everything_is_refused() -> None:
    # of 16 patches not one
    with pytest.raises(ValueError, match=r"mask_ratio.*0\.95.* leaves no patch visible; lower it"):
        tiny_recipe(mask_ratio=0.95)
    one = r"patch_size.*16.* is one patch; lower it"
    with pytest.raises(ValueError, match=one):
        tiny_recipe(image_size=16, patch_size=16)


def test_batch_larger_than_the_data_is_refused(digits: ImageDataset) -> None:
    with pytest.raises(ValueError, match=r"batch_size=300: .*256 images"):
        pretrain(tiny_recipe(batch_size=300), digits)
