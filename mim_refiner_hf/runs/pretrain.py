"""A pre-training from recipe to model folder: check, plan, train or go on, write.

    run_pretraining(PretrainRecipe(image_size=32, patch_size=4), Path("out"), dataset="photos/")

The output folder holds `recipe.json`, `data.json`, `log.jsonl` and `checkpoints/` on the way. At
the end the model takes its place as a whole: the encoder, the records of the run beside it, and
further encoders of the method in folders of their own. A finished model is never overwritten.
"""

import dataclasses
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from ..clustering.channels import is_picture
from ..conversion.licence import CARD, UNKNOWN
from ..data.broken import BROKEN
from ..data.channels import channels_of
from ..data.fingerprint import RECORD, check_data_record, write_data_record
from ..data.images import ImageDataset, fully_labelled, hold_out, open_images
from ..data.loading import Loading
from ..data.stream import ImageStream, open_stream
from ..evaluation.report import evaluate_encoder
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..model.poolings_mim_refiner import LEARNED_POOLINGS, Pooling
from ..pretraining.auto import fit_to_images
from ..pretraining.loop import CHECKPOINTS, Pretrainer
from ..pretraining.loop_options import LoopOptions
from ..pretraining.objective import Objective
from ..pretraining.recipe import PretrainRecipe
from ..pretraining.trial import try_step
from ..publishing.hub import check_model_folder, write_model
from ..publishing.pretraining_card import pretraining_card
from ..runtime.device import warn_of_emulation
from ..runtime.files import check_apart, check_kinds, staged_folder, write_json, write_text
from ..runtime.launch import job_of_processes
from ..runtime.lock import check_writable, sole_run
from ..runtime.loggers import logger_names
from ..runtime.text import one_line
from ..runtime.tracking import installed_loggers
from ..runtime.versions import FORMAT_VERSIONS
from ..runtime.wording import setting
from .begun import same_place, saved_recipe
from .plan import encoder_text
from .pretrain_plan import images_text, plan_of_pretraining

logger = logging.getLogger(__name__)

# what the finished folder keeps of the run beside the model
_RECORDS = ("recipe.json", RECORD, "log.jsonl", BROKEN)
_TENSORBOARD = "tensorboard"
# share of the images that k-NN on the way classifies, by the others
_MEASURED = 0.1


@dataclass(frozen=True)
class PretrainingRecord:
    """What `recipe.json` says of a pre-training, by which a later call knows it again.

    Attributes:
        init_from: what the encoder to go on from is called; None for fresh weights.
        streaming: whether the images are read in passing.
    """

    recipe: PretrainRecipe
    init_from: str | None
    streaming: bool

    def as_written(self) -> dict[str, object]:
        """As JSON, under the recipe's names."""
        written = {**dataclasses.asdict(self.recipe), "init_from": self.init_from}
        if self.streaming:
            written["streaming"] = True
        return written


def run_pretraining(
    recipe: PretrainRecipe,
    output_dir: Path,
    *,
    dataset: str,
    dataset_config: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    init_from: str | None = None,
    encoder: MimRefinerModel | None = None,
    options: LoopOptions | None = None,
    dry_run: bool = False,
) -> None:
    """Pre-train as the recipe says and leave the model in `output_dir`.

    Args:
        dataset, dataset_config, split: the images, as `open_images` takes them.
        streaming: read them in passing, as `open_stream` does.
        init_from: what the encoder to go on from is called; None for fresh weights.
        encoder: that encoder, as `load_encoder` gives it, of the recipe's shape.
        dry_run: print the plan and end.

    Raises:
        ValueError, FileNotFoundError: for what does not fit; before any work.
        Interrupted: after a checkpoint, when a signal asked the run to stop.
    """
    options = options or LoopOptions()
    if encoder is not None:
        encoder = fitted_to_method(encoder.float(), recipe, setting("init_from", init_from))

    check_writable(output_dir, "output_dir")
    check_kinds(output_dir, (CHECKPOINTS, _TENSORBOARD, f"{_TENSORBOARD}/mim-refiner"))
    check_apart(output_dir, dataset)
    opened = open_stream if streaming else open_images
    images: ImageDataset | ImageStream = opened(
        dataset, config=dataset_config, split=split, num_channels=recipe.num_channels
    )
    length = len(images) if isinstance(images, ImageDataset) else None
    _check_channels(recipe.num_channels, images)
    recipe = fit_to_images(recipe, length)
    record = PretrainingRecord(recipe, init_from, streaming)
    if is_finished(output_dir, record):
        _check_data(output_dir, images)
        print(f"The pre-trained model is finished already: {output_dir}")
        return
    check_pretraining_folder(output_dir, record)
    labelled = isinstance(images, ImageDataset) and fully_labelled(images)
    if options.eval_every and not labelled:
        asked = setting("eval_every", options.eval_every)
        raise ValueError(
            f"{asked}: k-NN needs labels, and {images.name} has none or is a stream; leave it out"
        )
    # refuses fewer images than a batch
    recipe.steps(length)

    with sole_run(output_dir, "output_dir", beside=True):
        accelerator = _accelerator(options, output_dir)
        trainer = Pretrainer(recipe, images, accelerator, options, output_dir, encoder)
        trainer.callbacks = [lambda step, values: accelerator.log(values, step=step)]
        if options.eval_every:
            trainer.evaluate = lambda model: _knn(model, trainer)
        trial = try_step(trainer)
        if accelerator.is_main_process:
            if trainer.objective.bf16:
                asked = setting("mixed_precision", options.mixed_precision)
                warn_of_emulation(asked, accelerator.device.type)
            print(plan_of_pretraining(trainer, trial, output_dir), flush=True)
        if not dry_run:
            _train_and_write(trainer, record, output_dir, encoder)


