"""Refinement under FSDP2.

Two processes that share the weights do what one does, and any number goes on from their
checkpoints.
"""

import errno
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import assert_identical, final_state, losses, shorten, small_recipes, trained_folder
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from mim_refiner_hf import (
    MimRefinerConfig,
    MimRefinerImageProcessor,
    MimRefinerModel,
    RefineRecipe,
    refine,
)
from mim_refiner_hf.publishing.hub import save_model_folder
from mim_refiner_hf.refinement.failure import NotFiniteError, check_step
from mim_refiner_hf.refinement.heads import GroupedLayer, IdHeads
from mim_refiner_hf.refinement.memory import memory_estimate
from mim_refiner_hf.refinement.queue import NearestNeighbourQueue
from mim_refiner_hf.refinement.refiner import NnaSettings, Refiner
from mim_refiner_hf.refinement.resolve import resolve
from mim_refiner_hf.runs.plan import plan_text
from mim_refiner_hf.runs.prepare import prepare
from mim_refiner_hf.runs.run import run
from mim_refiner_hf.runtime import checkpoint as checkpointing
from mim_refiner_hf.runtime.checkpoint import read_checkpoint, save_checkpoint
from mim_refiner_hf.runtime.distributed import average_gradients
from mim_refiner_hf.runtime.files import CheckpointError, sha256_of, write_json
from mim_refiner_hf.runtime.optimisation import freeze
from mim_refiner_hf.runtime.room import SaveError
from mim_refiner_hf.runtime.sharding import local, own_parts, shard, shard_like
from mim_refiner_hf.runtime.tensor_files import PLACES, ShardedTensors, tensor_files

SHAPE: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
# steps of a run; there is a checkpoint after every second one
LAST = 8


# --- two processes


def refiner_after_a_step(
    rank: int,
    *,
    sharded: bool,
    micro: int | None,
    bf16: bool,
    recompute: bool,
    **method: Any,
) -> tuple[Refiner, Any]:
    """A small refiner with the gradients of a batch of 8, half of it from each process, and what
    the step told.
    """
    torch.manual_seed(0)
    encoder, heads = MimRefinerModel(MimRefinerConfig(**SHAPE)), IdHeads(2, 32, 16, 20, 8)
    freeze(encoder, blocks=0)
    queue = NearestNeighbourQueue(2, 20, 8)
    refiner = Refiner(
        encoder,
        [0, 1],
        heads,
        queue,
        NnaSettings(2, 4, temperature=0.2, **method),
        bf16=bf16,
    ).train()
    if recompute:
        renamed = hasattr(encoder, "activation_checkpointing_enable")  # in transformers 5.23
        getattr(
            encoder,
            "activation_checkpointing_enable" if renamed else "gradient_checkpointing_enable",
        )()
    if sharded:
        shard(encoder, encoder.layers)
        for part in filter(None, (heads, refiner.target_projector)):
            shard(part, [layer for layer in part.modules() if isinstance(layer, GroupedLayer)])
    mine, settings = (
        slice(4 * rank, 4 * rank + 4),
        {"head_weights": [0.5, 1.0], "micro_batch_size": micro},
    )
    views = [torch.randn(8, count, 3, size, size)[mine] for count, size in ((2, 16), (2, 8))]
    told = refiner.backward(
        views, torch.arange(8)[mine], torch.zeros(8, dtype=torch.long)[mine], **settings
    )
    average_gradients(refiner.parameters())

    # as if the optimiser had moved them
    for parameter in refiner.heads.projector.parameters():
        local(parameter.data).mul_(2)
    refiner.follow_projectors()
    return refiner, told


def whole_gradients(refiner: Refiner) -> dict[str, Tensor]:
    found = {
        name: parameter.grad
        for name, parameter in refiner.named_parameters()
        if parameter.grad is not None
    }
    return {
        name: grad.full_tensor() if isinstance(grad, DTensor) else grad
        for name, grad in found.items()
    }


