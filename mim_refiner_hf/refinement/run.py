"""A run from recipe to evidence: check everything, say the plan, start weights, before, train, after, `metrics.json`.

    result = run(RefineRecipe(model="facebook/vit-mae-large", dataset="my_images/", output_dir="out"))
    result.encoder, result.metrics["after"]["knn_accuracy"]

All that can be wrong with recipe, data, weights or output folder is said before anything is trained. The output folder holds
`recipe.json` from the start, `checkpoints/` on the way, `metrics.json`, `clusters.png`, `curves.png` and `log.jsonl` at the end;
with `--head_blocks auto` also `blocks.png`, the measurement behind the choice.
"""

import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from ..checkpointing import Checkpoint, load_latest, write_json
from ..configuration_mim_refiner import MimRefinerConfig
from ..conversion import load_encoder
from ..conversion.load import image_processor
from ..data import ImageDataset, ImageStream, hold_out, open_images, open_stream
from ..distributed import several_on_the_cpu
from ..evaluation.block_analysis import BlockProfile
from ..evaluation.pictures import draw_block_profile, draw_clusters, draw_curves
from ..evaluation.report import Evaluation, comparison_table, evaluate_encoder
from ..modeling_mim_refiner import MimRefinerModel
from ..pretraining.mae import PretrainRecipe, pretrain_mae
from .failure import FAILURES, NotFiniteError
from .head_choice import check_measurable, choose_head_blocks
from .plan import Steps, count_steps, plan_text
from .recipe import RefineRecipe, resolve
from .recipe_files import read_fields
from .tracking import trackers
from .trainer import Trainer

logger = logging.getLogger(__name__)

# Fields that may differ when a run is continued: they say where and how it runs, not what is computed.
FREE_FIELDS = frozenset(
    [
        "recipe",
        "output_dir",
        "stage",
        "num_workers",
        "micro_batch_size",
        "compile",
        "gradient_checkpointing",
        "report_to",
        "log_every",
        "save_every",
        "keep",
        "push_to_hub",
        "dry_run",
    ]
)
PROTOCOL = {
    "features": "pooled token of the last block, without the final norm (paper, Sec. 5.2)",
    "knn": "k=10, temperature 0.07, features standardised by the training images, cosine similarity",
    "clustering": "mini-batch k-means on L2-normalised features, 100 runs, the one with the lowest loss; k = number of classes",
}


