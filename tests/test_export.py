"""Twins in timm, transformers' own classes and ONNX.

Loaded by those libraries alone, they compute what the encoder computes.
"""

import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from random_weights import randomise
from small_checkpoints import TINY
from timm.data import create_transform, resolve_model_data_config
from transformers import AutoImageProcessor, AutoModel

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel, load_encoder
from mim_refiner_hf.cli import main
from mim_refiner_hf.publishing import export_native, export_onnx, export_timm, save_model_folder
from mim_refiner_hf.publishing.export import ExportError, export
from mim_refiner_hf.publishing.sentence_files import SENTENCE_FILES

BEIT: dict[str, Any] = {"position_encoding": "relative", "bias": "no_key", "layer_scale_init": 0.1}
KINDS: dict[str, dict[str, Any]] = {
    "mae": {},
    "transformers-eps": {"layer_norm_eps": 1e-12},
    "crossmae": {"final_norm": False},
    "beit": BEIT,
    "conmim": {**BEIT, "position_encoding": "shared_relative"},
    "beit-absolute": {
        **BEIT,
        "position_encoding": "absolute+relative",
        "bias": "all",
        "layer_scale_init": None,
    },
    "data2vec-vision": {**BEIT, "final_norm": False},
    "beit-rectangle": {**BEIT, "image_size": [16, 32]},
    "layer-scale": {"layer_scale_init": 0.1, "bias": "none"},
    "registers": {"num_register_tokens": 2, "layer_scale_init": 0.1},
    "mean": {"num_register_tokens": 1, "pooling": "mean", "layer_scale_init": 0.0},
    "no-cls": {"use_cls_token": False, "image_size": [16, 32], "num_channels": 1},
    "odd-mlp": {"hidden_size": 56, "intermediate_size": 244},  # int(56 * (244 / 56)) is 243
    "data2vec2": {"norm_placement": "post", "embedding_norm": True, "final_norm": False},
}
CAPI: dict[str, Any] = {
    "position_encoding": "rope",
    "norm_type": "rmsnorm",
    "bias": "none",
    "final_norm_affine": False,
    "use_cls_token": False,
    "num_register_tokens": 4,
    "predictor_layers": 1,
    "pooling": "global_repr",
}
ERASED: dict[str, Any] = {"erased_directions": 2, "erased": ["camera"]}
EVERYTHING_ELSE = {
    **KINDS["conmim"],
    **KINDS["data2vec2"],
    **ERASED,
    "num_register_tokens": 2,
    "image_size": [16, 32],
    "num_channels": 1,
}
# transformers' own class for each kind that has one
CLASSES = {
    "mae": "ViTModel",
    "transformers-eps": "ViTModel",
    "odd-mlp": "ViTModel",
    "crossmae": "Data2VecVisionModel",
    "data2vec-vision": "Data2VecVisionModel",
    "beit": "BeitModel",
    "conmim": "BeitModel",
    "beit-absolute": "BeitModel",
    "layer-scale": "BeitModel",
}
TIMM = [kind for kind in KINDS if kind not in ("data2vec2", "data2vec-vision")]
TOLERANCE = {"atol": 1e-5, "rtol": 0}


def processor_for(config: MimRefinerConfig, shortest_edge: int) -> MimRefinerImageProcessor:
    channels = config.num_channels
    return MimRefinerImageProcessor(
        size={"shortest_edge": shortest_edge},
        crop_size=dict(zip(("height", "width"), config.image_hw, strict=True)),
        image_mean=[0.4] * channels,
        image_std=[0.2] * channels,
        do_convert_rgb=channels == 3,
    )


def saved(folder: Path, shortest_edge: int = 37, **settings: Any) -> MimRefinerModel:
    """A tiny encoder with random values in every tensor, saved as a model folder."""
    encoder = randomise(MimRefinerModel(MimRefinerConfig(**{**TINY, **settings})))
    save_model_folder(folder, encoder, processor_for(encoder.config, shortest_edge))
    return encoder


def images(encoder: MimRefinerModel, batch: int) -> torch.Tensor:
    return torch.randn(batch, encoder.config.num_channels, *encoder.config.image_hw)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_equal(first: MimRefinerModel, second: MimRefinerModel) -> None:
    """The same weights, bit for bit, and the same configuration."""
    assert {name: weight.shape for name, weight in first.state_dict().items()} == {
        name: weight.shape for name, weight in second.state_dict().items()
    }
    assert all(
        torch.equal(weight, second.state_dict()[name])
        for name, weight in first.state_dict().items()
    )
    ours, theirs = (encoder.config.to_diff_dict() for encoder in (first, second))
    different = {name for name in ours | theirs if ours.get(name) != theirs.get(name)}
    # a start value is no property of trained weights, nor is where they came from; tables of models
    # with registers are resized as timm does
    assert different <= {
        "architectures",
        "dtype",
        "layer_scale_init",
        "position_resampling",
        "source_model_type",
    }


