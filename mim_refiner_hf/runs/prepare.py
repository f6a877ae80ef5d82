"""Everything that a run needs, opened and checked before any work: data, weights, settings, folder.

    recipe = RefineRecipe(model="facebook/vit-mae-large", dataset="my_images/", output_dir="out")
    prepared = prepare(recipe)
    prepared.recipe, prepared.resume      # all settings; the checkpoint to go on from

Whatever is wrong is a ValueError or FileNotFoundError that names the setting and what is allowed.
"""

import copy
import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..conversion import load_encoder
from ..conversion.licence import UNKNOWN, Licence, agreed_licence
from ..conversion.preprocessing import image_processor
from ..data.classes import with_one_class_table
from ..data.fingerprint import RECORD, check_data_record
from ..data.found import SourceOptions
from ..data.images import ImageDataset, hold_out, open_images
from ..data.stream import ImageStream, open_stream
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..pretraining.auto import fit_to_images
from ..pretraining.loop import fitted_processor
from ..pretraining.recipe import PretrainRecipe
from ..publishing.run_file import Erased
from ..refinement.auto import choose_eval_fraction
from ..refinement.recipe import RefineRecipe
from ..refinement.resolve import ResolvedRecipe, resolve
from ..runtime.checkpoint import Checkpoint, load_latest
from ..runtime.device import check_compile, uses_bf16
from ..runtime.files import check_folder
from ..runtime.ranks import stated_processes
from ..runtime.settings import read_fields
from ..runtime.sharding import fsdp2_requested
from ..runtime.wording import setting
from .begun import as_begun, check_as_begun, check_output
from .channels import fit_channels
from .fields import RunFields, check_same_fields, open_fields, settle_fields
from .head_choice import check_measurable
from .init_from import check_heads_fit, encoder_of, open_start, with_its_blocks

logger = logging.getLogger(__name__)

# Folder of the encoder that a run with `--pretrain` starts from.
PRETRAINED = "pretrained"
# Of what any other run starts from, until it has ended.
START = "start"


@dataclass(frozen=True)
class Given:
    """Objects that stand where a recipe has their names; None where it names what is meant.

    Attributes:
        images: what is refined on.
        evaluation: what is measured on.
        encoder: the starting weights; it is trained, so it belongs to the run.
    """

    images: ImageDataset | None = None
    evaluation: ImageDataset | None = None
    encoder: MimRefinerModel | None = None


NOTHING = Given()
"""For a recipe that names all that it needs."""


@dataclass(frozen=True)
class RunImages:
    """The images of a run.

    Attributes:
        training: what is refined on.
        evaluation: what is measured on, never trained on; None for no evaluation.
        bank: for k-NN, and to choose head blocks on; None for a stream without evaluation.
    """

    training: ImageDataset | ImageStream
    evaluation: ImageDataset | None
    bank: ImageDataset | None


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        config, processor: of the encoder.
        encoder: None where it is still to be pre-trained.
        pretraining: how it is pre-trained, if it is.
        licence: of the weights, and so of the result; else as the recipe states it.
        checkpoint: of another run, whose heads and queues come along (`init_from.py`).
        channels: what was done to fit it to the channels of the images; "" for nothing.
        name: by which `load_encoder` gives the same encoder; "" where nothing does.
    """

    config: MimRefinerConfig
    processor: Any
    licence: Licence
    encoder: MimRefinerModel | None = None
    pretraining: PretrainRecipe | None = None
    checkpoint: Checkpoint | None = None
    channels: str = ""
    name: str = ""


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs, checked.

    Attributes:
        resume: the checkpoint to go on from.
        fields: metadata to forget and to keep.
    """

    recipe: ResolvedRecipe
    start: Start
    images: RunImages
    resume: Checkpoint | None
    fields: RunFields | None = None

    @property
    def start_step(self) -> int:
        """The first step that is still to be done."""
        return 0 if self.resume is None else self.resume.step

    @property
    def erased_directions(self) -> int:
        """How many directions of its features the run erases, at most."""
        return 0 if self.fields is None else self.fields.directions

    def erase(self, encoder: MimRefinerModel) -> Erased | None:
        """Let the trained encoder erase what the run is to erase, in place; None for nothing.

        It needs no checkpoint: a run that was interrupted comes to the same.
        """
        if self.fields is None:
            return None
        images = self.images.training
        # a stream has no fields
        assert isinstance(images, ImageDataset)
        recipe = self.recipe
        workers = recipe.num_workers
        return self.fields.erase(
            encoder, images, self.start.processor, seed=recipe.seed, num_workers=workers
        )

    def with_eraser(self, encoder: MimRefinerModel) -> MimRefinerModel:
        """What would ship of an encoder on the way: a copy that erases; itself for nothing."""
        if not self.erased_directions:
            return encoder
        encoder = copy.deepcopy(encoder)
        self.erase(encoder)
        return encoder


