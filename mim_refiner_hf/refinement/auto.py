"""What a recipe leaves open, fitted to the images, the encoder and the machine: one rule a setting.

    fitted = fit(recipe, Situation(config, num_images=300))
    fitted.recipe.batch_size, fitted.reasons["batch_size"]
    # 32, "4 times the root of 300 images, as a power of two, at most 32 without a GPU"

A rule sees the settings that were stated, and follows them: the learning rate goes with the batch
that the user asked for. What decides with few images is the number of updates, the learning rate
and the reach of the moving average (benchmarks/results/small-data.md); the paper's epochs and decay
would ship the start. From 20 000 images on, and on a GPU, views and swap are the paper's.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.poolings_mim_refiner import Pooling
from ..runtime.launch import workers_per_process
from ..runtime.wording import setting
from .recipe import RefineRecipe
from .recipe_method import default_head_blocks

T = TypeVar("T")

# Images from which on neighbours are near enough to swap, and views are the paper's.
MANY_IMAGES = 20_000
# Updates of the refinement: too few change little.
_LEAST_UPDATES = 300
# Without a GPU these take some ten minutes, with a tiny encoder on two cores. The study measured
# batches of 32; twice the batch takes twice as long.
_MOST_UPDATES_WITHOUT_GPU = 600
_MOST_BATCH_WITHOUT_GPU = 32
_LEAST_HEAD_UPDATES = 40
_EPOCHS = 30
# Width and batch at which the peak learning rate was measured.
_PEAK = 1e-3
_PEAK_WIDTH = 192
_PEAK_BATCH = 64
# Low-rank adapters stand in the last third of the blocks, which takes half the time an update, and
# learn at ten times the rate for half as many updates again (benchmarks/results/refine-options.md).
# At the encoder's own rate they hardly move, at thirty times it the features collapse.
_ADAPTER_RATE = 10
_ADAPTER_LENGTH = 1.5


@dataclass(frozen=True)
class Choice(Generic[T]):
    """The value of a setting, and why; the reason is empty where the recipe names the value."""

    value: T
    reason: str = ""


@dataclass(frozen=True)
class Situation:
    """What open settings are fitted to.

    Attributes:
        config: of the encoder that is refined.
        num_images: training images; None for a stream, which counts as many.
        processes: how many share a batch.
        gpu: whether they compute on GPUs.
        about_neighbours: settings of metadata that need neighbours to be looked up.
    """

    config: MimRefinerConfig
    num_images: int | None
    processes: int = 1
    gpu: bool = False
    about_neighbours: Sequence[str] = ()

    @property
    def is_large(self) -> bool:
        """Whether images and machine suffice for the paper's views and swap."""
        many = self.num_images is None or self.num_images >= MANY_IMAGES
        return many and self.gpu

    @property
    def too_small(self) -> str:
        """Why they do not."""
        if not self.gpu:
            return "without a GPU"
        return f"{self.num_images} images, fewer than {MANY_IMAGES}"


@dataclass(frozen=True)
class Fitted:
    """A recipe with nothing of `FITTED` left open, and why each such field has its value.

    Open is only `warmup_epochs` where `warmup_share` stands.
    """

    recipe: RefineRecipe
    reasons: dict[str, str]


def fit(recipe: RefineRecipe, at: Situation) -> Fitted:
    """The recipe with every field of `FITTED` that it leaves open filled in.

    Raises:
        ValueError: where what was stated and what is fitted to it contradict each other.
    """
    filled = copy.copy(recipe)
    reasons: dict[str, str] = {}
    stated = Stated(filled, reasons)

    # in this order: a rule reads what stands before it
    for name, rule in _RULES.items():
        shared = name == "warmup_epochs" and recipe.warmup_share is not None
        if stated[name] is not None or shared:
            continue
        choice = rule(stated, at)
        setattr(filled, name, choice.value)
        reasons[name] = choice.reason

    # the local views' side means nothing without local views
    if filled.local_views == 0:
        reasons.pop("local_size", None)
    # made anew, it is checked once more
    return Fitted(dataclasses.replace(filled), reasons)


