"""What the device of a run can do: bfloat16, compiling, and how much memory is free. Asked before any work.

bf16 = uses_bf16("auto")                   # ValueError where --mixed_precision bf16 or --compile asks for what is not there
free = available_memory("cuda", processes)  # bytes

`--compile` compiles each block on its own, `compile_blocks`: all blocks share their code, so it takes as long for 32 blocks as for 1.
"""

import importlib.util
import logging
import os
import shutil

import psutil
import torch

logger = logging.getLogger(__name__)


def uses_bf16(mixed_precision: str) -> bool:
    """Whether encoder and heads run in bfloat16: as asked; with "auto" on a GPU that computes in it.

    Raises:
        ValueError: for bf16 on a GPU that can only emulate it, which is slower than fp32.
    """
    gpu = torch.cuda.is_available()
    native = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if mixed_precision == "bf16" and gpu and not native:
        raise ValueError(
            f"--mixed_precision bf16: {torch.cuda.get_device_name()} has no bfloat16 arithmetic; leave the flag out, or use no"
        )
    return mixed_precision == "bf16" or (mixed_precision == "auto" and native)


def emulates_bf16(device: str) -> bool:
    """Whether bfloat16 is slower than fp32 here: on a CPU without AMX or AVX-512 BF16."""
    return device == "cpu" and not torch.cpu.get_capabilities().get("avx512_bf16", True)


def warn_of_emulation(flag: str, device: str) -> None:
    """Log a warning where `flag` asks for bfloat16 on a device that is slower in it than in fp32."""
    if emulates_bf16(device):
        logger.warning(
            "%s: this CPU emulates bfloat16 (neither AMX nor AVX-512 BF16); fp32 is faster here",
            flag,
        )


def check_compile(requested: bool) -> None:
    """Raise a ValueError where --compile is asked for and torch.compile has no GPU to make kernels for, or nothing to make them with."""
    if not requested:
        return
    if not torch.cuda.is_available():
        raise ValueError(
            "--compile: blocks are compiled for a GPU, and there is none here; leave --compile out"
        )
    if torch.cuda.get_device_capability() < (7, 0):
        raise ValueError(
            f"--compile: {torch.cuda.get_device_name()} is older than compute capability 7.0; leave --compile out"
        )
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "--compile: kernels are made by Triton, which is not installed; pip install triton, or leave --compile out"
        )
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
        raise ValueError(
            "--compile: Triton needs a C compiler, and there is neither gcc nor clang; install one, or leave --compile out"
        )


def available_memory(device: str, processes: int = 1) -> int:
    """Bytes that are free for one process: of its GPU, or its share of the machine's memory."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available) // processes


__all__ = ["available_memory", "check_compile", "emulates_bf16", "uses_bf16", "warn_of_emulation"]
