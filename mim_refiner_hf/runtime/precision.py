"""In which numbers an encoder computes features, by name."""

from typing import Literal

Precision = Literal["auto", "fp32", "bf16", "int8"]
"""auto: what the device computes fast, `device.feature_precision`."""