@dataclass(frozen=True)
class Stated:
    """The recipe that is being filled in, and why: `stated[name]` may be set by a rule before."""

    recipe: RefineRecipe
    reasons: Mapping[str, str]

    def __getitem__(self, name: str) -> Any:
        return getattr(self.recipe, name)

    @property
    def adapters(self) -> bool:
        """Whether low-rank adapters are trained in place of the encoder's weights."""
        return bool(self.recipe.trainable.startswith("lora"))

    @property
    def updates(self) -> int:
        """Of the refinement, as far as is known: by epochs, or by `max_steps`."""
        return self.recipe.max_steps or _LEAST_UPDATES


# ---- images


def choose_eval_fraction(num_images: int) -> Choice[float]:
    """The share of the images that is held out: a tenth, but neither many nor the last few."""
    if num_images < 200:
        return Choice(0.0, f"none of {num_images} images is given up: fewer than 200")
    if num_images > 10_000:
        return Choice(1000 / num_images, "1000 images are enough to measure on")
    return Choice(0.1, "a tenth of the images")


# ---- batch and length


def _batch_size(stated: Stated, at: Situation) -> Choice[int]:
    """Negatives come from the batch: 4 sqrt(n), as far as images and machine allow."""
    most = 1024 if at.gpu else _MOST_BATCH_WITHOUT_GPU
    limit = f"at most {most}" if at.gpu else f"at most {most} without a GPU"
    if at.num_images is None:
        size = most
        reason = f"a stream has images enough; {limit}"
    else:
        power = round(math.log2(4 * math.sqrt(at.num_images)))
        size = min(max(2**power, 32), most)
        reason = f"4 times the root of {at.num_images} images, as a power of two, {limit}"
        if size > at.num_images // 2:
            size = max(2, at.num_images // 2)
            reason = f"half of {at.num_images} images"

    queue = stated["queue_size"]
    if queue is not None and size > queue:
        size = queue
        reason = f"as many as {setting('queue_size', queue)}"
    # every process has the same share
    return Choice(max(at.processes, size - size % at.processes), reason)


def _per_epoch(stated: Stated, at: Situation) -> int:
    """Updates of an epoch; of a stream, which has none, one."""
    if at.num_images is None:
        return 1
    return max(1, at.num_images // stated["batch_size"])


def _epochs(stated: Stated, at: Situation) -> Choice[float]:
    """So many that the updates are enough, and without a GPU not too many."""
    if at.num_images is None:
        return Choice(float(stated.updates), "a stream has no epochs")
    per_epoch = _per_epoch(stated, at)
    longer = _ADAPTER_LENGTH if stated.adapters else 1
    most = round(longer * _MOST_UPDATES_WITHOUT_GPU)
    least = round(longer * _LEAST_UPDATES)
    epochs = round(longer * _EPOCHS)
    if not at.gpu and epochs * per_epoch > most:
        reason = f"{most} updates, the most without a GPU; state epochs for more"
        return Choice(most / per_epoch, reason)
    if epochs * per_epoch < least:
        return Choice(least / per_epoch, f"{least} updates, for fewer change little")
    return Choice(float(epochs), f"{epochs} epochs")


def _updates(stated: Stated, at: Situation) -> int:
    """Updates of the refinement."""
    updates = round(stated["epochs"] * _per_epoch(stated, at))
    if stated.recipe.max_steps is not None:
        updates = min(updates, stated.recipe.max_steps)
    return max(1, updates)


def _head_epochs(stated: Stated, at: Situation) -> Choice[float]:
    updates = max(_LEAST_HEAD_UPDATES, round(_updates(stated, at) / 5))
    reason = f"a fifth of the refinement's updates, at least {_LEAST_HEAD_UPDATES}"
    return Choice(updates / _per_epoch(stated, at), reason)


def _warmup_epochs(stated: Stated, at: Situation) -> Choice[float]:
    epochs = min(0.1 * stated["epochs"], 4.0)
    if stated["head_epochs"] == 0:
        return Choice(epochs, "a tenth of the refinement, at most 4 epochs")
    epochs = min(epochs, 0.2 * stated["head_epochs"])
    return Choice(
        epochs, "a tenth of the refinement, at most a fifth of the head warm-up and 4 epochs"
    )


# ---- heads, queue, objective


def _projector_dim(stated: Stated, at: Situation) -> Choice[int]:
    width = min(max(4 * at.config.hidden_size, 768), 2048)
    return Choice(width, "4 times the encoder's width, 768 to 2048")


def _predictor_dim(stated: Stated, at: Situation) -> Choice[int]:
    width = min(max(round(at.config.hidden_size * 16 / 3), 1024), 4096)
    return Choice(width, "5.33 times the encoder's width, 1024 to 4096")


def _embedding_dim(stated: Stated, at: Situation) -> Choice[int]:
    narrow = at.config.hidden_size < 384
    return Choice(128 if narrow else 256, f"the encoder's width is {at.config.hidden_size}")


def _queue_size(stated: Stated, at: Situation) -> Choice[int]:
    least = max(stated["batch_size"], stated["topk"] or 1)
    if at.num_images is None:
        size = max(65536, least)
        reason = "a stream has images enough"
    else:
        half = 2 ** int(math.log2(max(2, at.num_images) / 2))
        size = max(min(half, 65536), least)
        reason = f"at most half of {at.num_images} images, so that every row is another one"

    if stated.recipe.target_momentum is not None:
        batch = stated["batch_size"]
        size = max(size // batch, math.ceil(least / batch)) * batch
        reason += "; whole batches"
    return Choice(size, reason)


def _topk(stated: Stated, at: Situation) -> Choice[int]:
    size = min(max(stated["queue_size"] // 100, 1), 20)
    return Choice(size, f"a hundredth of the queue's {stated['queue_size']} rows, 1 to 20")


def _swap(stated: Stated, at: Situation) -> Choice[str]:
    if at.is_large:
        return Choice("positive", "the paper's")
    for name in at.about_neighbours:
        return Choice("positive", f"{setting(name)} is about neighbours")
    return Choice("none", f"{at.too_small}: a run is too short for its neighbours to be near")


def choose_temperature(width: int) -> Choice[float]:
    """The paper's temperature for an encoder of this width (Table 10)."""
    if width <= 1024:
        return Choice(0.2, "the encoder's width is at most 1024")
    if width <= 1280:
        return Choice(0.3, "the encoder's width is above 1024, at most 1280")
    return Choice(0.35, "the encoder's width is above 1280")


def _temperature(_: Stated, at: Situation) -> Choice[float]:
    return choose_temperature(at.config.hidden_size)


def _head_temperature(stated: Stated, at: Situation) -> Choice[float]:
    return Choice(stated["temperature"], "that of the refinement")


def _pooling(_: Stated, at: Situation) -> Choice[Pooling]:
    # the configuration fills its own in
    assert at.config.pooling is not None
    return Choice(at.config.pooling, "what the model itself pools")


# ---- views


def _global_views(stated: Stated, at: Situation) -> Choice[int]:
    return Choice(2, "the paper's")


def _local_views(stated: Stated, at: Situation) -> Choice[int]:
    if stated["global_views"] == 1:
        return Choice(10, "the paper's")
    if at.is_large:
        return Choice(10, "the paper's")
    return Choice(0, f"{at.too_small}: they cost more than they bring")


def _global_size(stated: Stated, at: Situation) -> Choice[int]:
    patch = at.config.patch_size
    if stated["local_views"]:
        whole = at.config.grid[0] * at.config.patch_size
        return Choice(whole, "global views have the encoder's native size")
    side = max(1, round(at.config.grid[0] * 3 / 4)) * patch
    return Choice(side, "3/4 of the native size, in whole patches")


def _local_size(stated: Stated, at: Situation) -> Choice[int]:
    side = max(1, round(at.config.grid[0] * 3 / 7)) * at.config.patch_size
    return Choice(side, "local views 3/7 of the native size, in whole patches")


def _global_scale(stated: Stated, at: Situation) -> Choice[list[float]]:
    if stated["local_views"]:
        return Choice([0.25, 1.0], "the paper's")
    return Choice([0.3, 1.0], "no local views show smaller parts")


# ---- optimisation


def _learning_rate(stated: Stated, at: Situation) -> Choice[float]:
    """Peaks at 0.001 at width 192 and batch 64: ten times as much is worse than the start."""
    batch = stated["batch_size"]
    width = at.config.hidden_size
    peak = _PEAK * math.sqrt(batch / _PEAK_BATCH) * _PEAK_WIDTH / width
    reason = f"for batch {batch} and width {width}"
    if stated.adapters:
        peak *= _ADAPTER_RATE
        reason += f", {_ADAPTER_RATE} times the encoder's own"
    base = float(f"{peak * 256 / batch:.3g}")
    return Choice(base, f"a peak of {peak:.2g}, {reason}")


def _head_learning_rate(stated: Stated, at: Situation) -> Choice[float]:
    return _rate_of_heads(stated, "that of the refinement")


def _refine_head_learning_rate(stated: Stated, at: Situation) -> Choice[float]:
    return _rate_of_heads(stated, "that of the encoder")


def _rate_of_heads(stated: Stated, reason: str) -> Choice[float]:
    """The encoder's; where that was fitted to adapters, a tenth of it, which is its own."""
    rate = stated["learning_rate"]
    if not (stated.adapters and "learning_rate" in stated.reasons):
        return Choice(rate, reason)
    share = float(f"{rate / _ADAPTER_RATE:.3g}")
    return Choice(share, f"a tenth of the adapters' {rate:.3g}")


def _freeze_blocks(stated: Stated, at: Situation) -> Choice[int]:
    if stated.adapters:
        return _first_adapted(stated, at.config.num_hidden_layers)
    if stated["trainable"] != "all":
        return Choice(0)
    return Choice(0, "every block learns; to freeze some saves time")


def _first_adapted(stated: Stated, layers: int) -> Choice[int]:
    """The block from which on there are adapters: a head before it would train nothing."""
    default = default_head_blocks(layers)[0]
    blocks = stated["head_blocks"]
    if blocks == "auto":
        return Choice(min(default, layers // 2), "measuring puts no head earlier")
    lowest = min(blocks) if blocks else layers - (stated["num_heads"] or 0)
    if lowest < default:
        return Choice(max(0, lowest), "adapters begin where the heads do")
    return Choice(default, "adapters are where heads are by default")


def _layer_decay(stated: Stated, at: Situation) -> Choice[float]:
    if stated.adapters:
        return Choice(1.0, "adapters learn at one rate in all blocks")
    layers = at.config.num_hidden_layers
    decay = min(max(0.85 - 0.2 * (layers - 12) / 12, 0.65), 0.85)
    return Choice(round(decay, 4), f"{layers} blocks")


def _ema_decay(stated: Stated, at: Situation) -> Choice[float]:
    updates = _updates(stated, at)
    decay = max(0.0, 1 - 10 / updates)
    if decay > 0.9999:
        return Choice(0.9999, f"{updates} updates")
    return Choice(round(decay, 8), f"it reaches a tenth of {updates} updates back")


# ---- the machine


def _num_workers(stated: Stated, at: Situation) -> Choice[int]:
    return Choice(workers_per_process(at.processes), "one per core and process, at most 16")


def _save_every(stated: Stated, at: Situation) -> Choice[int]:
    steps = _updates(stated, at) + round(stated["head_epochs"] * _per_epoch(stated, at))
    return Choice(min(500, math.ceil(steps / 10)), "a tenth of all steps, at most 500")


_RULES: dict[str, Callable[[Stated, Situation], Choice[Any]]] = {
    "pooling": _pooling,
    "batch_size": _batch_size,
    "epochs": _epochs,
    "head_epochs": _head_epochs,
    "warmup_epochs": _warmup_epochs,
    "projector_dim": _projector_dim,
    "predictor_dim": _predictor_dim,
    "embedding_dim": _embedding_dim,
    "queue_size": _queue_size,
    "topk": _topk,
    "swap": _swap,
    "temperature": _temperature,
    "head_temperature": _head_temperature,
    "global_views": _global_views,
    "local_views": _local_views,
    "global_size": _global_size,
    "local_size": _local_size,
    "global_scale": _global_scale,
    "learning_rate": _learning_rate,
    "head_learning_rate": _head_learning_rate,
    "refine_head_learning_rate": _refine_head_learning_rate,
    "freeze_blocks": _freeze_blocks,
    "layer_decay": _layer_decay,
    "ema_decay": _ema_decay,
    "num_workers": _num_workers,
    "save_every": _save_every,
}
