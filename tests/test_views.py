"""Views: operations against goldens of the authors' code, draws against torchvision, the same bits
in any arrangement.
"""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from golden_cases import facts, tensors
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from mim_refiner_hf.data import views as V
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.data.order import BatchSampler
from mim_refiner_hf.data.stream import open_stream

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


Golden = tuple[Image.Image, dict[str, Tensor], dict[str, Any]]


@pytest.fixture(scope="module")
def golden(goldens: Path) -> Golden:
    inputs, outputs = tensors("byol-aug")
    image = Image.fromarray(inputs["image_uint8_chw"].permute(1, 2, 0).numpy())
    return image, outputs, facts("byol-aug", "deterministic.json")


def chw(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]


def small_crop(colour: bool = False) -> V.MultiCrop:
    return V.MultiCrop(V.view_specs(2, 3, 16, 8, (0.25, 1.0), (0.05, 0.25), colour))


def test_operations_equal_the_goldens(golden: Golden) -> None:
    image, expected, parameters = golden
    box = tuple(parameters["resized_crop_top_left_h_w"])
    actual = {"grayscale": V.greyscale(image), "solarize128": V.solarise(image)}
    for name in expected:
        if name.startswith("resized_crop_"):
            actual[name] = V.resized_crop(image, box, int(name.removeprefix("resized_crop_")))
        if name.startswith("blur_sigma"):
            actual[name] = V.gaussian_blur(image, float(name.removeprefix("blur_sigma")))
    jittered = image
    for name, factor in parameters["color_jitter_sequence"]:
        jittered = getattr(V, f"adjust_{name}")(jittered, factor)
    actual["color_jitter"] = jittered
    assert set(actual) == set(expected) - {"normalized"}
    for name, view in actual.items():
        assert torch.equal(chw(view), expected[name]), name
    assert torch.equal(V.normalise(chw(image), MEAN, STD), expected["normalized"])


@pytest.mark.parametrize("turn", [-0.1, -0.03, 0.0, 0.001, 0.07, 0.1, 0.5])
def test_hue_equals_torchvision(golden: Golden, turn: float) -> None:
    assert np.array_equal(
        np.array(V.adjust_hue(golden[0], turn)), np.array(tv.adjust_hue(golden[0], turn))
    )


def test_normalise_equals_torchvision_for_every_value_and_leading_shape() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16).contiguous()
    expected = tv.normalize(pixels.float().div(255), MEAN, STD)
    assert torch.equal(V.normalise(pixels, MEAN, STD), expected)
    assert torch.equal(
        V.normalise(pixels.expand(2, 5, 3, 16, 16), MEAN, STD), expected.expand(2, 5, 3, 16, 16)
    )


@pytest.mark.parametrize(
    ("width", "height", "scale"),
    [(80, 60, (0.25, 1.0)), (300, 200, (0.05, 0.25)), (400, 20, (0.25, 1.0)), (7, 90, (0.9, 1.0))],
)
def test_crops_are_distributed_as_torchvisions(
    width: int, height: int, scale: tuple[float, float]
) -> None:
    count, rng = 4000, np.random.default_rng(0)
    ours = np.array([V.draw_crop(width, height, scale, rng) for _ in range(count)], dtype=float)
    image = torch.empty(1, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)],
        dtype=float,
    )
    assert (
        (ours[:, 0] + ours[:, 2]).max() <= height
        and (ours[:, 1] + ours[:, 3]).max() <= width
        and ours.min() >= 0
    )
    spread = np.sqrt((ours.var(0) + theirs.var(0)) / count)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) <= 4.5 * spread).all()
    assert np.allclose(ours.std(0), theirs.std(0), rtol=0.08, atol=1e-9)


