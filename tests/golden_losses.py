"""The losses of a small refinement, kept step by step.

A change that alters them, however little, has to say so.

    python -m tests.golden_losses  # this run beside the kept one: the largest difference
    # keep this machine's losses; they belong into the commit that changes them
    python -m tests.golden_losses --write

15 steps of head warm-up and 35 of refinement, in fp32 on one thread, of a tiny encoder with random
weights on the bundled digits. `golden_losses.json` holds every loss as a hexadecimal float, bit by
bit, per kind of machine: the last bits depend on the kernels that torch and its libraries choose
for a processor. On a kind of machine that is listed the losses are compared bit by bit, on another
one up to `TOLERANCE`: with ATEN_CPU_CAPABILITY=default, MKL_ENABLE_INSTRUCTIONS=SSE4_2 and
DNNL_MAX_CPU_ISA=SSE41, in place of AVX-512, they differ by 2e-6. What would amplify such
differences is kept small: few steps, few rows to be nearest, small learning rates.
"""

import argparse
import importlib.metadata
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch

# as a command; pytest puts this folder on the path
if __package__:
    sys.path.insert(0, str(Path(__file__).parent))

from chaos import save_start
from small_runs import losses

from mim_refiner_hf import RefineRecipe
from mim_refiner_hf.runs.run import run

KEPT = Path(__file__).with_name("golden_losses.json")
STEPS = 50
TOLERANCE = 1e-5


def machine() -> str:
    """What decides the last bits.

    Versions, torch's instruction set, and the processor, by which MKL and oneDNN choose theirs.
    """
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pillow", "numpy")
    )
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    )
    facts = dict(
        line.replace("\t", "").split(": ", 1) for line in reversed(lines) if ": " in line
    )  # of the first processor
    # virtual machines give the same name to several kinds
    names = (
        "model name",
        "cpu family",
        "model",
        "stepping",
    )
    processor = " ".join(facts[name] for name in names if name in facts) or platform.machine()
    return f"{versions}, {torch.backends.cpu.get_cpu_capability()}, {processor}, 1 thread"


def golden_recipe(folder: Path) -> RefineRecipe:
    """15 + 35 steps of 16 images; every part of the method is in it, colour included."""
    save_start(folder / "start")
    return RefineRecipe(
        model=str(folder / "start"),
        output_dir=str(folder / "out"),
        dataset="digits",
        eval_fraction=0.0,
        head_blocks=[1, 2],
        projector_dim=64,
        predictor_dim=64,
        embedding_dim=32,
        queue_size=64,
        topk=2,
        swap="positive",
        local_views=1,
        batch_size=16,
        head_epochs=0.185,
        epochs=0.432,
        warmup_epochs=0.1,
        learning_rate=4e-4,
        head_learning_rate=2e-4,
        layer_decay=0.65,
        ema_decay=0.9,
        save_every=0,
        log_every=1,
        num_workers=0,
        report_to="none",
        seed=3,
    )


def measured(folder: Path) -> list[float]:
    """The losses of the run, made in `folder`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        recipe = golden_recipe(folder)
        run(recipe)
    finally:
        torch.set_num_threads(threads)
    found = losses(recipe)
    assert len(found) == STEPS
    return found


def kept() -> dict[str, list[float]]:
    """Losses per kind of machine."""
    return {
        name: [float.fromhex(word) for word in words]
        for name, words in json.loads(KEPT.read_text()).items()
    }


def difference(found: list[float], expected: list[float]) -> float:
    """The largest relative one."""
    return max(abs(own - other) / abs(other) for own, other in zip(found, expected, strict=True))


def main() -> int:
    """The command; exit code 1 if the losses are others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="keep this run's losses in the place of all others"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder))
    if options.write:
        KEPT.write_text(json.dumps({machine(): [loss.hex() for loss in found]}, indent=1) + "\n")
        print(f"{KEPT}: {STEPS} losses of {machine()}")
        return 0
    worst = {name: difference(found, expected) for name, expected in kept().items()}
    print("\n".join(f"{value:.1e} from {name}" for name, value in worst.items()))
    return int(min(worst.values()) > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
