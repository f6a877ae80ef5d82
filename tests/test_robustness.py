"""Corruptions against NumPy, SciPy and Pillow written out, and the k-NN accuracy under each of
them.
"""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from small_encoder import fresh_encoder

from mim_refiner_hf import MimRefinerImageProcessorPil, MimRefinerModel
from mim_refiner_hf.conversion.preprocessing import image_processor
from mim_refiner_hf.data.images import ImageDataset, open_images
from mim_refiner_hf.evaluation import extract_features, knn_accuracy
from mim_refiner_hf.evaluation.robustness import CORRUPTIONS, CorruptedInput, robustness


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth colours with an edge, 224 pixels a side."""
    y, x = np.mgrid[:224, :224] / 223
    pixels = np.stack([x, y, (x > 0.5) * 0.6 + 0.2], axis=2)
    return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_corruptions_are_pure_and_grow(photo: Image.Image, name: str, mode: str) -> None:
    image = photo.convert(mode)
    before, distances = image.tobytes(), []
    for severity in range(1, 6):
        corrupted = CORRUPTIONS[name](image, severity, 0)
        assert (corrupted.mode, corrupted.size) == (mode, image.size)
        assert corrupted.tobytes() == CORRUPTIONS[name](image, severity, 0).tobytes()
        distances.append(
            np.abs(np.asarray(corrupted, dtype=float) - np.asarray(image, dtype=float)).mean()
        )
    assert image.tobytes() == before
    assert (
        distances == sorted(distances)
        and distances[0] > 0.01
        and distances[-1] > 1.2 * distances[0]
    )


@pytest.mark.parametrize(
    ("severity", "std"), list(enumerate([0.08, 0.12, 0.18, 0.26, 0.38], start=1))
)
def test_noise_has_imagenet_cs_strength(severity: int, std: float) -> None:
    grey = Image.new("RGB", (128, 128), (128, 128, 128))
    values = np.asarray(CORRUPTIONS["noise"](grey, severity, 0), dtype=float) / 255
    expected = np.clip(
        0.5 + std * np.random.default_rng(0).standard_normal(10**6), 0, 1
    ).std()  # cut off at black and white
    assert values.std() == pytest.approx(expected, rel=0.02)
    assert values.mean() == pytest.approx(0.5, abs=0.01)
    assert (
        abs(np.corrcoef(values[:-1, :, 0].ravel(), values[1:, :, 0].ravel())[0, 1]) < 0.03
    )  # white
    assert (
        abs(np.corrcoef(values[..., 0].ravel(), values[..., 1].ravel())[0, 1]) < 0.03
    )  # in colour


def test_noise_depends_on_seed_and_image(photo: Image.Image) -> None:
    other = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    noise = [
        np.asarray(CORRUPTIONS["noise"](image, 1, seed), dtype=int) - np.asarray(image, dtype=int)
        for image, seed in ((photo, 0), (photo, 1), (other, 0))
    ]
    assert all(abs(np.corrcoef(noise[0].ravel(), each.ravel())[0, 1]) < 0.1 for each in noise[1:])


@pytest.mark.parametrize(("severity", "sigma"), list(enumerate([1, 2, 3, 4, 6], start=1)))
def test_blur_is_a_gaussian_of_imagenet_cs_width(
    photo: Image.Image, severity: int, sigma: float
) -> None:
    values = np.asarray(CORRUPTIONS["blur"](photo, severity, 0), dtype=float)
    expected = gaussian_filter(np.asarray(photo, dtype=float), (sigma, sigma, 0), mode="nearest")
    # Pillow's is three box blurs, in 8 bits
    assert np.abs(values - expected).mean() < 1.0


def test_blur_shrinks_with_the_image(photo: Image.Image) -> None:
    small = photo.resize((56, 56))
    expected = gaussian_filter(np.asarray(small, dtype=float), (1.5, 1.5, 0), mode="nearest")
    assert np.abs(np.asarray(CORRUPTIONS["blur"](small, 5, 0), dtype=float) - expected).mean() < 1.0


@pytest.mark.parametrize(("severity", "left"), list(enumerate([0.4, 0.3, 0.2, 0.1, 0.05], start=1)))
def test_contrast_pulls_to_the_mean_of_each_channel(
    photo: Image.Image, severity: int, left: float
) -> None:
    values = np.asarray(CORRUPTIONS["contrast"](photo, severity, 0), dtype=float)
    pixels = np.asarray(photo, dtype=float)
    for channel in range(3):
        mean = pixels[..., channel].mean()
        assert (
            np.abs(values[..., channel] - (mean + left * (pixels[..., channel] - mean))).max()
            <= 0.5 + 1e-6
        )


def test_jpeg_is_pillows(photo: Image.Image) -> None:
    for severity, quality in enumerate([25, 18, 15, 10, 7], start=1):
        file = io.BytesIO()
        photo.save(file, format="jpeg", quality=quality)
        with Image.open(file) as expected:
            assert np.array_equal(
                np.asarray(expected), np.asarray(CORRUPTIONS["jpeg"](photo, severity, 0))
            )


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_corruption_that_does_nothing_changes_nothing(
    photo: Image.Image, backend: str, num_channels: int
) -> None:
    config = fresh_encoder(num_channels=num_channels).config
    processor = image_processor(config, {})
    if backend == "pil":
        processor = MimRefinerImageProcessorPil(
            **{
                key: getattr(processor, key)
                for key in ("size", "crop_size", "image_mean", "image_std", "do_convert_rgb")
            }
        )
    images = [
        photo.convert("L" if num_channels == 1 else "RGB").resize(size)
        for size in ((20, 31), (16, 16))
    ]
    seen: list[tuple[str, tuple[int, int]]] = []

    def nothing(image: Image.Image, severity: int, seed: int) -> Image.Image:
        seen.append((image.mode, image.size))
        return image

    plain = processor(images, return_tensors="pt")["pixel_values"]
    through = CorruptedInput(processor, nothing, 1, 0)(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(
        through, plain, atol=0.5 / 255 / 0.22 + 1e-6, rtol=0
    )  # rounded to 8 bits in between
    assert seen == [("L" if num_channels == 1 else "RGB", (16, 16))] * 2


def corrupted_set(
    images: ImageDataset, encoder: MimRefinerModel, name: str, severity: int, folder: Path
) -> ImageDataset:
    """The images as the encoder sees them, corrupted, as files."""
    processor = image_processor(encoder.config, {})
    for i in range(len(images)):
        image, label, _ = images[i]
        pixels = processor([image], do_rescale=False, do_normalize=False, return_tensors="pt")[
            "pixel_values"
        ][0]
        cropped = Image.fromarray(pixels.permute(1, 2, 0).to(torch.uint8).numpy())
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        CORRUPTIONS[name](cropped, severity, 2).save(folder / str(label) / f"{i:03}.png")
    return open_images(str(folder))


def test_accuracy_under_a_corruption_is_k_nn_on_corrupted_files(
    shared: Path, tmp_path: Path
) -> None:
    encoder = fresh_encoder()
    processor = image_processor(encoder.config, {})
    train = open_images(str(shared / "data/cifar10"), split="train").subset(range(0, 20000, 50))
    test = open_images(str(shared / "data/cifar10"), split="test").subset(range(0, 4000, 20))
    result = robustness(
        encoder=encoder,
        processor=processor,
        train_images=train,
        eval_images=test,
        severities=(1, 4),
        seed=2,
    )
    bank, clean = (extract_features(encoder, images, processor) for images in (train, test))
    assert bank.labels is not None and clean.labels is not None
    expected = {"clean": knn_accuracy(bank.features, bank.labels, clean.features, clean.labels)}
    for name, severity in (("noise", 4), ("blur", 1)):
        images = corrupted_set(test, encoder, name, severity, tmp_path / name)
        found = extract_features(encoder, images, processor)
        assert found.labels is not None
        expected[f"{name}_{severity}"] = knn_accuracy(
            bank.features, bank.labels, found.features, found.labels
        )
    for name, accuracy in expected.items():
        assert result.metrics[f"robustness_{name}_accuracy"] == pytest.approx(accuracy, abs=1e-6), (
            name
        )
    each = [
        result.scores[f"robustness_{name}_{severity}_accuracy"].value
        for name in CORRUPTIONS
        for severity in (1, 4)
    ]
    assert result.metrics["robustness_accuracy"] == pytest.approx(np.mean(each))
    clean_accuracy = expected["clean"]
    assert 0.1 < result.metrics["robustness_accuracy"] < clean_accuracy
    error = result.metrics["robustness_clean_accuracy_standard_error"]
    assert error == pytest.approx((clean_accuracy * (1 - clean_accuracy) / 200) ** 0.5)


def test_bad_input_is_named() -> None:
    digits = open_images("digits", num_channels=1)
    encoder = fresh_encoder(num_channels=1)
    data = {
        "encoder": encoder,
        "processor": image_processor(encoder.config, {}),
        "train_images": digits,
    }
    with pytest.raises(ValueError, match=r"severities=\(0, 1\) must be numbers from 1 to 5"):
        robustness(**data, eval_images=digits, severities=(0, 1))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="digits has no images, but robustness needs labelled ones"
    ):
        robustness(**data, eval_images=digits.subset([]))  # type: ignore[arg-type]