def test_specs_are_those_of_the_authors(goldens: Path) -> None:
    stated = facts("byol-aug", "byol_aug.json")["views"]
    by_view = [
        {
            step["kind"].removeprefix("kd_").removeprefix("random_"): step
            for step in view["transform"]
        }
        for view in stated
        for _ in range(view["n_views"])
    ]
    crops = [steps["resized_crop"] for steps in by_view]
    num_local = sum(view["n_views"] for view in stated if view["name"] == "local")
    num_global = len(by_view) - num_local

    specs = V.view_specs(
        num_global,
        num_local,
        crops[0]["size"],
        crops[-1]["size"],
        tuple(crops[0]["scale"]),
        tuple(crops[-1]["scale"]),
        colour=True,
    )
    assert [spec.local for spec in specs] == [False] * num_global + [True] * num_local
    for steps, spec in zip(by_view, specs, strict=True):
        assert spec.size == steps["resized_crop"]["size"]
        assert list(spec.scale) == steps["resized_crop"]["scale"]
        blur = steps["gaussian_blur_pil"]
        assert spec.blur_p == blur.get("p", 1.0)
        assert tuple(blur["sigma"]) == V.BLUR_SIGMAS
        assert spec.solarize_p == steps.get("solarize", {"p": 0})["p"]
        assert steps["grayscale"]["p"] == V.GREYSCALE_P

        names = ("p", "brightness", "contrast", "saturation", "hue")
        jitter = [steps["color_jitter"][name] for name in names]
        assert jitter == [V.JITTER_P, *V.JITTER_STRENGTHS]


def test_views_are_drawn_in_the_stated_order_and_frequency(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    names = [
        "resized_crop",
        "flip_horizontally",
        "colour_jitter",
        "gaussian_blur",
        "greyscale",
        "solarise",
    ]
    for name in names:
        monkeypatch.setattr(V, name, lambda image, *_, name=name: calls.append(name) or image)
    image, rng, count = Image.new("RGB", (4, 4)), np.random.default_rng(0), 3000
    for spec, blur_p, solarise_p in zip(
        V.view_specs(2, 1, 4, 4, (0.5, 1.0), (0.5, 1.0), True),
        (1, 0.1, 0.5),
        (0, 0.2, 0),
        strict=True,
    ):
        times = dict.fromkeys(names, 0)
        for _ in range(count):
            calls.clear()
            V.make_view(image, spec, rng)
            assert calls == [name for name in names if name in calls]
            for name in calls:
                times[name] += 1
        for name, p in zip(names, (1, 0.5, 0.8, blur_p, 0.2, solarise_p), strict=True):
            assert abs(times[name] - p * count) <= 4.5 * np.sqrt(count * p * (1 - p)), name


def test_jitter_equals_torchvision_with_the_same_factors() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    orders = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        brightness, contrast, saturation, hue = 2 * rng.random(4) - 1
        order = rng.permutation(4).tolist()
        orders.add(tuple(order))
        steps = [
            (tv.adjust_brightness, 1 + 0.4 * brightness),
            (tv.adjust_contrast, 1 + 0.4 * contrast),
            (tv.adjust_saturation, 1 + 0.2 * saturation),
            (tv.adjust_hue, 0.1 * hue),
        ]
        expected = image
        for place in order:
            expected = steps[place][0](expected, steps[place][1])
        assert np.array_equal(
            np.array(V.colour_jitter(image, V.draw_jitter(np.random.default_rng(seed)))),
            np.array(expected),
        )
    assert len(orders) > 12


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
@pytest.mark.parametrize("colour", [True, False])
def test_multicrop_stacks_what_make_view_draws(mode: str, channels: int, colour: bool) -> None:
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    ).convert(mode)
    specs = V.view_specs(2, 3, 16, 8, (0.25, 1.0), (0.05, 0.25), colour)
    global_views, local_views = V.MultiCrop(specs)(image, V.view_rng(1, 2, 3)).values()
    assert global_views.shape == (2, channels, 16, 16) and local_views.shape == (3, channels, 8, 8)
    rng = V.view_rng(1, 2, 3)
    expected = [chw(V.make_view(image, spec, rng)) for spec in specs]
    assert all(
        torch.equal(a, b) for a, b in zip([*global_views, *local_views], expected, strict=True)
    )


def test_multicrop_without_local_views_and_with_mixed_sizes() -> None:
    specs = V.view_specs(2, 0, 8, 8, (0.5, 1.0), (0.1, 0.5), False)
    global_views, local_views = V.MultiCrop(specs)(
        Image.new("L", (8, 8)), V.view_rng(0, 0, 0)
    ).values()
    assert (
        global_views.shape == (2, 1, 8, 8)
        and local_views.shape == (0, 1, 0, 0)
        and local_views.dtype == torch.uint8
    )
    with pytest.raises(ValueError, match=r"share one size, not \[8, 9\]"):
        V.MultiCrop([*specs, V.ViewSpec(9, (0.5, 1.0), 0, 0, False)])


