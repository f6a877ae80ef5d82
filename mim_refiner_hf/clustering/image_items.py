"""What the pipeline can be called with, as one sequence of images: paths, URLs, pictures, rows.

    items = find_items("photos/")           # nothing is read yet
    images = Images(items, num_channels=3)
    images[0]                               # a PIL image, or the sentence that says why not

This file travels with every saved model: it imports only what transformers needs itself, and
`decoding.py` beside it.
"""

import base64
import heapq
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

# the client that this version of transformers has: httpx, or httpx2
from transformers.image_utils import httpx  # type: ignore[attr-defined]

from .channels import MAX_CHANNELS, Picture
from .decoding import ARRAY_EXTENSIONS, EXTENSIONS, MAX_BYTES, ImageSource, decode_image

logger = logging.getLogger(__name__)

_URL_TIMEOUT = 30.0
# kinds and names in a line about what is not read
_MOST_NAMED = 5
_HEIF = frozenset([".heic", ".heif"])

LOOKED_FOR = f"looked at every depth for {', '.join(sorted(EXTENSIONS))}"
"""What a folder without images was searched for, for messages."""


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
        if images.ndim == 3 and min(images.shape[0], images.shape[-1]) > MAX_CHANNELS:
            raise ValueError(
                f"An array of shape {tuple(images.shape)} has no axis of channels, 1 to "
                f"{MAX_CHANNELS}; grey images are (n, height, width, 1): give images[..., None]."
            )
        return [images]
    if isinstance(images, Mapping):
        names = ", ".join(map(str, images))
        raise ValueError(f"These are {len(images)} sets of images: {names}; choose one of them.")

    if hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        return images
    # nobody knew which row is whose
    if isinstance(images, set | frozenset):
        raise ValueError(f"A {type(images).__name__} of images has no order; give a list of them.")
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

    listing = list_folder(root)
    images = image_files(listing.files)
    for line in lines_about_the_rest(root, listing, images):
        logger.warning(line)
    if not images:
        raise ValueError(f"No images in {root}: {LOOKED_FOR}.")
    return images


class FolderListing(NamedTuple):
    """What lies in a folder at any depth, hidden files and folders apart.

    Attributes:
        files: their paths, sorted by folder and name; also of those that lead nowhere.
        links: links to folders that were not entered.
        repeated: links to files that are among `files` under another name.
    """

    files: list[str]
    links: list[str]
    repeated: list[str]


def list_folder(root: str | Path, *, follow_links: bool = False) -> FolderListing:
    """Every file below a folder once, in time that grows with their number alone.

    A link to a file is that file; one to a folder is not entered, for it may lead anywhere.

    Args:
        follow_links: enter links to folders, each real folder once.

    Raises:
        ValueError: naming a folder that cannot be listed.
    """
    files: list[str] = []
    linked_files: list[str] = []
    linked_folders: list[str] = []
    links: list[str] = []
    # folder -> where it really is
    entered: dict[str, str] = {}
    targets: set[str] = set()
    waiting = [(str(root), os.path.realpath(root))]

    while waiting or (follow_links and linked_folders):
        # links last: what lies in the folder itself keeps its own name
        if not waiting:
            link = heapq.heappop(linked_folders)
            waiting.append((link, os.path.realpath(link)))
        folder, target = waiting.pop()
        if target in targets:
            links.append(folder)
            continue
        targets.add(target)
        entered[folder] = target
        for entry in _visible_entries(folder):
            if entry.is_dir(follow_symlinks=False):
                waiting.append((entry.path, os.path.join(target, entry.name)))  # noqa: PTH118
            elif not entry.is_symlink():
                files.append(entry.path)
            elif os.path.isdir(entry.path):  # noqa: PTH112
                heapq.heappush(linked_folders, entry.path)
            else:
                linked_files.append(entry.path)

    repeated = _add_linked(files, linked_files, entered)
    files.sort(key=lambda path: Path(path).parts)
    return FolderListing(files, sorted(links + linked_folders), repeated)


