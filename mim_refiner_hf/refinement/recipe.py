"""The recipe: every setting of a refinement, typed, documented in place, validated before any work.

    recipe = RefineRecipe(model="facebook/vit-mae-large", dataset="my_images/", output_dir="out")
    resolved = resolve(recipe, encoder.config, num_images=1281167)

The same names in YAML, Python and on the command line (`recipe_files.py`). A field of `FITTED` that
is left open, or is "auto", is fitted to the images, the encoder and the machine by `resolve`
(`auto.py` has the rules), which also holds every check that needs these. The paper's numbers are
the recipe `paper`, on which its own recipes are based.
"""

from collections.abc import Iterator
from dataclasses import InitVar, dataclass
from typing import Annotated, Literal

from ..runtime.loggers import logger_names
from ..runtime.settings import (
    Allowed,
    NonNegativeInt,
    PositiveInt,
    check_fields,
    documented,
)
from ..runtime.versions import FORMAT_VERSIONS, check_format
from ..runtime.wording import setting
from .recipe_data import DataFields, names_in
from .recipe_method import MethodFields

START_FIELDS = ("model", "pretrain", "init_from")
"""Where the starting weights are from: exactly one of them is given."""

FITTED = (
    "eval_fraction",
    "pooling",
    "projector_dim",
    "predictor_dim",
    "embedding_dim",
    "queue_size",
    "temperature",
    "head_temperature",
    "topk",
    "swap",
    "global_views",
    "local_views",
    "global_size",
    "local_size",
    "global_scale",
    "epochs",
    "head_epochs",
    "warmup_epochs",
    "batch_size",
    "learning_rate",
    "head_learning_rate",
    "refine_head_learning_rate",
    "freeze_blocks",
    "layer_decay",
    "ema_decay",
    "num_workers",
    "save_every",
)
"""Fields that may be left open: None and "auto" mean the same. So may `head_blocks` and
`micro_batch_size`, where "auto" means to measure."""


def _is_repository_name(name: str) -> bool:
    return len([part for part in name.split("/") if part]) == 2


RepositoryName = Annotated[str, Allowed("user/name", _is_repository_name)]


@dataclass
class RefineRecipe(MethodFields, DataFields):
    """All settings of a refinement; the help texts are the documentation.

    Those of the data stand in `recipe_data.py`, those of the method in `recipe_method.py`.

    Raises:
        ValueError: at construction, in one line: which setting, which value, what is allowed.
    """

    # ---- efficiency
    micro_batch_size: PositiveInt | Literal["auto"] | None = documented(
        None,
        "Images of one process per pass through the encoder; exact, whatever the value, which need "
        "not divide the batch. Auto: as many as fit into memory.",
    )
    mixed_precision: Literal["auto", "no", "bf16"] = documented(
        "auto", "bf16 autocast on fp32 weights; auto: on a GPU or CPU that computes it."
    )
    gradient_checkpointing: bool = documented(
        False, "Recompute each block in the backward pass: less memory, about 1.3x the time."
    )
    compile: bool = documented(
        False, "torch.compile every block; needs a GPU, Triton and a C compiler."
    )
    num_workers: NonNegativeInt | None = documented(
        None, "Data-loading workers per process. Auto: one per core and process, at most 16."
    )
    # ---- evaluation
    eval_every: NonNegativeInt = documented(
        0,
        "Evaluate the moving average every so many epochs of refinement; 0: only before and after.",
    )
    # ---- output
    output_dir: str = documented(
        "outputs/refined",
        "Folder of the result: model/, metrics.json, clusters.png, curves.png, log.jsonl.",
    )
    save_every: NonNegativeInt | None = documented(
        None, "Steps between checkpoints; 0 for none. Auto: a tenth of all steps, at most 500."
    )
    save_total_limit: PositiveInt = documented(2, "Checkpoints kept.")
    report_to: str = documented(
        "tensorboard",
        "Loggers beside log.jsonl: tensorboard, wandb, trackio, comma-separated, or none.",
    )
    log_every: PositiveInt = documented(10, "Steps between lines in the log.")
    save_as: Literal["native", "timm", "vit", "onnx"] | None = documented(
        None, "Write what ships in this format of `export` too, beside model/."
    )
    push_to_hub: RepositoryName | None = documented(
        None, "Publish the result under this name, user/name."
    )
    license: str | None = documented(
        None,
        "Licence of the weights, where the start states none; the Hub's word: mit, unknown, ...",
    )
    fail_if_not_better: bool = documented(
        False,
        "Exit with 3 (in Python: NotBetterError) unless the result is judged better than the "
        "start; all is written before.",
    )
    dry_run: bool = documented(False, "Print the plan and stop.")

    format_version: InitVar[int] = FORMAT_VERSIONS["recipe"]

    def __post_init__(self, format_version: int) -> None:
        check_format("recipe", format_version, "the recipe")
        for name in FITTED:
            if getattr(self, name) == "auto":
                setattr(self, name, None)
        check_fields(self)
        for problem in _contradictions(self):
            raise ValueError(problem)
        logger_names(self.report_to)

    @property
    def loggers(self) -> list[str]:
        """The names in `report_to`."""
        return logger_names(self.report_to)


def _contradictions(recipe: RefineRecipe) -> Iterator[str]:
    """What is wrong between fields, one sentence each: setting, value, what is allowed."""
    yield from _wrong_starts(recipe)
    yield from _wrong_heads(recipe)
    yield from _wrong_schedule(recipe)
    yield from _wrong_fields(recipe)

    if recipe.global_views == 1 and recipe.local_views == 0:
        views = f"{setting('global_views', 1)} {setting('local_views', 0)}"
        yield f"{views}: at least two views are needed"


