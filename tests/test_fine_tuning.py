"""Fine-tuning against a plain loop under torch's AdamW, its augmentations as pure functions, and
digits learnt from few labels.
"""

import random
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_encoder import fresh_encoder

from mim_refiner_hf import MimRefinerModel
from mim_refiner_hf.conversion.preprocessing import image_processor
from mim_refiner_hf.data.images import ImageDataset, open_images
from mim_refiner_hf.data.loading import Loading
from mim_refiner_hf.data.order import epoch_order
from mim_refiner_hf.evaluation.fine_tuning import (
    AugmentedImages,
    FineTuneRecipe,
    add_drop_path,
    classifier_groups,
    fine_tune,
    fine_tuning,
    labelled_share,
    make_classifier,
)
from mim_refiner_hf.runtime.optimisation import learning_rate
from mim_refiner_hf.runtime.settings import read_fields

make_encoder = partial(fresh_encoder, image_size=8, num_channels=1)

EVERYTHING = {"rand_augment": True, "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.2}


def digits(split: str = "train") -> ImageDataset:
    return open_images("digits", split=split, num_channels=1)


def tune(encoder: MimRefinerModel, images: ImageDataset, **changes: Any) -> dict[str, torch.Tensor]:
    """The weights after two epochs; `changes` are of the recipe, but for `loading`."""
    loading = changes.pop("loading", Loading())
    recipe = FineTuneRecipe(
        **{"epochs": 2, "warmup_epochs": 0.5, "batch_size": 32, "seed": 3, **changes}
    )
    return fine_tune(
        encoder, image_processor(encoder.config, {}), images, recipe, loading=loading
    ).state_dict()


def test_training_equals_a_plain_loop() -> None:
    encoder, images = make_encoder(), digits().subset(range(100))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    found = tune(encoder, images)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    torch.manual_seed(3)
    model = make_classifier(encoder, 10).train()
    recipe = FineTuneRecipe(epochs=2, warmup_epochs=0.5, batch_size=32, seed=3)
    augmented = AugmentedImages(images, recipe, 8, image_processor(encoder.config, {}))
    groups = []
    for name, parameter in model.named_parameters():
        block = re.match(r"encoder\.layers\.(\d)", name)
        # decays: embeddings 3, block 0 2, block 1 1, the rest 0
        depth = 2 - int(block[1]) if block else 0
        if ".embeddings." in name:
            depth = 3
        exempt = name.endswith(("cls_token", "position_embeddings"))
        decay = 0.0 if parameter.ndim <= 1 or exempt else 0.05
        groups.append({"params": [parameter], "weight_decay": decay, "scale": 0.75**depth})
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999))
    # 3 batches of 32 in each epoch of 100 images
    for step in range(6):
        epoch, batch = divmod(step, 3)
        order = epoch_order(100, 3, epoch)[32 * batch : 32 * batch + 32]
        pixels, labels = zip(*(augmented[epoch, int(i)] for i in order), strict=True)
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(step, 2, 6, 1e-3 * 32 / 256)
        optimizer.zero_grad()
        F.cross_entropy(
            model(torch.stack(pixels)).logits, torch.tensor(labels), label_smoothing=0.1
        ).backward()
        optimizer.step()
    moved = 0.0
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-3, msg=name)
        moved = max(
            moved, (tensor - before.get(name.removeprefix("encoder."), tensor)).abs().max().item()
        )
    assert moved > 2e-4


def test_smaller_passes_change_nothing() -> None:
    encoder, images = make_encoder(), digits().subset(range(64))
    whole, parts = (tune(encoder, images, loading=Loading(size)) for size in (256, 7))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=2e-5, rtol=1e-3, msg=name)