def check_gradients(rank: int) -> None:
    """Sharded or not, the gradients are the same.

    At once, in micro-batches, recomputed, in bf16, and as MAE-CT.
    """
    mae_ct = {"norm_views": "apart", "target_momentum": 0.9, "swap": "all"}
    for micro, bf16, recompute, method in (
        (None, False, False, {}),
        (3, False, True, {}),
        (3, True, False, {}),
        (3, False, False, mae_ct),
    ):
        case: dict[str, Any] = {"micro": micro, "bf16": bf16, "recompute": recompute, **method}
        plain, sharded = (
            refiner_after_a_step(rank, sharded=way, **case)[0] for way in (False, True)
        )
        expected, found = whole_gradients(plain), whole_gradients(sharded)
        assert found.keys() == expected.keys() and len(found) > 30, case
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= (
                1e-2 if bf16 else 1e-5
            ) * gradient.norm() + 1e-7, (name, case)
        for name, tensor in plain.state_dict().items():
            other = sharded.state_dict()[name]
            whole = other.full_tensor() if isinstance(other, DTensor) else other
            if "target_projector" in name:
                torch.testing.assert_close(whole, tensor, atol=1e-6, rtol=0, msg=name)
        kept = sum(local(parameter).numel() for parameter in sharded.parameters())
        assert kept <= 0.51 * sum(parameter.numel() for parameter in plain.parameters())


def check_that_one_bad_shard_stops_all(rank: int) -> None:
    refiner, told = refiner_after_a_step(
        rank, sharded=True, micro=None, bf16=False, recompute=False
    )
    check_step(refiner, told, step=1, sample_index=torch.arange(4))
    gradient = local(refiner.encoder.layers[1].mlp.fc1.weight.grad)
    gradient[0, 0] = float("nan") if rank == 1 else 0.0
    with pytest.raises(
        NotFiniteError,
        match=r"the gradient of step 1 is not finite.*1 of \d+ \(encoder\.layers\.1\.mlp\.fc1",
    ):
        check_step(refiner, told, step=1, sample_index=torch.arange(4))


def check_that_one_full_disk_stops_all(rank: int, folder: Path) -> None:
    """The second of two checkpoints, whose part one process cannot write, is absent in both, and
    the first one stays.
    """

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    modules = small_modules()
    shard(modules, [modules[3]])
    first = save_checkpoint(folder, step=1, tensors=modules.state_dict(), state={}, keep=1)
    with pytest.MonkeyPatch.context() as patched:
        if rank == 1:
            patched.setattr(checkpointing, "save_file", refuse)
        with pytest.raises(SaveError, match=r"No space left on device.*step-00000001 is intact"):
            save_checkpoint(folder, step=2, tensors=modules.state_dict(), state={}, keep=1)
    dist.barrier()
    assert list(folder.iterdir()) == [first] and read_checkpoint(first).step == 1


@contextmanager
def job(rank: int, port: int) -> Iterator[None]:
    """Two processes that have found each other; a run parts them in the end."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def process(
    rank: int, ports: list[int], fresh: RefineRecipe, grown: RefineRecipe, lost: RefineRecipe
) -> None:
    """One of two processes.

    A run from the start, one from a checkpoint of one process, one after the loss of a file.
    """
    torch.set_num_threads(1)
    os.environ |= {
        **FSDP2,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with job(rank, ports[0]):
        check_gradients(rank)
        check_that_one_bad_shard_stops_all(rank)
        check_that_one_full_disk_stops_all(rank, Path(fresh.output_dir).with_name("full"))
        run(fresh)
    if rank == 0:
        copy_run(fresh, lost)
        (
            Path(lost.output_dir) / f"checkpoints/step-{LAST:08}/tensors-00001-of-00002.safetensors"
        ).unlink()
    with job(rank, ports[1]):
        run(lost)
    with job(rank, ports[2]):
        refine(grown)


def copy_run(source: RefineRecipe, target: RefineRecipe, *, without: int | None = None) -> None:
    """The output folder of a run under another name, perhaps without the checkpoint of a step."""
    shutil.copytree(source.output_dir, target.output_dir)
    if without is not None:
        shutil.rmtree(Path(target.output_dir) / f"checkpoints/step-{without:08}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RefineRecipe]:
    """The runs of the process that tests and of two that share: all of them through."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    processor = MimRefinerImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    save_model_folder(folder / "model", MimRefinerModel(MimRefinerConfig(**SHAPE)), processor)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 20, 24, 3), dtype=np.uint8)
    images = datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels]})
    images.cast_column("image", datasets.Image()).to_parquet(folder / "train.parquet")
    changed = small_recipes(str(folder / "model"), str(folder / "train.parquet"), folder)
    # AdamW's first steps are the sign of the gradient, which makes much of rounding: small ones
    settings = {
        "batch_size": 16,
        "head_blocks": [0, 1],
        "learning_rate": 4e-5,
        "head_learning_rate": 4e-5,
    }
    recipes = {name: changed(name, **settings) for name in ("plain", "fresh", "lost", "shrunk")}
    recipes["grown"] = changed("grown", **settings, micro_batch_size=3)
    with pytest.MonkeyPatch.context() as patched:
        shorten(patched)
        run(recipes["plain"])
    copy_run(recipes["plain"], recipes["grown"], without=LAST)
    # what takes longest is done once
    multiprocessing.set_forkserver_preload(["mim_refiner_hf.cli"])
    arguments = (
        [free_port() for _ in range(3)],
        recipes["fresh"],
        recipes["grown"],
        recipes["lost"],
    )
    torch.multiprocessing.start_processes(process, arguments, nprocs=2, start_method="forkserver")
    copy_run(recipes["fresh"], recipes["shrunk"], without=LAST)
    with pytest.MonkeyPatch.context() as patched:
        shorten(patched)
        run(recipes["shrunk"])
    return recipes


