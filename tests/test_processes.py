"""Several processes give what one gives.

Features in memory and on disk, from a table and a stream, k-NN, k-means, whole reports.
"""

import json
import multiprocessing
import os
import socket
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from small_store import (
    BATCH,
    COUNT,
    SHARD,
    contents,
    embed,
    make_encoder,
    make_processor,
    write_photos,
)
from torch import Tensor

from mim_refiner_hf.cli import main
from mim_refiner_hf.clustering import ArrayBatches, kmeans
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.data.loading import Loading
from mim_refiner_hf.data.stream import open_stream
from mim_refiner_hf.evaluation import (
    FeatureStore,
    embed_images,
    extract_features,
    knn,
    knn_predict,
    search,
)
from mim_refiner_hf.evaluation.cluster_scores import kmeans_runs
from mim_refiner_hf.evaluation.knn import standardised_bank
from mim_refiner_hf.evaluation.search import nearest
from mim_refiner_hf.publishing import save_model_folder

# the rows divide by neither number of processes
GROUPS, ROWS = 6, 331


def separated_rows() -> tuple[Tensor, Tensor]:
    """Rows (331, 12) in six groups far from each other, and their groups."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(GROUPS, (ROWS,), generator=generator)
    centres = 5 * torch.randn(GROUPS, 12, generator=generator)
    return centres[groups] + torch.randn(ROWS, 12, generator=generator), groups


def answers() -> dict[str, Tensor]:
    """k-NN of noisy rows in a bank where every row stands twice, with two classes.

    Nothing but the order settles these ties. The processes share the rows where those have more
    tiles than the bank, else the bank; two of its tiles more than there are processes, or fewer.
    """
    generator = torch.Generator().manual_seed(1)
    bank, rows = (torch.randn(count, 12, generator=generator) for count in (150, ROWS))
    classes = torch.randint(5, (300,), generator=generator)
    kept = (search.QUERIES_AT_ONCE, search.BANK_AT_ONCE, knn._ROWS_AT_ONCE)
    told = {}
    # tiles of rows and of the bank: 11 and 5, 3 and 5, 1 and 3
    for tile, tile_of_bank in ((32, 64), (128, 64), (512, 100)):
        search.QUERIES_AT_ONCE, search.BANK_AT_ONCE, knn._ROWS_AT_ONCE = tile, tile_of_bank, 37
        twice, shown = standardised_bank(torch.cat([bank, bank]), rows, shared=True)
        name = f"k-NN {tile} x {tile_of_bank}"
        told[f"{name}, cosine"], told[f"{name}, row"] = nearest(shown, twice, 9, shared=True)
        found = knn_predict(twice, classes, shown, k=(1, 9), temperature=(0.07, 0.5), shared=True)
        told |= {f"{name} {setting}": predicted for setting, predicted in found.items()}
    search.QUERIES_AT_ONCE, search.BANK_AT_ONCE, knn._ROWS_AT_ONCE = kept
    return told


def in_memory(photos: Path) -> dict[str, Tensor]:
    """Features and labels of all images."""
    found = extract_features(
        make_encoder(),
        open_images(str(photos)),
        make_processor(),
        blocks=[1],
        loading=Loading(BATCH),
    )
    assert found.labels is not None
    return {"features": found.features, "block 1": found.blocks[1], "labels": found.labels}


def groups_of(rank: int, processes: int) -> dict[str, Tensor]:
    """k-means of every n-th row: this process's assignments, and the centroids of all."""
    found = kmeans(
        ArrayBatches(separated_rows()[0][rank::processes], rows_per_batch=50), GROUPS, runs=3
    )
    return {"assignments": found.assignments, "centroids": found.centroids}


