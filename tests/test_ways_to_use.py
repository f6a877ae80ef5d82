"""The snippets of a model card, run as they stand against a folder of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from transformers import AutoModel

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel
from mim_refiner_hf.cli import main
from mim_refiner_hf.conversion.preprocessing import image_processor
from mim_refiner_hf.publishing import save_model_folder
from mim_refiner_hf.publishing.ways_to_use import family_config, ways_to_use

NAME = "model"
PACKAGES = Path(os.environ.get("TRANSFORMERS_JS", "missing")) / "node_modules"
SHAPE = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
CAPI = {"position_encoding": "rope", "use_cls_token": False, "num_register_tokens": 4}
# what a snippet leaves, as one vector of the photo
VECTORS = {
    "mim_refiner_hf": "features.detach()",
    "pipeline": "torch.tensor(vectors[0])",
    "sentence_transformers": "torch.tensor(vectors)",
    "peft": "model.base_model",
}


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a photo and photos."""
    place = tmp_path_factory.mktemp("ways")
    torch.manual_seed(0)
    encoder = MimRefinerModel(MimRefinerConfig(**SHAPE)).eval()
    save_model_folder(place / NAME, encoder, image_processor(encoder.config, {}))
    Image.effect_mandelbrot((20, 16), (-2, -1.5, 1, 1.5), 60).convert("RGB").save(
        place / "photo.jpg"
    )
    for number in range(12):
        picture = Image.linear_gradient("L").rotate(30 * number).resize((16, 16)).convert("RGB")
        (place / "photos").mkdir(exist_ok=True)
        picture.save(place / f"photos/{number}.png")
    return place


@pytest.fixture(scope="module")
def text(place: Path) -> str:
    return ways_to_use(NAME, MimRefinerConfig.from_pretrained(place / NAME), local=True)


@pytest.mark.slow
def test_python(place: Path, text: str) -> None:
    """Every snippet in a process of its own; all give the same vector."""
    found = {}
    snippets = blocks(text, "python")
    assert len(snippets) == len(VECTORS)
    for key, vector in VECTORS.items():
        (snippet,) = (each for each in snippets if f"import {key}" in each or f"from {key}" in each)
        ending = f"\nimport torch\ntorch.save({vector}, 'found.pt')\n"
        if key == "peft":
            ending = "\nprint(model.get_nb_trainable_parameters())\n"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            [sys.executable, "-c", snippet + ending],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, (key, result.stderr)
        if key != "peft":
            found[key] = torch.load(place / "found.pt").view(-1)
    for vector in found.values():
        torch.testing.assert_close(vector, found["mim_refiner_hf"], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_commands_and_javascript(place: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command ends well; node gives the vector that PyTorch gives, to 8 bits."""
    monkeypatch.chdir(place)
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
    assert [line.split()[1] for line in lines] == ["cluster", "export", "export", "export"]
    for line in lines:
        words = line.partition("#")[0].split()[1:]
        if words[0] == "cluster":
            words += ["--num_clusters", "2"]
        assert main(words) == 0, line

    model = MimRefinerModel.from_pretrained(NAME).eval()
    pixels = image_processor(model.config, {})(Image.open("photo.jpg"), return_tensors="pt")
    with torch.no_grad():
        ours = model(**pixels).pooler_output.view(-1)
        native = AutoModel.from_pretrained("native-copy")
        # what stands behind the command is what loads its copy
        (call,) = re.findall(r"timm\.create_model\(.*\)", text)
        copies = eval(call, {"timm": timm}).eval()(pixels["pixel_values"]).view(-1)
        assert f"AutoModel, as {type(native).__name__}" in text
        torch.testing.assert_close(native(**pixels).pooler_output.view(-1), ours)
        torch.testing.assert_close(copies, ours)

    if not PACKAGES.is_dir():
        pytest.skip("TRANSFORMERS_JS names no folder with transformers.js")
    (snippet,) = blocks(text, "javascript")
    (place / "node_modules").symlink_to(PACKAGES)
    (place / "use.mjs").write_text(snippet + "console.log(JSON.stringify(vectors.tolist()));\n")
    node = shutil.which("node")
    assert node is not None
    result = subprocess.run(
        [node, "use.mjs"], cwd=place, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    theirs = torch.tensor(json.loads(result.stdout.splitlines()[-1])).view(-1)
    assert torch.cosine_similarity(theirs, ours, dim=0) > 0.99


@pytest.mark.parametrize(
    ("changes", "formats"),
    [
        ({}, ["native", "timm", "onnx"]),
        ({"position_encoding": "shared_relative"}, ["native", "timm", "onnx"]),
        ({"norm_placement": "post"}, ["onnx"]),
        ({**CAPI, "pooling": "global_repr", "predictor_layers": 1}, ["onnx"]),
    ],
)
def test_a_card_shows_what_its_encoder_can(changes: dict[str, object], formats: list[str]) -> None:
    text = ways_to_use(NAME, MimRefinerConfig(**{**SHAPE, **changes}))
    assert re.findall(r"--to (\w+)", text) == formats
    assert "# or the folder of this model" in text


@pytest.mark.parametrize(
    ("family", "loads"),
    [
        ("mae", ["as ViTModel", "timm.create_model"]),
        ("maect_mean", ["timm.create_model"]),
        ("crossmae", ["as Data2VecVisionModel", "timm.create_model"]),
        ("data2vec2", []),
    ],
)
def test_a_card_of_the_zoo_shows_what_its_family_can(family: str, loads: list[str]) -> None:
    text = ways_to_use(NAME, family_config(family))
    assert re.findall(r"as \w+Model|timm\.create_model", text) == loads
