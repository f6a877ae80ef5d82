"""The training loop: head warm-up on the frozen encoder, then refinement of both.

    trainer = Trainer(recipe, accelerator, images, encoder, mean=[0.5] * 3, std=[0.25] * 3)
    trainer.fit(0, recipe.steps.total, extra_state={}, evaluate=dict)
    encoder = trainer.averaged()

Both stages are one sequence of steps: step s takes batch s of the data order, and everything
random in it (order, views, neighbour draws) is a pure function of the seed and s. A checkpoint is
weights, optimiser and s: the same command goes on from the newest, another recipe is refused.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.broken import BROKEN, BrokenImages
from ..data.fast_views import VIEW_KINDS, finished_views
from ..data.images import ImageDataset
from ..data.stream import ImageStream
from ..data.views import normalise
from ..model.modeling_mim_refiner import MimRefinerModel
from ..model.poolings_mim_refiner import LEARNED_POOLINGS
from ..runtime.checkpoint import (
    Checkpoint,
    check_tensors,
    place_tensors,
    save_checkpoint,
    size_of,
)
from ..runtime.distributed import average_gradients, progress_bar, world_size
from ..runtime.files import in_bytes
from ..runtime.optimisation import (
    encoder_groups,
    freeze,
    head_groups,
    learning_rate,
    optimizer_tensors,
    recompute_blocks,
    restore_optimizer,
    set_learning_rate,
    update_average,
)
from ..runtime.pace import Pace
from ..runtime.sharding import fsdp2_requested, gather_into, shard
from ..runtime.signals import Interrupted, StopSignals
from ..runtime.wording import setting
from .adapters import Adapter, adapt, adapter_of, merged_encoder
from .auto import Choice
from .batches import view_batches
from .failure import check_step
from .head_log import HeadLog
from .heads import GroupedLayer, IdHeads
from .loss import head_weights
from .memory import choose_micro_batch
from .metadata import Metadata
from .queue import NearestNeighbourQueue
from .refiner import NnaSettings, Refiner, StepResult, neighbour_draw
from .resolve import ResolvedRecipe


def compile_blocks(encoder: MimRefinerModel, backend: str = "inductor") -> None:
    """torch.compile every block, in place; the first passes of each size and stage take longer.

    Args:
        backend: of torch.compile. "aot_eager" makes no kernels and runs anywhere; the tests
            compare its gradients.
    """
    for layer in encoder.layers:
        layer.compile(backend=backend)


def make_refiner(recipe: ResolvedRecipe, encoder: MimRefinerModel) -> Refiner:
    """Heads and queue as the recipe has them, beside the encoder, on the CPU."""
    heads = IdHeads(
        recipe.num_heads,
        encoder.config.hidden_size,
        recipe.projector_dim,
        recipe.predictor_dim,
        recipe.embedding_dim,
        seed=recipe.seed,
        activation=recipe.activation,
        predictor_norm=recipe.predictor_norm,
        init=recipe.head_init,
    )
    queue = NearestNeighbourQueue(
        recipe.num_heads, recipe.queue_size, recipe.embedding_dim, seed=recipe.seed
    )
    settings = NnaSettings(
        num_global=recipe.global_views,
        num_views=recipe.num_views,
        temperature=recipe.temperature,
        head_temperature=recipe.head_temperature,
        swap=recipe.swap,
        pairs=recipe.pairs,
        norm_views=recipe.norm_views,
        target_momentum=recipe.target_momentum,
        nested_widths=recipe.nested_widths,
    )
    return Refiner(encoder, recipe.head_blocks, heads, queue, settings, bf16=recipe.bf16)


@dataclass
class Trainer:
    """Encoder, heads, queue, moving average and optimiser of one run, and the loop over its steps.

    Args:
        recipe: all its settings.
        accelerator: with its trackers started.
        images: what is trained on.
        encoder: the starting weights; trained in place.
        mean, std: per channel, of pixels in [0, 1].
        seconds: that each stage has taken so far.
        value_range: as of `ViewDataset`.
        metadata: which images may be neighbours; None for all.
    """

    recipe: ResolvedRecipe
    accelerator: Accelerator
    images: ImageDataset | ImageStream
    encoder: MimRefinerModel
    mean: list[float]
    std: list[float]
    seconds: dict[str, float] = field(default_factory=dict)
    value_range: Sequence[float] | None = None
    metadata: Metadata | None = None
    # stages whose checkpoints' size has been said
    _sized: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        recipe = self.recipe
        device = self.accelerator.device
        self.steps = recipe.steps
        self.encoder.config.pooling = recipe.pooling
        if recipe.pooling not in LEARNED_POOLINGS:
            # it would be left, untrained, with an encoder that it was not trained on
            self.encoder.drop_predictor()
        freeze(self.encoder, recipe.freeze_blocks)
        adapt(self.encoder, recipe.lora_rank, recipe.freeze_blocks, recipe.seed)
        average = copy.deepcopy(self.encoder).requires_grad_(False).eval()
        self.average = average.to(device)

        self.refiner = make_refiner(recipe, self.encoder)
        self.refiner.metadata = self.metadata
        self.refiner.to(device)
        self.head_log = HeadLog(self.refiner, self.accelerator, recipe.batch_size)

        if recipe.gradient_checkpointing:
            recompute_blocks(self.encoder)
        if recipe.compile:
            compile_blocks(self.encoder)
        self.sharded = fsdp2_requested() and world_size() > 1
        if self.sharded:
            shard(self.encoder, self.encoder.layers)
            shard(self.average, self.average.layers)
            for part in filter(None, (self.refiner.heads, self.refiner.target_projector)):
                shard(part, [layer for layer in part.modules() if isinstance(layer, GroupedLayer)])

        self.optimizer = self._optimizer(0)
        listed = Path(recipe.output_dir) / BROKEN
        self.broken = BrokenImages(self.images, recipe.max_bad_fraction, listed)

    def choose_micro_batch(self, available: int) -> None:
        """Measure for --micro_batch_size auto how many images fit, with `available` free bytes."""
        self.refiner.train()
        self.settle_micro_batch(choose_micro_batch(self.recipe, self.refiner, available))

    def settle_micro_batch(self, choice: Choice[int | None]) -> None:
        """Put what was measured in the place of micro_batch_size "auto", and say it."""
        self.recipe = self.recipe.measured("micro_batch_size", choice)
        # that all fits is news only for those who asked
        if choice.value is None and self.recipe.asked.micro_batch_size != "auto":
            return
        shown = setting("micro_batch_size", choice.value or "left out")
        self.accelerator.print(f"{shown}: {choice.reason}", flush=True)

    # ---- the loop

    def fit(
        self,
        start_step: int,
        stop_step: int,
        extra_state: Mapping[str, Any],
        evaluate: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Run the steps from `start_step` to `stop_step`; both stages, one sequence.

        Args:
            extra_state: JSON that goes into every checkpoint.
            evaluate: called after every `eval_every`-th epoch of the refinement; returns metrics
                to log.

        Raises:
            Interrupted: after a checkpoint, when a signal asked the run to stop.
            NotFiniteError: before the update of the step whose loss or gradient is not finite.
        """
        recipe = self.recipe
        fit_began = time.perf_counter()
        pace = Pace()
        with self._progress(start_step, stop_step) as progress, StopSignals() as signals:
            batches = view_batches(
                recipe,
                self.images,
                start_step,
                stop_step,
                self.accelerator.device,
                self.value_range,
            )
            # the range comes first: at its end no further batch is asked for
            for step, batch in zip(range(start_step, stop_step), batches, strict=False):
                began = time.perf_counter()
                if step == self.steps.warmup:
                    self.optimizer = self._optimizer(step)
                    self.refiner.start_momentum()
                result = self.update(step, batch)
                self.broken.add(batch["broken"])

                # all processes agree on what is due after this step
                done = step + 1
                ends = done == stop_step
                received = 0 if ends else signals.agreed(self.accelerator.device)
                logs = ends or done % recipe.log_every == 0
                saves = bool(received) or self._saves_after(done, ends)
                if logs or saves:
                    self.broken.share(images_read=done * recipe.batch_size)
                stage = self.stage(step)
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
                progress.update()
                self._say_pace(pace, step, stop_step)

                if logs:
                    step_seconds = (time.perf_counter() - fit_began) / (done - start_step)
                    self._log(step, result, progress, step_seconds)
                if self._evaluates_after(done) and not ends:
                    self.accelerator.log(evaluate(), step=done)
                if saves:
                    self.save(done, extra_state)
                if received:
                    raise Interrupted(
                        received,
                        f"stopped after step {done} of {stop_step}; "
                        "the same command goes on from the checkpoint there",
                    )

    def _saves_after(self, done: int, ends: bool) -> bool:
        """Whether a checkpoint is due after `done` steps."""
        every = self.recipe.save_every
        return every > 0 and (ends or done % every == 0)

    def _evaluates_after(self, done: int) -> bool:
        """Whether `done` steps end an epoch of the refinement after which it is measured."""
        every = self.recipe.eval_every
        refined = done - self.steps.warmup
        if not every or refined < 1 or not isinstance(self.images, ImageDataset):
            return False
        per_epoch = len(self.images) // self.recipe.batch_size
        return refined % (per_epoch * every) == 0

    def averaged(self) -> MimRefinerModel:
        """The moving average of the encoder as an ordinary model, whole in every process."""
        return merged_encoder(self._whole_average())

    def averaged_adapter(self) -> Adapter | None:
        """The adapters of the moving average, in every process; None where none are trained."""
        return adapter_of(self._whole_average())

    def _whole_average(self) -> MimRefinerModel:
        if not self.sharded:
            return self.average
        encoder = MimRefinerModel(self.average.config).to(self.accelerator.device)
        adapt(encoder, self.recipe.lora_rank, self.recipe.freeze_blocks, self.recipe.seed)
        encoder.requires_grad_(False).eval()
        gather_into(encoder, self.average)
        return encoder

    def stage(self, step: int) -> str:
        """`warmup` or `refine`."""
        return "warmup" if step < self.steps.warmup else "refine"

    def update(self, step: int, batch: dict[str, Tensor]) -> StepResult:
        """One optimiser step on one batch of views.

        Raises:
            NotFiniteError: before the update, if loss or gradient is not finite.
        """
        recipe = self.recipe
        device = self.accelerator.device
        refining = step >= self.steps.warmup
        self.refiner.train(True)
        self.encoder.train(refining)

        views = []
        for kind in VIEW_KINDS:
            views.append(normalise(finished_views(batch, kind, device), self.mean, self.std))
        index = batch["index"].to(device)
        labels = batch["label"].to(device)

        # the head warm-up takes the nearest neighbour, and weighs all heads alike
        topk = 1
        weights = None
        if refining:
            topk = recipe.topk
            progress = (step - self.steps.warmup) / self.steps.refine
            weights = head_weights(recipe.loss_schedule, len(recipe.head_blocks), progress)
            # of the output, as the last of them
            weights += [weights[-1]] * len(recipe.nested_widths)
        size = (recipe.num_heads, recipe.global_views, len(index))
        draw = neighbour_draw(recipe.seed, step, topk, *size)

        set_learning_rate(self.optimizer, self._learning_rate(step))
        self.optimizer.zero_grad()
        result = self.refiner.backward(
            views,
            index,
            labels,
            topk=topk,
            draw=None if draw is None else draw.to(device),
            head_weights=weights,
            train_encoder=refining,
            micro_batch_size=recipe.micro_batch_size,
        )
        average_gradients(self.refiner.parameters())
        check_step(self.refiner, result, step=step, sample_index=index)

        self.optimizer.step()
        if refining:
            update_average(self.average, self.encoder, recipe.ema_decay)
            self.refiner.follow_projectors()
        return result

    def _learning_rate(self, step: int) -> float:
        """Of this step: a linear warm-up and a cosine in each stage, scaled with the batch."""
        recipe = self.recipe
        if step < self.steps.warmup:
            first = 0
            total = self.steps.warmup
            warmup = recipe.warmups.warmup
            base = recipe.head_learning_rate
        else:
            first = self.steps.warmup
            total = self.steps.refine
            warmup = recipe.warmups.refine
            base = recipe.learning_rate

        peak = base * recipe.batch_size / 256
        return learning_rate(step - first, warmup, total, peak, recipe.end_learning_rate)

    def _optimizer(self, step: int) -> torch.optim.AdamW:
        """AdamW for the stage that `step` belongs to: heads alone, or encoder and heads."""
        recipe = self.recipe
        groups = []
        head_scale = 1.0
        if step >= self.steps.warmup:
            groups = encoder_groups(self.encoder, recipe.layer_decay, recipe.weight_decay)
            # the schedule is the encoder's
            head_scale = recipe.refine_head_learning_rate / recipe.learning_rate
        groups += head_groups(self.refiner.heads, recipe.head_weight_decay, head_scale)
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)

    # ---- what it says

    def _progress(self, start_step: int, stop_step: int) -> Any:
        hidden = not self.accelerator.is_local_main_process
        return progress_bar(
            total=stop_step, initial=start_step, desc="refining", unit="step", hidden=hidden
        )

    def _say_pace(self, pace: Pace, step: int, stop_step: int) -> None:
        """How long the stage takes, once that is known."""
        name = "head warm-up"
        ends = min(stop_step, self.steps.warmup)
        if step >= self.steps.warmup:
            name = "refinement"
            ends = stop_step
        line = pace.after(name, ends - step - 1)
        if line:
            self.accelerator.print(line, flush=True)

    def _log(self, step: int, result: StepResult, progress: Any, step_seconds: float) -> None:
        """One line in the log: the loss, what every head tells, the rate, and seconds to go."""
        loss = self.accelerator.reduce(result.loss.detach(), "mean").item()
        values: dict[str, Any] = {
            "stage": self.stage(step),
            "loss": loss,
            "learning_rate": self._learning_rate(step),
            "images_per_second": self.recipe.batch_size / step_seconds,
            "broken_images": len(self.broken),
            "seconds_left": (progress.total - step - 1) * step_seconds,
        }

        values |= self.head_log.values(step, result)
        stage = "head warm-up" if step < self.steps.warmup else "refining"
        progress.set_description(f"{stage}, loss {loss:.3f}", refresh=False)
        self.accelerator.log(values, step=step + 1)

    # ---- what it keeps

    def save(self, done: int, extra_state: Mapping[str, Any]) -> None:
        """Write a checkpoint after `done` steps; SaveError on every process if that fails."""
        state = {
            **extra_state,
            "seconds": self.seconds,
            "recipe": self.recipe.as_written(),
            "broken": self.broken.entries,
        }
        tensors = self.tensors() | optimizer_tensors(self.optimizer)
        folder = Path(self.recipe.output_dir) / "checkpoints"
        keep = self.recipe.save_total_limit
        path = save_checkpoint(folder, step=done, tensors=tensors, state=state, keep=keep)

        stage = self.stage(done - 1)
        if stage not in self._sized and self.accelerator.is_main_process:
            self._sized.add(stage)
            size = in_bytes(size_of(path))
            print(f"checkpoints ({stage}): {size} each in {folder}, {keep} kept", flush=True)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the optimiser: encoder, heads, queue, moving average."""
        tensors = {}
        for part, module in (("refiner", self.refiner), ("average", self.average)):
            for name, tensor in module.state_dict().items():
                tensors[f"{part}.{name}"] = tensor
        return tensors

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where the checkpoint was written.

        Raises:
            CheckpointError: naming file and tensor; then nothing has been changed.
        """
        check_tensors(checkpoint, self.tensors())

        # a checkpoint at the very end of the warm-up holds the warm-up's optimiser;
        # the refinement starts a new one
        if checkpoint.step != self.steps.warmup:
            optimizer = self._optimizer(checkpoint.step)
            restore_optimizer(optimizer, checkpoint)
            self.optimizer = optimizer

        place_tensors(self.refiner, checkpoint, "refiner.")
        place_tensors(self.average, checkpoint, "average.")
        self.seconds = dict(checkpoint.state["seconds"])
        self.broken.add(checkpoint.state.get("broken", []))
        self.broken.share(images_read=checkpoint.step * self.recipe.batch_size)
