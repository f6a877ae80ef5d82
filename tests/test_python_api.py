"""The public face: refine, embed, cluster, evaluate; every kind of source, model and mistake."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import timm
import torch
from PIL import ExifTags, Image
from small_runs import SHAPE, shorten
from transformers import (
    AutoModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    pipeline,
)

import mim_refiner_hf
from mim_refiner_hf import (
    Groups,
    MimRefinerModel,
    RefineRecipe,
    cli,
    cluster,
    embed,
    evaluate,
    load_encoder,
    refine,
)
from mim_refiner_hf.data import open_images
from mim_refiner_hf.model import modeling_mim_refiner
from mim_refiner_hf.runtime.wording import in_the_shell, setting, shown

NUM_IMAGES = 40
RUN = {
    "batch_size": 16,
    "queue_size": 32,
    "topk": 2,
    "head_blocks": [1, 2],
    "head_epochs": 1,
    "epochs": 1,
    "warmup_epochs": 0.5,
    "projector_dim": 16,
    "predictor_dim": 16,
    "embedding_dim": 8,
    "local_views": 0,
    "log_every": 1,
    "num_workers": 0,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """(40, 32, 32, 3): four colours, 16, 12, 8 and 4 images of each."""
    generator = np.random.default_rng(0)
    colours = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220], [220, 220, 30]])
    noise = generator.integers(-25, 25, (NUM_IMAGES, 32, 32, 3))
    return (
        (colours[np.repeat(range(4), [16, 12, 8, 4])][:, None, None] + noise)
        .clip(0, 255)
        .astype(np.uint8)
    )


@pytest.fixture(scope="module")
def folder(pixels: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as PNG files."""
    path = tmp_path_factory.mktemp("api") / "photos"
    path.mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(path / f"{number:02d}.png")
    return path


@pytest.fixture
def encoder(models: dict[str, str]) -> MimRefinerModel:
    return load_encoder(models["vit_mae"])


class TorchPictures(torch.utils.data.Dataset[Any]):
    """A torch data set of items that `make` makes of pixels and a number."""

    def __init__(self, pixels: np.ndarray, make: Callable[[Any, int], Any]) -> None:
        self.pixels = pixels
        self.make = make

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Any:
        return self.make(self.pixels[i], i)


SOURCES: dict[str, Callable[[np.ndarray, Path], Any]] = {
    "folder as text": lambda pixels, folder: str(folder),
    "paths": lambda pixels, folder: sorted(folder.iterdir()),
    "paths as text": lambda pixels, folder: tuple(map(str, sorted(folder.iterdir()))),
    "array of paths": lambda pixels, folder: np.array(sorted(map(str, folder.iterdir()))),
    "PIL images": lambda pixels, folder: [Image.fromarray(image) for image in pixels],
    "files opened by Pillow": lambda pixels, folder: list(
        map(Image.open, sorted(folder.iterdir()))
    ),
    "encoded bytes": lambda pixels, folder: [
        path.read_bytes() for path in sorted(folder.iterdir())
    ],
    "arrays": lambda pixels, folder: list(pixels),
    "one array": lambda pixels, folder: pixels,
    "array, channels first": lambda pixels, folder: pixels.transpose(0, 3, 1, 2),
    "tensor": lambda pixels, folder: torch.from_numpy(pixels),
    "tensor of floats": lambda pixels, folder: torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255,
    "iterator": lambda pixels, folder: map(Image.fromarray, pixels),
    "labelled list": lambda pixels, folder: [(image, "a") for image in pixels],
    "dictionaries": lambda pixels, folder: [{"image": image, "label": 1} for image in pixels],
    "datasets": lambda pixels, folder: datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in pixels]}
    ),
    "datasets of files": lambda pixels, folder: datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train"
    ),
    "datasets with a format": lambda pixels, folder: datasets.Dataset.from_dict(
        {"img": [Image.fromarray(image) for image in pixels]}
    ).with_format("torch"),
    "torch data set": lambda pixels, folder: TorchPictures(pixels, lambda image, i: image),
    "torch data set, labelled": lambda pixels, folder: TorchPictures(
        pixels, lambda image, i: (Image.fromarray(image), torch.tensor(i % 4))
    ),
    "torch data set of rows": lambda pixels, folder: TorchPictures(
        pixels, lambda image, i: {"image": Image.fromarray(image), "label": i % 4}
    ),
    "opened before": lambda pixels, folder: open_images(str(folder)),
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, pixels: np.ndarray, folder: Path) -> Any:
    return SOURCES[request.param](pixels, folder)