@dataclass(frozen=True)
class RunResult:
    """What `run` leaves in memory: the refined encoder (EMA) in eval mode, its image processor, and what metrics.json says."""

    encoder: MimRefinerModel
    processor: Any
    metrics: dict[str, Any]
    output_dir: Path


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs, checked; `encoder` is None where it is still to be pre-trained, `bank` is for k-NN."""

    recipe: RefineRecipe
    config: MimRefinerConfig
    encoder: MimRefinerModel | None
    pretraining: PretrainRecipe | None
    processor: Any
    images: ImageDataset | ImageStream
    eval_images: ImageDataset | None
    bank: ImageDataset | None
    steps: Steps
    found: Checkpoint | None

    @property
    def num_images(self) -> int | None:
        """Images to train on; None for a stream."""
        return len(self.images) if isinstance(self.images, ImageDataset) else None


def run(recipe: RefineRecipe) -> RunResult | None:
    """Refine as the recipe says; None after a dry run, or a head warm-up alone.

    Raises:
        ValueError, FileNotFoundError: for a recipe that does not fit data, weights or output folder; before any work.
        FloatingPointError: for a loss that is not finite; before the optimiser step.
    """
    torch.set_flush_denormal(True)
    prepared = prepare(recipe)
    recipe, output = prepared.recipe, Path(recipe.output_dir)
    bf16 = computes_in_bf16(recipe.mixed_precision)
    start_step = 0 if prepared.found is None else prepared.found.step
    accelerator = Accelerator(
        cpu=several_on_the_cpu(),
        mixed_precision="bf16" if bf16 else "no",
        log_with=trackers(output, recipe.loggers, start_step),
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "tensorboard")),
    )
    if accelerator.is_main_process:
        print(_plan(prepared, accelerator, bf16), flush=True)
    if recipe.dry_run:
        return None
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "recipe.json", dataclasses.asdict(recipe))
    accelerator.wait_for_everyone()
    accelerator.init_trackers("mim-refiner")
    try:
        result = _train_and_measure(prepared, accelerator, bf16)
    except NotFiniteError as error:
        path = output / FAILURES / f"step-{error.report['step']:08d}.json"
        if accelerator.is_main_process:
            path.parent.mkdir(exist_ok=True)
            write_json(path, error.report)
        raise NotFiniteError(
            f"{error}. The report: {path}; `mim-refiner replay {output}` runs the step again", error.report
        ) from error
    accelerator.end_training()
    return result


def computes_in_bf16(mixed_precision: str) -> bool:
    """Whether `--mixed_precision` means bf16 on this machine: when asked for, or with "auto" on a GPU that has it."""
    return mixed_precision == "bf16" or (
        mixed_precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )


def prepare(recipe: RefineRecipe) -> Prepared:
    """Open data and weights, fill in the recipe, and check it against both and against the output folder."""
    images, eval_images = open_data(recipe, num_channels=3)
    pretraining = encoder = None
    processor: Any
    if recipe.pretrain is not None:
        pretraining = PretrainRecipe(**{**read_fields(recipe.pretrain, PretrainRecipe, "pretrain"), "seed": recipe.seed})
        config = pretraining.encoder_config()
        processor = image_processor(config, {})
    else:
        assert recipe.model is not None
        encoder = load_encoder(recipe.model, family=recipe.family)
        config, processor = encoder.config, encoder.image_processor
    if config.num_channels != 3:
        images, eval_images = open_data(recipe, num_channels=config.num_channels)
    bank = images if isinstance(images, ImageDataset) else None
    if bank is None and eval_images is not None:  # a stream is gone once read: half of the evaluation images are the bank
        bank, eval_images = hold_out(eval_images, 0.5, recipe.seed)
    num_images = len(images) if isinstance(images, ImageDataset) else None
    recipe = resolve(recipe, config, num_images, int(os.environ.get("WORLD_SIZE", "1")))
    if recipe.head_blocks == "auto":
        check_measurable(bank)
    steps = count_steps(recipe, num_images)
    if pretraining is not None and num_images is None:
        raise ValueError("--pretrain needs a data set of known length; leave out --streaming")
    if pretraining is not None and num_images is not None and pretraining.batch_size > num_images:
        raise ValueError(
            f"--pretrain {recipe.pretrain}: its batch_size {pretraining.batch_size} exceeds the {num_images} images"
        )
    check_output(Path(recipe.output_dir), recipe)
    found = None if recipe.dry_run else load_latest(Path(recipe.output_dir) / "checkpoints")
    if recipe.stage == "refine" and not recipe.dry_run and (found is None or found.step < steps.warmup):
        raise ValueError(
            f"--stage refine: {recipe.output_dir} has no warmed-up heads; run --stage warmup first, or --stage both"
        )
    return Prepared(recipe, config, encoder, pretraining, processor, images, eval_images, bank, steps, found)


def open_data(recipe: RefineRecipe, num_channels: int) -> tuple[ImageDataset | ImageStream, ImageDataset | None]:
    """The images to train on and those to evaluate on; the latter are never trained on."""
    where = {"config": recipe.dataset_config, "num_channels": num_channels}
    evaluate = None
    if recipe.eval_dataset is not None or recipe.eval_split is not None:
        same = recipe.eval_dataset in (None, recipe.dataset)
        eval_where = where if same else {"num_channels": num_channels}
        evaluate = open_images(recipe.eval_dataset or recipe.dataset, split=recipe.eval_split, **eval_where)
    if recipe.streaming:
        return open_stream(recipe.dataset, split=recipe.split, **where), evaluate  # type: ignore[arg-type]
    images = open_images(recipe.dataset, split=recipe.split, **where)  # type: ignore[arg-type]
    if len(images) < 2:
        raise ValueError(f"--dataset {recipe.dataset}: {len(images)} image(s) found; contrastive refinement needs at least 2")
    if evaluate is not None and evaluate.fingerprint == images.fingerprint:
        raise ValueError(
            f"--eval_dataset {evaluate.name}: these are the images to train on; name others, another --eval_split, or leave both "
            "out to hold some back"
        )
    if evaluate is None and recipe.eval_fraction > 0:
        return hold_out(images, recipe.eval_fraction, recipe.seed)
    return images, evaluate


def check_output(output: Path, recipe: RefineRecipe) -> None:
    """Refuse an output folder that belongs to another recipe, naming the fields that differ, or that cannot be one."""
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--output_dir {output}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"--output_dir {output}: {existing} cannot be written to; name another folder")
    saved = output / "recipe.json"
    if not saved.is_file():
        return
    try:
        old, new = dict(json.loads(saved.read_text())), dataclasses.asdict(recipe)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"--output_dir {output}: its recipe.json cannot be read ({error}); name another folder or remove it"
        ) from error
    differing = [key for key in new if key not in FREE_FIELDS and old.get(key) != new[key]]
    if differing:
        changes = "; ".join(f"{key} was {old.get(key)}, is {new[key]}" for key in differing)
        raise ValueError(
            f"--output_dir {output}: holds a run of another recipe ({changes}); choose another folder or remove it"
        )


def _plan(prepared: Prepared, accelerator: Accelerator, bf16: bool) -> str:
    text = plan_text(
        prepared.recipe,
        prepared.config,
        num_images=prepared.num_images,
        num_eval=0 if prepared.eval_images is None else len(prepared.eval_images),
        steps=prepared.steps,
        processes=accelerator.num_processes,
        device=accelerator.device.type,
        bf16=bf16,
    )
    if prepared.encoder is not None:
        text += f"\n  weights {prepared.encoder.load_report}"
    if prepared.found is not None:
        text += f"\n  resume  after step {prepared.found.step}"
    return text


def _train_and_measure(prepared: Prepared, accelerator: Accelerator, bf16: bool) -> RunResult | None:
    """The run itself, on every process; files are written by the main one."""
    recipe, steps, found = prepared.recipe, prepared.steps, prepared.found
    workers = _num_workers(recipe, accelerator)
    seconds: dict[str, float] = {} if found is None else dict(found.state["seconds"])
    encoder = starting_encoder(prepared, accelerator, seconds)

    def evaluate(model: MimRefinerModel, per_block: bool = True) -> Evaluation | None:
        if prepared.eval_images is None or prepared.bank is None:
            return None
        settings = {"seed": recipe.seed, "num_workers": workers, "per_block": per_block}
        return evaluate_encoder(model, prepared.processor, prepared.bank, prepared.eval_images, **settings)  # type: ignore[arg-type]

    start = None if found is not None else evaluate(encoder)
    before = found.state["before"] if found is not None else (start.metrics if start is not None else None)
    choice = choose_blocks(prepared, accelerator, encoder)
    trainer = make_trainer(prepared, accelerator, bf16, encoder, choice, seconds)
    stop = steps.warmup if recipe.stage == "warmup" else steps.total
    trainer.fit(
        0 if found is None else found.step,
        stop,
        extra_state={"before": before, "head_choice": choice},
        evaluate=lambda: {} if (e := evaluate(trainer.average, per_block=False)) is None else e.metrics,
    )
    if recipe.stage == "warmup":
        accelerator.print(f"The heads are warm: {recipe.output_dir}/checkpoints. Go on with --stage refine.")
        return None
    measured = evaluate(trainer.average)
    after = None if measured is None else measured.metrics
    metrics = describe(prepared, accelerator, before, after, trainer.seconds)
    if choice is not None:
        metrics["head_choice"] = choice
    if accelerator.is_main_process:
        write_json(Path(recipe.output_dir) / "metrics.json", metrics)
        if measured is not None and prepared.eval_images is not None:
            draw_clusters(prepared.eval_images, measured, Path(recipe.output_dir) / "clusters.png")
        draw_curves(Path(recipe.output_dir) / "log.jsonl", before, after, Path(recipe.output_dir) / "curves.png")
        if before is not None and after is not None:
            print(f"\n{comparison_table(before, after)}\n", flush=True)
    return RunResult(trainer.average, prepared.processor, metrics, Path(recipe.output_dir))


def starting_encoder(prepared: Prepared, accelerator: Accelerator, seconds: dict[str, float]) -> MimRefinerModel:
    """The encoder that the run starts from, in fp32 on the device: loaded, or pre-trained, with its time put into `seconds`."""
    encoder, began = prepared.encoder, time.perf_counter()
    if encoder is None and prepared.found is None:
        assert prepared.pretraining is not None and isinstance(prepared.images, ImageDataset)
        workers = _num_workers(prepared.recipe, accelerator)
        encoder = pretrain_mae(prepared.pretraining, prepared.images, accelerator, workers)
        seconds["pretrain"] = time.perf_counter() - began
    elif encoder is None:
        encoder = MimRefinerModel(prepared.config)  # the checkpoint fills it
    return encoder.float().to(accelerator.device)


def make_trainer(
    prepared: Prepared,
    accelerator: Accelerator,
    bf16: bool,
    encoder: MimRefinerModel,
    choice: dict[str, Any] | None,
    seconds: dict[str, float],
) -> Trainer:
    """The trainer of the run, standing where its checkpoint was written if there is one; `choice` as `choose_blocks` gives it."""
    recipe, processor = prepared.recipe, prepared.processor
    if choice is not None:
        recipe = dataclasses.replace(recipe, head_blocks=choice["blocks"])
    workers, statistics = _num_workers(recipe, accelerator), (processor.image_mean, processor.image_std)
    trainer = Trainer(recipe, prepared.steps, accelerator, prepared.images, encoder, *statistics, workers, bf16, seconds)
    if prepared.found is not None:
        trainer.restore(prepared.found)
    return trainer


def choose_blocks(prepared: Prepared, accelerator: Accelerator, encoder: MimRefinerModel) -> dict[str, Any] | None:
    """What `--head_blocks auto` chooses, said and drawn; the first run's choice when resumed; None where blocks were named."""
    if prepared.recipe.head_blocks != "auto":
        return None
    if prepared.found is not None:
        kept: dict[str, Any] = prepared.found.state["head_choice"]
        return kept
    assert prepared.bank is not None  # or check_measurable would have refused
    choice = choose_head_blocks(
        prepared.recipe, encoder, prepared.processor, prepared.bank, _num_workers(prepared.recipe, accelerator)
    )
    accelerator.print(f"Heads on blocks {', '.join(map(str, choice['blocks']))}: {choice['reason']}", flush=True)
    if accelerator.is_main_process:
        profile = [BlockProfile(**block) for block in choice["profile"]]
        draw_block_profile(profile, Path(prepared.recipe.output_dir) / "blocks.png", choice["blocks"])
    return choice


