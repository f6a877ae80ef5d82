"""Every command, killed at any moment: the same command then ends as if nothing had been.

    python -m tests.command_chaos                        # 4 kills and 2 signals of each command
    python -m tests.command_chaos --hits 1 --commands embed cluster

A command runs once undisturbed, on real images. Then it is hit at moments drawn over that time, in
turn by SIGKILL of its process group (every third time by SIGTERM or SIGINT), up to three times in a
row, and given again. A case is good when the last one ends with exit code 0, what it wrote is what
the undisturbed one wrote, and nothing lies beside it. Of `push` that is also what the
Hub in memory has, which lies in ../shared; without that it is left out. Exits with 1 if a case is
not.
"""

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from sklearn.datasets import load_digits

# as a command; pytest puts this folder on the path
if __package__:
    sys.path.insert(0, str(Path(__file__).parent))

from chaos import save_start, wait
from golden_cases import SHARED, hub_in_memory
from huggingface_hub import constants
from PIL import Image

from mim_refiner_hf import cli

IMAGES = 240
# what is the same however often a command was begun
COMPARED = (".safetensors", ".csv", ".parquet", ".onnx")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)

REFINE = (
    "--head_blocks 1 2 --projector_dim 64 --predictor_dim 64 --embedding_dim 32 --queue_size 64 "
    "--topk 3 --local_views 0 --batch_size 32 --max_steps 8 --head_epochs 1 --save_every 2 "
    "--global_size 16 --report_to none --num_workers 0"
)
COMMANDS: Mapping[str, str] = {
    "convert": "convert {model} {out}",
    "export-vit": "export {model} {out} --to vit",
    "export-timm": "export {model} {out} --to timm",
    "export-onnx": "export {model} {out} --to onnx",
    "embed": "embed {model} --dataset {images} --out {out} --shard_size 16 --num_workers 0",
    "evaluate": "evaluate {model} --dataset {images} --output_dir {out} --num_workers 0",
    "evaluate-features": (
        "evaluate {model} --dataset {images} --output_dir {out} --features {out}-kept "
        "--num_workers 0"
    ),
    "cluster": "cluster {images} --model {model} --num_clusters 5 --out {out}",
    "pretrain": (
        "pretrain --dataset {images} --recipe pretrain-digits --epochs 2 --warmup_epochs 0 "
        "--batch_size 64 --num_workers 0 --output_dir {out}"
    ),
    "refine": f"refine {{images}} --model {{model}} --output_dir {{out}} {REFINE}",
    "push": "push {out} tester/{name} --license mit",
}
"""What is hit, by a name."""


class Case(NamedTuple):
    """One command that was hit, and how the same one ended after it."""

    command: str
    hits: list[str]
    code: int
    same: bool
    beside: list[str]

    @property
    def good(self) -> bool:
        """Ended well, with the same content, and nothing left."""
        return self.code == 0 and self.same and not self.beside


def write_images(folder: Path) -> None:
    """Handwritten digits as files, a folder per class."""
    digits = load_digits()
    for place in range(IMAGES):
        of_class = folder / str(digits.target[place])
        of_class.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[place] * 15.9).astype("uint8")
        Image.fromarray(pixels).resize((16, 16)).save(of_class / f"{place}.png")


def start(words: Sequence[str], log: Path) -> int:
    """Give a command in a process group of its own; its pid."""
    if (child := os.fork()) != 0:
        # here too: it may be hit before it has run
        os.setpgid(child, child)
        return child
    code = 99
    try:
        os.setpgid(0, 0)
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = cli.main(words)
    finally:
        sys.stdout.flush()
        os._exit(code)


def content(folder: Path, hub: Any) -> dict[str, str]:
    """Every file below, and on the Hub, and a digest of those that are the same each time."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }

    repository = f"tester/{folder.parent.name}"
    if hub is not None and repository in hub.repos:
        for name, data in hub.repos[repository]["files"].items():
            files[f"on the Hub: {name}"] = data
    return {
        name: hashlib.sha256(data).hexdigest() if name.endswith(COMPARED) else ""
        for name, data in files.items()
    }


def words_of(command: str, folder: Path, out: Path) -> list[str]:
    """The words of a command."""
    places = {
        "model": folder / "model",
        "images": folder / "images",
        "out": out,
        "name": out.parent.name,
    }
    return COMMANDS[command].format(**places).split()


def prepare(command: str, folder: Path, name: str) -> Path:
    """A place for a command, and in it what it needs of its own."""
    place = folder / name
    place.mkdir()
    if command == "push":
        # it writes the licence into the card
        shutil.copytree(folder / "model", place / "out")
    return place


def hit(
    command: str, folder: Path, number: int, draw: random.Random, seconds: float, hub: Any
) -> Case:
    """Hit a command up to three times, and give it once more."""
    place = prepare(command, folder, f"{command}-{number}")
    words = words_of(command, folder, place / "out")
    hits = []
    for again in range(draw.randint(1, 3)):
        how = SIGNALS[(number + again) % len(SIGNALS)]
        after = draw.uniform(0, 1.1 * seconds)
        child = start(words, folder / "said.txt")
        time.sleep(after)
        os.killpg(child, how)
        code = wait(child)
        hits.append(f"{how.name} after {after:.2f} s: {code}")
    code = wait(start(words, folder / "said.txt"))
    expected = {"out", "out-kept"} if "-kept" in COMMANDS[command] else {"out"}
    beside = sorted(path.name for path in place.iterdir() if path.name not in expected)
    undisturbed = content(folder / command / "out", hub)
    same = code == 0 and content(place / "out", hub) == undisturbed
    return Case(command, hits, code, same, beside)


@contextlib.contextmanager
def hub_for_commands() -> Iterator[Any]:
    """A Hub in memory, which every command takes for the Hub."""
    with hub_in_memory() as hub:
        # it tells at length of every client that was killed
        hub.srv.handle_error = lambda *_: None
        changed = {"HF_HUB_OFFLINE": False, "ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": True}
        with mock.patch.multiple(constants, **changed), mock.patch.dict(os.environ, hub.env()):
            yield hub


def chaos(
    folder: Path, commands: Sequence[str], hits: int, seed: int = 0, hub: Any = None
) -> list[Case]:
    """All cases; the moments are drawn by `seed`. `hub` is where `push` publishes."""
    draw = random.Random(seed)
    # threads do not survive a fork
    torch.set_num_threads(1)
    save_start(folder / "model")
    write_images(folder / "images")
    cases = []
    for command in commands:
        prepare(command, folder, command)
        began = time.perf_counter()
        words = words_of(command, folder, folder / command / "out")
        if wait(start(words, folder / "said.txt")) != 0:
            raise RuntimeError(f"{command}: {(folder / 'said.txt').read_text()[-2000:]}")
        seconds = time.perf_counter() - began
        for number in range(hits):
            case = hit(command, folder, number, draw, seconds, hub)
            cases.append(case)
            print(f"{'good' if case.good else 'BAD '} {case}", file=sys.stderr, flush=True)
    return cases


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hits", type=int, default=6, help="cases of each command")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    commands = [word for word in options.commands if word != "push" or SHARED.is_dir()]
    if len(commands) < len(options.commands):
        print(f"push is left out: the Hub in memory is not at {SHARED}", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hub = stack.enter_context(hub_for_commands()) if "push" in commands else None
        cases = chaos(folder, commands, options.hits, options.seed, hub)
    good = sum(case.good for case in cases)
    print(f"{good} of {len(cases)} commands ended as if they had not been hit")
    return 0 if good == len(cases) else 1


if __name__ == "__main__":
    raise SystemExit(main())
