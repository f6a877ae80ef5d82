"""What a recipe leaves open, filled in once: from the encoder, the number of images, the machine.

    resolved = resolve(recipe, encoder.config, num_images=1281167, processes=8, bf16=True)
    resolved.head_blocks, resolved.reasons["head_blocks"]
    # [16, 17, ..., 23], "the last third of the 24 blocks"

Nothing after it asks for a default again. What can only be measured in the run (`--head_blocks
auto`, `--micro_batch_size auto`) stands in `to_measure`, with an estimate in its place, until
`measured` replaces it.

The rules are in `auto.py`, one for each setting; here are those that need more than one of them,
and the checks that need encoder and data. Every choice has one reason, which the plan prints.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..model.configuration_mim_refiner import LARGEST_SIDE, MimRefinerConfig
from ..model.poolings_mim_refiner import Pooling
from ..runtime.wording import setting
from .adapters import check_rank
from .auto import Choice, Situation, fit
from .choices import Activation, HeadInit, LossSchedule, NormViews, Pairs, Swap
from .head_blocks import choose_blocks_with_heads, choose_nested_widths
from .recipe import RefineRecipe
from .recipe_method import TrainedPart, trained_part


class ViewSizes(NamedTuple):
    """Sides of global and local views in pixels."""

    global_size: int
    local_size: int


class Steps(NamedTuple):
    """Updates of the head warm-up and of the refinement."""

    warmup: int
    refine: int

    @property
    def total(self) -> int:
        """Updates in all."""
        return self.warmup + self.refine


@dataclass(frozen=True)
class ResolvedRecipe:
    """Every setting that a refinement computes with, none of them open.

    A field that has the name of one of `RefineRecipe` means the same. Beside these:

    Attributes:
        asked: the recipe as it was written. Names of data, model and repository are read there.
        num_images: images to train on; None for a stream.
        processes: how many processes share a batch.
        nested_widths: first channels of the output that have a head of their own, see
            `matryoshka`.
        steps: updates of each stage.
        bf16: whether encoder and heads are computed in bfloat16.
        micro_batch_size: images of one process per pass; None for its whole share of the batch
            in one pass, of which every graph is kept.
        warmup_epochs: None where `warmup_share` says it.
        save_every: 0 for no checkpoints.
        fitting_rate: the learning rate that `auto` would take for this batch and encoder.
        fitting_temperature: the temperature that it would take for this encoder.
        to_measure: fields whose value is an estimate until the run has measured.
        reasons: why a field that was left open has its value, by its name.
    """

    asked: RefineRecipe
    num_images: int | None
    processes: int
    max_bad_fraction: float
    # heads
    pooling: Pooling
    head_blocks: list[int]
    matryoshka: bool
    nested_widths: list[int]
    projector_dim: int
    predictor_dim: int
    embedding_dim: int
    queue_size: int
    activation: Activation
    predictor_norm: bool
    norm_views: NormViews
    head_init: HeadInit
    # objective
    temperature: float
    head_temperature: float
    target_momentum: float | None
    topk: int
    swap: Swap
    pairs: Pairs
    loss_schedule: LossSchedule
    freeze_blocks: int
    trainable: str
    # views
    global_views: int
    local_views: int
    global_size: int
    local_size: int
    global_scale: tuple[float, float]
    local_scale: tuple[float, float]
    colour: bool
    views: Literal["exact", "fast"]
    flip: float
    # schedule
    steps: Steps
    epochs: float
    head_epochs: float
    warmup_epochs: float | None
    warmup_share: float | None
    batch_size: int
    learning_rate: float
    head_learning_rate: float
    refine_head_learning_rate: float
    end_learning_rate: float
    layer_decay: float
    weight_decay: float
    head_weight_decay: float
    ema_decay: float
    seed: int
    # efficiency
    micro_batch_size: int | None
    bf16: bool
    gradient_checkpointing: bool
    compile: bool
    num_workers: int
    # output
    eval_every: int
    output_dir: str
    save_every: int
    save_total_limit: int
    log_every: int
    # how it was resolved
    fitting_rate: float
    fitting_temperature: float
    to_measure: frozenset[str]
    reasons: dict[str, str]

    @property
    def num_views(self) -> int:
        """Views of an image, global and local."""
        return self.global_views + self.local_views

    @property
    def num_heads(self) -> int:
        """All heads: one a block of `head_blocks`, and one a nested width."""
        return len(self.head_blocks) + len(self.nested_widths)

    @property
    def lora_rank(self) -> int:
        """Of the adapters that are trained in place of the encoder's weights; 0 for none."""
        return _part(self.trainable).number if self.trainable.startswith("lora") else 0

    @property
    def process_batch(self) -> int:
        """Images of one process per update."""
        return self.batch_size // self.processes

    @property
    def warmups(self) -> Steps:
        """Updates of each stage in which its learning rate warms up."""
        return Steps(
            self._warmup(self.steps.warmup, self.head_epochs),
            self._warmup(self.steps.refine, self.epochs),
        )

    def _warmup(self, updates: int, epochs: float) -> int:
        """Of a stage of so many updates and epochs; at least one update is none of it."""
        if updates == 0:
            return 0
        if self.warmup_share is not None:
            return int(self.warmup_share * updates)
        assert self.warmup_epochs is not None
        return min(round(updates * self.warmup_epochs / epochs), updates - 1)

    def measured(self, name: str, choice: Choice[Any]) -> "ResolvedRecipe":
        """With what the run has measured in the place of an estimate."""
        return dataclasses.replace(
            self,
            **{name: choice.value},
            to_measure=self.to_measure - {name},
            reasons={**self.reasons, name: choice.reason},
        )

    def as_written(self) -> dict[str, Any]:
        """As JSON under RefineRecipe's names; `RefineRecipe(**it)` asks for the same again.

        What is still to be measured is "auto". The number of workers stays as it was asked for:
        it belongs to the machine.
        """
        own = dataclasses.asdict(self)
        written = own.pop("asked")
        for name in written.keys() & own.keys() - {"num_workers"}:
            written[name] = own[name]
        for name in self.to_measure:
            written[name] = "auto"
        # `head_blocks` says it
        written["num_heads"] = None
        values: dict[str, Any] = json.loads(json.dumps(written))
        return values


