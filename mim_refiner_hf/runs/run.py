"""A run from recipe to evidence: check everything, say the plan, start weights, before, train, after, `metrics.json`.

    result = run(RefineRecipe(model="facebook/vit-mae-large", dataset="my_images/", output_dir="out"))
    result.encoder, result.metrics["after"]["knn_accuracy"]

All that can be wrong with recipe, data, weights or output folder is said before anything is trained. The output folder holds
`recipe.json` and `data.json` (what the data consist of) from the start, `checkpoints/` on the way, `metrics.json`, `clusters.png`,
`curves.png` and `log.jsonl` at the end; with `--pretrain` also `pretrained/`, the encoder that is refined, with `--head_blocks auto`
`blocks.png`, the measurement behind the choice, and `broken.json` where images could not be read.
"""

import dataclasses
import importlib.metadata
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

from ..data.broken import readable
from ..data.fingerprint import RECORD, write_data_record
from ..data.images import Broken, ImageDataset, evenly_spaced
from ..data.loading import Loading
from ..evaluation.block_analysis import BlockProfile
from ..evaluation.pictures import draw_block_profile, draw_clusters, draw_curves
from ..evaluation.report import BANK_SIZE, Evaluation, evaluate_encoder
from ..evaluation.tables import comparison_table
from ..model.modeling_mim_refiner import MimRefinerModel
from ..pretraining.mae import pretrain_mae
from ..refinement.failure import FAILURES, NotFiniteError
from ..refinement.recipe import RefineRecipe
from ..refinement.trainer import Trainer
from ..runtime.device import available_memory, uses_bf16, warn_of_emulation
from ..runtime.files import staged_folder, write_json
from ..runtime.launch import several_on_the_cpu
from ..runtime.sharding import fsdp2_requested
from ..runtime.tracking import trackers
from .head_choice import choose_head_blocks
from .init_from import data_digest, place_heads, start_state
from .plan import plan_text
from .prepare import PRETRAINED, Prepared, check_start, prepare

logger = logging.getLogger(__name__)

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


def run(recipe: RefineRecipe) -> RunResult | None:
    """Refine as the recipe says; None after a dry run, or a head warm-up alone.

    Raises:
        ValueError, FileNotFoundError: for a recipe that does not fit data, weights or output folder; before any work.
        FloatingPointError: for a loss that is not finite; before the optimiser step.
    """
    torch.set_flush_denormal(True)
    prepared = prepare(recipe)
    recipe, output = prepared.recipe, Path(recipe.output_dir)
    bf16 = uses_bf16(recipe.mixed_precision)
    start_step = 0 if prepared.found is None else prepared.found.step
    accelerator = Accelerator(
        cpu=several_on_the_cpu(),
        mixed_precision="bf16" if bf16 else "no",
        log_with=trackers(output, recipe.loggers, start_step),
        project_config=ProjectConfiguration(
            project_dir=str(output), logging_dir=str(output / "tensorboard")
        ),
    )
    if accelerator.is_main_process:
        if bf16:
            warn_of_emulation(
                f"--mixed_precision {recipe.mixed_precision}", accelerator.device.type
            )
        print(_plan(prepared, accelerator, bf16), flush=True)
    if recipe.dry_run:
        return None
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "recipe.json", dataclasses.asdict(recipe))
        if isinstance(prepared.images, ImageDataset):
            write_data_record(output / RECORD, prepared.images)
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
            f"{error}. The report: {path}; `mim-refiner replay {output}` runs the step again",
            error.report,
        ) from error
    accelerator.end_training()
    return result


def save_start(folder: Path, encoder: MimRefinerModel, processor: Any) -> None:
    """Keep the encoder of `--pretrain`, which is nowhere else, to compare with: weights, configuration and preprocessing."""
    with staged_folder(folder, check_start) as new:
        encoder.save_pretrained(new)
        processor.save_pretrained(new)


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
        available=available_memory(accelerator.device.type, accelerator.num_processes),
    )
    if prepared.encoder is not None:
        text += f"\n  weights {prepared.encoder.load_report}"
    if prepared.found is not None:
        text += f"\n  resume  after step {prepared.found.step}"
    return text


