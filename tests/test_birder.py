"""birder's CAPI models: tokens, pooled vectors, classes and preprocessing are those of birder.

All sizes come from a case's config.json. birder has its registers before CLS, we after.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import GOLDENS, facts, tensors
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms import v2 as transforms
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from mim_refiner_hf import load_classifier, refine
from mim_refiner_hf.conversion import CheckpointError, load_encoder, read, zoo
from mim_refiner_hf.conversion.zoo import ZOO
from mim_refiner_hf.model.configuration_mim_refiner import ConfigurationError, MimRefinerConfig
from mim_refiner_hf.model.modeling_mim_refiner import MimRefinerModel
from mim_refiner_hf.publishing import export_native, export_timm, save_model_folder

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
CASES = ("birder-b14", "birder-b14-nps-avg", "birder-so150m-avg", "birder-so150m-ap-rotnet")
CLASSIFIERS = ("birder-b14", "birder-so150m-ap-rotnet")
# prefix of the outputs, name of the images
SIZES = (("", "pixel_values"), ("lowres.", "pixel_values_lowres"), ("rect.", "pixel_values_rect"))


def files_of(case: str) -> list[Path]:
    """The files of a case that hold the weights without overridden settings."""
    return [GOLDENS / case / name for name in facts(case)["files"] if "pt-grid" not in name]


def first_file(case: str) -> Path:
    return files_of(case)[0]


def load(case: str, path: Path | None = None, **arguments: Any) -> MimRefinerModel:
    heads = facts(case)["model_config"]["num_heads"]
    return load_encoder(path or first_file(case), num_heads=heads, **arguments)


def as_theirs(encoder: MimRefinerModel, tokens: Tensor) -> Tensor:
    """Our tokens (B, T, D), CLS before the registers, in birder's order."""
    if not encoder.config.use_cls_token:
        return tokens
    after = encoder.config.num_prefix_tokens
    return torch.cat([tokens[:, 1:after], tokens[:, :1], tokens[:, after:]], dim=1)


def outputs_of(encoder: MimRefinerModel, pixels: Tensor) -> dict[str, Tensor]:
    """What the goldens hold of these images."""
    with torch.no_grad():
        output = encoder(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    states = [as_theirs(encoder, state) for state in output.hidden_states]
    return {
        "embeddings": states[0],
        "blocks": torch.stack(states[1:]),
        "tokens_prenorm": states[-1],
        "tokens_normed": as_theirs(encoder, output.last_hidden_state),
        "pooled": output.pooler_output,
    }


def assert_equals(got: dict[str, Tensor], expected: dict[str, Tensor], prefix: str) -> None:
    compared = 0
    for name, tensor in got.items():
        # some sizes are stored without every block
        if f"{prefix}{name}" not in expected:
            continue
        compared += 1
        theirs = expected[f"{prefix}{name}"]
        torch.testing.assert_close(tensor, theirs, **TOLERANCE, msg=f"{prefix}{name}")
    assert compared >= 3


# --- birder's own outputs -------------------------------------------------------------------------


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("case", CASES)
def test_every_file_gives_birders_tokens_at_every_size(case: str) -> None:
    inputs, expected = tensors(case)
    stated = facts(case)["model_config"]
    for path in files_of(case):
        encoder = load(case, path)
        report = encoder.load_report
        assert report.placed == report.total
        has_classes = facts(case)["num_classes"] and "classifier" in "".join(names_in(path))
        assert set(report.dropped) == ({"classifier"} if has_classes else set())

        config = encoder.config
        assert config.num_register_tokens == stated["num_reg_tokens"]
        assert config.use_cls_token == stated.get("class_token", True)
        assert config.gated_mlp == (stated.get("mlp_layer_type") == "SwiGLU_FFN")
        assert (config.norm_type == "rmsnorm") == (stated.get("norm_layer_type") == "RMSNorm")
        for prefix, images in SIZES:
            assert_equals(outputs_of(encoder, inputs[images]), expected, prefix)


def names_in(path: Path) -> list[str]:
    if path.suffix == ".safetensors":
        return list(load_file(path))
    return list(torch.load(path, weights_only=True)["state"])


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("case", CASES)
def test_indices_that_are_stretched_to_the_grid_of_training(case: str) -> None:
    """`pt_grid_size`: out of the file where it states it, else set in the configuration."""
    inputs, expected = tensors(case)
    stating = [name for name in facts(case)["files"] if "pt-grid" in name]
    encoders = [load(case, GOLDENS / case / name) for name in stating]
    if not stating:
        encoder = load(case)
        encoder.config.rope_grid = list(encoder.config.grid)
        encoders.append(encoder)
    for encoder in encoders:
        assert list(encoder.config.rope_grid) == list(encoder.config.grid)
        outputs = outputs_of(encoder, inputs["pixel_values_rect"])
        assert_equals(outputs, expected, "pt_grid_rect.")
        assert_equals(outputs_of(encoder, inputs["pixel_values"]), expected, "")


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("case", CASES)
def test_birders_other_way_of_resizing_is_a_setting(case: str) -> None:
    """`new_size=` there resizes the table with antialiasing."""
    inputs, expected = tensors(case)
    encoder = load(case)
    encoder.config.position_resampling = "bicubic_antialias"
    assert_equals(outputs_of(encoder, inputs["pixel_values_rect"]), expected, "adjusted_rect.")


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("case", CASES)
def test_a_saved_folder_is_read_again(case: str, tmp_path: Path) -> None:
    encoder = load(case)
    save_model_folder(tmp_path, encoder, encoder.image_processor)
    pixels = tensors(case)[0]["pixel_values_rect"]
    expected = outputs_of(encoder, pixels)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))
    for again in (load_encoder(tmp_path), AutoModel.from_pretrained(tmp_path)):
        got = outputs_of(again, pixels)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    processors = (
        load_encoder(tmp_path).image_processor,
        AutoImageProcessor.from_pretrained(tmp_path),
    )
    theirs = encoder.image_processor(picture, return_tensors="pt").pixel_values
    for processor in processors:
        assert torch.equal(processor(picture, return_tensors="pt").pixel_values, theirs)


