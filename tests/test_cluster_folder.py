"""`mim-refiner cluster`.

The files it leaves, what the page holds, hostile names, and what is refused without a trace.
"""

import base64
import csv
import io
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import adjusted_rand_score

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel, cli
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.publishing import cluster_folder, cluster_page, save_model_folder
from mim_refiner_hf.publishing.cluster_page import (
    Beside,
    Tile,
    by_confidence,
    choose_shown,
    jpeg_thumbnail,
    render_page,
)
from mim_refiner_hf.publishing.csv_cells import text_of

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
# a folder and a file: together "</script><script>..."
HOSTILE = (
    "<",
    "script><script>alert(1)<.png",
)
NAMES = [
    "plain.png",
    'a,"b".png',
    "<img src=x onerror=alert(1)>.png",
    "{{ 7*7 }} & 'q'.jpg",
    "été 猫.png",
    "same.png",
    "100%41 #1?a=b&c.png",
    "javascript:alert(1).png",
    "a\u2028b\u202egnp.png",
    "-->`'\\.png",
    "🐈" * 62 + ".png",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder, and beside it `nan`, the same with weights that overflow."""
    torch.manual_seed(3)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    encoder = MimRefinerModel(MimRefinerConfig(**shape, image_size=16, patch_size=8))
    processor = MimRefinerImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    root = tmp_path_factory.mktemp("models")
    save_model_folder(root / "model", encoder, processor)
    with torch.no_grad():
        for layer in (encoder.layers[1].mlp.fc1, encoder.layers[1].mlp.fc2):
            # finite, but what it computes is not
            layer.weight.normal_(std=5e37)
    save_model_folder(root / "nan", encoder, processor)
    return root / "model"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 images of three colours with names that hurt, and one broken file."""
    folder = tmp_path_factory.mktemp("data") / "my <photos>"
    random = np.random.default_rng(0)
    names = [*NAMES, *(f"{i}.png" for i in range(8)), "deeper/same.png", "/".join(HOSTILE)]
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (
            (COLOURS[i % 3] + random.integers(-30, 30, (150, 130, 3))).clip(0, 255).astype(np.uint8)
        )
        Image.fromarray(pixels).save(path)
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0cut")
    return folder


@pytest.fixture(scope="module")
def made(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves."""
    out = tmp_path_factory.mktemp("out") / "groups"
    assert (
        cli.main(
            [
                "cluster",
                str(photos),
                "--model",
                str(model),
                "--num_clusters",
                "3",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    return out


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a file, each path as it is on the disk."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{**row, "path": text_of(row["path"])} for row in rows]


def colour(path: str) -> int:
    """The strongest channel of an image."""
    return int(np.asarray(Image.open(path)).mean((0, 1)).argmax())


class Structure(HTMLParser):
    """Tags with their attributes, and the text of each script, as a browser would read the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data
        else:
            self.text += data


def read_page(html: str) -> tuple[Structure, dict[str, Any]]:
    page = Structure(html)
    return page, json.loads(page.scripts[0])


def test_near_duplicates_are_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sets of equal files among noise.

    None are looked for where there are too many images to compare.
    """
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(8):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)).save(
            tmp_path / "photos" / f"{i}.png"
        )
    for i, copies in ((2, "ab"), (5, "c")):
        for copy in copies:
            (tmp_path / "photos" / f"{i}{copy}.png").write_bytes(
                (tmp_path / "photos" / f"{i}.png").read_bytes()
            )
    command = [
        "cluster",
        str(tmp_path / "photos"),
        "--model",
        str(model),
        "--num_clusters",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(command) == 0
    sets: dict[str, set[str]] = {}
    for row in table(tmp_path / "out" / "near-duplicates.csv"):
        sets.setdefault(row["set"], set()).add(Path(row["path"]).name)
    assert sorted(map(sorted, sets.values())) == [
        ["2.png", "2a.png", "2b.png"],
        ["5.png", "5c.png"],
    ]
    note = json.loads((tmp_path / "out" / "summary.json").read_text())["note"]
    assert note.endswith("; 5 are nearly the same as another (near-duplicates.csv)")
    monkeypatch.setattr(cluster_folder, "COMPARED", 10)
    assert cli.main(command) == 0
    assert not (tmp_path / "out" / "near-duplicates.csv").exists()
    assert (
        "not looked for among more than 10 images" in (tmp_path / "out" / "index.html").read_text()
    )


def test_the_table_names_every_image_once(made: Path, photos: Path) -> None:
    rows = table(made / "groups.csv")
    assert list(rows[0]) == ["path", "cluster", "confidence"]
    assert sorted(row["path"] for row in rows) == sorted(
        str(path) for path in photos.rglob("*.*") if path.name != "cut.jpg"
    )
    assert (
        adjusted_rand_score([colour(row["path"]) for row in rows], [row["cluster"] for row in rows])
        == 1
    )
    assert all(0 < float(row["confidence"]) <= 1 for row in rows)
    broken = table(made / "broken.csv")
    assert [row["path"] for row in broken] == [
        str(photos / "cut.jpg")
    ] and "Cannot decode" in broken[0]["error"]


def test_links_lead_to_the_images_most_confident_first(made: Path) -> None:
    rows = {row["path"]: row for row in table(made / "groups.csv")}
    seen = []
    for group in range(3):
        links = sorted((made / f"group-{group:02d}").iterdir())
        targets = [str(link.readlink()) for link in links]
        assert all(link.is_symlink() and link.is_file() for link in links)
        assert {rows[target]["cluster"] for target in targets} == {str(group)}
        confidences = [float(rows[target]["confidence"]) for target in targets]
        assert confidences == sorted(confidences, reverse=True)
        seen += targets
    assert sorted(seen) == sorted(rows)
    assert sorted(link.name[:8] for link in (made / "exemplars").iterdir()) == [
        "group-00",
        "group-01",
        "group-02",
    ]
    assert all(link.is_file() for link in (made / "exemplars").iterdir())


def test_the_summary_says_what_was_done(made: Path, photos: Path) -> None:
    summary = json.loads((made / "summary.json").read_text(encoding="utf-8"))
    assert (
        summary["num_images"] == 21
        and summary["num_clusters"] == 3
        and summary["sizes"] == [7, 7, 7]
    )
    assert summary["broken"] == [str(photos / "cut.jpg")]
    # to random weights images of one colour are
    alike = sum(map(len, summary["near_duplicates"]))
    told = f"; {alike} are nearly the same as another (near-duplicates.csv)" if alike else ""
    assert summary["note"] == f"21 images in 3 groups (as asked for); 1 could not be read{told}"
    assert all(Path(path).is_file() for group in summary["exemplars"] for path in group)


def test_the_page_holds_everything_and_loads_nothing(made: Path) -> None:
    html = (made / "index.html").read_text(encoding="utf-8")
    page, data = read_page(html)
    rows = {row["path"]: row for row in table(made / "groups.csv")}
    assert sorted(data["name"]) == sorted(rows)
    assert [rows[name]["cluster"] for name in data["name"]] == [
        str(group) for group in data["group"]
    ]
    assert data["group"] == sorted(data["group"]) and data["sizes"] == data["shown"] == [7, 7, 7]
    for group in range(3):
        scores = [
            score for score, own in zip(data["score"], data["group"], strict=True) if own == group
        ]
        assert scores == sorted(scores, reverse=True)
    for thumb in data["thumbnail"]:
        image = Image.open(io.BytesIO(base64.b64decode(thumb)))
        assert image.format == "JPEG" and max(image.size) == cluster_page.THUMBNAIL
    assert all(0 <= value <= 1 for value in data["x"] + data["y"])
    assert not [
        attributes
        for _, attributes in page.tags
        if {"src", "srcset", "href", "data"} & set(attributes)
    ]
    policy = next(
        attributes["content"] for _, attributes in page.tags if attributes.get("http-equiv")
    )
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert (
        "http://" not in html
        and "https://" not in html
        and "@import" not in html
        and "url(" not in html
    )


def test_names_stay_text(made: Path) -> None:
    """No name becomes markup, however it is written.

    The same tags as in a page with harmless names.
    """
    hostile, data = read_page((made / "index.html").read_text(encoding="utf-8"))
    tile = Tile("a.png", 0, 1.0, jpeg_thumbnail(Image.new("RGB", (4, 4))), "group-00/a.png")
    harmless = Structure(
        render_page("photos", "one", [tile] * 3, torch.randn(3, 8), [3], Beside(["Group 0"]))
    )
    assert hostile.tags == harmless.tags and len(hostile.scripts) == 2
    assert hostile.scripts[1] == harmless.scripts[1]
    assert any(name.endswith("/".join(HOSTILE)) for name in data["name"])
    assert "my <photos>" in hostile.text
    page = Structure(
        render_page("</title><script>alert(1)</script>", "<b>", [tile] * 3, torch.randn(3, 8), [3])
    )
    assert page.tags == harmless.tags and "<b>" in page.text
    assert not any(set(link) & set("<>\"' {") for link in data["link"])


def test_links_of_the_page_lead_to_the_files(made: Path) -> None:
    """Whatever a name holds ("%41", "#", "?", "javascript:"), the address is a path in the folder
    and nothing else.
    """
    _, data = read_page((made / "index.html").read_text(encoding="utf-8"))
    for name, link in zip(data["name"], data["link"], strict=True):
        address = urlsplit(urljoin("https://host/groups/index.html", link))
        assert (address.netloc, address.query, address.fragment) == (
            "host",
            "",
            "",
        ) and address.path.startswith("/groups/group-0")
        assert str((made / unquote(link)).readlink()) == name


def test_names_of_links_fit_and_stay_inside(tmp_path: Path) -> None:
    """The longest name that there can be, and a table whose paths and labels lead upwards."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / ("🐈" * 62 + "abc.png"))
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    rows = {
        "image": [{"bytes": file.getvalue(), "path": "../../up.png"}] * 2,
        "label": ["../../evil", "/evil"],
    }
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    for name in ("photos", "train.parquet"):
        images, out = open_images(str(tmp_path / name)), tmp_path / "out" / name
        out.mkdir(parents=True)
        links = cluster_folder.write_links(out, images, [list(range(len(images)))])
        cluster_folder.write_exemplars(out, [links[0]])
        assert (
            all((out / link).is_file() for link in links.values())
            and len(list((out / "exemplars").iterdir())) == 1
        )
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert written == {"photos", "train.parquet", "out"}


@pytest.mark.parametrize("ending", ["npy", "jpg", "JPEG", "png", "tif"])
def test_every_kind_of_file_has_a_thumbnail(ending: str, tmp_path: Path) -> None:
    pixels = np.full((40, 400, 3), 200, np.uint8)
    if ending == "npy":
        np.save(tmp_path / "a.npy", pixels)
    else:
        Image.fromarray(pixels).save(tmp_path / f"a.{ending}")
    thumbnail = cluster_folder.load_thumbnail(open_images(tmp_path), 0)
    with Image.open(io.BytesIO(thumbnail)) as image:
        assert max(image.size) < 400
        assert image.convert("L").getextrema()[0] > 190


def test_search_by_example_finds_the_nearest() -> None:
    """The compact codes rank neighbours as the cosine of the features does."""
    torch.manual_seed(0)
    centres = torch.randn(6, 64)
    features = centres[torch.arange(120) % 6] + 0.3 * torch.randn(120, 64)
    codes = (
        np.frombuffer(base64.b64decode(cluster_page.compact(features)), dtype=np.int8)
        .reshape(120, -1)
        .astype(int)
    )
    distances = ((codes[:, None] - codes[None]) ** 2).sum(-1)
    unit = torch.nn.functional.normalize(features, dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-1).topk(10).indices.numpy()
    np.fill_diagonal(distances, distances.max() + 1)
    found = distances.argsort(1)[:, :10]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, nearest, strict=True)]) > 0.75


