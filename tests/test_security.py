"""What SECURITY.md promises of the code as a whole.

Nothing dangerous in it, no remote code, safe floors, encrypted addresses.
"""

import configparser
import importlib.metadata
import json
import re
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import get_session
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image
from safetensors.torch import save_file
from syntax_walk import findings
from transformers import AutoModel, pipeline

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel, cli
from mim_refiner_hf.conversion import CheckpointError, download
from mim_refiner_hf.conversion.zoo import ZOO_ENTRIES
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.publishing import save_model_folder

REPOSITORY = Path(__file__).parents[1]

# --- the syntax trees -----------------------------------------------------------------------------

FORBIDDEN = [
    "import pickle",
    "import cPickle as p",
    "from pickle import loads",
    "import dill",
    "import joblib",
    "import marshal",
    "import shelve",
    "eval('1')",
    "exec('x = 1')",
    "compile(text, 'f', 'exec')",
    "__import__(name)",
    "import os\nos.system('ls')",
    "from os import popen as p\np('ls')",
    "import subprocess as s\ns.run('ls', shell=True)",
    "import subprocess\nsubprocess.Popen(x, shell=flag)",
    "import subprocess\nsubprocess.getoutput('ls')",
    "import tempfile\ntempfile.mktemp()",
    "import shutil\nshutil.unpack_archive('a.zip')",
    "import tarfile\ntarfile.open(x).extractall()",
    "import yaml\nyaml.load(text)",
    "import yaml\nyaml.load(text, yaml.Loader)",
    "import yaml\nyaml.load(text, Loader=yaml.FullLoader)",
    "import yaml\nclass L(yaml.Loader): ...\nyaml.load(text, L)",
    "import yaml\nyaml.unsafe_load(text)",
    "import torch\ntorch.load(f)",
    "import torch\ntorch.load(f, weights_only=False)",
    "from torch import load\nload(f, weights_only=safe)",
    "import torch\ntorch.jit.load(f)",
    "import torch\ntorch.hub.load('a/b', 'c')",
    "import numpy as np\nnp.load(f, allow_pickle=True)",
    "import pandas as pd\npd.read_pickle(f)",
    "accelerator.load_state(folder)",
    "AutoModel.from_pretrained(name, trust_remote_code=True)",
    "AutoModel.from_pretrained(name, **{'trust_remote_code': True})",
    "def load(name, trust_remote_code=True): ...",
    "def load(name, *, trust_remote_code=True): ...",
    "requests.get(url, verify=False)",
    "import ssl\nssl._create_unverified_context()",
    "model.load_state_dict(state, strict=False)",
]
ALLOWED = [
    "zip(a, b, strict=False)",
    "from pickle import UnpicklingError",
    "import re\nre.compile('a')",
    "layer.compile()",
    "model.eval()",
    "import torch\ntorch.load(f, weights_only=True)",
    "import subprocess\nsubprocess.run(['ls'])",
    "import yaml\nyaml.safe_load(text)",
    "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
    "import yaml\nclass L(yaml.SafeLoader): ...\nyaml.load(text, L)",
    "import numpy as np\nnp.load(f)",
    "zip(a, b, strict=True)",
    "zip(a, b,\n    strict=False)",
    "AutoModel.from_pretrained(name)",
    "from .pickle import jar",
    "def load(name, trust_remote_code=False): ...",
]


@pytest.mark.parametrize("source", FORBIDDEN)
def test_the_walk_sees(source: str) -> None:
    assert findings(f"{source}\n"), source


@pytest.mark.parametrize("source", ALLOWED)
def test_the_walk_spares(source: str) -> None:
    assert findings(f"{source}\n") == []


def test_nothing_forbidden_is_in_the_code() -> None:
    """Everything that is installed, started or copied from."""
    files = [
        file
        for folder in ("mim_refiner_hf", "training", "examples", "benchmarks")
        for file in (REPOSITORY / folder).rglob("*.py")
    ]
    assert len(files) > 80
    found = []
    for file in files:
        place = file.relative_to(REPOSITORY)
        source = file.read_text(encoding="utf-8")
        found += [f"{place}:{line}: {what}" for line, what in findings(source)]
    assert found == []


# --- code that comes with a model or a data set ---------------------------------------------------


