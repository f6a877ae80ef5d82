"""In which numbers an encoder computes features, by name."""

from typing import Literal

Precision = Literal["fp32", "bf16"]

__all__ = ["Precision"]
