"""The JavaScript that a page in the browser runs: transformers.js and its ONNX runtime.

    files = javascript_files(None)                       # from npm's registry, once
    files = javascript_files(Path("js"))                 # where `npm install` put them

Files of a known version are taken out of the archives that npm has of them. An archive lies under
`HF_HOME`, beside a record of its address, size and sha256 (`conversion/download.py`), and has to
have the sha256 that stands here.
"""

import json
import logging
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import constants

from ..conversion.download import Record, download
from ..runtime.files import CheckpointError
from ..runtime.text import one_line
from ..runtime.wording import setting

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """One package of npm.

    Attributes:
        name, version, licence: as npm has them.
        sha256: of its archive.
        files: what a page needs, by the path in the package.
    """

    name: str
    version: str
    licence: str
    sha256: str
    files: tuple[str, ...]

    @property
    def url(self) -> str:
        """Where the archive is."""
        base = self.name.rpartition("/")[2]
        return f"{REGISTRY}/{self.name}/-/{base}-{self.version}.tgz"


REGISTRY = "https://registry.npmjs.org"
PACKAGES = (
    Package(
        "@huggingface/transformers",
        "4.3.2",
        "Apache-2.0",
        "5414fb47b11ae2a8c10a3aac68f833e6fb6e9bde03e9e612ad7da3ea9e9d2663",
        ("dist/transformers.min.js", "LICENSE"),
    ),
    # the version that the former names; without WebGPU, which takes twice the bytes
    Package(
        "onnxruntime-web",
        "1.31.0-dev.20260914-8d85527a0",
        "MIT",
        "0de27582f3e3189dec4a2082513a0af1ea79ae7fd3039bbfe634a526e173cbe0",
        ("dist/ort-wasm-simd-threaded.mjs", "dist/ort-wasm-simd-threaded.wasm"),
    ),
)


def javascript_files(folder: Path | None) -> dict[str, bytes]:
    """The files by their names, from a folder in which npm installed them, or from npm's registry.

    Raises:
        FileNotFoundError: when the folder does not hold them.
        ValueError: when they are nowhere at hand, or an archive is not the one known here.
    """
    found = {}
    for package in PACKAGES:
        files = _downloaded(package) if folder is None else _installed(package, folder)
        for path, content in files.items():
            found[Path(path).name] = content
    return found


def _installed(package: Package, folder: Path) -> dict[str, bytes]:
    """From `folder/node_modules`; a warning for another version than is known here."""
    place = _place_of(package, folder)
    for path in ("package.json", *package.files):
        if not (place / path).is_file():
            raise FileNotFoundError(
                f"{setting('transformers_js', folder)}: {place / path} is not there; run "
                f"`npm install {_wanted()}` in that folder, or leave the setting out"
            )

    version = _stated(place, "version")
    needed = _stated(_place_of(PACKAGES[0], folder), "dependencies").get(package.name, version)
    if version != needed:
        raise ValueError(
            f"{place} is version {one_line(version)}, and {PACKAGES[0].name} beside it needs "
            f"{one_line(needed)}; run `npm install {_wanted()}` in {folder}"
        )
    if version != package.version:
        logger.warning(
            "%s is version %s; the page was tested with %s",
            place,
            one_line(version),
            package.version,
        )
    return {path: (place / path).read_bytes() for path in package.files}


def _place_of(package: Package, folder: Path) -> Path:
    """Where npm put a package: below the one that needs it, where another version is beside it."""
    modules = folder / "node_modules"
    nested = modules / PACKAGES[0].name / "node_modules" / package.name
    return nested if nested.is_dir() else modules / package.name


def _stated(place: Path, key: str) -> Any:
    """What a package says of itself."""
    try:
        return json.loads((place / "package.json").read_text(encoding="utf-8"))[key]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{place / 'package.json'} states no {key}; run `npm install {_wanted()}` again"
        ) from error


def _downloaded(package: Package) -> dict[str, bytes]:
    """Out of the archive, which is downloaded unless it is at hand."""
    folder = Path(constants.HF_HOME, "mim_refiner_hf")
    path = folder / Path(package.url).name
    remedy = (
        f"or run `npm install {_wanted()}` in a folder and give it as {setting('transformers_js')}"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            archive = download(package.url, path)
    except CheckpointError as error:
        raise ValueError(f"{error}; {remedy}") from error

    got = Record.read(path).sha256
    if got != package.sha256:
        raise ValueError(
            f"{archive} has the sha256 {got}, and not {package.sha256}, that of {package.name} "
            f"{package.version}; delete the file and run the same command again, {remedy}"
        )
    with tarfile.open(archive) as members:
        files = {}
        for name in package.files:
            member = members.extractfile(f"package/{name}")
            assert member is not None, name
            files[name] = member.read()
    return files


def _wanted() -> str:
    """The packages as npm's command takes them."""
    return " ".join(f"{package.name}@{package.version}" for package in PACKAGES)
