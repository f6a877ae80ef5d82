"""Images of 1 to 16 channels: read, fitted to, refined on, and all that follows a refinement."""

import io
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from small_encoder import make_encoder
from timm.models import adapt_input_conv
from transformers import AutoImageProcessor, AutoModel, pipeline

from mim_refiner_hf import (
    MimRefinerImageProcessor,
    MimRefinerModel,
    RefineRecipe,
    cluster,
    embed,
    evaluate,
    load_encoder,
    refine,
)
from mim_refiner_hf.clustering import channels as reading
from mim_refiner_hf.clustering.channels import ChannelImage
from mim_refiner_hf.clustering.decoding import count_channels, decode_image
from mim_refiner_hf.conversion.channels import extend_channels
from mim_refiner_hf.data.channels import measure_channels
from mim_refiner_hf.data.colour import colour_batch_, colour_view_, operations
from mim_refiner_hf.data.fast_views import FastMultiCrop
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.data.views import MultiCrop, ViewSpec, view_rng
from mim_refiner_hf.model.image_processing_mim_refiner import to_eight_bits
from mim_refiner_hf.publishing.hub import save_model_folder
from mim_refiner_hf.runs.channels import fit_channels
from mim_refiner_hf.runs.embed import store_features

# loads a saved model without the package, and prints the sum of its features
WITHOUT_PACKAGE = """
import sys
import numpy as np
assert "mim_refiner_hf" not in sys.modules
sys.modules["mim_refiner_hf"] = None
from transformers import AutoImageProcessor, AutoModel, pipeline
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
images = list(np.load(sys.argv[2]))
pixels = processor(images, return_tensors="pt").pixel_values
np.save(sys.argv[3], model.features_of(pixels).detach().numpy())
pipe = pipeline("image-clustering", model=sys.argv[1], trust_remote_code=True, device="cpu")
assert len(pipe(images, num_clusters=2)) == len(images)
"""


def arrays(count: int, channels: int, dtype: Any = np.uint16, seed: int = 0) -> np.ndarray:
    """Noise (count, 20, 24, channels), 0 to 9000, or up to 255 or 1; the first half is darker."""
    noise = np.random.default_rng(seed).random((count, 20, 24, channels))
    noise[: count // 2] /= 3
    top = {np.uint8: 255, np.uint16: 9000}.get(dtype, 1)
    return (noise * top).astype(dtype)


def start(**changes: Any) -> MimRefinerModel:
    """A tiny encoder with its image processor."""
    encoder = make_encoder(**changes)
    size = {"height": 16, "width": 16}
    vars(encoder)["image_processor"] = MimRefinerImageProcessor(
        size={"shortest_edge": 16}, crop_size=size
    )
    return encoder


# --- reading


@pytest.mark.parametrize("channels", [2, 4, 5, 13, 16])
@pytest.mark.parametrize("form", ["behind", "in front", "npy", "tiff", "planar tiff"])
def test_every_form_of_an_image_gives_the_same_pixels(
    channels: int, form: str, tmp_path: Path
) -> None:
    pixels = arrays(1, channels)[0]
    source: Any = pixels
    if form == "in front":
        source = torch.from_numpy(pixels.astype(np.int32)).permute(2, 0, 1)
    elif form == "npy":
        source = tmp_path / "a.npy"
        np.save(source, pixels)
    elif form == "tiff":
        source = tmp_path / "a.tif"
        tifffile.imwrite(source, pixels, photometric="minisblack", planarconfig="contig")
    elif form == "planar tiff":
        source = tmp_path / "a.tiff"
        stacked = pixels.transpose(2, 0, 1)
        tifffile.imwrite(source, stacked, photometric="minisblack", compression="lzw")

    image = decode_image(source, channels)
    assert isinstance(image, ChannelImage)
    assert image.size == (24, 20) and len(image.getbands()) == channels
    assert np.array_equal(np.asarray(image), pixels)
    # pages of a TIFF without metadata may be those of a scan
    expected = None if form == "planar tiff" else channels
    assert count_channels(source) == expected


def test_photos_stay_photos(tmp_path: Path) -> None:
    photo = Image.fromarray(arrays(1, 3, np.uint8)[0])
    for ending, mode in (("png", "RGB"), ("tif", "RGB"), ("tif", "RGBA"), ("tif", "L")):
        path = tmp_path / f"{mode}.{ending}"
        photo.convert(mode).save(path)
        assert count_channels(path) is None
        shown = Image.open(path).convert("RGB")
        assert np.array_equal(np.asarray(decode_image(path)), np.asarray(shown))
    # transparency is a channel for those who ask for four
    rgba = decode_image(tmp_path / "RGBA.tif", 4)
    assert np.asarray(rgba)[..., 3].min() == 255


def test_five_channels_of_a_microscope(tmp_path: Path) -> None:
    """ImageJ's files say which of their pages are channels."""
    pixels = arrays(1, 5)[0]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels.transpose(2, 0, 1), imagej=True, metadata={"axes": "CYX"})
    assert count_channels(path) == 5
    assert np.array_equal(np.asarray(decode_image(path, 5)), pixels)


