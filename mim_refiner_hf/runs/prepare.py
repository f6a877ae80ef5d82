"""Everything that a run needs, opened and checked before any work: data, weights, recipe, device, output folder.

    prepared = prepare(RefineRecipe(model="facebook/vit-mae-large", dataset="my_images/", output_dir="out"))
    prepared.recipe, prepared.steps, prepared.found            # filled in; updates per stage; the checkpoint to go on from

Whatever is wrong is a ValueError or FileNotFoundError that names the setting and what is allowed.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..conversion import load_encoder
from ..conversion.load import image_processor
from ..data.fingerprint import RECORD, check_data_record
from ..data.images import ImageDataset, ImageStream, hold_out, open_images, open_stream
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..pretraining.mae import PretrainRecipe
from ..refinement.recipe import RefineRecipe
from ..refinement.resolve import Steps, count_steps, resolve
from ..runtime.checkpoint import Checkpoint, load_latest
from ..runtime.device import check_compile, uses_bf16
from ..runtime.files import check_folder
from ..runtime.lock import check_writable
from ..runtime.settings import read_fields
from ..runtime.sharding import fsdp2_requested
from .head_choice import check_measurable
from .init_from import check_heads, encoder_of, open_start, with_its_blocks

# Fields that may differ when a run is continued: they say where and how it runs, not what is computed.
FREE_FIELDS = frozenset(
    [
        "recipe",
        "max_bad_fraction",
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
PRETRAINED = "pretrained"  # folder of the encoder that a run with `--pretrain` starts from


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs, checked; `encoder` is None where it is still to be pre-trained, `bank` is for k-NN, `found` is
    the checkpoint to go on from, `start` another run's to begin with (`init_from.py`)."""

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
    start: Checkpoint | None = None

    @property
    def num_images(self) -> int | None:
        """Images to train on; None for a stream."""
        return len(self.images) if isinstance(self.images, ImageDataset) else None


def prepare(recipe: RefineRecipe) -> Prepared:
    """Open data and weights, fill in the recipe, and check it against both, the device and the output folder."""
    fsdp2_requested()
    uses_bf16(recipe.mixed_precision)
    check_compile(recipe.compile)
    images, eval_images = open_data(recipe, num_channels=3)
    found = None if recipe.dry_run else load_latest(Path(recipe.output_dir) / "checkpoints")
    pretraining = encoder = start = None
    processor: Any
    if recipe.pretrain is not None:
        pretraining = PretrainRecipe(
            **{**read_fields(recipe.pretrain, PretrainRecipe, "pretrain"), "seed": recipe.seed}
        )
        config = pretraining.encoder_config()
        processor = image_processor(config, {})
    elif recipe.init_from is not None:
        start = found or open_start(
            recipe.init_from
        )  # once begun, a run needs the other one no more
        encoder, recipe = encoder_of(start), with_its_blocks(recipe, start)
        config, processor = encoder.config, encoder.image_processor
    else:
        assert recipe.model is not None
        encoder = load_encoder(recipe.model, family=recipe.family)
        config, processor = encoder.config, encoder.image_processor
    if config.num_channels != 3:
        images, eval_images = open_data(recipe, num_channels=config.num_channels)
    bank = images if isinstance(images, ImageDataset) else None
    if (
        bank is None and eval_images is not None
    ):  # a stream is gone once read: half of the evaluation images are the bank
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
    if pretraining is not None:
        check_start(Path(recipe.output_dir) / PRETRAINED)
    if start is not None and found is None:
        check_heads(recipe, start)
    done = None if found is None else found.step
    if (
        recipe.stage == "refine"
        and not recipe.dry_run
        and start is None
        and (done is None or done < steps.warmup)
    ):
        raise ValueError(
            f"--stage refine: {recipe.output_dir} has no warmed-up heads; run --stage warmup first, or --stage both"
        )
    record = Path(recipe.output_dir) / RECORD
    if found is not None and isinstance(images, ImageDataset) and record.exists():
        check_data_record(record, images)
    return Prepared(
        recipe,
        config,
        encoder,
        pretraining,
        processor,
        images,
        eval_images,
        bank,
        steps,
        found,
        start,
    )


def open_data(
    recipe: RefineRecipe, num_channels: int
) -> tuple[ImageDataset | ImageStream, ImageDataset | None]:
    """The images to train on and those to evaluate on; the latter are never trained on."""
    where = {"config": recipe.dataset_config, "num_channels": num_channels}
    evaluate = None
    if recipe.eval_dataset is not None or recipe.eval_split is not None:
        same = recipe.eval_dataset in (None, recipe.dataset)
        eval_where = where if same else {"num_channels": num_channels}
        evaluate = open_images(
            recipe.eval_dataset or recipe.dataset, split=recipe.eval_split, **eval_where
        )
    if recipe.streaming:
        return open_stream(recipe.dataset, split=recipe.split, **where), evaluate  # type: ignore[arg-type]
    images = open_images(recipe.dataset, split=recipe.split, **where)  # type: ignore[arg-type]
    if len(images) < 2:
        raise ValueError(
            f"--dataset {recipe.dataset}: {len(images)} image(s) found; contrastive refinement needs at least 2"
        )
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
    check_writable(output, "--output_dir")
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


def check_start(folder: Path) -> Path:
    """`folder`, resolved, if the pre-trained encoder can be written there: it is absent, empty or holds a model."""
    return check_folder(folder, "config.json", "model")


__all__ = ["PRETRAINED", "Prepared", "check_output", "check_start", "open_data", "prepare"]
