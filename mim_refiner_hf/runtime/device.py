"""What the device of a run can do, asked before any work: bfloat16, compiling, free memory.

bf16 = uses_bf16("auto")
check_compile(recipe.compile)
free = available_memory("cuda")                     # bytes
"""

import importlib.util
import logging
import os
import shutil
from typing import Literal

import psutil
import torch

from .precision import Precision
from .wording import setting

logger = logging.getLogger(__name__)


def uses_bf16(mixed_precision: str) -> bool:
    """Whether encoder and heads run in bfloat16: as asked; "auto" means where it is faster.

    That is on a GPU that has it, and on a CPU that says it computes it (AMX or AVX-512 BF16).

    Raises:
        ValueError: for bf16 on a GPU that can only emulate it, which is slower than fp32.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = "cpu" if accelerator is None else accelerator.type
    native = _computes_bf16(device)
    if mixed_precision == "bf16" and device == "cuda" and not native:
        raise ValueError(
            f"{setting('mixed_precision', 'bf16')}: {torch.cuda.get_device_name()} has no bfloat16 "
            "arithmetic; leave it out, or use no"
        )
    return mixed_precision == "bf16" or (mixed_precision == "auto" and native is True)


def emulates_bf16(device: str) -> bool:
    """Whether bfloat16 is slower than fp32 here: on a CPU without AMX or AVX-512 BF16."""
    return device == "cpu" and _computes_bf16(device) is False


def _computes_bf16(device: str) -> bool | None:
    """Whether a kind of device computes bfloat16 itself, and does not emulate it.

    None where torch cannot tell: of a CPU 2.10 cannot, and of other accelerators none can.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return capabilities.get("avx512_bf16")
    return None


def warn_of_emulation(asked: str, device: str) -> None:
    """Log a warning where `asked`, a setting, asks for bfloat16 and fp32 is the faster one."""
    if emulates_bf16(device):
        message = (
            "%s: this CPU emulates bfloat16 (neither AMX nor AVX-512 BF16); fp32 is faster here"
        )
        logger.warning(message, asked)


def has_int8(device: str) -> bool | None:
    """Whether a device multiplies int8 itself: a CPU with VNNI or AMX.

    None where torch cannot tell.
    """
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    stated = [capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")]
    if device != "cpu" or stated == [None] * 3:
        return None
    return True in stated


def check_int8(asked: str, device: str) -> None:
    """Log a warning where `asked`, a setting, asks for int8 and the CPU has no instruction for it.

    Raises:
        ValueError: on a GPU.
    """
    if device != "cpu":
        raise ValueError(f"{asked}: is for a CPU, and this computes on {device}; use bf16")
    if has_int8(device) is False:
        message = "%s: this CPU has neither VNNI nor AMX; fp32 or bf16 may be faster here"
        logger.warning(message, asked)


def feature_precision(asked: Precision, device: str) -> Literal["fp32", "bf16", "int8"]:
    """In which numbers features are computed: as asked; "auto" means the best that is fast.

    bf16 on a GPU that has it, and on a CPU that says it has AMX or AVX-512 BF16. Else int8 on a CPU
    that says it has VNNI: not every encoder stands it, so who computes has to compare. Else fp32.
    """
    if asked != "auto":
        return asked
    if _computes_bf16(device):
        return "bf16"
    return "int8" if has_int8(device) else "fp32"


def check_compile(requested: bool) -> None:
    """Raise a ValueError where `compile` is asked for and torch.compile would not work.

    It needs a GPU to make kernels for, and something to make them with.
    """
    if not requested:
        return
    asked = setting("compile")
    remedy = f"leave {asked} out"
    if not torch.cuda.is_available():
        raise ValueError(
            f"{asked}: blocks are compiled for a GPU, and there is none here; {remedy}"
        )

    if torch.cuda.get_device_capability() < (7, 0):
        name = torch.cuda.get_device_name()
        raise ValueError(f"{asked}: {name} is older than compute capability 7.0; {remedy}")

    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"{asked}: kernels are made by Triton, which is not installed; "
            f"pip install triton, or {remedy}"
        )

    compilers = [os.environ.get("CC"), "gcc", "clang"]
    if not any(shutil.which(compiler) for compiler in compilers if compiler):
        raise ValueError(
            f"{asked}: Triton needs a C compiler, and there is neither gcc nor clang; "
            f"install one, or {remedy}"
        )


def available_memory(device: str, processes: int = 1) -> int:
    """Bytes that are free for one process: of its GPU, or its share of the machine's memory."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available) // processes
