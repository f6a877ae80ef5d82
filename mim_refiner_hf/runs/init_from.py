"""`--init_from`: a new run from another run's weights: the average of its encoder, its heads and their queues.

    accelerate launch training/refine.py --stage warmup --model facebook/vit-mae-large --dataset my_images/ --output_dir warm
    accelerate launch training/refine.py --init_from warm --dataset my_images/ --learning_rate 2e-4 --output_dir slow
    accelerate launch training/refine.py --init_from warm --dataset my_images/ --temperature 0.3 --output_dir softer

It takes a checkpoint folder, or an output folder, of which the newest intact checkpoint is meant. Steps, optimiser, schedule and
random numbers start anew, so it is not a continuation: that is what the same command does in the same output folder. There is no
second head warm-up: it is there "to ensure a good learning signal from the start of the refinement" (paper, at Table 10), which
heads that come along give; they come with their queues, as from the warm-up into the refinement. The new run keeps what it needs
of the other one in its own checkpoints, so it goes on also when the other one is gone.
"""

import dataclasses
from pathlib import Path
from typing import Any

from ..conversion.load import LoadReport, image_processor
from ..data.images import ImageDataset, ImageStream
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..refinement.recipe import RefineRecipe
from ..runtime.checkpoint import (
    Checkpoint,
    check_tensors,
    is_checkpoint,
    load_latest,
    read_checkpoint,
)
from ..runtime.files import CheckpointError
from ..runtime.sharding import shard_like

PLACED = ("average.", "refiner.heads.", "refiner.queue.")
DROPPED = {"refiner.encoder.": "the encoder beside its average", "optimizer.": "optimiser"}
HEAD_FIELDS = (
    "head_blocks",
    "pooling",
    "projector_dim",
    "predictor_dim",
    "embedding_dim",
    "queue_size",
)
"""What decides which tensors heads and queues have, and what the heads read."""


def start_state(
    encoder: MimRefinerModel, processor: Any, images: ImageDataset | ImageStream, warmup: int
) -> dict[str, Any]:
    """What a checkpoint says for those who start from it: its encoder, its data, and from which step on its heads are warm."""
    return {
        "encoder": encoder.config.to_dict(),
        "preprocessing": processor.to_dict(),
        "data": data_digest(images),
        "warmup_steps": warmup,
    }


def data_digest(images: ImageDataset | ImageStream) -> str | None:
    """Tells the data set that sample indices are places of; None for a stream."""
    return images.found.entries.digest if isinstance(images, ImageDataset) else None


def open_start(init_from: str) -> Checkpoint:
    """The checkpoint that `--init_from` names: a checkpoint folder, or the newest intact one of an output folder.

    Raises:
        FileNotFoundError: when there is no such folder, or no checkpoint in it.
        ValueError: when it is a model, when its heads are still in their warm-up, or when it cannot be read (CheckpointError).
    """
    path = Path(init_from).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"--init_from {path}: no such folder; give a run's output folder, or for a model use --model"
        )
    if (path / "config.json").is_file():
        raise ValueError(
            f"--init_from {path}: is a model, which has no heads and no queues to start from; use --model {path}"
        )
    if is_checkpoint(path):
        found: Checkpoint | None = read_checkpoint(path)
    else:
        found = load_latest(path / "checkpoints") or load_latest(path)
    if found is None:
        finished = (path / "model" / "config.json").is_file()
        hint = (
            f"a finished run keeps its model alone: use --model {path / 'model'}"
            if finished
            else "give a run's output folder"
        )
        raise FileNotFoundError(f"--init_from {path}: holds no checkpoint; {hint}")
    missing = [
        key
        for key in ("recipe", "encoder", "preprocessing", "data", "warmup_steps")
        if key not in found.state
    ]
    if missing:
        raise CheckpointError(
            f"--init_from {path}: {found.path.name} is of an earlier version and lacks {', '.join(missing)}; go on with that run "
            "until it writes its next checkpoint"
        )
    if found.step < found.state["warmup_steps"]:
        raise ValueError(
            f"--init_from {path}: its heads are at step {found.step} of {found.state['warmup_steps']} of their warm-up; go on with "
            "that run until they are warm"
        )
    return found


