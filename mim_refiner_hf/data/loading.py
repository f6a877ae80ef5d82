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

    def __post_init__(self) -> None:
        for name, value, least in (
            ("batch_size", self.batch_size, 1),
            ("num_workers", self.num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")


__all__ = ["Loading"]
