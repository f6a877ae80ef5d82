"""`replay`: the step at which a refinement stopped, run once more with every part watched.

    mim-refiner replay outputs/refined                         # the last of its failures/
    mim-refiner replay outputs/refined --mixed_precision no    # is it bf16?

A run is a pure function of its recipe, so nothing more than the newest checkpoint is needed: the
steps from there on are done again, without writing anything. Looking at every part of encoder and
heads makes them slower.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..refinement.failure import FAILURES, NotFiniteError
from ..refinement.recipe import RefineRecipe
from ..runtime.device import uses_bf16
from ..runtime.files import refuse_no_run
from ..runtime.launch import job_of_processes
from ..runtime.settings import with_new_names
from ..runtime.strangers import parse_json
from ..runtime.wording import setting
from .prepare import Prepared, prepare
from .run import choose_blocks, make_trainer, starting_encoder


def replay(output_dir: Path, *, step: int | None = None, mixed_precision: str | None = None) -> str:
    """Run a step of a run again, and tell what happens in it.

    Args:
        output_dir: the run's folder: its recipe, and its newest checkpoint if it has one.
        step: 0-based; None for the last one in `failures/`.
        mixed_precision: "no" or "bf16"; None for what the run had.

    Raises:
        FileNotFoundError: when the folder holds no run, or no failure.
        ValueError: when the step lies before the newest checkpoint or behind the end, or the
            recipe cannot be read.
    """
    recipe = _quiet_recipe(output_dir)
    if step is None:
        step = last_failure(output_dir)
    prepared = prepare(recipe)
    if mixed_precision is not None:
        prepared = _in_precision(prepared, mixed_precision)

    start = prepared.start_step
    total = prepared.recipe.steps.total
    if not start <= step < total:
        raise ValueError(
            f"{setting('step', step)}: can be replayed from the newest checkpoint on, "
            f"{start} to {total - 1}"
        )

    # the same parts as in `run`, without its loggers and files
    bf16 = prepared.recipe.bf16
    accelerator = job_of_processes(mixed_precision="bf16" if bf16 else "no")
    precision = "bf16" if bf16 else "fp32"
    accelerator.print(
        f"Replaying steps {start} to {step} of {output_dir} in {precision}", flush=True
    )
    encoder = starting_encoder(prepared, accelerator, {})
    choice = choose_blocks(prepared, accelerator, encoder)
    trainer = make_trainer(prepared, accelerator, encoder, choice, {})
    with watched(trainer.refiner) as seen:
        try:
            trainer.fit(start, step + 1, extra_state={}, evaluate=dict)
        except NotFiniteError as failure:
            where = "every output of the forward pass is finite"
            if seen:
                where = f"the first part with an output that is not finite: {seen[0]}"
            return f"{failure}\n{where}"
    return f"step {step} went well this time: loss and gradients are finite"


def _quiet_recipe(output_dir: Path) -> RefineRecipe:
    """The recipe of a run, without all that writes."""
    refuse_no_run(output_dir)
    path = output_dir / "recipe.json"
    try:
        recipe = RefineRecipe(**with_new_names(dict(parse_json(path.read_text()))))
    except (ValueError, TypeError) as error:
        # TypeError: fields of another version
        raise ValueError(f"{path} cannot be read ({error}); name another run's folder") from error
    return dataclasses.replace(
        recipe,
        save_every=0,
        report_to="none",
        dry_run=False,
        output_dir=str(output_dir),
    )


def _in_precision(prepared: Prepared, mixed_precision: str) -> Prepared:
    """The same run in another precision; compared with its folder is the recipe that it has."""
    recipe = dataclasses.replace(prepared.recipe, bf16=uses_bf16(mixed_precision))
    return dataclasses.replace(prepared, recipe=recipe)


def last_failure(output_dir: Path) -> int:
    """The step of the newest report in `failures/`."""
    reports = sorted((output_dir / FAILURES).glob("step-*.json"))
    if not reports:
        raise FileNotFoundError(
            f"{output_dir / FAILURES} holds no report of a failed step; name one with "
            f"{setting('step')}"
        )
    return int(json.loads(reports[-1].read_text())["step"])


@contextmanager
def watched(module: nn.Module) -> Iterator[list[str]]:
    """A list that fills with the parts of `module` whose output is not finite, as computed."""
    seen: list[str] = []

    def watch(name: str, part: nn.Module) -> Any:
        def look(_: nn.Module, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple | list) else [output]
            for tensor in _numbers(outputs):
                if not bool(torch.isfinite(tensor).all()):
                    kind = "nan" if bool(tensor.isnan().any()) else "inf"
                    sizes = [float(value.detach().abs().max()) for value in _numbers(inputs)]
                    largest = max(sizes, default=float("nan"))
                    seen.append(
                        f"{name} ({type(part).__name__}): {kind}, "
                        f"from inputs of at most {largest:.3g}"
                    )

        return part.register_forward_hook(look)

    hooks = [watch(name, part) for name, part in module.named_modules() if name]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _numbers(values: Any) -> list[Tensor]:
    """The tensors among `values` that can be infinite or not a number."""
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
