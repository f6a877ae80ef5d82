"""timm's ViTs and BEiTs, as folders and as bare state dicts, against timm itself."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from random_weights import randomise
from safetensors.torch import load_file, save_file
from test_transformers_encoders import CASES, saved, three_steps
from timm.layers.pos_embed_sincos import init_random_2d_freqs
from timm.models import save_for_hf
from torch import nn

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel
from mim_refiner_hf.conversion import CheckpointError, load_encoder
from mim_refiner_hf.model.configuration_mim_refiner import ConfigurationError
from mim_refiner_hf.publishing import save_model_folder
from mim_refiner_hf.publishing.export import export
from mim_refiner_hf.publishing.twins import why_not_exported

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
    "vit-attention-of-registers-too": (
        VIT,
        {
            "global_pool": "map",
            "class_token": False,
            "reg_tokens": 2,
            "no_embed_class": True,
            "pool_include_prefix": True,
        },
    ),
    "vit-no-qkv-bias": (VIT, {"qkv_bias": False}),
    "vit-query-key-norm": (VIT, {"qk_norm": True}),
    "vit-rmsnorm": ("test_vit4", {}),
    "vit-norms-at-the-ends": ("vit_base_patch16_rpn_224", {}),
    "vit-beit-3": ("beit3_base_patch16_224", {}),
    "vit-aimv2": ("aimv2_large_patch14_224", {}),
    "vit-distilled": ("deit_tiny_distilled_patch16_224", {}),
    "vit-swiglu": ("vit_giant_patch14_dinov2", {"mlp_ratio": 4.0}),
    "eva-02-tiny": ("eva02_tiny_patch14_224", {}),
    "eva-02-base": ("eva02_base_patch14_224", {}),
    "eva-02-cls": ("eva02_large_patch14_448", {"global_pool": "token", "num_classes": 5}),
    "eva-02-clip": ("eva02_large_patch14_clip_224", {}),
    "eva-02-clip-e": ("eva02_enormous_patch14_clip_224", {}),
    # 3 heads of queries share one of keys in the second block
    "eva-sapiens2": ("vit_base_patch16_sapiens2", {"num_kv_heads": (3, 1)}),
    "eva-01": ("eva_giant_patch14_224", {}),
    "eva-rope": ("vit_small_patch16_rope_224", {}),
    "eva-rope-halves": ("vit_small_patch16_rope_224", {"rope_rotate_half": True}),
    "eva-rope-ape": ("vit_small_patch16_rope_ape_224", {}),
    "eva-rope-mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "eva-rope-mixed-ape": ("vit_small_patch16_rope_mixed_ape_224", {"rope_grid_indexing": "ij"}),
    "eva-rope-reg1-gap": ("vit_medium_patch16_rope_reg1_gap_256", {}),
    "eva-rope-reg1-gap-no-bias": ("vit_mediumd_patch16_rope_reg1_gap_256", {}),
    "eva-rope-reg4-gap": ("vit_betwixt_patch16_rope_reg4_gap_256", {"use_abs_pos_emb": True}),
    # 8 heads pool, of 6 channels
    "eva-pe-core": ("vit_pe_core_tiny_patch16_384", {}),
    "eva-pe-core-without-cls": ("vit_pe_core_gigantic_patch14_448", {}),
    "eva-pe-lang": ("vit_pe_lang_large_patch14_448", {}),
    "eva-pe-spatial": ("vit_pe_spatial_small_patch16_512", {}),
    "eva-lingbot": ("vit_small_patch16_lingbot", {}),
    "eva-dinov3": ("vit_small_patch16_dinov3", {}),
    "eva-dinov3-neighbours": (
        "vit_small_patch16_dinov3",
        {"rope_rotate_half": False, "rope_grid_indexing": "xy"},
    ),
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


GATED = {"gated_mlp": True, "hidden_act": "silu"}
# architectures with other blocks, and what is said of them
REFUSED = {
    "vit_base_patch16_xp_224": "has timm's ParallelScalingBlock as blocks; allowed: Block",
    "vit_so150m_patch16_reg4_map_256": (
        r"pools the patches without CLS and registers \(global_pool='map', pool_"
    ),
    "swin_tiny_patch4_window7_224": "model_type='timm.SwinTransformer', not a plain ViT",
}
UNKNOWN = ("vit_of_tomorrow", "hf-hub:someone/evil")
EVAS = [name for name in MODELS if name.startswith("eva")]
# what a bare file does not say: rotary positions, and whether CLIP's patches have a bias
FOLDER_ONLY = (
    *EVAS,
    "vit-norm-pre",
    "vit-clip",
    "vit-rmsnorm",
    "vit-norms-at-the-ends",
    "vit-beit-3",
    "vit-aimv2",
)


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
    # of a bare file, registers make it another family
    assert encoder.load_report.family in (family, f"{family}_registers")
    assert ("classifier" in encoder.load_report.dropped) == ("num_classes" in settings)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = encoder(pixels), model.forward_features(pixels)
    torch.testing.assert_close(ours.last_hidden_state, theirs, atol=1e-5, rtol=1e-5)
    # a bare file says how it is pooled by a norm or weights for that alone
    pools_by_itself = isinstance(model.fc_norm, nn.LayerNorm) or model.global_pool in (
        "map",
        "token",
    )
    # timm takes the mean of both tokens, which no tensor says
    pools_by_itself = pools_by_itself and "distilled" not in name
    if form == "folder" or pools_by_itself:
        with torch.no_grad():
            expected = model.forward_head(theirs, pre_logits=True)
        torch.testing.assert_close(ours.pooler_output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit-mean-of-patches-beside-cls", "vit-attention", *EVAS])
def test_a_model_object_and_its_other_sizes_are_timms(name: str) -> None:
    architecture, settings = MODELS[name]
    model = tiny(architecture, dynamic_img_size=True, **settings)
    encoder = load_encoder(model)
    for size in ((32, 48), (24, 16)):
        pixels = torch.randn(2, 3, *size)
        with torch.no_grad():
            ours = encoder(pixels, interpolate_pos_encoding=True)
            theirs = model.forward_features(pixels)
            pooled = model.forward_head(theirs, pre_logits=True)
        assert ours.last_hidden_state.shape == theirs.shape
        # the tables of other classes are resized as their authors do, without antialiasing
        if name in EVAS:
            torch.testing.assert_close(ours.last_hidden_state, theirs, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ours.pooler_output, pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVAS)
def test_an_eva_is_refined_and_goes_back_to_timm(tmp_path: Path, name: str) -> None:
    """Loaded, refined, saved, exported: timm's blocks at two sizes, and the weights read again."""
    architecture, settings = MODELS[name]
    model = tiny(architecture, **settings)
    encoder = load_encoder(model)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    three_steps(encoder)
    after = encoder.eval().state_dict()
    same = [key for key, tensor in after.items() if torch.equal(tensor, before[key])]
    assert same == [key for key in before if "position_embeddings" in key or ".rope." in key]

    save_model_folder(tmp_path / "model", encoder, encoder.image_processor)
    export(tmp_path / "model", tmp_path / "timm", "timm")
    twin = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert type(twin) is type(model)
    for size in ((32, 32), (24, 48)):
        pixels = torch.randn(2, 3, *size)
        with torch.no_grad():
            ours = encoder(pixels, interpolate_pos_encoding=True)
            tokens = twin.forward_features(pixels)
            torch.testing.assert_close(tokens, ours.last_hidden_state, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(twin(pixels), ours.pooler_output, atol=1e-5, rtol=1e-5)

    for folder in ("model", "timm"):
        again = load_encoder(tmp_path / folder)
        assert again.load_report.total == len(after)
        state = again.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in after.items())
        told = [loaded.config.to_diff_dict() for loaded in (encoder, again)]
        differ = {key for key in told[0] | told[1] if told[0].get(key) != told[1].get(key)}
        assert differ <= {"architectures", "dtype", "layer_scale_init"}


