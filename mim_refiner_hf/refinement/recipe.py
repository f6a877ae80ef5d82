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

from ..data.broken import MAX_BAD_FRACTION
from ..model.configuration_mim_refiner import Pooling
from ..runtime.settings import (
    Allowed,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    check_fields,
    documented,
    minimum,
)
from ..runtime.versions import FORMAT_VERSIONS, check_format
from ..runtime.wording import setting
from .loss import LossSchedule, Swap

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
    "layer_decay",
    "ema_decay",
    "num_workers",
    "save_every",
)
"""Fields that may be left open: None and "auto" mean the same. So may `head_blocks` and
`micro_batch_size`, where "auto" means to measure."""


def _is_area_range(scale: list[float]) -> bool:
    return len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1


def _is_repository_name(name: str) -> bool:
    return len([part for part in name.split("/") if part]) == 2


# their order is checked among the other contradictions
BlockNumbers = Annotated[list[int], Allowed("numbers of blocks", lambda blocks: True)]
AreaRange = Annotated[list[float], Allowed("two numbers, 0 < low <= high <= 1", _is_area_range)]
ChannelCount = Annotated[int, Allowed("1 to 16", lambda count: 1 <= count <= 16)]
ValueRange = Annotated[
    list[float],
    Allowed("two numbers, low < high", lambda ends: len(ends) == 2 and ends[0] < ends[1]),
]
RepositoryName = Annotated[str, Allowed("user/name", _is_repository_name)]


