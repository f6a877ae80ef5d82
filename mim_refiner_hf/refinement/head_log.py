"""What the log tells of every head, and the warning of a collapse."""

import logging
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator

from ..runtime.wording import setting
from .refiner import Refiner, StepResult

logger = logging.getLogger(__name__)

# Spread of a head's projections below which a warning is due.
_COLLAPSED = 0.1

# Names in the log -> fields of StepResult.
_PER_HEAD = {
    "loss": "head_losses",
    "alignment": "alignment",
    "neighbour_similarity": "neighbour_similarity",
    "neighbour_age": "neighbour_age",
    "neighbour_accuracy": "neighbour_accuracy",
}


@dataclass
class HeadLog:
    """Values per head for one line of the log; it remembers which heads were warned of."""

    refiner: Refiner
    accelerator: Accelerator
    batch_size: int
    _warned: set[str] = field(default_factory=set, init=False)

    def values(self, step: int, result: StepResult) -> dict[str, float]:
        """`head/name` -> its mean over the processes; and how many images have no neighbour."""
        names = self.refiner.head_names
        per_head = [getattr(result, name).float() for name in _PER_HEAD.values()]
        # one collective for all of them
        table = self.accelerator.reduce(torch.stack(per_head), "mean").tolist()
        values: dict[str, float] = {}
        if result.without_neighbour is not None:
            without = self.accelerator.reduce(result.without_neighbour, "sum")
            values["images_without_neighbour"] = without.item()
        for name, row in zip(_PER_HEAD, table, strict=True):
            for head, value in zip(names, row, strict=True):
                # not nan: without labels there is no neighbour accuracy
                if value == value:
                    values[f"{head}/{name}"] = value

        spreads = self.refiner.queue.spread(self.batch_size).tolist()
        for head, spread in zip(names, spreads, strict=True):
            values[f"{head}/spread"] = spread
            if spread < _COLLAPSED and head not in self._warned:
                self._warned.add(head)
                logger.warning(
                    "step %d: to head %s all images look nearly alike (spread %.3f, 1 is even): "
                    "the features may be collapsing; lower %s, or start from weights that tell "
                    "these images apart",
                    step,
                    head,
                    spread,
                    setting("learning_rate"),
                )
        return values