def prepare(recipe: RefineRecipe, given: Given = NOTHING) -> Prepared:
    """Open data and weights, fill in the recipe, and check it against machine and folder."""
    # what the machine cannot do is said before anything is downloaded
    fsdp2_requested()
    bf16 = uses_bf16(recipe.mixed_precision)
    check_compile(recipe.compile)

    output = Path(recipe.output_dir)
    check_output(output, recipe)
    recipe = as_begun(recipe, output)
    training, evaluation = open_run_images(recipe, num_channels=3, given=given)
    fields = open_fields(recipe, training)
    resume = None if recipe.dry_run else load_latest(output / "checkpoints")
    start = _with_channels(open_starting_weights(recipe, resume, given), training, recipe)
    if start.checkpoint is not None:
        recipe = with_its_blocks(recipe, start.checkpoint)
    if start.config.num_channels != 3:
        training, evaluation = open_run_images(recipe, start.config.num_channels, given)
    images = _with_bank(training, evaluation, recipe.seed)
    if fields is not None:
        fields = settle_fields(fields, recipe, start.config)

    num_images = len(training) if isinstance(training, ImageDataset) else None
    processes = stated_processes()
    gpu = torch.accelerator.is_available()
    neighbours = () if fields is None else fields.about_neighbours
    resolved = resolve(recipe, start.config, num_images, processes, bf16, gpu, neighbours)
    if "head_blocks" in resolved.to_measure:
        check_measurable(images.bank)
    if start.pretraining is not None:
        pretraining = _fitted(start.pretraining, recipe.pretrain, num_images)
        start = dataclasses.replace(start, pretraining=pretraining)

    # the output folder, and a run that it may hold
    check_as_begun(output, resolved)
    check_start_folder(start_folder(resolved))
    if start.checkpoint is not None and resume is None:
        check_heads_fit(resolved, start.checkpoint)
    if recipe.stage == "refine" and not recipe.dry_run and start.checkpoint is None:
        _check_warm_heads(recipe.output_dir, resume, resolved.steps.warmup)
    record = output / RECORD
    if resume is not None and isinstance(training, ImageDataset) and record.exists():
        check_data_record(record, training)
    if resume is not None:
        check_same_fields(fields, resume, recipe)
    return Prepared(resolved, start, images, resume, fields)


def open_starting_weights(
    recipe: RefineRecipe, resume: Checkpoint | None, given: Given = NOTHING
) -> Start:
    """The encoder that was given, or that the recipe names (`model`, `init_from`, `pretrain`)."""
    if recipe.pretrain is not None:
        fields = read_fields(recipe.pretrain, PretrainRecipe, "pretrain")
        pretraining = PretrainRecipe(**{**fields, "seed": recipe.seed})
        config = pretraining.encoder_config()
        processor = image_processor(config, {})
        licence = _licence(recipe, UNKNOWN, f"what {setting('pretrain', recipe.pretrain)} trains")
        return Start(config, processor, licence, pretraining=pretraining)

    checkpoint = None
    if recipe.init_from is not None:
        # once begun, a run needs the other one no more
        checkpoint = resume or open_start(recipe.init_from)
        encoder = encoder_of(checkpoint)
    else:
        assert recipe.model is not None
        encoder = given.encoder or load_encoder(recipe.model, family=recipe.family)
    licence = _licence(recipe, vars(encoder)["licence"], recipe.model or recipe.init_from)
    _check_preprocessing(encoder, recipe.model or recipe.init_from)
    named = recipe.model is not None and given.encoder is None and recipe.family is None
    return Start(
        encoder.config,
        encoder.image_processor,
        licence,
        encoder,
        checkpoint=checkpoint,
        name=str(recipe.model) if named else "",
    )


def _check_preprocessing(encoder: MimRefinerModel, source: object) -> None:
    """Whether the model's own preprocessing fits it: start and result are judged by it."""
    config = encoder.config
    if config.num_channels not in (1, 3):
        return

    mode = "L" if config.num_channels == 1 else "RGB"
    image = Image.new(mode, (40, 30))
    processor = vars(encoder)["image_processor"]
    pixels = processor([image], return_tensors="pt")["pixel_values"]
    made = tuple(pixels.shape[-2:])
    if made != tuple(config.image_hw):
        height, width = config.image_hw
        raise ValueError(
            f"{setting('model', source)}: its preprocessing makes images "
            f"of {made[0]}x{made[1]}, but its native size is {height}x{width}; mend size and "
            "crop_size in its preprocessor_config.json"
        )


def _licence(recipe: RefineRecipe, found: Licence, source: object) -> Licence:
    """The licence of the result; a ValueError where it is not known and has to be."""
    return agreed_licence(found, recipe.license, source, recipe.push_to_hub is not None)


