"""The words that settings of a run can be; nothing is imported here, as `--help` shows them."""

from typing import Literal

Protocol = Literal["paper", "quick"]
"""How `evaluate` shows images, and how large its bank is."""

AddedProtocol = Literal[
    "low_shot",
    "linear_probe",
    "linear_probe_fast",
    "linear_probe_dinov2",
    "attentive_probe",
    "robustness",
    "fine_tuning",
    "segmentation",
    "segmentation_slide",
    "segmentation_knn",
    "segmentation_logistic",
]
"""What `--protocols` can add. All need labels but those of `ON_MASKS`."""

ON_MASKS = ("segmentation", "segmentation_slide", "segmentation_knn", "segmentation_logistic")
"""These need masks instead."""