# --- preprocessing --------------------------------------------------------------------------------


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("case", CASES)
def test_images_are_squashed_and_normalised_as_the_file_says(case: str, tmp_path: Path) -> None:
    contents = torch.load(first_file(case), weights_only=True)
    contents["rgb_stats"] = {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
    changed = tmp_path / first_file(case).name
    torch.save(contents, changed)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 130, 3), np.uint8)

    for path in (first_file(case), changed):
        stats = torch.load(path, weights_only=True)["rgb_stats"]
        _, _, *size = torch.load(path, weights_only=True)["signature"]["inputs"][0]["data_shape"]
        theirs = transforms.Compose(
            [
                transforms.ToImage(),
                transforms.Resize(size, transforms.InterpolationMode.BICUBIC, antialias=True),
                transforms.ToDtype(torch.float32, scale=True),
                transforms.Normalize(stats["mean"], stats["std"]),
            ]
        )(Image.fromarray(pixels))
        processor = load(case, path).image_processor
        ours = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# --- classifiers ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_a_classifier_keeps_its_classes(case: str, tmp_path: Path) -> None:
    inputs, expected = tensors(case)
    heads = facts(case)["model_config"]["num_heads"]
    numbers = torch.load(first_file(case), weights_only=True)["class_to_idx"]
    for path in files_of(case):
        if not any(name.startswith("classifier.") for name in names_in(path)):
            with pytest.raises(CheckpointError, match=r"no classifier that is known here.*birder"):
                load_classifier(path, num_heads=heads)
            continue
        classifier = load_classifier(path, num_heads=heads)
        assert classifier.config.label2id == numbers
        assert classifier.num_labels == facts(case)["num_classes"]
        classifier.save_pretrained(tmp_path / path.suffix)
        again = AutoModelForImageClassification.from_pretrained(tmp_path / path.suffix)
        assert again.config.id2label == {number: name for name, number in numbers.items()}
        for prefix, images in SIZES:
            for model in (classifier, again):
                with torch.no_grad():
                    logits = model(inputs[images], interpolate_pos_encoding=True).logits
                theirs = expected[f"{prefix}logits"]
                torch.testing.assert_close(logits, theirs, **TOLERANCE, msg=prefix)


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_to_idx": {}}, "class_to_idx is {}; it must give every class a number"),
        ({"class_to_idx": {"a": 0, "b": 2}}, "from 0 on"),
        ({"class_to_idx": {"only": 0}}, r"classifier.weight is .*but 1 classes need"),
        ({"class_to_idx": 3}, "class_to_idx is 3"),
    ],
)
def test_classes_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    contents = torch.load(first_file("birder-b14"), weights_only=True)
    path = tmp_path / first_file("birder-b14").name
    torch.save({**contents, **change}, path)
    heads = facts("birder-b14")["model_config"]["num_heads"]
    with pytest.raises(CheckpointError, match=message):
        load_classifier(path, num_heads=heads)
    assert load("birder-b14", path).load_report.dropped["classifier"]