def _with_channels(
    start: Start, training: ImageDataset | ImageStream, recipe: RefineRecipe
) -> Start:
    """The start, fitted to the number of channels of the images."""
    if start.encoder is None:
        for name in ("num_channels", "value_range"):
            if getattr(recipe, name) is not None:
                raise ValueError(
                    f"{setting(name, getattr(recipe, name))}: the pre-training recipe says what "
                    f"the encoder reads; set num_channels in {setting('pretrain', recipe.pretrain)}"
                )
        return dataclasses.replace(start, processor=fitted_processor(start.config, training))

    encoder, done = fit_channels(start.encoder, training, recipe.num_channels, recipe.value_range)
    processor = vars(encoder)["image_processor"]
    return dataclasses.replace(
        start,
        config=encoder.config,
        processor=processor,
        encoder=encoder,
        channels=done,
        name="" if done else start.name,
    )


def open_run_images(
    recipe: RefineRecipe, num_channels: int, given: Given = NOTHING
) -> tuple[ImageDataset | ImageStream, ImageDataset | None]:
    """The images to train on and those to evaluate on; the latter are never trained on."""
    config = recipe.dataset_config
    options = SourceOptions(recipe.image_column, recipe.label_column, recipe.follow_links)
    evaluation = None
    if recipe.eval_dataset is not None or recipe.eval_split is not None:
        name = recipe.eval_dataset or recipe.dataset
        # a configuration belongs to its own data set
        evaluation = open_images(
            given.evaluation or name,
            config=config if name == recipe.dataset else None,
            split=recipe.eval_split,
            num_channels=num_channels,
            options=options if name == recipe.dataset else options.of_another_data_set(),
        )
    if recipe.streaming:
        stream = open_stream(
            recipe.dataset,
            config=config,
            split=recipe.split,
            num_channels=num_channels,
            options=options,
        )
        return stream, evaluation

    images = open_images(
        given.images or recipe.dataset,
        config=config,
        split=recipe.split,
        num_channels=num_channels,
        options=options,
    )
    if len(images) < 2:
        raise ValueError(
            f"{setting('dataset', recipe.dataset)}: {len(images)} image(s) found; "
            "contrastive refinement needs at least 2"
        )
    if evaluation is not None and evaluation.fingerprint == images.fingerprint:
        raise ValueError(
            f"{setting('eval_dataset', evaluation.name)}: these are the images to train on; name "
            f"others, another {setting('eval_split')}, or leave both out to hold some back"
        )
    if evaluation is not None:
        return images, evaluation
    share = recipe.eval_fraction
    if share is None:
        share = choose_eval_fraction(len(images)).value
    if share == 0:
        return images, None
    return hold_out(images, share, recipe.seed)


def _with_bank(
    training: ImageDataset | ImageStream, evaluation: ImageDataset | None, seed: int
) -> RunImages:
    """The images with a k-NN bank: the training images, or of a stream half of the others."""
    bank = training if isinstance(training, ImageDataset) else None
    if evaluation is None:
        return RunImages(training, None, bank)
    if bank is None:
        # a stream is gone once read
        bank, evaluation = hold_out(evaluation, 0.5, seed)
    bank, evaluation = with_one_class_table(bank, evaluation)
    return RunImages(training, evaluation, bank)


def _fitted(
    pretraining: PretrainRecipe, name: str | None, num_images: int | None
) -> PretrainRecipe:
    """The pre-training for so many images; ValueError for fewer than a batch of it."""
    if num_images is None:
        raise ValueError(
            f"{setting('pretrain')} needs a data set of known length; "
            f"leave out {setting('streaming')}"
        )
    pretraining = fit_to_images(pretraining, num_images)
    if pretraining.batch_size > num_images:
        raise ValueError(
            f"{setting('pretrain', name)}: its batch_size {pretraining.batch_size} exceeds the "
            f"{num_images} images; name a YAML file that bases on it (base: NAME) with another one"
        )
    return pretraining


def _check_warm_heads(output_dir: str, resume: Checkpoint | None, warmup: int) -> None:
    """Whether the folder of a `--stage refine` holds heads that are warm."""
    if warmup and (resume is None or resume.step < warmup):
        raise ValueError(
            f"{setting('stage', 'refine')}: {output_dir} has no warmed-up heads; "
            f"run {setting('stage', 'warmup')} first, or {setting('stage', 'both')}"
        )


def start_folder(recipe: ResolvedRecipe) -> Path:
    """Where a run keeps the encoder that it starts from, to be judged by and perhaps to ship."""
    name = START if recipe.asked.pretrain is None else PRETRAINED
    return Path(recipe.output_dir) / name


def check_start_folder(folder: Path) -> Path:
    """`folder`, resolved, if the starting encoder can be written there.

    It is absent, empty or holds a model.
    """
    return check_folder(folder, "config.json", "model")
