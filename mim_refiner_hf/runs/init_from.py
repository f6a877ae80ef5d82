"""`--init_from`: a new run from another run's weights: its encoder's average, heads and queues.

    accelerate launch training/refine.py --stage warmup --model facebook/vit-mae-large \\
        --dataset my_images/ --output_dir warm
    accelerate launch training/refine.py --init_from warm --dataset my_images/ \\
        --learning_rate 2e-4 --output_dir slow
    accelerate launch training/refine.py --init_from warm --dataset my_images/ \\
        --temperature 0.3 --output_dir softer

It takes a checkpoint folder, or an output folder, of which the newest intact checkpoint is meant.
Steps, optimiser, schedule and random numbers start anew, so it is not a continuation: that is what
the same command does in the same output folder. There is no second head warm-up: it is there "to
ensure a good learning signal from the start of the refinement" (paper, at Table 10), which heads
that come along give; they come with their queues, as from the warm-up into the refinement. Target
projectors (`target_momentum`) begin as the projectors, as they do after a warm-up. The new run
keeps what it needs of the other one in its own checkpoints, so it goes on also when the other one
is gone.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from ..conversion.licence import Licence
from ..conversion.load import LoadReport
from ..conversion.preprocessing import image_processor
from ..data.images import ImageDataset
from ..data.stream import ImageStream
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..refinement.adapters import adapt, check_rank, merged_encoder
from ..refinement.heads import IdHeads
from ..refinement.queue import NearestNeighbourQueue
from ..refinement.recipe import RefineRecipe
from ..refinement.recipe_method import trained_part
from ..refinement.resolve import ResolvedRecipe
from ..runtime.checkpoint import (
    Checkpoint,
    check_tensors,
    is_checkpoint,
    load_latest,
    place_tensors,
    read_checkpoint,
)
from ..runtime.files import CheckpointError
from ..runtime.wording import setting, written

# Names of tensors that a new run takes, and of those that it leaves, with what they are.
_PLACED = ("average.", "refiner.heads.", "refiner.queue.")
_DROPPED = {
    "refiner.encoder.": "the encoder beside its average",
    "refiner.target_projector.": "target projectors",
    "optimizer.": "optimiser",
}

# What a checkpoint has to say for a run to start from it, see `start_state`.
_NEEDED_STATE = ("recipe", "encoder", "preprocessing", "data", "warmup_steps")

# What decides which tensors heads and queues have, and what the heads read.
_HEAD_FIELDS = (
    "head_blocks",
    "matryoshka",
    "pooling",
    "projector_dim",
    "predictor_dim",
    "embedding_dim",
    "queue_size",
    "activation",
    "predictor_norm",
)


class StartState(TypedDict):
    """What a checkpoint says, as JSON, for those who start from it.

    Attributes:
        encoder: its configuration.
        preprocessing: its image processor.
        data: tells the data set that sample indices are places of; None for a stream.
        warmup_steps: from which step on the heads are warm.
        licence: of the weights.
    """

    encoder: dict[str, Any]
    preprocessing: dict[str, Any]
    data: str | None
    warmup_steps: int
    licence: dict[str, str]


def start_state(
    encoder: MimRefinerModel,
    processor: Any,
    images: ImageDataset | ImageStream,
    warmup: int,
    licence: Licence,
) -> StartState:
    """What a checkpoint of this run says; `images` are trained on."""
    return {
        "encoder": encoder.config.to_dict(),
        "preprocessing": processor.to_dict(),
        "data": data_digest(images),
        "warmup_steps": warmup,
        "licence": licence.metadata(),
    }


def data_digest(images: ImageDataset | ImageStream) -> str | None:
    """Tells the data set that sample indices are places of; None for a stream."""
    return images.found.entries.digest if isinstance(images, ImageDataset) else None


def open_start(init_from: str) -> Checkpoint:
    """The checkpoint that `--init_from` names.

    Args:
        init_from: a checkpoint folder, or an output folder, of which it is the newest intact one.

    Raises:
        FileNotFoundError: when there is no such folder, or no checkpoint in it.
        ValueError: when it is a model, when its heads are still in their warm-up, or when it
            cannot be read (CheckpointError).
    """
    path = Path(init_from).expanduser()
    named = setting("init_from", path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{named}: no such folder; give a run's output folder, or for a model use "
            f"{setting('model')}"
        )
    if (path / "config.json").is_file():
        raise ValueError(
            f"{named}: is a model, which has no heads and no queues to start from; "
            f"use {setting('model', path)}"
        )
    start = _checkpoint_in(path)

    missing = [key for key in _NEEDED_STATE if key not in start.state]
    if missing:
        raise CheckpointError(
            f"{named}: {start.path.name} is of an earlier version and lacks {', '.join(missing)}; "
            "go on with that run until it writes its next checkpoint"
        )
    warm = start.state["warmup_steps"]
    if start.step < warm:
        raise ValueError(
            f"{named}: its heads are at step {start.step} of {warm} of their warm-up; "
            "go on with that run until they are warm"
        )
    return start


def _checkpoint_in(path: Path) -> Checkpoint:
    """The checkpoint that a folder is, or the newest intact one that it holds."""
    if is_checkpoint(path):
        return read_checkpoint(path)
    newest = load_latest(path / "checkpoints") or load_latest(path)
    if newest is not None:
        return newest
    hint = "give a run's output folder"
    if (path / "model" / "config.json").is_file():
        hint = f"a finished run keeps its model alone: use {setting('model', path / 'model')}"
    raise FileNotFoundError(f"{setting('init_from', path)}: holds no checkpoint; {hint}")


def encoder_of(start: Checkpoint) -> MimRefinerModel:
    """The average of the checkpoint's encoder, with what `load_encoder` gives an encoder:
    `load_report`, `image_processor` and `licence`.

    Raises:
        CheckpointError: when a tensor is neither placed nor dropped on purpose, or does not fit.
    """
    where = f"{setting('init_from')}: {start.where}"
    placed = [name for name in start.tensors if name.startswith(_PLACED)]
    dropped: dict[str, list[str]] = {}
    for name in start.tensors.keys() - set(placed):
        prefix = next((prefix for prefix in _DROPPED if name.startswith(prefix)), None)
        if prefix is None:
            raise CheckpointError(
                f"{where}: {name} has no place in a run of this version; "
                f"start from a model with {setting('model')}"
            )
        dropped.setdefault(_DROPPED[prefix], []).append(name)

    encoder = MimRefinerModel(MimRefinerConfig.from_dict(start.state["encoder"]))
    begun = start.state["recipe"]
    part = trained_part(begun.get("trainable", "all"))
    if part is not None and part.kind == "lora":
        check_rank(part.number, encoder.config, begun["freeze_blocks"])
        adapt(encoder, part.number, begun["freeze_blocks"], seed=0)
    average = {}
    for name in placed:
        if name.startswith("average."):
            average[name.removeprefix("average.")] = start.tensors[name]
    try:
        encoder.load_state_dict(average)
    except RuntimeError as error:
        # it lists every name
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{where}: its average is not of its encoder ({reason})") from error

    encoder = merged_encoder(encoder)
    source = f"step {start.step} of {start.path.parent}"
    report = LoadReport(source, len(placed), len(placed), dropped, setting("init_from"))
    processor = image_processor(encoder.config, start.state["preprocessing"])
    # earlier versions did not write it
    licence = Licence.from_metadata(start.state.get("licence") or {}, where=start.path)
    vars(encoder).update(load_report=report, image_processor=processor, licence=licence)
    return encoder.eval()


def with_its_blocks(recipe: RefineRecipe, start: Checkpoint) -> RefineRecipe:
    """The recipe with the checkpoint's head blocks where it names none."""
    if recipe.head_blocks is not None or recipe.num_heads is not None:
        return recipe
    return dataclasses.replace(recipe, head_blocks=start.state["recipe"]["head_blocks"])


