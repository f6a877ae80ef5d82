"""pipeline("image-clustering").

Every kind of input, the features, the number of groups, what can go wrong, saving.
"""

import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import adjusted_rand_score
from transformers import BertConfig, BertModel, ViTMAEConfig, ViTMAEModel, pipeline

import mim_refiner_hf.clustering.pipeline_image_clustering as module
from mim_refiner_hf import (
    ImageClusteringPipeline,
    MimRefinerConfig,
    MimRefinerImageProcessor,
    MimRefinerModel,
)
from mim_refiner_hf.clustering.cluster_count import Proposal
from mim_refiner_hf.clustering.image_items import Images
from mim_refiner_hf.clustering.k_means import Clustering
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.evaluation import extract_features
from mim_refiner_hf.publishing import save_model_folder

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
TRUE = [i % 3 for i in range(24)]  # colour of image i


@pytest.fixture(scope="module")
def encoder() -> MimRefinerModel:
    torch.manual_seed(3)
    return MimRefinerModel(MimRefinerConfig(**SHAPE, image_size=16, patch_size=8)).eval()


@pytest.fixture(scope="module")
def processor() -> MimRefinerImageProcessor:
    return MimRefinerImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )


@pytest.fixture
def pipe(encoder: MimRefinerModel, processor: MimRefinerImageProcessor) -> ImageClusteringPipeline:
    return ImageClusteringPipeline(model=encoder, image_processor=processor)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 noisy images of three colours, in turn, some of them a folder deeper."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i, colour in enumerate(TRUE):
        pixels = (
            (COLOURS[colour] + random.integers(-30, 30, (20, 24, 3))).clip(0, 255).astype(np.uint8)
        )
        path = folder / ("deeper" if i >= 20 else "") / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"not an image either")
    return folder


def paths_of(photos: Path) -> list[str]:
    return sorted(map(str, photos.rglob("[0-9]*.png")))


def groups_of(entries: list[dict[str, Any]]) -> list[int]:
    return [entry["cluster"] for entry in entries]


def test_groups_are_found_and_described(pipe: ImageClusteringPipeline, photos: Path) -> None:
    entries = pipe(str(photos), num_clusters=3)
    assert [entry["image"] for entry in entries] == paths_of(photos)
    assert [entry["index"] for entry in entries] == list(range(24))
    assert adjusted_rand_score(TRUE, groups_of(entries)) == 1
    assert all(0 < entry["score"] <= 1 for entry in entries)
    assert (
        pipe.summary["num_images"] == 24
        and pipe.summary["num_clusters"] == 3
        and pipe.summary["sizes"] == [8, 8, 8]
    )
    assert pipe.summary["reason"] == "as asked for" and pipe.summary["broken"] == []
    for group, exemplars in enumerate(pipe.summary["exemplars"]):
        assert len(exemplars) == 8 and {entries[place]["cluster"] for place in exemplars} == {group}


def test_every_kind_of_input_gives_the_same(pipe: ImageClusteringPipeline, photos: Path) -> None:
    paths = paths_of(photos)
    images = [Image.open(path).copy() for path in paths]
    table = datasets.Dataset.from_dict({"name": paths, "image": paths}).cast_column(
        "image", datasets.Image()
    )
    handler = partial(SimpleHTTPRequestHandler, directory=str(photos))
    handler.func.log_message = lambda *_: None  # type: ignore[attr-defined]
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    expected = groups_of(pipe(str(photos), num_clusters=3))
    expected_features = pipe.features
    kinds = {
        "folder as Path": photos,
        "paths": [Path(path) for path in paths],
        "PIL images": images,
        "rows of datasets": table,
        "generator": (path for path in paths),
        "pairs with labels": list(zip(images, TRUE, strict=True)),
        "this package's data set": open_images(str(photos)),
        "URLs": [f"{address}/{Path(path).relative_to(photos)}" for path in paths],
    }
    try:
        for kind, given in kinds.items():
            entries = pipe(given, num_clusters=3, batch_size=5)
            assert not pipe.summary["broken"], kind
            assert groups_of(entries) == expected, kind
            torch.testing.assert_close(pipe.features, expected_features, msg=kind)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_features_are_those_of_the_evaluation(
    pipe: ImageClusteringPipeline,
    encoder: MimRefinerModel,
    processor: Any,
    photos: Path,
    batch_size: int,
) -> None:
    """Raw output of the last block, without the final norm, whatever the batches."""
    pipe(photos, num_clusters=2, batch_size=batch_size)
    expected = extract_features(encoder, open_images(str(photos)), processor).features
    torch.testing.assert_close(pipe.features, expected)