def free_port() -> int:
    return int(dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False).port)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fresh", "grown", "shrunk"])
def test_sharded_or_not_the_run_is_the_same(runs: dict[str, RefineRecipe], name: str) -> None:
    """From the start; from one process to two, there in micro-batches; from two to one."""
    expected, found = losses(runs["plain"]), losses(runs[name])
    assert len(expected) == LAST and found == pytest.approx(expected, rel=1e-6)


def distance(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Iterable[str]
) -> float:
    """How far apart tensors of two states are, all of `names` as one vector.

    One by one they would not do: softmax does not see the bias of the keys, so that its gradient is
    rounding, and AdamW's step its sign.
    """
    return float(
        torch.cat(
            [(first[name].double() - second[name].double()).flatten() for name in names]
        ).norm()
    )


def test_all_that_a_checkpoint_holds_is_the_same(runs: dict[str, RefineRecipe]) -> None:
    expected, found = final_state(runs["plain"]), final_state(runs["fresh"])
    assert (
        isinstance(found, ShardedTensors)
        and found.keys() == expected.keys()
        and len(found) == len(expected) > 100
    )
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        # the queue's indices, labels, ages
        assert tensor.is_floating_point() or torch.equal(found[name], tensor), name
    zeros = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    for part in (
        "refiner.encoder.",
        "refiner.heads.",
        "refiner.queue.rows",
        "average.",
        ".exp_avg",
        ".exp_avg_sq",
    ):
        names = [name for name in expected if name.startswith(part) or name.endswith(part)]
        assert distance(found, expected, names) <= 1e-4 * distance(zeros, expected, names), part


def test_a_lost_file_costs_one_checkpoint(runs: dict[str, RefineRecipe]) -> None:
    """Two processes went on from the checkpoint before, and ended with the same bits."""
    assert_identical(runs["fresh"], runs["lost"])


def test_the_model_is_an_ordinary_one(runs: dict[str, RefineRecipe]) -> None:
    model = trained_folder(Path(runs["grown"].output_dir)) / "model.safetensors"
    expected = {
        name.removeprefix("average."): t
        for name, t in final_state(runs["plain"]).items()
        if name.startswith("average.")
    }
    start, found = load_file(f"{runs['plain'].model}/model.safetensors"), load_file(model)
    assert found.keys() == expected.keys() == start.keys()
    # of how far the refinement went
    assert distance(found, expected, expected) < 0.03 * distance(start, expected, expected)


# --- files, at any number of processes