# timm says the same by another of its classes
ELSEWHERE = {
    "vit-swiglu": "Eva",
    "vit-norms-at-the-ends": "Eva",
    "vit-beit-3": "Eva",
    "beit-absolute": "Eva",
}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in EVAS])
def test_every_other_model_goes_back_to_timm(tmp_path: Path, name: str) -> None:
    architecture, settings = MODELS[name]
    model = tiny(architecture, **settings)
    encoder = load_encoder(model)
    save_model_folder(tmp_path / "model", encoder, encoder.image_processor)
    export(tmp_path / "model", tmp_path / "timm", "timm")
    twin = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert type(twin).__name__ == ELSEWHERE.get(name, type(model).__name__)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = encoder(pixels)
        tokens = twin.forward_features(pixels)
        torch.testing.assert_close(tokens, model.forward_features(pixels), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tokens, ours.last_hidden_state, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(twin(pixels), ours.pooler_output, atol=1e-5, rtol=1e-5)
    state = load_encoder(tmp_path / "timm").state_dict()
    assert all(torch.equal(state[key], value) for key, value in encoder.state_dict().items())


def test_the_same_curve_has_one_word_in_timm(tmp_path: Path) -> None:
    encoder = load_encoder(tiny(VIT, act_layer="gelu_tanh"))
    encoder.config.hidden_act = "gelu_new"
    save_model_folder(tmp_path / "model", encoder, encoder.image_processor)
    export(tmp_path / "model", tmp_path / "timm", "timm")
    assert load_encoder(tmp_path / "timm").config.hidden_act == "gelu_pytorch_tanh"


@pytest.mark.parametrize("name", ["aimv2", "aimv2-no-head", "aimv2-towers", "dinov2"])
def test_a_class_of_transformers_goes_to_timm(tmp_path: Path, name: str) -> None:
    """With the biases that it has, and no others."""
    saved(tmp_path / "theirs", CASES[name])
    encoder = load_encoder(tmp_path / "theirs")
    export(tmp_path / "theirs", tmp_path / "timm", "timm")
    again = load_encoder(tmp_path / "timm")
    assert again.config.bias == encoder.config.bias
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in encoder.state_dict().items())