# --- every kind of source -------------------------------------------------------------------------


def test_embed_gives_what_the_folder_gives(
    source: Any, folder: Path, encoder: MimRefinerModel
) -> None:
    vectors = embed(encoder, source)
    assert vectors.dtype == np.float32 and vectors.shape == (NUM_IMAGES, 32)
    assert np.array_equal(vectors, embed(encoder, folder))


def test_cluster_gives_what_the_folder_gives(
    source: Any, folder: Path, encoder: MimRefinerModel
) -> None:
    groups = cluster(source, model=encoder, num_clusters=4)
    assert np.array_equal(groups.labels, cluster(folder, model=encoder, num_clusters=4).labels)
    assert groups.labels.shape == groups.confidence.shape == (NUM_IMAGES,)
    assert groups.num_clusters == len(groups.exemplars) == 4
    assert all(0 <= place < NUM_IMAGES for group in groups.exemplars for place in group)


def test_evaluate_and_refine_see_the_same_images(source: Any, folder: Path) -> None:
    """Both open their images by the one door; runs over single kinds are below."""
    opened = open_images(source)
    expected = open_images(folder)
    assert len(opened) == NUM_IMAGES
    for i in (0, 7, NUM_IMAGES - 1):
        assert np.array_equal(np.asarray(opened[i].image), np.asarray(expected[i].image))


@pytest.mark.parametrize("kind", ["one array", "PIL images", "datasets", "paths"])
def test_evaluate_measures_objects_as_the_folder(
    kind: str, pixels: np.ndarray, folder: Path, encoder: MimRefinerModel, quick: None
) -> None:
    report = evaluate(encoder, SOURCES[kind](pixels, folder))
    assert report["after"] == evaluate(encoder, folder)["after"]
    assert str(report).startswith("| metric |") and len(repr(report)) < 300


def test_evaluate_uses_labels_and_writes_a_folder(
    pixels: np.ndarray,
    encoder: MimRefinerModel,
    models: dict[str, str],
    tmp_path: Path,
    quick: None,
) -> None:
    labelled = [(image, "abcd"[i % 4]) for i, image in enumerate(pixels)]
    report = evaluate(
        encoder, labelled, against=load_encoder(models["vit_mae"]), output_dir=tmp_path / "report"
    )
    assert "knn_accuracy" in report["after"] and report["against"] == models["vit_mae"]
    assert report["model"] == f"{models['vit_mae']} (2)"
    assert (tmp_path / "report" / "report.md").is_file()


