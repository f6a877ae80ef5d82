"""Commands start fast: what is slow to import is imported only once there is work, and yet every
Auto class knows the model after `import mim_refiner_hf`, whatever was imported before.

Modules are counted, not seconds: a timed test fails on a busy machine. Each case is a process of
its own, as imports stay.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from small_encoder import make_encoder

import mim_refiner_hf
from mim_refiner_hf import cli
from mim_refiner_hf.cli import cluster as cluster_cli
from mim_refiner_hf.clustering.decoding import ARRAY_EXTENSIONS, EXTENSIONS
from mim_refiner_hf.clustering.pipeline_image_clustering import METHODS
from mim_refiner_hf.data.missing import refuse_missing, refuse_more_groups
from mim_refiner_hf.pretraining.loop_options import LoopOptions
from mim_refiner_hf.runs.choices import AddedProtocol
from mim_refiner_hf.runs.comparison import PROTOCOLS
from mim_refiner_hf.runtime.lazy import argument_parser

HEAVY = (
    "PIL",
    "accelerate",
    "datasets",
    "matplotlib",
    "numpy",
    "pandas",
    "pyarrow",
    "scipy",
    "sklearn",
    "timm",
    "torch",
    "torchvision",
    "transformers",
)

RUN_A_COMMAND = """
import json, sys
from mim_refiner_hf.cli import main
try:
    code = main(sys.argv[2:])
except SystemExit as end:
    code = end.code or 0
print("#", json.dumps([code, [name for name in sys.argv[1].split() if name in sys.modules]]))
"""


def in_a_process(code: str, *arguments: str) -> Any:
    """What a script prints as JSON behind the last "#"."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.rpartition("#")[2])


HELP = ["--help", "--version", *(f"{name} --help" for name in cli.COMMANDS)]
WRONG = [
    "",
    "refien",
    "refine --epohcs 3",
    "refine photos --model mae --topk 0",
    "refine photos --model mae --head_blocks 1 --num_heads 2",
    "refine photos/gone/ --model mae",
    "refine --recipe quikstart",
    "pretrain digits --epochs 0",
    "pretrain digits --patch_size 5",
    "pretrain digits --objective maee",
    "pretrain digits --init_from ./gone",
    "refine photos --model gone.pth",
    "convert mae.pth",
    "convert gone/../mae.pth out",
    "cluster",
    "cluster photos/gone/",
    "cluster photos --method k-means",
    "cluster photos --num_clusters 0",
    "push model",
    "push ./gone user/name",
    "evaluate photos",
    "evaluate photos/gone/ --model mae",
    "evaluate photos --model mae --protocols linear",
    "evaluate photos --model mae --against ./gone",
    "export model out --to gif",
    "export ./gone out --to timm",
    "page",
    "page ./gone",
    "embed photos --model mae",
    "embed photos --model mae --out features --dtype fp8",
    "embed photos --model ./gone --out features",
    "embed photos --model mae --out features --shard_size 0",
    "replay",
    "replay ./gone",
    "pretrain ./gone",
    "refine EMPTY --model mae",
    "cluster EMPTY",
    "pretrain EMPTY",
    "refine TEXTS --model mae",
    "cluster TEXTS",
    "cluster THREE --num_clusters 4",
]


@pytest.mark.parametrize("line", HELP)
def test_a_help_imports_nothing_heavy(line: str) -> None:
    assert in_a_process(RUN_A_COMMAND, " ".join(HEAVY), *line.split()) == [0, []]


@pytest.mark.parametrize("line", WRONG)
def test_wrong_use_is_refused_before_anything_heavy(line: str, tmp_path: Path) -> None:
    folders = {word: tmp_path / word for word in ("EMPTY", "TEXTS", "THREE")}
    for folder in folders.values():
        (folder / "without a file").mkdir(parents=True)
    for ending in ("txt", "MP4", "csv"):
        (folders["TEXTS"] / f"without a file/a.{ending}").touch()
        (folders["THREE"] / f"a.{ending}").touch()
        (folders["THREE"] / f"without a file/{ending}.JPG").touch()
    words = [str(folders.get(word, word)) for word in line.split()]
    assert in_a_process(RUN_A_COMMAND, " ".join(HEAVY), *words) == [2, []]


def cannot_list(folder: str) -> Any:
    raise PermissionError(13, "Permission denied", folder)