def test_the_classifier_starts_next_to_zero_on_the_same_encoder() -> None:
    encoder = make_encoder()
    model = make_classifier(encoder.to(torch.bfloat16), 7)
    assert all(
        torch.equal(encoder.state_dict()[name].float(), tensor)
        for name, tensor in model.encoder.state_dict().items()
    )
    logits = model(torch.randn(3, 1, 8, 8)).logits
    assert logits.shape == (3, 7) and logits.abs().max() < 1e-3 and logits.dtype == torch.float32
    groups = classifier_groups(model, layer_decay=0.75, weight_decay=0.05)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(
        id(p) for p in model.parameters()
    )
    assert model.encoder.embeddings.position_embeddings is not None
    assert model.encoder.embeddings.position_embeddings.requires_grad


def test_drop_path_drops_whole_branches_of_later_blocks() -> None:
    model = make_classifier(make_encoder(num_hidden_layers=3), 2)
    pixels = torch.randn(400, 1, 8, 8)
    plain = model.eval()(pixels, output_hidden_states=True).hidden_states
    hooks = add_drop_path(model, 0.4)
    torch.testing.assert_close(
        model(pixels, output_hidden_states=True).hidden_states[3], plain[3]
    )  # eval: nothing is dropped
    with torch.no_grad():
        one, two, three = model.train()(pixels, output_hidden_states=True).hidden_states[1:]
    torch.testing.assert_close(one, plain[1])  # rate 0 in the first block
    share = [
        (after - before).flatten(1).abs().sum(dim=1).eq(0).float().mean()
        for before, after in ((one, two), (two, three))
    ]
    assert share[0] == pytest.approx(0.2**2, abs=0.04) and share[1] == pytest.approx(
        0.4**2, abs=0.06
    )  # both branches at once
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(model(pixels, output_hidden_states=True).hidden_states[3], plain[3])


def test_augmentations_are_pure_functions_of_seed_epoch_and_image() -> None:
    encoder = make_encoder(image_size=16)
    recipe = FineTuneRecipe(rand_augment=True, erasing=1.0, seed=1)
    processor = image_processor(encoder.config, {})
    images = AugmentedImages(digits(), recipe, 16, processor)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first, label = images[2, 5]
    assert state[0] == random.getstate() and state[1] == np.random.get_state()[1].tolist()
    assert torch.equal(state[2], torch.get_rng_state())
    assert first.shape == (1, 16, 16) and label == digits()[5].label
    random.seed(99)
    np.random.seed(99)
    assert torch.equal(AugmentedImages(digits(), recipe, 16, processor)[2, 5][0], first)
    subset = AugmentedImages(digits().subset([9, 5]), recipe, 16, processor)
    # the image counts, not its place
    assert torch.equal(subset[2, 1][0], first)
    assert not torch.equal(images[3, 5][0], first)
    plain = AugmentedImages(digits(), FineTuneRecipe(seed=1), 16, processor)
    assert (plain[2, 5][0] - first).abs().max() > 0.5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0.0, 2.5, 5.0, 7.5, 9.99, 10.0])
def test_every_operation_of_randaugment_takes_every_magnitude(
    magnitude: float, channels: int
) -> None:
    """Those of Pillow 12.3 too, which refuses to keep 0 bits, as timm asks at a magnitude of 10."""
    recipe = FineTuneRecipe(rand_augment=True)
    processor = image_processor(make_encoder(num_channels=channels).config, {})
    images = AugmentedImages(digits(), recipe, 16, processor)
    pixels = np.arange(16 * 16 * channels, dtype=np.uint8).reshape(16, 16, channels)
    picture = Image.fromarray(pixels.squeeze())
    for operation in images.rand_augment.ops:
        operation.prob, operation.magnitude, operation.magnitude_std = 1.0, magnitude, 0.0
        found = operation(picture)
        assert (found.size, found.mode) == (picture.size, picture.mode)
        if operation.name == "PosterizeIncreasing":
            bits = 4 - int(magnitude / 10 * 4)
            kept = pixels >> (8 - bits) << (8 - bits)
            assert np.array_equal(np.asarray(found), kept.squeeze())


def test_everything_at_once_trains_and_repeats_itself() -> None:
    encoder, images = make_encoder(), digits().subset(range(48))
    runs = [
        tune(encoder, images, **EVERYTHING, **more)
        for more in ({}, {"loading": Loading(num_workers=2)}, {"seed": 4})
    ]
    name = "encoder.layers.1.mlp.fc1.weight"
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    assert not torch.equal(runs[0][name], runs[2][name])
    assert not torch.equal(runs[0][name], tune(encoder, images)[name])


