"""The groups' page in a real headless Chromium: 5 000 CIFAR images, opened, clicked, searched, steered by keys, photographed.

    apt-get install chromium chromium-driver
    CLUSTER_SCREENSHOTS=/tmp/shots python -m pytest -s tests/test_cluster_browser.py       # keeps the pictures, prints the times

Chromium is driven through chromedriver in the W3C's WebDriver protocol: JSON over HTTP, so no further library is needed.
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mim_refiner_hf.clustering import kmeans
from mim_refiner_hf.data import open_images
from mim_refiner_hf.publishing.cluster_page import Tile, by_confidence, choose_shown, render_page, thumbnail

COUNT, GROUPS = 5000, 20
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1500,950"
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key for a reference
ESCAPE, END, RIGHT, DOWN, ENTER = "\ue00c", "\ue010", "\ue014", "\ue015", "\ue007"

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs chromium and chromedriver on the PATH"
)


class Chromium:
    """One window of a fresh profile."""

    def __init__(self, profile: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [str(shutil.which("chromedriver")), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.address = f"http://127.0.0.1:{port}/session"
        options = {"binary": shutil.which("chromium"), "args": [*FLAGS.split(), f"--user-data-dir={profile}"]}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        for _ in range(100):
            try:
                session = self.call("", {"capabilities": {"alwaysMatch": capabilities}})
                break
            except ConnectionError:
                time.sleep(0.2)
        self.address += f"/{session['sessionId']}"

    def call(self, command: str, body: dict[str, Any] | None = None) -> Any:
        """POST with a body, GET without."""
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(self.address + command, data, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[:500]) from error
        except urllib.error.URLError as error:
            raise ConnectionError from error

    def run(self, script: str) -> Any:
        return self.call("/execute/sync", {"script": f"return {script}", "args": []})

    def click(self, css: str) -> None:
        found = self.call("/element", {"using": "css selector", "value": css})
        self.call(f"/element/{found[ELEMENT]}/click", {})

    def press(self, keys: str) -> None:
        """Real key events to whatever has the focus."""
        ups_and_downs = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": ups_and_downs}]})

    def point(self, x: int, y: int) -> None:
        move = {"type": "pointerMove", "duration": 0, "x": x, "y": y}
        self.call("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def photograph(self, name: str, folder: Path) -> None:
        folder = Path(os.environ.get("CLUSTER_SCREENSHOTS", folder))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(base64.b64decode(self.call("/screenshot")))

    def quit(self) -> None:
        urllib.request.urlopen(urllib.request.Request(self.address, method="DELETE"), timeout=60).close()
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture(scope="module")
def page(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 5 000 images; the features are coarse colours, which is enough to look at."""
    images = open_images(str(shared / "data/cifar10/train.parquet")).subset(range(COUNT))
    pictures = [images[i].image for i in range(COUNT)]
    features = torch.stack([torch.tensor(list(picture.resize((4, 4)).tobytes())).float() for picture in pictures]) - 120
    found = kmeans(features, GROUPS, runs=2)
    groups, scores = found.assignments.tolist(), found.confidence.tolist()
    shown = choose_shown(by_confidence(groups, scores))
    names = [f"photos/{images.class_names[images[i].label]}-{i:04d}.jpg" for i in range(COUNT)] if images.class_names else []
    names = names or [f"photos/{i:04d}.jpg" for i in range(COUNT)]
    tiles = [Tile(names[i], groups[i], scores[i], thumbnail(pictures[i]), f"group/{i}.jpg") for i in shown]
    path = tmp_path_factory.mktemp("page") / "index.html"
    note = f"{COUNT} images in {GROUPS} groups (as asked for)"
    path.write_text(render_page("cifar10", note, tiles, features[shown], found.counts.tolist()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    chromium = Chromium(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.quit()


def test_five_thousand_images_open_fast_and_stay_usable(browser: Chromium, page: Path, tmp_path: Path) -> None:
    browser.call("/url", {"url": page.as_uri()})
    ready = int(browser.run("document.documentElement.dataset.ready"))
    print(f"{COUNT} images, {page.stat().st_size / 1e6:.1f} MB: ready after {ready} ms")
    assert ready < 3000
    assert browser.run("document.querySelectorAll('nav a').length") == GROUPS
    assert browser.run("document.querySelectorAll('.tile').length") > 200
    assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    browser.photograph("overview", tmp_path)

    browser.click("nav a:nth-child(2)")  # a group
    assert browser.run("location.hash") == "#group=1"
    size = browser.run("data.sizes[1]")
    assert browser.run("[...document.querySelectorAll('.tile')].every(tile => data.group[tile.dataset.image] === 1)")
    browser.press(RIGHT + RIGHT + DOWN)  # into the sheet and on
    first = browser.run("Number(document.activeElement.dataset.image)")
    assert browser.run("starts[1]") < first and browser.run("document.querySelector('#detail p').textContent").startswith(
        "photos/"
    )
    browser.press(END)  # everything there is gets built
    assert browser.run("document.querySelectorAll('.tile').length") == size
    assert browser.run("Number(document.activeElement.dataset.image)") == browser.run("starts[1]") + size - 1
    browser.press("j")
    assert browser.run("location.hash") == "#group=2" and browser.run("data.group[document.activeElement.dataset.image]") == 2
    browser.photograph("group", tmp_path)

    browser.press(ENTER)  # images like this one
    assert browser.run("location.hash") == f"#like={browser.run('starts[2]')}"
    assert browser.run("document.querySelectorAll('.tile').length") == 100
    browser.photograph("similar", tmp_path)
    browser.run("history.back()")
    time.sleep(0.5)
    assert browser.run("location.hash") == "#group=2" and browser.run("active") == 2

    browser.press("/")  # by name
    browser.press("0012")
    assert browser.run("location.hash") == "#find=0012"
    assert browser.run("document.querySelectorAll('.tile').length") == 1
    browser.press(ESCAPE)
    assert browser.run("location.hash") == "" and browser.run("document.querySelector('#find').value") == ""

    x, y = browser.run(
        "(() => { const box = map.getBoundingClientRect(), [x, y] = place(7); "
        "return [Math.round(box.left + x * box.width), Math.round(box.top + y * box.height)]; })()"
    )
    browser.point(x, y)  # a point of the map
    assert browser.run("!hover.hidden && hover.querySelector('img').naturalWidth > 0")
    browser.photograph("map", tmp_path)
    browser.press("+")
    assert browser.run("view.zoom") == 1.25
    slowest = browser.run(
        "Math.max(...starts.map((_, g) => { const t = performance.now(); location.hash = `#group=${g}`; route(); "
        "sheet.offsetHeight; return performance.now() - t; }))"
    )
    print(f"slowest group shown after {slowest:.0f} ms")
    assert slowest < 1000
    assert browser.run("performance.getEntriesByType('resource').filter(one => !one.name.startsWith('data:')).length") == 0
    errors = [entry for entry in browser.call("/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]
    assert not errors