@contextmanager
def as_process(rank: int, count: int) -> Iterator[None]:
    """As if this were one of `count` processes; nothing arrives from the others."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def small_modules() -> nn.Sequential:
    """Tensors that 2, 3 and 4 divide evenly, unevenly, along the second dimension, and so that some
    processes have nothing.
    """
    torch.manual_seed(1)
    modules = nn.Sequential(
        nn.Linear(12, 24), nn.Linear(5, 7), nn.Linear(1, 1), IdHeads(2, 8, 12, 9, 5)
    )
    return modules.requires_grad_(False)


@pytest.mark.parametrize("writers", [2, 3])
@pytest.mark.parametrize("readers", [1, 2, 3, 4])
def test_any_number_of_processes_reads_what_another_wrote(
    writers: int, readers: int, tmp_path: Path
) -> None:
    expected = small_modules().state_dict()
    paths = [tmp_path / name for name in tensor_files(writers)]
    for rank, path in enumerate(paths):
        with as_process(rank, writers):
            modules = small_modules()
            shard(modules, [modules[3]])
            parts, places = own_parts(modules.state_dict())
        save_file(parts, path, metadata={PLACES: json.dumps(places)})
    sizes = [path.stat().st_size for path in paths]
    assert max(sizes) < 2 * min(sizes)
    found = ShardedTensors(paths)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    taken: dict[str, list[Tensor]] = {name: [] for name in expected}
    for rank in range(readers):
        with as_process(rank, readers):
            modules = small_modules()
            shard(modules, [modules[3]])
            for name, own in modules.state_dict().items():
                placed = shard_like(found[name], own)
                assert torch.equal(local(placed), local(own)), (name, rank)
                taken[name].append(local(placed))
    assert all(
        sum(part.numel() for part in parts) >= expected[name].numel()
        for name, parts in taken.items()
    )


def write_two(folder: Path) -> Path:
    """A checkpoint whose matrix lies in two files."""
    path = save_checkpoint(folder, step=4, tensors={"whole": torch.ones(2)}, state={}, keep=1)
    (path / "tensors.safetensors").unlink()
    for i, name in enumerate(tensor_files(2)):
        places = {"matrix": {"shape": [4, 3], "offset": [2 * i, 0]}}
        save_file(
            {"matrix": torch.full((2, 3), float(i))},
            path / name,
            metadata={PLACES: json.dumps(places)},
        )
    return path


def vouch(path: Path) -> None:
    """A manifest that fits whatever lies in the folder."""
    files = {
        f.name: {"size": f.stat().st_size, "sha256": sha256_of(f)}
        for f in path.iterdir()
        if f.name != "manifest.json"
    }
    write_json(path / "manifest.json", {"step": 4, "files": files})


def test_files_that_do_not_add_up_are_named(tmp_path: Path) -> None:
    path = write_two(tmp_path)
    vouch(path)
    assert torch.equal(
        read_checkpoint(path).tensors["matrix"],
        torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None].expand(4, 3),
    )
    second = path / tensor_files(2)[1]
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match=r"tensors-00001-of-00002\.safetensors is missing"):
        read_checkpoint(path)
    second.write_bytes(kept[:-1] + b"!")
    with pytest.raises(
        CheckpointError,
        match=r"tensors-00001-of-00002\.safetensors is not the file that was written",
    ):
        read_checkpoint(path)
    second.unlink()
    vouch(path)
    with pytest.raises(CheckpointError, match=r"manifest\.json is of another checkpoint"):
        read_checkpoint(path)
    save_file({"other": torch.ones(1)}, second)
    vouch(path)
    with pytest.raises(
        CheckpointError, match=r"the parts of matrix have 6 values, the whole \[4, 3\] has 12"
    ):
        read_checkpoint(path)
    save_file(
        {"matrix": torch.ones(2, 3)},
        second,
        metadata={PLACES: '{"matrix": {"shape": [4, 3], "offset": [3, 0]}}'},
    )
    vouch(path)
    with pytest.raises(
        CheckpointError,
        match=r"tensors-00001-of-00002\.safetensors holds matrix at \[3, 0\], which is not within",
    ):
        read_checkpoint(path)


# --- what is said before


REFUSED = {
    "--fsdp_version 1 is not supported": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
    "DeepSpeed is not supported": {"ACCELERATE_USE_DEEPSPEED": "true"},
    "Megatron-LM is not supported": {"ACCELERATE_USE_MEGATRON_LM": "true"},
    "--fsdp_offload_params true is not supported": {**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"},
    "use --gradient_checkpointing true": {**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"},
    "--fsdp_reshard_after_forward false is not supported": {
        **FSDP2,
        "FSDP_RESHARD_AFTER_FORWARD": "false",
    },
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_is_not_supported_is_refused_first(
    problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in REFUSED[problem].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=problem):
        prepare(RefineRecipe(model="no/model", dataset="no/data"))


def test_the_plan_says_what_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MimRefinerConfig(**SHAPE)
    asked = RefineRecipe(model="m", dataset="d", batch_size=8, queue_size=64)
    recipe = resolve(asked, config, 64, processes=4)
    before = memory_estimate(recipe, config)
    settings: dict[str, Any] = {"num_eval": 0, "device": "cpu", "available": 2**30}
    assert "FSDP2" not in plan_text(recipe, config, **settings)
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    after = memory_estimate(recipe, config)
    assert [
        before[part] / after[part]
        for part in ("encoder and EMA", "heads", "AdamW", "queue", "activations")
    ] == [
        4,
        4,
        4,
        1,
        1,
    ]
    text = plan_text(recipe, config, **settings)
    assert "shards  FSDP2: each of 4 processes keeps 1/4 of encoder, moving average, heads" in text
    alone = resolve(asked, config, 64)
    assert "one process has nothing to share" in plan_text(alone, config, **settings)