@pytest.fixture
def stranger(tmp_path: Path) -> Any:
    """Makes a model folder whose every file asks to run `evil.py`, which would leave the file
    `mark`.
    """

    def make(model_type: str) -> Path:
        folder = tmp_path / f"stranger-{model_type}"
        torch.manual_seed(0)
        shape = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        }
        processor = MimRefinerImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        )
        save_model_folder(
            folder,
            MimRefinerModel(MimRefinerConfig(**shape, image_size=16, patch_size=8)),
            processor,
        )
        # a stranger's folder has none, or its own
        (folder / "weights_digests.json").unlink()
        code = f"open({str(tmp_path / 'mark')!r}, 'w')\n"
        for name in ("evil.py", *(file.name for file in folder.glob("*.py"))):
            (folder / name).write_text(code)
        classes = (
            "AutoConfig",
            "AutoModel",
            "AutoImageProcessor",
            "AutoFeatureExtractor",
            "AutoProcessor",
            "AutoBackbone",
        )
        for name in ("config.json", "preprocessor_config.json"):
            config = json.loads((folder / name).read_text())
            config |= {"auto_map": dict.fromkeys(classes, "evil.Evil"), "trust_remote_code": True}
            config |= {
                "custom_pipelines": {
                    "image-clustering": {"impl": "evil.Evil", "pt": ["AutoModel"], "type": "image"}
                }
            }
            (folder / name).write_text(
                json.dumps(config | ({"model_type": model_type} if name == "config.json" else {}))
            )
        return folder

    return make


