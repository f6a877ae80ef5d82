"""Which blocks of an encoder carry a head, and which first channels of its output."""

from collections.abc import Sequence

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.poolings_mim_refiner import LEARNED_POOLINGS, Pooling
from ..runtime.wording import setting
from .auto import Choice
from .recipe import RefineRecipe
from .recipe_method import default_head_blocks


def _default_heads(layers: int, frozen: int) -> Choice[list[int]]:
    """The default blocks that are trained."""
    blocks = default_head_blocks(layers)
    trained = [block for block in blocks if block >= frozen]
    reason = f"the last third of the {layers} blocks"
    if trained != blocks:
        reason = f"those that are trained of the last third of the {layers} blocks"
    return Choice(trained, reason)


def choose_blocks_with_heads(
    recipe: RefineRecipe, layers: int, pooling: Pooling
) -> Choice[list[int]]:
    """The blocks with a head; for "auto", which measures before it chooses, the default ones."""
    assert recipe.freeze_blocks is not None
    default = _default_heads(layers, recipe.freeze_blocks)
    count = recipe.num_heads
    if recipe.head_blocks == "auto":
        return _default_heads(layers, frozen=0)
    if count is not None and count > layers:
        raise ValueError(f"{setting('num_heads', count)}: the encoder has only {layers} blocks")
    if recipe.head_blocks is not None:
        chosen = Choice(recipe.head_blocks)
    elif count is not None:
        chosen = Choice(list(range(layers - count, layers)))
    else:
        chosen = default

    blocks = chosen.value
    named = setting("head_blocks", blocks)
    if blocks[0] < 0 or blocks[-1] >= layers:
        raise ValueError(f"{named}: out of range; the encoder has blocks 0 to {layers - 1}")
    if recipe.freeze_blocks > blocks[0]:
        raise ValueError(
            f"{setting('freeze_blocks', recipe.freeze_blocks)}: the head on block {blocks[0]} "
            f"would train nothing; freeze at most {blocks[0]}"
        )
    if pooling in LEARNED_POOLINGS and blocks[-1] != layers - 1:
        raise ValueError(
            f"{setting('pooling', pooling)}: only the head on the encoder's output reads it; "
            f"add block {layers - 1} to {named}, or use mean"
        )
    return chosen


_NESTED_SHARES = (8, 4, 2)


def choose_nested_widths(
    recipe: RefineRecipe, config: MimRefinerConfig, blocks: Sequence[int]
) -> list[int]:
    """The first channels of the output that get a head of their own; none without `matryoshka`."""
    if not recipe.matryoshka:
        return []
    width = config.hidden_size
    named = setting("matryoshka", True)
    if width % _NESTED_SHARES[0]:
        raise ValueError(
            f"{named}: the encoder's width must be a multiple of {_NESTED_SHARES[0]}, is {width}; "
            f"leave {setting('matryoshka')} out"
        )
    last = config.num_hidden_layers - 1
    if last not in blocks:
        raise ValueError(
            f"{named}: needs a head on the encoder's output; add block {last} to "
            f"{setting('head_blocks', list(blocks))}"
        )
    return [width // share for share in _NESTED_SHARES]
