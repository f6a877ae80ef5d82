"""What a wheel of the package holds, built from the files of this checkout and unpacked.

And what the script that uv runs alone says of the package.
"""

import configparser
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("mim_refiner_hf", "model_cards", "training")
FILES = ("LICENSE", "README.md", "pyproject.toml", "setup.cfg", "setup.py")

BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist')"
RECIPE = """
import sys
sys.path.insert(0, sys.argv[1])
from mim_refiner_hf.runtime.files import shipped_folder
from mim_refiner_hf.runtime.settings import recipe_file
print(recipe_file("mae-refined-l16"))
print(shipped_folder("model_cards", in_repository="model_cards"))
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel's files, in a folder of their own."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, source / name)

    built = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def names(folder: Path, pattern: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern)}


def test_every_module_and_template_is_there(unpacked: Path) -> None:
    package = ROOT / "mim_refiner_hf"
    for pattern in ("*.py", "*.jinja", "*.js", "*.bib", "py.typed"):
        assert names(unpacked / "mim_refiner_hf", pattern) >= names(package, pattern)
    for metric in (package / "metrics").glob("*/README.md"):
        assert (unpacked / metric.relative_to(ROOT)).is_file()


def test_recipes_and_cards_lie_in_the_package(unpacked: Path) -> None:
    recipes = names(ROOT / "training" / "recipes", "*.yaml")
    assert names(unpacked / "mim_refiner_hf" / "recipes", "*.yaml") == recipes
    cards = ROOT / "model_cards"
    shipped = unpacked / "mim_refiner_hf" / "model_cards"
    expected = {path.relative_to(cards).as_posix() for path in cards.glob("*/README.md")}
    assert names(shipped, "README.md") == expected
    assert names(shipped, ".eval_results/*.yaml") == names(cards, ".eval_results/*.yaml")


def test_nothing_else_is_installed(unpacked: Path) -> None:
    top = {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"mim_refiner_hf"}


def test_they_are_found_where_they_are_installed(unpacked: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-I", "-c", RECIPE, str(unpacked)], capture_output=True, text=True
    )
    package = unpacked / "mim_refiner_hf"
    lines = [str(package / "recipes" / "mae-refined-l16.yaml"), str(package / "model_cards")]
    assert found.stdout.split() == lines, found.stderr


def test_the_head_of_the_script_says_what_setup_cfg_says() -> None:
    script = ROOT / "training" / "refine.py"
    text = script.read_text(encoding="utf-8")
    # the pattern of PEP 723
    (block,) = re.findall(r"(?m)^# /// script$\s((?:^#(?:| .*)$\s)+)^# ///$", text)
    head = tomllib.loads(re.sub(r"(?m)^# ?", "", block))

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name = setup["metadata"]["name"]
    assert head["requires-python"] == setup["options"]["python_requires"]
    # the package brings its own; a second list of them would drift
    assert head["dependencies"] == [name]
    (source,) = head["tool"]["uv"]["sources"].items()
    assert source[0] == name
    assert (script.parent / source[1]["path"]).resolve() == ROOT
    # there is no checkout beside it on a machine of the Hub
    assert head["tool"]["hf-jobs"]["env"] == {"UV_NO_SOURCES": "1"}