# --- timm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TIMM)
def test_timm_computes_the_same(tmp_path: Path, kind: str) -> None:
    encoder = saved(tmp_path / "model", **KINDS[kind])
    differences = export(tmp_path / "model", tmp_path / "timm", "timm")
    assert set(differences) == {"tokens", "features"}
    assert files(tmp_path) == {"model", "timm"}
    assert files(tmp_path / "timm") == {"README.md", "config.json", "model.safetensors"}
    config = json.loads((tmp_path / "timm/config.json").read_text())
    weights = str(tmp_path / "timm/model.safetensors")
    pixels = images(encoder, 2)
    for twin in (
        timm.create_model(config["architecture"], checkpoint_path=weights, **config["model_args"]),
        timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True),
    ):
        twin.eval()
        # timm's epsilon is always 1e-6
        tolerance = {"atol": 1e-4, "rtol": 0} if kind == "transformers-eps" else TOLERANCE
        with torch.no_grad():
            expected = encoder(pixels)
            torch.testing.assert_close(
                twin.forward_features(pixels), expected.last_hidden_state, **tolerance
            )
            torch.testing.assert_close(twin(pixels), expected.pooler_output, **tolerance)


@pytest.mark.parametrize(
    "kind", ["mae", "crossmae", "beit", "conmim", "registers", "mean", "odd-mlp"]
)
def test_weights_survive_the_way_to_timm_and_back(tmp_path: Path, kind: str) -> None:
    encoder = saved(tmp_path / "model", **KINDS[kind])
    export(tmp_path / "model", tmp_path / "timm", "timm")
    returned = load_encoder(tmp_path / "timm")
    assert_equal(returned, encoder)
    assert returned.image_processor.to_dict() == processor_for(encoder.config, 37).to_dict()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vit_large_patch16_224", (1024, 24, 16, 16)),
        ("vit_huge_patch14_224", (1280, 32, 16, 14)),
        ("beit_large_patch16_224", (1024, 24, 16, 16)),
    ],
)
def test_published_shapes_have_timms_own_names(name: str, shape: tuple[int, int, int, int]) -> None:
    """timm's model of that name, built without any arguments of ours, has exactly our tensors."""
    width, depth, heads, patch = shape
    style = BEIT if name.startswith("beit") else {}
    config = MimRefinerConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        patch_size=patch,
        **style,
    )
    assert export_timm.timm_architecture(config) == name
    with torch.device("meta"):
        ours = export_timm.timm_state_dict(MimRefinerModel(config))
        theirs = timm.create_model(name, num_classes=0, global_pool="token").state_dict()
    assert {key: tensor.shape for key, tensor in ours.items()} == {
        key: tensor.shape for key, tensor in theirs.items()
    }


