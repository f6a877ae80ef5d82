"""The training loop: head warm-up on the frozen encoder, then refinement of both.

    accelerate launch -m mim_refiner_hf.cli refine --recipe mae-l16 --dataset my_images/ --output_dir out

Both stages are one sequence of steps: step s takes batch s of the data order, and everything random in it (order, views, neighbour
draws) is a pure function of the seed and s. So a checkpoint is the weights, the optimiser and the number s. Running the same
command again continues from the newest checkpoint in the output folder; another recipe in that folder is refused.
"""

import copy
import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.broken import BROKEN, BrokenImages
from ..data.fast_views import VIEW_KINDS, FastMultiCrop, finished_views
from ..data.images import ImageDataset, ImageStream
from ..data.order import BatchSampler
from ..data.views import MultiCrop, ViewDataset, normalise, view_specs
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.checkpoint import Checkpoint, check_tensors, save_checkpoint, size_of
from ..runtime.distributed import average_gradients, progress_bar, rank, world_size
from ..runtime.files import in_bytes
from ..runtime.optimisation import (
    encoder_groups,
    freeze,
    head_groups,
    learning_rate,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
    update_average,
)
from ..runtime.sharding import fsdp2_requested, gather_into, shard, shard_like
from ..runtime.signals import Interrupted, StopSignals, ignore_stop_signals
from .failure import check_finite
from .heads import GroupedLayer, IdHeads
from .loss import head_weights
from .memory import choose_micro_batch
from .queue import NearestNeighbourQueue
from .recipe import RefineRecipe
from .refiner import Refiner, StepResult, neighbour_draw
from .resolve import Steps

logger = logging.getLogger(__name__)

COLLAPSED = 0.1  # spread of a head's projections below which a warning is due


def compile_blocks(encoder: MimRefinerModel, backend: str = "inductor") -> None:
    """torch.compile every block of an encoder, in place; the first passes of each size and stage take longer.

    Args:
        backend: of torch.compile. "aot_eager" makes no kernels and runs anywhere; the tests compare its gradients.
    """
    for layer in encoder.layers:
        layer.compile(backend=backend)


