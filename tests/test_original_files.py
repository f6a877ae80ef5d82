"""Authors' files without a config.json, by their own names: DINOv2, MoCo v3, BEiT v2, timm."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from random_weights import randomise
from safetensors.torch import load_file
from test_transformers_encoders import TOLERANCE, their_output
from torch import Tensor

from mim_refiner_hf.conversion import CheckpointError, load_encoder
from mim_refiner_hf.publishing.export import export

# of a published width, which tells the number of heads
SHAPE = {
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "patch_size": 8,
    "image_size": 32,
}
# transformers' names on disk, and what facebook's file calls them
ORIGINAL = (
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"blocks.\1.attn.proj"),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_in", r"blocks.\1.mlp.w12"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_out", r"blocks.\1.mlp.w3"),
    (r"encoder\.layer\.", "blocks."),
    (r"layernorm\.", "norm."),
)
HEADS = {"dino_head.mlp.0.weight": torch.zeros(4, 192)}


def dinov2(kind: str, folder: Path, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """A random model of transformers' class, saved, and its weights as facebook's file has them."""
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **settings)
    model = randomise(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for block in range(2):
        attention = f"encoder.layer.{block}.attention.attention."
        for part in ("weight", "bias"):
            rows = [state.pop(f"{attention}{name}.{part}") for name in ("query", "key", "value")]
            state[f"blocks.{block}.attn.qkv.{part}"] = torch.cat(rows)

    original = {}
    for name, tensor in state.items():
        for pattern, target in ORIGINAL:
            name = re.sub(rf"^{pattern}", target, name)
        original[name] = tensor
    return model, original


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


KINDS = {
    "dinov2": ("Dinov2", {}),
    "dinov2-swiglu": ("Dinov2", {"use_swiglu_ffn": True}),
    "registers": ("Dinov2WithRegisters", {}),
    "registers-swiglu": ("Dinov2WithRegisters", {"use_swiglu_ffn": True}),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("wrapped", ["released", "teacher", "training", "transformers"])
def test_dinov2_goes_back_to_its_class(tmp_path: Path, name: str, wrapped: str) -> None:
    kind, settings = KINDS[name]
    model, original = dinov2(kind, tmp_path / "theirs", **settings)
    file = tmp_path / "dinov2.pth"
    if wrapped == "released":
        torch.save(original, file)
    elif wrapped == "teacher":
        torch.save({"teacher": under("backbone.", original) | HEADS}, file)
    elif wrapped == "training":
        student = {name: torch.zeros_like(tensor) for name, tensor in original.items()}
        both = under("teacher.backbone.", original) | under("student.backbone.", student)
        torch.save({"model": both | under("teacher.", HEADS)}, file)
    else:
        # without its config.json
        file = tmp_path / "bare.safetensors"
        (tmp_path / "theirs/model.safetensors").rename(file)

    encoder = load_encoder(file)
    assert encoder.load_report.placed == encoder.load_report.total
    for size in ((32, 32), (48, 24)):
        pixels = torch.randn(2, 3, *size)
        theirs = their_output(model, pixels, resize=False)
        with torch.no_grad():
            ours = encoder(pixels, interpolate_pos_encoding=True)
        expected = {"atol": TOLERANCE, "rtol": TOLERANCE}
        torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, **expected)
        torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, **expected)

    differences = export(file, tmp_path / "native", "native")
    assert max(differences.values()) < TOLERANCE
    again = transformers.AutoModel.from_pretrained(tmp_path / "native")
    assert type(again) is type(model)


def test_timms_names_for_registers_go_to_the_class(tmp_path: Path) -> None:
    """A bare file, its model, and its folder: the table of positions is resized as timm does."""
    shape = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 192, "num_heads": 3}
    model = randomise(
        timm.create_model("vit_small_patch14_reg4_dinov2", **shape, dynamic_img_size=True)
    )
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    for source in (tmp_path / "bare.pth", model):
        encoder = load_encoder(source)
        for size in ((32, 32), (48, 24)):
            pixels = torch.randn(2, 3, *size)
            with torch.no_grad():
                ours = encoder(pixels, interpolate_pos_encoding=True).last_hidden_state
                theirs = model.forward_features(pixels)
            torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)
    differences = export(tmp_path / "bare.pth", tmp_path / "native", "native")
    assert max(differences.values()) < TOLERANCE
    again = transformers.AutoModel.from_pretrained(tmp_path / "native")
    assert type(again).__name__ == "Dinov2WithRegistersModel"


def test_moco_v3_is_its_momentum_encoder(tmp_path: Path) -> None:
    shape = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 192, "num_heads": 3}
    model = randomise(timm.models.VisionTransformer(**shape, num_classes=0))
    own = dict(model.state_dict())
    head = {"head.0.weight": torch.zeros(5, 192), "head.1.running_mean": torch.zeros(5)}
    other = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    state = {
        **under("module.base_encoder.", other | head),
        **under("module.momentum_encoder.", own | head),
        "module.predictor.0.weight": torch.zeros(4, 4),
    }
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": state}, tmp_path / "moco.pth.tar")
    encoder = load_encoder(tmp_path / "moco.pth.tar")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = encoder(pixels).last_hidden_state
        torch.testing.assert_close(ours, model.forward_features(pixels), atol=1e-5, rtol=1e-5)


def test_beit_v2_leaves_the_blocks_of_its_pre_training(tmp_path: Path) -> None:
    model = randomise(
        timm.create_model(
            "beitv2_base_patch16_224",
            img_size=32,
            patch_size=8,
            depth=2,
            embed_dim=192,
            num_heads=3,
            use_rel_pos_bias=False,
            use_shared_rel_pos_bias=True,
            use_fc_norm=False,
            num_classes=0,
        )
    )
    own = {name: tensor for name, tensor in model.state_dict().items() if "index" not in name}
    blocks = {name: tensor for name, tensor in own.items() if name.startswith("blocks.")}
    beside = {
        **{name.replace("blocks", "cls_pt_layers"): tensor for name, tensor in blocks.items()},
        "mask_token": torch.zeros(1, 1, 192),
        "lm_head.weight": torch.zeros(8, 192),
    }
    torch.save({"model": own | beside}, tmp_path / "beitv2.pth")
    encoder = load_encoder(tmp_path / "beitv2.pth")
    assert encoder.load_report.family == "beit_v2"
    assert list(encoder.image_processor.image_mean) == pytest.approx([0.485, 0.456, 0.406])
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = encoder(pixels).last_hidden_state
        torch.testing.assert_close(ours, model.forward_features(pixels), atol=1e-5, rtol=1e-5)


def test_other_names_of_transformers_still_need_their_configuration(tmp_path: Path) -> None:
    for kind in ("ViT", "DINOv3ViT"):
        config = getattr(transformers, f"{kind}Config")(**SHAPE)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / kind)
        with pytest.raises(CheckpointError, match=r"need the config\.json beside them"):
            load_encoder(tmp_path / kind / "model.safetensors")