def test_stacks_of_slices_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    stack = np.zeros((4, 5, 20, 24), np.uint16)
    tifffile.imwrite(path, stack, imagej=True, metadata={"axes": "ZCYX"})
    with pytest.raises(ValueError, match=r"its axes are ZCYX with sizes \(4, 5, 20, 24\)"):
        decode_image(path, 5)


def test_without_tifffile_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, arrays(1, 13)[0], photometric="minisblack", planarconfig="contig")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r'a.tif: .*pip install "mim_refiner_hf\[tiff\]"'):
        decode_image(path, 13)


def test_values_that_are_unknown_are_refused(tmp_path: Path) -> None:
    pixels = arrays(1, 5, np.float32)[0]
    pixels[3, 4, 1] = np.nan
    pixels[3, 5, 1] = np.inf
    with pytest.raises(ValueError, match="2 of its 2400 values are NaN or infinite"):
        decode_image(pixels, 5)

    # pixels that a GeoTIFF declares to be without data: black, and not too many
    path = tmp_path / "a.tif"
    for rows, message in ((4, ""), (12, "60% of its pixels have no data")):
        deep = arrays(1, 5)[0] + np.uint16(1)
        deep[:rows] = 65535
        tags = [(42113, "s", 0, "65535", True)]
        layout: Any = {"photometric": "minisblack", "planarconfig": "contig"}
        tifffile.imwrite(path, deep, **layout, extratags=tags)
        if message:
            with pytest.raises(ValueError, match=message):
                decode_image(path, 5)
            continue
        seen = np.asarray(decode_image(path, 5))
        assert seen[:rows].max() == 0 and np.array_equal(seen[rows:], deep[rows:])


def test_an_image_larger_than_allowed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_VALUES", 1000)
    with pytest.raises(ValueError, match="it has 2400 values, more than 1000"):
        decode_image(arrays(1, 5)[0], 5)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("channels", [3, 5])
@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((10**5, 10**5, 3), "|u1"),
        ((10**14, 10**4, 3), "<f8"),
        ((2**63, 2**63, 3), "|u1"),
        ((-1, 5, 3), "|u1"),
        ((4, 4, 3), "|V100000000"),
    ],
)
def test_a_header_that_promises_more_than_the_file_has_is_refused(
    shape: tuple[int, ...], kind: str, channels: int
) -> None:
    file = io.BytesIO()
    header = {"shape": shape, "fortran_order": False, "descr": kind}
    np.lib.format.write_array_header_1_0(file, header)
    file.write(bytes(48))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="Cannot decode an image"):
        decode_image(file.getvalue(), channels)
    # in kB: room that is promised is not filled
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


def test_more_channels_than_there_may_be_are_told_how_many_may_be() -> None:
    with pytest.raises(ValueError, match=r"\(9, 8, 17\).*as many, up to 16"):
        decode_image(np.zeros((9, 8, 17)), 3)


def test_a_file_of_python_objects_is_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        decode_image(path, 5)


