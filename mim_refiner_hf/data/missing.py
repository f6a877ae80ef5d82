"""A path of images that is not there or holds no file, refused before any heavy import.

refuse_missing("phtos/")  # FileNotFoundError: ... did you mean photos?
"""

import difflib
import os
from collections.abc import Collection
from pathlib import Path

_TABLES = frozenset([".parquet", ".tar", ".zip", ".csv"])


def refuse_missing(dataset: str, endings: Collection[str] = ()) -> None:
    """Raise a FileNotFoundError for a missing path that cannot be a name on the Hub.

    It must not end as an opaque answer of the Hub, whose names are `name` or `owner/name`.

    Args:
        dataset: a path, or a name.
        endings: of the names of files, in lower case, beside those of tables.

    Raises:
        ValueError: for a folder without any file.
    """
    path = Path(dataset).expanduser()
    # what else a folder may lack is told by those who list it
    if dataset and path.is_dir() and _is_bare(path):
        raise ValueError(
            f"No images in {dataset}: it holds no file; give a folder of .jpg, .png or other files"
        )
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


def _is_bare(folder: Path) -> bool:
    """Whether there is neither a file nor a link at any depth."""
    for place, folders, files in os.walk(folder):
        if files or any(Path(place, name).is_symlink() for name in folders):
            return False
    return True