def test_a_greyscale_model_reads_greyscale(photos: Path) -> None:
    torch.manual_seed(0)
    model = MimRefinerModel(MimRefinerConfig(**SHAPE, image_size=16, patch_size=8, num_channels=1))
    processor = MimRefinerImageProcessor(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        do_convert_rgb=False,
        image_mean=[0.5],
        image_std=[0.25],
    )
    pipe = ImageClusteringPipeline(model=model, image_processor=processor)
    assert len(pipe(photos, num_clusters=2)) == 24


@pytest.mark.parametrize(
    ("proposal", "num_clusters", "says"),
    [
        (Proposal(3, (3, 4), True, "three stand out", []), 3, "three stand out"),
        (
            Proposal(5, (2, 9), False, "nothing stands out", []),
            5,
            "no clear answer (nothing stands out); 5 is the best guess",
        ),
        (
            Proposal(None, None, False, "too few", []),
            3,
            "no clear answer (too few); 3 is a rule of thumb, sqrt(n / 2)",
        ),
    ],
)
def test_the_number_of_groups_is_proposed(
    pipe: ImageClusteringPipeline,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    proposal: Proposal,
    num_clusters: int,
    says: str,
) -> None:
    monkeypatch.setattr(module, "propose_num_clusters", lambda features, seed: proposal)
    assert len(set(groups_of(pipe(photos)))) == num_clusters
    assert pipe.summary["num_clusters"] == num_clusters and pipe.summary["reason"] == says
    assert pipe.summary["clear"] is proposal.clear and pipe.summary["interval"] == proposal.interval


def test_a_few_images_get_groups_without_a_number(
    pipe: ImageClusteringPipeline, photos: Path
) -> None:
    for count in (1, 2, 5):
        assert len(pipe(paths_of(photos)[:count])) == count
        assert pipe.summary["clear"] is False


def test_equal_images_make_one_group(pipe: ImageClusteringPipeline, photos: Path) -> None:
    entries = pipe([Image.open(paths_of(photos)[0])] * 6, num_clusters=3)
    assert groups_of(entries) == [0] * 6 and pipe.summary["num_clusters"] == 1


def test_later_images_go_into_the_same_groups(
    pipe: ImageClusteringPipeline, photos: Path, tmp_path: Path
) -> None:
    entries = pipe(photos, num_clusters=3)
    pipe.clustering.save(tmp_path / "groups.safetensors")
    again = pipe(paths_of(photos)[4:7], clustering=Clustering.load(tmp_path / "groups.safetensors"))
    assert groups_of(again) == groups_of(entries)[4:7]
    assert [entry["score"] for entry in again] == pytest.approx(
        [entry["score"] for entry in entries[4:7]], abs=1e-4
    )
    assert pipe.summary["num_clusters"] == 3 and sum(pipe.summary["sizes"]) == 3


def test_broken_images_are_named_and_left_out(
    pipe: ImageClusteringPipeline, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0cut")
    good = paths_of(photos)
    given = [*good[:5], str(tmp_path / "cut.jpg"), *good[5:], str(tmp_path / "gone.jpg"), 7]
    entries = pipe(given, num_clusters=3, batch_size=4)
    assert adjusted_rand_score(TRUE, groups_of(entries)) == 1
    assert [entry["index"] for entry in entries] == [*range(5), *range(6, 25)]
    assert [(entry["index"], entry["image"]) for entry in pipe.summary["broken"]] == [
        (i, given[i]) for i in (5, 25, 26)
    ]
    assert all(entry["error"] for entry in pipe.summary["broken"])
    with pytest.raises(
        ValueError, match=r"None of the 2 images can be read; the first, .*cut\.jpg: "
    ):
        pipe([given[5], given[25]])


def test_pixels_are_upright_opaque_and_scaled(tmp_path: Path) -> None:
    def read(name: str, num_channels: int) -> Image.Image | str:
        return Images([str(tmp_path / name)], num_channels)[0]

    see_through = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    see_through.save(tmp_path / "see_through.png")
    Image.fromarray(np.full((4, 4), 257 * 90, dtype=np.uint16)).save(tmp_path / "deep.png")
    lying = Image.new("RGB", (8, 4))
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "lying.jpg", exif=exif)
    assert read("see_through.png", 3).getpixel((0, 0)) == (255, 255, 255)
    assert read("deep.png", 1).getpixel((0, 0)) == 90
    assert read("lying.jpg", 3).size == (4, 8)