def encoder_of(start: Checkpoint) -> MimRefinerModel:
    """The average of the checkpoint's encoder as an encoder, with `load_report` and `image_processor` as from `load_encoder`.

    Raises:
        CheckpointError: when a tensor is neither placed nor dropped on purpose, or does not fit.
    """
    where = f"--init_from: {start.where}"
    dropped: dict[str, list[str]] = {reason: [] for reason in DROPPED.values()}
    placed = [name for name in start.tensors if name.startswith(PLACED)]
    for name in start.tensors.keys() - set(placed):
        reason = next(
            (reason for prefix, reason in DROPPED.items() if name.startswith(prefix)), None
        )
        if reason is None:
            raise CheckpointError(
                f"{where}: {name} has no place in a run of this version; start from a model with --model"
            )
        dropped[reason].append(name)
    encoder = MimRefinerModel(MimRefinerConfig.from_dict(start.state["encoder"]))
    average = {
        name.removeprefix("average."): start.tensors[name]
        for name in placed
        if name.startswith("average.")
    }
    try:
        encoder.load_state_dict(average)
    except RuntimeError as error:  # it lists every name
        raise CheckpointError(
            f"{where}: its average is not of its encoder ({' '.join(str(error).split())[:300]})"
        ) from error
    report = LoadReport(
        f"step {start.step} of {start.path.parent}",
        len(placed),
        len(placed),
        dropped,
        "--init_from",
    )
    vars(encoder).update(
        load_report=report,
        image_processor=image_processor(encoder.config, start.state["preprocessing"]),
    )
    return encoder.eval()


def with_its_blocks(recipe: RefineRecipe, start: Checkpoint) -> RefineRecipe:
    """The recipe with the checkpoint's head blocks where it names none."""
    if recipe.head_blocks is not None or recipe.num_heads is not None:
        return recipe
    return dataclasses.replace(recipe, head_blocks=start.state["recipe"]["head_blocks"])


def check_heads(recipe: RefineRecipe, start: Checkpoint) -> None:
    """Compare a resolved recipe with the heads and queues that come along.

    Raises:
        ValueError: naming every field that differs, with both values.
    """
    its = start.state["recipe"]
    differing = [name for name in HEAD_FIELDS if getattr(recipe, name) != its[name]]
    if differing:

        def shown(value: Any) -> str:
            return " ".join(map(str, value)) if isinstance(value, list) else str(value)

        listed = "; ".join(
            f"--{name} {shown(getattr(recipe, name))}, there {shown(its[name])}"
            for name in differing
        )
        raise ValueError(
            f"--init_from {recipe.init_from}: its heads and queues come along as they are, and this recipe asks for others ({listed}); "
            "say the same, or start from a model with --model"
        )


def place_heads(
    start: Checkpoint, expected: dict[str, Any], heads: Any, queue: Any, same_data: bool
) -> None:
    """Put heads and queues of a checkpoint into those of a new run, all or nothing.

    Args:
        expected: every tensor that a checkpoint of the new run holds beside the optimiser's, to compare with.
        heads, queue: `IdHeads` and `NearestNeighbourQueue` of the new run.
        same_data: whether it is the same data set; if not, rows of the queues no longer name images, so none is taken for one of ours.

    Raises:
        CheckpointError: naming file and tensor.
    """
    check_tensors(start, expected)
    for prefix, module in (("refiner.heads.", heads), ("refiner.queue.", queue)):
        own = module.state_dict()
        module.load_state_dict(
            {name: shard_like(start.tensors[prefix + name], own[name]) for name in own}
        )
    if not same_data:
        queue.sample_index.fill_(-1)
        queue.labels.fill_(-1)


__all__ = [
    "check_heads",
    "data_digest",
    "encoder_of",
    "open_start",
    "place_heads",
    "start_state",
    "with_its_blocks",
]