@pytest.mark.parametrize("model_type", ["mim_refiner", "evil"])
def test_no_command_runs_a_models_own_code(
    model_type: str, stranger: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of ours with other code loads without it; an unknown kind of model is refused."""
    folder = str(stranger(model_type))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(20):
        Image.new("RGB", (16, 16), (12 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    commands = [
        ["cluster", "photos", "--model", folder, "--num_clusters", "2", "--out", "groups"],
        [
            "evaluate",
            folder,
            "--dataset",
            "photos",
            "--num_workers",
            "0",
            "--output_dir",
            "evaluation",
        ],
        ["embed", folder, "--dataset", "photos", "--num_workers", "0", "--out", "features"],
        ["convert", folder, "converted"],
        ["export", folder, "exported", "--to", "vit"],
        [
            "refine",
            "--model",
            folder,
            "--dataset",
            "photos",
            "--dry_run",
            "--batch_size",
            "2",
            "--eval_fraction",
            "0",
            "--max_steps",
            "2",
        ],
    ]
    codes = {words[0]: cli.main(words) for words in commands}
    assert set(codes.values()) == ({0} if model_type == "mim_refiner" else {2}), codes
    assert not (tmp_path / "mark").exists()


def test_transformers_asks_before_it_runs_a_models_own_code(
    stranger: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the package imported, our kind of model needs no code from the folder.

    Another kind is not loaded without a word.
    """
    monkeypatch.setattr(sys, "stdin", None)
    assert type(AutoModel.from_pretrained(stranger("mim_refiner"))) is MimRefinerModel
    evil = str(stranger("evil"))
    for load in (
        lambda: AutoModel.from_pretrained(evil),
        lambda: pipeline("image-clustering", model=evil),
    ):
        with pytest.raises((ValueError, OSError, EOFError, RuntimeError, KeyError)):
            load()
    assert not (tmp_path / "mark").exists()


def test_a_data_sets_script_is_not_run(tmp_path: Path) -> None:
    """Beside images, as the folder's own script, or named itself."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("photos.py", "dataset.py", "__init__.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    assert len(open_images(str(folder))) == 1
    with pytest.raises(ValueError, match=r"neither \.parquet nor \.tar"):
        open_images(str(folder / "photos.py"))
    assert not (tmp_path / "mark").exists()


# --- downloads ------------------------------------------------------------------------------------


def test_every_address_of_the_zoo_is_encrypted() -> None:
    assert all(
        entry.url.startswith("https://") or (entry.repo and not entry.url) for entry in ZOO_ENTRIES
    )


def test_a_redirection_to_an_open_connection_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Followed for real, by the library that huggingface_hub's version uses."""
    library = import_module(type(get_session()).__module__.partition(".")[0])

    def answer(request: Any) -> Any:
        if request.url.host == "host.example":
            headers = {"Location": "http://mirror.example/file.pth"}
            return library.Response(302, headers=headers)
        # the open address may lead back to an encrypted one: what it says could still be a lie
        if request.url.scheme == "http":
            return library.Response(302, headers={"Location": "https://safe.example/file.pth"})
        return library.Response(200, headers={"Content-Length": "4"}, content=b"file")

    client = library.Client(transport=library.MockTransport(answer))
    monkeypatch.setattr(download, "get_session", lambda: client)
    monkeypatch.setattr(download.constants, "is_offline_mode", lambda: False)
    with pytest.raises(
        CheckpointError,
        match=r"https://host\.example/file\.pth leads to http://mirror\.example/file\.pth",
    ):
        download.download("https://host.example/file.pth", tmp_path / "file.pth")
    assert list(tmp_path.iterdir()) == []


# --- dependencies ---------------------------------------------------------------------------------

# package: the first version without the vulnerability, and its name
FLOORS = {
    # a soft lock follows a link put in its place; 3.20.1 for CVE-2025-68146, a truncated file
    "filelock": ("3.20.3", "CVE-2026-22701"),
    "gradio": ("6.16.0", "CVE-2026-49119"),  # path traversal
    "jinja2": ("3.1.6", "CVE-2025-27516"),  # sandbox
    "onnx": ("1.21.0", "CVE-2026-27489"),  # path traversal by links
    "pillow": ("12.3.0", "CVE-2026-59199"),  # writes out of bounds
    "psutil": ("5.6.6", "CVE-2019-18874"),  # double free
    # use after free; 14.0.1 for CVE-2023-47248, code run while reading parquet
    "pyarrow": (
        "23.0.1",
        "CVE-2026-25087",
    ),
    "pyyaml": ("5.4", "CVE-2020-14343"),  # code run by full_load
    # training data kept in a vectoriser
    "scikit-learn": ("1.5.0", "CVE-2024-5206"),
    "setuptools": ("78.1.1", "CVE-2025-47273"),  # path traversal
    # memory corruption in spite of weights_only; 2.6 for CVE-2025-32434
    "torch": (
        "2.10.0",
        "CVE-2026-24747",
    ),
    # code run by command-line arguments
    "tqdm": ("4.66.3", "CVE-2024-34062"),
    # code run by a config in spite of trust_remote_code=False; 5.3 for CVE-2026-4372
    "transformers": ("5.5.0", "CVE-2026-5241"),
}


def requirements() -> dict[str, list[Requirement]]:
    """Every requirement of the package, its extras and its build, by name."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    lists = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    lists += [
        "\n".join(
            tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["build-system"]["requires"]
        )
    ]
    found: dict[str, list[Requirement]] = {}
    for line in "\n".join(lists).splitlines():
        if line.strip() and not line.strip().startswith("mim_refiner_hf["):
            requirement = Requirement(line.strip())
            found.setdefault(requirement.name.lower(), []).append(requirement)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FLOORS))
def test_floors_are_above_known_vulnerabilities(name: str) -> None:
    safe, cve = FLOORS[name]
    for requirement in requirements().get(name, []):
        floors = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
        assert floors and max(floors) >= Version(safe), (
            f"{requirement} allows {cve}, fixed in {safe}"
        )
        text = (
            REPOSITORY / ("pyproject.toml" if name == "setuptools" else "setup.cfg")
        ).read_text()
        assert cve in text, f"{cve} is why {requirement}: say so beside it"
    if name in {
        package.lower()
        for package in importlib.metadata.packages_distributions().values()
        for package in package
    }:
        assert Version(importlib.metadata.version(name)) >= Version(safe), (
            f"the installed {name} has {cve}"
        )


def test_the_floors_are_read() -> None:
    found = requirements()
    assert {"torch", "pillow", "onnx", "setuptools", "pytest"} <= set(found)
    assert all(re.match(r"CVE-\d{4}-\d{4,}$", cve) for _, cve in FLOORS.values())


def test_a_weight_file_is_read_within_its_folder(tmp_path: Path) -> None:
    """An index that names shards elsewhere (path traversal by `weight_map`) is not followed.

    Shards are found by their names here.
    """
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    (folder / "config.json").write_text('{"model_type": "vit"}')
    index = {"weight_map": {"x": "../outside.safetensors"}, "metadata": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert cli.main(["convert", str(folder), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


# --- the document ---------------------------------------------------------------------------------


def test_every_claim_names_code_and_tests_that_exist() -> None:
    """Each row of the threat model ends with the files that hold it and the tests that fail."""
    rows = [
        line.split("|")[1:-1]
        for line in (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    assert len(rows) > 10
    for row in rows[1:]:
        code, tests = (re.findall(r"`([\w/.]+)`", cell) for cell in row[-2:])
        assert code and tests, row
        assert all(
            (REPOSITORY / "mim_refiner_hf" / file).is_file() or (REPOSITORY / file).is_file()
            for file in code
        ), row
        assert all((REPOSITORY / "tests" / file).is_file() for file in tests), row