def test_a_computed_table_of_positions_goes_to_timm_at_its_size(tmp_path: Path) -> None:
    saved(tmp_path / "theirs", CASES["aimv2-native"])
    differences = export(tmp_path / "theirs", tmp_path / "timm", "timm")
    assert max(differences.values()) < 1e-5
    stated = json.loads((tmp_path / "timm/config.json").read_text())
    assert stated["pretrained_cfg"]["fixed_input_size"]
    again = load_encoder(tmp_path / "timm").config
    assert (again.position_encoding, again.pooling_head) == ("absolute", "attention")


def test_a_class_that_timm_has_not_is_refused_by_what_is_missing(tmp_path: Path) -> None:
    saved(tmp_path / "theirs", CASES["pixio"])
    message = r"no pooling but of CLS, patches or attention \(pooling='prefix'\)"
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "theirs", tmp_path / "timm", "timm")


@pytest.mark.parametrize("settings", [{}, {"position_encoding": "rope", "rope_theta": 100.0}])
def test_a_query_without_projection_goes_to_either_class(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
    config = MimRefinerConfig(
        **shape, num_hidden_layers=2, image_size=32, pooling_head="attention", **settings
    )
    encoder = randomise(MimRefinerModel(config))
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    save_model_folder(tmp_path / "model", encoder, MimRefinerImageProcessor(**sizes))
    assert max(export(tmp_path / "model", tmp_path / "timm", "timm").values()) < 1e-5
    again = load_encoder(tmp_path / "timm")
    assert again.config.pooling_head == "attention"


@pytest.mark.parametrize(
    ("name", "broken", "shape", "message"),
    [
        ("eva-02-tiny", "blocks.1.attn.q_bias", (), r"q_proj\.bias is \[\], expected \[48\]"),
        ("eva-02-tiny", "blocks.1.attn.q_bias", (47,), r"q_proj\.bias is \[47\], expected \[48\]"),
        ("eva-02-base", "blocks.0.mlp.norm.weight", (3,), r"mlp\.norm\.weight is \[3\], expected"),
        ("eva-rope-mixed", "rope.freqs", (2,), r"rope\.freqs has the unexpected shape \[2\]"),
        ("eva-rope-mixed", "rope.freqs", (2, 1, 3, 8), r"layers\.1\..*rope\.frequencies"),
        ("eva-rope-mixed", "rope.freqs", (3, 2, 3, 8), r"frequencies is \[3, 3, 8\], expected \[2"),
    ],
)
def test_misshapen_tensors_of_an_eva_are_named(
    tmp_path: Path, name: str, broken: str, shape: tuple[int, ...], message: str
) -> None:
    architecture, settings = MODELS[name]
    source = save(tiny(architecture, **settings), tmp_path, "folder")
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, broken: torch.ones(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_encoder(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_placement": "branch", "layer_scale_init": 1}, "layer scale where norms end the br"),
        ({"norm_placement": "branch", "query_key_norm": True}, "norms of queries and keys where n"),
        ({**GATED, "norm_type": "rmsnorm"}, "RMSNorm but before branches with a layer scale"),
        ({"norm_type": "rmsnorm", "layer_norm_eps": 1e-5}, "RMSNorm with this epsilon"),
        ({**GATED, "patch_norm": True}, r"gated MLP \(gated_mlp=True\)"),
        ({"pooling": "prefix", "num_register_tokens": 2}, "pooling but of CLS, patches or at"),
        (
            {"position_encoding": "relative", "norm_placement": "branch"},
            "norm at the end of a bran",
        ),
    ],
)
def test_what_timm_has_only_apart_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    refusal = why_not_exported(MimRefinerConfig(**fields), "timm")
    assert refusal is not None
    assert re.search(message, refusal)


def test_mixed_frequencies_start_as_timms() -> None:
    """Their lengths; the angle of each head is drawn."""
    model = MimRefinerModel(
        MimRefinerConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            position_encoding="rope",
            rope_places="index_mixed",
        )
    )
    ours = model.layers[0].attention.rope.frequencies
    theirs = init_random_2d_freqs(16, 1, 2)[:, 0]
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours.norm(dim=0), theirs.norm(dim=0))
    # the second half is at right angles to the first
    first, second = ours.chunk(2, dim=-1)
    torch.testing.assert_close((first * second).sum(dim=0), torch.zeros(2, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_places": "index_axial"}, "rope_places='index_axial' needs a rope_theta"),
        ({"rope_places": "index_mixed"}, "rope_places='index_mixed' needs position_encoding="),
        (
            {"position_encoding": "rope", "rope_places": "index_mixed", "rope_theta": 10.0},
            "and rope_theta=None: its frequencies are stored",
        ),
        (
            {"position_encoding": "rope", "rope_places": "index_mixed", "rope_grid": [2, 2]},
            r"rope_grid=\[2, 2\] needs rope_places='index' or 'index_axial'",
        ),
        (
            {"position_encoding": "rope", "rope_places": "index_mixed", "predictor_layers": 1},
            "predictor_layers=1 needs .* rope_theta=None with rope_places='centre'",
        ),
        ({"rope_places": "axial"}, "rope_places"),
        ({"rope_offset": 1.0}, "rope_offset=1.0 needs rope_places='index' or 'index_axial'"),
        ({"rope_offset": -1}, "rope_offset=-1 must be a number from 0.0"),
        ({"pooling_heads": 2}, "pooling_heads=2 needs a pooling_head"),
        ({"pooling_head": "attention", "pooling_heads": 7}, "must divide hidden_size=768"),
        (
            {"pooling_head": "attention", "pooling_intermediate_size": 8},
            "pooling_intermediate_size=8 needs a pooling_head with an MLP, and pooling_head=",
        ),
        ({"pooling_intermediate_size": 0}, "pooling_intermediate_size=0 must be a whole number"),
        ({"query_key_norm": "both"}, "query_key_norm"),
        ({"mlp_norm": 1}, "mlp_norm"),
        ({"attention_norm": "yes"}, "attention_norm"),
    ],
)
def test_settings_that_contradict_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MimRefinerConfig(**fields)


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
            {"attn_layer": "diff"},
            r"10 tensors have no place in a bare ViT.*: .*blocks\.0\.attn\.lambda_q1",
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


