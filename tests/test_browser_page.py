"""The site of `mim-refiner page`: its files, its arithmetic in node, and a real headless Chromium.

    python -m pytest -m "slow or not slow" -s tests/test_browser_page.py

The browser is `chromium.py`'s, and runs the transformers.js of TRANSFORMERS_JS; the other tests
have files of a few bytes in its place. `python -m benchmarks.browser_page` compares accuracies.
"""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from chromium import Chromium, needs_chromium, served
from huggingface_hub import constants
from PIL import Image
from sklearn.metrics import adjusted_rand_score
from small_encoder import make_encoder, make_processor

from mim_refiner_hf import MimRefinerImageProcessor
from mim_refiner_hf.cli import main
from mim_refiner_hf.clustering import cluster_count, confidence, k_means, lloyd, starts
from mim_refiner_hf.clustering.pipeline_image_clustering import _MAX_GUESS, find_groups
from mim_refiner_hf.conversion.download import Record
from mim_refiner_hf.publishing import browser_site, javascript, save_model_folder
from mim_refiner_hf.publishing.corrections import read_corrections
from mim_refiner_hf.publishing.twins import native_processor
from mim_refiner_hf.runtime.files import sha256_of

SCRIPTS = Path(browser_site.__file__).with_name("browser_page")
PACKAGES = Path(os.environ.get("TRANSFORMERS_JS", "missing"))

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node on the PATH")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder of 16 pixels with one block."""
    folder = tmp_path_factory.mktemp("model") / "small"
    save_model_folder(folder, make_encoder(num_hidden_layers=1), make_processor())
    return folder


def install(folder: Path, **versions: str) -> Path:
    """What npm would leave behind, with files of a few bytes."""
    for package in javascript.PACKAGES:
        place = folder / "node_modules" / package.name
        for path in package.files:
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_text(f"// {path}")
        stated = {
            "version": versions.get(package.name, package.version),
            "dependencies": {"onnxruntime-web": javascript.PACKAGES[1].version},
        }
        (place / "package.json").write_text(json.dumps(stated))
    return folder