def resolve(
    recipe: RefineRecipe,
    config: MimRefinerConfig,
    num_images: int | None,
    processes: int = 1,
    bf16: bool = False,
    gpu: bool = False,
    about_neighbours: Sequence[str] = (),
) -> ResolvedRecipe:
    """The recipe with all that it leaves open filled in, checked against encoder, data, processes.

    Args:
        config: of the encoder that is refined.
        num_images: training images; None for a stream.
        processes: how many share a batch.
        bf16: whether the device computes in bfloat16, see `runtime.device.uses_bf16`.
        gpu: whether it is a GPU.
        about_neighbours: settings of metadata that need neighbours to be looked up.

    Raises:
        ValueError: naming flag, value and what is allowed.
    """
    asked = recipe
    situation = Situation(config, num_images, processes, gpu, about_neighbours)
    fitted = fit(recipe, situation)
    recipe = _with_frozen_blocks(fitted.recipe, config)
    open_again = dataclasses.replace(recipe, learning_rate=None, temperature=None)
    unstated = fit(open_again, situation).recipe
    assert recipe.pooling is not None and recipe.global_scale is not None
    assert recipe.global_size is not None and recipe.local_size is not None

    check_pooling(recipe.pooling, config)
    check_view_sizes(ViewSizes(recipe.global_size, recipe.local_size), config.patch_size)
    _check_batch(recipe, num_images, processes)
    blocks = choose_blocks_with_heads(recipe, config.num_hidden_layers, recipe.pooling)
    steps = choose_steps(recipe, num_images)

    # what is not named is measured
    to_measure = set()
    micro: int | None = None
    if isinstance(recipe.micro_batch_size, int):
        micro = recipe.micro_batch_size
    else:
        to_measure.add("micro_batch_size")
    if recipe.head_blocks == "auto":
        to_measure.add("head_blocks")

    reasons = {
        **fitted.reasons,
        "head_blocks": blocks.reason,
        "steps": steps.reason,
    }
    resolved: dict[str, Any] = {
        "asked": asked,
        "num_images": num_images,
        "processes": processes,
        "fitting_rate": unstated.learning_rate,
        "fitting_temperature": unstated.temperature,
        "bf16": bf16,
        "head_blocks": blocks.value,
        "nested_widths": choose_nested_widths(recipe, config, blocks.value),
        "global_scale": tuple(recipe.global_scale),
        "local_scale": tuple(recipe.local_scale),
        "micro_batch_size": micro,
        "steps": steps.value,
        "to_measure": frozenset(to_measure),
        "reasons": {name: reason for name, reason in reasons.items() if reason},
    }

    # everything else is what the recipe says, by now
    names = {field.name for field in dataclasses.fields(ResolvedRecipe)}
    said = {name: getattr(recipe, name) for name in names - resolved.keys()}
    return ResolvedRecipe(**resolved, **said)


# ---- one setting, or one group of them, each


