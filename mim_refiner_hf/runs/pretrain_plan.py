"""What a pre-training will do, said before it does it: method, data, batch, steps, memory, time.

    print(plan_of_pretraining(trainer, try_step(trainer), Path("out")))

Memory and time are measured on a few images, and are what a whole run takes only roughly.
"""

from pathlib import Path

import torch

from ..data.images import ImageDataset
from ..data.stream import ImageStream
from ..model.modeling_mim_refiner import MimRefinerModel
from ..pretraining.loop import Pretrainer
from ..pretraining.objective import Objective
from ..pretraining.trial import Trial
from ..refinement.memory import HEADROOM
from ..runtime.device import available_memory
from ..runtime.files import in_bytes
from ..runtime.pace import duration
from ..runtime.sharding import fsdp2_requested
from ..runtime.wording import millions, setting
from .plan import encoder_text


def plan_of_pretraining(trainer: Pretrainer, trial: Trial, output: Path) -> str:
    """The plan as lines for a terminal."""
    recipe = trainer.recipe
    options = trainer.options
    steps = trainer.steps
    objective = trainer.objective
    precision = "bf16" if objective.bf16 else "fp32"
    passes = ""
    if options.micro_batch_size is not None:
        passes = f", {options.micro_batch_size} at a time (exact)"

    trained = sum(part.numel() for part in objective.parameters() if part.requires_grad)
    kept = _kept(objective)
    held = sum(part.numel() for part in objective.state_dict().values())
    checkpoint = in_bytes(4 * held + 8 * trained)
    processes = trainer.accelerator.num_processes
    beside = "".join(f", {name}/" for name in objective.others())
    lines = [
        (
            "method",
            f"{recipe.objective}, {millions(trained)} trained parameters, of which "
            f"{millions(trained - kept)} are thrown away",
        ),
        ("encoder", encoder_text(objective.shipped_config())),
        ("data", images_text(trainer.images)),
        (
            "batch",
            f"{recipe.batch_size} images over {processes} process(es) on "
            f"{trainer.accelerator.device.type}, {precision}{passes}",
        ),
        ("steps", f"{steps.total}, {steps.warmup} of them warm-up, {steps.per_epoch} an epoch"),
    ]
    if fsdp2_requested():
        lines.append(("shards", _shards_text(processes)))
    lines += [
        ("memory", _memory_text(trainer, trial)),
        ("time", _time_text(trainer, trial)),
        (
            "disk",
            f"checkpoints of about {checkpoint}, {options.save_total_limit} kept until the end",
        ),
        ("result", f"{output}: the encoder{beside}, log.jsonl"),
    ]
    return "\n".join(["Plan", *(f"  {name:<7} {text}" for name, text in lines)])


def images_text(images: ImageDataset | ImageStream) -> str:
    """How many images of what, in words."""
    count = str(len(images)) if isinstance(images, ImageDataset) else "a stream"
    return f"{count} of {images.name}"


def _kept(objective: Objective) -> int:
    """How many of the trained parameters are the encoder's that ships."""
    with torch.device("meta"):
        shipped = MimRefinerModel(objective.shipped_config())
    names = dict(shipped.named_parameters()).keys()
    kept = 0
    for name, part in objective.encoder.named_parameters():
        if part.requires_grad and name in names:
            kept += part.numel()
    return kept


def _shards_text(processes: int) -> str:
    """What FSDP2 does to a pre-training."""
    if processes == 1:
        return "FSDP2 is on, but one process has nothing to share"
    return (
        f"FSDP2: each of {processes} processes keeps 1/{processes} of attention and MLP of every "
        "block, of their gradients and of AdamW's moments; embeddings, norms and heads are whole"
    )


def _memory_text(trainer: Pretrainer, trial: Trial) -> str:
    """What a step needs, what there is, and what to do where that is less."""
    processes = trainer.accelerator.num_processes
    available = available_memory(trainer.accelerator.device.type, processes)
    own = trainer.recipe.batch_size // processes
    at_once = min(trainer.options.micro_batch_size or own, own)
    need = trial.held + trial.graph * at_once
    text = (
        f"about {in_bytes(need)} per process of {in_bytes(available)} that are free: "
        f"{in_bytes(trial.held)} of weights and moments, {in_bytes(need - trial.held)} for "
        f"{at_once} images"
    )
    room = HEADROOM * available - trial.held
    if need - trial.held <= room:
        return text

    fitting = int(room // max(trial.graph, 1))
    if fitting < 1:
        return f"{text}; IT DOES NOT FIT: take a smaller encoder, or more processes with FSDP2"
    remedies = [setting("micro_batch_size", fitting)]
    if not trainer.options.gradient_checkpointing:
        remedies.append(setting("gradient_checkpointing", True))
    return f"{text}; IT DOES NOT FIT: {' or '.join(remedies)} gives the same gradients"


def _time_text(trainer: Pretrainer, trial: Trial) -> str:
    """How long the steps take, from a few images."""
    own = trainer.recipe.batch_size / trainer.accelerator.num_processes
    of_a_step = trial.seconds * own
    whole = duration(of_a_step * trainer.steps.total)
    return (
        f"about {whole}, {of_a_step:.2g} s a step, from {trial.images} images; many at a time can "
        "be faster"
    )