# --- refinement and export ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("case", CASES)
def test_it_is_refined_from_start_to_verdict(case: str, tmp_path: Path) -> None:
    start = tmp_path / "start"
    encoder = load(case)
    save_model_folder(start, encoder, encoder.image_processor)
    noise = np.random.default_rng(0).integers(0, 256, (16, 48, 32, 3), dtype=np.uint8)
    result = refine(
        [Image.fromarray(picture) for picture in noise],
        model=str(start),
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        num_workers=0,
        report_to="none",
    )
    refined = result.refined
    assert refined.config.pooling == encoder.config.pooling
    before = encoder.state_dict()
    moved = [
        key for key, tensor in refined.state_dict().items() if not torch.equal(tensor, before[key])
    ]
    last = encoder.config.num_hidden_layers - 1
    assert any(key.startswith(f"layers.{last}.") for key in moved)
    shipped = load_encoder(tmp_path / "out" / "model")
    assert shipped.config.rope_places == "index"
    assert shipped.image_processor.image_mean == encoder.image_processor.image_mean


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("case", CASES)
def test_it_exports_whole_and_other_formats_are_refused(case: str) -> None:
    encoder = load(case)
    pixels = tensors(case)[0]["pixel_values"]
    exported = torch.export.export(encoder, (pixels,)).module()
    with torch.no_grad():
        vectors = encoder(pixels).pooler_output
        torch.testing.assert_close(exported(pixels).pooler_output, vectors)
    for refusal in (export_timm.refusal, export_native.refusal):
        assert "rotary positions" in str(refusal(encoder.config))


# --- names of the zoo -----------------------------------------------------------------------------


def test_the_names_of_the_zoo_are_published_files() -> None:
    entries = [entry for entry in ZOO.values() if entry.family == "birder"]
    assert len(entries) == 9
    without = [entry.name for entry in entries if not entry.sha256]
    assert without == ["rope_vit_reg8_b14_nps_avg_capi-dino-bio"]
    for entry in entries:
        assert entry.filename == f"{entry.name}.pt"
        assert entry.repo.startswith("birder-project/rope_vit_")
        assert entry.licence == "apache-2.0"
        assert len(entry.sha256) in (0, 64)