@dataclass
class Trainer:
    """Encoder, heads, queue, moving average and optimiser of one run, and the loop over its steps.

    Args:
        recipe: a resolved recipe.
        steps: updates of each stage.
        accelerator: with its trackers started.
        images: what is trained on.
        encoder: the starting weights; trained in place.
        mean, std: per channel, of pixels in [0, 1].
        num_workers: data-loading workers of this process.
        bf16: autocast to bfloat16.
    """

    recipe: RefineRecipe
    steps: Steps
    accelerator: Accelerator
    images: ImageDataset | ImageStream
    encoder: MimRefinerModel
    mean: list[float]
    std: list[float]
    num_workers: int
    bf16: bool
    seconds: dict[str, float] = field(default_factory=dict)
    collapsed: set[str] = field(default_factory=set)  # heads that were warned of
    sized: set[str] = field(default_factory=set)  # stages whose checkpoints' size has been said

    def __post_init__(self) -> None:
        recipe, config = self.recipe, self.encoder.config
        assert isinstance(recipe.head_blocks, list) and recipe.temperature is not None
        config.pooling = recipe.pooling
        if (
            config.pooling != "global_repr"
        ):  # not trained along, it would be left with an encoder that it was not trained on
            self.encoder.drop_predictor()
        count = len(recipe.head_blocks)
        dims = (
            config.hidden_size,
            recipe.projector_dim,
            recipe.predictor_dim,
            recipe.embedding_dim,
        )
        heads = IdHeads(count, *dims, seed=recipe.seed)
        queue = NearestNeighbourQueue(
            count, recipe.queue_size, recipe.embedding_dim, seed=recipe.seed
        )
        freeze(self.encoder, recipe.freeze_blocks)
        self.average = (
            copy.deepcopy(self.encoder).requires_grad_(False).eval().to(self.accelerator.device)
        )
        self.refiner = Refiner(
            self.encoder,
            recipe.head_blocks,
            heads,
            queue,
            num_global=recipe.global_views,
            num_views=recipe.global_views + recipe.local_views,
            temperature=recipe.temperature,
            swap=recipe.swap,
            bf16=self.bf16,
        ).to(self.accelerator.device)
        if recipe.gradient_checkpointing:
            renamed = hasattr(
                self.encoder, "activation_checkpointing_enable"
            )  # in transformers 5.23
            getattr(
                self.encoder,
                "activation_checkpointing_enable" if renamed else "gradient_checkpointing_enable",
            )()
        if recipe.compile:
            compile_blocks(self.encoder)
        self.sharded = fsdp2_requested() and world_size() > 1
        if self.sharded:
            shard(self.encoder, self.encoder.layers)
            shard(self.average, self.average.layers)
            shard(heads, [layer for layer in heads.modules() if isinstance(layer, GroupedLayer)])
        self.optimizer = self._optimizer(0)
        self.broken = BrokenImages(
            self.images, recipe.max_bad_fraction, Path(recipe.output_dir) / BROKEN
        )

    def choose_micro_batch(
        self, available: int, kept: int | Literal["auto"] | None = "auto"
    ) -> None:
        """Put a number, or None, in the place of micro_batch_size "auto", and say which and why.

        Args:
            available: bytes that are free for this process.
            kept: what a resumed run had chosen; "auto" where nothing was chosen yet.
        """
        chosen, reason = kept, "as this run began"
        if chosen == "auto":
            self.refiner.train()
            chosen, reason = choose_micro_batch(
                self.recipe, self.refiner, self.accelerator.num_processes, available
            )
        self.recipe = dataclasses.replace(self.recipe, micro_batch_size=chosen)
        self.accelerator.print(f"--micro_batch_size {chosen or 'left out'}: {reason}", flush=True)

    # ---- the loop

    def fit(
        self,
        start_step: int,
        stop_step: int,
        extra_state: dict[str, Any],
        evaluate: Callable[[], dict[str, Any]],
    ) -> None:
        """Run the steps from `start_step` to `stop_step`; both stages, one sequence.

        Args:
            extra_state: JSON that goes into every checkpoint.
            evaluate: called without arguments after every `eval_every`-th epoch of the refinement; returns metrics to log.

        Raises:
            Interrupted: after a checkpoint, when a signal asked the run to stop.
            NotFiniteError: before the update of the step whose loss or gradient is not finite.
        """
        recipe, progress, fit_began = (
            self.recipe,
            self._progress(start_step, stop_step),
            time.perf_counter(),
        )
        per_epoch = (
            len(self.images) // recipe.batch_size if isinstance(self.images, ImageDataset) else None
        )
        with progress, StopSignals() as signals:
            for step, batch in zip(
                range(start_step, stop_step), self._batches(start_step, stop_step), strict=False
            ):
                began = time.perf_counter()
                if step == self.steps.warmup:
                    self.optimizer = self._optimizer(step)
                result = self.update(step, batch)
                self.broken.add(batch["broken"])
                done, stage = step + 1, self.stage(step)
                received = signals.agreed(self.accelerator.device) if done < stop_step else 0
                logs = done % recipe.log_every == 0 or done == stop_step
                saves = received or (
                    recipe.save_every and (done % recipe.save_every == 0 or done == stop_step)
                )
                if logs or saves:
                    self.broken.share(images_read=done * recipe.batch_size)
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
                progress.update()
                if logs:
                    self._log(
                        step,
                        result,
                        progress,
                        (time.perf_counter() - fit_began) / (done - start_step),
                    )
                epoch_ended = (
                    per_epoch is not None
                    and (done - self.steps.warmup) % (per_epoch * max(recipe.eval_every, 1)) == 0
                )
                if (
                    recipe.eval_every
                    and step >= self.steps.warmup
                    and epoch_ended
                    and done < stop_step
                ):
                    self.accelerator.log(evaluate(), step=done)
                if saves:
                    self.save(done, extra_state)
                if received:
                    raise Interrupted(
                        received,
                        f"stopped after step {done} of {stop_step}; the same command goes on from the checkpoint there",
                    )

    def averaged(self) -> MimRefinerModel:
        """The moving average of the encoder as an ordinary model, whole in every process."""
        if not self.sharded:
            return self.average
        encoder = (
            MimRefinerModel(self.average.config)
            .to(self.accelerator.device)
            .requires_grad_(False)
            .eval()
        )
        gather_into(encoder, self.average)
        return encoder

    def stage(self, step: int) -> str:
        """`warmup` or `refine`."""
        return "warmup" if step < self.steps.warmup else "refine"

    def update(self, step: int, batch: dict[str, Tensor]) -> StepResult:
        """One optimiser step on one batch of views; raises NotFiniteError before it if loss or gradient is not finite."""
        recipe, device = self.recipe, self.accelerator.device
        refining = step >= self.steps.warmup
        self.refiner.train(True)
        self.encoder.train(refining)
        views = [
            normalise(finished_views(batch, kind, device), self.mean, self.std)
            for kind in VIEW_KINDS
        ]
        index = batch["index"].to(device)
        topk = recipe.topk if refining else 1
        draw = neighbour_draw(
            recipe.seed, step, topk, len(self.refiner.head_blocks), recipe.global_views, len(index)
        )
        progress = (step - self.steps.warmup) / self.steps.refine
        weights = (
            head_weights(recipe.loss_schedule, len(self.refiner.head_blocks), progress)
            if refining
            else None
        )
        set_learning_rate(self.optimizer, self._learning_rate(step))
        self.optimizer.zero_grad()
        result = self.refiner.backward(
            views,
            index,
            batch["label"].to(device),
            topk=topk,
            draw=None if draw is None else draw.to(device),
            head_weights=weights,
            train_encoder=refining,
            micro_batch_size=recipe.micro_batch_size,  # type: ignore[arg-type]  # "auto" is a number by now
        )
        average_gradients(self.refiner.parameters())
        check_finite(self.refiner, result, step=step, sample_index=index)
        self.optimizer.step()
        if refining:
            update_average(self.average, self.encoder, recipe.ema_decay)
        return result

    def _learning_rate(self, step: int) -> float:
        recipe, refining = self.recipe, step >= self.steps.warmup
        total = self.steps.refine if refining else self.steps.warmup
        epochs = recipe.epochs if refining else recipe.head_epochs
        base = recipe.learning_rate if refining else recipe.head_learning_rate
        warmup = min(round(total * recipe.warmup_epochs / epochs), total - 1)
        return learning_rate(
            step - self.steps.warmup * refining, warmup, total, base * recipe.batch_size / 256
        )

    def _optimizer(self, step: int) -> torch.optim.AdamW:
        """AdamW for the stage that `step` belongs to: heads alone, or encoder and heads."""
        groups = head_groups(self.refiner.heads, self.recipe.head_weight_decay)
        if step >= self.steps.warmup:
            groups = (
                encoder_groups(self.encoder, self.recipe.layer_decay, self.recipe.weight_decay)
                + groups
            )
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def _batches(self, start_step: int, stop_step: int) -> DataLoader[dict[str, Tensor]]:
        recipe = self.recipe
        assert recipe.global_size is not None and recipe.local_size is not None
        specs = view_specs(
            recipe.global_views,
            recipe.local_views,
            recipe.global_size,
            recipe.local_size,
            (recipe.global_scale[0], recipe.global_scale[1]),
            (recipe.local_scale[0], recipe.local_scale[1]),
            recipe.colour,
            recipe.flip,
        )
        sampler = BatchSampler(
            self.images,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            steps=stop_step,
            start_step=start_step,
            rank=rank(),
            world_size=world_size(),
        )
        pin = self.accelerator.device.type == "cuda"
        multicrop = (
            MultiCrop(specs) if recipe.views == "exact" else FastMultiCrop(specs, hand_over=pin)
        )
        dataset = ViewDataset(self.images, multicrop, recipe.seed)
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=pin,
            worker_init_fn=ignore_stop_signals,
        )

    # ---- what it says

    def _progress(self, start_step: int, stop_step: int) -> Any:
        hidden = not self.accelerator.is_local_main_process
        return progress_bar(
            total=stop_step, initial=start_step, desc="refining", unit="step", hidden=hidden
        )

    def _log(self, step: int, result: StepResult, progress: Any, step_seconds: float) -> None:
        """One line in the log: mean over processes of the loss and of what every head tells, rate, and seconds still to go."""
        columns = (
            "head_losses",
            "alignment",
            "neighbour_similarity",
            "neighbour_age",
            "neighbour_accuracy",
        )
        table = self.accelerator.reduce(
            torch.stack([getattr(result, name).float() for name in columns]), "mean"
        ).tolist()
        loss = self.accelerator.reduce(result.loss.detach(), "mean").item()
        values: dict[str, Any] = {
            "stage": self.stage(step),
            "loss": loss,
            "learning_rate": self._learning_rate(step),
            "images_per_second": self.recipe.batch_size / step_seconds,
            "broken_images": len(self.broken),
            "seconds_left": (progress.total - step - 1) * step_seconds,
        }
        short = ("loss", "alignment", "neighbour_similarity", "neighbour_age", "neighbour_accuracy")
        for key, row in zip(short, table, strict=True):
            for head, value in zip(self.refiner.head_names, row, strict=True):
                if value == value:  # not nan: without labels there is no neighbour accuracy
                    values[f"{head}/{key}"] = value
        for head, spread in zip(
            self.refiner.head_names,
            self.refiner.queue.spread(self.recipe.batch_size).tolist(),
            strict=True,
        ):
            values[f"{head}/spread"] = spread
            if spread < COLLAPSED and head not in self.collapsed:
                self.collapsed.add(head)
                logger.warning(
                    "step %d: to head %s all images look nearly alike (spread %.3f, 1 is even): the features may be collapsing; "
                    "lower --learning_rate, or start from weights that tell these images apart", step, head, spread,
                )  # fmt: skip
        progress.set_description(
            f"{'head warm-up' if values['stage'] == 'warmup' else 'refining'}, loss {loss:.3f}",
            refresh=False,
        )
        self.accelerator.log(values, step=step + 1)

    # ---- what it keeps

    def save(self, done: int, extra_state: dict[str, Any]) -> None:
        """Write a checkpoint after `done` steps; SaveError on every process if that cannot be done."""
        tensors = self.tensors() | optimizer_tensors(self.optimizer)
        state = {**extra_state, "seconds": self.seconds, "recipe": dataclasses.asdict(self.recipe)}
        state["broken"] = self.broken.entries
        folder, keep = Path(self.recipe.output_dir) / "checkpoints", self.recipe.keep
        path = save_checkpoint(folder, step=done, tensors=tensors, state=state, keep=keep)
        if (stage := self.stage(done - 1)) not in self.sized and self.accelerator.is_main_process:
            self.sized.add(stage)
            print(
                f"checkpoints ({stage}): {in_bytes(size_of(path))} each in {folder}, {keep} kept",
                flush=True,
            )

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the optimiser: encoder, heads, queue, and the moving average."""
        parts = {"refiner": self.refiner, "average": self.average}
        return {
            f"{part}.{name}": tensor
            for part, module in parts.items()
            for name, tensor in module.state_dict().items()
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where the checkpoint was written, or raise a CheckpointError that names file and tensor, and change nothing."""
        check_tensors(checkpoint, self.tensors())
        # a checkpoint at the very end of the warm-up holds the warm-up's optimiser; the refinement starts a new one
        if checkpoint.step != self.steps.warmup:
            optimizer = self._optimizer(checkpoint.step)
            restore_optimizer(optimizer, checkpoint)
            self.optimizer = optimizer
        for prefix, module in (("refiner.", self.refiner), ("average.", self.average)):
            own = module.state_dict()
            module.load_state_dict(
                {name: shard_like(checkpoint.tensors[prefix + name], own[name]) for name in own}
            )
        self.seconds = dict(checkpoint.state["seconds"])
        self.broken.add(checkpoint.state.get("broken", []))
        self.broken.share(images_read=checkpoint.step * self.recipe.batch_size)


__all__ = ["Trainer", "compile_blocks"]
