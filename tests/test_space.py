"""The Space in examples/space.

Its functions, its HTTP API on a server of its own, and its page in a real headless Chromium.

    pip install -e ".[space]"
    SCREENSHOTS=/tmp/shots python -m pytest -n 0 tests/test_space.py       # keeps the pictures

The two models are tiny and random: what is tested is that the page shows what the package computes,
and what it does with wrong input. The browser is `chromium.py`'s, which says what to install.
"""

import configparser
import contextlib
import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from chromium import Chromium, free_port, needs_chromium
from PIL import Image
from scipy.optimize import linear_sum_assignment
from transformers import pipeline

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel, load_encoder
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.publishing.hub import save_model_folder
from mim_refiner_hf.runs.verdict import Verdict

gradio = pytest.importorskip("gradio", reason='needs gradio: pip install -e ".[space]"')
gradio_client = pytest.importorskip("gradio_client")

ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "examples/space"
COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
HOSTILE = "<img src=x onerror=alert(1)>.png"
COMPONENTS = ("note", "scores", "sides", "downloads", "numbers")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny model folders with different weights."""
    root = tmp_path_factory.mktemp("models")
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    processor = MimRefinerImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    for seed, side in enumerate(("before", "after")):
        torch.manual_seed(seed)
        save_model_folder(
            root / side,
            MimRefinerModel(MimRefinerConfig(**shape, image_size=16, patch_size=8)),
            processor,
        )
    return {side: root / side for side in ("before", "after")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """24 images of three colours, eight each, in several formats, one with a name that hurts.

    And a text file called .png.
    """
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    names = [
        HOSTILE,
        "été 猫.jpg",
        *(
            f"{i}.{kind}"
            for i, kind in zip(range(2, 24), ("png", "webp", "bmp", "gif") * 6, strict=False)
        ),
    ]
    for i, name in enumerate(names):
        pixels = (
            (COLOURS[i % 3] + random.integers(-30, 30, (70, 60, 3))).clip(0, 255).astype(np.uint8)
        )
        Image.fromarray(pixels).save(folder / name)
    (folder / "letter.png").write_text("Dear Sir or Madam")
    return [*(folder / name for name in names), folder / "letter.png"]


@pytest.fixture(scope="module")
def app() -> ModuleType:
    """`app.py` as a module."""
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(SPACE))  # as Python does for a script
    spec.loader.exec_module(module)
    sys.path.remove(str(SPACE))
    return module


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's folder for temporary files."""
    return tmp_path_factory.mktemp("server")


