"""Robustness: k-NN accuracy on corrupted images, with the bank of clean ones.

    result = robustness(encoder, processor, train_images, eval_images)
    result.metrics["robustness_blur_3_accuracy"], result.metrics["robustness_accuracy"]
    corrupted = CORRUPTIONS["noise"](image, severity=3, seed=0)      # one of a PIL image

Four of ImageNet-C's corruptions (Hendrycks and Dietterich 2019, arXiv 1903.12261) at its five
strengths, made on the fly: Gaussian noise, Gaussian blur, JPEG and low contrast. They fall, as
there, on the image as the encoder is to see it, resized and cropped. The blur is ImageNet-C's
where that image has 224 pixels a side, and in proportion on smaller ones; the other strengths do
not depend on the size.
"""

import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from ..clustering.channels import Picture
from ..data.images import evenly_spaced
from ..data.loading import ImageProcessor, Loading, Processor
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.seeding import random_generator
from .feature_cache import StoredRows, for_altered_images, read_rows
from .features import own_column
from .knn import knn_predict, standardised_bank
from .report import BANK_SIZE
from .scores import ProtocolResult, class_labels, mean_score

if TYPE_CHECKING:
    from ..data.images import ImageDataset

# ImageNet-C's strengths, one per severity
SEVERITIES = (1, 2, 3, 4, 5)
# of pixel values in [0, 1]
NOISE_STD = (0.08, 0.12, 0.18, 0.26, 0.38)
# pixels, of 224
CORRUPTION_BLUR = (1, 2, 3, 4, 6)
JPEG_QUALITY = (25, 18, 15, 10, 7)
# share that is left
CONTRAST_LEFT = (0.4, 0.3, 0.2, 0.1, 0.05)

Corruption = Callable[[Image.Image, int, int], Image.Image]


# --- the corruptions -------------------------------------------------------------------------


def noise(image: Image.Image, severity: int, seed: int) -> Image.Image:
    """Adds Gaussian noise.

    It is drawn from the seed and the image's own pixels: different on every image, whatever their
    order.
    """
    rng = random_generator(seed, "noise", zlib.crc32(image.tobytes()))
    pixels = np.asarray(image, dtype=np.float64) / 255
    return _to_image(pixels + rng.normal(0, NOISE_STD[severity - 1], pixels.shape))


def blur(image: Image.Image, severity: int, seed: int) -> Image.Image:
    """Pillow's Gaussian blur; nothing is random."""
    radius = CORRUPTION_BLUR[severity - 1] * min(image.size) / 224
    return image.filter(ImageFilter.GaussianBlur(radius))


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
    return _to_image((pixels - mean) * CONTRAST_LEFT[severity - 1] + mean)


def _to_image(pixels: np.ndarray) -> Image.Image:
    """Values in [0, 1], cut off outside, as 8 bits."""
    return Image.fromarray(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))


CORRUPTIONS: dict[str, Corruption] = {
    "noise": noise,
    "blur": blur,
    "jpeg": jpeg,
    "contrast": contrast,
}
"""Pure functions of an 8-bit image of mode "RGB" or "L", a severity (1 to 5) and a seed.

Size and mode stay."""


@dataclass
class CorruptedInput:
    """An image processor with a corruption in the middle.

    It falls after resizing and cropping, before normalising.
    """

    processor: ImageProcessor
    corrupt: Corruption
    severity: int
    seed: int

    def __call__(self, images: Sequence[Picture], *, return_tensors: str) -> Mapping[str, Tensor]:
        cropped = self.processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")
        values = cropped["pixel_values"].float().round().clamp(0, 255).byte()
        pixels = values.permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
        if pixels.shape[-1] == 1:
            pixels = pixels.squeeze(-1)

        as_seen = [Image.fromarray(image) for image in pixels]
        corrupted = [self.corrupt(image, self.severity, self.seed) for image in as_seen]
        return self.processor(
            corrupted, do_resize=False, do_center_crop=False, return_tensors=return_tensors
        )

    def to_json_string(self) -> str:
        """All that the pixels depend on, for the manifest of a feature store."""
        settings = json.loads(self.processor.to_json_string())
        settings["corruption"] = self.corrupt.__name__
        settings["severity"] = self.severity
        settings["seed"] = self.seed
        return json.dumps(settings, sort_keys=True)


