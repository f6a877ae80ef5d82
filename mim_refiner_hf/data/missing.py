"""A path of images that is not there or holds none, refused before any heavy import.

refuse_missing("phtos/")  # FileNotFoundError: ... did you mean photos?
refuse_more_groups("photos/", 500)  # ValueError: --num_clusters is 500 for 300 images; ...
"""

import difflib
import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

_TABLES = frozenset([".parquet", ".tar", ".zip", ".csv"])
# How files end that hold one image each; Pillow alone knows which of them it decodes here.
_JPEG = (".jfif", ".jpe", ".jpeg", ".jpg", ".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx")
_HEIF = (".heic", ".heics", ".heif", ".heifs", ".hif", ".avif", ".avifs")
_OTHERS = (".apng", ".bmp", ".dib", ".gif", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".webp")
_SINGLE = {*_JPEG, *_HEIF, *_OTHERS}
# And what else is read in a folder: several images a file, tables, saved data sets, features.
_SEVERAL = {".tif", ".tiff", ".npy", ".parquet", ".tar", ".arrow", ".json", ".safetensors"}
_MOST_NAMED = 3
# what is not looked for among the folders
_BUNDLED = "digits"


def refuse_missing(dataset: str, endings: Collection[str] = ()) -> None:
    """Raise a FileNotFoundError for a missing path that cannot be a name on the Hub.

    It must not end as an opaque answer of the Hub, whose names are `name` or `owner/name`.

    Args:
        dataset: a path, or a name.
        endings: of the names of files, in lower case, beside those of tables.

    Raises:
        ValueError: for a folder without any file that can be read.
    """
    path = Path(dataset).expanduser()
    if dataset == _BUNDLED:
        return
    # what else a folder may lack is told by those who list it
    if dataset and path.is_dir():
        _refuse_others(path, dataset)
    looks_local = (
        not dataset
        or dataset.startswith((".", "/", "~"))
        or dataset.endswith("/")
        or dataset.count("/") > 1
        or "\\" in dataset
        or path.suffix.lower() in _TABLES
        or path.suffix.lower() in endings
    )
    if not looks_local or (dataset and path.exists()):
        return

    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    hint = (
        "give a folder of images, a .parquet file, 'digits' or the name of a data set on the Hub."
    )
    if close:
        hint = f"did you mean {path.parent / close[0]}?"
    raise FileNotFoundError(f"No file or folder {dataset!r}: {hint}")


def refuse_more_groups(dataset: str, num_clusters: int | None, method: str = "kmeans") -> None:
    """Raise a ValueError for more groups than a folder has files, if each is one image at most.

    The words are those of `clustering.pipeline_image_clustering`, which counts the images.
    """
    path = Path(dataset).expanduser()
    if num_clusters is None or dataset == _BUNDLED or not path.is_dir():
        return
    files = 0
    for ending in _endings(path):
        files += ending in _SINGLE
        if files >= num_clusters or ending is None or ending in _SEVERAL:
            return
    allowed = f"{2 if method == 'heads' else 1} to {files} with method {method!r}"
    raise ValueError(
        f"--num_clusters is {num_clusters} for {files} images; allowed are {allowed}, "
        "or leave it out."
    )


def _refuse_others(folder: Path, named: str) -> None:
    """Raise a ValueError where nothing in a folder is called by what can be read."""
    others: Counter[str] = Counter()
    for ending in _endings(folder):
        if ending is None or ending in _SINGLE | _SEVERAL:
            return
        others[ending or "without an ending"] += 1

    found = "it holds no file"
    if others:
        frequent = others.most_common(_MOST_NAMED)
        named_endings = ", ".join(f"{ending} {count}" for ending, count in frequent)
        number = others.total()
        what = "its one file is not" if number == 1 else f"none of its {number} files is"
        found = f"{what} called an image ({named_endings})"
    raise ValueError(
        f"No images in {named}: {found}; give a folder of .jpg, .png or other image files"
    )


def _endings(folder: Path) -> Iterator[str | None]:
    """How the files at any depth end, in lower case, hidden ones apart, which nobody reads.

    None for what is not looked into: a link to a folder, or a folder that cannot be listed.
    """
    unlisted: list[OSError] = []
    for place, folders, files in os.walk(folder, onerror=unlisted.append):
        for name in files:
            if not name.startswith("."):
                yield os.path.splitext(name)[1].lower()  # noqa: PTH122
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if Path(place, name).is_symlink():
                yield None
    if unlisted:
        yield None
