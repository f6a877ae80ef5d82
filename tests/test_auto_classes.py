"""After `import mim_refiner_hf` every Auto class of transformers knows the model, and nothing is
lost on disk.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_weights import randomise
from transformers import (
    AttentionInterface,
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mim_refiner_hf
from mim_refiner_hf.model.configuration_mim_refiner import ConfigurationError, MimRefinerConfig
from mim_refiner_hf.model.image_processing_mim_refiner import (
    MimRefinerImageProcessor,
    MimRefinerImageProcessorPil,
)
from mim_refiner_hf.model.modeling_mim_refiner import (
    MimRefinerBackbone,
    MimRefinerForImageClassification,
    MimRefinerModel,
)

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
VARIANTS = [
    {},
    {"norm_placement": "post", "embedding_norm": True, "final_norm": False},
    {"position_encoding": "absolute+relative", "layer_scale_init": 0.1, "bias": "no_key"},
    {
        "position_encoding": "shared_relative",
        "num_register_tokens": 2,
        "features": "last_block",
        "num_channels": 1,
    },
    {"use_cls_token": False, "bias": "none", "image_size": [16, 32]},
    {
        "position_encoding": "rope",
        "use_cls_token": False,
        "norm_type": "rmsnorm",
        "final_norm_affine": False,
        "num_register_tokens": 4,
        "predictor_layers": 1,
        "pooling": "global_repr",
    },
]


def tiny(model_class: Any, **settings: Any) -> Any:
    """A small model with random values in every parameter."""
    return randomise(model_class(MimRefinerConfig(**{**TINY, **settings})))


def test_the_package_registers_its_classes() -> None:
    assert mim_refiner_hf.__name__ in MimRefinerConfig.__module__
    config = AutoConfig.for_model("mim_refiner", **TINY)
    assert type(config) is MimRefinerConfig
    assert type(AutoModel.from_config(config)) is MimRefinerModel
    assert (
        type(AutoModelForImageClassification.from_config(config))
        is MimRefinerForImageClassification
    )
    assert type(AutoBackbone.from_config(config)) is MimRefinerBackbone


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda settings: "-".join(settings) or "mae")
def test_save_load_save_is_bit_equal(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = tiny(MimRefinerModel, **settings)
    model.save_pretrained(tmp_path / "first")
    for earlier, later in (("first", "second"), ("second", "third"), ("third", "fourth")):
        loaded, info = AutoModel.from_pretrained(tmp_path / earlier, output_loading_info=True)
        assert not any(info.values())
        loaded.save_pretrained(tmp_path / later)
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / later / name).read_bytes() == (
                tmp_path / "first" / name
            ).read_bytes()
    pixels = torch.randn(2, model.config.num_channels, *model.config.image_hw)
    with torch.no_grad():
        assert torch.equal(model(pixels).pooler_output, loaded(pixels).pooler_output)


def test_saved_dtype_is_kept(tmp_path: Path) -> None:
    tiny(MimRefinerModel).bfloat16().save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert AutoModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_dict_and_tuple_outputs() -> None:
    model = tiny(MimRefinerModel)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        by_name, as_tuple = model(pixels), model(pixels, return_dict=False)
    assert list(by_name) == ["last_hidden_state", "pooler_output"]
    assert isinstance(as_tuple, tuple)
    assert all(torch.equal(by_name[index], value) for index, value in enumerate(as_tuple))


# --- classification -------------------------------------------------------------------------------


def test_classification_from_an_encoder_starts_with_a_fresh_classifier(tmp_path: Path) -> None:
    encoder = tiny(MimRefinerModel)
    encoder.save_pretrained(tmp_path)
    model, info = AutoModelForImageClassification.from_pretrained(
        tmp_path, num_labels=5, output_loading_info=True
    )
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    # normal of initializer_range, not whatever was in memory
    assert 0 < model.classifier.weight.std() < 0.05
    assert torch.equal(model.classifier.bias, torch.zeros(5))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.encoder(pixels).pooler_output, encoder(pixels).pooler_output)


def test_missing_encoder_weights_are_initialised(tmp_path: Path) -> None:
    """A token or table missing in the file is drawn afresh, never left as uninitialised memory."""
    settings = {
        "position_encoding": "absolute+shared_relative",
        "layer_scale_init": 0.1,
        "num_register_tokens": 2,
    }
    tiny(MimRefinerModel).save_pretrained(tmp_path)
    model = MimRefinerModel.from_pretrained(tmp_path, **settings)
    fresh = [model.embeddings.register_tokens, model.relative_position_bias.table]
    assert all(0 < weight.std() < 0.05 for weight in fresh)
    assert all(
        torch.equal(layer.layer_scale1.weight, torch.full((32,), 0.1)) for layer in model.layers
    )


def test_classification_loss_and_gradients() -> None:
    model = tiny(MimRefinerForImageClassification, num_labels=5)
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 4, 1])
    output = model(pixels, labels=labels, output_hidden_states=True)
    assert output.logits.shape == (4, 5)
    assert len(output.hidden_states) == 5
    torch.testing.assert_close(
        output.loss, torch.nn.functional.cross_entropy(output.logits, labels)
    )
    torch.testing.assert_close(output.logits, model.classifier(model.encoder(pixels).pooler_output))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert isinstance(model(pixels, labels=labels, return_dict=False), tuple)


# --- backbone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda settings: "-".join(settings) or "mae")
def test_backbone_gives_the_patches_of_the_chosen_blocks(settings: dict[str, Any]) -> None:
    model = tiny(MimRefinerBackbone, out_indices=[1, 3, 4], **settings)
    assert model.out_features == ["stage1", "stage3", "stage4"]
    assert model.channels == [32, 32, 32]
    prefix = model.config.num_prefix_tokens
    pixels = torch.randn(2, model.config.num_channels, 16, 24)
    with torch.no_grad():
        output = model(pixels, interpolate_pos_encoding=True)
        tokens = model.encoder(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    chosen = [tokens.hidden_states[1], tokens.hidden_states[3], tokens.last_hidden_state]
    assert len(output.feature_maps) == 3
    for feature_map, expected in zip(output.feature_maps, chosen, strict=True):
        assert feature_map.shape == (2, 32, 2, 3)
        assert torch.equal(
            feature_map[:, :, 1, 2], expected[:, prefix + 5]
        )  # row 1, column 2 of 2 x 3
        assert torch.equal(feature_map[:, :, 0, 1], expected[:, prefix + 1])


def test_backbone_loads_an_encoder(tmp_path: Path) -> None:
    encoder = tiny(MimRefinerModel)
    encoder.save_pretrained(tmp_path)
    backbone, info = MimRefinerBackbone.from_pretrained(
        tmp_path, out_features=["stage4"], output_loading_info=True
    )
    assert not any(info.values())
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        feature_map = backbone(pixels).feature_maps[0]
        assert torch.equal(feature_map.flatten(2).mT, encoder(pixels).last_hidden_state[:, 1:])


# --- image processor ------------------------------------------------------------------------------


@pytest.fixture
def photo() -> Image.Image:
    """A smooth 60 x 80 RGB image: a gradient and a disc."""
    rows, columns = np.mgrid[:60, :80]
    disc = 120.0 * ((rows - 30) ** 2 + (columns - 40) ** 2 < 400)
    return Image.fromarray(
        np.stack([rows * 2 + disc, columns * 1.5 + disc, rows + columns], axis=-1)
        .clip(0, 255)
        .astype(np.uint8)
    )


def test_processor_backends_agree(tmp_path: Path, photo: Image.Image) -> None:
    settings = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    MimRefinerImageProcessor(**settings).save_pretrained(tmp_path)
    MimRefinerConfig(**TINY).save_pretrained(tmp_path)
    processors = [
        AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
        for backend in ("torchvision", "pil")
    ]
    assert [type(processor) for processor in processors] == [
        MimRefinerImageProcessor,
        MimRefinerImageProcessorPil,
    ]
    batched, single = (
        processor([photo, photo], return_tensors="pt").pixel_values for processor in processors
    )
    assert batched.shape == single.shape == (2, 3, 32, 32)
    # of values with standard deviation 1; the two resize slightly differently
    assert (batched - single).abs().mean() < 0.01
    assert (batched - single).abs().max() < 0.2


def test_processor_equals_the_steps_by_hand(photo: Image.Image) -> None:
    """Shortest edge to 40 (60 x 80 -> 40 x 53), centre crop of 32, /255, ImageNet statistics."""
    processor = MimRefinerImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
    )
    pixels = processor(photo, return_tensors="pt").pixel_values[0]
    resized = np.asarray(photo.resize((53, 40), Image.Resampling.BICUBIC), dtype=np.float64)[
        4:36, 10:42
    ]
    expected = (resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixels.numpy(), expected.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("kind", [MimRefinerImageProcessor, MimRefinerImageProcessorPil])
@pytest.mark.parametrize("turned", [False, True])
def test_a_thin_image_shows_its_middle(kind: Any, turned: bool) -> None:
    """Resized to 32 pixels, 9 x 3000 would be 32 x 10666; only what the crop shows is resized."""
    rows, columns = np.mgrid[:9, :3000]
    strip = np.stack([rows * 28, columns * 7 % 256, (rows + columns) % 200], axis=-1)
    strip = strip.astype(np.uint8)
    whole = Image.fromarray(strip).resize((10666, 32), Image.Resampling.BICUBIC)
    middle = np.asarray(whole, dtype=np.float32)[:, 5317:5349] / 255
    if turned:
        strip, middle = strip.swapaxes(0, 1), middle.swapaxes(0, 1)

    processor = kind(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_normalize=False
    )
    image = Image.fromarray(np.ascontiguousarray(strip))
    pixels = processor(image, return_tensors="pt").pixel_values[0]
    assert np.abs(pixels.numpy() - middle.transpose(2, 0, 1)).mean() < 0.01


def test_processor_feeds_the_model(photo: Image.Image) -> None:
    processor = MimRefinerImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    greyscale = photo.convert("L")
    with torch.no_grad():
        assert tiny(MimRefinerModel)(
            **processor([photo, greyscale], return_tensors="pt")
        ).pooler_output.shape == (2, 32)


# --- what transformers promises of every model ----------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"hidden_size": "32"}, {"num_hidden_layers": 2.5}, {"use_cls_token": "yes"}, {"bias": None}],
)
def test_fields_of_a_wrong_type_raise(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        MimRefinerConfig(**{**TINY, **settings})


def test_attention_is_dispatched_through_the_interface() -> None:
    """A kernel that a user registers under a name of their own is called once per block, with what
    it needs to know.
    """
    calls = []

    def kernel(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> Any:
        calls.append((query.shape, module.is_causal, kwargs["scaling"], kwargs["dropout"]))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    model, pixels = tiny(MimRefinerModel), torch.randn(2, 3, 32, 32)
    AttentionInterface.register("recorded", kernel)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        model.set_attn_implementation("recorded")
        torch.testing.assert_close(model(pixels).last_hidden_state, expected)
    assert calls == [((2, 2, 17, 16), False, 0.25, 0.0)] * 4


def test_outputs_of_the_heads_are_recorded_and_follow_the_configuration() -> None:
    pixels = torch.randn(2, 3, 32, 32)
    classifier, backbone = (
        tiny(MimRefinerForImageClassification, num_labels=3),
        tiny(MimRefinerBackbone, out_indices=[2, 4]),
    )
    with torch.no_grad():
        chosen = classifier(pixels, output_hidden_states=[1, 3]).hidden_states
        everything = classifier.encoder(pixels, output_hidden_states=True).hidden_states
        recorded = [state for state in chosen if state is not None]
        assert all(
            torch.equal(state, everything[index])
            for state, index in zip(recorded, (1, 3), strict=True)
        )
        maps = backbone(pixels)
        # recorded for the maps, returned only when asked for
        assert maps.hidden_states is None
        as_tuple = backbone(pixels, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert all(
            torch.equal(first, second)
            for first, second in zip(as_tuple[0], maps.feature_maps, strict=True)
        )
        classifier.config.output_hidden_states = classifier.encoder.config.output_hidden_states = (
            True
        )
        assert len(classifier.encoder(pixels).hidden_states) == 5


def test_models_are_built_without_memory_and_loaded_where_they_are_sent(tmp_path: Path) -> None:
    """Meta device, bf16, device_map.

    Blocks that do not fit come from disk one at a time, with the same result.
    """
    model = tiny(
        MimRefinerModel,
        position_encoding="absolute+shared_relative",
        num_register_tokens=2,
        layer_scale_init=0.1,
    )
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    with torch.device("meta"):
        assert {
            parameter.device.type for parameter in AutoModel.from_config(model.config).parameters()
        } == {"meta"}
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    parts = [
        "embeddings",
        "relative_position_bias",
        "norm",
        *(f"layers.{block}" for block in range(4)),
    ]
    places = {part: "disk" if part in ("layers.1", "layers.3") else "cpu" for part in parts}
    split = AutoModel.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert split.layers[3].mlp.fc1.weight.device.type == "meta"
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).pooler_output
        assert torch.equal(split(pixels).pooler_output, expected)
        assert (
            torch.nn.functional.cosine_similarity(
                half(pixels).pooler_output.float(), expected
            ).min()
            > 0.99
        )


def test_pipelines_know_the_model(tmp_path: Path, photo: Image.Image) -> None:
    """`image-feature-extraction` and `image-classification` by the folder's name alone, no flag, no
    prompt.
    """
    labels = {
        "id2label": {0: "cat", 1: "dog", 2: "newt"},
        "label2id": {"cat": 0, "dog": 1, "newt": 2},
    }
    classifier = tiny(MimRefinerForImageClassification, **labels)
    processor = MimRefinerImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    classifier.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        pixels = processor(photo, return_tensors="pt").pixel_values
        features, scores = (
            classifier.encoder(pixels).pooler_output,
            classifier(pixels).logits.softmax(-1)[0],
        )
    extract = pipeline(
        "image-feature-extraction", model=str(tmp_path), pool=True, return_tensors=True
    )
    assert type(extract.model) is MimRefinerModel
    torch.testing.assert_close(extract(photo), features)
    answer = pipeline("image-classification", model=str(tmp_path))(photo)
    assert {entry["label"]: entry["score"] for entry in answer} == pytest.approx(
        {name: scores[index].item() for index, name in classifier.config.id2label.items()}
    )


WITHOUT_TORCHVISION = """
import sys
sys.modules["torchvision"] = None  # as if it were not installed
import mim_refiner_hf
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.utils import is_torchvision_available
assert not is_torchvision_available()
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
assert type(processor) is mim_refiner_hf.MimRefinerImageProcessorPil
torch.save(processor(Image.open(sys.argv[2]), return_tensors="pt").pixel_values, sys.argv[3])
"""


@pytest.mark.slow
def test_the_processor_needs_no_torchvision(tmp_path: Path, photo: Image.Image) -> None:
    settings = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    MimRefinerImageProcessor(**settings).save_pretrained(tmp_path)
    MimRefinerConfig(**TINY).save_pretrained(tmp_path)
    photo.save(tmp_path / "photo.png")
    arguments = [str(tmp_path), str(tmp_path / "photo.png"), str(tmp_path / "pixels.pt")]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCHVISION, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    pixels = torch.load(tmp_path / "pixels.pt", weights_only=True)
    assert torch.equal(
        pixels, MimRefinerImageProcessorPil(**settings)(photo, return_tensors="pt").pixel_values
    )


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ViTModel", "Trainer"])
def test_any_class_of_transformers_may_be_imported_first(first: str) -> None:
    """In a process of its own: the tables are asked for while others are half imported."""
    program = (
        f"import mim_refiner_hf; from transformers import {first}, AutoModel, AutoConfig\n"
        "config = AutoConfig.for_model('mim_refiner', num_hidden_layers=1)\n"
        "print(type(AutoModel.from_config(config)).__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "MimRefinerModel", result.stderr