def _num_workers(recipe: RefineRecipe, accelerator: Accelerator) -> int:
    if recipe.num_workers is not None:
        return recipe.num_workers
    return min(16, (os.cpu_count() or 1) // accelerator.num_processes)


def describe(
    prepared: Prepared, accelerator: Accelerator, before: Any, after: Any, seconds: dict[str, float]
) -> dict[str, Any]:
    """The contents of metrics.json: what was measured, and everything needed to get it again."""
    recipe, evaluated = prepared.recipe, prepared.eval_images
    packages = ("mim_refiner_hf", "torch", "torchvision", "transformers", "accelerate", "datasets", "pillow", "scikit-learn")
    device = (
        torch.cuda.get_device_name()
        if accelerator.device.type == "cuda"
        else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    )
    launched = "accelerate launch" if any(name.startswith("ACCELERATE_") for name in os.environ) else "python"
    if accelerator.num_processes > 1:
        launched += f"{' --cpu' if accelerator.device.type == 'cpu' else ''} --num_processes {accelerator.num_processes}"
    return {
        "before": before,
        "after": after,
        "seed": recipe.seed,
        "command": f"{launched} {shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}",
        "seconds": round(sum(seconds.values()), 1),
        "stage_seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "hardware": f"{accelerator.num_processes} x {device}" if accelerator.num_processes > 1 else device,
        "starting_model": recipe.model or "a MAE pre-trained in this run",
        "dataset": {
            "name": recipe.dataset,
            "config": recipe.dataset_config,
            "split": recipe.split,
            "images": prepared.num_images,
            "fingerprint": getattr(prepared.images, "fingerprint", None),
            "eval_name": None if evaluated is None else f"{evaluated.name} ({recipe.eval_split or 'held out'})",
            "eval_images": None if evaluated is None else len(evaluated),
            "num_classes": 0 if evaluated is None else evaluated.num_classes,
        },
        "protocol": PROTOCOL,
        "recipe": dataclasses.asdict(recipe),
    }


__all__ = ["Prepared", "RunResult", "check_output", "describe", "open_data", "prepare", "run"]
