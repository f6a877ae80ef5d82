"""Model folders of strangers whose numbers, types and nesting are not to be believed.

Whatever stands in one field, loading ends well or with one short line, and never with a filled
memory: a limit of the address space is set for the whole file.
"""

import json
import math
import resource
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from PIL import Image
from safetensors.torch import load_file, save_file
from small_checkpoints import TINY, save_mae

from mim_refiner_hf.conversion import CheckpointError, load_encoder
from mim_refiner_hf.model.configuration_mim_refiner import (
    ConfigurationError,
    MimRefinerConfig,
    brief,
)
from mim_refiner_hf.model.image_processing_mim_refiner import (
    MimRefinerImageProcessor,
    MimRefinerImageProcessorPil,
)
from mim_refiner_hf.model.modeling_mim_refiner import MimRefinerModel
from mim_refiner_hf.publishing.convert import convert
from mim_refiner_hf.runtime.strangers import parse_json, read_json

PICTURE = Image.fromarray(np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3))
DEEP = "[" * 100_000 + "]" * 100_000
SHARED = settings(
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# what a stranger may write: of any type, far outside any range, long, deep
NUMBERS = st.sampled_from([0, 1, 3, 16, 10**4, 10**9, 10**12, 10**90, 0.5, 1e-40, 1e300])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    NUMBERS.map(lambda number: -number),
    st.sampled_from([math.nan, math.inf]),
    st.sampled_from(["", "3", "gelu", "no_such_act", "x" * 100_000, "a\nb\u202e"]),
)
SIDES = st.dictionaries(
    st.sampled_from(["height", "width", "shortest_edge", "longest_edge", "x"]),
    SCALARS,
    min_size=1,
    max_size=2,
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | SIDES | SCALARS.map(lambda scalar: [[scalar]])

CONFIG_FIELDS = [name for name in MimRefinerConfig.__annotations__ if not name.startswith("_")]
PREPROCESSING = [
    *("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor", "crop_pct"),
    *("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "value_range"),
]


@pytest.fixture(scope="module", autouse=True)
def _little_memory() -> Iterator[None]:
    """The tests of this file get 8 GB of addresses more: one that would fill the memory fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 2**33
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of ours without digests; tests write other JSON over its own."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    MimRefinerModel(MimRefinerConfig(**TINY)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def with_json(folder: Path, to: Path, file: str, changes: dict[str, Any]) -> Path:
    """The folder at another place, with some fields of one JSON file changed."""
    to.mkdir(exist_ok=True)
    for path in folder.iterdir():
        new = to / path.name
        new.unlink(missing_ok=True)
        new.hardlink_to(path)
    stated = json.loads((folder / file).read_text()) | changes
    (to / file).unlink()
    (to / file).write_text(json.dumps(stated))
    return to


def one_line_or_well(load: Callable[[], Any]) -> str:
    """The message with which something was refused, one short line; empty where it was not."""
    try:
        load()
    except ValueError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 1000
        assert not {"memory", "disk", "Traceback"} & set(message.split())
        return message
    return ""


def use(folder: Path) -> None:
    """Everything that a command does with a model before it has read an image of its user."""
    encoder = load_encoder(folder)
    encoder.image_processor(PICTURE, return_tensors="pt")
    height, width = encoder.config.image_hw
    with torch.inference_mode():
        encoder(torch.zeros(1, encoder.config.num_channels, height, width))


# --- fields of JSON -------------------------------------------------------------------------------


@given(field=st.sampled_from(CONFIG_FIELDS), value=VALUES)
@example(field="num_hidden_layers", value=10**9)
@example(field="hidden_size", value=10**12)
@example(field="patch_size", value=0)
@example(field="patch_size", value="8")
@example(field="image_size", value=[16, 16, 16])
@example(field="hidden_act", value="no_such_act")
@SHARED
def test_any_value_of_a_configuration_is_refused_in_one_line_or_used(
    own_folder: Path, tmp_path: Path, field: str, value: Any
) -> None:
    folder = with_json(own_folder, tmp_path / "m", "config.json", {field: value})
    one_line_or_well(lambda: use(folder))


@given(key=st.sampled_from(PREPROCESSING), value=VALUES, centre=st.booleans())
@example(key="size", value={"shortest_edge": -3}, centre=False)
@example(key="size", value={"shortest_edge": 10**9}, centre=False)
@example(key="size", value=[1, 2], centre=False)
@example(key="size", value=1, centre=False)
@example(key="crop_size", value={"height": 60_000, "width": 60_000}, centre=True)
@example(key="image_mean", value="abc", centre=False)
@example(key="image_std", value=[], centre=False)
@example(key="resample", value=99, centre=False)
@example(key="resample", value=5, centre=False)
@example(key="rescale_factor", value=10**9, centre=False)
@example(key="rescale_factor", value=1e-9, centre=False)
@SHARED
def test_any_value_of_the_preprocessing_is_refused_in_one_line_or_used(
    own_folder: Path, tmp_path: Path, key: str, value: Any, centre: bool
) -> None:
    changes = {"do_center_crop": centre, key: value}
    folder = with_json(own_folder, tmp_path / "m", "preprocessor_config.json", changes)
    message = one_line_or_well(lambda: use(folder))
    assert not message or key in message


@given(field=st.sampled_from([*CONFIG_FIELDS, "num_labels"]), value=VALUES)
@example(field="num_hidden_layers", value=10**9)
@example(field="num_labels", value=10**9)
@SHARED
def test_the_travelling_configuration_refuses_with_one_error(field: str, value: Any) -> None:
    def build() -> None:
        try:
            MimRefinerConfig(**{**TINY, field: value})
        except ValueError as error:
            assert isinstance(error, ConfigurationError)
            raise

    one_line_or_well(build)


@pytest.mark.parametrize("kind", [MimRefinerImageProcessor, MimRefinerImageProcessorPil])
@given(key=st.sampled_from(PREPROCESSING), value=VALUES)
@settings(SHARED, max_examples=25)
def test_the_travelling_image_processor_refuses_settings(kind: Any, key: str, value: Any) -> None:
    small = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    one_line_or_well(lambda: kind(**small | {key: value}))


def test_more_blocks_than_the_weights_have_are_not_built(
    own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mim_refiner_hf.conversion.load.MimRefinerModel", None)
    folder = with_json(own_folder, tmp_path / "m", "config.json", {"num_hidden_layers": 900})
    with pytest.raises(CheckpointError, match="=900, but its weights have 2 such blocks"):
        load_encoder(folder)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("model_args", "depth", 10**9),
        ("model_args", "depth", -1),
        ("model_args", "patch_size", 0),
        ("model_args", "img_size", [10**9, 10**9]),
        ("model_args", "norm_layer", "no_such_norm"),
        ("model_args", "layers", [10**9]),
        ("pretrained_cfg", "input_size", [3, 10**9, 10**9]),
        ("pretrained_cfg", "input_size", 16),
        ("pretrained_cfg", "crop_pct", 0),
        ("pretrained_cfg", "interpolation", ["bicubic"]),
        ("pretrained_cfg", "mean", "abc"),
    ],
)
def test_what_a_file_of_timm_states_is_checked(
    tmp_path: Path, place: str, key: str, value: Any
) -> None:
    import timm

    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    stated: dict[str, Any] = {"architecture": "vit_tiny_patch16_224"}
    stated |= {"model_args": arguments, "pretrained_cfg": {"input_size": [3, 16, 16]}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    use(tmp_path)

    stated[place] = stated[place] | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    message = one_line_or_well(lambda: use(tmp_path))
    # an interpolation of no known name is not stated
    assert message or key == "interpolation"


# --- files of JSON --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "weights_digests.json",
        "model.safetensors.index.json",
    ],
)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (DEEP, "nested deeper"),
        ('{"a": ' * 40 + "1" + "}" * 40, "nested deeper"),
        (f'{{"a": {"9" * 5000}}}', "a number of 5000 digits"),
        ('{"a": "' + "a" * 2**24 + '"}', "larger than 16.0 MiB"),
        ("[[1, 2]]", "it holds no object"),
        ('{"a": "\udcff"}', "not valid JSON"),
    ],
    ids=["deep list", "deep object", "long number", "large", "no object", "no unicode"],
)
def test_every_json_file_is_bounded(
    own_folder: Path, tmp_path: Path, file: str, content: str, reason: str
) -> None:
    folder = with_json(own_folder, tmp_path / "m", "config.json", {})
    (folder / file).unlink(missing_ok=True)
    (folder / file).write_text(content, errors="surrogateescape")
    if file == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    message = one_line_or_well(lambda: load_encoder(folder))
    assert file in message
    assert reason in message


# brackets in strings are no nesting, whatever stands around them
TEXTS = st.text('[]{}"\\a')
JSON = st.recursive(
    TEXTS | st.integers(-(10**40), 10**40) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=10,
)


@given(value=JSON, wraps=st.integers(0, 10))
def test_what_is_not_deep_is_read_as_ever(value: Any, wraps: int) -> None:
    for _ in range(wraps):
        value = [value]
    assert parse_json(json.dumps(value)) == value


def test_a_string_without_an_end_takes_no_quadratic_time() -> None:
    with pytest.raises(ValueError, match="Unterminated string"):
        parse_json('"' + '\\"' * 2_000_000)


@given(value=VALUES | st.just(10**50_000) | st.just([[["a"] * 10**5] * 10**5]))
def test_a_value_is_shown_short(value: Any) -> None:
    assert len(brief(value)) < 700
    assert "\n" not in brief(value)


def test_an_index_of_any_names_is_refused(own_folder: Path, tmp_path: Path) -> None:
    folder = with_json(own_folder, tmp_path / "m", "config.json", {})
    (folder / "model.safetensors").unlink()
    for shard in ("x" * 5000, "a\0b", "../m/config.json", "", ".", ["x"], 10**90, {}):
        index = {"weight_map": {"norm.weight": shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        message = one_line_or_well(lambda: load_encoder(folder))
        assert "which is missing there" in message


# --- weight files ---------------------------------------------------------------------------------


def test_a_deep_header_is_no_traceback(tmp_path: Path) -> None:
    header = DEEP.encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "unreadable" in one_line_or_well(lambda: load_encoder(path))


def endless() -> dict[str, Any]:
    """A dictionary that holds itself."""
    cycle: dict[str, Any] = {}
    cycle["again"] = cycle
    return cycle


def doubled() -> dict[str, Any]:
    """Two dictionaries of two, thirty times: few bytes, 2^30 entries."""
    inner: dict[str, Any] = {}
    for _ in range(30):
        inner = {"a": inner, "b": inner}
    return inner


@pytest.mark.parametrize(
    "hostile",
    [
        endless,
        doubled,
        lambda: {"cls_token": torch.zeros(1).expand(10**6, 10**6)},
        lambda: {f"blocks.{i}": torch.zeros(1).expand(10**5) for i in range(1000)},
        lambda: {"cls_token": torch.sparse_coo_tensor(size=(10**9, 10**9))},
        lambda: {"cls_token": torch.zeros(10**9, device="meta")},
    ],
    ids=["endless", "doubled", "expanded", "expanded often", "sparse", "meta"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_that_have_no_end_are_refused(
    tmp_path: Path, hostile: Callable[[], dict[str, Any]]
) -> None:
    path = save_mae(tmp_path, hostile())
    assert "state dict saved" in one_line_or_well(lambda: load_encoder(path))


def test_a_packed_weight_file_is_refused(tmp_path: Path) -> None:
    plain = save_mae(tmp_path, {"cls_token": torch.zeros(1, 1, 10_000)})
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    assert "would be unpacked to" in one_line_or_well(lambda: load_encoder(packed))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int64, torch.bool])
def test_weights_of_other_types_are_refused(own_folder: Path, tmp_path: Path, dtype: Any) -> None:
    folder = with_json(own_folder, tmp_path / "m", "config.json", {})
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(
        {key: tensor.to(dtype) for key, tensor in state.items()}, folder / "model.safetensors"
    )
    assert "tensors hold NaN" in one_line_or_well(lambda: load_encoder(folder))


def test_a_patch_embedding_without_values_is_refused(own_folder: Path, tmp_path: Path) -> None:
    folder = with_json(own_folder, tmp_path / "m", "config.json", {})
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    state["embeddings.patch_embeddings.weight"] = torch.zeros(32, 3, 0, 0)
    save_file(state, folder / "model.safetensors")
    assert "no patch embedding" in one_line_or_well(lambda: load_encoder(folder))


def test_outputs_of_the_weights_are_not_put_down_to_the_machine(tmp_path: Path) -> None:
    """Of weights that are all 0, and of those that overflow."""
    encoder = MimRefinerModel(MimRefinerConfig(**TINY))
    for value, message in ((0.0, ""), (1e30, "as NaN or infinity")):
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.fill_(value)
        encoder.save_pretrained(tmp_path / "m")
        said = one_line_or_well(lambda: convert(tmp_path / "m", tmp_path / "out"))
        assert message in said
        assert bool(said) == bool(message)


def test_a_missing_file_states_nothing(tmp_path: Path) -> None:
    assert read_json(tmp_path / "config.json") == {}