@pytest.fixture(scope="module")
def refined(
    folder: Path, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> MimRefinerModel:
    """Trained on the folder."""
    settings = {**RUN, "model": models["vit_mae"], "eval_fraction": 0}
    with pytest.MonkeyPatch.context() as patched:
        shorten(patched)
        result = refine(folder, output_dir=tmp_path_factory.mktemp("refined") / "out", **settings)
    assert result is not None
    return result.refined


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one array", "torch data set", "datasets", "paths"])
def test_refine_trains_on_objects_as_on_the_folder(
    kind: str,
    pixels: np.ndarray,
    folder: Path,
    models: dict[str, str],
    refined: MimRefinerModel,
    tmp_path: Path,
    quick: None,
) -> None:
    settings = {**RUN, "model": models["vit_mae"], "eval_fraction": 0}
    result = refine(SOURCES[kind](pixels, folder), output_dir=tmp_path / "object", **settings)
    assert result is not None
    for name, tensor in refined.state_dict().items():
        assert torch.equal(result.refined.state_dict()[name], tensor), name
    vectors = embed(result.encoder, pixels[:3])
    assert np.allclose(result.encoder.encode(pixels[:3]), vectors, atol=1e-5)
    assert len(repr(result)) < 300


# --- refine ---------------------------------------------------------------------------------------


def test_refine_leaves_the_model_object_as_it_was(
    pixels: np.ndarray, encoder: MimRefinerModel, tmp_path: Path, quick: None
) -> None:
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    lines: list[tuple[int | None, dict[str, Any]]] = []
    result = refine(
        pixels,
        model=encoder,
        output_dir=tmp_path / "out",
        eval_fraction=0,
        callbacks=[lambda step, values: lines.append((step, values))],
        **RUN,
    )
    assert result is not None
    assert all(torch.equal(before[name], now) for name, now in encoder.state_dict().items())
    assert any(
        not torch.equal(before[name], now) for name, now in result.refined.state_dict().items()
    )

    written = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert len(lines) == len(written) and lines[0][0] == 1
    assert all("loss" in values for _, values in lines)


def test_refine_takes_a_recipe_and_fields_over_it(
    models: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    # a folder of its own: tests that run beside it would meet in the default one
    own = {**RUN, "output_dir": str(tmp_path / "out")}
    recipe = RefineRecipe(model=models["vit_mae"], dataset=str(folder), **own)
    assert refine(recipe, dry_run=True) is None
    assert refine(recipe=recipe, dry_run=True, seed=np.int64(3)) is None
    # the images that are given are those that are taken
    with pytest.raises(FileNotFoundError, match="nowhere"):
        refine("/nowhere", recipe=recipe, dry_run=True)
    with pytest.raises(ValueError, match="images and recipe are both"):
        refine(recipe, recipe=recipe)
    with pytest.raises(ValueError, match=r"value_range=\[0, 9\]: is for images of other"):
        refine(folder, recipe=recipe, value_range=(0, 9), dry_run=True)
    assert refine(dataset=folder, model=Path(models["vit_mae"]), dry_run=True, **own) is None
    with pytest.raises(ValueError, match="images and dataset"):
        refine(folder, dataset=folder, model=models["vit_mae"])


def test_refine_evaluates_on_objects(
    pixels: np.ndarray, encoder: MimRefinerModel, tmp_path: Path, quick: None
) -> None:
    held_out = TorchPictures(pixels[::-1][:12].copy(), lambda image, i: image)
    result = refine(pixels, model=encoder, eval_dataset=held_out, output_dir=tmp_path, **RUN)
    assert result is not None and "rankme" in result.metrics["after"]


def test_a_run_on_other_pixels_is_not_continued(
    pixels: np.ndarray, encoder: MimRefinerModel, tmp_path: Path, quick: None
) -> None:
    def stop(step: int | None, values: dict[str, Any]) -> None:
        if step == 3:
            raise InterruptedError("enough")

    settings = {**RUN, "output_dir": tmp_path, "eval_fraction": 0, "save_every": 1}
    with pytest.raises(InterruptedError):
        refine(pixels, model=encoder, callbacks=stop, **settings)
    with pytest.raises(ValueError, match=r"not the data set that this run began with.*output_dir"):
        refine(pixels[::-1].copy(), model=encoder, **settings)
    assert refine(pixels.copy(), model=encoder, **settings) is not None


# --- models ---------------------------------------------------------------------------------------


def test_model_objects_of_transformers_and_timm(pixels: np.ndarray) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    model = ViTModel(ViTConfig(**SHAPE)).eval()
    ours = load_encoder(model)
    with torch.no_grad():
        expected = model(images).last_hidden_state
        assert torch.allclose(ours(images).last_hidden_state, expected, atol=1e-5)

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0).eval()
    ours = load_encoder(model)
    with torch.no_grad():
        expected = model.forward_features(images)
        assert torch.allclose(ours(images).last_hidden_state, expected, atol=1e-5)
    # the size is that of the model, not of the weights it is named after
    assert embed(model, pixels[:3]).shape == (3, 192)


def test_the_preprocessing_of_a_model_object_is_looked_up(tmp_path: Path) -> None:
    ViTModel(ViTConfig(**SHAPE)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    ours = load_encoder(AutoModel.from_pretrained(tmp_path))
    assert list(ours.image_processor.image_mean) == [0.1, 0.2, 0.3]


def test_an_encoder_is_given_back_as_it_is(encoder: MimRefinerModel) -> None:
    assert load_encoder(encoder) is encoder
    bare = MimRefinerModel(encoder.config)
    assert load_encoder(bare).image_processor is not None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.nn.Linear(2, 2), "Linear is no encoder that is known here"),
        (lambda: 3, "int is no encoder that is known here"),
        (
            lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])),
            "ResNetModel has model_type='resnet'",
        ),
        (lambda: ViTForImageClassification(ViTConfig(**SHAPE)), "is a fine-tuned classifier"),
        (lambda: timm.create_model("resnet18"), "resnet18.* has model_type='timm.ResNet'"),
    ],
    ids=["a layer", "a number", "a ResNet", "a classifier", "timm's ResNet"],
)
def test_a_model_that_is_no_encoder(make: Callable[[], Any], says: str, pixels: np.ndarray) -> None:
    model = make()
    calls: list[Callable[[], Any]] = [
        lambda: embed(model, pixels),
        lambda: cluster(pixels, model=model),
        lambda: evaluate(model, pixels),
        lambda: refine(pixels, model=model, dry_run=True),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=says) as refused:
            call()
        assert len(str(refused.value).splitlines()) == 1


