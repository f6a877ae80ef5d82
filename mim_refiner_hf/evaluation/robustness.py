"""Robustness: k-NN accuracy on corrupted images, with the bank of clean ones.

    result = robustness(encoder=encoder, processor=processor, train_images=train, eval_images=test)
    result.metrics["robustness_blur_3_accuracy"], result.metrics["robustness_accuracy"]
    corrupted = CORRUPTIONS["noise"](image, severity=3, seed=0)                # one corruption of a PIL image

Four of ImageNet-C's corruptions (Hendrycks and Dietterich 2019, arXiv 1903.12261) at its five strengths, made on the fly: Gaussian
noise, Gaussian blur, JPEG and low contrast. They fall, as there, on the image as the encoder is to see it, resized and cropped. The blur
is ImageNet-C's where that image has 224 pixels a side, and in proportion on smaller ones; the other strengths do not depend on the size.
"""

import io
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from ..data.images import evenly_spaced
from ..data.loading import Loading
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.seeding import random_generator
from .feature_cache import for_altered_images, read_rows
from .features import own_column
from .knn import knn_predict, standardise
from .report import BANK_SIZE
from .scores import ProtocolResult, class_labels, mean_score

if TYPE_CHECKING:
    from ..data.images import ImageDataset

SEVERITIES = (1, 2, 3, 4, 5)
NOISE_STD = (0.08, 0.12, 0.18, 0.26, 0.38)  # of pixel values in [0, 1]
BLUR_SIGMA = (1, 2, 3, 4, 6)  # pixels, of 224
JPEG_QUALITY = (25, 18, 15, 10, 7)
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # share that is left

Corruption = Callable[[Image.Image, int, int], Image.Image]


def noise(image: Image.Image, severity: int, seed: int) -> Image.Image:
    """Adds Gaussian noise, drawn from the seed and the image's own pixels: different on every image, whatever their order."""
    rng = random_generator(seed, "noise", zlib.crc32(image.tobytes()))
    pixels = np.asarray(image, dtype=np.float64) / 255
    return _to_image(pixels + rng.normal(0, NOISE_STD[severity - 1], pixels.shape))


def blur(image: Image.Image, severity: int, seed: int) -> Image.Image:
    """Pillow's Gaussian blur; nothing is random."""
    return image.filter(ImageFilter.GaussianBlur(BLUR_SIGMA[severity - 1] * min(image.size) / 224))


def jpeg(image: Image.Image, severity: int, seed: int) -> Image.Image:
    """Through a JPEG of low quality; nothing is random."""
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=JPEG_QUALITY[severity - 1])
    decoded = Image.open(encoded)
    decoded.load()
    return decoded


def contrast(image: Image.Image, severity: int, seed: int) -> Image.Image:
    """Pulls every pixel towards the mean of its channel; nothing is random."""
    pixels = np.asarray(image, dtype=np.float64) / 255
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    return _to_image((pixels - mean) * CONTRAST[severity - 1] + mean)


def _to_image(pixels: np.ndarray) -> Image.Image:
    """Values in [0, 1], cut off outside, as 8 bits."""
    return Image.fromarray(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))


CORRUPTIONS: dict[str, Corruption] = {
    "noise": noise,
    "blur": blur,
    "jpeg": jpeg,
    "contrast": contrast,
}
"""Pure functions of an 8-bit image of mode "RGB" or "L", a severity (1 to 5) and a seed; size and mode stay."""


@dataclass
class CorruptedInput:
    """An image processor with a corruption in the middle: after resizing and cropping, before normalising."""

    processor: Any
    corrupt: Corruption
    severity: int
    seed: int

    def __call__(self, images: Sequence[Image.Image], return_tensors: str) -> dict[str, Tensor]:
        cropped = self.processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")[
            "pixel_values"
        ]
        pixels = cropped.float().round().clamp(0, 255).byte().numpy()  # (B, C, H, W)
        as_seen = [
            Image.fromarray(one.squeeze(0) if len(one) == 1 else one.transpose(1, 2, 0))
            for one in pixels
        ]
        corrupted = [self.corrupt(image, self.severity, self.seed) for image in as_seen]
        finished: dict[str, Tensor] = self.processor(
            corrupted, do_resize=False, do_center_crop=False, return_tensors=return_tensors
        )
        return finished

    def to_json_string(self) -> str:
        """All that the pixels depend on, for the manifest of a feature store."""
        corruption = {
            "corruption": self.corrupt.__name__,
            "severity": self.severity,
            "seed": self.seed,
        }
        return json.dumps(json.loads(self.processor.to_json_string()) | corruption, sort_keys=True)


