"""Which file a row of a data set may name: one of that data set's own, and no other.

    own_file("cats/1.png", "photos/train.parquet")       # the file photos/cats/1.png
    own_file("../../etc/passwd", "photos/train.parquet") # ValueError; as for /etc, file:// or
    http://

A table may hold paths instead of images, and whoever wrote the table chose them. A path counts from
the folder of the data set and stays in it; of a data set on the Hub only its own repository and its
own cache are read, and a parquet file there has to hold bytes. Links inside a folder are followed:
they are the file system's word, not the table's.
"""

import os
import re
from pathlib import Path

from huggingface_hub import constants


def own_file(path: str, dataset: str) -> Path | str:
    """The file that `path` means in a row of `dataset`.

    Args:
        path: what the row says.
        dataset: a path here or a name on the Hub, as given to `open_images`.

    Returns:
        The file, or an address in the Hub repository or in a zip of the data set.

    Raises:
        ValueError: for a path that leads out of the data set.
    """
    in_zip, _, file = path.rpartition("::")
    if not in_zip or re.fullmatch("zip://[^:]*", in_zip):
        place = _local_file(file, dataset)
        if place is not None:
            return f"{in_zip}::{place}" if in_zip else place

        own_repository = rf"hf://datasets/{_repository(dataset)}(@[^/]+)?/.+"
        if re.fullmatch(own_repository, file) and ".." not in file.split("/"):
            return path
    raise ValueError(
        f"A row of {dataset} names the file {path[:200]!r}, which is not one of that data set and "
        "was not opened; put the image's bytes into the table, or a path below its folder"
    )


def _local_file(file: str, dataset: str) -> Path | None:
    """The absolute path that a row means, if it lies in the data set's folder or its Hub cache."""
    if "://" in file:
        return None
    given = Path(dataset).expanduser()
    if given.exists():
        folder = given if given.is_dir() else given.parent
        # the folder as it was named, without "..", and as it is
        named = os.path.abspath(folder)  # noqa: PTH100
        place = Path(os.path.normpath(os.path.join(named, file)))  # noqa: PTH118
        inside = place.is_relative_to(named) or place.is_relative_to(folder.resolve())
        return place if inside else None

    place = Path(os.path.normpath(file))
    cache = re.escape(str(Path(constants.HF_HUB_CACHE)))
    repository = _repository(dataset).replace("/", "--")
    return place if re.fullmatch(rf"{cache}/datasets--{repository}/.+", str(place)) else None


def _repository(dataset: str) -> str:
    """A pattern for the repository; names without an owner have got one since."""
    name = re.escape(dataset)
    return name if "/" in dataset else rf"(?:[\w.-]+/)?{name}"
