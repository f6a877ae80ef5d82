"""The segmentation probe against one linear layer under torch's SGD, mIoU against sets of pixels,
and CamVid.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_encoder import fresh_encoder
from torch import nn

from mim_refiner_hf import MimRefinerModel
from mim_refiner_hf.conversion.preprocessing import image_processor
from mim_refiner_hf.evaluation.segmentation import (
    PatchProbe,
    bootstrap_miou,
    mean_iou,
    pixel_counts,
    segmentation_probe,
    window_starts,
)
from mim_refiner_hf.evaluation.segmentation_data import (
    VOID,
    Crops,
    SegmentationDataset,
    open_segmentation,
)

make_encoder = partial(fresh_encoder, image_size=32)


def make_table(folder: Path, masks: list[np.ndarray], names: list[str] | None) -> str:
    """A parquet file of masks, with images that show the mask's values as levels of grey."""
    rows = {
        "image": [Image.fromarray((40 * mask).astype(np.uint8)).convert("RGB") for mask in masks],
        "mask": [Image.fromarray(mask.astype(np.uint8)) for mask in masks],
    }
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "train.parquet"))
    if names is not None:
        (folder / "classes.json").write_text(json.dumps(names))
    return str(folder)


def slow_miou(pairs: list[tuple[np.ndarray, np.ndarray]], num_classes: int) -> float:
    """Mean over classes of intersection over union, as sets of pixels.

    Void (-1) in the truth is left out.
    """
    values = []
    for label in range(num_classes):
        truth, answer = set(), set()
        for image, (targets, predicted) in enumerate(pairs):
            for place, (t, p) in enumerate(zip(targets.ravel(), predicted.ravel(), strict=True)):
                if t != -1:
                    truth |= {(image, place)} if t == label else set()
                    answer |= {(image, place)} if p == label else set()
        if truth | answer:
            values.append(len(truth & answer) / len(truth | answer))
    return float(np.mean(values))


def test_miou_equals_sets_of_pixels() -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(-1, 4, (6, 5)), rng.integers(0, 4, (6, 5))) for _ in range(7)]
    tables = np.array(
        [pixel_counts(targets, predicted, 5) for targets, predicted in pairs]
    )  # class 4 never occurs
    assert tables.sum() == sum((targets >= 0).sum() for targets, _ in pairs)
    assert mean_iou(tables.sum(axis=0)) == pytest.approx(slow_miou(pairs, 5))
    assert mean_iou(np.diag([3, 0, 9])) == 1


def test_bootstrap_equals_a_loop_of_resamples() -> None:
    rng = np.random.default_rng(1)
    tables = rng.integers(0, 30, (25, 3, 3)) * rng.integers(0, 3, (25, 1, 1)) + 20 * np.eye(
        3, dtype=int
    )
    values = [float(mean_iou(tables[rng.integers(0, 25, 25)].sum(axis=0))) for _ in range(2000)]
    error, low, high = bootstrap_miou(tables.astype(np.int32), seed=0)
    assert error == pytest.approx(np.std(values), rel=0.12)
    assert (low, high) == pytest.approx(
        np.quantile(values, [0.025, 0.975]).tolist(), abs=0.4 * error
    )


def test_void_and_unnamed_values_do_not_count(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 2], [3, 4, 9]])
    images = open_segmentation(make_table(tmp_path, [mask], ["sky", "void", "road", "car"]))
    assert images.class_names == ["sky", "road", "car"]
    _, stored = images[0]
    assert images.targets(stored).tolist() == [[0, VOID, 1], [2, VOID, VOID]]
    given = open_segmentation(str(tmp_path), class_names=["a", "b", "c", "d", "e"])
    assert given.targets(stored).tolist() == [[0, 1, 2], [3, 4, VOID]]


def test_image_and_mask_are_cropped_alike(tmp_path: Path) -> None:
    mask = np.kron(np.random.default_rng(0).integers(0, 4, (5, 6)), np.ones((40, 40)))
    images = open_segmentation(make_table(tmp_path, [mask], ["a", "b", "c", "d"]))
    crops = Crops(images, make_encoder().config, seed=0)
    kinds = [crops[epoch, 0] for epoch in range(8)] + [crops[0]]
    for pixels, targets in kinds:
        assert (pixels.shape, pixels.dtype, targets.shape) == ((3, 32, 32), torch.uint8, (32, 32))
        shown = (pixels[0].float() / 40).round().long()
        # but for the borders between squares
        assert (shown == targets).float().mean() > 0.85
    assert len({targets.numpy().tobytes() for _, targets in kinds}) == 9
    again, _ = Crops(images, make_encoder().config, seed=0)[3, 0]
    assert torch.equal(again, kinds[3][0])


