"""In which numbers an encoder computes features, by name."""

from typing import Literal

Precision = Literal["auto", "fp32", "bf16", "int8"]
"""auto: bf16 where the device computes it, `device.feature_precision`; never int8."""
