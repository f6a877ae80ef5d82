"""Small encoders: one with random values everywhere, its processor and digits, for the tests that
measure blocks; and one as it is initialised, for those of the protocols.
"""

from typing import Any

import torch

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel
from mim_refiner_hf.data.images import ImageDataset, open_images

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def make_encoder(**changes: Any) -> MimRefinerModel:
    """A tiny encoder with random values in every tensor."""
    torch.manual_seed(0)
    encoder = MimRefinerModel(
        MimRefinerConfig(**{**SHAPE, "image_size": 16, "patch_size": 4, **changes})
    ).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def fresh_encoder(seed: int = 0, **changes: Any) -> MimRefinerModel:
    """Two blocks of width 32 as training begins with them."""
    torch.manual_seed(seed)
    shape = {**SHAPE, "num_hidden_layers": 2, "intermediate_size": 64}
    config = MimRefinerConfig(**{**shape, "image_size": 16, "patch_size": 4, **changes})
    return MimRefinerModel(config).eval()


def make_processor(height: int = 16, width: int = 16) -> MimRefinerImageProcessor:
    return MimRefinerImageProcessor(size={"height": height, "width": width}, do_center_crop=False)


def open_digits() -> ImageDataset:
    """120 of scikit-learn's handwritten digits."""
    return open_images("digits").subset(range(120))
