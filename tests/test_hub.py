"""Model folders and the Hub.

Loading with and without the package, pushing, and a Hub that fails.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from transformers.utils import logging as bars

from mim_refiner_hf import (
    MimRefinerConfig,
    MimRefinerImageProcessor,
    MimRefinerModel,
    load_encoder,
)
from mim_refiner_hf.publishing import PushError, check_repo_id, push_folder, save_model_folder
from mim_refiner_hf.publishing.sentence_files import SENTENCE_FILES
from mim_refiner_hf.runtime import retry as patience

REPOSITORY = Path(__file__).resolve().parents[1]

WITHOUT_PACKAGE = """
import sys
sys.modules["mim_refiner_hf"] = None  # as if it were not installed, also where it is
import torch
from PIL import Image
from transformers import AutoBackbone, AutoImageProcessor, AutoModel, pipeline
from transformers import AutoModelForImageClassification
image, expected = Image.open(sys.argv[2]), torch.load(sys.argv[3], weights_only=True)
remote = {"trust_remote_code": True}
for source in sys.argv[1].split(","):
    model = AutoModel.from_pretrained(source, **remote)
    assert model.dtype == torch.float32
    for backend, suffix, tolerance in (("torchvision", "", 1e-6), ("pil", "Pil", 1e-3)):
        processor = AutoImageProcessor.from_pretrained(source, backend=backend, **remote)
        assert type(processor).__name__ == "MimRefinerImageProcessor" + suffix
        with torch.no_grad():
            found = model(**processor(image, return_tensors="pt")).pooler_output
        assert (found - expected).abs().max() < tolerance, (backend, (found - expected).abs().max())
    extract = pipeline("image-feature-extraction", model=source, **remote)
    assert (extract(image, pool=True, return_tensors=True) - expected).abs().max() < 1e-6
    groups = pipeline("image-clustering", model=source, **remote)([image, image], num_clusters=1)
    assert [entry["cluster"] for entry in groups] == [0, 0]
    classifier = AutoModelForImageClassification.from_pretrained(source, num_labels=3, **remote)
    assert torch.equal(classifier.encoder.layers[1].mlp.fc2.weight, model.layers[1].mlp.fc2.weight)
    # AutoBackbone of transformers 5.23 takes no local folder, of any model
    if source.count("/") == 1:
        backbone = AutoBackbone.from_pretrained(source, out_indices=[1, 2], **remote)
        with torch.no_grad():
            maps = backbone(**processor(image, return_tensors="pt")).feature_maps
        assert [tuple(each.shape) for each in maps] == [(1, 32, 4, 4)] * 2
        assert backbone.channels == [32, 32]
    print("loaded", source)
"""

WITH_PACKAGE = """
import sys
import torch
from PIL import Image
from transformers import AutoBackbone, AutoImageProcessor, AutoModel, pipeline
import mim_refiner_hf
from mim_refiner_hf.publishing import push_folder
source, image = sys.argv[1], Image.open(sys.argv[2])
expected = torch.load(sys.argv[3], weights_only=True)
model, processor = AutoModel.from_pretrained(source), AutoImageProcessor.from_pretrained(source)
assert type(model) is mim_refiner_hf.MimRefinerModel
assert type(processor) is mim_refiner_hf.MimRefinerImageProcessor
with torch.no_grad():
    found = model(**processor(image, return_tensors="pt")).pooler_output
