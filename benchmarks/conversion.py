"""Time and peak memory of `mim-refiner convert` at the shapes of ViT-L/16 and ViT-2B/14.

    python -m benchmarks.conversion /tmp/scratch          # needs 16 GB of disk

Writes benchmarks/results/conversion.md. The file to convert is made here, of random weights, in
MAE's original layout. Memory is the converting process's own (VmHWM counts the file's mapped pages
too, which the kernel may take back at any time; RssAnon is what it must have), sampled every 50 ms.
"""

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

# width, blocks, heads, patch (METHOD: shapes)
SHAPES = {
    "L/16": (1024, 24, 16, 16),
    "2B/14": (2560, 24, 32, 14),
}


def mae_weights(width: int, depth: int, patch: int) -> dict[str, Tensor]:
    """Random fp32 weights in MAE's names.

    Each tensor is filled with one draw of 2^16 normals, repeated.
    """
    noise = torch.randn(2**16) * 0.02

    def random(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return noise.repeat(-(-count // len(noise)))[:count].reshape(shape)

    tokens = (224 // patch) ** 2 + 1
    weights = {
        "cls_token": random(1, 1, width),
        "pos_embed": random(1, tokens, width),
        "patch_embed.proj.weight": random(width, 3, patch, patch),
        "patch_embed.proj.bias": random(width),
        "norm.weight": 1 + random(width),
        "norm.bias": random(width),
    }
    linear = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
    }
    for block in range(depth):
        for name, shape in linear.items():
            weights[f"blocks.{block}.{name}.weight"] = random(*shape)
            weights[f"blocks.{block}.{name}.bias"] = random(shape[0])
        for name in ("norm1", "norm2"):
            weights[f"blocks.{block}.{name}.weight"] = 1 + random(width)
            weights[f"blocks.{block}.{name}.bias"] = random(width)
    return weights


def status(pid: int) -> dict[str, float]:
    """VmHWM and RssAnon of a process in GB; empty once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    found = {}
    for name in ("VmHWM", "RssAnon"):
        if name in fields:
            found[name] = int(fields[name].split()[0]) / 1e6
    return found


def measure(name: str, scratch: Path) -> tuple[str, ...]:
    """One row of the table: shape, size of the weights, seconds, peaks."""
    width, depth, heads, patch = SHAPES[name]
    source = scratch / "source.pth"
    torch.save({"model": mae_weights(width, depth, patch)}, source)
    size = source.stat().st_size / 1e9

    command = [
        sys.executable,
        "-m",
        "mim_refiner_hf.cli",
        "convert",
        str(source),
        str(scratch / "converted"),
        "--num_heads",
        str(heads),
    ]
    began = time.perf_counter()
    peaks = {"VmHWM": 0.0, "RssAnon": 0.0}
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    while process.poll() is None:
        for key, value in status(process.pid).items():
            peaks[key] = max(peaks[key], value)
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    assert process.returncode == 0, (
        f"{name}: the conversion failed with exit code {process.returncode}"
    )
    source.unlink()
    shutil.rmtree(scratch / "converted")
    return (
        name,
        f"{size:.2f}",
        f"{seconds:.0f}",
        f"{peaks['RssAnon']:.2f}",
        f"{peaks['RssAnon'] / size:.2f}",
        f"{peaks['VmHWM']:.2f}",
    )


def main() -> None:
    """Measure the shapes asked for and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scratch", type=Path, help="folder for the weights, removed again")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()

    options.scratch.mkdir(parents=True, exist_ok=True)
    rows = [measure(name, options.scratch) for name in options.shapes]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    text = "\n".join(
        [
            "# Conversion: time and memory",
            "",
            "```bash",
            "python -m benchmarks.conversion /tmp/scratch",
            "```",
            "",
            "`mim-refiner convert` of random fp32 weights in MAE's layout; start of Python, "
            "hashing, writing and reading back included.",
            "",
            f"{machine}, {datetime.date.today()}",
            "",
            "| shape | weights, GB | seconds | own memory, GB | per weights "
            "| with mapped file, GB |",
            "| ---: | ---: | ---: | ---: | ---: | ---: |",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
        ]
    )
    (Path(__file__).parent / "results" / "conversion.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