# --- the protocol ----------------------------------------------------------------------------


def robustness(
    encoder: MimRefinerModel,
    processor: ImageProcessor,
    train_images: "ImageDataset",
    eval_images: "ImageDataset",
    *,
    severities: Sequence[int] = SEVERITIES,
    bank_size: int | None = BANK_SIZE,
    seed: int = 0,
    features: Path | None = None,
    loading: Loading = Loading(),
) -> ProtocolResult:
    """k-NN accuracy (k = 10, temperature 0.07), clean and under every corruption and severity.

    Args:
        encoder, processor: the model and its image processor.
        train_images: labelled; the clean bank.
        eval_images: labelled; encoded once clean and once for each of the 20 corruptions.
        severities: from 1 to 5.
        bank_size: of more training images, so many evenly spaced ones are the bank; None for all.
        seed: of the noise.
        features: see `read_rows`.
        loading: as in `extract_features`.

    Returns:
        `robustness_accuracy`, the mean over all corruptions and severities,
        `robustness_clean_accuracy`, and for every corruption
        `robustness_<name>_<severity>_accuracy`.

    Raises:
        ValueError: for missing labels or a severity that does not exist.
    """
    if not severities or not set(severities) <= set(SEVERITIES):
        raise ValueError(f"severities={tuple(severities)} must be numbers from 1 to 5")
    bank_images = train_images
    if bank_size is not None:
        bank_images = evenly_spaced(train_images, bank_size)
    for images in (bank_images, eval_images):
        class_labels(images, "robustness")

    column = own_column(encoder.config, encoder.config.num_hidden_layers - 1)

    def read(
        images: "ImageDataset", shown: Processor, folder: Path | None, desc: str
    ) -> tuple[StoredRows, Tensor]:
        """Features (N, D) of the images as `shown` processes them, and their classes (N,)."""
        rows = read_rows(
            encoder, images, shown, [column], features=folder, loading=loading, desc=desc
        )
        # class_labels has refused images without them
        assert rows.labels is not None
        return rows.side_by_side([column]), rows.labels

    bank, bank_labels = read(bank_images, processor, features, "k-NN bank")

    def correct(shown: Processor, folder: Path | None, desc: str) -> Tensor:
        """Whether k-NN is right about each evaluation image (N,)."""
        queries, labels = read(eval_images, shown, folder, desc)
        bank_x, eval_x = standardised_bank(bank, queries[:], shared=True)
        k = min(10, len(bank_x))
        # the last block of every evaluation has said what is in the bank too
        answers = knn_predict(bank_x, bank_labels, eval_x, k=(k,), shared=True, say_known=False)
        (predicted,) = answers.values()
        return predicted == labels

    clean = correct(processor, features, "clean images")
    altered = for_altered_images(features)
    corrupted = {}
    for name, corrupt in CORRUPTIONS.items():
        for severity in severities:
            shown = CorruptedInput(processor, corrupt, severity, seed)
            answers = correct(shown, altered, f"{name}, severity {severity}")
            corrupted[f"robustness_{name}_{severity}_accuracy"] = answers
    return robustness_scores(clean, corrupted, severities)


def robustness_scores(
    clean: Tensor, corrupted: dict[str, Tensor], severities: Sequence[int]
) -> ProtocolResult:
    """The scores of `robustness` from which images were classified correctly.

    Args:
        clean: whether each clean image was (N,).
        corrupted: the same under each corruption, by the score's name.
    """
    over_all = torch.stack(list(corrupted.values())).double().mean(dim=0)  # (N,)
    levels = ", ".join(map(str, severities))
    setting = f"k-NN, k=10, clean bank; mean over {', '.join(CORRUPTIONS)} at severities {levels}"
    scores = {
        "robustness_accuracy": mean_score(over_all, setting),
        "robustness_clean_accuracy": mean_score(clean),
    }
    scores |= {name: mean_score(answers) for name, answers in corrupted.items()}
    return ProtocolResult(scores)