# 32 / (32 / 93), rounded down, is 92
@pytest.mark.parametrize("shortest_edge", [32, 37, 93])
def test_timm_prepares_images_as_we_do(tmp_path: Path, shortest_edge: int) -> None:
    assert math.floor(32 / (32 / 93)) == 92
    saved(tmp_path / "model", shortest_edge)
    export(tmp_path / "model", tmp_path / "timm", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    resize, crop, _, normalise = create_transform(
        **resolve_model_data_config(model), is_training=False
    ).transforms
    assert resize.size == shortest_edge
    assert resize.interpolation.value == "bicubic"
    assert tuple(crop.size) == (32, 32)
    assert normalise.mean.tolist() == pytest.approx([0.4] * 3)
    assert normalise.std.tolist() == pytest.approx([0.2] * 3)


# --- transformers' own classes --------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_native_classes_compute_the_same(tmp_path: Path, kind: str) -> None:
    encoder = saved(tmp_path / "model", **KINDS[kind])
    differences = export(tmp_path / "model", tmp_path / "vit", "vit")
    expected_files = {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    if "features" in differences:
        expected_files |= set(SENTENCE_FILES)
    assert files(tmp_path / "vit") == expected_files
    native, info = AutoModel.from_pretrained(tmp_path / "vit", output_loading_info=True)
    assert type(native).__name__ == CLASSES[kind]
    # also the pooler: nothing is drawn at random
    assert not any(info.values())
    pixels = images(encoder, 2)
    with torch.no_grad():
        expected, found = encoder(pixels), native(pixels)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, **TOLERANCE)
    if "features" in differences:
        torch.testing.assert_close(found.pooler_output, expected.pooler_output, **TOLERANCE)
    else:
        assert CLASSES[kind] == "Data2VecVisionModel"
        assert found.pooler_output is None


@pytest.mark.parametrize("kind", ["mae", "transformers-eps", "beit", "conmim", "data2vec-vision"])
def test_weights_survive_the_way_to_native_classes_and_back(tmp_path: Path, kind: str) -> None:
    encoder = saved(tmp_path / "model", **KINDS[kind])
    export(tmp_path / "model", tmp_path / "vit", "vit")
    returned = load_encoder(tmp_path / "vit")
    assert_equal(returned, encoder)
    assert returned.image_processor.to_dict() == processor_for(encoder.config, 37).to_dict()


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_the_native_processor_gives_the_same_pixels(tmp_path: Path, backend: str) -> None:
    encoder = saved(tmp_path / "model", shortest_edge=37)
    export(tmp_path / "model", tmp_path / "vit", "vit")
    ours, native = (
        AutoImageProcessor.from_pretrained(tmp_path / name, backend=backend)
        for name in ("model", "vit")
    )
    assert (
        type(native).__name__
        == {"torchvision": "CLIPImageProcessor", "pil": "CLIPImageProcessorPil"}[backend]
    )
    for size, mode in [((60, 45), "RGB"), ((33, 70), "L"), ((20, 20), "RGBA")]:
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
        image = Image.fromarray(noise, "RGBA").convert(mode)
        found, expected = (
            processor(image, return_tensors="pt").pixel_values for processor in (native, ours)
        )
        assert expected.shape == (1, 3, *encoder.config.image_hw)
        assert torch.equal(found, expected)


WITHOUT_PACKAGE = """
import sys
sys.modules["mim_refiner_hf"] = None  # any import of the package fails
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, pipeline
expected = torch.load(sys.argv[2], weights_only=True)
for kind, features in expected.items():
    folder, image = f"{sys.argv[1]}/{kind}", Image.open(f"{sys.argv[1]}/image.png")
    model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        found = model(**processor(image, return_tensors="pt")).pooler_output
    assert (found - features).abs().max() < 1e-5, kind
    extract = pipeline("image-feature-extraction", model=folder)
    piped = extract(image, pool=True, return_tensors=True)
    assert (piped - features).abs().max() < 1e-5, kind
    print("loaded", type(model).__name__)
"""


@pytest.mark.slow
def test_the_native_folder_needs_neither_the_package_nor_remote_code(tmp_path: Path) -> None:
    image = Image.effect_mandelbrot((40, 36), (-2, -1.5, 1, 1.5), 60).convert("RGB")
    image.save(tmp_path / "image.png")
    features = {}
    for kind in ("mae", "beit"):
        encoder = saved(tmp_path / f"{kind}-model", **KINDS[kind])
        export(tmp_path / f"{kind}-model", tmp_path / kind, "vit")
        with torch.no_grad():
            pixels = processor_for(encoder.config, 37)(image, return_tensors="pt").pixel_values
            features[kind] = encoder(pixels).pooler_output
    torch.save(features, tmp_path / "features.pt")
    result = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_PACKAGE, str(tmp_path), str(tmp_path / "features.pt")],
        cwd=tmp_path,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "home"),
            "OMP_NUM_THREADS": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["loaded ViTModel", "loaded BeitModel"]


