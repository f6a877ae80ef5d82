"""Features in JavaScript: an exported folder in transformers.js, in node and in a browser.

They need a folder with the npm packages `@huggingface/transformers` and `onnxruntime-web`, which
TRANSFORMERS_JS names (`.ci/run` makes one); the browser is `chromium.py`'s.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import Chromium, needs_chromium, served
from PIL import Image
from transformers import AutoImageProcessor

from mim_refiner_hf import MimRefinerConfig, MimRefinerModel
from mim_refiner_hf.conversion.preprocessing import image_processor
from mim_refiner_hf.publishing import save_model_folder
from mim_refiner_hf.publishing.export import export

PACKAGES = Path(os.environ.get("TRANSFORMERS_JS", "missing")) / "node_modules"
LIBRARY = PACKAGES / "@huggingface/transformers/dist"
RUNTIME = PACKAGES / "onnxruntime-web/dist"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not LIBRARY.is_dir(), reason="TRANSFORMERS_JS names no folder with transformers.js"
    ),
]

# all tokens, and the pooled vector, of two images in each precision
FEATURES = """
    const found = {};
    for (const dtype of ['fp32', 'fp16', 'q8']) {
        const options = {dtype, device: DEVICE};
        const extract = await pipeline('image-feature-extraction', 'web', options);
        const tokens = await extract([FIRST, SECOND]);
        const pooled = await extract([FIRST, SECOND], {pool: true});
        found[dtype] = {
            tokens: [tokens.dims, Array.from(tokens.data)],
            pooled: [pooled.dims, Array.from(pooled.data)],
        };
    }
"""
PLACES = """
    env.allowRemoteModels = false;
    env.allowLocalModels = true;
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model, and two images of its size."""
    root = tmp_path_factory.mktemp("site")
    torch.manual_seed(0)
    config = MimRefinerConfig(
        image_size=32,
        patch_size=8,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
    )
    save_model_folder(root / "model", MimRefinerModel(config), image_processor(config, {}))
    export(root / "model", root / "models/web", "onnx", fp16=True, int8=True)
    for name, extent in (("first.png", (-2, -1.5, 1, 1.5)), ("second.png", (-1, -1, 0, 0))):
        Image.effect_mandelbrot((32, 32), extent, 60).convert("RGB").save(root / name)
    return root


def check(site: Path, found: dict[str, Any]) -> None:
    """Compare with PyTorch's own features of the same files."""
    model = MimRefinerModel.from_pretrained(site / "model").eval()
    processor = AutoImageProcessor.from_pretrained(site / "model")
    images = [Image.open(site / name) for name in ("first.png", "second.png")]
    with torch.no_grad():
        expected = model(**processor(images, return_tensors="pt"))

    ours = {"tokens": expected.last_hidden_state, "pooled": expected.pooler_output}
    for precision, outputs in found.items():
        for name, (shape, values) in outputs.items():
            assert tuple(shape) == tuple(ours[name].shape), (precision, name)
            theirs = torch.tensor(values).view(shape)
            if precision == "fp32":
                np.testing.assert_allclose(theirs, ours[name], atol=1e-4, rtol=0)
            assert torch.cosine_similarity(theirs, ours[name], dim=-1).min() > 0.999
    assert set(found) == {"fp32", "fp16", "q8"}


def test_in_node(site: Path) -> None:
    program = f"""
        import {{ pipeline, env }} from '{LIBRARY}/transformers.node.mjs';
        {PLACES}
        env.localModelPath = '{site}/models/';
        const [DEVICE, FIRST, SECOND] = ['cpu', '{site}/first.png', '{site}/second.png'];
        {FEATURES}
        console.log(JSON.stringify(found));
    """
    (site / "program.mjs").write_text(program)
    node = shutil.which("node")
    assert node is not None
    result = subprocess.run(
        [node, site / "program.mjs"], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    check(site, json.loads(result.stdout.splitlines()[-1]))


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The site, with the libraries that its page needs, on a port of this machine."""
    library = site / "library"
    shutil.copytree(RUNTIME, library, ignore=shutil.ignore_patterns("*.map"), dirs_exist_ok=True)
    shutil.copy(LIBRARY / "transformers.min.js", library)
    with served(site) as place:
        yield place


@needs_chromium
def test_in_a_browser(site: Path, address: str, tmp_path: Path) -> None:
    """A static page, with no host but its own."""
    page = f"""
        <script type="module">
        try {{
            const {{ pipeline, env }} = await import('/library/transformers.min.js');
            {PLACES}
            env.localModelPath = '/models/';
            env.backends.onnx.wasm.wasmPaths = location.origin + '/library/';
            env.backends.onnx.wasm.numThreads = 1;
            const [DEVICE, FIRST, SECOND] = ['wasm', 'first.png', 'second.png'];
            {FEATURES}
            window.found = found;
        }} catch (error) {{ window.found = {{error: String(error)}}; }}
        </script>
    """
    (site / "index.html").write_text(page)
    chromium = Chromium(tmp_path)
    chromium.call("/url", {"url": f"{address}/index.html"})
    chromium.wait("window.found", 180)
    found = chromium.run("window.found")
    chromium.quit()
    assert "error" not in found, found
    check(site, found)