def _train_and_measure(
    prepared: Prepared, accelerator: Accelerator, bf16: bool
) -> RunResult | None:
    """The run itself, on every process; files are written by the main one."""
    recipe, steps, found = prepared.recipe, prepared.steps, prepared.found
    workers = _num_workers(recipe, accelerator)
    seconds: dict[str, float] = {} if found is None else dict(found.state["seconds"])
    encoder = starting_encoder(prepared, accelerator, seconds)
    prepared, unreadable = _readable_only(prepared, workers)

    def evaluate(model: MimRefinerModel, per_block: bool = True) -> Evaluation | None:
        if prepared.eval_images is None or prepared.bank is None:
            return None
        return evaluate_encoder(
            model,
            prepared.processor,
            prepared.bank,
            prepared.eval_images,
            seed=recipe.seed,
            loading=Loading(num_workers=workers),
            per_block=per_block,
        )

    start = None if found is not None else evaluate(encoder)
    before = (
        found.state["before"]
        if found is not None
        else (start.metrics if start is not None else None)
    )
    choice = choose_blocks(prepared, accelerator, encoder)
    trainer = make_trainer(prepared, accelerator, bf16, encoder, choice, seconds)
    trainer.broken.add(unreadable)
    trainer.broken.share()
    stop = steps.warmup if recipe.stage == "warmup" else steps.total
    trainer.fit(
        0 if found is None else found.step,
        stop,
        extra_state={
            "before": before,
            "head_choice": choice,
            "micro_batch": trainer.recipe.micro_batch_size,
            **start_state(encoder, prepared.processor, prepared.images, steps.warmup),
        },
        evaluate=lambda: (
            {} if (e := evaluate(trainer.averaged(), per_block=False)) is None else e.metrics
        ),
    )
    if recipe.stage == "warmup":
        accelerator.print(
            f"The heads are warm: {recipe.output_dir}/checkpoints. Go on with --stage refine."
        )
        return None
    refined = trainer.averaged()
    measured = evaluate(refined)
    after = None if measured is None else measured.metrics
    metrics = describe(prepared, accelerator, before, after, trainer.seconds)
    metrics["broken_images"] = len(trainer.broken)
    if choice is not None:
        metrics["head_choice"] = choice
    if accelerator.is_main_process:
        write_json(Path(recipe.output_dir) / "metrics.json", metrics)
        if measured is not None and prepared.eval_images is not None:
            draw_clusters(prepared.eval_images, measured, Path(recipe.output_dir) / "clusters.png")
        draw_curves(
            Path(recipe.output_dir) / "log.jsonl",
            before,
            after,
            Path(recipe.output_dir) / "curves.png",
        )
        if before is not None and after is not None:
            print(f"\n{comparison_table(before, after)}\n", flush=True)
    return RunResult(refined, prepared.processor, metrics, Path(recipe.output_dir))


def _readable_only(prepared: Prepared, workers: int) -> tuple[Prepared, list[Broken]]:
    """Without the evaluation images and those of the k-NN bank that cannot be read, and what these are: every score is over the
    same images, before and after. Of the bank, the 10 000 images that are used are decoded to find out."""
    if prepared.eval_images is None or prepared.bank is None:
        return prepared, []
    kept, own = [], []
    for images in (prepared.eval_images, evenly_spaced(prepared.bank, BANK_SIZE)):
        left, broken = readable(images, workers)
        kept.append(left)
        if images.found is getattr(
            prepared.images, "found", None
        ):  # the run's list is one of places in the data set trained on
            own += broken
            continue
        for entry in broken:
            logger.warning("broken evaluation image, left out: %s", entry["reason"])
    return dataclasses.replace(prepared, eval_images=kept[0], bank=kept[1]), own