assert (found - expected).abs().max() < 1e-6
extract = pipeline("image-feature-extraction", model=source, pool=True, return_tensors=True)
assert type(extract.model) is mim_refiner_hf.MimRefinerModel
assert (extract(image) - expected).abs().max() < 1e-6
print("pushed", push_folder(source, "tester/tiny"))
backbone = AutoBackbone.from_pretrained("tester/tiny", out_indices=[1, 2])
assert type(backbone) is mim_refiner_hf.MimRefinerBackbone
assert backbone.out_features == ["stage1", "stage2"]
assert torch.equal(backbone.encoder.layers[1].mlp.fc2.weight, model.layers[1].mlp.fc2.weight)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved tiny model with a card, an image, and the features of that image."""
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(1)
    config = MimRefinerConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        erased_directions=3,
        erased=["camera"],
    )
    encoder = MimRefinerModel(config).eval()
    for name, buffer in encoder.named_buffers():
        if ".eraser." in name:
            buffer.normal_(std=0.2)
    processor = MimRefinerImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    image = Image.effect_mandelbrot((40, 36), (-2, -1.5, 1, 1.5), 60).convert("RGB")
    with torch.no_grad():
        features = encoder(**processor(image, return_tensors="pt")).pooler_output
    image.save(root / "image.png")
    torch.save(features, root / "features.pt")
    save_model_folder(root / "model", encoder, processor)
    (root / "model" / "README.md").write_text(
        "---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n\n`your-name/your-model`\n",
        encoding="utf-8",
    )
    return {
        "root": root,
        "model": root / "model",
        "image": root / "image.png",
        "features": root / "features.pt",
    }


def run_script(
    script: str, source: str, tiny: dict[str, Path], home: Path, **environment: str
) -> str:
    """Run `script` in a fresh process whose input is closed, so that any prompt is an error.

    Returns what it printed.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    home.mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, "-c", script, source, str(tiny["image"]), str(tiny["features"])],
        cwd=home,
        env={
            **inherited,
            "HF_HOME": str(home),
            "HF_MODULES_CACHE": str(home / "modules"),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def failing_hub() -> Iterator[str]:
    """The address of a server that answers every request with 500."""

    class Broken(BaseHTTPRequestHandler):
        def refuse(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_POST = do_PUT = refuse

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saved_folder_is_complete(tiny: dict[str, Path]) -> None:
    code = {
        f"{name}_mim_refiner.py"
        for name in ("configuration", "poolings", "positions", "modeling", "image_processing")
    }
    code |= {
        "pipeline_image_clustering.py",
        "channels.py",
        "decoding.py",
        "image_items.py",
        "confidence.py",
        "k_means.py",
        "starts.py",
        "merging.py",
        "cluster_count.py",
        "lloyd.py",
        "row_batches.py",
        "cluster_heads.py",
        "prototype_heads.py",
    }
    weights = {"model.safetensors", "weights_digests.json"}
    assert set(contents(tiny["model"])) == {
        "config.json",
        "preprocessor_config.json",
        "README.md",
        *weights,
        *code,
        *SENTENCE_FILES,
    }
    assert not [path for path in tiny["root"].iterdir() if path.name.startswith(".")]
    assert "auto_map" not in json.loads((tiny["model"] / "preprocessor_config.json").read_text())


def test_saving_half_precision_writes_fp32_and_replaces_the_old_model(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    encoder = MimRefinerModel.from_pretrained(tiny["model"])
    processor = MimRefinerImageProcessor.from_pretrained(tiny["model"])
    for _ in range(2):
        save_model_folder(tmp_path / "model", encoder.to(torch.bfloat16), processor)
        (tmp_path / "model" / "README.md").write_text("card of the first weights")
    save_model_folder(tmp_path / "model", encoder, processor)
    assert {
        tensor.dtype for tensor in load_file(tmp_path / "model" / "model.safetensors").values()
    } == {torch.float32}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float32"
    assert encoder.dtype == torch.bfloat16
    assert not (tmp_path / "model" / "README.md").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_spares_a_folder_that_holds_something_else(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not a model folder"):
        save_model_folder(
            tmp_path, MimRefinerModel.from_pretrained(tiny["model"]), MimRefinerImageProcessor()
        )
    assert contents(tmp_path) == {"photo.jpg": b"mine"}


def test_an_error_while_saving_keeps_the_old_model(tiny: dict[str, Path]) -> None:
    class Unsaveable:
        def save_pretrained(self, _: Path) -> None:
            raise OSError("disk full")

    before = contents(tiny["model"])
    with pytest.raises(OSError, match="disk full"):
        save_model_folder(
            tiny["model"], MimRefinerModel.from_pretrained(tiny["model"]), Unsaveable()
        )
    assert contents(tiny["model"]) == before


@pytest.mark.parametrize(
    "repo_id", ["", "model", "a/b/c", "user/", "/name", "user/na me", "user/-name", "../up"]
)
def test_malformed_repository_names_are_refused(repo_id: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a Hub repository; give user/name"):
        check_repo_id(repo_id)


def test_well_formed_repository_names_pass() -> None:
    assert check_repo_id("ada/mae-refined_l16.v2") == "ada/mae-refined_l16.v2"


def test_saving_draws_no_bar_and_leaves_others_alone(
    tiny: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = bars.is_progress_bar_enabled()
    bars.enable_progress_bar()
    encoder = load_encoder(tiny["model"])
    capfd.readouterr()
    save_model_folder(tmp_path / "model", encoder, encoder.image_processor)
    assert capfd.readouterr().err == "" and bars.is_progress_bar_enabled()
    # transformers itself draws one
    encoder.save_pretrained(tmp_path / "theirs")
    assert "%|" in capfd.readouterr().err
    if not before:
        bars.disable_progress_bar()


def test_pushing_something_else_than_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json and model\*\.safetensors missing"):
        push_folder(tmp_path, "tester/tiny")


@pytest.mark.slow
def test_push_and_load_through_the_hub(
    stub_hub: Any, tiny: dict[str, Path], tmp_path: Path
) -> None:
    environment = {name: value for name, value in stub_hub.env().items() if name != "HF_HOME"}
    package = {**environment, "PYTHONPATH": str(REPOSITORY)}
    printed = run_script(WITH_PACKAGE, str(tiny["model"]), tiny, tmp_path / "with", **package)
    assert f"pushed {stub_hub.url}/tester/tiny" in printed
    repo = stub_hub.repos["tester/tiny"]
    assert [summary for _, summary in repo["commits"]] == [
        "Weights, configuration and code",
        "Model card with metrics",
    ]
    local = contents(tiny["model"])
    card = local.pop("README.md")
    assert repo["files"].pop("README.md") == card.replace(b"your-name/your-model", b"tester/tiny")
    assert {name: data for name, data in repo["files"].items() if name != ".gitattributes"} == local
    sources = f"tester/tiny,{tiny['model']}"
    printed = run_script(WITHOUT_PACKAGE, sources, tiny, tmp_path / "without", **environment)
    assert f"loaded tester/tiny\nloaded {tiny['model']}\n" in printed


def test_a_failing_hub_leaves_the_result_and_the_command_to_continue(
    failing_hub: str, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(tiny["model"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", failing_hub)
    monkeypatch.setattr(patience, "PAUSE", 0.01)
    with pytest.raises(PushError) as caught:
        push_folder(tiny["model"], "tester/tiny", private=True)
    message = str(caught.value)
    assert (
        message.startswith("the Hub did not take tester/tiny (Server error '500")
        and "\n" not in message
    )
    assert message.endswith(
        f"intact at {tiny['model']}, continue with: mim-refiner push {tiny['model']} tester/tiny "
        f"--private"
    )
    assert contents(tiny["model"]) == before


def test_an_unreachable_hub_is_a_push_error_too(tiny: dict[str, Path]) -> None:
    with pytest.raises(PushError, match="offline mode"):  # as tests/conftest.py sets it
        push_folder(tiny["model"], "tester/tiny")