@pytest.mark.parametrize("kind", ["array", "lists", "folder"])
def test_tables_and_folders_of_arrays(kind: str, tmp_path: Path) -> None:
    pixels = arrays(6, 5)
    if kind == "folder":
        for number, image in enumerate(pixels):
            folder = tmp_path / "images" / ("dark" if number < 3 else "light")
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{number}.npy", image)
        opened = open_images(tmp_path / "images", num_channels=5)
        assert opened.class_names == ["dark", "light"]
    else:
        inner = datasets.Array3D((20, 24, 5), "uint16")
        if kind == "lists":
            inner = datasets.List(datasets.List(datasets.List(datasets.Value("uint16"))))
        features = datasets.Features({"tile": inner, "label": datasets.Value("int64")})
        rows = {"tile": list(pixels), "label": [0, 0, 0, 1, 1, 1]}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / "a.parquet")
        opened = open_images(tmp_path / "a.parquet", num_channels=5)
        in_memory = open_images(table, num_channels=5)
        assert np.array_equal(np.asarray(in_memory[2].image), pixels[2])
    assert opened.labels is not None and opened.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for place, image in enumerate(pixels):
        seen = np.asarray(opened[place].image)
        assert seen.dtype == np.uint16 and np.array_equal(seen, image)


# --- the rules


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 13, 16])
def test_filters_are_extended_as_timm_does(channels: int) -> None:
    encoder = start()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    extended = extend_channels(encoder, channels)
    name = "embeddings.patch_embeddings.weight"
    expected = adapt_input_conv(channels, before[name])
    torch.testing.assert_close(extended.state_dict()[name], expected)
    assert extended.config.num_channels == channels

    for other, value in extended.state_dict().items():
        assert other == name or torch.equal(value, before[other])
    # the start is as it was
    assert encoder.config.num_channels == 3
    assert torch.equal(encoder.state_dict()[name], before[name])


@pytest.mark.parametrize("channels", [1, 6, 9])
def test_equal_channels_give_what_they_gave(channels: int) -> None:
    encoder = start()
    grey = torch.rand(2, 1, 16, 16)
    expected = encoder(grey.expand(-1, 3, -1, -1)).pooler_output
    found = extend_channels(encoder, channels)(grey.expand(-1, channels, -1, -1)).pooler_output
    torch.testing.assert_close(found, expected)


def test_ranges_are_measured_once_for_a_run() -> None:
    eight = measure_channels(open_images(arrays(9, 5, np.uint8)), 5, None)
    assert eight.value_range == (0, 255) and eight.clipped == 0
    unit = measure_channels(open_images(arrays(9, 5, np.float32)), 5, None)
    assert unit.value_range == (0, 1)

    # a few clouds do not make all else dark
    deep = arrays(20, 5)
    deep[0, 0, 0] = 60000
    measured = measure_channels(open_images(deep), 5, None)
    assert measured.value_range[0] == 0 and 8900 < measured.value_range[1] < 9000
    assert 0 < measured.clipped < 0.002
    decibels = arrays(9, 2, np.float32) * 30 - 40
    low, high = measure_channels(open_images(decibels), 2, None).value_range
    assert -40 < low < -39.5 and -11 < high < -10

    asked = measure_channels(open_images(deep), 5, (0.0, 10000.0))
    values = np.clip(deep / 10000, 0, 1).reshape(-1, 5)
    np.testing.assert_allclose(asked.mean, values.mean(0), atol=1e-3)
    np.testing.assert_allclose(asked.std, values.std(0), atol=1e-3)


def test_values_become_bytes() -> None:
    deep = np.array([0, 4000, 10000, 20000], np.uint16)
    assert to_eight_bits(deep, (0, 10000)).tolist() == [0, 102, 255, 255]
    assert to_eight_bits(np.array([-40.0, -10.0, np.float32(-100)]), (-40, -10)).tolist() == [
        0,
        255,
        0,
    ]
    assert to_eight_bits(np.array([0, 65535], np.uint16), None).tolist() == [0, 255]
    assert to_eight_bits(np.array([7, 200], np.uint8), (0, 10)).tolist() == [7, 200]
    for wrong in (np.array([0.0, 1.5]), np.array([1, 2], np.int16)):
        with pytest.raises(ValueError, match="value_range"):
            to_eight_bits(wrong, None)