def starting_encoder(
    prepared: Prepared, accelerator: Accelerator, seconds: dict[str, float]
) -> MimRefinerModel:
    """The encoder that the run starts from, in fp32 on the device: loaded, or pre-trained, with its time put into `seconds`."""
    encoder, began = prepared.encoder, time.perf_counter()
    if encoder is None and prepared.found is None:
        assert prepared.pretraining is not None and isinstance(prepared.images, ImageDataset)
        workers = _num_workers(prepared.recipe, accelerator)
        encoder = pretrain_mae(
            prepared.pretraining,
            prepared.images,
            accelerator,
            workers,
            prepared.recipe.max_bad_fraction,
        )
        seconds["pretrain"] = time.perf_counter() - began
        if accelerator.is_main_process:
            save_start(Path(prepared.recipe.output_dir) / PRETRAINED, encoder, prepared.processor)
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
    workers, statistics = (
        _num_workers(recipe, accelerator),
        (processor.image_mean, processor.image_std),
    )
    trainer = Trainer(
        recipe,
        prepared.steps,
        accelerator,
        prepared.images,
        encoder,
        *statistics,
        workers,
        bf16,
        seconds,
    )
    if prepared.found is not None:
        trainer.restore(prepared.found)
    elif prepared.start is not None:
        own, its = data_digest(prepared.images), prepared.start.state["data"]
        same_data = own is not None and own == its
        place_heads(
            prepared.start,
            trainer.tensors(),
            trainer.refiner.heads,
            trainer.refiner.queue,
            same_data,
        )
    if recipe.micro_batch_size == "auto":
        kept: Any = (
            "auto" if prepared.found is None else prepared.found.state.get("micro_batch", "auto")
        )  # the same bits as before
        trainer.choose_micro_batch(
            available_memory(accelerator.device.type, accelerator.num_processes), kept
        )
    return trainer


def choose_blocks(
    prepared: Prepared, accelerator: Accelerator, encoder: MimRefinerModel
) -> dict[str, Any] | None:
    """What `--head_blocks auto` chooses, said and drawn; the first run's choice when resumed; None where blocks were named."""
    if prepared.recipe.head_blocks != "auto":
        return None
    if prepared.found is not None:
        kept: dict[str, Any] = prepared.found.state["head_choice"]
        return kept
    assert prepared.bank is not None  # or check_measurable would have refused
    choice = choose_head_blocks(
        prepared.recipe,
        encoder,
        prepared.processor,
        prepared.bank,
        _num_workers(prepared.recipe, accelerator),
    )
    accelerator.print(
        f"Heads on blocks {', '.join(map(str, choice['blocks']))}: {choice['reason']}", flush=True
    )
    if accelerator.is_main_process:
        profile = [BlockProfile(**block) for block in choice["profile"]]
        draw_block_profile(
            profile, Path(prepared.recipe.output_dir) / "blocks.png", choice["blocks"]
        )
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
    packages = (
        "mim_refiner_hf",
        "torch",
        "torchvision",
        "transformers",
        "accelerate",
        "datasets",
        "pillow",
        "scikit-learn",
    )
    device = (
        torch.cuda.get_device_name()
        if accelerator.device.type == "cuda"
        else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    )
    launched = (
        "accelerate launch"
        if any(name.startswith("ACCELERATE_") for name in os.environ)
        else "python"
    )
    if accelerator.num_processes > 1:
        how = (
            " --use_fsdp --fsdp_version 2"
            if fsdp2_requested()
            else " --cpu"
            if accelerator.device.type == "cpu"
            else ""
        )
        launched += f"{how} --num_processes {accelerator.num_processes}"
    begun = (
        "a MAE pre-trained in this run"
        if recipe.init_from is None
        else f"the weights of the run {recipe.init_from}"
    )
    return {
        "before": before,
        "after": after,
        "seed": recipe.seed,
        "command": f"{launched} {shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}",
        "seconds": round(sum(seconds.values()), 1),
        "stage_seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "hardware": f"{accelerator.num_processes} x {device}"
        if accelerator.num_processes > 1
        else device,
        "starting_model": recipe.model or begun,
        "dataset": {
            "name": recipe.dataset,
            "config": recipe.dataset_config,
            "split": recipe.split,
            "images": prepared.num_images,
            "fingerprint": getattr(prepared.images, "fingerprint", None),
            "eval_name": None
            if evaluated is None
            else f"{evaluated.name} ({recipe.eval_split or 'held out'})",
            "eval_images": None if evaluated is None else len(evaluated),
            "num_classes": 0 if evaluated is None else evaluated.num_classes,
        },
        "protocol": PROTOCOL,
        "recipe": dataclasses.asdict(recipe),
    }


__all__ = ["RunResult", "choose_blocks", "describe", "make_trainer", "run", "starting_encoder"]