def _visible_entries(folder: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    # what is behind it would be missing without a word
    except OSError as error:
        name = folder if len(folder) < 300 else f"{folder[:300]}..."
        raise ValueError(
            f"{name} cannot be listed ({error.strerror}); make it readable, or move it away."
        ) from error


def _add_linked(
    files: list[str], linked_files: Sequence[str], entered: Mapping[str, str]
) -> list[str]:
    """Add links to files to `files`, but for those whose file is among them; returns the latter."""
    if not linked_files:
        return []
    known = set()
    for file in files:
        folder, name = os.path.split(file)
        known.add(os.path.join(entered[folder], name))  # noqa: PTH118

    repeated = []
    for link in sorted(linked_files):
        target = os.path.realpath(link)
        if target in known:
            repeated.append(link)
            continue
        # what leads nowhere, or to a device, is a broken image each time
        if os.path.isfile(target):  # noqa: PTH113
            known.add(target)
        files.append(link)
    return repeated


def image_files(files: Sequence[str]) -> list[str]:
    """Those that are called an image; where there are none, those that are called an array.

    What leads nowhere is among them: it is a broken image, with a reason.
    """
    for endings in (EXTENSIONS, ARRAY_EXTENSIONS):
        found = [file for file in files if ending_of(file) in endings]
        if found:
            return found
    return []


def ending_of(file: str) -> str:
    """How a file's name ends, in lower case, with the dot."""
    return os.path.splitext(file)[1].lower()  # noqa: PTH122


def lines_about_the_rest(
    root: str | Path, listing: FolderListing, taken: Collection[str], hint: str = ""
) -> list[str]:
    """A line for each kind of thing in a folder that is not read; none where all is.

    Args:
        taken: the files that are read.
        hint: what to do to enter links.
    """
    lines = []
    kept = set(taken)
    others = [file for file in listing.files if file not in kept]
    if others:
        lines.append(f"{_counted(others, 'file')} in {root} left aside: {_by_ending(others)}")

    if listing.links:
        names = _named(listing.links, root)
        lines.append(f"{_counted(listing.links, 'link')} to folders not entered: {names}{hint}")
    if listing.repeated:
        names = _named(listing.repeated, root)
        count = _counted(listing.repeated, "link")
        lines.append(f"{count} to images that are counted already left aside: {names}")
    return lines


def _counted(items: Sequence[str], word: str) -> str:
    return f"{len(items)} {word}" if len(items) == 1 else f"{len(items)} {word}s"


def _by_ending(files: Sequence[str]) -> str:
    """ ".heic 3, .mp4 1, others 2": the most frequent first."""
    endings = Counter(ending_of(file) or "without an ending" for file in files)
    shown = [(e, n) for e, n in endings.most_common(_MOST_NAMED) if re.fullmatch(r"[ .\w-]+", e)]
    rest = len(files) - sum(number for _, number in shown)
    line = ", ".join(f"{ending} {number}" for ending, number in shown)
    if rest:
        line = f"{line}, others {rest}" if line else f"others {rest}"
    if _HEIF & endings.keys() and not _HEIF & EXTENSIONS:
        line += " (install pillow-heif to read HEIC)"
    return line


def _named(paths: Sequence[str], root: str | Path) -> str:
    names = [ascii(os.path.relpath(path, root))[1:-1] for path in paths[:_MOST_NAMED]]
    if len(paths) > _MOST_NAMED:
        names.append("...")
    return ", ".join(names)


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
    if isinstance(item, np.ndarray | Tensor) and item.ndim not in (2, 3):
        raise ValueError(
            f"an array of shape {tuple(item.shape)} is not one image, which has height and width, "
            "and channels if any; labels come as (image, label) in the list"
        )
    if isinstance(item, bytes | Image.Image | np.ndarray | Tensor):
        return item
    raise ValueError(
        f"{type(item).__name__} is neither a path, a URL, a PIL image nor an array, and holds none"
    )


def read_image(item: Any, num_channels: int) -> Picture:
    """One item of `find_items`, decoded; ValueError, or what the network says, if it cannot be."""
    name = item if isinstance(item, str) else None
    return decode_image(read_item(item), num_channels, name)


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
            return read_image(self.items[i], self.num_channels)
        # Pillow, the network and data sets each raise their own
        except Exception as error:
            return " ".join(f"{error or type(error).__name__}".split())[:300]