@pytest.mark.parametrize(
    ("given", "settings", "says"),
    [
        ("{tmp}/gone", {}, r"No file or folder '.*gone'; give a folder"),
        ("{tmp}", {}, r"No images in .*: looked at every depth for .*\.bmp"),
        ([], {}, "There are no images"),
        (3, {}, "not as int"),
        ({"train": [], "test": []}, {}, "2 sets of images: train, test; choose one"),
        ("three", {"num_clusters": 10}, "num_clusters is 10 for 3 images; allowed are 1 to 3"),
        ("three", {"num_clusters": 0}, "num_clusters is 0 for 3 images"),
    ],
)
def test_wrong_input_is_refused(
    pipe: ImageClusteringPipeline,
    photos: Path,
    tmp_path: Path,
    given: Any,
    settings: dict[str, int],
    says: str,
) -> None:
    if given == "three":
        given = paths_of(photos)[:3]
    elif isinstance(given, str):
        given = given.format(tmp=tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        pipe(given, **settings)


def test_features_that_are_not_finite_are_refused(
    processor: MimRefinerImageProcessor, photos: Path
) -> None:
    model = MimRefinerModel(MimRefinerConfig(**SHAPE, image_size=16, patch_size=8))
    with torch.no_grad():
        model.layers[1].mlp.fc2.bias[3] = torch.nan
    with pytest.raises(
        ValueError,
        match=r"features of 24 of 24 images are not finite, first those of .*00\.png: .*weights",
    ):
        ImageClusteringPipeline(model=model, image_processor=processor)(photos)


def test_models_of_the_wrong_kind_are_refused(
    processor: MimRefinerImageProcessor, photos: Path
) -> None:
    tiny = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 16,
    }
    with pytest.raises(ValueError, match="BertModel is no image encoder"):
        ImageClusteringPipeline(
            model=BertModel(BertConfig(**tiny, vocab_size=9)), image_processor=processor
        )
    masked = ViTMAEModel(ViTMAEConfig(**tiny, image_size=16, patch_size=8))
    with pytest.raises(ValueError, match=r"ViTMAEModel gives no pooler_output.*load_encoder"):
        ImageClusteringPipeline(model=masked, image_processor=processor)(photos)


def test_unknown_settings_are_refused(
    encoder: MimRefinerModel, processor: MimRefinerImageProcessor
) -> None:
    with pytest.raises(ValueError, match="image-clustering knows no num_groups"):
        ImageClusteringPipeline(model=encoder, image_processor=processor, num_groups=3)


WITHOUT_PACKAGE = """
import json, sys
sys.modules["mim_refiner_hf"] = None  # as if it were not installed, also where it is
from transformers import pipeline
photos, *folders = sys.argv[1:]
found = []
for folder in folders:
    pipe = pipeline("image-clustering", model=folder, trust_remote_code=True, device="cpu")
    assert type(pipe).__module__.startswith("transformers_modules.")
    found.append([entry["cluster"] for entry in pipe(photos, num_clusters=3)])
pipe.save_pretrained(folders[-1] + "-again")
again = folders[-1] + "-again"
pipe = pipeline("image-clustering", model=again, trust_remote_code=True, device="cpu")
entries = pipe(photos, num_clusters=3)
found.append([entry["cluster"] for entry in entries])
vectors = pipe.model.encode([entry["image"] for entry in entries])
assert abs(vectors - pipe.features.numpy()).max() < 1e-5
print(json.dumps(found))
"""


@pytest.mark.slow
def test_saved_models_offer_the_pipeline(
    encoder: MimRefinerModel,
    processor: MimRefinerImageProcessor,
    pipe: ImageClusteringPipeline,
    photos: Path,
    tmp_path: Path,
) -> None:
    """By name and without a flag for users of the package, with `trust_remote_code` and without the
    package for all others.
    """
    expected = groups_of(pipe(photos, num_clusters=3))
    save_model_folder(tmp_path / "model", encoder, processor)
    pipe.save(tmp_path / "pipe")
    for folder in (tmp_path / "model", tmp_path / "pipe"):
        reloaded = pipeline("image-clustering", model=str(folder))
        assert type(reloaded) is ImageClusteringPipeline and type(reloaded.model) is MimRefinerModel
        assert groups_of(reloaded(photos, num_clusters=3)) == expected
        assert pipeline("image-feature-extraction", model=str(folder)).model.dtype == torch.float32
    code = {path.name: path.read_bytes() for path in (tmp_path / "model").glob("*.py")}
    assert code == {path.name: path.read_bytes() for path in (tmp_path / "pipe").glob("*.py")}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [
        sys.executable,
        "-c",
        WITHOUT_PACKAGE,
        str(photos),
        str(tmp_path / "model"),
        str(tmp_path / "pipe"),
    ]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={
            **environment,
            "HF_HOME": str(tmp_path),
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "OMP_NUM_THREADS": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str([expected] * 3)