def process(rank: int, processes: int, port: int, photos: Path, folder: Path) -> None:
    """One of several processes; writes all that it was told."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=processes
    )
    embed(photos, folder / "table")
    embed_images(
        make_encoder(),
        open_stream(str(photos)),
        make_processor(),
        folder / "stream",
        shard_size=SHARD,
        loading=Loading(BATCH),
    )
    save_file(
        in_memory(photos) | answers() | groups_of(rank, processes), folder / f"{rank}.safetensors"
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_are_one(photos: Path, tmp_path: Path, processes: int) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = int(probe.getsockname()[1])
    arguments = (processes, port, photos, tmp_path)
    torch.multiprocessing.start_processes(process, arguments, nprocs=processes, start_method="fork")
    told = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(processes)]

    embed(photos, tmp_path / "one")
    assert contents(tmp_path / "table") == contents(tmp_path / "one")  # the same bytes
    one, stream = FeatureStore(tmp_path / "one"), FeatureStore(tmp_path / "stream")
    assert (
        stream.indices.tolist() == list(range(COUNT)) and stream.manifest["num_images"] == COUNT
    )  # nothing twice or lost
    assert torch.equal(stream.features("block3.cls"), one.features("block3.cls"))

    expected = in_memory(photos) | answers()
    for found in told:
        assert found.keys() == {*expected, "assignments", "centroids"}
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor) or name in ("features", "block 1"), name
        for name in ("features", "block 1"):  # other images share a batch
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)

    alone, (rows, groups) = groups_of(0, 1), separated_rows()
    assignments = torch.empty(len(rows), dtype=torch.int64)
    for rank, found in enumerate(told):
        assignments[rank::processes] = found["assignments"]
        # the processes agree to the last bit
        assert torch.equal(found["centroids"], told[0]["centroids"])
    order = [int(assignments[groups == group][0]) for group in range(GROUPS)]
    assert (
        torch.equal(assignments, torch.tensor(order)[groups]) and len(set(order)) == GROUPS
    )  # what was planted
    names = [int(alone["assignments"][groups == group][0]) for group in range(GROUPS)]
    torch.testing.assert_close(
        told[0]["centroids"][order], alone["centroids"][names], atol=1e-5, rtol=0
    )


def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mim_refiner_hf.evaluation.evidence.RESAMPLES", 50)
    monkeypatch.setattr(
        "mim_refiner_hf.evaluation.report.kmeans_runs", partial(kmeans_runs, runs=5)
    )


def report_process(rank: int, port: int, words: list[str], said: Path) -> None:
    """One of two processes as a launcher starts them, which find each other by themselves."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    few_runs(pytest.MonkeyPatch())
    with said.with_suffix(f".{rank}").open("w") as file, redirect_stdout(file):
        assert main(words) == 0
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_report_of_two_processes_is_that_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_runs(monkeypatch)
    save_model_folder(tmp_path / "model", make_encoder(), make_processor())
    (tmp_path / "model/README.md").write_text(
        "---\nlicense: apache-2.0\n---\n\n# A card\n", encoding="utf-8"
    )
    words = [
        "evaluate",
        str(tmp_path / "model"),
        "--dataset",
        "digits",
        "--num_workers",
        "0",
        "--protocols",
        "low_shot",
    ]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = int(probe.getsockname()[1])
    # a fork of this very process could not use its threads
    multiprocessing.set_forkserver_preload(["mim_refiner_hf.cli"])
    arguments = (port, [*words, "--output_dir", str(tmp_path / "two")], tmp_path / "said")
    torch.multiprocessing.start_processes(
        report_process, arguments, nprocs=2, start_method="forkserver"
    )
    first, second = ((tmp_path / f"said.{rank}").read_text() for rank in range(2))
    # one of them speaks and writes
    assert "The report:" in first and "The card:" in first and second == ""
    assert main([*words, "--output_dir", str(tmp_path / "one")]) == 0
    two, one = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("two", "one")
    )
    assert two["hardware"].startswith("2 x ") and not one["hardware"].startswith("2 x ")
    assert two["after"].keys() == one["after"].keys() and two["broken"] == one["broken"] == []
    for metric in ("knn_accuracy", "rankme", "low_shot_1_accuracy", "cluster_accuracy_mean"):
        assert two["after"][metric] == pytest.approx(one["after"][metric], abs=0.01), (
            metric
        )  # other images share a batch
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model",
        "one",
        "said.0",
        "said.1",
        "two",
    ]  # no lock, no passing features


def test_a_command_for_one_process_is_refused_in_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["cluster", "photos", "--model", "model"]) == 2
    assert (
        "error: cluster: runs in one process, not 2; start it without the launcher"
        in capsys.readouterr().err
    )
