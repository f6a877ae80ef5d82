"""A run that is killed, over and over.

Whatever happens to it, the same command ends with the very weights it would have had.

    python -m tests.chaos  # 50 kills, 20 polite signals; about 10 minutes on one core
    python -m tests.chaos --kills 3 --signals 2 --json chaos.json
    # torchrun with two processes, one of which is killed
    python -m tests.chaos --kills 0 --signals 0 --lost_worker

A refinement of 60 steps (20 of them head warm-up) with a checkpoint every 5 is run once
undisturbed. Then, for every case, it is started anew in a process of its own, hit in a random step,
and the same command is given again until it is through. Every second SIGKILL waits for the next
checkpoint that is being written, every tenth comes before the first step. A case is good when
weights and log are those of the undisturbed run, bit by bit, and a polite signal ended the process
with 143 or 130. Exits with 1 if any case is not.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import psutil
import torch
from transformers import initialization

# as a command; pytest puts this folder on the path
if __package__:
    sys.path.insert(0, str(Path(__file__).parent))

from small_runs import trained_folder

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel, cli
from mim_refiner_hf.publishing.hub import save_model_folder

STEPS, SAVE_EVERY = 60, 5
ARGUMENTS = (
    "--dataset digits --eval_fraction 0 --head_blocks 1 2 --projector_dim 64 --predictor_dim 64 "
    "--embedding_dim 32 --queue_size 128 "
    "--topk 3 --local_views 2 --colour false --batch_size 64 --head_epochs 1 --epochs 2 "
    "--warmup_epochs 0.1 --ema_decay 0.9 "
    f"--save_every {SAVE_EVERY} --log_every 1 --report_to none"
).split()
POLITE = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGUSR2: 143, signal.SIGINT: 130}


@dataclass
class Case:
    """One run that was hit.

    By what, when (seconds), what the disk and the process looked like then, and how it ended.

    Attributes:
        while_writing: a half-written checkpoint was left behind.
        steps_done: the step of the newest checkpoint when it was hit; 0 for none.
        exit_code: of the process that was hit, as a shell has it.
        seconds_to_exit: from the signal to the end of the process.
        identical: weights and losses are those of the undisturbed run.
    """

    signal: str
    after: float
    while_writing: bool
    steps_done: int
    exit_code: int
    seconds_to_exit: float
    identical: bool

    @property
    def good(self) -> bool:
        """Identical in the end, and a polite signal was answered politely."""
        polite = POLITE.get(signal.Signals[self.signal])
        return self.identical and (polite is None or self.exit_code == polite)


def save_start(folder: Path) -> None:
    """The starting weights: a tiny encoder with random weights."""
    torch.manual_seed(0)
    shape = {
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    # torch 2.10 and 2.14 draw truncated normals by two methods; at +-100 deviations none is needed
    untruncated = {"trunc_normal_": lambda x, mean, std, **_: torch.nn.init.normal_(x, mean, std)}
    with mock.patch.dict(initialization.TORCH_INIT_FUNCTIONS, untruncated):
        encoder = MimRefinerModel(MimRefinerConfig(**shape, intermediate_size=64))
    processor = MimRefinerImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    save_model_folder(folder, encoder, processor)


def start(model: Path, output: Path, workers: int) -> int:
    """Give the command in a process of its own; its pid. What it says goes into `<output>.txt`."""
    if (child := os.fork()) != 0:
        return child
    code = 99
    try:
        # a group of its own: data-loading workers die with it
        os.setsid()
        log = os.open(output.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        flags = ["--model", str(model), "--output_dir", str(output), "--num_workers", str(workers)]
        code = cli.main(["refine", *ARGUMENTS, *flags])
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(child: int) -> int:
    """Its exit code, 128 + the signal if one killed it."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return 128 - code if code < 0 else code


def ending(output: Path) -> str:
    """A digest of what the run ended with: the weights it trained, and the losses of its log."""
    weights = hashlib.sha256(
        (trained_folder(output) / "model.safetensors").read_bytes()
    ).hexdigest()
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), (
        "the log does not have every step once"
    )
    return (
        weights + hashlib.sha256(json.dumps([line["loss"] for line in lines]).encode()).hexdigest()
    )


