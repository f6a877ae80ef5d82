"""The groups' page in a real headless Chromium.

5 000 CIFAR images, opened, clicked, searched, steered by keys, photographed.

    # keeps the pictures, prints the times
    SCREENSHOTS=/tmp/shots python -m pytest -s tests/test_cluster_browser.py

Then groups of four colours are corrected by hand, saved, and taken back by `cluster --start`.

The browser is `chromium.py`'s, which says what to install.
"""

import csv
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chromium import DOWN, END, ENTER, ESCAPE, RIGHT, Chromium, needs_chromium
from small_store import make_encoder, make_processor
from test_corrections import HOSTILE, draw

from mim_refiner_hf import cli
from mim_refiner_hf.clustering.k_means import kmeans
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.publishing import save_model_folder
from mim_refiner_hf.publishing.cluster_page import (
    Tile,
    by_confidence,
    choose_shown,
    jpeg_thumbnail,
    render_page,
)
from mim_refiner_hf.publishing.corrections import read_corrections
from mim_refiner_hf.publishing.csv_cells import text_of

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


# --- corrections


def grouped(images: Path, out: Path, *more: str) -> Path:
    """The page of a folder of images."""
    words = ["cluster", str(images), "--model", str(images.parent / "model"), "--out", str(out)]
    assert cli.main([*words, *more]) == 0
    return out / "index.html"


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Ten pictures of each of four colours, names that hurt, one that cannot be read, twins."""
    save_model_folder(tmp_path / "model", make_encoder(), make_processor())
    folder = tmp_path / "photos"
    for kind, name in enumerate(("red", "green", "blue", "yellow")):
        for i in range(10):
            draw(folder / f"{name}-{i}.png", kind, 100 * kind + i)
    for i, name in enumerate((*HOSTILE, "a\u202egnp.\x1b.png", 'a,"b"\n.png')):
        draw(folder / name, 0, 700 + i)
    (folder / "green-0b.png").write_bytes((folder / "green-0.png").read_bytes())
    (folder / "<b>cut.png").write_bytes(b"cut")
    return folder


def show(browser: Chromium, page: Path, downloads: Path) -> None:
    """Open a page, with downloads going to a folder."""
    settings = {"behavior": "allow", "downloadPath": str(downloads)}
    command = {"cmd": "Browser.setDownloadBehavior", "params": settings}
    browser.call("/goog/cdp/execute", command)
    browser.call("/url", {"url": page.as_uri()})


def save(browser: Chromium, downloads: Path) -> Path:
    """What the button saves."""
    browser.click("#save")
    file = downloads / "corrected.csv"
    end = time.monotonic() + 30
    while not file.is_file() and time.monotonic() < end:
        time.sleep(0.1)
    return file


def choose(browser: Chromium, css: str, words: str) -> None:
    """An entry of a list, by a part of its words, as a person chooses it."""
    browser.run(
        f"(() => {{ const list = document.querySelector('{css}'); list.value = "
        f"[...list.options].find(one => one.text.includes('{words}')).value; "
        "list.dispatchEvent(new Event('change')); })()"
    )


def group_with(browser: Chromium, name: str) -> int:
    """The number of the group in which an image is."""
    found = browser.run(f"data.group[data.name.findIndex(one => one.endsWith('{name}'))]")
    return int(found)


def go_to(browser: Chromium, group: int) -> None:
    browser.click(f'nav a[data-group="{group}"]')
    browser.wait(f"active == {group} && document.querySelector('#name') !== null")


def test_groups_are_corrected_saved_and_taken_back(
    browser: Chromium, colours: Path, tmp_path: Path
) -> None:
    """Rename, merge, move, leave out, undo, save; then new images, from the corrected groups."""
    page = grouped(colours, tmp_path / "first", "--num_clusters", "4")
    show(browser, page, tmp_path / "down")
    assert browser.run("document.querySelectorAll('nav a').length") == 4

    # rename, which refuses a name that is taken, and none
    red = group_with(browser, "red-0.png")
    go_to(browser, red)
    browser.run("document.querySelector('#name').value = ''")
    browser.click("#rename")
    assert "1 to 200 letters" in browser.run("said.value")
    browser.run(f"document.querySelector('#name').value = data.names[{(red + 1) % 4}]")
    browser.click("#rename")
    assert "merge the two groups instead" in browser.run("said.value")
    browser.run("document.querySelector('#name').value = ''")
    browser.type("#name", '=red, "mine" <b>été')
    browser.press(ENTER)
    assert browser.run(f"data.names[{red}]") == '=red, "mine" <b>été'
    assert browser.run("document.querySelectorAll('nav b, h2 b').length") == 0
    assert "<b>été" in browser.run("document.querySelector('nav [aria-current]').textContent")

    # merge green into blue, and give the union a name
    green, blue = group_with(browser, "green-1.png"), group_with(browser, "blue-1.png")
    go_to(browser, green)
    choose(browser, "#merge", browser.run(f"data.names[{blue}]"))
    assert browser.run("active") == blue and browser.run("data.sizes[active]") == 21
    browser.run("document.querySelector('#name').value = 'the rest'")
    browser.click("#rename")
    assert browser.run("document.querySelectorAll('nav a').length") == 3

    # mark two yellow ones and move them together; leave one out and take it back; leave one out
    go_to(browser, group_with(browser, "yellow-1.png"))
    yellow = browser.run("active")
    first, second, third = browser.run(f"members[{yellow}].slice(0, 3)")
    for image in (first, second):
        browser.click(f'.tile[data-image="{image}"]')
        browser.press("x")
    assert "2 images marked" in browser.run("said.value")
    browser.photograph("marked", tmp_path)
    choose(browser, "#move", "=red")
    assert browser.run(f"[data.group[{first}], data.group[{second}]]") == [red, red]
    browser.click(f'.tile[data-image="{third}"]')
    browser.press("l")
    assert browser.run(f"data.group[{third}]") == -1
    browser.press("u")
    assert browser.run(f"data.group[{third}]") == yellow
    browser.click(f'.tile[data-image="{third}"]')
    browser.click("#leave")
    assert "1 left out" in browser.run("lists.textContent")
    browser.run("location.hash = 'left'")
    browser.wait("document.querySelectorAll('.tile').length === 1")
    names = browser.run(f"[{first}, {second}, {third}].map(i => data.name[i])")

    # one into a group of its own
    last = group_with(browser, "yellow-9.png") if "yellow-9.png" not in names[2] else yellow
    go_to(browser, yellow)
    fourth = browser.run(f"members[{yellow}][0]")
    browser.click(f'.tile[data-image="{fourth}"]')
    choose(browser, "#move", "A new group")
    assert last == yellow and browser.run("data.names.at(-1)") == "New group 1"
    fourth_name = browser.run(f"data.name[{fourth}]")

    file = save(browser, tmp_path / "down")
    assert not browser.errors()
    found = read_corrections(file)
    everything = {str(path) for path in colours.iterdir() if "cut" not in path.name}
    assert found.group_of.keys() | set(found.left_out) == everything
    name_of = {path: found.names[group] for path, group in found.group_of.items()}
    assert set(found.left_out) == {names[2]} and found.moved == {*names[:2], fourth_name}
    assert {name_of[name] for name in names[:2]} == {'=red, "mine" <b>été'}
    for path, name in name_of.items():
        kind = Path(path).name.partition("-")[0]
        if kind in ("green", "blue"):
            assert name == "the rest"
        elif kind != "yellow":
            assert name == '=red, "mine" <b>été', path

    # new images, into the corrected groups
    for kind, name in enumerate(("red", "green", "blue", "yellow")):
        draw(colours / f"new-{name}.png", kind, 900 + kind)
    again = grouped(colours, tmp_path / "second", "--start", str(file))
    table = {text_of(row["path"]): row for row in rows_of(again.parent / "groups.csv")}
    assert table.keys() == everything - {names[2]} | {str(path) for path in colours.glob("new-*")}
    for path, name in name_of.items():
        assert text_of(table[path]["group"]) == name
    assert text_of(table[str(colours / "new-green.png")]["group"]) == "the rest"
    assert text_of(table[str(colours / "new-red.png")]["group"]) == '=red, "mine" <b>été'

    # what was left out and moved comes along, without a click
    show(browser, again, tmp_path / "more")
    assert browser.run("data.names").count("the rest") == 1
    later = read_corrections(save(browser, tmp_path / "more"))
    assert set(later.left_out) == {names[2]} and later.moved == found.moved
    assert later.group_of.keys() == table.keys()
    assert not browser.errors()


def rows_of(file: Path) -> list[dict[str, str]]:
    """The rows of a table whose names may hold other bytes."""
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as opened:
        return list(csv.DictReader(opened))


def test_lists_and_thumbnails_on_the_map(browser: Chromium, colours: Path, tmp_path: Path) -> None:
    page = grouped(colours, tmp_path / "groups", "--num_clusters", "4")
    show(browser, page, tmp_path / "down")
    words = browser.run("lists.textContent")
    assert "1 unread" in words and "near-duplicates" in words and "left out" not in words

    browser.click("#lists a[href='#unread']")
    browser.wait("document.querySelectorAll('main li').length === 1")
    assert "<b>cut.png" in browser.run("document.querySelector('main li').textContent")
    assert browser.run("document.querySelector('main p a').getAttribute('href')") == "broken.csv"
    browser.click("#lists a[href='#alike']")
    browser.wait("location.hash === '#alike'")
    alike = browser.run("[...document.querySelectorAll('.tile')].map(one => one.title)")
    assert any("green-0.png" in title for title in alike)
    assert any("green-0b.png" in title for title in alike)

    # points from afar, pictures from near
    browser.run("go('')")
    assert browser.run("Number(map.dataset.thumbnails)") == 0
    browser.run("zoom(4, ...place(3))")
    browser.wait("Number(map.dataset.thumbnails) > 0")
    inside = browser.run(
        "range(0, count).filter(i => place(i).every(value => value > 0 && value < 1)).length"
    )
    assert browser.run("Number(map.dataset.thumbnails)") == inside
    # the colour of the picture itself is on the canvas, in its middle
    browser.wait(
        "(() => { const [x, y] = place(3).map(value => Math.round(value * map.width)); "
        "const [r, g, b, a] = map.getContext('2d').getImageData(x, y, 1, 1).data; "
        "return a === 255 && [...decoded.values()].every(one => one.complete); })()"
    )
    browser.photograph("thumbnails", tmp_path)
    assert not browser.errors()


def test_a_page_to_look_at_has_no_corrections(browser: Chromium, page: Path) -> None:
    """As the Space makes them: there is no command that could take them back."""
    browser.call("/url", {"url": page.as_uri()})
    assert browser.run("document.querySelector('#editing').hidden")
    browser.press(RIGHT + "l" + "x" + "u")
    assert browser.run("data.group.every(group => group >= 0) && marked.size === 0")
    assert browser.run("document.querySelectorAll('#move, #leave, #name').length") == 0
