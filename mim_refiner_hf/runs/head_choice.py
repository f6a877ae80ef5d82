"""`--head_blocks auto`: measure all blocks of the starting weights, then choose those that get a head, and say why.

    choice = choose_head_blocks(recipe, encoder, processor, images)
    choice["blocks"], choice["reason"]                       # [8, 9, 10, 11], "k-NN accuracy is best in block 10 (41.8 %) ..."

Half of at most 2000 training images is the k-NN bank, the other half is measured; evaluation images are not touched. The rule is
that of `propose_head_blocks`. The choice is made once: checkpoints and metrics.json keep it, and a resumed run goes on with it.
"""

import dataclasses
from typing import Any

from ..data.images import ImageDataset, evenly_spaced, hold_out
from ..data.loading import Loading
from ..evaluation.block_analysis import block_profile, propose_head_blocks
from ..model.modeling_mim_refiner import MimRefinerModel
from ..refinement.recipe import RefineRecipe

SAMPLE = 2000
LEAST = 50  # images; on fewer, which neighbours are nearest is chance


def check_measurable(images: ImageDataset | None) -> None:
    """Raise a ValueError, before any work, where there are no images, or too few, to choose head blocks by measurement.

    Args:
        images: at random places to measure on; None for a stream without evaluation images.
    """
    if images is None:
        raise ValueError(
            "--head_blocks auto: a stream cannot be measured; name an --eval_dataset, or the blocks, or leave --head_blocks out"
        )
    if len(images) < LEAST:
        raise ValueError(
            f"--head_blocks auto: {len(images)} images are too few to measure, {LEAST} are needed; name the blocks, or leave "
            "--head_blocks out"
        )


def choose_head_blocks(
    recipe: RefineRecipe,
    encoder: MimRefinerModel,
    processor: Any,
    images: ImageDataset,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Measure and choose; a pure function of weights, images and the recipe's seed, the same on every process.

    Args:
        recipe: a resolved one with head_blocks "auto".
        encoder: the starting weights; from here on it pools what the recipe's heads read.
        processor: its image processor.
        images: training images; of more than 2000, 2000 evenly spaced ones are used.

    Returns:
        As JSON: `blocks`, `reason` (one sentence) and `profile`, the fields of a `BlockProfile` for every block.
    """
    encoder.config.pooling = recipe.pooling
    bank, measured = hold_out(evenly_spaced(images, SAMPLE), 0.5, recipe.seed)
    profile = block_profile(
        encoder,
        processor,
        bank,
        measured,
        flip=recipe.flip,
        seed=recipe.seed,
        loading=Loading(num_workers=num_workers),
    )
    blocks, reason = propose_head_blocks(profile, frozen=recipe.freeze_blocks)
    return {
        "blocks": blocks,
        "reason": reason,
        "profile": [dataclasses.asdict(block) for block in profile],
    }


__all__ = ["check_measurable", "choose_head_blocks"]