# --- encode and the pipelines ---------------------------------------------------------------------


def test_encode_takes_images_arrays_and_paths(
    pixels: np.ndarray, folder: Path, encoder: MimRefinerModel, tmp_path: Path
) -> None:
    expected = embed(encoder, folder)
    encoder.train()
    for images in (pixels, list(pixels), list(map(Image.fromarray, pixels)), torch.tensor(pixels)):
        assert np.allclose(encoder.encode(images, batch_size=7), expected, atol=1e-5)
    assert encoder.training
    paths = sorted(folder.iterdir())
    assert np.allclose(encoder.encode([paths[0], str(paths[1])]), expected[:2], atol=1e-5)
    assert encoder.encode(paths[0]).shape == encoder.encode(pixels[0]).shape == (1, 32)

    encoder.save_pretrained(tmp_path)
    encoder.image_processor.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert np.allclose(loaded.encode(pixels), expected, atol=1e-5)
    for wrong, says in (
        ([], "no images"),
        (pixels[0] / 255, "float64"),
        ([3], "int is neither"),
        (None, "not NoneType"),
        (set(paths), "a list of them, not set"),
        (str(folder), "is a folder; give a list of its images, or the folder to `embed`"),
    ):
        with pytest.raises(ValueError, match=says):
            encoder.encode(wrong)
    with pytest.raises(ValueError, match="batch_size=-1: must be at least 1"):
        encoder.encode(pixels, batch_size=-1)
    with pytest.raises(ValueError, match="has no preprocessing"):
        MimRefinerModel(mim_refiner_hf.MimRefinerConfig(**SHAPE)).encode(pixels)


def odd_pictures(folder: Path) -> None:
    """Files of 16 bits, of floats, in CMYK, turned by EXIF, and half transparent."""
    rng = np.random.default_rng(0)
    grey = rng.random((40, 48))
    colour = rng.integers(0, 256, (40, 48, 4), dtype=np.uint8)
    Image.fromarray((grey * 40000).astype(np.uint16)).save(folder / "deep.png")
    Image.fromarray((grey * 0.8).astype(np.float32)).save(folder / "float.tif")
    Image.fromarray(colour, mode="CMYK").save(folder / "press.jpg")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(colour[..., :3]).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(colour, mode="RGBA").save(folder / "clear.png")