# --- ONNX -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("settings", [CAPI, EVERYTHING_ELSE], ids=["capi", "everything-else"])
def test_onnx_computes_the_same_at_any_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    if split := settings is CAPI:  # as if it were beyond 2 GB
        monkeypatch.setattr(export_onnx, "ONE_FILE", 0)
    encoder = saved(tmp_path / "model", **{**settings, "num_hidden_layers": 1})
    export(tmp_path / "model", tmp_path / "onnx", "onnx")
    weights = ["model.onnx", "model.onnx.data"][: 1 + split]
    settings_and_card = {"config.json", "preprocessor_config.json", "README.md"}
    assert files(tmp_path / "onnx") == {*settings_and_card, "onnx"}
    assert files(tmp_path / "onnx/onnx") == set(weights)
    session = onnxruntime.InferenceSession(tmp_path / "onnx/onnx/model.onnx")
    assert [(entry.name, entry.shape) for entry in session.get_inputs()] == [
        ("pixel_values", ["batch", encoder.config.num_channels, *encoder.config.image_hw])
    ]
    assert [entry.name for entry in session.get_outputs()] == ["last_hidden_state", "pooler_output"]
    for batch in (1, 3, 4):
        pixels = images(encoder, batch)
        tokens, features = session.run(None, {"pixel_values": pixels.numpy()})
        with torch.no_grad():
            expected = encoder(pixels)
        np.testing.assert_allclose(tokens, expected.last_hidden_state, atol=1e-4, rtol=0)
        np.testing.assert_allclose(features, expected.pooler_output, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("split", [False, True], ids=["one-file", "split"])
@pytest.mark.parametrize("settings", [{}, CAPI], ids=["mae", "capi"])
def test_onnx_in_lower_precision_keeps_the_direction(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    split: bool,
    precision: str,
) -> None:
    if split:  # as if it were beyond 2 GB
        monkeypatch.setattr(export_onnx, "ONE_FILE", 0)
    encoder = saved(tmp_path / "model", **settings)
    differences = export(tmp_path / "model", tmp_path / "web", "onnx", **{precision: True})
    smaller = {"fp16": "model_fp16.onnx", "int8": "model_quantized.onnx"}[precision]
    ends = ["", ".data"][: 1 + split]
    names = ("model.onnx", smaller)
    assert files(tmp_path / "web/onnx") == {name + end for name in names for end in ends}
    sizes = [
        sum((tmp_path / f"web/onnx/{name}{end}").stat().st_size for end in ends) for name in names
    ]
    assert sizes[1] < sizes[0]
    session = onnxruntime.InferenceSession(tmp_path / "web/onnx" / smaller)
    assert {entry.type for entry in session.get_inputs()} == {"tensor(float)"}
    # those that it compared with
    shape = (4, encoder.config.num_channels, *encoder.config.image_hw)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    _, found = session.run(None, {"pixel_values": pixels.numpy()})
    with torch.no_grad():
        expected = encoder(pixels).pooler_output
    cosine = torch.cosine_similarity(torch.from_numpy(found), expected).min().item()
    assert cosine >= 0.999 and differences[precision] == pytest.approx(cosine, abs=1e-6)


def test_the_command_prints_the_cosine_that_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "model")
    words = ["export", str(tmp_path / "model"), str(tmp_path / "web"), "--to", "onnx"]
    assert main([*words, "--fp16", "--int8"]) == 0
    printed = capsys.readouterr().out
    for precision in ("fp16", "int8"):
        line = rf"In {precision}, its features .* have a cosine of at least (\d\.\d{{5}}) with"
        found = re.findall(line, printed)
        assert len(found) == 1 and 0.999 <= float(found[0]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precision_that_turns_vectors_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    saved(tmp_path / "model")
    other = randomise(MimRefinerModel(MimRefinerConfig(**TINY)))

    def turned(factor: float, folder: Path, precision: str, pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return other(pixels).pooler_output * factor

    for factor, cosine in ((1.0, r"-?0\.\d{5}"), (float("nan"), "nan")):
        monkeypatch.setattr(export_onnx, "write_smaller", partial(turned, factor))
        says = f"in {precision} the pooled vector has a cosine of ({cosine}) with PyTorch's"
        with pytest.raises(ExportError, match=says):
            export(tmp_path / "model", tmp_path / "web", "onnx", **{precision: True})
    with pytest.raises(ValueError, match=rf"{precision}.* is for .*onnx"):
        export(tmp_path / "model", tmp_path / "web", "timm", **{precision: True})
    assert files(tmp_path) == {"model"}


def test_onnx_without_its_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "model")
    monkeypatch.setattr(export_onnx, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError,
        match=r'onnx and onnxruntime and onnxscript missing; pip install "mim_refiner_hf\[onnx\]"',
    ):
        export(tmp_path / "model", tmp_path / "onnx", "onnx")
    assert files(tmp_path) == {"model"}


# --- refusals, failures, the command --------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "settings", "message"),
    [
        (
            "timm",
            KINDS["data2vec2"],
            r"timm's VisionTransformer has no norm of the sum.*'post'.*no bias of the patches "
            r"before a norm",
        ),
        ("timm", {"features": "last_block"}, "no pooling before the final norm"),
        (
            "timm",
            CAPI,
            "no rotary positions of stored.*no RMSNorm but before branches.*"
            "no pooling but of CLS, patches or attention",
        ),
        ("timm", {"hidden_act": "relu"}, "no activation but gelu, gelu_pytorch_tanh, quick_gelu"),
        ("timm", {**BEIT, "hidden_act": "silu"}, "timm's Beit.*no activation but GELU"),
        ("timm", {**BEIT, "pooled_norm": True}, "timm's Beit.*no second norm"),
        ("timm", {"gated_mlp": True}, "timm's Eva.*no activation but silu with gated_mlp=True"),
        (
            "timm",
            {"position_encoding": "absolute+rope", "rope_theta": 10, "rope_places": "index"},
            "timm's Eva.*no rotary positions as birder's",
        ),
        ("vit", {"mlp_norm": True}, "no norm inside the MLP"),
        ("vit", ERASED, "no eraser behind the last block.*--to onnx takes every encoder"),
        ("timm", {**BEIT, **ERASED}, "no eraser behind the last block"),
        ("timm", {**ERASED, "gated_mlp": True}, "timm's Eva.*no eraser behind the last block"),
        ("native", ERASED, r"no erased_directions=2 \(only 0\)"),
        ("vit", {"attention_norm": True}, "no norm before the projection of the attention"),
        ("native", {"mlp_norm": True}, r"no mlp_norm=True \(only False\)"),
        ("timm", KINDS["data2vec-vision"], "timm's Beit.*no way to leave out the final norm"),
        (
            "timm",
            {**BEIT, "use_cls_token": False},
            "timm's Beit.*no way to leave out the CLS token",
        ),
        ("timm", {**BEIT, "num_register_tokens": 2}, "timm's Beit.*no registers"),
        ("vit", KINDS["data2vec2"], "has no norm of the sum"),
        (
            "vit",
            {**KINDS["mean"], "layer_scale_init": None},
            r"no mean of the normalised patches.*no registers \(num_register_tokens=1\)",
        ),
        ("vit", KINDS["no-cls"], "transformers' ViTModel has no way to leave out the CLS token"),
        ("vit", KINDS["beit-rectangle"], "transformers' BeitModel has no grid but a square one"),
    ],
)
def test_what_a_format_lacks_is_refused_by_name(
    tmp_path: Path, to: str, settings: dict[str, Any], message: str
) -> None:
    saved(tmp_path / "model", **settings)
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "model", tmp_path / "twin", to)
    assert files(tmp_path) == {"model"}