def test_what_is_called_an_image_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that a folder is read by is refused early, nor groups where a file may hold many."""
    refused = 0
    for ending in (*EXTENSIONS, *ARRAY_EXTENSIONS, ".parquet", ".tar", ".json"):
        file = tmp_path / f"a{ending.upper()}"
        file.touch()
        refuse_missing(str(tmp_path))
        try:
            refuse_more_groups(str(tmp_path), 2)
        except ValueError as error:
            assert "--num_clusters is 2 for 1 images; allowed are 1 to 1 with method" in str(error)
            refused += 1
        file.unlink()
    assert refused == len(EXTENSIONS - {".tif", ".tiff"})

    (tmp_path / "notes").touch()
    with pytest.raises(ValueError, match=r"its one file is not called an image \(without an end"):
        refuse_missing(str(tmp_path))
    # what is bundled is no folder
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    refuse_missing("digits")
    refuse_more_groups("digits", 2)
    # nobody reads what is hidden
    (tmp_path / "digits/.a.png").touch()
    (tmp_path / "digits/.trash").mkdir()
    (tmp_path / "digits/.trash/b.png").touch()
    with pytest.raises(ValueError, match="it holds no file"):
        refuse_missing(str(tmp_path / "digits"))
    # what cannot be listed may hold any number
    with monkeypatch.context() as locked:
        locked.setattr(os, "scandir", cannot_list)
        refuse_missing(str(tmp_path))
        refuse_more_groups(str(tmp_path), 2)
    # where a link leads is not looked at
    (tmp_path / "elsewhere").symlink_to(tmp_path.parent)
    refuse_missing(str(tmp_path))
    refuse_more_groups(str(tmp_path), 2)


def test_what_is_counted_is_there() -> None:
    """A name that no module has would be counted in vain."""
    assert {name for name in HEAVY if name in sys.modules} >= {"numpy", "torch", "transformers"}
    code = (
        "import json, sys; import torch, transformers; print('#', json.dumps(sorted(sys.modules)))"
    )
    assert {"numpy", "torch", "transformers"} <= set(in_a_process(code))


def test_the_package_alone_imports_nothing_heavy() -> None:
    code = """
import json, sys, mim_refiner_hf
dir(mim_refiner_hf), mim_refiner_hf.__version__
print("#", json.dumps([name for name in sys.argv[1].split() if name in sys.modules]))
"""
    assert in_a_process(code, " ".join(HEAVY)) == []


LOAD = """
import importlib, json, sys
for module in sys.argv[2:]:
    importlib.import_module(module)
import mim_refiner_hf
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, pipeline
from transformers import AutoModelForImageClassification
kinds = (AutoConfig, AutoModel, AutoModelForImageClassification, AutoImageProcessor)
found = [type(kind.from_pretrained(sys.argv[1])).__name__ for kind in kinds]
found.append(type(AutoBackbone.from_config(AutoConfig.from_pretrained(sys.argv[1]))).__name__)
for task in ("image-clustering", "image-feature-extraction"):
    found.append(type(pipeline(task, model=sys.argv[1])).__name__)
print("#", json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "mim_refiner_hf",
        "transformers",
        "transformers.pipelines",
        "mim_refiner_hf.model.modeling_mim_refiner",
        "mim_refiner_hf.clustering.pipeline_image_clustering",
        "mim_refiner_hf.clustering.pipeline_image_features",
    ],
)
def test_auto_classes_know_the_model_whatever_came_first(first: str, tmp_path: Path) -> None:
    make_encoder().save_pretrained(tmp_path)
    mim_refiner_hf.MimRefinerImageProcessor().save_pretrained(tmp_path)
    assert in_a_process(LOAD, str(tmp_path), first) == [
        "MimRefinerConfig",
        "MimRefinerModel",
        "MimRefinerForImageClassification",
        "MimRefinerImageProcessor",
        "MimRefinerBackbone",
        "ImageClusteringPipeline",
        "ImageRowsPipeline",
    ]


def test_every_public_name_is_there_and_listed() -> None:
    for name in mim_refiner_hf.__all__:
        assert getattr(mim_refiner_hf, name) is not None
        assert name in dir(mim_refiner_hf)
    with pytest.raises(AttributeError, match="has no attribute 'refien'"):
        _ = mim_refiner_hf.refien
    with pytest.raises(ImportError, match="cannot import name 'refien'"):
        from mim_refiner_hf import refien  # noqa: F401


def test_the_parser_is_that_of_transformers() -> None:
    from transformers import HfArgumentParser

    parser = argument_parser(LoopOptions)
    assert type(parser).__name__ == HfArgumentParser.__name__
    own = HfArgumentParser(LoopOptions)  # type: ignore[arg-type]
    assert parser.format_help() == own.format_help()


def test_choices_are_those_of_the_rooms_that_do_the_work() -> None:
    assert tuple(METHODS) == cluster_cli._METHODS
    assert set(PROTOCOLS) == set(get_args(AddedProtocol))


def test_modules_that_appear_meanwhile_are_found(tmp_path: Path) -> None:
    """importlib asks every finder to forget what it knows, as `evaluate.load` makes it do."""
    sys.path.insert(0, str(tmp_path))
    try:
        (tmp_path / "just_written.py").write_text("value = 3")
        importlib.invalidate_caches()
        assert importlib.import_module("just_written").value == 3
    finally:
        sys.path.remove(str(tmp_path))
