"""Saved models load: those of earlier versions, and those of today without the package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, pipeline

from mim_refiner_hf import ImageClusteringPipeline, MimRefinerModel
from mim_refiner_hf.publishing import save_model_folder

# what AutoModel gives for the stored pixels, and the pipeline's groups, with the folder's own code
WITHOUT_PACKAGE = """
import json, sys
sys.modules["mim_refiner_hf"] = None  # as if it were not installed, also where it is
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, pipeline

folder, expected, photos, found = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules.")
with torch.no_grad():
    output = model(load_file(expected)["pixel_values"])
save_file({name: tensor.contiguous() for name, tensor in output.items()}, found)

pipe = pipeline("image-clustering", model=folder, trust_remote_code=True, device="cpu")
assert type(pipe).__module__.startswith("transformers_modules.")
print(json.dumps([entry["cluster"] for entry in pipe(photos, num_clusters=2)]))
"""


@pytest.fixture
def saved(shared: Path, tmp_path: Path) -> Path:
    """A model folder of version 0.1.0."""
    folder = shared / "compat" / "model-0.1.0"
    if not folder.is_dir():
        pytest.skip(f"needs the saved model, not found at {folder}")
    return Path(shutil.copytree(folder, tmp_path / "saved"))


@pytest.fixture
def expected(shared: Path) -> Path:
    """Pixels, and what AutoModel gave for them when the model was saved."""
    return shared / "compat" / "expected.safetensors"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """12 images, red and blue in turn."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(12):
        colour = (200, 40, 40) if i % 2 else (40, 40, 200)
        pixels = np.array(colour) + random.integers(-30, 30, (20, 24, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def assert_as_expected(found: dict[str, torch.Tensor], expected: Path) -> None:
    tensors = load_file(expected)
    del tensors["pixel_values"]
    assert tensors.keys() == found.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


def without_package(folder: Path, expected: Path, photos: Path, scratch: Path) -> list[int]:
    """Loads and runs a folder where the package is blocked; its groups of the photos."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(scratch), "HF_MODULES_CACHE": str(scratch / "modules")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    found = scratch / "found.safetensors"
    command = [sys.executable, "-I", "-c", WITHOUT_PACKAGE]
    command += [str(path) for path in (folder, expected, photos, found)]
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stderr
    assert_as_expected(load_file(found), expected)
    return list(json.loads(run.stdout.splitlines()[-1]))


def test_an_earlier_model_loads_with_the_package(saved: Path, expected: Path) -> None:
    model = AutoModel.from_pretrained(saved)
    assert type(model) is MimRefinerModel
    with torch.no_grad():
        output = model(load_file(expected)["pixel_values"])
    assert_as_expected(dict(output), expected)


def test_an_earlier_model_loads_without_the_package(
    saved: Path, expected: Path, photos: Path, tmp_path: Path
) -> None:
    """Its own files serve it; with the package, today's pipeline gives the same groups.

    Their numbers are of the random start, which is another one today.
    """
    groups = without_package(saved, expected, photos, tmp_path)
    pipe = pipeline("image-clustering", model=str(saved), device="cpu")
    assert type(pipe) is ImageClusteringPipeline
    entries = pipe(str(photos), num_clusters=2)
    today = [entry["cluster"] for entry in entries]
    assert len(set(zip(today, groups, strict=True))) == len(set(today)) == len(set(groups)) == 2
    assert len(set(groups[::2])) == len(set(groups[1::2])) == 1


def test_a_model_saved_today_loads_without_the_package(
    saved: Path, expected: Path, photos: Path, tmp_path: Path
) -> None:
    """Also a float picture, which the decoder that travels has to scale."""
    model = MimRefinerModel.from_pretrained(saved)
    processor = AutoImageProcessor.from_pretrained(saved)
    save_model_folder(tmp_path / "today", model, processor)
    assert (tmp_path / "today" / "decoding.py").is_file()

    dark = np.full((20, 24), 0.3, np.float32)
    Image.fromarray(dark).save(photos / "float.tiff")
    groups = without_package(tmp_path / "today", expected, photos, tmp_path)
    pipe = pipeline("image-clustering", model=str(tmp_path / "today"), device="cpu")
    entries = pipe(str(photos), num_clusters=2)
    assert [entry["cluster"] for entry in entries] == groups
