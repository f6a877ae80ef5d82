"""The examples as a reader runs them.

In a folder of their own, from the refinement of a folder of images to its features. The notebooks
cell by cell, by nbclient; without it their test skips.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))

# passive: on a machine that is busy otherwise, threads that wait by spinning slow each other down
# several times
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The example `script`, run in the folder `cwd`."""
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which refine_your_own_images.py ran without arguments, and what it printed."""
    folder = tmp_path_factory.mktemp("refined")
    done = run("refine_your_own_images.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_refine_your_own_images(refined: tuple[Path, str]) -> None:
    folder, printed = refined
    assert len(list((folder / "outputs/example-images").glob("[0-9]/*.png"))) == 400
    for name in (
        "model/config.json",
        "model/model.safetensors",
        "model/README.md",
        "metrics.json",
        "clusters.png",
    ):
        assert (folder / "outputs/example" / name).stat().st_size > 0
    metrics = json.loads((folder / "outputs/example/metrics.json").read_text())
    before, after = (metrics[side]["nmi"] for side in ("before", "after"))
    assert after > before
    scores = [f"{100 * value:.1f} %" for value in (metrics["pixels"]["nmi"], before, after)]
    row = f"NMI {' '.join(scores)} {100 * (after - before):+.1f} points"
    assert row in [" ".join(line.split()) for line in printed.splitlines()]
    assert printed.splitlines()[-2] == f"nmi: {before:.3f} -> {after:.3f}"
    assert printed.splitlines()[-1] == "400 vectors of 64 numbers from outputs/example/model"


@pytest.mark.slow
def test_extract_features_of_a_folder(refined: tuple[Path, str], tmp_path: Path) -> None:
    images, model = refined[0] / "outputs/example-images", refined[0] / "outputs/example/model"
    done = run(
        "extract_features.py",
        "--model",
        str(model),
        "--images",
        str(images),
        "--query",
        "7",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    with safe_open(tmp_path / "features.safetensors", "pt") as file:
        features, names = file.get_tensor("features"), json.loads(file.metadata()["images"])
    paths = sorted(images.rglob("*.png"))
    assert names == [str(path) for path in paths]
    assert features.shape == (400, 64)

    # another way to the same model
    from mim_refiner_hf import load_encoder

    encoder = load_encoder(model)
    pixels = encoder.image_processor(
        [Image.open(path).convert("RGB") for path in paths[:3]], return_tensors="pt"
    ).pixel_values
    with torch.inference_mode():
        torch.testing.assert_close(
            features[:3], encoder(pixels).pooler_output, atol=1e-5, rtol=1e-5
        )

    order = F.cosine_similarity(features, features[7:8]).argsort(descending=True).tolist()
    lines = done.stdout.splitlines()
    assert lines[0] == "400 features of 64 numbers -> features.safetensors"
    assert [line.split()[-3] for line in lines[1:]] == [names[i] for i in order[:6]]


def test_extract_features_says_what_to_run_first(tmp_path: Path) -> None:
    done = run("extract_features.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "accelerate launch training/refine.py" in done.stderr
    assert not list(tmp_path.iterdir())


# --- notebooks ------------------------------------------------------------------------------------


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return found


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_bare_and_explains_every_cell(notebook: Path) -> None:
    cells = cells_of(notebook)
    prose = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert "pip install -e . jupyterlab" in prose
    for link in re.findall(r"\]\(([^)]+)\)", prose):
        assert (notebook.parent / link).is_file(), link

    for above, cell in itertools.pairwise(cells):
        if cell["cell_type"] == "code":
            assert above["cell_type"] == "markdown", cell["source"]
            assert cell["outputs"] == [] and cell["execution_count"] is None, cell["source"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first cell to its last, with pictures, and what it refines is better."""
    reason = 'needs nbclient and ipykernel: pip install -e ".[test]"'
    nbclient = pytest.importorskip("nbclient", reason=reason)
    nbformat = pytest.importorskip("nbformat", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)

    # what it writes stays here
    folder = tmp_path / "notebooks"
    folder.mkdir()
    shutil.copy(EXAMPLES / "toy-mae.yaml", tmp_path)
    book = nbformat.read(notebook, as_version=4)
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(book, timeout=900, kernel_name="python3", resources=where).execute()

    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    shown = {kind for output in outputs for kind in output.get("data", {})}
    printed = "".join(output.get("text", "") for output in outputs)
    assert "image/png" in shown
    assert "Better: separation" in printed
