"""Two processes with half the batch each, or four with a quarter, are one with all of it.

Loss, gradients, queue, whole runs.
"""

import io
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from small_store import make_encoder, make_processor
from torch import Tensor

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel, refine
from mim_refiner_hf.publishing.hub import save_model_folder
from mim_refiner_hf.refinement.heads import IdHeads
from mim_refiner_hf.refinement.metadata import Metadata
from mim_refiner_hf.refinement.queue import NearestNeighbourQueue
from mim_refiner_hf.refinement.recipe_files import parse_recipe
from mim_refiner_hf.refinement.refiner import NnaSettings, Refiner, neighbour_draw
from mim_refiner_hf.runtime.distributed import average_gradients
from mim_refiner_hf.runtime.optimisation import freeze

REPOSITORY = Path(__file__).parents[1]
SHAPE = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
# the queue wraps around in the third step
BATCH, STEPS, TOPK, QUEUE = 8, 3, 4, 20
# by the number of processes: images at a time
MICRO_BATCHES = {2: (None, 3), 4: (None, 1)}
MOMENTUM = 0.9
# what heads and refiner are made with, by method
HEADS: dict[str, dict[str, Any]] = {
    "mim-refiner": {},
    "mae-ct": {"activation": "relu", "predictor_norm": False},
    # metadata to forget, and nested widths
    "options": {},
}
REFINERS: dict[str, dict[str, Any]] = {
    "mim-refiner": {},
    "mae-ct": {"swap": "all", "norm_views": "apart", "target_momentum": MOMENTUM},
    "options": {"nested_widths": (3, 6, 12)},
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def take_steps(rank: int, processes: int, micro: int | None, method: str) -> dict[str, Tensor]:
    """A few steps of a small refiner in double precision on this process's share.

    All that it leaves behind, by name.
    """
    torch.manual_seed(0)
    encoder = MimRefinerModel(MimRefinerConfig(**SHAPE))
    freeze(encoder, blocks=0)
    settings = NnaSettings(2, 5, temperature=0.2, **REFINERS[method])
    count = 2 + len(settings.nested_widths)
    heads = IdHeads(count, 24, 16, 20, 8, **HEADS[method])
    queue = NearestNeighbourQueue(count, QUEUE, 8)
    refiner = Refiner(encoder, [1, 2], heads, queue, settings).double().train()
    told = ["loss", "head_losses", "alignment"]
    if method == "options":
        refiner.metadata = Metadata(np.arange(BATCH + 5 * STEPS)[None] % 3, [True])
    else:
        # of each process's images that have a neighbour, where not all have one
        told += ["neighbour_similarity", "neighbour_age"]
    optimizer = torch.optim.SGD((p for p in refiner.parameters() if p.requires_grad), lr=0.1)
    share, kept = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes), {}
    for step in range(STEPS):
        views = [
            torch.randn(BATCH, views, 3, size, size).double()[share]
            for views, size in ((2, 16), (3, 8))
        ]
        index, labels = torch.arange(BATCH) + 5 * step, torch.randint(-1, 3, (BATCH,))
        draw = neighbour_draw(0, step, TOPK, count, 2, BATCH // processes)
        optimizer.zero_grad()
        result = refiner.backward(
            views,
            index[share],
            labels[share],
            topk=TOPK,
            draw=draw,
            head_weights=[0.5, *[1.0] * (count - 1)],
            micro_batch_size=micro,
        )
        average_gradients(refiner.parameters())
        kept |= {
            f"gradient.{step}.{name}": p.grad
            for name, p in refiner.named_parameters()
            if p.grad is not None
        }
        for name in told:
            value = getattr(result, name).detach().double()
            if processes > 1:
                dist.all_reduce(value)
            kept[f"told.{step}.{name}"] = value / processes
        kept = {name: tensor.clone() for name, tensor in kept.items()}
        optimizer.step()
        refiner.follow_projectors()
    return kept | {f"state.{name}": tensor.clone() for name, tensor in refiner.state_dict().items()}


def process(rank: int, processes: int, port: int, folder: str) -> None:
    """One of several processes; writes what every case left behind."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=processes
    )
    for method in HEADS:
        for micro in MICRO_BATCHES[processes]:
            left = take_steps(rank, processes, micro, method)
            save_file(left, Path(folder) / f"{method}-{micro}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_are_one(tmp_path: Path, processes: int) -> None:
    torch.multiprocessing.spawn(process, (processes, free_port(), str(tmp_path)), nprocs=processes)
    for method, micro in itertools.product(HEADS, MICRO_BATCHES[processes]):
        expected = take_steps(0, 1, micro, method)
        first, *others = (
            load_file(tmp_path / f"{method}-{micro}-{rank}.safetensors")
            for rank in range(processes)
        )
        assert all(expected.keys() == found.keys() for found in (first, *others))
        assert sum(name.startswith("gradient.") for name in expected) > 3 * 40
        copies = sum(name.startswith("state.target_projector.") for name in expected)
        assert copies == (15 if method == "mae-ct" else 0)
        for name, tensor in expected.items():
            # the processes never drift apart
            assert all(torch.equal(first[name], found[name]) for found in others), name
            if not tensor.is_floating_point():
                # the queue's indices, labels, ages
                assert torch.equal(first[name], tensor), name
            else:
                # what is told for the log is in single precision
                tolerance = 1e-6 if name.startswith("told.") else 1e-9
                assert (first[name] - tensor).norm() <= tolerance * tensor.norm() + 1e-12, (
                    f"{name}, {method}, micro-batch {micro}"
                )


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small model and 72 images of three cameras without labels, 7 of them broken."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    processor = MimRefinerImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    save_model_folder(folder / "model", MimRefinerModel(MimRefinerConfig(**SHAPE)), processor)
    images = []
    for i in range(72):
        buffer = io.BytesIO()
        Image.fromarray(
            np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        ).save(buffer, "PNG")
        images.append(buffer.getvalue() if i % 11 else b"no image")
    table = {"image": images, "camera": [i % 3 for i in range(72)]}
    datasets.Dataset.from_dict(table).to_parquet(folder / "train.parquet")
    return {"model": str(folder / "model"), "dataset": str(folder / "train.parquet")}


@pytest.mark.slow
def test_accelerate_launch_trains_what_one_process_trains(
    start: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: dict[str, Any] = {
        **start,
        "batch_size": 16,
        "micro_batch_size": 4,
        "max_steps": 4,
        "epochs": 1,
        "head_epochs": 1,
        "warmup_epochs": 0,
        # AdamW's first steps are the sign of the gradient, which makes much of rounding
        "learning_rate": 4e-5,
        "head_learning_rate": 2e-5,
        "projector_dim": 16,
        "predictor_dim": 24,
        "embedding_dim": 8,
        "queue_size": 48,
        "topk": 4,
        "local_views": 2,
        "log_every": 1,
        "save_every": 3,
        "num_workers": 0,
        "eval_fraction": 0.1,
        "forget": "camera",
        "max_bad_fraction": 0.1,
        "report_to": "none",
        "mixed_precision": "no",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    # accelerate itself starts only one process then; ours are started by
    # `distributed.launch_processes`
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [
            *launch,
            str(REPOSITORY / "training/refine.py"),
            *words,
            "--output_dir",
            str(tmp_path / "two"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Plan") == 1 and "2 process(es)" in done.stdout

    refine(parse_recipe([*words, "--output_dir", str(tmp_path / "one")]))
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(logs[0]) == len(logs[1]) == 8
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            if "loss" in key or "neighbour" in key or key in ("step", "stage", "learning_rate"):
                assert two[key] == (
                    one[key] if isinstance(one[key], str) else pytest.approx(one[key], rel=1e-5)
                ), key
    metrics = [
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")
    ]
    lists = [
        json.loads((tmp_path / name / "broken.json").read_text())["images"]
        for name in ("one", "two")
    ]
    assert lists[0] == lists[1] and {entry["index"] for entry in lists[0]} <= set(range(0, 72, 11))
    assert [each["broken_images"] for each in metrics] == [len(found) for found in lists] and len(
        lists[0]
    ) >= 5
    assert metrics[1]["hardware"].startswith("2 x")
    assert metrics[1]["after"]["rankme"] == pytest.approx(metrics[0]["after"]["rankme"], rel=1e-3)
    # of what is left without the broken ones
    erased = [each["erased"] for each in metrics]
    assert erased[0]["images"] == erased[1]["images"] < 65
    assert erased[0]["directions"] == erased[1]["directions"] == 2
    assert (tmp_path / "two/model/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("start", [["-m", "mim_refiner_hf.cli", "refine"], ["training/refine.py"]])
def test_every_way_to_start_is_the_number_of_processes_that_was_asked_for(
    start: list[str], tmp_path: Path
) -> None:
    save_model_folder(tmp_path / "model", make_encoder(), make_processor())
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    words = ["--model", tmp_path / "model", "--output_dir", tmp_path / "out", "--dry_run"]
    done = subprocess.run(
        [*launch, *start, "--dataset", "digits", "--batch_size", "16", *map(str, words)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Plan") == 1 and "2 process(es)" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, environment, threads",
    [
        ([], {}, min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)),
        (["--num_cpu_threads_per_process", "1"], {}, 1),
        (["--num-cpu-threads-per-process=1"], {}, 1),
        ([], {"OMP_NUM_THREADS": "1"}, 1),
    ],
)
def test_a_process_launched_alone_computes_on_all_cores_unless_told_a_number(
    tmp_path, flags, environment, threads
):
    script = tmp_path / "threads.py"
    script.write_text(
        "import torch\n"
        "from mim_refiner_hf.runtime.launch import take_the_cores\n"
        "take_the_cores()\n"
        "print('threads', torch.get_num_threads())\n"
    )
    settings = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    settings += ["--dynamo_backend", "no", *flags]
    given = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *settings, str(script)],
        env={**given, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["threads", str(threads)], done.stderr[-3000:]
