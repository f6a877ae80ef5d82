"""`--head_blocks auto`: measure all blocks of the starting weights, choose those with a head.

    choice = choose_head_blocks(recipe, encoder, processor, images)
    choice.blocks, choice.reason        # [8, 9, 10, 11], "k-NN accuracy is best in block 10 ..."

Half of at most 2000 training images is the k-NN bank, the other half is measured; evaluation
images are not touched. The rule is that of `propose_head_blocks`. The choice is made once:
checkpoints and metrics.json keep it, and a resumed run goes on with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..data.images import ImageDataset, evenly_spaced, hold_out
from ..data.loading import Loading
from ..evaluation.block_analysis import BlockProfile, block_profile, propose_head_blocks
from ..model.modeling_mim_refiner import MimRefinerModel
from ..refinement.resolve import ResolvedRecipe
from ..runtime.wording import setting

_MEASURED_IMAGES = 2000
# On fewer images, which neighbours are nearest is chance.
_LEAST_IMAGES = 50


@dataclass(frozen=True)
class HeadChoice:
    """The blocks that get a head, why (one sentence), and what was measured on every block."""

    blocks: list[int]
    reason: str
    profile: list[BlockProfile]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "HeadChoice":
        """What `dataclasses.asdict` has made JSON of, in a checkpoint or metrics.json."""
        profile = [BlockProfile(**block) for block in values["profile"]]
        return cls(values["blocks"], values["reason"], profile)


def check_measurable(images: ImageDataset | None) -> None:
    """Raise, before any work, where head blocks cannot be chosen by measurement.

    Args:
        images: to measure on; None for a stream without evaluation images.

    Raises:
        ValueError: when there are none, or too few.
    """
    auto = setting("head_blocks", "auto")
    if images is None:
        raise ValueError(
            f"{auto}: a stream cannot be measured; name an {setting('eval_dataset')}, or the "
            f"blocks, or leave {setting('head_blocks')} out"
        )
    if len(images) < _LEAST_IMAGES:
        raise ValueError(
            f"{auto}: {len(images)} images are too few to measure, {_LEAST_IMAGES} "
            f"are needed; name the blocks, or leave {setting('head_blocks')} out"
        )


def choose_head_blocks(
    recipe: ResolvedRecipe, encoder: MimRefinerModel, processor: Any, images: ImageDataset
) -> HeadChoice:
    """Measure and choose: a pure function of weights, images and seed, the same in every process.

    Args:
        encoder: the starting weights; from here on it pools what the recipe's heads read.
        processor: its image processor.
        images: training images; of more than 2000, 2000 evenly spaced ones are used.
    """
    encoder.config.pooling = recipe.pooling
    bank, measured = hold_out(evenly_spaced(images, _MEASURED_IMAGES), 0.5, recipe.seed)
    profile = block_profile(
        encoder,
        processor,
        bank,
        measured,
        flip=recipe.flip,
        seed=recipe.seed,
        loading=Loading(num_workers=recipe.num_workers),
    )
    blocks, reason = propose_head_blocks(profile, frozen=recipe.freeze_blocks)
    return HeadChoice(blocks, reason, profile)