def check_heads_fit(recipe: ResolvedRecipe, start: Checkpoint) -> None:
    """Compare what the recipe says of heads and queues with those that come along.

    Raises:
        ValueError: naming every field that differs, with both values.
    """
    differing = []
    # a version that did not know a field did what leaving it out does
    old = {field.name: field.default for field in dataclasses.fields(RefineRecipe)}
    old |= start.state["recipe"]
    for name in _HEAD_FIELDS:
        own = getattr(recipe, name)
        theirs = old[name]
        if own != theirs:
            differing.append(f"{setting(name, own)}, there {written(theirs)}")
    if differing:
        raise ValueError(
            f"{setting('init_from', recipe.asked.init_from)}: its heads and queues come along as "
            f"they are, and this recipe asks for others ({'; '.join(differing)}); say the same, "
            f"or start from a model with {setting('model')}"
        )


def place_heads(
    start: Checkpoint,
    expected: Mapping[str, Tensor],
    heads: IdHeads,
    queue: NearestNeighbourQueue,
    same_data: bool,
) -> None:
    """Put heads and queues of a checkpoint into those of a new run, all or nothing.

    Args:
        expected: every tensor that a checkpoint of the new run holds beside the optimiser's, to
            compare with.
        heads, queue: of the new run.
        same_data: whether it is the same data set; if not, rows of the queues no longer name
            images, so none is taken for one of ours.

    Raises:
        CheckpointError: naming file and tensor.
    """
    # of the encoder, which adapters change: `encoder_of` has placed it
    beside = ("optimizer.", "refiner.target_projector.", "refiner.encoder.", "average.")
    check_tensors(start, expected, beside)
    place_tensors(heads, start, "refiner.heads.")
    place_tensors(queue, start, "refiner.queue.")
    if not same_data:
        queue.sample_index.fill_(-1)
        queue.labels.fill_(-1)