@pytest.mark.parametrize("channels", [2, 4, 5, 13])
def test_a_view_is_that_of_each_channel_as_a_grey_image(channels: int) -> None:
    """By the same draws, exact and fast; nothing is solarised."""
    pixels = arrays(1, channels, np.uint8)[0]
    spec = ViewSpec(16, (0.3, 1.0), blur_p=0.5, solarize_p=0.0, colour=True)
    solarising = ViewSpec(16, (0.3, 1.0), blur_p=0.5, solarize_p=1.0, colour=True)
    fast = FastMultiCrop([solarising], hand_over=False)
    for seed in range(12):
        for make, exactly in ((MultiCrop([solarising]), True), (fast, False)):
            found = make(ChannelImage(pixels), view_rng(seed, 0, 0))["global_views"][0]
            for channel, view in enumerate(found):
                grey = Image.fromarray(np.ascontiguousarray(pixels[..., channel]))
                alone = MultiCrop([spec]) if exactly else FastMultiCrop([spec], hand_over=False)
                assert torch.equal(view, alone(grey, view_rng(seed, 0, 0))["global_views"][0, 0])


# --- whole runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "dtype", "views"),
    [(1, np.uint8, "exact"), (5, np.float32, "fast"), (13, np.uint16, "exact")],
)
def test_from_arrays_to_groups(
    channels: int, dtype: Any, views: Any, tmp_path: Path, quick: None, capfd: Any
) -> None:
    pixels = arrays(48, channels, dtype)
    rows = [(image, int(number >= 24)) for number, image in enumerate(pixels)]
    result = refine(
        rows,
        model=start(),
        # arrays of one channel are grey pictures, which a model of colours reads as such
        num_channels=1 if channels == 1 else None,
        output_dir=str(tmp_path / "run"),
        eval_fraction=0.5,
        max_steps=3,
        local_views=1,
        views=views,
    )
    told = capfd.readouterr().out
    assert f"bands   {channels}, extended from the 3 of the start" in told
    assert ("they are no colours" in told) == (channels != 1)
    assert result.encoder.config.num_channels == channels
    assert (tmp_path / "run/clusters.png").is_file()

    folder = str(tmp_path / "run/model")
    images = list(pixels)
    vectors = embed(folder, images)
    np.testing.assert_allclose(load_encoder(folder).encode(images), vectors, atol=1e-5)
    groups = cluster(images, folder, num_clusters=2, out=str(tmp_path / "groups"))
    assert len(set(groups.labels[:24])) == 1 and groups.labels[0] != groups.labels[-1]
    assert len(list((tmp_path / "groups").rglob("*.png"))) >= 48
    # the start of a model of many channels is extended as it was
    against = None if channels == 1 else start()
    scores = evaluate(folder, rows, against=against, protocols=["linear_probe"])
    assert scores["after"]["knn_accuracy"] > 0.9
    assert (scores["before"] is None) == (channels == 1)
    assert len(pipeline("image-clustering", model=folder)(images, num_clusters=2)) == 48

    # with nothing of ours but what lies in the folder
    model = AutoModel.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    seen = processor(images, return_tensors="pt").pixel_values
    assert seen.shape == (48, channels, 16, 16)
    np.testing.assert_allclose(model.features_of(seen).detach().numpy(), vectors, atol=1e-5)
    by_pillow = AutoImageProcessor.from_pretrained(folder, backend="pil")
    again = torch.as_tensor(np.stack(by_pillow(images)["pixel_values"]))
    assert (again - seen).abs().max() < 0.05


@pytest.mark.slow
def test_a_saved_model_needs_no_package(tmp_path: Path) -> None:
    pixels = arrays(6, 5)
    encoder, done = fit_channels(start(), open_images(pixels))
    assert done
    save_model_folder(tmp_path / "model", encoder, vars(encoder)["image_processor"])
    np.save(tmp_path / "images.npy", pixels)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    places = [str(tmp_path / name) for name in ("model", "images.npy", "features.npy")]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, *places],
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
    expected = encoder.encode(list(pixels))
    np.testing.assert_allclose(np.load(places[2]), expected, atol=1e-5)


