"""The loop of every pre-training: steps, checkpoints and exact resume, signals, log.

    objective = pretrain(PretrainRecipe(image_size=32, patch_size=4), open_images("my_images/"))
    encoder = objective.shipped()

    pretrain(recipe, images, accelerator, LoopOptions(save_every=500), folder=Path("out"))

Step s takes batch s of the data order, and everything random in it is a pure function of the seed,
s and the samples. So a checkpoint is the weights, the optimisers and the number s, and the same
call goes on from the newest one in `folder`/checkpoints, bit by bit as if nothing had happened.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from accelerate import Accelerator
from torch import Tensor

from ..clustering.channels import is_picture
from ..conversion.preprocessing import image_processor
from ..data.batches import batches_of_views
from ..data.broken import BROKEN, BrokenImages
from ..data.channels import measure_channels
from ..data.images import ImageDataset
from ..data.loading import ImageProcessor
from ..data.stream import ImageStream
from ..data.views import normalise
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.image_processing_mim_refiner import MimRefinerImageProcessor
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.arithmetic import arithmetic, say_changes
from ..runtime.attention import attend_in_fp32
from ..runtime.checkpoint import (
    Checkpoint,
    check_tensors,
    load_latest,
    place_tensors,
    save_checkpoint,
    size_of,
)
from ..runtime.device import uses_bf16
from ..runtime.distributed import (
    average_gradients,
    finite_everywhere,
    progress_bar,
    rank,
    world_size,
)
from ..runtime.files import in_bytes
from ..runtime.launch import job_of_processes
from ..runtime.optimisation import optimizer_tensors, recompute_blocks, restore_optimizers
from ..runtime.pace import Pace
from ..runtime.sharding import fsdp2_requested, gather_into
from ..runtime.signals import Interrupted, StopSignals
from ..runtime.tracking import JsonlTracker, LogCallback
from ..runtime.wording import setting
from .auto import fit_to_images
from .loop_options import LoopOptions
from .objective import Losses, Objective
from .objectives import make_objective
from .recipe import PretrainRecipe, changed_settings
from .sharded import clip_gradients, gradient_norm, shard_networks

logger = logging.getLogger(__name__)

# Folder of the checkpoints in that of a pre-training.
CHECKPOINTS = "checkpoints"

Evaluate = Callable[[MimRefinerModel], dict[str, float]]
"""Measures an encoder, in eval mode, on the way."""


class Pretrainer:
    """Networks, data and folder of one pre-training, and the loop over its steps.

    Args:
        folder: for checkpoints, log and the list of broken images; None keeps nothing.
        encoder: to go on from; None for fresh weights.
        evaluate: called after every `eval_every`-th epoch.
        callbacks: called with (step, values) for every line of the log.
    """

    def __init__(
        self,
        recipe: PretrainRecipe,
        images: ImageDataset | ImageStream,
        accelerator: Accelerator,
        options: LoopOptions,
        folder: Path | None = None,
        encoder: MimRefinerModel | None = None,
        evaluate: Evaluate | None = None,
        callbacks: Sequence[LogCallback] = (),
    ) -> None:
        length = len(images) if isinstance(images, ImageDataset) else None
        recipe = fit_to_images(recipe, length)
        if recipe.batch_size % world_size():
            raise ValueError(
                f"{setting('batch_size', recipe.batch_size)}: {world_size()} processes share it; "
                "give a multiple of their number"
            )
        self.recipe = recipe
        self.callbacks = callbacks
        self.images = images
        self.accelerator = accelerator
        self.options = options
        self.folder = folder
        self.evaluate = evaluate
        self.steps = recipe.steps(length)
        # the preprocessing that the model is used with afterwards
        own = {} if encoder is None else vars(encoder)
        objective = make_objective(recipe, self.steps, encoder)
        config = objective.encoder.config
        own_processor: ImageProcessor | None = own.get("image_processor")
        self.processor = own_processor or cast(ImageProcessor, fitted_processor(config, images))

        objective.bf16 = uses_bf16(options.mixed_precision)
        if objective.bf16:
            attend_in_fp32(objective)
        if options.gradient_checkpointing:
            recompute_blocks(objective.encoder)
        self.objective: Objective = objective.to(accelerator.device).train()
        self.sharded = fsdp2_requested() and world_size() > 1
        if self.sharded:
            shard_networks(self.objective)
        listed = None if folder is None else folder / BROKEN
        self.broken = BrokenImages(images, options.max_bad_fraction, listed)
        self.seconds = 0.0
        self._arithmetic = arithmetic(options.micro_batch_size, objective.bf16)
        self._size_said = False

    # ---- the loop

    def fit(self) -> Objective:
        """Run all steps that are still to be done; the trained networks, in eval mode.

        Raises:
            Interrupted: after a checkpoint, when a signal asked the run to stop.
            FloatingPointError: before the update of a step that is not finite.
            ValueError: for a batch larger than the data set, or too many broken images.
        """
        total = self.steps.total
        start = self._resume()
        batches = batches_of_views(
            self.images,
            self.objective.crops(),
            batch_size=self.recipe.batch_size,
            seed=self.recipe.seed,
            start_step=start,
            stop_step=total,
            num_workers=self.options.num_workers,
            value_range=self.value_range,
        )
        log = self._log_file(start)
        began = time.perf_counter() - self.seconds
        name = f"pre-training ({self.recipe.objective})"
        pace = Pace()
        hidden = not self.accelerator.is_local_main_process
        bar = progress_bar(total=total, initial=start, desc=name, unit="step", hidden=hidden)
        with bar as progress, StopSignals() as signals:
            for step, batch in enumerate(batches, start):
                losses = self.update(step, batch)
                self.broken.add(batch["broken"])

                # all processes agree on what is due after this step
                done = step + 1
                ends = done == total
                received = 0 if ends else signals.agreed(self.accelerator.device)
                logs = ends or step % self.options.log_every == 0
                saves = bool(received) or self._saves_after(done)
                if logs or saves:
                    self.broken.share(images_read=done * self.recipe.batch_size)
                self.seconds = time.perf_counter() - began
                progress.update()
                line = pace.after(name, total - done)
                if line:
                    self.accelerator.print(line, flush=True)

                if logs:
                    values = self._values(losses, done)
                    progress.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
                    self._log(log, values, done)
                if self._evaluates_after(done):
                    self._log(log, self._measured(), done)
                if saves:
                    self.save(done)
                if received:
                    raise Interrupted(received, self._interrupted(done))
        logger.info("pre-trained %d steps in %.0f s", total, self.seconds)
        trained = self.whole()
        for model in (trained.shipped(), *trained.others().values()):
            model.requires_grad_(True)
        return trained.eval()

    @property
    def value_range(self) -> Sequence[float] | None:
        """Of images that are no pictures, what becomes 0 and 255."""
        values: Sequence[float] | None = getattr(self.processor, "value_range", None)
        return values

    def whole(self) -> Objective:
        """The networks as one process has them; under FSDP2 a copy, whole in every process."""
        if not self.sharded:
            return self.objective
        encoder = MimRefinerModel(self.objective.encoder.config)
        objective = make_objective(self.recipe, self.steps, encoder)
        gather_into(objective, self.objective)
        return objective.to(self.accelerator.device)

    def update(self, step: int, batch: dict[str, Tensor]) -> Losses:
        """One update of the networks on this process's share of a batch.

        Raises:
            FloatingPointError: before the update, if a loss or a gradient is not finite.
        """
        device = self.accelerator.device
        views = batch["global_views"].to(device)
        pixels = normalise(views, self.processor.image_mean, self.processor.image_std)
        masks = self.objective.masks(step, batch["index"].tolist())
        masks = {name: tensor.to(device) for name, tensor in masks.items()}

        self.objective.set_schedules(step)
        for optimizer in self.objective.optimizers:
            optimizer.zero_grad()
        losses = self.objective.backward(pixels, masks, self.options.micro_batch_size)
        average_gradients(self.objective.parameters())
        self._check(losses, step)
        self._clip()
        self.objective.step_optimizers()
        return losses

    def _check(self, losses: Losses, step: int) -> None:
        """FloatingPointError in all processes if a loss or a gradient of any is not finite."""
        norm = gradient_norm(self.objective.parameters())
        if finite_everywhere(norm, *losses.values()):
            return

        shown = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
        raise FloatingPointError(
            f"the pre-training is not finite in step {step} ({shown}, gradient {norm.item():g}); "
            f"the weights were not updated; lower its {setting('learning_rate')}, or use "
            f"{setting('mixed_precision', 'no')}"
        )

    def _clip(self) -> None:
        """Clip the gradients of every optimiser to the recipe's norm."""
        if not self.recipe.clip_norm:
            return
        for optimizer in self.objective.optimizers:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            clip_gradients(parameters, self.recipe.clip_norm)

    def _saves_after(self, done: int) -> bool:
        """Whether a checkpoint is due after `done` steps; one always stands at the end."""
        every = self.options.save_every
        if every is None:
            every = min(max(self.steps.total // 10, 1), 500)
        if self.folder is None or not every:
            return False
        return done == self.steps.total or done % every == 0

    def _interrupted(self, done: int) -> str:
        """What to say of a run that a signal ended."""
        if self.folder is None:
            return f"the pre-training stopped after step {done} of {self.steps.total}; it kept none"
        return (
            f"the pre-training stopped after step {done} of {self.steps.total}; "
            "the same command goes on from the checkpoint there"
        )

    # ---- what it says

    def _log_file(self, start: int) -> JsonlTracker | None:
        if self.folder is None:
            return None
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        log = JsonlTracker(self.folder / "log.jsonl", start, self.callbacks)
        log.start()
        return log

    @staticmethod
    def _log(log: JsonlTracker | None, values: dict[str, float], done: int) -> None:
        if log is not None:
            log.log(values, step=done)

    def _values(self, losses: Losses, done: int) -> dict[str, float]:
        """One line of the log: losses over all processes, rate, speed, seconds to go."""
        values = {}
        for name, value in losses.items():
            values[name] = float(self.accelerator.reduce(value.detach(), "mean"))
        seconds = self.seconds / done
        rate = max(group["lr"] for group in self.objective.optimizers[0].param_groups)
        return values | {
            "learning_rate": float(rate),
            "images_per_second": self.recipe.batch_size / seconds,
            "broken_images": float(len(self.broken)),
            "seconds_left": (self.steps.total - done) * seconds,
        }

    def _evaluates_after(self, done: int) -> bool:
        every = self.options.eval_every
        if not every or self.evaluate is None:
            return False
        return done % (every * self.steps.per_epoch) == 0

    def _measured(self) -> dict[str, float]:
        """What `evaluate` says of the encoder that would ship."""
        assert self.evaluate is not None
        measured = self.evaluate(self.whole().eval().shipped())
        self.objective.train()
        return measured

    # ---- what it keeps

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` steps; SaveError on every process if that fails."""
        if self.folder is None:
            return
        folder = self.folder / CHECKPOINTS
        state = {
            "pretraining": dataclasses.asdict(self.recipe),
            "seconds": self.seconds,
            "arithmetic": self._arithmetic,
            "broken": self.broken.entries,
        }
        tensors = self.tensors() | optimizer_tensors(*self.objective.optimizers)
        keep = self.options.save_total_limit
        path = save_checkpoint(folder, step=done, tensors=tensors, state=state, keep=keep)

        if not self._size_said and self.accelerator.is_main_process:
            self._size_said = True
            size = in_bytes(size_of(path))
            print(f"checkpoints (pre-training): {size} each in {folder}, {keep} kept", flush=True)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the optimisers."""
        state = self.objective.state_dict()
        return {f"objective.{name}": tensor for name, tensor in state.items()}

    def _resume(self) -> int:
        """Stand where the newest checkpoint was written; its step, or 0.

        Raises:
            ValueError: for a checkpoint of another recipe, or that does not fit (CheckpointError).
        """
        found = None if self.folder is None else load_latest(self.folder / CHECKPOINTS)
        if found is None:
            return 0
        check_same_recipe(found, self.recipe)
        check_tensors(found, self.tensors())
        restore_optimizers(self.objective.optimizers, found)
        place_tensors(self.objective, found, "objective.")

        begun = found.state["arithmetic"]
        say_changes(begun, self._arithmetic)
        self._arithmetic = begun
        self.seconds = float(found.state["seconds"])
        self.broken.add(found.state["broken"])
        self.broken.share(images_read=found.step * self.recipe.batch_size)
        self.accelerator.print(
            f"the pre-training goes on after step {found.step} of {self.steps.total}", flush=True
        )
        return found.step


def fitted_processor(
    config: MimRefinerConfig, images: ImageDataset | ImageStream
) -> MimRefinerImageProcessor:
    """The preprocessing for an encoder that is trained from nothing on these images.

    ImageNet's for photos; of other numbers of channels than 3 and 1, range, means and deviations
    are measured.

    Raises:
        ValueError: for a stream of images that are no pictures.
    """
    channels = config.num_channels
    if is_picture(channels):
        return image_processor(config, {})
    if not isinstance(images, ImageDataset):
        raise ValueError(
            f"{setting('num_channels', channels)}: the range of the values is measured, which "
            f"takes a data set of known length; leave out {setting('streaming')}"
        )
    measured = measure_channels(images, channels, None)
    scaling = {"image_mean": measured.mean, "image_std": measured.std}
    return image_processor(config, scaling | {"value_range": list(measured.value_range)})


def check_same_recipe(checkpoint: Checkpoint, recipe: PretrainRecipe) -> None:
    """A ValueError, naming the fields, for a checkpoint of another pre-training."""
    changes = changed_settings(checkpoint.state.get("pretraining", {}), recipe)
    if changes:
        raise ValueError(
            f"{checkpoint.path.parent} holds a pre-training of another recipe "
            f"({'; '.join(changes)}); name another {setting('output_dir')}, or remove it"
        )


def pretrain(
    recipe: PretrainRecipe,
    images: ImageDataset | ImageStream,
    accelerator: Accelerator | None = None,
    options: LoopOptions | None = None,
    *,
    folder: Path | None = None,
    encoder: MimRefinerModel | None = None,
    evaluate: Evaluate | None = None,
) -> Objective:
    """Train the networks of a recipe's method on `images`; in eval mode, the same on every process.

    Args:
        accelerator: the job; None for the one that this process belongs to.
        folder: for checkpoints and log, where the same call goes on; None keeps nothing.
        encoder: to go on from, of the recipe's shape; None for fresh weights.
        evaluate: measures the encoder on the way.

    Raises:
        ValueError: for a batch larger than the data set, too many broken images, or a folder with
            another pre-training.
        FloatingPointError: for a loss or gradient that is not finite.
        Interrupted: after a checkpoint, when a signal asked the run to stop.
    """
    accelerator = accelerator or job_of_processes()
    options = options or LoopOptions()
    return Pretrainer(recipe, images, accelerator, options, folder, encoder, evaluate).fit()
