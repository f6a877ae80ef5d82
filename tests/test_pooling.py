"""What heads and evaluation read where there is no CLS: mean patch, register, CAPI's read-out.

And refinement from it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import facts
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from small_runs import trained_folder
from tiny_capi import TINY, TOLERANCE, tiny
from torch import Tensor
from transformers import AutoModel

from mim_refiner_hf import (
    MimRefinerConfig,
    MimRefinerImageProcessor,
    MimRefinerModel,
    RefineRecipe,
    refine,
)
from mim_refiner_hf.conversion import load_encoder
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.evaluation import extract_features
from mim_refiner_hf.model.positions_mim_refiner import patch_coordinates, token_coordinates
from mim_refiner_hf.refinement.heads import IdHeads
from mim_refiner_hf.refinement.queue import NearestNeighbourQueue
from mim_refiner_hf.refinement.refiner import NnaSettings, Refiner
from mim_refiner_hf.refinement.resolve import resolve
from mim_refiner_hf.runtime.optimisation import encoder_groups, freeze

CPU = torch.device("cpu")


@pytest.fixture
def capi(goldens: Path) -> Path:
    return goldens / "capi"


# --- pooling --------------------------------------------------------------------------------------


def read_out(model: MimRefinerModel, output: Tensor, grid: tuple[int, int]) -> Tensor:
    """CAPI's `global_repr` of an encoder output, step by step.

    Mask tokens, cross-attention, MLP, RMS, mean.
    """

    def rms(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + model.config.layer_norm_eps).sqrt() * weight

    block, places = model.predictor.blocks[0], patch_coordinates(grid, CPU)
    tokens = model.predictor.mask_token.expand(len(output), len(places), -1)
    attention = block.attention
    query = attention.heads(rms(tokens, block.norm1.weight) @ attention.q_proj.weight.T)
    key, value = (
        attention.heads(output @ part.weight.T) for part in (attention.k_proj, attention.v_proj)
    )
    query, key = attention.rope(query, places), attention.rope(key, token_coordinates(places, 4))
    weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
    tokens = tokens + (weights @ value).transpose(1, 2).flatten(2) @ attention.o_proj.weight.T
    tokens = tokens + block.mlp(rms(tokens, block.norm2.weight))
    return rms(tokens).mean(1)


@pytest.mark.parametrize("pooling", ["mean", "register", "global_repr"])
def test_heads_and_features_read_what_the_pooling_says(pooling: str) -> None:
    """Heads read raw blocks and the encoder's output.

    Evaluation reads raw blocks, but `global_repr` needs the output.
    """
    model = tiny(pooling=pooling)
    pixels = torch.randn(2, 3, 16, 32)
    pool: Callable[[Tensor], Tensor] = (
        (lambda t: t[:, 0]) if pooling == "register" else (lambda t: t[:, 4:].mean(1))
    )
    heads, queue = IdHeads(2, 32, 8, 8, 4), NearestNeighbourQueue(2, 8, 4)
    refiner = Refiner(model, [1, 2], heads, queue, NnaSettings(2, 2, temperature=0.2))
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
        features = refiner.encode(pixels)
    last = (
        read_out(model, output.last_hidden_state, (2, 4))
        if pooling == "global_repr"
        else pool(output.last_hidden_state)
    )
    torch.testing.assert_close(features[0], pool(output.hidden_states[2]), **TOLERANCE)
    torch.testing.assert_close(features[1], last, **TOLERANCE)
    torch.testing.assert_close(output.pooler_output, last, **TOLERANCE)


@pytest.mark.parametrize("pooling", ["mean", "register", "global_repr"])
def test_evaluated_features_follow_the_pooling(tmp_path: Path, pooling: str) -> None:
    for number in range(3):
        Image.effect_noise((32, 32), 60 + 10 * number).convert("RGB").save(
            tmp_path / f"{number}.png"
        )
    processor = MimRefinerImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    model = tiny(pooling=pooling)
    found = extract_features(model, open_images(str(tmp_path)), processor, blocks=[0, 2])
    with torch.no_grad():
        pixels = processor(
            [Image.open(tmp_path / f"{number}.png") for number in range(3)], return_tensors="pt"
        ).pixel_values
        output = model(pixels, output_hidden_states=True)
        blocks = [output.hidden_states[1], output.hidden_states[3]]
        expected = [
            tokens[:, 0] if pooling == "register" else tokens[:, 4:].mean(1) for tokens in blocks
        ]
        if pooling == "global_repr":
            expected[1] = read_out(model, output.last_hidden_state, (4, 4))
    for block, vectors in zip((0, 2), expected, strict=True):
        torch.testing.assert_close(found.blocks[block], vectors, **TOLERANCE)
    assert torch.equal(found.features, found.blocks[2])


def test_register_comes_after_cls() -> None:
    model = tiny(
        position_encoding="absolute",
        use_cls_token=True,
        num_register_tokens=3,
        predictor_layers=0,
        pooling="register",
    )
    with torch.no_grad():
        output = model(torch.randn(2, 3, 32, 32))
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 1])


# --- refinement -----------------------------------------------------------------------------------


def test_frequencies_are_frozen_and_the_predictor_is_not_decayed() -> None:
    model = tiny()
    freeze(model, blocks=0)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        f"{part}.attention.rope.frequencies"
        for part in ("layers.0", "layers.1", "layers.2", "predictor.blocks.0")
    }
    groups = encoder_groups(model, 0.5, 0.05)
    found = {
        name: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for name in group["names"]
    }
    assert found["embeddings.register_tokens"] == (0.5**4, 0.0)
    assert found["layers.0.norm1.weight"] == (0.125, 0.0)
    assert found["layers.2.attention.q_proj.weight"] == (0.5, 0.05)
    assert found["predictor.mask_token"] == found["predictor.blocks.0.norm1.weight"] == (1.0, 0.0)
    assert found["predictor.blocks.0.mlp.fc1.weight"] == (1.0, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "register", "global_repr"])
def test_a_checkpoint_is_refined(capi: Path, tmp_path: Path, pooling: str) -> None:
    """Both stages from the authors' file.

    The predictor goes on only where it is read and trained.
    """
    depth = facts("capi")["depth"]
    size = facts("capi")["image_size"]
    patch = facts("capi")["patch_size"]
    # few, as the verdict looks at all of them, by 784 patches each
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, pixels in enumerate(load_digits().images[:40]):
        Image.fromarray((15 * pixels).astype("uint8")).save(photos / f"{number}.png")
    recipe = RefineRecipe(
        model=str(capi / "checkpoint_perturbed_rope.pth"),
        dataset=str(photos),
        eval_fraction=0.0,
        pooling=pooling,
        head_blocks=[depth - 2, depth - 1],
        projector_dim=16,
        predictor_dim=16,
        embedding_dim=8,
        queue_size=32,
        topk=2,
        local_views=1,
        global_size=size,
        local_size=size // patch // 2 * patch,
        batch_size=8,
        micro_batch_size=4,
        max_steps=2,
        warmup_epochs=0,
        learning_rate=8e-3,
        ema_decay=0.5,
        num_workers=0,
        mixed_precision="no",
        report_to="none",
        output_dir=str(tmp_path / "out"),
    )
    result = refine(recipe)
    assert result is not None
    assert (result.refined.predictor is None) == (pooling != "global_repr")
    before, refined = (
        load_encoder(capi / "checkpoint_perturbed_rope.pth"),
        load_encoder(trained_folder(tmp_path / "out")),
    )
    assert refined.config.pooling == pooling
    assert refined.config.predictor_layers == int(pooling == "global_repr")
    after, start = refined.state_dict(), before.state_dict()
    assert set(after) == {
        name for name in start if pooling == "global_repr" or not name.startswith("predictor.")
    }
    same = {name for name, tensor in after.items() if torch.equal(tensor, start[name])}
    # every trained tensor has moved, every frequency has not
    assert same == {name for name in after if "rope" in name}
    pixels = load_file(capi / "inputs.safetensors")["pixel_values"]
    with torch.no_grad():
        loaded = AutoModel.from_pretrained(trained_folder(tmp_path / "out"))(pixels).pooler_output
        torch.testing.assert_close(loaded, refined(pixels).pooler_output)
    assert loaded.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"pooling": "cls"}, {}, "pooling='cls': the encoder has no CLS token .*; use mean"),
        (
            {"pooling": "register"},
            {"num_register_tokens": 0},
            "pooling='register': the encoder has no register tokens .*; use mean",
        ),
        (
            {"pooling": "global_repr"},
            {"predictor_layers": 0},
            "pooling='global_repr': the encoder has no predictor .*; use mean",
        ),
        (
            {"pooling": "global_repr", "head_blocks": [0, 1]},
            {},
            r"add block 2 to head_blocks=.0, 1., or use mean",
        ),
        (
            {"head_blocks": [0, 1]},
            {"pooling": "global_repr"},
            r"add block 2 to head_blocks=.0, 1., or use mean",
        ),
    ],
)
def test_poolings_that_the_encoder_cannot_give_are_refused(
    changes: dict[str, Any], shape: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(
            RefineRecipe(model="x", **changes),
            MimRefinerConfig(**{**TINY, **shape}),
            num_images=4096,
        )