@dataclass
class RefineRecipe:
    """All settings of a refinement; the help texts are the documentation.

    Raises:
        ValueError: at construction, in one line: which setting, which value, what is allowed.
    """

    recipe: str | None = documented(
        None, "Name in training/recipes/ or path of a YAML file whose fields become the defaults."
    )
    # ---- data
    dataset: str = documented(
        "digits",
        "Image folder (nested, labelled or not), parquet file or folder, Hub name, or 'digits'.",
    )
    dataset_config: str | None = documented(None, "Configuration of a Hub data set.")
    split: str | None = documented(None, "Split to train on; None: 'train', or the whole folder.")
    image_column: str | None = documented(None, "Column of a table that holds the images.")
    label_column: str | None = documented(None, "Column of a table that holds the labels.")
    follow_links: bool = documented(False, "Enter links to folders, wherever they lead.")
    streaming: bool = documented(False, "Read the data as a stream (needs max_steps), in passing.")
    eval_dataset: str | None = documented(
        None,
        "Images to evaluate on, before and after. None: eval_split of dataset, or a held-out part.",
    )
    eval_split: str | None = documented(
        None, "Split of eval_dataset (or of dataset, if that is None) to evaluate on."
    )
    eval_fraction: ShareBelowOne | None = documented(
        None,
        "Share of the images held out for evaluation when neither is given; 0 for none. Auto: 0.1, "
        "but at most 1000 images, and none of fewer than 200.",
    )
    num_channels: ChannelCount | None = documented(
        None,
        "Channels of the images, 1 to 16. None: the encoder's, or, where the images are arrays, "
        ".npy files or TIFFs of another number than 3 and 1, theirs.",
    )
    value_range: ValueRange | None = documented(
        None,
        "Two values that become black and white, where there are other numbers of channels than 3 "
        "and 1. None: 0 255 for 8 bits, 0 1 for floats that lie there, else measured.",
    )
    max_bad_fraction: Share = documented(
        MAX_BAD_FRACTION,
        "Stop when more than this share of the images is broken; up to it they are replaced, "
        "counted, and listed in broken.json.",
    )
    # ---- model
    model: str | None = documented(
        None, "Starting weights: Hub name, folder, or an original .pth/.pt/.th file."
    )
    family: str | None = documented(
        None, "Family of an original file, when detection should be overruled."
    )
    pretrain: str | None = documented(
        None,
        "Pre-train the starting weights first, by this pre-training recipe, on the same images.",
    )
    init_from: str | None = documented(
        None,
        "Start a new run from the weights of another one: its checkpoint or output folder. Encoder "
        "average, heads and queues come along; steps, optimiser and schedule start anew, without "
        "head warm-up. To go on with a run, give its own command again.",
    )
    pooling: Pooling | None = documented(
        None,
        "What the heads read: cls, mean (of the patches), register (the first), prefix (mean of "
        "CLS and registers), attention (SigLIP, AIMv2) or global_repr (CAPI's predictor), both for "
        "the head on the output; heads on earlier blocks read the mean. Auto: the model's.",
    )
    # ---- heads
    head_blocks: BlockNumbers | Literal["auto"] | None = documented(
        None,
        "0-based blocks with a head, the last block meaning the encoder's output; or auto: chosen "
        "by measuring the features of all blocks on at most 2000 training images (k-NN accuracy; "
        "without labels, neighbour agreement). None: the last third.",
    )
    num_heads: PositiveInt | None = documented(
        None, "Heads on the last so many blocks, instead of head_blocks."
    )
    projector_dim: PositiveInt | None = documented(
        None, "Hidden width of the projectors. Auto: 4 times the encoder's, 768 to 2048."
    )
    predictor_dim: PositiveInt | None = documented(
        None, "Hidden width of the predictors. Auto: 5.33 times the encoder's, 1024 to 4096."
    )
    embedding_dim: PositiveInt | None = documented(
        None, "Width of projections and predictions. Auto: 128 below width 384, else 256."
    )
    queue_size: PositiveInt | None = documented(
        None,
        "Rows of the nearest-neighbour queue of each head; at least batch_size. Auto: a power of "
        "two, at most half the images and 65536.",
    )
    # ---- objective
    temperature: PositiveFloat | None = documented(
        None,
        "Temperature of the loss. Auto: 0.2 up to width 1024 (L), 0.3 up to 1280 (H), else 0.35 "
        "(2B).",
    )
    topk: PositiveInt | None = documented(
        None,
        "Neighbours to draw from in the refinement; the head warm-up takes the nearest. Auto: a "
        "hundredth of the queue, 1 to 20.",
    )
    swap: Swap | None = documented(
        None,
        "Where the neighbour replaces the target: positive (NNA), all (NNCLR), none (InfoNCE). "
        "Auto: none below 20000 images, whose neighbours are too far, else positive.",
    )
    loss_schedule: LossSchedule = documented(
        "constant", "Loss weights of the earlier heads over the refinement (paper, Fig. 7)."
    )
    freeze_blocks: NonNegativeInt = documented(
        0, "Keep the embeddings and the first so many blocks as they are."
    )
    # ---- views
    global_views: PositiveInt | None = documented(None, "Global views per image. Auto: 2.")
    local_views: NonNegativeInt | None = documented(
        None, "Local views per image. Auto: 10 from 20000 images on and on a GPU, else none."
    )
    global_size: PositiveInt | None = documented(
        None,
        "Side of a global view in pixels. Auto: 3/4 of the encoder's native size, in whole "
        "patches; the native size where there are local views.",
    )
    local_size: PositiveInt | None = documented(
        None,
        "Side of a local view. Auto: 3/7 of the native size, in whole patches (96 or 98 for 224).",
    )
    global_scale: AreaRange | None = documented(
        None,
        "Range of the area that a global view covers. Auto: 0.25 1 with local views, else 0.3 1.",
    )
    local_scale: AreaRange = documented([0.05, 0.25], "Range of the area that a local view covers.")
    colour: bool = documented(
        True,
        "Colour jitter, blur, greyscale and solarise; without them: crop and flip only (paper, "
        "Table 7).",
    )
    views: Literal["exact", "fast"] = documented(
        "exact",
        "How views are made: exact, by Pillow, the authors' code bit for bit; or fast, the same "
        "random choices on tensors (on a GPU colour is done there), a grey level or so apart.",
    )
    flip: Share = documented(
        0.5,
        "Probability of a horizontal flip; 0 for text, digits and other images with a handedness.",
    )
    # ---- schedule
    stage: Literal["both", "warmup", "refine"] = documented(
        "both", "Head warm-up, refinement, or one after the other."
    )
    epochs: PositiveFloat | None = documented(
        None,
        "Epochs of refinement. Auto: 30, but at least 300 updates, and without a GPU at most 600.",
    )
    head_epochs: PositiveFloat | None = documented(
        None,
        "Epochs of head warm-up on the frozen encoder. Auto: a fifth of the refinement's updates, "
        "at least 40.",
    )
    warmup_epochs: NonNegativeFloat | None = documented(
        None,
        "Epochs of linear learning-rate warm-up in each stage. Auto: a tenth of the refinement, "
        "at most a fifth of the head warm-up and 4 epochs.",
    )
    max_steps: PositiveInt | None = documented(None, "Updates per stage at most.")
    batch_size: Annotated[int, minimum(2)] | None = documented(
        None,
        "Images per update, all processes together. Auto: about 4 times the root of the number of "
        "images, a power of two, 32 to 1024, without a GPU at most 64; never more than half of "
        "them.",
    )
    learning_rate: PositiveFloat | None = documented(
        None,
        "Base learning rate of the refinement, encoder and heads; times batch_size / 256. Auto: "
        "the peak is 0.001 at width 192 and batch 64, less for wider encoders, more for batches.",
    )
    head_learning_rate: PositiveFloat | None = documented(
        None,
        "Base learning rate of the head warm-up; times batch_size / 256. Auto: the refinement's.",
    )
    layer_decay: ShareAboveZero | None = documented(
        None,
        "Layer-wise learning-rate decay of the encoder. Auto: 0.85 up to 12 blocks, falling to "
        "0.65 at 24.",
    )
    weight_decay: NonNegativeFloat = documented(0.05, "Weight decay of the encoder.")
    head_weight_decay: NonNegativeFloat = documented(1e-5, "Weight decay of the heads.")
    ema_decay: ShareBelowOne | None = documented(
        None,
        "Decay of the moving average of the encoder, which is what ships. Auto: it reaches a tenth "
        "of the updates back, at most 0.9999.",
    )
    seed: NonNegativeInt = documented(
        0, "Data order, views, neighbour draws and head weights are pure functions of it."
    )
    # ---- efficiency
    micro_batch_size: PositiveInt | Literal["auto"] | None = documented(
        None,
        "Images of one process per pass through the encoder; exact, whatever the value, which need "
        "not divide the batch. Auto: as many as fit into memory.",
    )
    mixed_precision: Literal["auto", "no", "bf16"] = documented(
        "auto", "bf16 autocast on fp32 weights; auto: on a GPU that has it."
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
    keep: PositiveInt = documented(2, "Checkpoints kept.")
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

    @property
    def loggers(self) -> list[str]:
        """The names in `report_to`."""
        names = map(str.strip, self.report_to.split(","))
        return [name for name in names if name not in ("", "none")]


def _contradictions(recipe: RefineRecipe) -> Iterator[str]:
    """What is wrong between fields, one sentence each: setting, value, what is allowed."""
    yield from _wrong_starts(recipe)
    yield from _wrong_heads(recipe)
    yield from _wrong_schedule(recipe)

    if recipe.global_views == 1 and recipe.local_views == 0:
        views = f"{setting('global_views', 1)} {setting('local_views', 0)}"
        yield f"{views}: at least two views are needed"
    if set(recipe.loggers) - {"tensorboard", "wandb", "trackio"}:
        allowed = "allowed are tensorboard, wandb, trackio (comma-separated), or none"
        yield f"{setting('report_to', recipe.report_to)}: {allowed}"


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


def _wrong_heads(recipe: RefineRecipe) -> Iterator[str]:
    blocks = recipe.head_blocks
    if blocks is not None and recipe.num_heads is not None:
        both = f"{setting('head_blocks', blocks)} and {setting('num_heads', recipe.num_heads)}"
        yield f"{both} exclude each other: give one of them"
    if isinstance(blocks, list) and (not blocks or sorted(set(blocks)) != blocks):
        yield f"{setting('head_blocks', blocks)}: must be different blocks in ascending order"

    # what one of them leaves open is checked when it is filled in
    yield from queue_problems(recipe.queue_size, recipe.batch_size, recipe.topk)


def queue_problems(
    queue_size: int | None, batch_size: int | None, topk: int | None
) -> Iterator[str]:
    """What is wrong between the queue, what fills it and what is drawn from it."""
    if queue_size is None:
        return
    queue = setting("queue_size", queue_size)
    if batch_size is not None and queue_size < batch_size:
        batch = setting("batch_size", batch_size)
        yield f"{queue}: must be at least {batch}, which is enqueued every step"
    if topk is not None and topk > queue_size:
        yield f"{setting('topk', topk)}: must be at most {queue}"


def _wrong_schedule(recipe: RefineRecipe) -> Iterator[str]:
    if recipe.streaming and recipe.max_steps is None:
        yield (
            f"{setting('streaming')}: a stream has no length; "
            f"say with {setting('max_steps')} how many updates each stage has"
        )
    if recipe.max_steps is None:
        yield from warmup_problems(recipe.warmup_epochs, recipe.epochs, recipe.head_epochs)
    if recipe.stage == "warmup" and recipe.save_every == 0:
        yield (
            f"{setting('stage', 'warmup')} {setting('save_every', 0)}: the warmed-up heads are "
            f"kept in a checkpoint; leave {setting('save_every')} out"
        )


def warmup_problems(
    warmup_epochs: float | None, epochs: float | None, head_epochs: float | None
) -> Iterator[str]:
    """Which stage is over before its learning rate has warmed up."""
    if warmup_epochs is None:
        return
    for name, length in (("epochs", epochs), ("head_epochs", head_epochs)):
        if length is not None and warmup_epochs >= length:
            warmup = setting("warmup_epochs", warmup_epochs)
            yield f"{warmup}: must be less than {setting(name, length)}"


__all__ = ["FITTED", "START_FIELDS", "RefineRecipe", "queue_problems", "warmup_problems"]