@pytest.fixture(scope="module")
def site(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("site")
    installed = install(root / "js")
    words = [str(model), "--out", str(root / "site"), "--transformers_js", str(installed)]
    assert main(["page", *words]) == 0
    return root / "site"


# --- the files ------------------------------------------------------------------------------------


def test_every_file_is_there_and_kept_for_offline_use(site: Path) -> None:
    listed = re.search(r"const FILES = (\[.*\]);", (site / "offline.js").read_text())
    assert listed is not None
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert set(json.loads(listed[1])) == (files - {"README.md", "offline.js"}) | {"./"}
    assert "models/encoder/onnx/model_quantized.onnx" in files
    assert "models/encoder/onnx/model.onnx" not in files

    # what the scripts name is there
    for script in site.glob("*.js"):
        for imported in re.findall(r'from "(\./[^"]+)"', script.read_text()):
            assert imported[2:] in files, (script, imported)
    page = (site / "index.html").read_text()
    for named in ("offline.js", "encoder-worker.js", "grouping-worker.js", "groups.html"):
        assert f'"{named}"' in page and named in files

    front = (site / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front)["sdk"] == "static"


def test_no_foreign_host_is_named_and_the_page_allows_none(site: Path) -> None:
    """The library names hosts; the page's policy, which its workers are held to, refuses them."""
    for path in (*site.glob("*.js"), *site.glob("*.html")):
        hosts = set(re.findall(r"\b(?:https?|wss?)://([\w.:-]+)", path.read_text()))
        assert hosts <= {"localhost:8000"}, path
    policy = re.search(
        r'Content-Security-Policy" content="([^"]+)', (site / "index.html").read_text()
    )
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
    assert not re.search(r"https?:|\*", policy[1])


def test_another_file_is_another_version(site: Path, tmp_path: Path) -> None:
    """The service worker keeps what it has until its own text changes."""
    copy = Path(shutil.copytree(site, tmp_path / "copy"))

    def rendered() -> str:
        for path in (*copy.glob("*.js"), *copy.glob("*.html")):
            path.unlink()
        browser_site._write_pages(copy, "small")
        return (copy / "offline.js").read_text()

    assert rendered() == (site / "offline.js").read_text()
    (copy / "library/transformers.min.js").write_text("// other")
    assert rendered() != (site / "offline.js").read_text()


# --- what is refused ------------------------------------------------------------------------------


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line of a command that ends with 2."""
    capsys.readouterr()
    assert main(["page", *words]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: ") and "\n" not in line
    return line


def test_wrong_use_is_one_line_before_any_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = ["--transformers_js", str(install(tmp_path / "js"))]
    out = ["--out", str(tmp_path / "new")]
    line = refused([str(model), *out, "--transformers_js", str(tmp_path)], capsys)
    assert "npm install @huggingface/transformers@" in line

    other = install(tmp_path / "old", **{"onnxruntime-web": "1.2.3"})
    line = refused([str(model), *out, "--transformers_js", str(other)], capsys)
    assert "version 1.2.3" in line and javascript.PACKAGES[1].version in line

    (tmp_path / "full").mkdir()
    (tmp_path / "full/diary.txt").write_text("mine")
    line = refused([str(model), "--out", str(tmp_path / "full"), *installed], capsys)
    assert "not a site folder" in line

    assert "nowhere" in refused([str(tmp_path / "nowhere"), *out, *installed], capsys)

    many = MimRefinerImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.5] * 5, image_std=[0.2] * 5
    )
    save_model_folder(tmp_path / "many", make_encoder(num_channels=5), many)
    assert "5 channels" in refused([str(tmp_path / "many"), *out, *installed], capsys)

    save_model_folder(tmp_path / "wide", make_encoder(), make_processor(16, 32))
    assert "(16, 32)" in refused([str(tmp_path / "wide"), *out, *installed], capsys)
    assert not (tmp_path / "new").exists()


def test_offline_without_the_library_is_one_line(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refused([str(model), "--out", str(tmp_path / "site")], capsys)
    assert "HF_HUB_OFFLINE=1" in line and "--transformers_js" in line


def test_archives_are_held_to_their_sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    packages = []
    for package in javascript.PACKAGES:
        path = tmp_path / "mim_refiner_hf" / Path(package.url).name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w:gz") as archive:
            for name in package.files:
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(name)
                archive.addfile(member, io.BytesIO(name.encode()))
        sha256 = sha256_of(path)
        Record(package.url, size=path.stat().st_size, sha256=sha256).write(path)
        packages.append(
            javascript.Package(*list(vars(package).values())[:3], sha256, package.files)
        )

    with pytest.raises(ValueError, match="has the sha256"):
        javascript.javascript_files(None)
    monkeypatch.setattr(javascript, "PACKAGES", tuple(packages))
    found = javascript.javascript_files(None)
    assert found["transformers.min.js"] == b"dist/transformers.min.js" and len(found) == 4


# --- the arithmetic -------------------------------------------------------------------------------


def test_the_constants_are_those_of_python() -> None:
    homes: dict[str, tuple[Any, ...]] = {
        "k-means.js": (lloyd, starts, confidence),
        "groups.js": (cluster_count,),
    }
    for script, modules in homes.items():
        text = (SCRIPTS / script).read_text()
        constants_ = dict(re.findall(r"^const ([A-Z_]+) = ([\d./ e-]+);$", text, re.MULTILINE))
        assert len(constants_) > 10
        for name, value in constants_.items():
            if name in ("MAX_SAMPLES", "MAX_GUESS"):
                continue
            held = [vars(module).get(f"_{name}", vars(module).get(name)) for module in modules]
            assert eval(value) in held, (script, name)
    assert "const MAX_SAMPLES = 5000;" in (SCRIPTS / "groups.js").read_text()
    assert f"const MAX_GUESS = {_MAX_GUESS};" in (SCRIPTS / "groups.js").read_text()
    assert cluster_count.propose_num_clusters.__kwdefaults__["max_samples"] == 5000
    assert k_means.kmeans.__kwdefaults__["refits"] == 8


def in_node(program: str, folder: Path) -> Any:
    """What a program that imports the scripts prints as JSON."""
    scripts = {path.stem.replace("-", "_"): path.as_uri() for path in SCRIPTS.glob("*.js")}
    lines = [f"const {name} = () => import('{path}');" for name, path in scripts.items()]
    (folder / "program.mjs").write_text("\n".join([*lines, program]))
    node = shutil.which("node")
    assert node is not None
    words = [node, str(folder / "program.mjs")]
    result = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


GROUPS = """
    const { findGroups, propose } = await groups();
    const { readFileSync } = await import('fs');
    const v = new Float32Array(readFileSync('FILE').buffer.slice(0));
    const features = { n: v.length / WIDTH, d: WIDTH, v };
    const found = findGroups(features, null);
    const { entries } = propose(features);
    const [labels, confidence] = [[...found.labels], [...found.confidence]];
    console.log(JSON.stringify({ ...found, labels, confidence, entries }));
"""


@needs_node
def test_groups_and_their_number_are_those_of_python(tmp_path: Path) -> None:
    """The same random numbers, so the same groups: of blurred planted ones, 104 columns wide."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 104, generator=generator)
    rows = centres[torch.arange(120) % 5 % 4] + 1.6 * torch.randn(120, 104, generator=generator)
    # a buffer of its own: node's small files share one
    (tmp_path / "features").write_bytes(rows.numpy().astype("<f4").tobytes())
    program = GROUPS.replace("FILE", str(tmp_path / "features")).replace("WIDTH", "104")
    theirs = in_node(program, tmp_path)

    clustering, why = find_groups(rows, None, 0, "kmeans")
    assert theirs["labels"] == clustering.assignments.tolist()
    assert theirs["reason"] == why.reason
    assert theirs["sizes"] == clustering.counts.tolist()
    np.testing.assert_allclose(theirs["confidence"], clustering.confidence, atol=1e-4)
    ours = [(entry["k"], entry["stability"], entry["silhouette_pca"]) for entry in why.evidence]
    found = [(entry["k"], entry["stability"], entry["silhouette"]) for entry in theirs["entries"]]
    np.testing.assert_allclose(found, ours, atol=1e-3)


SWAPPED = """
    const { kmeans } = await k_means();
    const { readFileSync } = await import('fs');
    const v = new Float32Array(readFileSync('FILE').buffer.slice(0));
    const rows = { n: v.length / 8, d: 8, v };
    const settings = { runs: 1, refits: 0, spherical: false };
    const found = [0, 1, 2].map(seed => kmeans(rows, 60, { ...settings, seed }));
    console.log(JSON.stringify(found.map(({ labels }) => [...labels])));
"""


@needs_node
def test_many_groups_are_those_of_python(tmp_path: Path) -> None:
    """Every planted one is found from one restart, by swaps."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.arange(600) % 60
    rows = 6 * torch.randn(60, 8, generator=generator)[planted]
    rows += torch.randn(600, 8, generator=generator)
    (tmp_path / "rows").write_bytes(rows.numpy().astype("<f4").tobytes())
    found = in_node(SWAPPED.replace("FILE", str(tmp_path / "rows")), tmp_path)
    for seed, theirs in enumerate(found):
        ours = k_means.kmeans(rows, 60, runs=1, refits=0, spherical=False, seed=seed)
        # of two centroids in one place, either may be the one that is swapped
        assert adjusted_rand_score(theirs, ours.assignments) == 1
        assert adjusted_rand_score(planted, ours.assignments) > 0.99


SETTINGS: tuple[dict[str, Any], ...] = (
    {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}},
    {"size": {"height": 16, "width": 16}, "do_center_crop": False, "resample": 2},
    {"size": {"shortest_edge": 16}, "crop_size": {"height": 20, "width": 16}, "resample": 2},
)


@needs_node
def test_pixels_are_those_of_the_image_processor(tmp_path: Path) -> None:
    """Shrunk, stretched, cropped, padded; half a level of 255 apart on average, at most two."""
    program = ["const { encoderPixels } = await pixels();", "const found = [];"]
    expected = []
    for settings in SETTINGS:
        processor = MimRefinerImageProcessor(**settings)
        saved = json.dumps(native_processor(processor).to_dict())
        for width, height in ((61, 40), (9, 13)):
            image = Image.effect_mandelbrot((width, height), (-2, -1.5, 1, 1.5), 60).convert("RGB")
            data = json.dumps(list(image.convert("RGBA").tobytes()))
            image_words = f"{{ width: {width}, height: {height}, data: {data} }}"
            program.append(f"found.push([...encoderPixels({image_words}, {saved})]);")
            expected.append(processor(image, return_tensors="pt")["pixel_values"][0])
    program.append("console.log(JSON.stringify(found));")

    for theirs, ours in zip(in_node("\n".join(program), tmp_path), expected, strict=True):
        levels = (torch.tensor(theirs).view(ours.shape) - ours).abs() * 0.225 * 255
        assert levels.max() <= 2.1 and levels.mean() <= 0.5


# --- the browser ----------------------------------------------------------------------------------

WRITTEN = """(() => {
    const inside = document.querySelector('iframe').contentDocument;
    return [inside.querySelector('header p').textContent, inside.querySelectorAll('h2').length];
})()"""
# a worker as the page starts its own, which asks another host
FOREIGN = """new Promise(done => {
    const lines = `
        const tell = event => postMessage(event.violatedDirective);
        self.addEventListener('securitypolicyviolation', tell);
        fetch('http://localhost:9/').catch(() => {});`;
    const address = URL.createObjectURL(new Blob([lines], { type: 'text/javascript' }));
    const worker = new Worker(address, { type: 'module' });
    worker.onmessage = ({ data }) => done(data);
})"""


def write_pictures(folder: Path, count: int) -> None:
    """Plain pictures of three colours, one that is broken, and a text."""
    folder.mkdir()
    colours = np.array([[200, 40, 40], [40, 180, 60], [40, 60, 200]])
    for i in range(count):
        noise = np.random.default_rng(i).integers(-20, 20, (24, 30, 3))
        pixels = (colours[i % 3] + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not one either")


@needs_chromium
@pytest.mark.slow
@pytest.mark.skipif(not PACKAGES.is_dir(), reason="TRANSFORMERS_JS names no folder")
def test_in_a_browser(model: Path, tmp_path: Path) -> None:
    """Files in, groups out, a table that `cluster --start` reads; and again without the server."""
    words = ["--out", str(tmp_path / "site"), "--transformers_js", str(PACKAGES)]
    assert main(["page", str(model), *words]) == 0
    write_pictures(tmp_path / "pictures", 60)

    chromium = Chromium(tmp_path / "profile")
    try:
        with served(tmp_path / "site") as address:
            chromium.call("/url", {"url": f"{address}/"})
            chromium.wait("document.documentElement.dataset.ready", 120)
            assert chromium.run(FOREIGN) == "connect-src"
            chromium.errors()
            group_pictures(chromium, tmp_path)
            assert not chromium.errors()

        # there is no server any more
        chromium.run("location.reload()")
        chromium.wait("document.documentElement.dataset.ready", 120)
        group_pictures(chromium, tmp_path)
    finally:
        chromium.quit()


def group_pictures(chromium: Chromium, folder: Path) -> None:
    """Three groups of 60 pictures, and the table of them."""
    down = folder / "down"
    shutil.rmtree(down, ignore_errors=True)
    allowed = {"behavior": "allow", "downloadPath": str(down)}
    chromium.call("/goog/cdp/execute", {"cmd": "Browser.setDownloadBehavior", "params": allowed})
    chromium.type("#number", "3")
    chromium.type("#folder-input", str(folder / "pictures"))
    chromium.wait("document.documentElement.dataset.groups", 120)
    note, headings = chromium.run(WRITTEN)
    assert note.startswith(
        "60 images in 3 groups (as asked for); 1 could not be read; 1 other file"
    )
    assert headings == 3

    chromium.click("#table")
    table = down / "groups.csv"
    while not table.is_file():
        chromium.wait("true")
    corrections = read_corrections(table)
    assert len(corrections.group_of) == 60 and len(corrections.names) == 3
    groups = [corrections.group_of[f"pictures/{i:02d}.png"] for i in range(60)]
    assert groups == groups[:3] * 20
    with table.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert list(rows[0]) == ["path", "cluster", "confidence"]
    assert all(0 < float(row["confidence"]) <= 1 for row in rows)