@pytest.mark.usefixtures("goldens")
def test_a_name_of_the_zoo_is_a_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under another file name, as a cache may have it."""
    blob = tmp_path / "blob.pt"
    blob.write_bytes(first_file("birder-b14").read_bytes())
    monkeypatch.setattr(read, "fetch", lambda entry: blob)
    heads = facts("birder-b14")["model_config"]["num_heads"]
    encoder = load_encoder("rope_vit_reg4_b14_capi-places365", num_heads=heads)
    assert encoder.load_report.family == "birder"
    assert encoder.licence.identifier == "apache-2.0"


def test_a_file_without_the_published_sha256_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "other.pt"
    other.write_bytes(b"not that")
    monkeypatch.setattr(zoo, "hf_hub_download", lambda *arguments, **more: str(other))
    with pytest.raises(
        CheckpointError, match=r"has the sha256 \w{64}, but its authors publish 1753"
    ):
        zoo.fetch("rope_vit_reg4_b14_capi", tmp_path)


# --- bad input ------------------------------------------------------------------------------------


def without(mapping: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in names}


def broken(contents: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Files of birder with something wrong, and what is said of it."""
    state = contents["state"]
    shape = {"inputs": [{"data_shape": [0, 3, 0, 0]}]}
    larger = {"inputs": [{"data_shape": [0, 3, 4096, 4096]}]}
    yield without(contents, "signature"), "without a signature that states the shape of its images"
    yield {**contents, "signature": {"inputs": []}}, "without a signature that states the shape"
    yield {**contents, "signature": shape}, r"\[0, 3, 0, 0\], expected inputs"
    yield {**contents, "signature": larger}, "pos_embedding has .* rows, but its signature makes"
    yield without(contents, "rgb_stats"), r"rgb_stats None do not state mean by 3 numbers"
    yield {**contents, "rgb_stats": {"mean": [1.0] * 3}}, "do not state std by 3 numbers"
    stats = {"mean": [0.5] * 3, "std": [0.0] * 3}
    yield {**contents, "rgb_stats": stats}, "rgb_stats say image_std"
    yield {**contents, "config": {"rope_rot_type": "interleaved"}}, "overrides 'rope_rot_type'"
    yield {**contents, "config": {"pt_grid_size": [0, 3]}}, r"rope_grid=\[0, 3\] must be two whole"
    yield {**contents, "config": [1]}, r"config is \[1\], no dictionary"
    yield {**contents, "state": {"stem.weight": torch.zeros(2)}}, "of another network than a RoPE"
    yield {**contents, "state": {}}, "but nothing; give one of its rope_vit"
    lost = without(state, "encoder.block.0.norm1.weight")
    yield {**contents, "state": lost}, "1 of .* birder tensors are missing: layers.0.norm1.weight"
    extra = {**state, "encoder.block.0.attn.q_norm.weight": torch.zeros(2)}
    yield {**contents, "state": extra}, "1 tensors have no place in a RoPE ViT of birder"


@pytest.mark.usefixtures("goldens")
def test_bad_files_are_refused_in_one_line(tmp_path: Path) -> None:
    case = "birder-b14"
    path = tmp_path / first_file(case).name
    contents = torch.load(first_file(case), weights_only=True)
    for bad, message in broken(contents):
        torch.save(bad, path)
        with pytest.raises(CheckpointError, match=message) as caught:
            load(case, path)
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("goldens")
def test_a_network_that_is_not_said_is_asked_for(tmp_path: Path) -> None:
    """Other ViTs of birder have the same tensors, without rotary positions."""
    case = "birder-b14"
    for name in ("vit_reg4_b14_x.pt", "rope_i_vit_b14.pt", "rope_vit_b14_aps_x.pt", "weights.pt"):
        path = tmp_path / name
        path.write_bytes(first_file(case).read_bytes())
        with pytest.raises(CheckpointError, match="if it is one, pass family='birder'"):
            load(case, path)
    assert load(case, path, family="birder").config.rope_places == "index"


@pytest.mark.usefixtures("goldens")
def test_a_header_that_is_no_json(tmp_path: Path) -> None:
    (source,) = [path for path in files_of("birder-b14") if path.suffix == ".safetensors"]
    with safe_open(source, "pt") as file:
        header = dict(file.metadata())
    save_file(load_file(source), tmp_path / source.name, {**header, "signature": "{"})
    with pytest.raises(CheckpointError, match="signature in its header is not valid JSON"):
        load("birder-b14", tmp_path / source.name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_places": "index"}, "rope_places='index' needs a rope_theta"),
        ({"rope_grid": [2, 2]}, r"rope_grid=\[2, 2\] needs rope_places='index'"),
        ({"rope_grid": 3}, "rope_grid=3 must be two whole numbers"),
        ({"rope_grid": [2, 0.5]}, "rope_grid=.* must be two whole numbers"),
        ({"rope_theta": 100.0}, "rope_theta=100.0 needs position_encoding='rope'"),
        ({"position_encoding": "absolute+rope"}, "needs use_cls_token=False"),
    ],
)
def test_contradicting_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MimRefinerConfig(**fields)
