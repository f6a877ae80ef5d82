"""A million small images into a feature store, killed halfway and gone on with.

    python -m benchmarks.embed_large ../shared [--copies 50]

The images are those of CIFAR-10 in the shared folder, as many copies of its 20 000 as asked, read
by `mim-refiner embed` from a folder of parquet files; the encoder has 6 blocks of width 192 and
random weights. Half way the command is killed with SIGKILL and given again. Every second the
memory of the command and its workers (anonymous, added up) and the rows that are finished are
noted. At the end the store is read: every image has its row, once, and the copies of an image have
the same one. Writes benchmarks/results/embed-large.md.
"""

import argparse
import datetime
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pyarrow.parquet as parquet
import torch

from mim_refiner_hf import MimRefinerImageProcessor
from mim_refiner_hf.cli.flags import at_least
from mim_refiner_hf.evaluation import FeatureStore
from mim_refiner_hf.evaluation.shard_files import images_in

from .__main__ import processor
from .growth import an_encoder

SIDE = 32
RESULTS = Path(__file__).parent / "results" / "embed-large.md"


class Moment(NamedTuple):
    """What was there `seconds` after the command began: bytes of memory, images in files."""

    seconds: float
    memory: int
    images: int


def inputs(shared: Path, copies: int, folder: Path) -> int:
    """`images/`, parquet files of CIFAR-10's training images, and `model/`; how many images."""
    source = shared / "data/cifar10/train.parquet"
    (folder / "images").mkdir(parents=True)
    for copy in range(copies):
        shutil.copyfile(source, folder / f"images/{copy:03d}.parquet")

    torch.manual_seed(0)
    an_encoder(SIDE).save_pretrained(folder / "model")
    image_processor = MimRefinerImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    image_processor.save_pretrained(folder / "model")
    return copies * parquet.read_metadata(source).num_rows


def memory_of(command: psutil.Process) -> int:
    """Anonymous memory of a command and its workers, in bytes."""
    total = 0
    for process in [command, *command.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
        except (FileNotFoundError, ProcessLookupError):
            # a worker that has just ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return total


def watch(command: list[str], folder: Path, stop_at: int | None) -> list[Moment]:
    """Run a command that fills `store/`; kill it once `stop_at` images are there."""
    moments = []
    began = time.perf_counter()
    log = folder / "log.txt"
    with log.open("a") as file:
        running = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        process = psutil.Process(running.pid)
        while running.poll() is None:
            images = images_in(folder / "store")
            moments.append(Moment(time.perf_counter() - began, memory_of(process), images))
            if stop_at is not None and images >= stop_at:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()
                return moments
            time.sleep(1)
    if running.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"]
        raise SystemExit(f"the command ended with {running.returncode}: {said[-1]}")
    # the last file may be younger than the last look
    seconds = time.perf_counter() - began
    moments.append(moments[-1]._replace(seconds=seconds, images=images_in(folder / "store")))
    return moments


def check(store: FeatureStore, images: int, copies: int) -> None:
    """Every image has its row, once, and all copies of an image have the same."""
    assert torch.equal(store.indices, torch.arange(images)), "rows are missing, or not in order"
    assert not store.broken
    (column,) = store.columns
    first: torch.Tensor | None = None
    for copy in range(copies):
        size = images // copies
        rows = store.rows(column, np.arange(copy * size, (copy + 1) * size))
        first = rows if first is None else first
        apart = (rows - first).abs().max()
        # the rows of a batch are others for every copy
        assert apart < 0.05 * first.abs().max(), f"copy {copy} has other features, by {apart}"


def rate(moments: list[Moment]) -> float:
    """Images per second between the first finished file and the last."""
    ends = [here for before, here in itertools.pairwise(moments) if here.images > before.images]
    return (ends[-1].images - ends[0].images) / (ends[-1].seconds - ends[0].seconds)


def row(name: str, moments: list[Moment]) -> str:
    """A line of the table: of one call of the command."""
    first, last = moments[0].images, moments[-1].images
    busy = [moment for moment in moments if moment.images > first]
    quarters = np.array_split(np.array([moment.memory for moment in busy]), 4)
    memory = " | ".join(f"{np.median(part) / 2**20:.0f}" for part in quarters)
    return f"| {name} | {first} to {last} | {rate(moments):.0f} | {memory} |"


def main(shared: Path, copies: int, folder: Path | None) -> None:
    """Measure, and write the table."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        work = Path(temporary)
        images = inputs(shared, copies, work)
        command = [sys.executable, "-m", "mim_refiner_hf.cli", "embed", str(work / "images")]
        command += ["--model", str(work / "model"), "--out", str(work / "store")]
        command += ["--dtype", "auto", "--num_workers", "1"]
        killed = watch(command, work, images // 2)
        resumed = watch(command, work, None)
        check(FeatureStore(work / "store"), images, copies)

    text = [
        "# A million images into a feature store",
        "",
        f"{images} images of {SIDE} px ({copies} copies of CIFAR-10's training images in parquet",
        "files) by `mim-refiner embed`, an encoder of 6 blocks of width 192 with random weights.",
        "Killed with SIGKILL when half was done, and given again. Memory is that of the command",
        "and its data-loading worker (RssAnon), the median of each quarter of the time. At the",
        "end every image had its row, once, in order.",
        "",
        "```bash",
        "python -m benchmarks.embed_large ../shared",
        "```",
        "",
        "| call | images | images/s | 1st quarter, MiB | 2nd | 3rd | 4th |",
        "|---|---|---:|---:|---:|---:|---:|",
        row("until the kill", killed),
        row("once more", [moment for moment in resumed if moment.images]),
        "",
        "Other programs ran on the machine.",
        "",
        f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores, torch {version('torch')}",
    ]
    RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shared", type=Path, help="folder with data/")
    # of fewer not two files are left after the kill, between which time is taken
    parser.add_argument("--copies", type=at_least(2), default=50)
    parser.add_argument("--folder", type=Path, help="for 3 GB; default: the system's temporary one")
    asked = parser.parse_args()
    main(asked.shared, asked.copies, asked.folder)