def _accelerator(options: LoopOptions, output: Path) -> Accelerator:
    """The processes of the run, and its loggers beside log.jsonl."""
    return job_of_processes(
        log_with=installed_loggers(logger_names(options.report_to)) or None,
        project_config=ProjectConfiguration(
            project_dir=str(output), logging_dir=str(output / _TENSORBOARD)
        ),
    )


def _train_and_write(
    trainer: Pretrainer,
    record: PretrainingRecord,
    output: Path,
    start: MimRefinerModel | None,
) -> None:
    """The run itself, on every process; files are written by the main one."""
    accelerator = trainer.accelerator
    main = accelerator.is_main_process
    images = trainer.images
    _check_data(output, images)
    accelerator.wait_for_everyone()
    if main:
        output.mkdir(parents=True, exist_ok=True)
        version = {"format_version": FORMAT_VERSIONS["recipe"]}
        write_json(output / "recipe.json", version | record.as_written())
        if isinstance(images, ImageDataset):
            write_data_record(output / RECORD, images)
    accelerator.wait_for_everyone()

    accelerator.init_trackers("mim-refiner")
    objective = trainer.fit()
    # what they hold back is written before it is copied
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []
    if main:
        _write(output, record, objective, trainer, start)
        print(f"The pre-trained model: {output}")
    accelerator.wait_for_everyone()
    # this takes the process group away too
    accelerator.end_training()


def _write(
    output: Path,
    record: PretrainingRecord,
    objective: Objective,
    trainer: Pretrainer,
    start: MimRefinerModel | None,
) -> None:
    """Put the model in the place of the run, whose records stay."""

    def check(folder: Path) -> Path:
        return check_pretraining_folder(folder, record)

    licence = UNKNOWN if start is None else vars(start)["licence"]
    shipped = objective.shipped()
    card = pretraining_card(
        output.resolve().name,
        trainer.recipe.objective,
        _facts(trainer),
        licence,
        shipped.config,
        record.init_from or "",
    )
    with staged_folder(output, check) as new:
        write_model(new, shipped, trainer.processor, torch.float32)
        write_text(new / CARD, card)
        for name, encoder in objective.others().items():
            (new / name).mkdir()
            write_model(new / name, encoder, trainer.processor, torch.float32)
        for name in _RECORDS:
            if (output / name).is_file():
                shutil.copyfile(output / name, new / name)
        if (output / _TENSORBOARD).is_dir():
            shutil.copytree(output / _TENSORBOARD, new / _TENSORBOARD)


def _facts(trainer: Pretrainer) -> dict[str, object]:
    """What the card says of the training."""
    recipe = trainer.recipe
    steps = trainer.steps
    others = ", ".join(f"{name}/" for name in trainer.objective.others())
    facts: dict[str, object] = {
        "Encoder": encoder_text(trainer.objective.shipped_config()),
        "Images": images_text(trainer.images),
        "Updates": f"{steps.total} of {recipe.batch_size} images, {steps.warmup} of them warm-up",
        "Every setting": "recipe.json",
    }
    if others:
        facts["Beside it"] = others
    return facts


# ---- before


def _check_data(output: Path, images: ImageDataset | ImageStream) -> None:
    """ValueError where the run in a folder was begun with other images."""
    if (output / RECORD).exists() and isinstance(images, ImageDataset):
        check_data_record(output / RECORD, images)


def shape_of(config: MimRefinerConfig, objective: str) -> dict[str, int]:
    """The fields of a method's recipe that an encoder to go on from decides.

    Raises:
        ValueError: for an encoder of images that are no squares.
    """
    height, width = config.image_hw
    if height != width:
        raise ValueError(
            f"{setting('init_from')}: the encoder's images are {height}x{width}; pre-training "
            "takes squares"
        )
    own = {}
    if objective == "capi":
        own["registers"] = config.num_register_tokens
        # one block is what a folder of ours has kept; it takes the recipe's number
        if config.predictor_layers > 1:
            own["predictor_layers"] = config.predictor_layers
    return own | {
        "image_size": height,
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
    }


def _check_channels(count: int, images: ImageDataset | ImageStream) -> None:
    """ValueError for images of another number of channels than the recipe's."""
    if not isinstance(images, ImageDataset):
        return
    own = channels_of(images)
    if own is None and not is_picture(count):
        raise ValueError(
            f"{setting('num_channels', count)}: {images.name} holds pictures, of 3 channels or 1, "
            "not arrays, .npy files or TIFFs of so many; leave it out"
        )
    if own not in (None, count):
        raise ValueError(
            f"{setting('num_channels', count)}: those of {images.name} have {own} channels; say "
            f"{setting('num_channels', own)}"
        )