def robustness(
    *,
    encoder: MimRefinerModel,
    processor: Any,
    train_images: "ImageDataset",
    eval_images: "ImageDataset",
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    features: Path | None = None,
    loading: Loading = Loading(),
) -> ProtocolResult:
    """k-NN accuracy (k = 10, temperature 0.07) on `eval_images`, clean and under every corruption at every severity.

    Args:
        encoder, processor: the model and its image processor.
        train_images: labelled; the clean bank. Of more than 10 000 images, 10 000 evenly spaced ones are used.
        eval_images: labelled; encoded once clean and once for each of the 20 corruptions.
        severities: from 1 to 5.
        seed: of the noise.
        features: see `read_rows`.
        loading: as in `extract_features`.

    Returns:
        `robustness_accuracy`, the mean over all corruptions and severities, `robustness_clean_accuracy`, and for every corruption
        `robustness_<name>_<severity>_accuracy`.

    Raises:
        ValueError: for missing labels or a severity that does not exist.
    """
    if not severities or not set(severities) <= set(SEVERITIES):
        raise ValueError(f"severities={tuple(severities)} must be numbers from 1 to 5")
    bank_images = evenly_spaced(train_images, BANK_SIZE)
    for images in (bank_images, eval_images):
        class_labels(images, "robustness")
    column = own_column(encoder.config, encoder.config.num_hidden_layers - 1)
    bank = read_rows(
        encoder,
        bank_images,
        processor,
        [column],
        features=features,
        loading=loading,
        desc="k-NN bank",
    )
    bank_features, bank_labels = bank.column(column), bank.labels
    assert bank_labels is not None  # class_labels says so

    def correct(prepare: Any, folder: Path | None, desc: str) -> Tensor:
        """Whether k-NN is right about each evaluation image, (N,), when `prepare` processes it."""
        found = read_rows(
            encoder, eval_images, prepare, [column], features=folder, loading=loading, desc=desc
        )
        bank_x, eval_x = standardise(bank_features, found.column(column))
        (predicted,) = knn_predict(bank_x, bank_labels, eval_x, k=(min(10, len(bank_x)),)).values()
        assert found.labels is not None  # class_labels says so
        return predicted == found.labels

    clean, altered = correct(processor, features, "clean images"), for_altered_images(features)
    corrupted = {
        f"robustness_{name}_{severity}_accuracy": correct(
            CorruptedInput(processor, corrupt, severity, seed),
            altered,
            f"{name}, severity {severity}",
        )
        for name, corrupt in CORRUPTIONS.items()
        for severity in severities
    }
    return robustness_scores(clean, corrupted, severities)


def robustness_scores(
    clean: Tensor, corrupted: dict[str, Tensor], severities: Sequence[int]
) -> ProtocolResult:
    """The scores of `robustness` from whether each image (N,) was classified correctly, clean and under each corruption."""
    per_image = (
        torch.stack(list(corrupted.values())).double().mean(dim=0)
    )  # (N,), over all corruptions
    setting = f"k-NN, k=10, clean bank; mean over {', '.join(CORRUPTIONS)} at severities {', '.join(map(str, severities))}"
    return ProtocolResult(
        {
            "robustness_accuracy": mean_score(per_image, setting),
            "robustness_clean_accuracy": mean_score(clean),
            **{name: mean_score(answers) for name, answers in corrupted.items()},
        }
    )


__all__ = ["CORRUPTIONS", "robustness"]