def test_generators_of_neighbouring_seeds_epochs_and_images_differ() -> None:
    keys = [(s, e, i) for s in range(3) for e in range(3) for i in range(3)]
    assert len({V.view_rng(*key).integers(2**62) for key in keys}) == len(keys)
    assert V.view_rng(1, 2, 3).random() == V.view_rng(1, 2, 3).random()


def load_all(
    source: object, workers: int, start: int = 0, rank: int = 0, world_size: int = 1, steps: int = 6
) -> list[dict[str, Tensor]]:
    sampler = BatchSampler(
        source,
        batch_size=8,
        seed=3,
        steps=steps,
        start_step=start,
        rank=rank,
        world_size=world_size,
    )
    return list(
        DataLoader(
            V.ViewDataset(source, small_crop(True), seed=5),
            batch_sampler=sampler,
            num_workers=workers,
        )
    )


def assert_same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> None:
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys() and x["broken"] == y["broken"]
        assert all(torch.equal(x[key], y[key]) for key in x if key != "broken")


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_do_not_depend_on_workers_processes_or_start(
    streaming: bool, shared: Path, tmp_path: Path
) -> None:
    if streaming:
        datasets.Dataset.from_parquet(str(shared / "data/cifar10/test.parquet")).select(
            range(20)
        ).save_to_disk(tmp_path)
    source = open_stream(str(tmp_path)) if streaming else open_images("digits").subset(range(20))
    whole = load_all(source, workers=0)
    assert whole[0]["global_views"].shape == (8, 2, 3, 16, 16) and whole[0][
        "local_views"
    ].shape == (8, 3, 3, 8, 8)
    assert_same(whole, load_all(source, workers=2))
    assert_same(whole[4:], load_all(source, workers=0, start=4))
    halves = [load_all(source, workers=0, rank=rank, world_size=2) for rank in (0, 1)]
    joined = [
        {key: torch.cat([a[key], b[key]]) for key in a if key != "broken"}
        for a, b in zip(*halves, strict=True)
    ]
    assert_same(whole, [batch | {"broken": [""] * 8} for batch in joined])


def test_a_sample_keeps_its_views_in_a_subset() -> None:
    images = open_images("digits", num_channels=1)
    whole, part = (
        V.ViewDataset(source, small_crop(), seed=0) for source in (images, images.subset([40, 7]))
    )
    for key, expected in ((1, 7), (0, 40)):
        ours, theirs = part[2, key], whole[2, expected]
        assert (
            ours["index"] == theirs["index"] == expected
            and ours["label"] == images.labels[expected]
        )
        assert torch.equal(ours["global_views"], theirs["global_views"])
    assert not torch.equal(whole[2, 7]["global_views"], whole[3, 7]["global_views"])


def test_small_sets_are_decoded_once_and_large_ones_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = open_images("digits").subset(range(4))
    decoded: list[int] = []
    get = type(images).__getitem__
    monkeypatch.setattr(
        type(images), "__getitem__", lambda self, i: decoded.append(i) or get(self, i)
    )
    dataset = V.ViewDataset(images, small_crop(), seed=0)
    first = dataset[0, 1]["global_views"]
    assert torch.equal(dataset[0, 1]["global_views"], first) and decoded == [1]
    monkeypatch.setattr(V, "CACHE_BYTES", 4 * 8 * 8 * 3 - 1)
    dataset = V.ViewDataset(images, small_crop(), seed=0)
    assert torch.equal(dataset[0, 1]["global_views"], first) and torch.equal(
        dataset[0, 1]["global_views"], first
    )
    assert decoded == [1, 1, 1]


@pytest.mark.parametrize(("size", "expected"), [(224, 1.0), (448, 1.0), (112, 0.5), (28, 0.125)])
def test_blur_shrinks_with_small_views(
    size: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sigmas: list[float] = []
    monkeypatch.setattr(V, "gaussian_blur", lambda image, sigma: sigmas.append(sigma) or image)
    specs = V.view_specs(1, 1, size, 14, (0.25, 1.0), (0.05, 0.25), colour=True)
    assert [spec.blur_scale for spec in specs] == [expected, expected]
    image = Image.new("RGB", (30, 30), "grey")
    for seed in range(40):
        V.make_view(image, specs[0], np.random.default_rng(seed))
    assert len(sigmas) == 40 and 0.1 * expected <= min(sigmas) < max(sigmas) <= 2.0 * expected
    assert max(sigmas) > 1.8 * expected
