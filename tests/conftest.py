"""Fixtures for all tests: the shared material, and a quiet, offline, one-thread machine."""

import os
import socketserver
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import hypothesis
import pytest
import torch
from golden_cases import GOLDENS, SHARED, contents, facts, hub_in_memory
from small_runs import shorten, small_recipes, write_cifar, write_models

from mim_refiner_hf import RefineRecipe

# tiny models: waiting for each other costs threads more than they bring
torch.set_num_threads(1)
# "auto" finds a CPU without bfloat16, so that runs compute in fp32 on every machine
torch.cpu.get_capabilities = lambda: {"avx512_bf16": False}
# a server of a test, the stand-in Hub too, ends within 20 ms instead of half a second
socketserver.BaseServer.serve_forever.__defaults__ = (0.02,)
# a parquet stream closes at once instead of after five seconds
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.05


# no test is timed: another machine is slower
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """What a test has logged travels to xdist's main process as UTF-8, which odd names are not."""
    report = yield
    report.sections = [
        (heading, text.encode(errors="backslashreplace").decode())
        for heading, text in report.sections
    ]
    return report


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """`../shared`: goldens of the authors' code, small real data, a small real MAE.

    Tests that need it skip without it.
    """
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared fixtures and data, not found at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def goldens(shared: Path) -> Path:
    """The folder of goldens computed with the authors' code; its README states the tolerances."""
    return GOLDENS


@pytest.fixture
def mae_state(goldens: Path) -> dict[str, torch.Tensor]:
    """The state dict of the official MAE golden, to be damaged."""
    return dict(contents("mae", "checkpoint_full.pth")["model"])


@pytest.fixture
def mae_heads(goldens: Path) -> int:
    """The number of heads of the official MAE golden, which its file does not state."""
    return int(facts("mae")["num_heads"])


@pytest.fixture(scope="session")
def cifar(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """200 images of CIFAR-10 as a parquet file, 20 of each class."""
    return write_cifar(shared, tmp_path_factory.mktemp("cifar"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of two tiny encoders as transformers saves them, "vit_mae" and "data2vec"."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def recipe(cifar: str, models: dict[str, str], tmp_path: Path) -> Callable[..., RefineRecipe]:
    """Makes recipes of 4 + 4 steps on `cifar`: `recipe("name of the output folder", seed=1)`."""
    return small_recipes(models["vit_mae"], cifar, tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations with few runs of k-means and resamples, and small pictures."""
    shorten(monkeypatch)


@pytest.fixture
def without_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if umap-learn were not installed."""
    monkeypatch.setitem(sys.modules, "umap", None)


@pytest.fixture
def stub_hub(shared: Path) -> Iterator[Any]:
    """A Hub in memory: `url`, `repos`, and `env()` for a process that is to talk to it."""
    with hub_in_memory() as hub:
        yield hub