def test_a_share_of_the_labels_holds_every_class() -> None:
    labels = np.repeat([0, 1, 2, 5], [100, 50, 3, 20])
    chosen = labelled_share(labels, 0.1, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [10, 5, 1, 0, 0, 2]
    assert (
        chosen.tolist()
        == sorted(set(chosen.tolist()))
        == labelled_share(labels, 0.1, seed=0).tolist()
    )
    assert chosen.tolist() != labelled_share(labels, 0.1, seed=1).tolist()
    assert labelled_share(labels, 1.0, seed=0).tolist() == list(range(173))


@pytest.mark.slow
def test_digits_are_learnt() -> None:
    encoder = make_encoder()
    recipe = FineTuneRecipe(
        fraction=0.4,
        epochs=8,
        warmup_epochs=1,
        batch_size=32,
        learning_rate=0.02,
        scale=0.7,
        flip=0.0,
    )
    result = fine_tuning(
        encoder=encoder,
        processor=image_processor(encoder.config, {}),
        train_images=digits(),
        eval_images=digits("test"),
        recipe=recipe,
    )
    accuracy = result.metrics["fine_tuning_accuracy"]
    # twice chance, from random weights in 128 updates
    assert accuracy > 0.2
    assert result.metrics["fine_tuning_accuracy_standard_error"] == pytest.approx(
        (accuracy * (1 - accuracy) / 500) ** 0.5
    )
    assert result.scores["fine_tuning_accuracy"].setting.endswith(
        "images (drawn, 0.4 of all), 8 epochs, learning rate 0.02, layer decay 0.75"
    )


def test_the_recipes_are_the_papers() -> None:
    found = {
        name: FineTuneRecipe(**read_fields(f"fine-tune-{name}", FineTuneRecipe))
        for name in ("inat", "100percent")
    }
    assert found["inat"] == FineTuneRecipe()
    table_12 = {
        "epochs": 50,
        "batch_size": 256,
        "learning_rate": 1e-3,
        "layer_decay": 0.75,
        "weight_decay": 0.05,
    }
    assert {name: getattr(found["inat"], name) for name in table_12} == table_12
    assert (
        found["inat"].warmup_epochs,
        found["inat"].label_smoothing,
        found["inat"].scale,
        found["inat"].mixes,
    ) == (
        5,
        0.1,
        0.08,
        False,
    )
    mae_l = {
        **table_12,
        "batch_size": 1024,
        "drop_path": 0.2,
        "erasing": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "rand_augment": True,
    }
    assert {name: getattr(found["100percent"], name) for name in mae_l} == mae_l


def test_bad_input_is_named() -> None:
    for change, message in (
        ({"fraction": 0.0}, "fraction=0.0: must be greater than 0 and at most 1"),
        ({"drop_path": 1.5}, "drop_path=1.5: must be between 0 and 1"),
        ({"epochs": 3}, "warmup_epochs=5.0: must be less than epochs=3"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be a number greater than 0"),
        ({"mixup": -1.0}, "mixup=-1.0: must be at least 0"),
        ({"epochs": "many"}, "epochs='many': must be of the type int"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            FineTuneRecipe(**change)
    with pytest.raises(ValueError, match="a process has 33 of them; make it even"):
        tune(make_encoder(), digits().subset(range(40)), batch_size=33, mixup=0.8)
    with pytest.raises(ValueError, match="the encoder takes 8 x 12 pixels"):
        tune(make_encoder(image_size=[8, 12]), digits())


@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_an_encoder_without_final_norm_gets_a_fresh_one(norm_placement: str) -> None:
    """Also one whose features are the last block's raw output, by torch's own layers."""
    encoder = make_encoder(norm_placement=norm_placement, final_norm=False, features="last_block")
    model = make_classifier(encoder, 5)
    fresh = torch.nn.LayerNorm(32, eps=encoder.config.layer_norm_eps)
    pixels = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        raw = encoder(pixels, output_hidden_states=True).hidden_states[-1][:, 0]
        weight, bias = model.classifier.weight, model.classifier.bias
        torch.testing.assert_close(model(pixels).logits, F.linear(fresh(raw), weight, bias))
    groups = classifier_groups(model, layer_decay=0.75, weight_decay=0.05)
    norm = next(group for group in groups if "norm.weight" in group.get("names", []))
    assert norm["weight_decay"] == 0 and norm["lr_scale"] == 1
    assert not encoder.config.final_norm


def test_positions_do_not_decay() -> None:
    """In a group of its own, whose rate is the embeddings'."""
    model = make_classifier(make_encoder(), 2)
    groups = classifier_groups(model, layer_decay=0.75, weight_decay=0.05)
    name = "embeddings.position_embeddings"
    positions = next(group for group in groups if name in group.get("names", []))
    assert positions["weight_decay"] == 0 and positions["lr_scale"] == 0.75**3
    others = next(
        group for group in groups if "embeddings.patch_embeddings.weight" in group.get("names", [])
    )
    assert others["weight_decay"] == 0.05 and others["lr_scale"] == 0.75**3


def test_frozen_blocks_stay() -> None:
    encoder = make_encoder()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    tuned = tune(encoder, digits().subset(range(64)), freeze_blocks=1)
    changed = {
        name for name, tensor in before.items() if not torch.equal(tuned[f"encoder.{name}"], tensor)
    }
    assert not any(name.startswith(("embeddings.", "layers.0.")) for name in changed)
    late = {name for name in before if name.startswith(("layers.1.", "norm."))}
    assert changed == late
    with pytest.raises(ValueError, match="freeze_blocks=3: the encoder has 2 blocks"):
        tune(encoder, digits().subset(range(64)), freeze_blocks=3)


# ml-jku/MIM-Refiner, src/yamls/eval: finetune_1p/template_tracked_*, 7mzhpufg.yaml (2B) and
# finetune_10p/template_tracked_*, 7mzhpufg_sd02.yaml (2B), run/data2vec2_large16.yaml
RELEASED = {
    "few-shot": (250, 1e-4, 0.05, 0.0, False, False, 0),
    "1percent": (512, 3e-5, 0.05, 0.0, False, False, 0),
    "1percent-h14": (512, 3e-5, 0.4, 0.0, False, False, 0),
    "1percent-2b14": (512, 3e-5, 0.4, 0.0, False, False, 6),
    "10percent": (512, 3e-5, 0.05, 0.0, True, False, 0),
    "10percent-h14": (256, 1e-3, 0.05, 0.2, True, True, 0),
    "10percent-2b14": (256, 1e-3, 0.05, 0.2, True, True, 6),
    "10percent-d2v2-l16": (512, 1e-3, 0.05, 0.1, True, True, 0),
    "100percent": (1024, 1e-3, 0.05, 0.2, True, True, 0),
    "100percent-h14": (1024, 1e-3, 0.05, 0.3, True, True, 0),
}


@pytest.mark.parametrize("name", RELEASED)
def test_every_size_has_the_released_settings(name: str) -> None:
    recipe = FineTuneRecipe(**read_fields(f"fine-tune-{name}", FineTuneRecipe))
    batch, rate, decay, drop_path, augmented, mixed, frozen = RELEASED[name]
    assert (recipe.batch_size, recipe.learning_rate, recipe.weight_decay) == (batch, rate, decay)
    assert (recipe.drop_path, recipe.freeze_blocks) == (drop_path, frozen)
    assert recipe.rand_augment == augmented and recipe.mixes == mixed
    assert recipe.erasing == (0.25 if mixed else 0.0)
    shares = {"few": 1.0, "1percent": 0.01, "10percent": 0.1, "100percent": 1.0}
    assert recipe.fraction == shares[name.partition("-")[0]] and (
        recipe.epochs,
        recipe.layer_decay,
    ) == (50, 0.75)
