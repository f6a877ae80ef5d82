"""A run from recipe to evidence: prepare, plan, start, measure, train, measure again, write.

    recipe = RefineRecipe(model="facebook/vit-mae-large", dataset="my_images/", output_dir="out")
    result = run(recipe)
    result.encoder, result.metrics["after"]["knn_accuracy"]

All that can be wrong with recipe, data, weights or output folder is said before anything is
trained. The output folder holds `recipe.json` and `data.json` (what the data consist of) from the
start, `start/` (the encoder that is refined) and `checkpoints/` on the way, `metrics.json`, the
pictures (run_record.py) and `log.jsonl` at the end; with `--pretrain` `pretraining/`, its log and
checkpoints, and `pretrained/`, which stays; with `--head_blocks auto` `blocks.png`, the measurement
behind the choice; and `broken.json` where images could not be read. What ships is what verdict.py
says: the result, or the start.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from ..data.broken import readable
from ..data.images import Broken, ImageDataset, evenly_spaced, fully_labelled
from ..data.loading import Loading
from ..data.stream import ImageStream
from ..evaluation.pictures import draw_block_profile
from ..evaluation.report import BANK_SIZE, Evaluation, evaluate_encoder, evaluate_pixels
from ..model.modeling_mim_refiner import MimRefinerModel
from ..publishing.run_file import Metrics, RunRecord
from ..refinement.adapters import Adapter
from ..refinement.auto import Choice
from ..refinement.failure import NotFiniteError
from ..refinement.recipe import RefineRecipe
from ..refinement.trainer import Trainer
from ..runtime.arithmetic import arithmetic, say_changes
from ..runtime.device import available_memory, warn_of_emulation
from ..runtime.finite import check_finite
from ..runtime.launch import job_of_processes
from ..runtime.tracking import LogCallback, trackers
from ..runtime.wording import setting
from .head_choice import HeadChoice, choose_head_blocks
from .init_from import data_digest, place_heads, start_state
from .plan import plan_text
from .prepare import NOTHING, Given, Prepared, prepare, start_folder
from .pretrained_start import pretrained_start, remove_checkpoints
from .run_folder import begin_folder, save_start, with_report
from .run_record import BeforeAfter, run_record, write_evidence
from .save_as import check_save_as
from .verdict import Verdict, judge_run, judges_text, load_start

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RunResult:
    """What `run` leaves in memory.

    Attributes:
        encoder: what ships, in eval mode: the refined encoder, or the start where that is not
            better.
        refined: the refined encoder (the moving average), whatever the verdict.
        verdict: whether it is better, and why.
        processor: its image processor.
        metrics: what metrics.json says.
        output_dir: the run's folder.
        adapter: what `refined` is the start with, of `--trainable lora:R`.
    """

    encoder: MimRefinerModel = field(repr=False)
    refined: MimRefinerModel = field(repr=False)
    verdict: Verdict
    processor: Any = field(repr=False)
    metrics: RunRecord = field(repr=False)
    output_dir: Path
    adapter: Adapter | None = field(default=None, repr=False)


def run(
    recipe: RefineRecipe, given: Given = NOTHING, callbacks: Sequence[LogCallback] = ()
) -> RunResult | None:
    """Refine as the recipe says; None after a dry run, or a head warm-up alone.

    Args:
        given: objects that stand where the recipe has their names.
        callbacks: called with (step, values) for every line of log.jsonl.

    Raises:
        ValueError, FileNotFoundError: for a recipe that does not fit data, weights or output
            folder; before any work.
        NotFiniteError: for a loss that is not finite; before the optimiser step.
    """
    # denormal numbers slow the CPU down and mean nothing here
    torch.set_flush_denormal(True)
    prepared = prepare(recipe, given)
    if recipe.save_as is not None:
        config, erased = prepared.start.config, prepared.erased_directions
        check_save_as(recipe.save_as, config, prepared.recipe.pooling, erased)
    accelerator = _accelerator(prepared, callbacks)
    if accelerator.is_main_process:
        print(_plan(prepared, accelerator), flush=True)
    if recipe.dry_run:
        return None

    if accelerator.is_main_process:
        begin_folder(prepared)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("mim-refiner")
    try:
        result = _refine_and_measure(prepared, accelerator)
    except NotFiniteError as error:
        raise with_report(error, Path(recipe.output_dir), accelerator.is_main_process) from error
    accelerator.end_training()
    return result


# ---- before


def _accelerator(prepared: Prepared, callbacks: Sequence[LogCallback]) -> Accelerator:
    """The processes of the run and its loggers; warns of bf16 where it is slow."""
    recipe = prepared.recipe
    output = Path(recipe.output_dir)
    accelerator = job_of_processes(
        log_with=trackers(output, recipe.asked.loggers, prepared.start_step, callbacks),
        project_config=ProjectConfiguration(
            project_dir=str(output), logging_dir=str(output / "tensorboard")
        ),
    )
    if recipe.bf16 and accelerator.is_main_process:
        asked = setting("mixed_precision", recipe.asked.mixed_precision)
        warn_of_emulation(asked, accelerator.device.type)
    return accelerator


def _plan(prepared: Prepared, accelerator: Accelerator) -> str:
    recipe = prepared.recipe
    device = accelerator.device.type
    evaluation = prepared.images.evaluation
    num_eval = 0 if evaluation is None else len(evaluation)
    text = plan_text(
        recipe,
        prepared.start.config,
        num_eval=num_eval,
        device=device,
        available=available_memory(device, accelerator.num_processes),
    )

    if recipe.asked.stage != "warmup":
        text += f"\n  verdict {judges_text(prepared.images)}"
    if prepared.start.encoder is not None:
        text += f"\n  weights {prepared.start.encoder.load_report}"
    if prepared.start.channels:
        text += f"\n  bands   {prepared.start.channels}"
    if prepared.fields is not None:
        text += f"\n  fields  {prepared.fields.plan_line()}"
    if prepared.resume is not None:
        text += f"\n  resume  after step {prepared.start_step}"
    return text


# ---- the run itself, on every process; files are written by the main one


@dataclass(frozen=True)
class _Trained:
    """What the training leaves; its optimiser, heads and queue are gone with the trainer."""

    refined: MimRefinerModel
    adapter: Adapter | None
    before: Metrics | None
    seconds: dict[str, float]
    broken: int
    choice: HeadChoice | None


def _refine_and_measure(prepared: Prepared, accelerator: Accelerator) -> RunResult | None:
    """Train, judge start and result, measure what is known of labels, and write all of it."""
    prepared, unreadable = _readable_only(prepared)
    trained = _train(prepared, accelerator, unreadable)
    if trained is None:
        return None
    # as `load_encoder` gives an encoder: it can be used at once
    refined = trained.refined
    begun = prepared.start
    vars(refined).update(image_processor=begun.processor, licence=begun.licence)

    erased = prepared.erase(refined)
    start = load_start(prepared)
    if start is not None:
        start.to(accelerator.device)
    judged = judge_run(prepared, accelerator, start, refined)
    after = None
    if judged.finite:
        after = _evaluate(prepared, refined)

    pixels = _pixels(prepared) if after is not None else None
    measured = BeforeAfter(trained.before, _metrics(after), judged.verdict, pixels)
    metrics = run_record(prepared, accelerator, measured, trained.seconds)
    metrics["broken_images"] = trained.broken
    if trained.choice is not None:
        metrics["head_choice"] = dataclasses.asdict(trained.choice)
    if erased is not None:
        metrics["erased"] = erased
    if accelerator.is_main_process:
        write_evidence(prepared, metrics, measured, after, judged)

    ships = refined
    if judged.verdict.ships_start:
        assert start is not None
        ships = start
    output = Path(prepared.recipe.output_dir)
    verdict = judged.verdict
    return RunResult(ships, refined, verdict, begun.processor, metrics, output, trained.adapter)


def _train(
    prepared: Prepared, accelerator: Accelerator, unreadable: Sequence[Broken]
) -> _Trained | None:
    """Both stages, from the start or from where the run was interrupted; None after a warm-up.

    `unreadable` are images of the training set that are known to be broken.
    """
    recipe = prepared.recipe
    resume = prepared.resume
    seconds: dict[str, float] = dict(resume.state["seconds"]) if resume else {}

    encoder = starting_encoder(prepared, accelerator, seconds)
    if resume is None and accelerator.is_main_process:
        save_start(start_folder(recipe), encoder, prepared.start.processor)
    before = resume.state["before"] if resume else _metrics(_evaluate(prepared, encoder))
    choice = choose_blocks(prepared, accelerator, encoder)

    trainer = make_trainer(prepared, accelerator, encoder, choice, seconds)
    trainer.broken.add(unreadable)
    trainer.broken.share()
    now = arithmetic(trainer.recipe.micro_batch_size, trainer.recipe.bf16)
    begun = resume.state.get("arithmetic", now) if resume else now
    say_changes(begun, now)
    state = {
        "before": before,
        "arithmetic": begun,
        "head_choice": None if choice is None else dataclasses.asdict(choice),
        "micro_batch": trainer.recipe.micro_batch_size,
        **start_state(
            encoder,
            prepared.start.processor,
            prepared.images.training,
            recipe.steps.warmup,
            prepared.start.licence,
        ),
    }
    if prepared.fields is not None:
        state["fields"] = prepared.fields.digest

    def evaluate_average() -> Metrics:
        average = prepared.with_eraser(trainer.averaged())
        return _metrics(_evaluate(prepared, average, per_block=False)) or {}

    warms_up_only = recipe.asked.stage == "warmup"
    stop = recipe.steps.warmup if warms_up_only else recipe.steps.total
    trainer.fit(prepared.start_step, stop, state, evaluate_average)
    if accelerator.is_main_process:
        # from here on the run goes on from the refinement's own checkpoints
        remove_checkpoints(Path(recipe.output_dir))
    if warms_up_only:
        accelerator.print(
            f"The heads are warm: {recipe.output_dir}/checkpoints. "
            f"Go on with {setting('stage', 'refine')}."
        )
        return None

    average = trainer.averaged()
    remedy = f"lower {setting('learning_rate')}, or {setting('mixed_precision', 'no')}"
    check_finite(average.state_dict(), "the moving average of the encoder", remedy)
    adapter = trainer.averaged_adapter()
    if adapter is not None:
        base = prepared.start.name or str(start_folder(recipe))
        adapter = dataclasses.replace(adapter, base=base)
    return _Trained(average, adapter, before, trainer.seconds, len(trainer.broken), choice)


def _evaluate(
    prepared: Prepared, model: MimRefinerModel, per_block: bool = True
) -> Evaluation | None:
    """The scores of an encoder; None for a run without evaluation images."""
    images = prepared.images
    if images.evaluation is None or images.bank is None:
        return None
    return evaluate_encoder(
        model,
        prepared.start.processor,
        images.bank,
        images.evaluation,
        seed=prepared.recipe.seed,
        loading=Loading(num_workers=prepared.recipe.num_workers),
        per_block=per_block,
    )


def _sources(images: ImageDataset | ImageStream) -> Any:
    """Where the images lie; sets with another numbering of the classes share it."""
    return images.found.sources if isinstance(images, ImageDataset) else None


def _pixels(prepared: Prepared) -> dict[str, float] | None:
    """The scores of the images themselves: whether the run's own start is better than none.

    None for a start that came from elsewhere, and without labels.
    """
    images = prepared.images
    bank = images.bank
    evaluation = images.evaluation
    if prepared.recipe.asked.pretrain is None or bank is None or evaluation is None:
        return None
    if not fully_labelled(bank) or not fully_labelled(evaluation):
        return None
    loading = Loading(num_workers=prepared.recipe.num_workers)
    seed = prepared.recipe.seed
    return evaluate_pixels(prepared.start.processor, bank, evaluation, seed=seed, loading=loading)


def _metrics(evaluation: Evaluation | None) -> Metrics | None:
    return None if evaluation is None else evaluation.metrics


def _readable_only(prepared: Prepared) -> tuple[Prepared, list[Broken]]:
    """Without the evaluation images, and those of the k-NN bank, that cannot be read.

    So every score is over the same images, before and after. Of the bank, the 10 000 images that
    are used are decoded to find out. Returned are also the broken ones of the data set that is
    trained on: the run's list is one of places there.
    """
    images = prepared.images
    if images.evaluation is None or images.bank is None:
        return prepared, []

    workers = prepared.recipe.num_workers
    evaluation, broken = readable(images.evaluation, workers)
    bank, broken_in_bank = readable(evenly_spaced(images.bank, BANK_SIZE), workers)
    unreadable = []
    for source, entries in ((images.evaluation, broken), (images.bank, broken_in_bank)):
        if source.found.sources is _sources(images.training):
            unreadable += entries
            continue
        for entry in entries:
            logger.warning("broken evaluation image, left out: %s", entry["reason"])
    images = dataclasses.replace(images, evaluation=evaluation, bank=bank)
    return dataclasses.replace(prepared, images=images), unreadable


# ---- its parts, which `replay` uses too


def starting_encoder(
    prepared: Prepared, accelerator: Accelerator, seconds: dict[str, float]
) -> MimRefinerModel:
    """The encoder that the run starts from, in fp32 on the device: loaded, or pre-trained.

    `seconds` gets the time of the pre-training.
    """
    start = prepared.start
    encoder = start.encoder
    if encoder is None and prepared.resume is not None:
        # the checkpoint fills it
        encoder = MimRefinerModel(start.config)
    elif encoder is None:
        began = time.perf_counter()
        encoder = pretrained_start(prepared, accelerator)
        seconds["pretrain"] = time.perf_counter() - began
    return encoder.float().to(accelerator.device)


def choose_blocks(
    prepared: Prepared, accelerator: Accelerator, encoder: MimRefinerModel
) -> HeadChoice | None:
    """What `--head_blocks auto` chooses, said and drawn; None where blocks were named.

    A resumed run goes on with the choice of the first one.
    """
    recipe = prepared.recipe
    if "head_blocks" not in recipe.to_measure:
        return None
    if prepared.resume is not None:
        return HeadChoice.from_json(prepared.resume.state["head_choice"])

    bank = prepared.images.bank
    # or check_measurable would have refused
    assert bank is not None
    choice = choose_head_blocks(recipe, encoder, prepared.start.processor, bank)
    blocks = ", ".join(map(str, choice.blocks))
    accelerator.print(f"Heads on blocks {blocks}: {choice.reason}", flush=True)
    if accelerator.is_main_process:
        picture = Path(recipe.output_dir) / "blocks.png"
        draw_block_profile(choice.profile, picture, choice.blocks)
    return choice


def make_trainer(
    prepared: Prepared,
    accelerator: Accelerator,
    encoder: MimRefinerModel,
    choice: HeadChoice | None,
    seconds: dict[str, float],
) -> Trainer:
    """The trainer of the run, standing where its checkpoint was written if there is one."""
    recipe = prepared.recipe
    resume = prepared.resume
    if choice is not None:
        recipe = recipe.measured("head_blocks", Choice(choice.blocks, choice.reason))
    training = prepared.images.training
    processor = prepared.start.processor
    trainer = Trainer(
        recipe,
        accelerator,
        training,
        encoder,
        processor.image_mean,
        processor.image_std,
        seconds,
        getattr(processor, "value_range", None),
        None if prepared.fields is None else prepared.fields.metadata(),
    )

    # where it stands: in the middle of this run, at the heads of another one, or at the start
    other = prepared.start.checkpoint
    if resume is not None:
        trainer.restore(resume)
    elif other is not None:
        own = data_digest(training)
        same_data = own is not None and own == other.state["data"]
        refiner = trainer.refiner
        place_heads(other, trainer.tensors(), refiner.heads, refiner.queue, same_data)

    if "micro_batch_size" in recipe.to_measure:
        # the same bits as before: a resumed run goes on with what the first one had chosen
        if resume is not None and "micro_batch" in resume.state:
            trainer.settle_micro_batch(Choice(resume.state["micro_batch"], "as this run began"))
        else:
            device = accelerator.device.type
            trainer.choose_micro_batch(available_memory(device, accelerator.num_processes))
    return trainer