def test_the_probe_equals_a_linear_layer_under_torchs_sgd() -> None:
    encoder = make_encoder(num_hidden_layers=6)
    probe = PatchProbe(encoder, image_processor(encoder.config, {}), 3, [0.3, 3.0], seed=0)
    assert probe.blocks == [5, 1]
    batches = [
        (torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.randint(-1, 3, (4, 32, 32)))
        for _ in range(5)
    ]
    with torch.inference_mode():
        probe.measure_channels(batches)  # type: ignore[arg-type]
    start = probe.grid.weight[:, 1].clone()

    def tokens(pixels: torch.Tensor) -> torch.Tensor:
        normalised = (
            pixels / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        ) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        with torch.no_grad():
            hidden = encoder(normalised, output_hidden_states=True).hidden_states
        return torch.cat([hidden[6][:, 1:], hidden[2][:, 1:]], dim=2)

    everything = torch.cat([tokens(pixels) for pixels, _ in batches]).flatten(0, 1)
    mean, std = everything.mean(dim=0), everything.std(dim=0, correction=0)
    layer = nn.Linear(64, 3)
    with torch.no_grad():
        layer.weight.copy_(start.T)
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=3.0, momentum=0.9)
    for pixels, targets in batches:
        with torch.inference_mode():
            probe.train_step(pixels, targets, decay=1.0)
        logits = layer((tokens(pixels) - mean) / std).unflatten(1, (8, 8)).permute(0, 3, 1, 2)
        big = F.interpolate(logits, size=32, mode="bilinear", align_corners=False)
        optimizer.zero_grad()
        F.cross_entropy(big, targets, ignore_index=VOID).backward()
        optimizer.step()
    torch.testing.assert_close(
        probe.grid.weight[:, 1].T, layer.weight.detach(), atol=2e-4, rtol=1e-3
    )
    torch.testing.assert_close(probe.grid.bias[1], layer.bias.detach(), atol=2e-4, rtol=1e-3)
    before = probe.grid.weight.clone()
    with torch.inference_mode():
        probe.train_step(batches[0][0], torch.full((4, 32, 32), VOID), decay=1.0)
    assert torch.equal(before, probe.grid.weight)  # nothing but void: no step


def mean_of_windows(
    encoder: MimRefinerModel, probe: PatchProbe, pixels: torch.Tensor
) -> torch.Tensor:
    """Logits (K, H, W) of the second classifier, pixel by pixel.

    Each is the mean over all windows that hold it, of 32 pixels, 24 apart, the last at the border.
    """
    images = pixels / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    images = images / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    height, width = images.shape[1:]
    canvas = torch.zeros(3, max(height, 32), max(width, 32))
    canvas[:, :height, :width] = images

    told: dict[tuple[int, int], list[torch.Tensor]] = {}
    for top in [*range(0, canvas.shape[1] - 32, 24), canvas.shape[1] - 32]:
        for left in [*range(0, canvas.shape[2] - 32, 24), canvas.shape[2] - 32]:
            window = canvas[None, :, top : top + 32, left : left + 32]
            with torch.no_grad():
                tokens = encoder(window, output_hidden_states=True).hidden_states[2][0, 1:]
            layer = (probe.grid.weight[:, 1], probe.grid.bias[1])
            logits = ((tokens - probe.mean) / probe.std) @ layer[0] + layer[1]
            small = logits.T.unflatten(1, (8, 8))[None]
            big = F.interpolate(small, size=32, mode="bilinear", align_corners=False)[0]
            for y in range(32):
                for x in range(32):
                    told.setdefault((top + y, left + x), []).append(big[:, y, x])
    rows = [[torch.stack(told[y, x]).mean(dim=0) for x in range(width)] for y in range(height)]
    return torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(32, 32), (57, 70), (20, 57), (80, 31), (9, 9), (56, 33)])
def test_sliding_equals_the_mean_of_windows_pixel_by_pixel(size: tuple[int, int]) -> None:
    encoder = make_encoder()
    probe = PatchProbe(encoder, image_processor(encoder.config, {}), 3, [0.3, 3.0], seed=0)
    probe.grid.weight.normal_()
    probe.mean.normal_()
    probe.std.uniform_(0.5, 2)
    probe.blocks = [1]
    pixels = torch.randint(256, (3, *size), dtype=torch.uint8)
    targets = torch.randint(-1, 3, size)
    expected = mean_of_windows(encoder, probe, pixels)
    with torch.inference_mode():
        tables = probe.slide(pixels, targets, batch_size=3)
    truth, answers = targets.numpy(), expected.argmax(dim=0).numpy()
    # but for ties within rounding
    assert np.abs(tables[1] - pixel_counts(truth, answers, 3)).sum() <= 2
    assert tables.shape == (2, 3, 3) and tables[0].sum() == (truth >= 0).sum()


