"""The groups' page in a real headless Chromium.

5 000 CIFAR images, opened, clicked, searched, steered by keys, photographed.

    # keeps the pictures, prints the times
    SCREENSHOTS=/tmp/shots python -m pytest -s tests/test_cluster_browser.py

The browser is `chromium.py`'s, which says what to install.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chromium import DOWN, END, ENTER, ESCAPE, RIGHT, Chromium, needs_chromium

from mim_refiner_hf.clustering.k_means import kmeans
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.publishing.cluster_page import (
    Tile,
    by_confidence,
    choose_shown,
    jpeg_thumbnail,
    render_page,
)

COUNT, GROUPS = 5000, 20

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def page(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 5 000 images; the features are coarse colours, which is enough to look at."""
    images = open_images(str(shared / "data/cifar10/train.parquet")).subset(range(COUNT))
    pictures = [images[i].image for i in range(COUNT)]
    features = (
        torch.stack(
            [torch.tensor(list(picture.resize((4, 4)).tobytes())).float() for picture in pictures]
        )
        - 120
    )
    found = kmeans(features, GROUPS, runs=2)
    groups, scores = found.assignments.tolist(), found.confidence.tolist()
    shown = choose_shown(by_confidence(groups, scores))
    names = (
        [f"photos/{images.class_names[images[i].label]}-{i:04d}.jpg" for i in range(COUNT)]
        if images.class_names
        else []
    )
    names = names or [f"photos/{i:04d}.jpg" for i in range(COUNT)]
    tiles = [
        Tile(names[i], groups[i], scores[i], jpeg_thumbnail(pictures[i]), f"group/{i}.jpg")
        for i in shown
    ]
    path = tmp_path_factory.mktemp("page") / "index.html"
    note = f"{COUNT} images in {GROUPS} groups (as asked for)"
    path.write_text(
        render_page("cifar10", note, tiles, features[shown], found.counts.tolist()),
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    chromium = Chromium(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.quit()


def test_five_thousand_images_open_fast_and_stay_usable(
    browser: Chromium, page: Path, tmp_path: Path
) -> None:
    browser.call("/url", {"url": page.as_uri()})
    ready = int(browser.run("document.documentElement.dataset.ready"))
    print(f"{COUNT} images, {page.stat().st_size / 1e6:.1f} MB: ready after {ready} ms")
    assert ready < 3000
    assert browser.run("document.querySelectorAll('nav a').length") == GROUPS
    assert browser.run("document.querySelectorAll('.tile').length") > 200
    assert browser.run(
        "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
    )
    browser.photograph("overview", tmp_path)

    browser.click("nav a:nth-child(2)")  # a group
    assert browser.run("location.hash") == "#group=1"
    size = browser.run("data.sizes[1]")
    assert browser.run(
        "[...document.querySelectorAll('.tile')].every(tile => data.group[tile.dataset.image] === "
        "1)"
    )
    browser.press(RIGHT + RIGHT + DOWN)  # into the sheet and on
    first = browser.run("Number(document.activeElement.dataset.image)")
    assert browser.run("starts[1]") < first and browser.run(
        "document.querySelector('#detail p').textContent"
    ).startswith("photos/")
    # everything there is gets built
    browser.press(END)
    assert browser.run("document.querySelectorAll('.tile').length") == size
    assert (
        browser.run("Number(document.activeElement.dataset.image)")
        == browser.run("starts[1]") + size - 1
    )
    browser.press("j")
    assert (
        browser.run("location.hash") == "#group=2"
        and browser.run("data.group[document.activeElement.dataset.image]") == 2
    )
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
    assert (
        browser.run("location.hash") == ""
        and browser.run("document.querySelector('#find').value") == ""
    )

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
        "Math.max(...starts.map((_, g) => { const t = performance.now(); location.hash = "
        "`#group=${g}`; route(); "
        "sheet.offsetHeight; return performance.now() - t; }))"
    )
    print(f"slowest group shown after {slowest:.0f} ms")
    assert slowest < 1000
    assert (
        browser.run(
            "performance.getEntriesByType('resource').filter(one => "
            "!one.name.startsWith('data:')).length"
        )
        == 0
    )
    assert not browser.errors()