def test_very_many_images_are_thinned_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_page, "MAX_TILES", 20)
    groups, confidences = [0] * 90 + [1] * 9 + [2], np.linspace(0.1, 1, 100).tolist()
    order = by_confidence(groups, confidences)
    assert (
        [len(members) for members in order] == [90, 9, 1]
        and order[0][0] == 89
        and order[0][-1] == 0
    )
    shown = choose_shown(order)
    assert [sum(groups[place] == group for place in shown) for group in range(3)] == [18, 2, 1]
    # the most and the least confident of group 0
    assert shown[0] == 89 and shown[17] == 0
    monkeypatch.setattr(cluster_page, "MAX_TILES", 100)
    assert choose_shown(order) == [place for members in order for place in members]


def test_images_of_a_table_are_written(model: Path, tmp_path: Path) -> None:
    """The bundled digits have no files; without a number of groups one is proposed."""
    digits = open_images("digits").subset(range(40))
    pipe = cluster_folder.ImageClusteringPipeline(
        model=MimRefinerModel.from_pretrained(model),
        image_processor=MimRefinerImageProcessor.from_pretrained(model),
    )
    entries = pipe(digits, num_clusters=4)
    cluster_folder.write_groups(tmp_path, digits, entries, pipe)
    written = sorted(path for path in tmp_path.glob("group-*/*.png"))
    assert len(written) == 40 and not any(path.is_symlink() for path in written)
    assert len(read_page((tmp_path / "index.html").read_text(encoding="utf-8"))[1]["name"]) == 40
    assert not (tmp_path / "broken.csv").exists()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{tmp}/gone", "--model", "{model}"], ["{tmp}/gone"]),
        (["{tmp}/empty", "--model", "{model}"], ["No images in {tmp}/empty"]),
        (
            ["{tmp}/three", "--model", "{model}", "--num_clusters", "10"],
            ["error: --num_clusters is 10 for 3 images", "1 to 3", "or leave it out"],
        ),
        (
            ["{tmp}/three", "--model", "{model}", "--num_clusters", "1", "--method", "heads"],
            ["error: --num_clusters is 1", "2 to 3 with method 'heads'"],
        ),
        (["{tmp}/spoilt", "--model", "{model}"], ["None of the 2 images can be read", "0.jpg"]),
        (
            ["{tmp}/spoilt", "--model", "{model}", "--num_clusters", "3"],
            ["error: --num_clusters is 3 for 2 images"],
        ),
        (
            ["{tmp}/three", "--model", "{nan}"],
            ["features of 3 of 3 images are not finite", "weights"],
        ),
        (["{tmp}/three", "--model", "{tmp}/three"], ["{tmp}/three"]),
        (["{tmp}/three", "--model", "{tmp}/bert"], ["bert"]),
        (
            ["{tmp}/three", "--model", "{model}", "--out", "{tmp}/three/groups"],
            ["lie within each other"],
        ),
        (
            ["{tmp}/three", "--model", "{model}", "--out", "{tmp}/empty_not"],
            ["is not a groups folder"],
        ),
    ],
    ids=lambda words: " ".join(words).replace("/", "-"),
)
def test_wrong_use_leaves_nothing_behind(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: list[str],
) -> None:
    for name in ("empty", "three", "spoilt", "empty_not", "bert"):
        (tmp_path / name).mkdir()
    for i in range(3):
        Image.new("RGB", (9, 9), (80 * i, 0, 0)).save(tmp_path / "three" / f"{i}.png")
    for i in range(2):
        (tmp_path / "spoilt" / f"{i}.jpg").write_bytes(b"spoilt")
    (tmp_path / "empty_not" / "mine.txt").write_text("mine")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert", "hidden_size": 8}')
    monkeypatch.chdir(tmp_path)
    places = {"tmp": str(tmp_path), "model": str(model), "nan": str(model.with_name("nan"))}
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["cluster", *(word.format(**places) for word in words)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and all(part.format(**places) in line for part in says), line
    assert sorted(tmp_path.rglob("*")) == before


def test_an_earlier_result_is_replaced_only_by_a_whole_one(
    model: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = [
        "cluster",
        str(photos),
        "--model",
        str(model),
        "--out",
        str(tmp_path / "groups"),
        "--num_clusters",
    ]
    assert cli.main([*words, "3"]) == 0
    assert "are replaced" not in caplog.text
    before = everything(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(
            cluster_folder, "render_page", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
        )
        assert cli.main([*words, "2"]) == 1
    # but for the features, which the next run reads
    after = everything(tmp_path)
    kept = {path for path in after if ".groups.features" in path}
    assert kept
    assert {path: after[path] for path in after.keys() - kept} == before
    assert cli.main([*words, "2"]) == 0
    assert f"the earlier groups in {tmp_path}/groups are replaced" in caplog.text
    assert {row["cluster"] for row in table(tmp_path / "groups" / "groups.csv")} == {"0", "1"}
    assert os.listdir(tmp_path) == ["groups"] and not (tmp_path / "groups" / "group-02").exists()  # noqa: PTH208
