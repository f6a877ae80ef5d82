"""The words that settings of a run can be; nothing is imported here, as `--help` shows them."""

from typing import Literal

Protocol = Literal[
    "low_shot", "linear_probe", "linear_probe_fast", "robustness", "fine_tuning", "segmentation"
]
"""What `--protocols` can add. All need labels but the last, which needs masks instead."""

__all__ = ["Protocol"]
