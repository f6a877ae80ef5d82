"""Fixtures for all tests: the shared material beside the repository, and a quiet, offline, two-thread machine."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)  # tiny models: waiting for each other costs threads more than they bring

SHARED = Path(os.environ.get("MIM_REFINER_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """`../shared`: goldens of the authors' code, small real data, a small real MAE. Tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared fixtures and data, not found at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def goldens(shared: Path) -> Path:
    """The folder of goldens computed with the authors' code; its README states the tolerances."""
    return shared / "fixtures"


@pytest.fixture
def mae_state(goldens: Path) -> dict[str, torch.Tensor]:
    """The state dict of the official MAE golden, to be damaged."""
    return dict(torch.load(goldens / "mae/checkpoint_full.pth", weights_only=True)["model"])


@pytest.fixture
def without_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if umap-learn were not installed."""
    monkeypatch.setitem(sys.modules, "umap", None)


@pytest.fixture
def stub_hub(shared: Path) -> Iterator[Any]:
    """A Hub in memory: `url`, `repos`, and `env()` for the environment of a subprocess that is to talk to it."""
    spec = importlib.util.spec_from_file_location("hub_stub", shared / "tools" / "hub_stub.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.HubStub() as hub:
        yield hub
