"""Does a run keep more and more? Memory, tensors and Python objects of a small refinement, early on
and at its end.

    python -m tests.memory_growth                          # 2 000 steps
    python -m tests.memory_growth --steps 300

A refinement of a tiny encoder on the bundled digits writes a line of log every step, a checkpoint
every 50 and evaluates by k-NN after every epoch. After 200 steps (two thirds of a shorter run) and
at the end its resident memory is read and what is alive is counted. Exits with 1 if the resident
memory grew by 1 % or more, or the tensors that are alive by any.
"""

import argparse
import gc
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

# as a command; pytest puts this folder on the path
if __package__:
    sys.path.insert(0, str(Path(__file__).parent))

from chaos import save_start
from small_runs import shorten

from mim_refiner_hf import RefineRecipe
from mim_refiner_hf.refinement.trainer import Trainer
from mim_refiner_hf.runs.run import run

GROWTH = 0.01


@dataclass(frozen=True)
class Alive:
    """After `step` steps: resident bytes, tensors that are alive and their bytes, Python objects
    that the collector tracks.
    """

    step: int
    resident: int
    tensors: int
    tensor_bytes: int
    objects: int


def look(step: int) -> Alive:
    """What is alive now."""
    gc.collect()
    objects = gc.get_objects()
    with warnings.catch_warnings():
        # asking some lazy modules for their class warns
        warnings.simplefilter("ignore")
        tensors = [each for each in objects if isinstance(each, torch.Tensor)]
    held = sum(tensor.nbytes for tensor in tensors)
    return Alive(step, psutil.Process().memory_info().rss, len(tensors), held, len(objects))


def growth(folder: Path, steps: int) -> tuple[Alive, Alive]:
    """What is alive after 200 steps (two thirds of a shorter run), and after all but one of
    `steps`, of a run in `folder`.
    """
    save_start(folder / "start")
    recipe = RefineRecipe(
        model=str(folder / "start"),
        output_dir=str(folder / "out"),
        dataset="digits",
        eval_fraction=0.2,
        num_heads=2,
        projector_dim=32,
        predictor_dim=32,
        embedding_dim=16,
        queue_size=64,
        topk=2,
        local_views=1,
        colour=False,
        batch_size=8,
        head_epochs=0.25,
        epochs=10**6,
        max_steps=steps - 10,
        warmup_epochs=0,
        eval_every=1,
        save_every=50,
        log_every=1,
        num_workers=0,
        report_to="none",
    )
    seen: list[Alive] = []
    update = Trainer.update

    def watched(self: Trainer, step: int, batch: Any) -> Any:
        if step in (min(200, 2 * steps // 3), steps - 1):
            seen.append(look(step))
        return update(self, step, batch)

    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        patch.setattr(Trainer, "update", watched)
        run(recipe)
    early, late = seen
    return early, late


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        early, late = growth(Path(folder), options.steps)
    print(
        "| | after step | resident, MiB | tensors | their MiB | Python objects "
        "|\n|---|---:|---:|---:|---:|---:|"
    )
    for name, alive in (("early", early), ("late", late)):
        sizes = f"{alive.resident / 2**20:.1f} | {alive.tensors} | {alive.tensor_bytes / 2**20:.2f}"
        print(f"| {name} | {alive.step} | {sizes} | {alive.objects} |")
    grown = late.resident / early.resident - 1
    print(f"\nresident memory grew by {grown:.2%}, tensors by {late.tensors - early.tensors}")
    return int(grown >= GROWTH or late.tensors > early.tensors)


if __name__ == "__main__":
    raise SystemExit(main())
