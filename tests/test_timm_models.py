"""timm's ViTs and BEiTs, as folders and as bare state dicts, against timm itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from random_weights import randomise
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from mim_refiner_hf.conversion import CheckpointError, load_encoder

TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
}
VIT, BEIT = "vit_tiny_patch16_224", "beit_base_patch16_224"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (VIT, {}),
    "vit-cls-without-position": (VIT, {"no_embed_class": True}),
    "vit-registers": (VIT, {"reg_tokens": 4, "no_embed_class": True}),
    "vit-layer-scale": (VIT, {"init_values": 0.1}),
    "vit-mean": (VIT, {"global_pool": "avg", "class_token": False}),
    "vit-registers-mean": (
        VIT,
        {"global_pool": "avg", "class_token": False, "reg_tokens": 2, "no_embed_class": True},
    ),
    "vit-classifier": (VIT, {"num_classes": 5}),
    "vit-mean-of-patches-beside-cls": (VIT, {"global_pool": "avg"}),
    "vit-mean-after-the-final-norm": (VIT, {"global_pool": "avg", "fc_norm": False}),
    "vit-attention": (VIT, {"global_pool": "map", "class_token": False}),
    "vit-distilled": ("deit_tiny_distilled_patch16_224", {}),
    "vit-swiglu": ("vit_giant_patch14_dinov2", {"mlp_ratio": 4.0}),
    "eva-dinov3": ("vit_small_patch16_dinov3", {}),
    "eva-dinov3-biases": ("vit_small_patch16_dinov3_qkvb", {}),
    "eva-dinov3-swiglu": ("vit_small_patch16_dinov3", {"swiglu_mlp": True}),
    "vit-norm-pre": (VIT, {"pre_norm": True}),
    "vit-clip": ("vit_base_patch16_clip_quickgelu_224", {}),
    "beit-per-block": (BEIT, {}),
    "beit-shared": (
        BEIT,
        {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "init_values": None},
    ),
    "beit-absolute": (
        BEIT,
        {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "global_pool": "token"},
    ),
    "beit-classifier": (BEIT, {"num_classes": 5}),
}


def tiny(architecture: str, **settings: Any) -> Any:
    """A tiny timm model with random values in every parameter."""
    model = timm.create_model(
        architecture, pretrained=False, **{**TINY, "num_classes": 0, **settings}
    )
    return randomise(model, vectors=0.5)


def save(model: Any, path: Path, form: str) -> Path:
    if form == "folder":
        save_for_hf(model, str(path), safe_serialization=True)
        return path
    torch.save(
        model.state_dict() if form == "bare" else {"epoch": 3, "state_dict": model.state_dict()},
        path / "model.pth",
    )
    return path / "model.pth"


# what a bare file does not say: rotary positions, and whether CLIP's patches have a bias
FOLDER_ONLY = ("eva-dinov3", "eva-dinov3-biases", "eva-dinov3-swiglu", "vit-norm-pre", "vit-clip")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form)
        for name in MODELS
        for form in ("folder", "bare", "training")
        if form == "folder" or name not in FOLDER_ONLY
    ],
)
def test_features_are_timms(tmp_path: Path, name: str, form: str) -> None:
    architecture, settings = MODELS[name]
    model = tiny(architecture, **settings)
    source = save(model, tmp_path, form)
    # CLS without a position is told from a grid that is no square by the size alone
    size = 32 if "without-position" in name and form != "folder" else None
    encoder = load_encoder(source, num_heads=None if form == "folder" else 3, image_size=size)
    family = {"beit": "plain_beit", "eva": "timm_eva"}.get(name.split("-")[0], "plain_vit")
    assert encoder.load_report.family == family
    assert ("classifier" in encoder.load_report.dropped) == ("classifier" in name)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = encoder(pixels), model.forward_features(pixels)
    torch.testing.assert_close(ours.last_hidden_state, theirs, atol=1e-5, rtol=1e-5)
    # a bare file says how it is pooled by a norm or weights for that alone
    pools_by_itself = isinstance(model.fc_norm, nn.LayerNorm) or model.global_pool in (
        "map",
        "token",
    )
    if form == "folder" or pools_by_itself:
        with torch.no_grad():
            expected = theirs[:, 0]
            if "distilled" not in name:
                expected = model.forward_head(theirs, pre_logits=True)
        torch.testing.assert_close(ours.pooler_output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit-mean-of-patches-beside-cls", "vit-attention", "eva-dinov3"])
def test_a_model_object_and_its_other_sizes_are_timms(name: str) -> None:
    architecture, settings = MODELS[name]
    model = tiny(architecture, dynamic_img_size=True, **settings)
    encoder = load_encoder(model)
    pixels = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        ours = encoder(pixels, interpolate_pos_encoding=True)
        theirs = model.forward_features(pixels)
        pooled = model.forward_head(theirs, pre_logits=True)
    # timm resizes tables with antialiasing, which moves them
    if "eva" in name:
        torch.testing.assert_close(ours.last_hidden_state, theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.pooler_output, pooled, atol=1e-5, rtol=1e-5)
    assert ours.last_hidden_state.shape == theirs.shape


def test_names_of_create_model_are_hub_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`vit_base_patch16_224.mae` is `timm/vit_base_patch16_224.mae`.

    Without a tag it is timm's default for the architecture.
    """
    save(tiny(VIT), tmp_path, "folder")
    asked = []

    def snapshot(name: str, **kwargs: Any) -> str:
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr("mim_refiner_hf.conversion.read.snapshot_download", snapshot)
    for name in (
        "vit_base_patch16_224.mae",
        "vit_base_patch16_224",
        "timm/vit_base_patch16_224.mae",
    ):
        assert load_encoder(name).load_report.family == "plain_vit"
    default = timm.models.get_pretrained_cfg("vit_base_patch16_224").hf_hub_id
    assert asked == ["timm/vit_base_patch16_224.mae", default, "timm/vit_base_patch16_224.mae"]
    with pytest.raises(
        CheckpointError, match=r"unknown weights; timm .* has .*vit_base_patch16_224\.mae"
    ):
        load_encoder("vit_base_patch16_224.nope")


