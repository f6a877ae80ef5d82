"""Settings that cannot do what they are there for on these images, each with the value to take.

    misfits(resolved)
    # ["--ema_decay 0.9999: after 300 updates 97 % of the start would ship; take 0.9667"]

They are warnings: a run with them is possible, and now and then meant.
"""

import math

from ..runtime.wording import setting
from .resolve import ResolvedRecipe

# of the start's weights that the moving average may keep by decay alone
_MOST_OF_THE_START = 0.1
# passes over the images after which the queue's rows are stale and repeat themselves
_MOST_EPOCHS_QUEUED = 4
_FEWEST_UPDATES = 100
# of auto's learning rate and temperature: of the rate ten times as much ended below the start, a
# tenth did next to nothing; of the temperature a twentieth cost 7 points of cluster accuracy
_FAR = 6
# of the queue: so many "nearest" rows are no neighbours
_LARGEST_TOPK = 0.05


def misfits(recipe: ResolvedRecipe) -> list[str]:
    """One line for each setting that does not fit; none for what `auto` chose."""
    problems = [_start_ships(recipe), _few_updates(recipe), _long_warmup(recipe)]
    problems += [
        _same_pairs(recipe),
        _far_rate(recipe),
        _far_temperature(recipe),
        _no_neighbours(recipe),
    ]
    if recipe.num_images is not None:
        problems.append(_stale_queue(recipe, recipe.num_images))
    return [problem for problem in problems if problem]


def _start_ships(recipe: ResolvedRecipe) -> str:
    updates = recipe.steps.refine
    left = recipe.ema_decay**updates
    if left <= _MOST_OF_THE_START or recipe.asked.stage == "warmup":
        return ""
    fitting = max(0.0, 1 - 10 / updates)
    return (
        f"{setting('ema_decay', recipe.ema_decay)}: after {updates} updates {100 * left:.0f} % of "
        f"the start would ship; take {fitting:.4g}"
    )


def _few_updates(recipe: ResolvedRecipe) -> str:
    updates = recipe.steps.refine
    if updates >= _FEWEST_UPDATES or recipe.asked.stage == "warmup":
        return ""
    more = f"at least {_FEWEST_UPDATES}"
    if recipe.asked.max_steps is not None and recipe.asked.max_steps < _FEWEST_UPDATES:
        return f"{setting('max_steps', recipe.asked.max_steps)}: changes little; take {more}"
    epochs = math.ceil(recipe.epochs * _FEWEST_UPDATES / max(1, updates))
    return (
        f"{setting('epochs', recipe.epochs)}: {updates} updates change little; take {more}, "
        f"{epochs} epochs"
    )


def _long_warmup(recipe: ResolvedRecipe) -> str:
    if recipe.warmup_share is not None:
        if recipe.warmup_share <= 0.5:
            return ""
        share = setting("warmup_share", recipe.warmup_share)
        return f"{share}: more than half of the refinement; take 0.2"
    assert recipe.warmup_epochs is not None
    if recipe.warmup_epochs <= recipe.epochs / 2:
        return ""
    fitting = 0.1 * recipe.epochs
    return (
        f"{setting('warmup_epochs', recipe.warmup_epochs)}: more than half of the refinement; take "
        f"{fitting:.2g}"
    )


def _same_pairs(recipe: ResolvedRecipe) -> str:
    if recipe.asked.pairs == "intended" or recipe.local_views:
        return ""
    asked = setting("pairs", recipe.asked.pairs)
    return f"{asked}: without local views there are no other pairs; add {setting('local_views', 4)}"


def _far_rate(recipe: ResolvedRecipe) -> str:
    ratio = recipe.learning_rate / recipe.fitting_rate
    if 1 / _FAR < ratio < _FAR or recipe.asked.stage == "warmup":
        return ""
    what = "changes little" if ratio < 1 else "may spoil the features"
    return (
        f"{setting('learning_rate', recipe.learning_rate)}: {ratio:.2g} times what fits batch "
        f"{recipe.batch_size} and this encoder, it {what}; take {recipe.fitting_rate:.3g}"
    )


def _far_temperature(recipe: ResolvedRecipe) -> str:
    ratio = recipe.temperature / recipe.fitting_temperature
    if 1 / _FAR < ratio < _FAR:
        return ""
    what = "other images hardly count" if ratio > 1 else "only the nearest other image counts"
    return (
        f"{setting('temperature', recipe.temperature)}: {ratio:.2g} times what fits this encoder, "
        f"{what}; take {recipe.fitting_temperature:.3g}"
    )


def _no_neighbours(recipe: ResolvedRecipe) -> str:
    if recipe.swap == "none" or recipe.topk <= max(1, _LARGEST_TOPK * recipe.queue_size):
        return ""
    return (
        f"{setting('topk', recipe.topk)}: {100 * recipe.topk / recipe.queue_size:.0f} % of the "
        f"queue's {recipe.queue_size} rows are no neighbours; take "
        f"{max(1, recipe.queue_size // 100)}"
    )


def _stale_queue(recipe: ResolvedRecipe, num_images: int) -> str:
    most = _MOST_EPOCHS_QUEUED * num_images
    if recipe.queue_size <= most:
        return ""
    fitting = 2 ** int(math.log2(max(2, num_images) / 2))
    return (
        f"{setting('queue_size', recipe.queue_size)}: more than {_MOST_EPOCHS_QUEUED} times the "
        f"{num_images} images, most rows are stale copies; take "
        f"{max(fitting, recipe.batch_size)}"
    )
