"""How images are read on their way to an encoder: how many at once, by whom, where to, by what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..clustering.channels import Picture


class Processor(Protocol):
    """What makes an encoder's input: an image processor, or one that alters the images first."""

    def __call__(self, images: Sequence[Picture], *, return_tensors: str) -> Mapping[str, Tensor]:
        """`pixel_values` (B, C, H, W) of B images."""

    def to_json_string(self) -> str:
        """All that the pixels depend on."""


class ImageProcessor(Processor, Protocol):
    """An image processor of transformers, as it comes with every model."""

    @property
    def image_mean(self) -> Sequence[float]:
        """Of each channel, in [0, 1]."""

    @property
    def image_std(self) -> Sequence[float]:
        """Of each channel, in [0, 1]."""

    def __call__(
        self, images: Sequence[Picture | np.ndarray], *, return_tensors: str, **settings: bool
    ) -> Mapping[str, Tensor]:
        """`pixel_values` (B, C, H, W) of B images; `settings` such as do_resize=False."""


@dataclass(frozen=True)
class Loading:
    """The settings of a pass over images; they change its speed and memory, not its result.

    Attributes:
        batch_size: images per forward pass.
        num_workers: processes that decode and preprocess; 0 for none beside this one.
        device: where to encode; None for where the encoder is.
    """

    batch_size: int = 256
    num_workers: int = 0
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("batch_size", self.batch_size, 1),
            ("num_workers", self.num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