def test_what_only_the_architecture_tells(tmp_path: Path) -> None:
    """Activation, a grid that is not square, and a lost tensor that no other one points to.

    `config.json` says them.
    """
    model = tiny(VIT, act_layer="gelu_tanh", img_size=(16, 64), reg_tokens=1, no_embed_class=True)
    encoder = load_encoder(save(model, tmp_path, "folder"))
    assert (encoder.config.hidden_act, encoder.config.image_size) == ("gelu_pytorch_tanh", [16, 64])
    pixels = torch.randn(2, 3, 16, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(pixels)[0], model.forward_features(pixels), atol=1e-5, rtol=1e-5
        )
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "reg_token"}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"1 of 39 plain_vit tensors are missing: embeddings\.register_tokens"
    ):
        load_encoder(tmp_path)


def test_preprocessing_is_timms(tmp_path: Path) -> None:
    source = save(tiny(VIT), tmp_path, "folder")
    processor = load_encoder(source).image_processor
    assert (list(processor.image_mean), list(processor.image_std), processor.resample) == (
        [0.5] * 3,
        [0.5] * 3,
        3,
    )
    # 32 / crop_pct, and crop_pct is 0.9
    assert dict(processor.size) == {"shortest_edge": 35}
    assert dict(processor.crop_size) == {"height": 32, "width": 32}
    config = json.loads((source / "config.json").read_text())
    config["pretrained_cfg"] |= {
        "crop_mode": "squash",
        "interpolation": "bilinear",
        "mean": [0.1, 0.2, 0.3],
    }
    (source / "config.json").write_text(json.dumps(config))
    processor = load_encoder(source).image_processor
    assert (list(processor.image_mean), processor.resample) == ([0.1, 0.2, 0.3], 2)
    assert dict(processor.size) == {"shortest_edge": 32}


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        (
            VIT,
            {"qk_norm": True},
            r"8 tensors have no place in a bare ViT.*: .*blocks\.0\.attn\.q_norm\.weight",
        ),
        (
            BEIT,
            {"swiglu_mlp": True, "scale_mlp": True},
            r"tensors have no place in a bare BEiT.*: .*blocks\.0\.mlp\.fc1_g\.weight",
        ),
    ],
)
@pytest.mark.parametrize("form", ["folder", "bare"])
def test_what_we_cannot_express_is_named(
    tmp_path: Path, architecture: str, settings: dict[str, Any], message: str, form: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_encoder(save(tiny(architecture, **settings), tmp_path, form), num_heads=3)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    """EVA's rotary positions are in no tensor.

    Only the architecture tells that its file is no plain ViT.
    """
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    for architecture, message in (
        ("vit_small_patch16_rope_ape_224", "timm's Eva with RotaryEmbeddingCat positions"),
        ("eva02_tiny_patch14_224", "timm's Eva with RotaryEmbeddingCat positions"),
        ("swin_tiny_patch4_window7_224", "model_type='timm.SwinTransformer', not a plain ViT"),
        ("vit_of_tomorrow", "timm's 'vit_of_tomorrow', which timm .* does not know; update timm"),
        ("hf-hub:someone/evil", "timm's 'hf-hub:someone/evil', which timm .* does not know"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture}))
        with pytest.raises(CheckpointError, match=message):
            load_encoder(tmp_path)
    for arguments in ({"pretrained": True}, {"no_such_setting": 1}, {"act_layer": "relu"}):
        (tmp_path / "config.json").write_text(
            json.dumps({"architecture": VIT, "model_args": arguments})
        )
        with pytest.raises(
            CheckpointError,
            match=r"cannot be built as it says: |has the activation ReLU; allowed: QuickGELU",
        ):
            load_encoder(tmp_path)
