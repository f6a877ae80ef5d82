"""What a recipe leaves open, fitted to the number of images: batch, rates, and momenta.

    recipe = fit_to_images(PretrainRecipe(objective="conmim"), num_images=300)
    recipe.batch_size      # 32

The authors' numbers are for millions of images. With few of them the batch is small, and the peak
rate follows its root, and the width as in a refinement; the updates are few, and a momentum copy
that reaches further back than they do would stay what it began as. The rates come within a factor
of three of seven of the eight small recipes, which were chosen by hand (a test says which); whether
they are the better ones was not measured.
"""

import dataclasses
import logging
import math
from collections.abc import Collection
from typing import Any

from ..runtime.wording import setting
from .recipe import PretrainRecipe

logger = logging.getLogger(__name__)

# width that the authors' rates are for, and the least that small recipes were measured at
_WIDTH = {"mae": 768, "data2vec2": 768, "conmim": 768, "capi": 1024}
_LEAST_WIDTH = 96
_RATES = ("learning_rate", "clustering_learning_rate")

# a momentum copy reaches at most so large a part of the updates back, as 1 / part
_PARTS = {
    "data2vec2": {"momentum_start": 10, "momentum_end": 1},
    "conmim": {"momentum_start": 10},
    "capi": {"momentum_after_warmup": 10},
}


def fit_to_images(recipe: PretrainRecipe, num_images: int | None) -> PretrainRecipe:
    """The recipe for so many images, None for a stream, which counts as many; changes are said.

    Raises:
        ValueError: for a single image, of which no batch can be made.
    """
    if num_images is None:
        return recipe
    left_open = recipe.left_open
    if num_images < 2 and "batch_size" in left_open:
        raise ValueError(f"there is only {num_images} image; a pre-training takes 2 or more")

    changes: dict[str, Any] = {}
    batch = recipe.batch_size
    # at most an eighth of the images, a power of two, at least 2
    most = max(num_images // 8, 2)
    if "batch_size" in left_open and batch > most:
        batch = 2 ** int(math.log2(most))
        changes["batch_size"] = batch
        _say(recipe, "batch_size", batch, f"{num_images} images")
        changes |= _rates(recipe, left_open, batch)

    updates = recipe.epochs * max(num_images // batch, 1)
    updates = min(updates, recipe.max_steps or updates)
    changes |= _momenta(recipe, left_open, updates)
    return dataclasses.replace(recipe, **changes) if changes else recipe


def _rates(recipe: PretrainRecipe, left_open: Collection[str], batch: int) -> dict[str, float]:
    """Peaks in the root of the batch, and the inverse of the width."""
    crops = recipe.crops_per_image
    factor = math.sqrt(batch / recipe.batch_size)
    factor *= _WIDTH[recipe.objective] / max(recipe.hidden_size, _LEAST_WIDTH)
    if recipe.objective == "mae":
        # a base rate, which the step multiplies by its batch
        factor *= recipe.batch_size / batch / math.sqrt(crops)

    changes = {}
    for name in _RATES:
        if name in left_open:
            rate = float(f"{getattr(recipe, name) * factor:.3g}")
            changes[name] = rate
            of = f"{setting('batch_size', batch)} and {setting('hidden_size', recipe.hidden_size)}"
            _say(recipe, name, rate, of)
    return changes


def _momenta(recipe: PretrainRecipe, left_open: Collection[str], updates: int) -> dict[str, float]:
    """Momenta of a copy that moves within so many updates."""
    changes: dict[str, float] = {}
    for name, part in _PARTS.get(recipe.objective, {}).items():
        momentum = round(max(1 - part / updates, 0.5), 5)
        if name == "momentum_end":
            # it rises from where it starts
            momentum = max(momentum, changes.get("momentum_start", recipe.momentum_start))
        if name in left_open and momentum < getattr(recipe, name):
            changes[name] = momentum
            _say(recipe, name, momentum, f"{updates} updates")
    return changes


def _say(recipe: PretrainRecipe, name: str, value: float, what: str) -> None:
    logger.warning(
        "%s: chosen for %s; the authors' is %s", setting(name, value), what, getattr(recipe, name)
    )
