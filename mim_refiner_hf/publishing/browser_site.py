"""A static site that groups images in the browser: no server, and no image leaves the machine.

    write_site("out/model", "site/")       # then: python -m http.server --directory site

The folder holds a page, the encoder with weights of 8 bits (`export_onnx.py`), transformers.js
(`javascript.py`), and the scripts of `browser_page/`: resizing, k-means and the proposal of a
number of groups, as in Python. The page of groups that the site shows is that of
`mim-refiner cluster`, and its look and behaviour are in the same template. A service worker keeps
all files, so that the site works offline once it was opened. The folder is a static Space, too.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from PIL import Image

from ..conversion import load_encoder
from ..conversion.licence import Licence
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.files import check_folder, staged_folder, write_text
from ..runtime.finite import check_finite
from ..runtime.text import UNSEEN, fenced, one_line, plain
from ..runtime.wording import millions
from .card_licence import licence_line
from .cluster_page import MARKS, SIMILARITY_DIMENSIONS, page_to_fill
from .csv_cells import GUARDED
from .export import write_twin
from .javascript import PACKAGES, javascript_files
from .twins import why_not_exported

MOST_IMAGES = 20_000
"""Images that the page takes at once."""

_SOURCES = Path(__file__).with_name("browser_page")
# what a browser's memory can hold, with room for what is computed
_MOST_WEIGHTS = 1_000_000_000
_SERVED = (
    "python -m http.server --directory .",
    "hf repos create USER/NAME --type space --space-sdk static",
    "hf upload USER/NAME . --repo-type space",
)
# by which a folder is known as such a site
_MARK = "offline.js"


@dataclass(frozen=True)
class Site:
    """What was written.

    Attributes:
        folder: where.
        size: bytes of all files.
        cosine: the least of a feature of random images with PyTorch's in fp32.
    """

    folder: Path
    size: int
    cosine: float

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.size / 1e6:.0f} MB; its features of random images have a cosine "
            f"of at least {self.cosine:.5f} with PyTorch's in fp32\n"
            f"To look at it: python -m http.server --directory {self.folder}, then open "
            "http://localhost:8000"
        )


def check_site_folder(folder: Path) -> Path:
    """`folder`, resolved, if a site can be written there: it is absent, empty, or holds one."""
    return check_folder(folder, _MARK, "site")


def write_site(
    source: str | Path, destination: str | Path, *, transformers_js: str | Path | None = None
) -> Site:
    """Write the site of an encoder, all or nothing; an earlier one there is replaced.

    Args:
        source: anything `load_encoder` takes.
        destination: folder to write.
        transformers_js: a folder in which npm installed transformers.js; None to download it once.

    Raises:
        ValueError: for a destination that holds something else, an encoder that no browser can
            run, or JavaScript that is not at hand; and as `load_encoder`.
        FileNotFoundError: for a path that does not exist.
        ExportError: when the files for the browser compute something else.
    """
    folder = check_site_folder(Path(destination))
    libraries = javascript_files(None if transformers_js is None else Path(transformers_js))
    encoder = load_encoder(source)
    _check_encoder(encoder, str(source))
    # what the clustering pipeline groups by
    if encoder.config.pooling not in ("attention", "global_repr"):
        encoder.config.features = "last_block"
    encoder.float()
    check_finite(encoder.state_dict(), str(destination), f"get {source} again")

    name = one_line(Path(source).resolve().name if Path(source).exists() else source)
    with staged_folder(folder, check_site_folder) as new:
        model = new / "models" / "encoder"
        model.mkdir(parents=True)
        differences = write_twin(model, encoder, "onnx", ["int8"])
        (model / "onnx" / "model.onnx").unlink()

        (new / "library").mkdir()
        for file, content in libraries.items():
            (new / "library" / file).write_bytes(content)
        write_text(new / "README.md", _card(name, source, vars(encoder)["licence"]))
        _write_pages(new, name)
        size = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
    return Site(Path(destination), size, differences["int8"])


def _check_encoder(encoder: MimRefinerModel, source: str) -> None:
    """A ValueError for an encoder that the page could not run, before any long work."""
    config = encoder.config
    reason = why_not_exported(config, "onnx")
    if reason:
        raise ValueError(f"the page needs ONNX: {reason}")
    if config.num_channels != 3:
        raise ValueError(
            f"{source} reads images of {config.num_channels} channels, and a browser decodes "
            "those of 3; take `mim-refiner cluster` for it"
        )

    weights = sum(parameter.numel() for parameter in encoder.parameters())
    if weights > _MOST_WEIGHTS:
        raise ValueError(
            f"{source} has {millions(weights)} weights, and a browser holds at most "
            f"{millions(_MOST_WEIGHTS)}; take a smaller encoder"
        )

    size = config.image_hw
    image = Image.new("RGB", (2 * size[1] + 9, size[0]))
    # an attribute of a module, which mypy takes for a tensor
    processor: Any = encoder.image_processor
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    if tuple(pixels.shape[-2:]) != tuple(size):
        raise ValueError(
            f"{source}: its image processor makes images of {tuple(pixels.shape[-2:])} pixels, and "
            f"the encoder reads {tuple(size)}; set its size and crop_size to that"
        )


def _write_pages(folder: Path, name: str) -> None:
    """The page, its scripts and the service worker, which is made of all other files."""
    for script in sorted(_SOURCES.glob("*.js")):
        write_text(folder / script.name, script.read_text(encoding="utf-8"))
    write_text(folder / "groups.html", page_to_fill())

    kept = [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]
    size = sum(path.stat().st_size for path in kept)
    settings = {
        "model": name,
        "megabytes": round(size / 1e6),
        "model_megabytes": round(_size_of(folder / "models") / 1e6, 1),
        "most": MOST_IMAGES,
        "dimensions": SIMILARITY_DIMENSIONS,
        "marks": MARKS,
        "unseen": UNSEEN.pattern,
        "guarded": GUARDED,
    }
    write_text(folder / "index.html", _rendered("index.html.jinja", name=name, settings=settings))

    files = sorted(path.relative_to(folder).as_posix() for path in kept)
    digest = hashlib.sha256()
    for file in ("index.html", *files):
        digest.update(file.encode())
        digest.update((folder / file).read_bytes())
    version = digest.hexdigest()[:16]
    files = ["./", "index.html", *files]
    write_text(folder / _MARK, _rendered("offline.js.jinja", version=version, files=files))


def _size_of(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _rendered(template: str, **content: object) -> str:
    """One of the templates, filled in."""
    text = (_SOURCES / template).read_text(encoding="utf-8")
    made = jinja2.Template(text, autoescape=True, undefined=jinja2.StrictUndefined)
    return made.render(**content)


def _card(name: str, source: str | Path, licence: Licence) -> str:
    """The card of a static Space, which is also the README of the folder."""
    metadata = {"title": f"Groups by {name}"[:60], "sdk": "static", **licence.metadata()}
    libraries = ", ".join(
        f"{package.name} {package.version} ({package.licence})" for package in PACKAGES
    )
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        f"# Groups by {plain(name)}",
        "A page that puts images into groups of alike ones, in the browser: there is no server, "
        "and no image leaves the machine.",
        licence_line(licence, "the encoder"),
        f"`library/` holds {plain(libraries)}.",
        "The folder as it is can be served by any static server, or uploaded as a static Space:",
        fenced("\n".join(_SERVED), "bash"),
        fenced(f"mim-refiner page {source} --out SITE", "bash"),
    ]
    return "\n\n".join(parts) + "\n"
