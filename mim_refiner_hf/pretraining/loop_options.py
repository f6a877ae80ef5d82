"""Where and how a pre-training runs: nothing of what it computes.

LoopOptions(save_every=500, num_workers=4)
"""

from dataclasses import dataclass
from typing import Literal

from ..data.limits import MAX_BAD_FRACTION
from ..runtime.loggers import logger_names
from ..runtime.settings import NonNegativeInt, PositiveInt, Share, check_fields, documented


@dataclass
class LoopOptions:
    """Where and how a pre-training runs: nothing of what it computes.

    Raises:
        ValueError: at construction, in one line.
    """

    num_workers: NonNegativeInt = documented(0, "Processes that load images beside this one.")
    max_bad_fraction: Share = documented(
        MAX_BAD_FRACTION, "Stop when more than this share of the images is broken."
    )
    mixed_precision: Literal["auto", "no", "bf16"] = documented(
        "auto", "bf16 autocast on fp32 weights; auto: on a GPU or CPU that computes it."
    )
    micro_batch_size: PositiveInt | None = documented(
        None, "Images at a time through the networks, exactly; None: all of a process."
    )
    gradient_checkpointing: bool = documented(
        False, "Recompute each block of the student in the backward pass: less memory."
    )
    save_every: NonNegativeInt | None = documented(
        None, "Steps between checkpoints; 0 for none. None: a tenth of all steps, at most 500."
    )
    save_total_limit: PositiveInt = documented(2, "Checkpoints kept.")
    report_to: str = documented(
        "tensorboard",
        "Loggers beside log.jsonl: tensorboard, wandb, trackio, comma-separated, or none.",
    )
    log_every: PositiveInt = documented(10, "Steps between lines in the log.")
    eval_every: NonNegativeInt = documented(
        0, "Epochs between k-NN measurements on the way, for labelled images; 0 for none."
    )

    def __post_init__(self) -> None:
        check_fields(self)
        logger_names(self.report_to)
