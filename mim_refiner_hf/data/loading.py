"""How images are read on their way to an encoder: how many at once, by whom, and where to."""

from dataclasses import dataclass

import torch


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


__all__ = ["Loading"]
