"""Which file a row of a data set may name: one of that data set's own, and no other.

    own_file("cats/1.png", "photos/train.parquet")           # the file photos/cats/1.png
    own_file("../../etc/passwd", "photos/train.parquet")     # ValueError, as for an absolute path, file:// or http://

A table may hold paths instead of images, and whoever wrote the table chose them. A path counts from the folder of the data set and
stays in it; of a data set on the Hub only its own repository and its own cache are read, and a parquet file there has to hold bytes.
Links inside a folder are followed: they are the file system's word, not the table's.
"""

import os
import re
from pathlib import Path

from huggingface_hub import constants


def own_file(path: str, dataset: str) -> Path | str:
    """The file, or the address in the Hub repository or in a zip of the data set, that `path` means in a row of `dataset`.

    Args:
        path: what the row says.
        dataset: a path here or a name on the Hub, as given to `mim_refiner_hf.data.open_images`.

    Raises:
        ValueError: for a path that leads out of the data set.
    """
    in_zip, _, file = path.rpartition("::")
    if not in_zip or re.fullmatch("zip://[^:]*", in_zip):
        if (place := _local(file, dataset)) is not None:
            return f"{in_zip}::{place}" if in_zip else place
        if re.fullmatch(
            rf"hf://datasets/{_hub_name(dataset)}(@[^/]+)?/.+", file
        ) and ".." not in file.split("/"):
            return path
    raise ValueError(
        f"A row of {dataset} names the file {path[:200]!r}, which is not one of that data set and was not opened; put the image's "
        "bytes into the table, or a path below its folder"
    )


def _local(file: str, dataset: str) -> Path | None:
    """The absolute path that a row means, if it lies in the data set's folder or in its part of the Hub cache."""
    if "://" in file:
        return None
    given = Path(dataset).expanduser()
    if given.exists():
        folder = given if given.is_dir() else given.parent
        roots = [os.path.abspath(folder), str(folder.resolve())]  # noqa: PTH100  # without ".." as well
        place = os.path.normpath(os.path.join(roots[0], file))  # noqa: PTH118
        return Path(place) if any(Path(place).is_relative_to(root) for root in roots) else None
    place = os.path.normpath(file)
    own_cache = rf"{re.escape(str(Path(constants.HF_HUB_CACHE)))}/datasets--{_hub_name(dataset).replace('/', '--')}/.+"
    return Path(place) if re.fullmatch(own_cache, place) else None


def _hub_name(dataset: str) -> str:
    """A pattern for the repository; names without an owner have got one since."""
    return re.escape(dataset) if "/" in dataset else rf"(?:[\w.-]+/)?{re.escape(dataset)}"


__all__ = ["own_file"]
