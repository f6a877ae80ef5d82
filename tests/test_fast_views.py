"""Fast views: every operation against Pillow and torchvision, whole views against the exact ones,
the same in any arrangement.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import functional as tv
from transformers import ViTMAEConfig, ViTMAEModel

from mim_refiner_hf import RefineRecipe, cli
from mim_refiner_hf.data import colour as C
from mim_refiner_hf.data import views as V
from mim_refiner_hf.data.fast_views import FastMultiCrop, fast_resized_crop, finished_views
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.data.order import BatchSampler
from mim_refiner_hf.runs.run import run

SPECS = V.view_specs(2, 3, 64, 32, (0.25, 1.0), (0.05, 0.25), colour=True)
BOX = (0, 0, 1, 1)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Colours of all kinds: a smooth field, edges, noise, and saturated corners."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(small).resize((90, 70), Image.Resampling.BICUBIC)).astype(int)
    pixels += rng.integers(-9, 10, pixels.shape)
    pixels[20:40, 30:50] = (255, 0, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def chw(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1).contiguous() if pixels.ndim == 3 else pixels[None]


def fast(image: Image.Image, **draw: Any) -> Tensor:
    return C.apply_colour(chw(image)[None], C.draw_table([V.ViewDraw(BOX, False, **draw)]))[0]


def difference(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() - b.float()).abs()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("place", "factors"), [(0, (0.6, 0.93, 1.37)), (1, (0.6, 1.02, 1.4)), (2, (0.8, 0.95, 1.2))]
)
def test_blends_are_within_a_grey_level_of_pillows(
    photo: Image.Image, mode: str, place: int, factors: tuple[float, ...]
) -> None:
    image = photo.convert(mode)
    for factor in factors:
        expected = chw(V.ADJUSTMENTS[place](image, factor))
        assert difference(fast(image, jitter=((place, factor),)), expected).max() <= 1
        assert not torch.equal(expected, chw(image)) or (mode == "L" and place == 2)


@pytest.mark.parametrize("turn", [-0.1, -0.07, -0.01, 0.0, 0.02, 0.06, 0.0999])
def test_hue_is_torchvisions_on_tensors(photo: Image.Image, turn: float) -> None:
    actual = fast(photo, jitter=((3, turn),))
    real = (
        tv.adjust_hue(chw(photo).float() / 255, int(turn * 255) / 255) * 255
    )  # no 8-bit HSV in between
    assert difference(actual, real).max() <= 2 and difference(actual, real).mean() <= 0.3
    # whose hue and saturation are cut to 8 bits: itself up to 11 levels off `real`
    pillow = chw(V.adjust_hue(photo, turn))
    assert difference(actual, pillow).max() <= 11 and difference(actual, pillow).mean() <= 0.9


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.41, 1.42, 2.0])
@pytest.mark.parametrize("has_opencv", [True, False])
def test_blur_is_pillows(
    photo: Image.Image, sigma: float, has_opencv: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_opencv:
        pytest.importorskip("cv2")
    else:
        monkeypatch.setattr(C, "opencv", lambda: None)
    apart = difference(fast(photo, sigma=sigma), chw(V.gaussian_blur(photo, sigma)))
    # Pillow rounds after each of six passes, we once
    assert apart.max() <= 2 and apart.mean() <= 0.7


@pytest.mark.parametrize("shape", [(3, 96, 61), (1, 5, 3), (6, 224, 224)])
def test_opencv_blurs_as_the_bands_do(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cv2")
    views = torch.randint(256, (2, *shape), dtype=torch.uint8).mT
    table = C.draw_table([V.ViewDraw(BOX, False, sigma=1.3), V.ViewDraw(BOX, False, sigma=0.4)])
    by_opencv = C.apply_colour(views, table)
    monkeypatch.setattr(C, "opencv", lambda: None)
    apart = difference(by_opencv, C.apply_colour(views, table))
    # ties are rounded to even by the one, up by the other
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3


def test_opencv_that_cannot_be_loaded_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    assert C.opencv.__wrapped__() is None
    assert "blurred without it: libGL.so.1" in caplog.text


def test_blur_taps_have_sum_one_and_pillows_variance() -> None:
    taps = C.blur_taps().double()
    distance = torch.arange(-6, 7).double()
    assert torch.allclose(taps.sum(1), torch.ones(len(taps), dtype=torch.float64), atol=1e-6)
    sigmas = torch.arange(len(taps)) / C.SIGMA_STEPS
    assert torch.allclose((taps * distance**2).sum(1).sqrt(), sigmas.double(), atol=1e-3)


def test_greyscale_and_solarise_are_pillows(photo: Image.Image) -> None:
    assert difference(fast(photo, grey=True), chw(V.greyscale(photo))).max() <= 1
    assert torch.equal(fast(photo, solarised=True), chw(V.solarise(photo)))
    grey = photo.convert("L")
    assert torch.equal(fast(grey, grey=True), chw(grey)) and torch.equal(
        fast(grey, jitter=((3, 0.1), (2, 1.2))), chw(grey)
    )


@pytest.mark.parametrize(
    ("box", "size"),
    [((3, 5, 60, 70), 96), ((0, 0, 70, 90), 16), ((10, 11, 9, 7), 98), ((1, 2, 1, 1), 8)],
)
def test_crops_are_pillows_and_flipped(photo: Image.Image, box: V.Box, size: int) -> None:
    pixels, exact = torch.from_numpy(np.array(photo)), V.resized_crop(photo, box, size)
    for flip, expected in ((False, exact), (True, V.flip_horizontally(exact))):
        crop = fast_resized_crop(pixels, V.ViewDraw(box, flip), size)
        assert difference(torch.from_numpy(crop.copy()), chw(expected)).max() <= 2


def test_a_batch_gets_what_each_view_gets(photo: Image.Image) -> None:
    """An accelerator gathers the views of each operation; a CPU takes one view after the other."""
    rng = np.random.default_rng(1)
    draws = [V.draw_view(*photo.size, SPECS[1 + place % 2], rng) for place in range(40)]
    views = torch.from_numpy(rng.integers(0, 256, (40, 3, 20, 24), dtype=np.uint8))
    table, before = C.draw_table(draws), views.clone()
    alone = C.apply_colour(views.view(8, 5, 3, 20, 24), table.view(8, 5, 11)).view_as(views)
    together = views.to(torch.int16)
    C.colour_batch_(together, C.operations(table, 3))
    apart = difference(together, alone)
    # a sum in another order may round the other way
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3
    assert torch.equal(views, before) and not torch.equal(alone, views)


@pytest.mark.parametrize(
    ("mode", "size"),
    [("RGB", (90, 70)), ("L", (90, 70)), ("RGB", (31, 333)), ("L", (8, 8)), ("RGB", (1, 5))],
)
@pytest.mark.parametrize("colour", [True, False])
def test_views_are_the_exact_ones_but_for_rounding(
    photo: Image.Image, mode: str, size: tuple[int, int], colour: bool
) -> None:
    image = photo.resize(size).convert(mode)
    specs = V.view_specs(2, 3, 32, 16, (0.25, 1.0), (0.05, 0.25), colour)
    squared, drift = [], []
    for index in range(12):
        exact = V.MultiCrop(specs)(image, V.view_rng(0, 1, index))
        done = FastMultiCrop(specs, hand_over=False)(image, V.view_rng(0, 1, index))
        handed = FastMultiCrop(specs, hand_over=True)(image, V.view_rng(0, 1, index))
        assert ("global_draws" in handed) == colour and set(done) == set(exact)
        for kind in ("global", "local"):
            ours, theirs = done[f"{kind}_views"], exact[f"{kind}_views"]
            assert ours.shape == theirs.shape and ours.dtype == torch.uint8 and ours.is_contiguous()
            assert torch.equal(finished_views(handed, kind, "cpu"), ours)
            squared.append((ours.float() - theirs.float()).square().mean().item())
            drift.append((ours.float() - theirs.float()).mean().item())
    psnr = 10 * np.log10(255**2 / max(*squared, 1e-9))
    assert psnr >= 38 and abs(np.mean(drift)) <= 0.35, (psnr, np.mean(drift))


def test_real_photographs(shared: Path) -> None:
    images = open_images(str(shared / "data/imagenet-sample/train.parquet"))
    specs = V.view_specs(2, 4, 224, 96, (0.25, 1.0), (0.05, 0.25), colour=True)
    for index in (3, 77, 420):
        exact = V.MultiCrop(specs)(images[index].image, V.view_rng(0, 0, index))
        done = FastMultiCrop(specs, hand_over=False)(images[index].image, V.view_rng(0, 0, index))
        for kind in exact:
            apart = difference(done[kind], exact[kind])
            assert apart.mean() <= 0.7 and apart.square().mean() <= 5  # 41 dB


def test_without_local_views_and_with_mixed_sizes() -> None:
    specs = V.view_specs(2, 0, 8, 8, (0.5, 1.0), (0.1, 0.5), True)
    for hand_over in (True, False):
        item = FastMultiCrop(specs, hand_over)(Image.new("L", (8, 8)), V.view_rng(0, 0, 0))
        assert item["global_views"].shape == (2, 1, 8, 8) and item["local_views"].shape == (
            0,
            1,
            0,
            0,
        )
        batch = {key: torch.stack([value, value]) for key, value in item.items()}
        assert finished_views(batch, "local", "cpu").shape == (2, 0, 1, 0, 0)
    with pytest.raises(ValueError, match=r"share one size, not \[8, 9\]"):
        FastMultiCrop([*specs, V.ViewSpec(9, (0.5, 1.0), 0, 0, False)], True)


def test_draws_are_those_of_the_exact_way() -> None:
    """Exact views are made from `draw_view`, so equal generators are left in equal states."""
    image = Image.new("RGB", (50, 40), "teal")
    exact, quick = V.view_rng(4, 5, 6), V.view_rng(4, 5, 6)
    V.MultiCrop(SPECS)(image, exact)
    FastMultiCrop(SPECS, hand_over=True)(image, quick)
    assert exact.random() == quick.random()
    draws = [V.draw_view(50, 40, SPECS[0], V.view_rng(0, 0, index)) for index in range(300)]
    table = C.draw_table(draws)
    for row, draw in zip(table.tolist(), draws, strict=True):
        assert row[8:] == [np.float32(draw.sigma), draw.grey, draw.solarised]
        assert [min(int(place), 3) for place in row[4:8] if place >= 0] == [
            place for place, _ in draw.jitter
        ]
        assert all(row[place] == np.float32(factor) for place, factor in draw.jitter)
        assert (4 in row[4:8]) == any(place == 3 and factor < 0 for place, factor in draw.jitter)


@pytest.mark.parametrize("hand_over", [True, False])
def test_batches_do_not_depend_on_workers_processes_or_start(hand_over: bool) -> None:
    source = open_images("digits").subset(range(20))

    def load(
        workers: int = 0, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> list[dict[str, Tensor]]:
        sampler = BatchSampler(
            source,
            batch_size=8,
            seed=3,
            steps=4,
            start_step=start,
            rank=rank,
            world_size=world_size,
        )
        specs = V.view_specs(2, 3, 16, 8, (0.25, 1.0), (0.05, 0.25), True)
        dataset = V.ViewDataset(source, FastMultiCrop(specs, hand_over), seed=5)
        return list(DataLoader(dataset, batch_sampler=sampler, num_workers=workers))

    def assert_same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> None:
        assert len(a) == len(b) > 0
        for x, y in zip(a, b, strict=True):
            assert x.keys() == y.keys() and not any((*x["broken"], *y["broken"]))
            assert all(torch.equal(x[key], y[key]) for key in x if key != "broken")

    whole = load()
    assert_same(whole, load(workers=2))
    assert_same(whole[3:], load(start=3))
    halves = [load(rank=rank, world_size=2) for rank in (0, 1)]
    assert_same(
        whole,
        [
            {key: a[key] + b[key] if key == "broken" else torch.cat([a[key], b[key]]) for key in a}
            for a, b in zip(*halves, strict=True)
        ],
    )


def test_unknown_views_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["refine", "--recipe", "quickstart", "--views", "pil"])
    assert stop.value.code == 2
    message = capsys.readouterr()
    assert "views" in message.out + message.err and "exact" in message.out + message.err


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_refinement_with_fast_views(tmp_path: Path) -> None:
    """Two short runs on digits.

    The same order, draws and weights, so losses apart by what a grey level makes.
    """
    config = ViTMAEConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    ViTMAEModel(config).save_pretrained(tmp_path / "start")
    sizes = {
        "projector_dim": 32,
        "predictor_dim": 32,
        "embedding_dim": 16,
        "queue_size": 64,
        "topk": 3,
        "local_views": 2,
    }
    steps = {
        "batch_size": 16,
        "max_steps": 2,
        "epochs": 1,
        "head_epochs": 1,
        "warmup_epochs": 0,
        "log_every": 1,
        "num_workers": 0,
    }
    losses = {}
    for views in ("exact", "fast"):
        output = tmp_path / views
        recipe = RefineRecipe(
            model=str(tmp_path / "start"),
            views=views,
            eval_fraction=0.0,
            output_dir=str(output),
            report_to="none",
            **sizes,
            **steps,
        )
        result = run(recipe)
        assert result is not None and result.metrics["recipe"]["views"] == views
        losses[views] = [
            json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()
        ]
    assert len(losses["fast"]) == 4 and losses["fast"] != losses["exact"]
    assert np.allclose(losses["fast"], losses["exact"], rtol=0.05)
