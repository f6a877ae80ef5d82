"""`replay`: the step at which a refinement stopped, run once more with every part of encoder and heads watched.

    mim-refiner replay outputs/refined                           # the last of outputs/refined/failures/
    mim-refiner replay outputs/refined --mixed_precision no      # is it bf16?

A run is a pure function of its recipe, so nothing more than the newest checkpoint is needed: the steps from there on are done
again, without writing anything. Looking at every part makes them slower.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..refinement.failure import FAILURES, NotFiniteError
from ..refinement.recipe import RefineRecipe
from ..runtime.device import uses_bf16
from ..runtime.launch import several_on_the_cpu
from .prepare import prepare
from .run import choose_blocks, make_trainer, starting_encoder


def replay(output_dir: Path, *, step: int | None = None, mixed_precision: str | None = None) -> str:
    """Run a step of a run again, and tell what happens in it.

    Args:
        output_dir: the run's folder: its recipe, and its newest checkpoint if it has one.
        step: 0-based; None for the last one in `failures/`.
        mixed_precision: "no" or "bf16"; None for what the run had.

    Raises:
        FileNotFoundError: when the folder holds no run, or no failure.
        ValueError: when the step lies before the newest checkpoint or behind the end, or the recipe cannot be read.
    """
    if not (output_dir / "recipe.json").is_file():
        raise FileNotFoundError(f"{output_dir} holds no run: it has no recipe.json")
    try:
        recipe = RefineRecipe(**json.loads((output_dir / "recipe.json").read_text()))
    except (ValueError, TypeError) as error:  # TypeError: fields of another version
        raise ValueError(
            f"{output_dir / 'recipe.json'} cannot be read ({error}); name another run's folder"
        ) from error
    if step is None:
        step = last_failure(output_dir)
    quiet = {
        "save_every": 0,
        "eval_every": 0,
        "report_to": "none",
        "dry_run": False,
        "output_dir": str(output_dir),
    }
    prepared = prepare(dataclasses.replace(recipe, **quiet))  # type: ignore[arg-type]
    start = 0 if prepared.found is None else prepared.found.step
    if not start <= step < prepared.steps.total:
        raise ValueError(
            f"--step {step}: can be replayed from the newest checkpoint on, {start} to {prepared.steps.total - 1}"
        )
    bf16 = uses_bf16(mixed_precision or recipe.mixed_precision)
    accelerator = Accelerator(cpu=several_on_the_cpu(), mixed_precision="bf16" if bf16 else "no")
    accelerator.print(
        f"Replaying steps {start} to {step} of {output_dir} in {'bf16' if bf16 else 'fp32'}",
        flush=True,
    )
    encoder = starting_encoder(prepared, accelerator, {})
    trainer = make_trainer(
        prepared, accelerator, bf16, encoder, choose_blocks(prepared, accelerator, encoder), {}
    )
    with watched(trainer.refiner) as seen:
        try:
            trainer.fit(start, step + 1, extra_state={}, evaluate=dict)
        except NotFiniteError as failure:
            where = (
                f"the first part with an output that is not finite: {seen[0]}"
                if seen
                else "every output of the forward pass is finite"
            )
            return f"{failure}\n{where}"
    return f"step {step} went well this time: loss and gradients are finite"


def last_failure(output_dir: Path) -> int:
    """The step of the newest report in `failures/`."""
    found = sorted((output_dir / FAILURES).glob("step-*.json"))
    if not found:
        raise FileNotFoundError(
            f"{output_dir / FAILURES} holds no report of a failed step; name one with --step"
        )
    return int(json.loads(found[-1].read_text())["step"])


@contextmanager
def watched(module: nn.Module) -> Iterator[list[str]]:
    """A list that fills with the parts of `module` whose output is not finite, in the order in which they were computed."""
    seen: list[str] = []

    def watch(name: str) -> Any:
        def look(part: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in output if isinstance(output, (tuple, list)) else [output]:
                if (
                    isinstance(tensor, Tensor)
                    and tensor.is_floating_point()
                    and not bool(torch.isfinite(tensor).all())
                ):
                    kind = "nan" if bool(tensor.isnan().any()) else "inf"
                    reached = [
                        each
                        for each in inputs
                        if isinstance(each, Tensor) and each.is_floating_point()
                    ]
                    largest = max(
                        (float(each.detach().abs().max()) for each in reached), default=float("nan")
                    )
                    seen.append(
                        f"{name} ({type(part).__name__}): {kind}, from inputs of at most {largest:.3g}"
                    )

        return look

    hooks = [
        part.register_forward_hook(watch(name)) for name, part in module.named_modules() if name
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


__all__ = ["last_failure", "replay", "watched"]