def writing(output: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any((output / "checkpoints").glob(".tmp-*"))


def steps_done(output: Path) -> int:
    """The step of the newest checkpoint."""
    return max(
        (int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*")),
        default=0,
    )


def steps_logged(output: Path) -> int:
    """How many steps the log has."""
    log = output / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def hit(
    number: signal.Signals,
    model: Path,
    output: Path,
    *,
    step: int,
    after: float,
    aimed: bool,
    workers: int,
) -> Case:
    """Start the run, hit it `after` seconds after its `step` (if `aimed`: when a checkpoint is
    being written next), run it through.

    `identical` is open.
    """
    child, began = start(model, output, workers), time.perf_counter()
    ended = False

    def until(reached: Callable[[], bool]) -> None:
        nonlocal ended
        while not reached() and not ended:
            ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            time.sleep(0.0002)

    until(lambda: steps_logged(output) >= step)
    reached = time.perf_counter()
    until(lambda: time.perf_counter() - reached >= after)
    if aimed:
        until(lambda: writing(output))
    hit_at = time.perf_counter()
    os.killpg(child, number)
    code, seconds = wait(child), time.perf_counter() - hit_at
    case = Case(
        number.name,
        round(hit_at - began, 3),
        writing(output),
        steps_done(output),
        code,
        round(seconds, 3),
        False,
    )
    while (code := wait(start(model, output, workers))) != 0:
        raise RuntimeError(
            f"the same command did not go on, exit code {code}: "
            f"{output.with_suffix('.txt').read_text()[-2000:]}"
        )
    return case


def chaos(folder: Path, kills: int, signals: int, *, workers: int = 0, seed: int = 0) -> list[Case]:
    """All cases; the moments are drawn by `seed`."""
    draw = random.Random(seed)
    # threads do not survive a fork
    torch.set_num_threads(1)
    save_start(folder / "start")
    code = wait(start(folder / "start", folder / "undisturbed", workers))
    assert code == 0, (folder / "undisturbed.txt").read_text()
    expected, cases = ending(folder / "undisturbed"), []
    for i in range(kills + signals):
        polite = i >= kills
        number = list(POLITE)[i % len(POLITE)] if polite else signal.SIGKILL
        early = not polite and i % 10 == 8
        step, after = (
            (0, draw.uniform(0, 1))
            if early
            else (draw.randrange(1, STEPS - 2 * SAVE_EVERY), draw.uniform(0, 0.05))
        )
        output, aimed = folder / f"case-{i:03d}", not polite and i % 2 == 1
        case = hit(
            number, folder / "start", output, step=step, after=after, aimed=aimed, workers=workers
        )
        case.identical = ending(output) == expected
        cases.append(case)
        print(f"{i + 1}/{kills + signals} {case}", file=sys.stderr, flush=True)
    return cases


def lost_worker(folder: Path) -> bool:
    """Whether two processes, one of them killed and started again by torchrun, end with the weights
    of two undisturbed ones.
    """
    save_start(folder / "start")
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--max_restarts",
        "3",
    ]
    weights = []
    for output in (folder / "killed", folder / "undisturbed"):
        flags = [
            "--model",
            str(folder / "start"),
            "--output_dir",
            str(output),
            "--num_workers",
            "0",
        ]
        process = subprocess.Popen(
            [*launcher, "training/refine.py", *ARGUMENTS, *flags],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if output.name == "killed":
            while process.poll() is None and steps_done(output) == 0:
                time.sleep(0.05)
            os.kill(psutil.Process(process.pid).children()[-1].pid, signal.SIGKILL)
        if process.wait() != 0:
            return False
        weights.append(
            hashlib.sha256((trained_folder(output) / "model.safetensors").read_bytes()).hexdigest()
        )
    return weights[0] == weights[1]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="runs hit by SIGKILL")
    parser.add_argument(
        "--signals", type=int, default=20, help="runs hit by SIGTERM, SIGUSR1, SIGUSR2 or SIGINT"
    )
    parser.add_argument("--workers", type=int, default=0, help="data-loading workers")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--lost_worker", action="store_true", help="also kill one of two processes under torchrun"
    )
    parser.add_argument("--json", type=Path, help="write all cases there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asked = options.kills or options.signals
        cases = (
            chaos(
                Path(folder),
                options.kills,
                options.signals,
                workers=options.workers,
                seed=options.seed,
            )
            if asked
            else []
        )
    with tempfile.TemporaryDirectory() as folder:
        restarted = not options.lost_worker or lost_worker(Path(folder))
    good = sum(case.good for case in cases)
    written = sum(case.while_writing for case in cases)
    print(
        f"{good} of {len(cases)} runs ended with the same bits; {written} were hit while a "
        f"checkpoint was being written"
    )
    if options.lost_worker:
        print(f"a lost worker: {'the same bits' if restarted else 'NOT the same bits'}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(case) for case in cases], indent=1) + "\n")
    return 0 if restarted and good == len(cases) else 1


if __name__ == "__main__":
    raise SystemExit(main())