def fitted_to_method(
    encoder: MimRefinerModel, recipe: PretrainRecipe, named: str
) -> MimRefinerModel:
    """The encoder, if the method can train it; without weights that pool and would stay behind.

    Args:
        named: what messages call it.

    Raises:
        ValueError: for one that the method cannot train, or of another shape than the recipe's.
    """
    config = encoder.config
    if config.erased_directions:
        fields = ", ".join(map(one_line, config.erased or ()))
        raise ValueError(
            f"{named}: a refinement has erased {fields} from its features, which pre-training "
            "would undo; name the encoder that the refinement began with"
        )
    for name, value in shape_of(config, recipe.objective).items():
        if getattr(recipe, name) != value:
            stated = setting(name, getattr(recipe, name))
            raise ValueError(f"{stated}: {named} has {value}; leave {setting(name)} out")

    method = setting("objective", recipe.objective)
    if recipe.objective in ("mae", "data2vec2") and config.relative_positions != "none":
        raise ValueError(
            f"{named}: it has relative positions, and {method} leaves patches out; name an "
            "encoder with absolute or rotary positions"
        )
    is_stored_rope = config.position_encoding == "rope" and config.rope_theta is None
    if recipe.objective == "capi" and not is_stored_rope:
        raise ValueError(
            f"{named}: its positions are {config.position_encoding}, and {method} needs rope with "
            "frequencies that are stored, as CAPI's own encoders have it"
        )
    if recipe.objective == "data2vec2" and not config.use_cls_token:
        raise ValueError(f"{named}: it has no CLS token, which {method} trains; name another one")

    pooling: Pooling | None = recipe.pooling
    missing = None if pooling is None else config.missing_for(pooling)
    if missing:
        raise ValueError(f"{setting('pooling', pooling)}: {named} has {missing}; leave it out")
    if recipe.objective in ("mae", "data2vec2") and config.pooling in LEARNED_POOLINGS:
        pooling = pooling or ("cls" if config.use_cls_token else "mean")
        logger.warning(
            "%s: %s trains no weights that pool: they are left out, and the result is pooled by %s",
            named,
            method,
            pooling,
        )
        encoder.drop_predictor()
    if pooling is not None:
        config.pooling = pooling
    return encoder


def is_finished(output: Path, record: PretrainingRecord) -> bool:
    """Whether the folder holds the finished model of this very recipe, weights and all.

    Raises:
        ValueError: where it holds another model, which would be overwritten.
    """
    if not (output / "config.json").is_file() or not any(output.glob("*.safetensors")):
        return False
    if _changes(output, record) == []:
        return True
    raise ValueError(
        f"{setting('output_dir', output)}: holds a model already, of another recipe or origin; "
        "name another folder, or remove it"
    )


def check_pretraining_folder(output: Path, record: PretrainingRecord) -> Path:
    """`output`, resolved, if this pre-training may write there: new, empty, or begun by it.

    Raises:
        ValueError: for something else, or a pre-training of another recipe, naming the fields.
    """
    output = Path(output).resolve()
    changes = _changes(output, record)
    if changes is None:
        return check_model_folder(output)
    if changes:
        raise ValueError(
            f"{setting('output_dir', output)}: holds a pre-training of another recipe "
            f"({'; '.join(changes)}); name another folder or remove it"
        )
    return output


def _changes(output: Path, record: PretrainingRecord) -> list[str] | None:
    """How the recipe of the pre-training in a folder differs; None where there is none."""
    begun = saved_recipe(output)
    if begun is None:
        return None
    if begun.get("head_blocks") is not None:
        raise ValueError(
            f"{setting('output_dir', output)}: holds a refinement; name another folder or remove it"
        )
    # a version that did not know a field did what its default does
    defaults = {field.name: field.default for field in dataclasses.fields(PretrainRecipe)}
    written = record.as_written()
    changes = []
    for name in sorted(begun.keys() | written.keys()):
        before = begun.get(name, defaults.get(name))
        now = written.get(name)
        if before != now and not (name == "init_from" and same_place(before, now)):
            changes.append(f"{name} was {before}, is {now}")
    # another method has other settings
    of_method = [change for change in changes if change.startswith("objective ")]
    return of_method or changes


# ---- on the way


def _knn(model: MimRefinerModel, trainer: Pretrainer) -> dict[str, float]:
    """The k-NN accuracy of a tenth of the images by the others."""
    assert isinstance(trainer.images, ImageDataset)
    bank, queries = hold_out(trainer.images, _MEASURED, trainer.recipe.seed)
    loading = Loading(num_workers=trainer.options.num_workers)
    seed = trainer.recipe.seed
    evaluation = evaluate_encoder(
        model, trainer.processor, bank, queries, seed=seed, loading=loading, per_block=False
    )
    return {"knn_accuracy": float(evaluation.metrics["knn_accuracy"])}