def check_pooling(pooling: Pooling, config: MimRefinerConfig) -> None:
    """Whether the encoder has what the heads are to read."""
    missing = config.missing_for(pooling)
    if missing:
        raise ValueError(f"{setting('pooling', pooling)}: the encoder has {missing}; use mean")


def check_view_sizes(sizes: ViewSizes, patch: int) -> None:
    """Whether views are whole patches, and not larger than any image is read."""
    for name, size in sizes._asdict().items():
        if size > LARGEST_SIDE:
            raise ValueError(
                f"{setting(name, size)}: must be at most {LARGEST_SIDE // patch * patch}, a "
                f"multiple of the patch size {patch}"
            )
        if size % patch:
            near = max(patch, round(size / patch) * patch)
            raise ValueError(
                f"{setting(name, size)}: must be a multiple of the patch size {patch}, "
                f"for example {near}"
            )


def count_steps(recipe: RefineRecipe, num_images: int | None) -> Steps:
    """Updates per stage: whole batches per epoch times epochs, at most `max_steps`.

    The recipe names epochs and batch.
    """
    if num_images is None:
        assert recipe.max_steps is not None
        warmup = refine = recipe.max_steps
    else:
        assert recipe.batch_size and recipe.epochs and recipe.head_epochs is not None
        per_epoch = num_images // recipe.batch_size
        warmup = round(recipe.head_epochs * per_epoch)
        refine = round(recipe.epochs * per_epoch)
    if recipe.max_steps is not None:
        warmup = min(warmup, recipe.max_steps)
        refine = min(refine, recipe.max_steps)

    # heads that come along from another run are warm; none are warmed up where that is asked for
    if recipe.init_from is not None or recipe.head_epochs == 0:
        warmup = 0
    return Steps(warmup, refine)


def choose_steps(recipe: RefineRecipe, num_images: int | None) -> Choice[Steps]:
    """Updates per stage, and of what they are made."""
    steps = count_steps(recipe, num_images)
    if num_images is None:
        return Choice(steps, f"a stream has no length, so {setting('max_steps')} in each stage")
    assert recipe.batch_size is not None
    per_epoch = num_images // recipe.batch_size
    reason = f"{recipe.head_epochs:g} and {recipe.epochs:g} epochs of {per_epoch} whole batches"
    if recipe.max_steps is not None:
        reason += f", at most {setting('max_steps', recipe.max_steps)} in each stage"
    return Choice(steps, reason)


# ---- what cannot work


def _part(trainable: str) -> TrainedPart:
    part = trained_part(trainable)
    # or the recipe would have refused it
    assert part is not None
    return part


def _with_frozen_blocks(recipe: RefineRecipe, config: MimRefinerConfig) -> RefineRecipe:
    """The recipe whose `freeze_blocks` is what it and `trainable` say."""
    layers = config.num_hidden_layers
    frozen = recipe.freeze_blocks
    assert frozen is not None
    if frozen >= layers:
        raise ValueError(
            f"{setting('freeze_blocks', frozen)}: the encoder has {layers} blocks, "
            "at least one must be trained"
        )
    part = _part(recipe.trainable)
    named = setting("trainable", recipe.trainable)
    if part.kind == "lora":
        check_rank(part.number, config, frozen)
    if part.kind != "last":
        return recipe

    if part.number > layers:
        raise ValueError(f"{named}: the encoder has only {layers} blocks; use at most that many")
    # a run says both of itself when it goes on
    if frozen not in (0, layers - part.number):
        raise ValueError(
            f"{setting('freeze_blocks', frozen)} and {named} exclude each other: give one of them"
        )
    return dataclasses.replace(recipe, freeze_blocks=layers - part.number)


def _check_batch(recipe: RefineRecipe, num_images: int | None, processes: int) -> None:
    """Whether a batch can be filled by the data and divided among the processes."""
    batch = recipe.batch_size
    assert batch is not None
    named = setting("batch_size", batch)
    if num_images is not None and batch > num_images:
        others = recipe.eval_dataset is not None or recipe.eval_split is not None
        if not recipe.eval_fraction or others:
            raise ValueError(f"{named}: the data set has only {num_images} training images")
        raise ValueError(
            f"{named}: only {num_images} images are left to train on, for "
            f"{setting('eval_fraction', recipe.eval_fraction)} holds back the others; lower one "
            "of them"
        )

    if batch % processes:
        raise ValueError(f"{named}: must be a multiple of the {processes} processes")
    micro = recipe.micro_batch_size
    if isinstance(micro, int) and micro > batch // processes:
        raise ValueError(
            f"{setting('micro_batch_size', micro)}: more than the {batch // processes} images "
            "of one process"
        )
