"""`refine --pretrain`: the encoder that a run starts from is trained first, on the same images.

    encoder = pretrained_start(prepared, accelerator)
    ...                                     # the refinement has a checkpoint of its own
    remove_checkpoints(Path("out"))

Its checkpoints and its log lie in `pretraining/`, so that a run which was stopped goes on there.
"""

import shutil
from pathlib import Path

from accelerate import Accelerator

from ..data.images import ImageDataset
from ..model.modeling_mim_refiner import MimRefinerModel
from ..pretraining.loop import CHECKPOINTS, pretrain
from ..pretraining.loop_options import LoopOptions
from .prepare import Prepared

_PRETRAINING = "pretraining"


def pretrained_start(prepared: Prepared, accelerator: Accelerator) -> MimRefinerModel:
    """The encoder that the run's pre-training ships; it runs as the refinement does.

    Raises:
        Interrupted: after a checkpoint, when a signal asked the run to stop.
        FloatingPointError: for a loss or gradient that is not finite.
    """
    recipe = prepared.recipe
    images = prepared.images.training
    assert prepared.start.pretraining is not None and isinstance(images, ImageDataset)
    options = LoopOptions(
        num_workers=recipe.num_workers,
        max_bad_fraction=recipe.max_bad_fraction,
        mixed_precision="bf16" if recipe.bf16 else "no",
        gradient_checkpointing=recipe.gradient_checkpointing,
        save_every=recipe.asked.save_every,
        save_total_limit=recipe.save_total_limit,
        # the run's own begin with the refinement
        report_to="none",
        log_every=recipe.log_every,
    )
    folder = Path(recipe.output_dir) / _PRETRAINING
    trained = pretrain(prepared.start.pretraining, images, accelerator, options, folder=folder)
    return trained.shipped()


def remove_checkpoints(output: Path) -> None:
    """Let go of the checkpoints of the run's pre-training; its log stays."""
    shutil.rmtree(output / _PRETRAINING / CHECKPOINTS, ignore_errors=True)
