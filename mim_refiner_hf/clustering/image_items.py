"""What the pipeline can be called with, as one sequence of images: paths, URLs, pictures, rows.

    items = find_items("photos/")           # nothing is read yet
    images = Images(items, num_channels=3)
    images[0]                               # a PIL image, or the sentence that says why not

This file travels with every saved model: it imports only what transformers needs itself, and
`decoding.py` beside it.
"""

import base64
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

# the client that this version of transformers has: httpx, or httpx2
from transformers.image_utils import httpx  # type: ignore[attr-defined]

from .channels import Picture
from .decoding import ARRAY_EXTENSIONS, EXTENSIONS, MAX_BYTES, ImageSource, decode_image

_URL_TIMEOUT = 30.0


def find_items(images: Any) -> Sequence[Any]:
    """What the pipeline was called with, as a sequence of which nothing has been read yet.

    Its items are paths, URLs, PIL images, arrays or rows of a data set. An array is one image, and
    with four axes a batch of them.
    """
    if isinstance(images, str | Path):
        return images_at(images)
    if isinstance(images, Image.Image | bytes):
        return [images]
    if isinstance(images, np.ndarray | Tensor) and images.ndim < 4:
        return [images]
    if isinstance(images, Mapping):
        names = ", ".join(map(str, images))
        raise ValueError(f"These are {len(images)} sets of images: {names}; choose one of them.")

    if hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        return images
    if isinstance(images, Iterable):
        return list(images)
    raise ValueError(
        "Images come as a folder, paths, URLs, PIL images or a data set, "
        f"not as {type(images).__name__}."
    )


def images_at(path: str | Path) -> list[str]:
    """The image files of a folder at any depth, sorted; or the one file or URL that `path` is.

    Hidden files and folders are left out, and links to folders.
    """
    if str(path).startswith(("http://", "https://")):
        return [str(path)]
    root = Path(path).expanduser()
    if root.is_file():
        return [str(root)]
    if not root.is_dir():
        raise FileNotFoundError(
            f"No file or folder {str(path)!r}; "
            "give a folder of images, a list of paths or a data set."
        )

    paths = sorted(_image_files(root, EXTENSIONS)) or sorted(_image_files(root, ARRAY_EXTENSIONS))
    if not paths:
        endings = ", ".join(sorted(EXTENSIONS))
        raise ValueError(f"No images in {root}: looked at every depth for {endings}.")
    return paths


def _image_files(root: Path, endings: frozenset[str]) -> Iterator[str]:
    waiting = [str(root)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif entry.is_file() and Path(entry.name).suffix.lower() in endings:
                    yield str(Path(entry.path))


def read_item(item: Any) -> ImageSource | np.ndarray | Tensor:
    """What `decode_image` takes, of one item of `find_items`; of a URL, the bytes behind it."""
    if isinstance(item, Mapping):
        item = _image_in_row(item)
    # (image, label) of torchvision, `Sample` of this package
    elif isinstance(item, tuple):
        item = item[0]

    if isinstance(item, str):
        if item.startswith(("http://", "https://")):
            return _download(item)
        if item.startswith("data:image/"):
            return base64.b64decode(item.partition(",")[2])
        item = Path(item)
    if isinstance(item, Path):
        # a file may be called "~a.png"
        return item if item.exists() else item.expanduser()
    if isinstance(item, bytes | Image.Image | np.ndarray | Tensor):
        return item
    raise ValueError(
        f"{type(item).__name__} is neither a path, a URL, a PIL image nor an array, and holds none"
    )


def _image_in_row(row: Mapping[str, Any]) -> Any:
    """The image of a row of `datasets`, decoded or not; the row itself where there is none."""
    cells = list(row.values())
    for cell in cells:
        if isinstance(cell, Image.Image):
            return cell
    for cell in [row, *cells]:
        if isinstance(cell, Mapping) and isinstance(cell.get("bytes"), bytes):
            return cell["bytes"]
    for cell in cells:
        if isinstance(cell, bytes | np.ndarray | Tensor):
            return cell
    return row


def _download(url: str) -> bytes:
    """The bytes behind a URL, `MAX_BYTES` at most."""
    content = bytearray()
    with httpx.stream("GET", url, timeout=_URL_TIMEOUT, follow_redirects=True) as answer:
        answer.raise_for_status()
        for part in answer.iter_bytes():
            content += part
            if len(content) > MAX_BYTES:
                raise ValueError(f"{url} has more than {MAX_BYTES} bytes")
    return bytes(content)


class Images(Dataset[Picture | str]):
    """Item i: the i-th image, or in its place the sentence that says why it cannot be read."""

    def __init__(self, items: Sequence[Any], num_channels: int) -> None:
        self.items = items
        self.num_channels = num_channels

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Picture | str:
        try:
            item = self.items[i]
            name = item if isinstance(item, str) else None
            return decode_image(read_item(item), self.num_channels, name)
        # Pillow, the network and data sets each raise their own
        except Exception as error:
            return " ".join(f"{error or type(error).__name__}".split())[:300]


__all__ = ["Images", "find_items", "images_at", "read_item"]