def test_the_windows_of_the_released_settings() -> None:
    # mmsegmentation: max(512 - 224 + 170 - 1, 0) // 170 + 1 windows, the last moved back
    assert window_starts(512, 224) == [0, 170, 288]
    assert window_starts(683, 224) == [0, 170, 340, 459]
    assert window_starts(224, 224) == window_starts(100, 224) == [0]
    assert window_starts(394, 224) == [0, 170]


def test_one_window_is_the_whole_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    masks = [np.kron(rng.integers(0, 3, (4, 4)), np.ones((8, 8), int)) for _ in range(6)]
    images = open_segmentation(make_table(tmp_path, masks, ["a", "b", "c"]))
    encoder = make_encoder()
    settings: dict[str, Any] = {"processor": image_processor(encoder.config, {}), "epochs": 2}
    whole, slide = (
        segmentation_probe(
            encoder, train_images=images, eval_images=images, inference=inference, **settings
        )
        for inference in ("whole", "slide")
    )
    assert slide.scores.keys() == {"segmentation_slide_miou"}
    assert slide.scores["segmentation_slide_miou"].value == pytest.approx(
        whole.scores["segmentation_miou"].value, abs=1e-3
    )


def open_camvid(shared: Path, split: str) -> SegmentationDataset:
    return open_segmentation(str(shared / "data/camvid"), split=split)


def test_camvid(shared: Path) -> None:
    encoder = make_encoder().train()
    train, test = open_camvid(shared, "train[:64]"), open_camvid(shared, "test[:24]")
    assert train.class_names[:2] == ["sky", "building"] and len(train.class_names) == 11
    settings: dict[str, Any] = {"processor": image_processor(encoder.config, {}), "epochs": 8}
    result = segmentation_probe(encoder=encoder, train_images=train, eval_images=test, **settings)
    assert encoder.training and all(parameter.requires_grad for parameter in encoder.parameters())
    score = result.scores["segmentation_miou"]
    crops = Crops(test, encoder.config, seed=0)
    targets = [crops[i][1].numpy() for i in range(len(test))]
    most = np.bincount(np.concatenate([each[each >= 0] for each in targets])).argmax()
    guess = mean_iou(sum(pixel_counts(each, np.full_like(each, most), 11) for each in targets))
    assert guess + 0.05 < score.value < 0.6
    assert 0 < score.standard_error < 0.05
    low, high = (
        float(end) / 100 for end in score.setting.split("95 % ")[1].removesuffix(" %").split("-")
    )
    assert (
        low <= score.value + 0.02
        and high >= score.value - 0.02
        and math.isclose(high - low, 4 * score.standard_error, rel_tol=0.3)
    )
    again = segmentation_probe(encoder=encoder, train_images=train, eval_images=test, **settings)
    assert again.metrics == result.metrics


def test_bad_input_is_named(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"No masks in .*: its columns are \['image', 'label'\]; one must be mask"
    ):
        rows = {"image": [Image.new("RGB", (4, 4))], "label": [1]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            str(tmp_path / "plain.parquet")
        )
        open_segmentation(str(tmp_path / "plain.parquet"), class_names=["a"])
    (tmp_path / "masks").mkdir()
    folder = make_table(tmp_path / "masks", [np.zeros((4, 4))], None)
    with pytest.raises(FileNotFoundError, match="No names for the classes of"):
        open_segmentation(folder)
    with pytest.raises(ValueError, match=r"class_names=\['a', 'a'\] of .* must be different names"):
        open_segmentation(folder, class_names=["a", "a"])
    train, other = (
        open_camvid(shared, "train[:4]"),
        open_segmentation(folder, class_names=["a", "b"]),
    )
    encoder = make_encoder()
    settings: dict[str, Any] = {
        "processor": image_processor(encoder.config, {}),
        "train_images": train,
    }
    with pytest.raises(ValueError, match="have different classes; they must be the same, in order"):
        segmentation_probe(encoder=encoder, eval_images=other, **settings)
    with pytest.raises(ValueError, match="epochs=0 must be at least 1"):
        segmentation_probe(encoder=encoder, eval_images=train, epochs=0, **settings)
    with pytest.raises(ValueError, match="the encoder takes 16 x 32 pixels"):
        segmentation_probe(encoder=make_encoder(image_size=[16, 32]), eval_images=train, **settings)