@pytest.mark.parametrize(("format_", "to"), [(export_timm, "timm"), (export_native, "vit")])
def test_a_twin_that_differs_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: Any, to: str
) -> None:
    """One wrong tensor: an error, and the earlier export is still there."""
    saved(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "twin", to)
    before = {path.name: path.read_bytes() for path in (tmp_path / "twin").iterdir()}
    rename = format_.rename
    wrong = {"timm": "blocks.1.mlp.fc2.bias", "vit": "encoder.layer.1.output.dense.bias"}[to]

    def damaged(*args: Any) -> dict[str, torch.Tensor]:
        state = rename(*args)
        state[wrong] = state[wrong].flip(0)
        return state

    monkeypatch.setattr(format_, "rename", damaged)
    with pytest.raises(ExportError, match="tokens differ by"):
        export(tmp_path / "model", tmp_path / "twin", to)
    assert files(tmp_path) == {"model", "twin"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "twin").iterdir()} == before


def test_the_destination_is_neither_the_source_nor_someone_elses_folder(tmp_path: Path) -> None:
    saved(tmp_path / "photos/model")
    (tmp_path / "photos/photo.jpg").write_bytes(b"mine")
    for destination, message in (
        (tmp_path / "photos/model", "would overwrite the source"),
        (tmp_path / "photos", "not a model"),
    ):
        with pytest.raises(ValueError, match=message):
            export(tmp_path / "photos/model", destination, "timm")
    # now it looks like a model, and still holds the source
    (tmp_path / "photos/config.json").write_text("{}")
    with pytest.raises(ValueError, match="would overwrite the source"):
        export(tmp_path / "photos/model", tmp_path / "photos", "timm")
    with pytest.raises(
        ValueError, match="to='tf' is not a format; allowed: native, timm, vit, onnx"
    ):
        export(tmp_path / "photos/model", tmp_path / "tf", "tf")
    assert files(tmp_path) == {"photos"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "model", dtype="bfloat16")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "timm"), "--to", "timm"]) == 0
    assert "loaded back as timm, it differs from" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "vit"), "--to", "vit"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert files(tmp_path) == {"model", "timm"}
