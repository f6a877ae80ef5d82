"""A path of images that is not there, refused before anything heavy is imported.

refuse_missing("phtos/")  # FileNotFoundError: ... did you mean photos?
"""

import difflib
from collections.abc import Collection
from pathlib import Path

_TABLES = frozenset([".parquet", ".tar", ".zip", ".csv"])


def refuse_missing(dataset: str, endings: Collection[str] = ()) -> None:
    """Raise a FileNotFoundError for a missing path that cannot be a name on the Hub.

    It must not end as an opaque answer of the Hub, whose names are `name` or `owner/name`.

    Args:
        dataset: a path, or a name.
        endings: of the names of files, in lower case, beside those of tables.
    """
    path = Path(dataset).expanduser()
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