def test_a_model_without_its_pooling_weights_is_written_and_read(tmp_path: Path) -> None:
    """Heads and width of what pools go with it."""
    architecture, settings = MODELS["eva-pe-core-without-cls"]
    encoder = load_encoder(tiny(architecture, **settings))
    assert encoder.config.pooling_heads == 8 and encoder.config.pooling_intermediate_size == 192
    encoder.config.pooling = "mean"
    encoder.drop_predictor()
    save_model_folder(tmp_path, encoder, encoder.image_processor)
    assert load_encoder(tmp_path).config.pooling_head == "none"


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    """Of class `Eva` by the settings that are not known here."""
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    unknown = {name: f"timm's '{name}', which timm .* does not know" for name in UNKNOWN}
    for architecture, message in {**REFUSED, **unknown}.items():
        (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture}))
        with pytest.raises(CheckpointError, match=message):
            load_encoder(tmp_path)
    for pool in ("max", "avgmax"):
        with pytest.raises(CheckpointError, match=f"has global_pool='{pool}'; allowed: token"):
            load_encoder(tiny(VIT, global_pool=pool))
    for arguments in ({"pretrained": True}, {"no_such_setting": 1}, {"act_layer": "relu"}):
        (tmp_path / "config.json").write_text(
            json.dumps({"architecture": VIT, "model_args": arguments})
        )
        with pytest.raises(
            CheckpointError,
            match=r"cannot be built as it says: |has the activation ReLU; allowed: QuickGELU",
        ):
            load_encoder(tmp_path)