def test_encode_decodes_as_the_pipelines_do(
    encoder: MimRefinerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd_pictures(tmp_path)
    paths = sorted(tmp_path.iterdir())
    expected = embed(encoder, tmp_path)
    assert np.allclose(encoder.encode(paths), expected, atol=1e-5)
    assert np.allclose(encoder.encode([Image.open(path) for path in paths]), expected, atol=1e-5)
    pipe = pipeline("image-clustering", model=encoder)
    pipe(tmp_path, num_clusters=2)
    assert np.allclose(pipe.features, expected, atol=1e-5)
    (tmp_path / "none.png").write_text("no image")
    with pytest.raises(ValueError, match=r"Cannot decode .*none\.png: it is no image"):
        encoder.encode(tmp_path / "none.png")

    def alone(name: str, package: str) -> None:
        raise ModuleNotFoundError(name)

    # a file that travels without the package reads what it reads right, or refuses it
    monkeypatch.setattr(modeling_mim_refiner, "import_module", alone)
    for path, vector in zip(paths, expected, strict=True):
        if path.stem in ("press", "turned"):
            assert np.allclose(encoder.encode(str(path))[0], vector, atol=1e-5)
        elif path.stem in ("deep", "float"):
            with pytest.raises(ValueError, match="has more than 8 bits"):
                encoder.encode(path)


def test_pipelines_find_the_processor_of_an_encoder(
    folder: Path, encoder: MimRefinerModel, tmp_path: Path
) -> None:
    groups = pipeline("image-clustering", model=encoder)(folder, num_clusters=4)
    assert [entry["cluster"] for entry in groups] == list(
        cluster(folder, model=encoder, num_clusters=4).labels
    )

    paths = [str(path) for path in sorted(folder.iterdir())[:5]]
    features = pipeline("image-feature-extraction", model=encoder)
    rows = np.array(features(paths))
    assert rows.shape == (5, 32)
    assert np.array(features(paths, batch_size=2)).shape == (5, 32)
    assert np.array(features(paths[0], pool=False)).shape == (1, 17, 32)
    assert np.array(features(paths[0], pool=True)).shape == (1, 32)

    encoder.save_pretrained(tmp_path)
    encoder.image_processor.save_pretrained(tmp_path)
    for model in (str(tmp_path), AutoModel.from_pretrained(tmp_path)):
        again = np.array(pipeline("image-feature-extraction", model=model)(paths))
        assert np.allclose(again, rows, atol=1e-5)


def test_the_feature_pipeline_of_other_models_is_as_it_was(folder: Path, tmp_path: Path) -> None:
    model = ViTModel(ViTConfig(**SHAPE))
    for task in ("image-feature-extraction", "image-clustering"):
        with pytest.raises(ValueError, match=r"ViTModel .* image processor"):
            pipeline(task, model=model)
    processor = mim_refiner_hf.MimRefinerImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    pipe = pipeline("image-feature-extraction", model=model, image_processor=processor)
    assert np.array(pipe(str(folder / "00.png"))).shape == (1, 17, 32)


# --- embed and cluster in detail ------------------------------------------------------------------


def test_embed_resumes_from_a_folder(
    pixels: np.ndarray, encoder: MimRefinerModel, tmp_path: Path
) -> None:
    vectors = embed(encoder, pixels)
    assert np.array_equal(embed(encoder, pixels, out=tmp_path), vectors)
    assert np.array_equal(embed(encoder, list(pixels), out=tmp_path / "other"), vectors)
    assert np.array_equal(embed(encoder, pixels.copy(), out=tmp_path), vectors)
    with pytest.raises(ValueError, match="holds other features"):
        embed(encoder, pixels[::-1].copy(), out=tmp_path)


def test_vectors_are_grouped_as_their_images(folder: Path, encoder: MimRefinerModel) -> None:
    groups = cluster(folder, model=encoder, num_clusters=4)
    vectors = embed(encoder, folder)
    listed = (list(vectors), vectors.tolist(), list(torch.from_numpy(vectors)))
    for given in (vectors, torch.from_numpy(vectors), vectors.astype(np.float64), *listed):
        assert np.array_equal(cluster(given, num_clusters=4).labels, groups.labels)
    assert str(groups) == "40 images in 4 groups (as asked for)"
    assert repr(cluster(vectors, num_clusters=2)) == (
        "<Groups: 40 vectors in 2 groups (as asked for)>"
    )
    labels, _ = groups.clustering.assign(torch.from_numpy(vectors))
    assert np.array_equal(labels.numpy(), groups.labels)


def test_cluster_proposes_and_writes(
    pixels: np.ndarray, encoder: MimRefinerModel, tmp_path: Path, without_umap: None
) -> None:
    groups = cluster(pixels, model=encoder, out=tmp_path / "groups")
    assert isinstance(groups, Groups) and groups.proposal.num_clusters == groups.num_clusters
    assert groups.proposal.reason in str(groups)
    assert (tmp_path / "groups" / "index.html").is_file()


def test_broken_images(
    pixels: np.ndarray, encoder: MimRefinerModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = []
    for number, image in enumerate(pixels):
        paths.append(tmp_path / f"{number:02d}.png")
        Image.fromarray(image).save(paths[-1])
    paths[3].write_bytes(b"no image")

    with pytest.raises(ValueError, match=r"1 of 40 images .*03\.png.*skip_broken=True") as refused:
        embed(encoder, paths)
    assert len(str(refused.value).splitlines()) == 1

    vectors = embed(encoder, paths, skip_broken=True)
    assert np.isnan(vectors[3]).all() and np.isfinite(np.delete(vectors, 3, axis=0)).all()
    assert caplog.text.count("03.png") == 1
    assert np.array_equal(
        embed(encoder, paths, skip_broken=True, out=tmp_path / "out"), vectors, equal_nan=True
    )

    caplog.clear()
    groups = cluster(paths, model=encoder, num_clusters=4)
    assert groups.labels[3] == -1 and groups.confidence[3] == 0 and len(groups.broken) == 1
    assert (np.delete(groups.labels, 3) >= 0).all() and "1 of 40 images" in caplog.text
    assert not any(3 in group for group in groups.exemplars)


def test_a_torch_data_set_with_a_broken_item(
    pixels: np.ndarray, encoder: MimRefinerModel, tmp_path: Path
) -> None:
    def item(image: Any, i: int) -> Any:
        if i == 2:
            raise OSError("truncated")
        return Image.fromarray(image)

    vectors = embed(encoder, TorchPictures(pixels, item), skip_broken=True)
    assert np.isnan(vectors[2]).all() and np.isfinite(vectors[3]).all()


# --- mistakes: one line each ----------------------------------------------------------------------

STREAM = datasets.IterableDataset.from_generator(lambda: iter([{"image": 1}]))


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ([], "There are no images: the list is empty"),
        (np.zeros((0, 8, 8, 3), np.uint8), "There are no images"),
        (["/nowhere/a.png", "/nowhere/b.png"], "2 of 2 paths lead nowhere, first /nowhere/a.png"),
        ([0, 1, 2], "None of the 3 images can be read.*int is neither"),
        (3, "not as int"),
        (None, "not as NoneType"),
        ({"a.png", "b.png"}, "A set of images has no order; give a list"),
        (pandas.DataFrame({"path": ["a.png"]}), r"A DataFrame is a table.*frame\['path'\]"),
        (np.zeros((5, 8)), r"ndarray of shape \(5, 8\) holds no images.*cluster"),
        (
            (np.zeros((5, 8, 8, 3)), np.arange(5)),
            r"None of the 2.*\(5, 8, 8, 3\) is not one image.*labels come as \(image, label\)",
        ),
        (np.zeros((20, 64, 64)), r"\(20, 64, 64\) has no axis of channels.*images\[\.\.\., None\]"),
        (np.zeros((5, 70, 60, 90)), "None of the 5 images|images .* cannot be read"),
        ({"train": [1], "test": [2]}, "'train', 'test'; give one of them"),
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_dict({"x": [1]})}),
            r"1 sets of images: 'train'; give one of them, such as data\['train'\]",
        ),
        (datasets.Dataset.from_dict({"x": [1]}), r"No image column .*\['x'\]"),
        (datasets.Dataset.from_dict({"image": []}), "no rows"),
        (STREAM, "is a stream without a length"),
        (torch.utils.data.DataLoader([1]), r"loader\.dataset"),
        ([(np.zeros((8, 8), np.uint8), 0.5)], "has the label 0.5; a label is a whole number"),
        (
            [(np.zeros((8, 8), np.uint8), np.zeros(3))],
            r"has a ndarray of shape \(3,\) in the place",
        ),
        (
            [(np.zeros((8, 8), np.uint8), 1), (np.zeros((8, 8), np.uint8), "a")],
            "numbers and words",
        ),
    ],
)
def test_images_that_are_none(
    images: Any, says: str, encoder: MimRefinerModel, tmp_path: Path
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: embed(encoder, images),
        lambda: evaluate(encoder, images),
    ]
    if not (isinstance(images, np.ndarray) and images.ndim == 2):
        calls.append(lambda: cluster(images, model=encoder))
    if images is not None:
        calls.append(lambda: refine(images, model=encoder, output_dir=tmp_path / "out", **RUN))
    for call in calls:
        with pytest.raises((ValueError, FileNotFoundError)) as refused:
            call()
        line = str(refused.value)
        is_evaluation = "images" in line and isinstance(images, np.ndarray)
        assert re.search(says, line) or is_evaluation, line
        assert len(line.splitlines()) == 1 and len(line) < 500
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize(
    ("vectors", "settings", "says"),
    [
        (np.full((9, 4), np.nan), {}, "9 of 9 vectors hold NaN or infinity, first row 0"),
        (np.ma.masked_less(np.eye(9), 0.5), {}, "9 of 9 vectors hold NaN or infinity, first row 0"),
        (
            np.eye(9) * 1e-30,
            {},
            "9 of 9 vectors are too short .*1.0e-30; multiply",
        ),
        (np.full((9, 4), 1e60), {}, "9 of 9 vectors are too long for float32, first row 0; divide"),
        (np.zeros((9, 0)), {}, r"ndarray of shape \(9, 0\) holds no vectors"),
        (np.zeros(9, np.int64), {}, r"ndarray of shape \(9,\) holds no vectors.*labels"),
        (np.zeros((0, 4)), {}, "no images"),
        ([[1.0, 2.0], [3.0]], {}, "begins with a vector of 2 numbers, but not all"),
        ([np.eye(4)[0], "a.png"], {}, "begins with a vector of 4 numbers, but not all"),
        (np.eye(4), {"num_clusters": 12}, "num_clusters is 12 for 4"),
        (np.eye(4), {"method": "kmean"}, "'kmean'.*'kmeans'"),
        (np.eye(4), {"model": "facebook/vit-mae-base"}, "model='facebook/vit-mae-base': is for"),
        (np.eye(4), {"out": "groups"}, "out='groups': is for images"),
    ],
)
def test_vectors_that_are_none(vectors: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        cluster(vectors, **settings)
    assert len(str(refused.value).splitlines()) == 1


def test_settings_are_arguments_in_python_and_flags_in_the_shell(
    pixels: np.ndarray, encoder: MimRefinerModel
) -> None:
    with pytest.raises(ValueError, match=r"^queue_size=8: must be at least batch_size=16"):
        refine(pixels, model=encoder, **{**RUN, "queue_size": 8})
    with pytest.raises(ValueError, match=r"^epochs='many': must be of the type"):
        refine(pixels, model=encoder, epochs="many")
    with pytest.raises(TypeError, match=r"no setting 'epoch'; did you mean epochs\?"):
        refine(pixels, model=encoder, epoch=3)
    with pytest.raises(ValueError, match=r"^callbacks=3: each must be a function of \(step,"):
        refine(pixels, model=encoder, callbacks=3, dry_run=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^No model is given, and the default"):
        cluster(pixels)
    with pytest.raises(ValueError, match=r"^split='test': chooses a part"):
        refine(pixels, model=encoder, split="test")
    with pytest.raises(ValueError, match=r"^against=MimRefinerModel: this is the model itself"):
        evaluate(encoder, pixels, against=encoder)
    with in_the_shell():
        assert setting("head_blocks", [1, 2]) == "--head_blocks 1 2"
        assert setting("DESTINATION", Path("out")) == "DESTINATION out"
    assert setting("head_blocks", [1, 2]) == "head_blocks=[1, 2]"
    assert setting("output_dir") == "output_dir"


def test_objects_are_never_printed_whole(pixels: np.ndarray) -> None:
    images = [Image.fromarray(image) for image in pixels]
    assert shown(images).startswith("[Image, ") and shown(images).endswith("... 40 in all]")
    assert shown(pixels) == "ndarray of shape (40, 32, 32, 3)"
    assert len(shown("x" * 10_000)) < 400
    with pytest.raises(ValueError) as refused:
        RefineRecipe(model="m", dataset=images)  # type: ignore[arg-type]
    assert len(str(refused.value)) < 500


def test_normalised_images_are_remarked(
    pixels: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    open_images(torch.from_numpy(pixels) / 127.5 - 1)
    assert "before they are normalised" in caplog.text


@pytest.mark.parametrize("command", ["evaluate", "pretrain"])
def test_nothing_is_written_among_the_images(
    folder: Path, models: dict[str, str], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pictures of a report, or a model, would lie between the photos of the next run."""
    before = sorted(folder.rglob("*"))
    words = [str(folder), "--output_dir", str(folder / "out")]
    if command == "evaluate":
        words += ["--model", models["vit_mae"]]
    assert cli.main([command, *words]) == 2
    assert "lie within each other" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_floats_without_data_and_of_two_ranges_are_remarked(
    pixels: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    """Each image finds its own range, and has black where it has no data: both are said."""
    open_images(pixels.astype(np.float32) / 255)
    open_images(pixels.astype(np.float32))
    assert caplog.text == ""
    given = pixels.astype(np.float32)
    given[1, :3] = np.nan
    given[2, 0, 0, 0] = np.inf
    given[3] /= 255
    open_images(given)
    assert "2 images hold NaN or infinity; these pixels become black" in caplog.text
    rest = len(pixels) - 1
    assert f"of 1 images of floats 1 is white, for no value is above it, and of {rest}" in (
        caplog.text
    )


@pytest.mark.parametrize("number", [2.5, True, "3", np.float32(2)])
def test_a_number_of_groups_is_a_whole_number(number: Any) -> None:
    vectors = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    with pytest.raises(ValueError, match=r"num_clusters is .* whole number, or left out"):
        cluster(vectors, num_clusters=number)
    assert cluster(vectors, num_clusters=np.int64(2)).num_clusters == 2


def test_the_fingerprint_is_that_of_the_content(pixels: np.ndarray, folder: Path) -> None:
    assert open_images(list(pixels)).fingerprint == open_images(pixels.copy()).fingerprint
    changed = pixels.copy()
    changed[5, 0, 0, 0] ^= 1
    assert open_images(changed).fingerprint != open_images(pixels).fingerprint
    paths = sorted(folder.iterdir())
    assert open_images(paths).fingerprint == open_images(folder).fingerprint

    def table() -> datasets.Dataset:
        return datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels]})

    assert open_images(table()).fingerprint == open_images(table()).fingerprint


def test_labels_of_objects(pixels: np.ndarray) -> None:
    numbers = open_images([(image, i % 3) for i, image in enumerate(pixels)])
    assert numbers.labels is not None and numbers.num_classes == 3
    words = open_images([(image, "ab"[i % 2]) for i, image in enumerate(pixels)])
    assert words.class_names == ["a", "b"] and words[1].label == 1
    source = TorchPictures(pixels, lambda image, i: (image, i % 2))
    source.classes = ["cat", "dog"]  # type: ignore[attr-defined]
    assert open_images(source).class_names == ["cat", "dog"]
    assert open_images([(image, None) for image in pixels]).labels is None
