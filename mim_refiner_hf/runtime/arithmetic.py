"""What decides the last bits of a run beside its recipe, kept from its start and compared.

    state["arithmetic"] = arithmetic(micro_batch_size=8, bf16=True)   # into every checkpoint
    say_changes(begun, arithmetic(micro_batch_size=4, bf16=True))     # a run that goes on elsewhere

A sum of floats depends on its order, which the number of threads, of processes and of micro-batches
decides, and every version of torch and every device has kernels of its own. None of that makes a
result wrong: it makes it another one in the last bits, of another precision in more of them, which
is said in one line.
"""

import logging
from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor

from .distributed import rank, world_size

logger = logging.getLogger(__name__)


class Arithmetic(TypedDict):
    """What decides the last bits, as a checkpoint keeps it."""

    torch: str
    device: str
    processes: int
    threads: int
    micro_batch_size: int | None
    precision: str


def arithmetic(micro_batch_size: int | None, bf16: bool) -> Arithmetic:
    """What decides the bits here and now."""
    device = "CPU"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()

    return {
        "torch": torch.__version__,
        "device": device,
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "micro_batch_size": micro_batch_size,
        "precision": "bf16" if bf16 else "fp32",
    }


def say_changes(begun: Mapping[str, object], now: Arithmetic) -> None:
    """A warning, by the main process, that names what was another at the start of the run.

    What the start did not record is not compared.
    """
    changed = []
    for name, value in now.items():
        if name in begun and begun[name] != value:
            changed.append(f"{name} {begun[name]}, now {value}")
    if changed and rank() == 0:
        logger.warning(
            "the run began with %s: it goes on, and its result may differ in the last bits",
            "; ".join(changed),
        )


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in single precision at least: half precisions are widened."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