def wait_for(
    address: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 300
) -> None:
    """Until a server answers; the imports take long on a busy machine."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=10).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)


@pytest.fixture(scope="module")
def address(models: dict[str, Path], temporary: Path) -> Iterator[str]:
    """A server started by the command of the manual, offline."""
    port = free_port()
    settings = {
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(temporary / "gradio"),
        "TMPDIR": str(temporary),
    }
    environment = {
        **os.environ,
        **settings,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        str(SPACE / "app.py"),
        "--before",
        str(models["before"]),
        "--after",
        str(models["after"]),
    ]
    with (temporary / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=temporary)
    try:
        wait_for(f"http://127.0.0.1:{port}/", process, temporary / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def client(address: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return gradio_client.Client(
        address,
        verbose=False,
        download_files=str(tmp_path_factory.mktemp("downloads")),
        analytics_enabled=False,
    )


def call(client: Any, endpoint: str, what: Any, num_clusters: float) -> dict[str, Any]:
    return dict(zip(COMPONENTS, client.predict(what, num_clusters, api_name=endpoint), strict=True))


def upload(client: Any, paths: list[Path], num_clusters: float) -> dict[str, Any]:
    return call(
        client, "/upload", [gradio_client.handle_file(str(path)) for path in paths], num_clusters
    )


def table(shown: dict[str, Any]) -> list[dict[str, str]]:
    (path,) = [path for path in shown["downloads"] if Path(path).name == "groups.csv"]
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """What a browser makes of the HTML.

    The tags, and per column and group the titles of the tiles.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.sides: list[list[list[str]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags[tag] += 1
        assert not any(name.startswith("on") for name in values), values
        if values.get("class") == "side":
            self.sides.append([])
        elif values.get("class") == "group":
            self.sides[-1].append([])
        elif str(values.get("class", "")).startswith("tile") and tag == "span":
            self.sides[-1][-1].append(str(values["title"]))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_a_sample_set_shows_both_models_groups_and_scores_them(
    client: Any, models: dict[str, Path]
) -> None:
    shown = call(client, "/sample", "digits", 10)
    digits = open_images("digits", split="test")
    rows, numbers = table(shown), shown["numbers"]
    assert (
        numbers["num_images"] == len(rows) == 500
        and numbers["num_clusters"] == 10
        and numbers["broken"] == []
    )
    page = Page(shown["sides"])
    for column, side in enumerate(("before", "after")):
        groups = [int(row[f"cluster_{side}"]) for row in rows]
        pipe = pipeline("image-clustering", model=str(models[side]))
        assert groups == [entry["cluster"] for entry in pipe(digits, num_clusters=10)]
        assert numbers[side]["sizes"] == [groups.count(group) for group in range(10)]
        counts = np.zeros((10, 10))
        np.add.at(counts, (groups, digits.labels), 1)
        accuracy = counts[linear_sum_assignment(-counts)].sum() / 500
        assert numbers[side]["cluster_accuracy"] == pytest.approx(accuracy)
        assert f"{100 * accuracy:.1f} %" in shown["scores"]
        assert [len(tiles) for tiles in page.sides[column]] == [
            min(size, 36) for size in numbers[side]["sizes"]
        ]
        confidences = [[int(title.split()[-2]) for title in tiles] for tiles in page.sides[column]]
        assert all(tiles == sorted(tiles, reverse=True) for tiles in confidences)
    assert "| verdict |" in shown["scores"]
    assert "500 images in 10 groups (as asked for)" in shown["note"]
    names = sorted(Path(path).name for path in shown["downloads"])
    assert names == ["groups-after.html", "groups-before.html", "groups.csv"]


def test_the_number_of_groups_is_proposed_or_said_to_be_unclear(client: Any) -> None:
    shown = call(client, "/sample", "digits", 0)
    numbers = shown["numbers"]
    assert not numbers["clear"] and "no clear answer" in numbers["reason"]  # random features
    note = Page(shown["note"])
    assert numbers["reason"] in note.text and 'class="note unclear"' in shown["note"]
    assert (
        len(numbers["before"]["sizes"]) == len(numbers["after"]["sizes"]) == numbers["num_clusters"]
    )


def test_uploads_are_grouped_and_what_is_broken_is_named(
    client: Any, photos: list[Path], temporary: Path
) -> None:
    shown = upload(client, photos, 3)
    numbers, rows, names = shown["numbers"], table(shown), [path.name for path in photos[1:-1]]
    assert numbers["broken"] == ["letter.png"] and "letter.png" in Page(shown["note"]).text
    assert [row["image"] for row in rows] == [
        "img src=x onerror=alert(1).png",
        *names,
    ]  # gradio_client drops < and >
    groups = [int(row["cluster_after"]) for row in rows]
    assert all(len(set(groups[colour::3])) == 1 for colour in range(3)) and len(set(groups)) == 3
    # nothing that would take labels
    assert set(numbers["after"]) == {
        "rankme",
        "neighbour_agreement",
        "sizes",
    }
    assert 0 <= numbers["after"]["neighbour_agreement"] <= 1
    page = Page(shown["sides"])
    assert page.tags["img"] == 2 * (24 + 1) and page.tags["script"] == 0
    assert not any(
        str(temporary) in Path(path).read_text(encoding="utf-8") for path in shown["downloads"]
    )
    assert not list(temporary.glob("mim-refiner-space-*"))


def test_an_upload_is_refined_and_judged(client: Any, photos: list[Path]) -> None:
    files = [gradio_client.handle_file(str(path)) for path in photos]
    shown = call(client, "/refine", files, 3)
    judged = shown["numbers"]["verdict"]
    assert judged["outcome"] in ("better", "not better") and judged["photos"].startswith("24 ")
    assert Page(shown["sides"]).tags["img"] == 2 * (24 + 1)
    assert "letter.png" in Page(shown["note"]).text

    # the criterion's values
    scores = shown["scores"]
    assert scores.startswith(f"### {judged['outcome'].capitalize()}")
    assert judged["reason"][1:] in scores and "| change (95 %) | verdict |" in scores
    for side in ("before", "after"):
        assert f"{judged[side]['separation']:.2f}" in scores

    models = [path for path in shown["downloads"] if Path(path).name == "model.zip"]
    assert bool(models) == (judged["outcome"] == "better")


def test_a_model_that_got_better_can_be_taken_along(
    app: ModuleType,
    models: dict[str, Path],
    photos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One encoder is shown, so that is the start; what a run leaves stands in for the run."""
    better = load_encoder(models["after"])

    def run(images: Any, *, model: Any, output_dir: str, **settings: Any) -> SimpleNamespace:
        assert len(images) == 24 and model is start
        shutil.copytree(models["after"], Path(output_dir) / "model")
        return SimpleNamespace(verdict=Verdict("better", "d' 1 -> 2", "24"), refined=better)

    monkeypatch.setattr(app, "refine", run)
    start = load_encoder(models["before"])
    files = [{"path": str(path), "orig_name": path.name} for path in photos]
    collection = app.uploaded(files, 3)
    refined = app.refine_here(collection, {"after": start}, 3, lambda *_, **__: None)
    with contextlib.closing(refined) as outputs:
        shown = dict(zip(COMPONENTS, next(outputs), strict=True))
        with zipfile.ZipFile(shown["downloads"][0]) as archive:
            archive.extractall(tmp_path)
    assert shown["scores"] == "### Better\n\nD' 1 -> 2."
    assert not Path(shown["downloads"][0]).exists()
    taken = load_encoder(tmp_path).state_dict()
    assert all(torch.equal(tensor, taken[name]) for name, tensor in better.state_dict().items())


def test_a_refinement_of_too_few_or_for_too_long_is_refused(
    app: ModuleType, client: Any, photos: list[Path]
) -> None:
    files = [gradio_client.handle_file(str(path)) for path in photos[1:4]]
    with pytest.raises(gradio_client.exceptions.AppError, match=r"3 images .* takes 20 or more"):
        call(client, "/refine", files, 3)

    told: list[str] = []
    began = time.monotonic()
    app.tell_refinement(lambda _, desc: told.append(desc), began, 10, {"seconds_left": 90.0})
    assert told == ["Refining: step 10, about 1.5 minutes left"]
    with pytest.raises(ValueError, match="about 60 minutes here, and 15 are allowed"):
        app.tell_refinement(print, began, 10, {"seconds_left": 3600.0})


@pytest.mark.parametrize(
    ("chosen", "num_clusters", "sentence"),
    [
        ([], 3, "0 images: give 2 to 500"),
        ([0], 0, "1 images: give 2 to 500"),
        (
            [1, 2, 3],
            5,
            "num_clusters is 5 for 3 images; allowed are 1 to 3 with method 'kmeans', or leave it "
            "out.",
        ),
        ([1, 2, 3], -1, "num_clusters is -1 for 3 images"),
        ([1, 2, 3], 1.5, "The number of groups is 1.5; give a whole number"),
        ([1, -1], 0, "Only 1 of these images can be read"),
        (
            [-1, -1],
            None,
            "None of the 2 images can be read; the first, 0: Cannot decode letter.png: it is no "
            "image of a known format",
        ),
    ],
)
def test_wrong_input_gets_one_sentence(
    client: Any, photos: list[Path], chosen: list[int], num_clusters: float, sentence: str
) -> None:
    with pytest.raises(gradio_client.exceptions.AppError) as error:
        upload(client, [photos[i] for i in chosen], num_clusters)
    assert (
        sentence in str(error.value)
        and str(photos[0].parent) not in str(error.value)
        and "/gradio/" not in str(error.value)
    )


def test_a_request_cannot_name_files_of_the_server(address: str, photos: list[Path]) -> None:
    files = [
        {"path": str(path), "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
        for path in photos[1:3]
    ]
    request = urllib.request.Request(
        f"{address}/gradio_api/call/upload", json.dumps({"data": [files, 0]}).encode()
    )
    request.add_header("Content-Type", "application/json")
    event = json.load(urllib.request.urlopen(request, timeout=60))["event_id"]
    answer = (
        urllib.request.urlopen(f"{address}/gradio_api/call/upload/{event}", timeout=60)
        .read()
        .decode()
    )
    assert answer.startswith("event: error"), answer[:300]


def test_two_images_are_enough_and_501_are_too_many(
    app: ModuleType, client: Any, photos: list[Path]
) -> None:
    assert upload(client, photos[1:3], 0)["numbers"]["num_images"] == 2
    with pytest.raises(ValueError, match="501 images: give 2 to 500"):
        app.uploaded([{"path": str(photos[0]), "orig_name": "a.png"}] * 501, 3)


def test_one_model_shows_one_side_and_names_stay_text(
    app: ModuleType, models: dict[str, Path], photos: list[Path]
) -> None:
    collection = app.uploaded([{"path": str(path), "orig_name": HOSTILE} for path in photos], 3)
    with contextlib.closing(
        app.compare(collection, {"after": load_encoder(models["after"])}, 3, lambda *_, **__: None)
    ) as outputs:
        shown = dict(zip(COMPONENTS, next(outputs), strict=True))
        pages = [
            Path(path).read_text(encoding="utf-8")
            for path in shown["downloads"]
            if path.endswith(".html")
        ]
        names = {row["image"] for row in table(shown)}
    assert not any(Path(path).exists() for path in shown["downloads"])
    page = Page(shown["sides"])
    assert len(page.sides) == 1 and "before" not in shown["numbers"]
    assert "verdict" not in shown["scores"] and "| metric | after |" in shown["scores"]
    assert page.tags["img"] == 24 + 1 and all(
        title.startswith(HOSTILE) for tiles in page.sides[0] for title in tiles
    )
    assert Page(shown["note"]).tags["img"] == 0 and HOSTILE in Page(shown["note"]).text
    assert len(pages) == 1 and "<img src=x" not in pages[0] and names == {HOSTILE}


def test_without_options_the_quickstarts_models_are_taken(
    app: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs: list[Any] = []
    monkeypatch.setattr(app, "refine", lambda recipe: runs.append(recipe))
    assert app.choose_models(None, None) == {"after": "outputs/quickstart/model"}
    assert [recipe.recipe for recipe in runs] == ["quickstart"]
    for side in ("model", "pretrained"):
        (tmp_path / "outputs/quickstart" / side).mkdir(parents=True)
    assert app.choose_models(None, None) == {
        "before": "outputs/quickstart/pretrained",
        "after": "outputs/quickstart/model",
    }
    assert app.choose_models("user/a", None) == {
        "before": "user/a",
        "after": "outputs/quickstart/model",
    }
    assert app.choose_models(None, "user/b") == {"after": "user/b"}
    assert len(runs) == 1


def test_wrong_options_are_refused(
    app: ModuleType, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(models["after"])
    for options, sentence in (
        (["--after", "no/such/model"], "no/such/model"),
        (["--after", model, "--sample", "cats"], "--sample cats: give a name and a folder"),
        (
            ["--after", model, "--sample", "cats=/no/such/folder"],
            "No file or folder '/no/such/folder'",
        ),
    ):
        assert app.main(options) == 2
        assert sentence in capsys.readouterr().err


def test_the_card_and_the_requirements_are_true() -> None:
    _, head, text = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(head)
    assert (
        card["sdk"] == "gradio"
        and (SPACE / card["app_file"]).is_file()
        and card["license"] == "apache-2.0"
    )
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = (
        setup["options"]["install_requires"].split()
        + setup["options.extras_require"]["space"].split()
    )
    listed = (SPACE / "requirements.txt").read_text().splitlines()
    assert [line for line in listed if line and not line.startswith("#")] == wanted
    assert re.search(r"gradio>=(\d+)", " ".join(wanted))[1] == card["sdk_version"].split(".")[0]  # type: ignore[index]
    assert "python examples/space/app.py" in text


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    chromium = Chromium(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.quit()


def columns_out_of_sight(browser: Chromium, width: int) -> list[str]:
    """Headings of the table of scores that reach beyond its box in a window of this width."""
    browser.call("/window/rect", {"width": width, "height": 950})
    browser.wait(f"Math.abs(innerWidth - {width}) < 20")
    found: list[str] = browser.run(
        "(() => { const edge = document.querySelector('#scores').getBoundingClientRect().right;"
        "return [...document.querySelectorAll('#scores th')]"
        ".filter(cell => cell.getBoundingClientRect().right > edge + 1)"
        ".map(cell => cell.textContent) })()"
    )
    return found


@pytest.mark.slow
@needs_chromium
def test_the_page_in_a_browser(
    browser: Chromium, address: str, photos: list[Path], tmp_path: Path
) -> None:
    browser.call("/url", {"url": address})
    browser.wait("document.querySelector('#group-sample') !== null")
    browser.photograph("space-start", tmp_path)
    browser.type("input[type=number]", "10")
    browser.click("#group-sample")
    browser.wait("document.querySelectorAll('.group').length === 20")
    assert browser.run("document.querySelectorAll('.side').length") == 2
    assert browser.run(
        "[...document.querySelectorAll('#sides img')].every(one => one.complete && "
        "one.naturalWidth > 0)"
    )
    browser.wait("document.querySelectorAll('#scores td').length > 4")
    browser.photograph("space-sample", tmp_path)
    assert columns_out_of_sight(browser, 1280) == []

    browser.run(
        "[...document.querySelectorAll('[role=tab]')].find(tab => tab.textContent.trim() === 'Your "
        "images').click()"
    )
    browser.wait("document.querySelector('input[type=file]') !== null")
    browser.type("input[type=file]", "\n".join(map(str, photos)))
    browser.wait("document.querySelectorAll('[role=tabpanel] .file-preview tr').length === 25")
    browser.click("#group-upload")
    browser.wait("document.querySelector('.note.broken') !== null")
    assert "letter.png" in browser.run("document.querySelector('.note.broken').textContent")
    titles = browser.run("[...document.querySelectorAll('.tile')].map(tile => tile.title)")
    assert sum(title.startswith(HOSTILE) for title in titles) == 2
    assert browser.run("document.querySelectorAll('img[src=x]').length") == 0
    browser.photograph("space-upload", tmp_path)

    browser.click("#refine-upload")
    browser.wait("document.querySelector('#scores h3') !== null", seconds=600)
    assert "etter" in browser.run("document.querySelector('#scores h3').textContent")
    assert columns_out_of_sight(browser, 1280) == []
    browser.photograph("space-refined", tmp_path)
    hosts = browser.run(
        "[...new Set(performance.getEntriesByType('resource').map(one => new URL(one.name).host))]"
    )
    assert set(hosts) <= {address.removeprefix("http://"), ""}
    assert not browser.errors()