def test_a_start_is_extended_for_embed_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    pixels = arrays(4, 13)
    vectors = embed(start(), list(pixels))
    assert vectors.shape == (4, 32) and np.isfinite(vectors).all()
    assert "reads 3 channels, the images have 13, extended from the 3" in caplog.text


# --- what does not fit


def test_numbers_that_there_are_not() -> None:
    for count in (0, 17):
        with pytest.raises(ValueError, match=f"num_channels={count}: .*1 to 16"):
            RefineRecipe(num_channels=count)
        with pytest.raises(ValueError, match=f"num_channels is {count}; images have 1 to 16"):
            open_images([np.zeros((8, 8, 3), np.uint8)], num_channels=count)
    with pytest.raises(ValueError, match=r"value_range=\[5, 5\]: .*low < high"):
        RefineRecipe(value_range=[5, 5])


def test_an_image_of_another_number_is_named(tmp_path: Path) -> None:
    for number, image in enumerate([*arrays(5, 13), arrays(1, 4)[0]]):
        np.save(tmp_path / f"{number}.npy", image)
    message = r"5\.npy: it has 4 channels, and 13 are expected"
    with pytest.raises(ValueError, match=message) as error:
        fit_channels(start(), open_images(tmp_path))
    assert "\n" not in str(error.value)


def test_a_model_of_another_number_reads_none_and_says_so(tmp_path: Path) -> None:
    model = start(num_channels=5)
    vars(model)["image_processor"].value_range = [0.0, 9000.0]
    for number, image in enumerate(arrays(3, 13)):
        np.save(tmp_path / f"{number}.npy", image)
    with pytest.raises(ValueError, match=r"3 of 3 images cannot .*13 channels, and 5 are expected"):
        embed(model, tmp_path)
    with pytest.raises(ValueError, match=r"None of the 3 .*it has 13 channels, and 5 are expected"):
        store_features(model, tmp_path, tmp_path / "features")


def test_settings_that_say_nothing_of_the_images() -> None:
    photos = open_images([np.zeros((8, 8, 3), np.uint8)] * 3)
    with pytest.raises(ValueError, match=r"value_range=\[0, 1\]: .*these have 3"):
        fit_channels(start(), photos, value_range=[0, 1])
    with pytest.raises(ValueError, match="these images have 8 bits"):
        fit_channels(start(), open_images(arrays(3, 5, np.uint8)), value_range=[0, 9])
    mixed = [arrays(1, 5)[0], arrays(1, 5, np.float32)[0]]
    with pytest.raises(ValueError, match="values of float32 and uint16"):
        fit_channels(start(), open_images(mixed))
    encoder, done = fit_channels(start(), photos)
    assert done == "" and encoder.config.num_channels == 3


def test_protocols_of_pictures_are_refused() -> None:
    model = start(num_channels=5)
    with pytest.raises(ValueError, match=r"robustness.*3 channels or 1, and the model reads 5"):
        evaluate(model, list(arrays(4, 5)), protocols=["robustness"])


@pytest.mark.parametrize("channels", [2, 5, 13])
def test_a_batch_on_a_device_is_that_of_its_views(channels: int) -> None:
    """What a GPU does to all views at once, and a CPU to one after the other."""
    specs = [ViewSpec(16, (0.3, 1.0), blur_p=0.0, solarize_p=1.0, colour=True)] * 12
    pixels = arrays(1, channels, np.uint8)[0]
    item = FastMultiCrop(specs, hand_over=True)(ChannelImage(pixels), view_rng(0, 0, 0))
    orders = operations(item["global_draws"], channels)
    one_by_one = [
        torch.from_numpy(colour_view_(view.numpy().astype(np.int16), order))
        for view, order in zip(item["global_views"], orders, strict=True)
    ]
    together = item["global_views"].to(torch.int16)
    colour_batch_(together, orders)
    assert (together - torch.stack(one_by_one)).abs().max() <= 1