def _wrong_starts(recipe: RefineRecipe) -> Iterator[str]:
    starts = {name: getattr(recipe, name) for name in START_FIELDS}
    stated = [setting(name, value) for name, value in starts.items() if value is not None]
    if len(stated) > 1:
        yield f"{' and '.join(stated)} exclude each other: give one of them"
    if not stated:
        yield (
            f"{setting('model')} is missing: give a Hub name (facebook/vit-mae-large), a folder, "
            "or an original checkpoint file"
        )

    if recipe.init_from is None:
        return
    start = setting("init_from", recipe.init_from)
    if recipe.stage == "warmup":
        stage = setting("stage", "warmup")
        yield f"{start} and {stage} exclude each other: the heads come along warm"
    if recipe.head_blocks == "auto":
        yield (
            f"{start} and {setting('head_blocks', 'auto')} exclude each other: "
            "the heads come along with their blocks"
        )


def _wrong_fields(recipe: RefineRecipe) -> Iterator[str]:
    """What is wrong with the columns to forget and to keep."""
    named = []
    for name in ("forget", "keep"):
        if getattr(recipe, name) is not None:
            named.append(setting(name, getattr(recipe, name)))
    if recipe.metadata is not None and not named:
        yield (
            f"{setting('metadata', recipe.metadata)}: is read for {setting('forget')} and "
            f"{setting('keep')}; give one of them too"
        )
    if recipe.streaming and named:
        yield (
            f"{' and '.join(named)}: the columns of all images are read beforehand, which a stream "
            f"has not; leave {setting('streaming')} out"
        )
    if recipe.swap == "none" and recipe.keep is not None:
        yield (
            f"{setting('keep', recipe.keep)}: is about neighbours, and {setting('swap', 'none')} "
            "uses no neighbours; leave one of them out"
        )
    if recipe.keep is not None and recipe.keep.isdecimal():
        yield (
            f"{setting('keep', recipe.keep)}: names columns of metadata; how many checkpoints are "
            f"kept is {setting('save_total_limit')}"
        )
    both = set(names_in(recipe.forget)) & set(names_in(recipe.keep))
    if both:
        yield f"{' and '.join(named)} exclude each other: {min(both)} stands in both"


def _wrong_heads(recipe: RefineRecipe) -> Iterator[str]:
    blocks = recipe.head_blocks
    if blocks is not None and recipe.num_heads is not None:
        both = f"{setting('head_blocks', blocks)} and {setting('num_heads', recipe.num_heads)}"
        yield f"{both} exclude each other: give one of them"
    if isinstance(blocks, list) and (not blocks or sorted(set(blocks)) != blocks):
        yield f"{setting('head_blocks', blocks)}: must be different blocks in ascending order"

    # what one of them leaves open is checked when it is filled in
    if recipe.queue_size is not None:
        yield from _queue_problems(recipe, recipe.queue_size)


def _queue_problems(recipe: RefineRecipe, queue_size: int) -> Iterator[str]:
    """What is wrong between the queue, what fills it and what is drawn from it."""
    queue = setting("queue_size", queue_size)
    if recipe.topk is not None and recipe.topk > queue_size:
        yield f"{setting('topk', recipe.topk)}: must be at most {queue}"
    if recipe.batch_size is None:
        return
    batch = setting("batch_size", recipe.batch_size)
    if queue_size < recipe.batch_size:
        yield f"{queue}: must be at least {batch}, which is enqueued every step"
    elif recipe.target_momentum is not None and queue_size % recipe.batch_size:
        near = queue_size - queue_size % recipe.batch_size
        momentum = setting("target_momentum", recipe.target_momentum)
        yield f"{queue}: with {momentum} it must be a multiple of {batch}, for example {near}"


def _wrong_schedule(recipe: RefineRecipe) -> Iterator[str]:
    if recipe.streaming and recipe.max_steps is None:
        yield (
            f"{setting('streaming')}: a stream has no length; "
            f"say with {setting('max_steps')} how many updates each stage has"
        )

    if recipe.warmup_epochs is not None and recipe.warmup_share is not None:
        share = setting("warmup_share", recipe.warmup_share)
        both = f"{setting('warmup_epochs', recipe.warmup_epochs)} and {share}"
        yield f"{both} exclude each other: give one of them"
    if recipe.max_steps is None:
        yield from _warmup_problems(recipe.warmup_epochs, recipe.epochs, recipe.head_epochs)

    if recipe.stage == "warmup" and recipe.head_epochs == 0:
        yield (
            f"{setting('stage', 'warmup')} and {setting('head_epochs', 0)} exclude each other: "
            "there would be nothing to do"
        )
    if recipe.stage == "warmup" and recipe.save_every == 0:
        yield (
            f"{setting('stage', 'warmup')} {setting('save_every', 0)}: the warmed-up heads are "
            f"kept in a checkpoint; leave {setting('save_every')} out"
        )


def _warmup_problems(
    warmup_epochs: float | None, epochs: float | None, head_epochs: float | None
) -> Iterator[str]:
    """Which stage is over before its learning rate has warmed up."""
    if warmup_epochs is None:
        return
    for name, length in (("epochs", epochs), ("head_epochs", head_epochs)):
        # a head warm-up of no epochs is none
        if length and warmup_epochs >= length:
            warmup = setting("warmup_epochs", warmup_epochs)
            yield f"{warmup}: must be less than {setting(name, length)}"
