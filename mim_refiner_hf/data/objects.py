"""Images as Python has them: lists of paths, of PIL images or arrays, and data sets in memory.

    from mim_refiner_hf.data import open_images
    open_images(["a.jpg", "b.jpg"])
    open_images([(image, "cat"), (other_image, "dog")])     # with labels: numbers or words
    open_images(numpy.zeros((12, 64, 64, 3), numpy.uint8))
    open_images(datasets.load_dataset("imagefolder", data_dir="photos")["train"])
    open_images(torchvision.datasets.CIFAR10("data"))

| given                               | an image is                                           |
|-------------------------------------|-------------------------------------------------------|
| list, tuple or other sequence       | an item: path, PIL image, array, tensor, bytes, a row |
| array or tensor (n, height, width,  | a slice; the channels may also stand in front of      |
| channels)                           | height and width                                      |
| `datasets.Dataset`                  | the cell of the image column, undecoded               |
| torch `Dataset` with a length       | an item, which may be a row                           |

A row is (image, label), or a dictionary with an image, and a label under "label", "labels",
"fine_label" or "cls". Labels are whole numbers, words or None.

Whatever it is, its fingerprint is a function of the content: of paths with the sizes of the files,
or of the encoded bytes or pixels. To take it, and the labels, every item is looked at once when it
is opened. So a torch data set whose transforms are random is another one each time, which a run
that is continued will say.
"""

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..clustering.decoding import count_channels
from ..clustering.image_items import find_items, read_item
from ..runtime.distributed import progress_bar
from ..runtime.wording import kind_of
from .columns import (
    LABEL_COLUMNS,
    TableColumn,
    find_columns,
    label_of,
    label_values,
    labels_of,
)
from .found import NO_OPTIONS, Entries, FoundImages, SourceOptions, file_size
from .sources import refuse_options

logger = logging.getLogger(__name__)

# Items from which on looking at all of them shows a progress bar.
_MANY = 2000
# Bytes of a table that are read for its fingerprint; of a larger one `datasets` tells its own.
_LARGEST_TABLE = 2**32
_REMOTE = ("http://", "https://", "data:image/")


class ObjectImages(Sequence[Any]):
    """Items as what `decode_image` takes, read when asked for.

    Raises:
        ValueError: at an item that its data set cannot give, or that is no image.
    """

    def __init__(self, items: Sequence[Any], name: str) -> None:
        self.items = items
        self.name = name

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: Any) -> Any:
        try:
            return read_item(self.items[i])
        # the transforms of a data set, and the network, each raise their own
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"Cannot read image {i} of {self.name}: {reason}") from error


def find_in_objects(source: Any, options: SourceOptions = NO_OPTIONS) -> FoundImages:
    """The images of anything but a name or a folder; see the table above.

    Raises:
        ValueError: for what holds no images, or none that can be told apart, and for labels that
            are neither numbers nor words.
        FileNotFoundError: for paths that lead nowhere, before anything is read.
    """
    if hasattr(source, "iloc") and source.ndim == 2:
        raise ValueError(
            f"A {type(source).__name__} is a table; give its column of images, such as "
            "frame['path'].tolist(), or to `cluster` vectors frame.to_numpy()."
        )
    # a column of pandas, and arrays of paths or objects, are lists of them
    if hasattr(source, "iloc") or getattr(getattr(source, "dtype", None), "kind", "") in ("O", "U"):
        source = source.tolist()
    _refuse_others(source)
    if hasattr(source, "select_columns"):
        return _find_in_table(source, options)

    refuse_options(f"a {type(source).__name__}", options)
    items = find_items(source)
    name = f"{_kind_in_words(source)} of {len(items)} images"
    if len(items) == 0:
        raise ValueError(f"There are no images: the {type(source).__name__} is empty.")
    if isinstance(items, list | tuple) and all(_is_local_path(item) for item in items):
        return _find_paths([Path(item) for item in items], name)
    return _look_at_all(source, items, name)


def _refuse_others(source: Any) -> None:
    """ValueError for what looks like images and is not, with what to give in its place."""
    if isinstance(source, Mapping):
        names = ", ".join(map(repr, source))
        first = next(iter(source), "train")
        raise ValueError(
            f"This {type(source).__name__} holds {len(source)} sets of images: {names}; "
            f"give one of them, such as data[{first!r}]."
        )

    if isinstance(source, DataLoader):
        raise ValueError("A DataLoader gives batches; give its data set, loader.dataset.")

    is_stream = isinstance(source, IterableDataset) or not hasattr(source, "__len__")
    if is_stream and (isinstance(source, IterableDataset) or hasattr(source, "select_columns")):
        raise ValueError(
            f"This {type(source).__name__} is a stream without a length; give a data set with one, "
            "or, to refine, the name of the data set with streaming=True."
        )

    if isinstance(source, np.ndarray | Tensor) and source.ndim < 3:
        raise ValueError(
            f"This {kind_of(source)} holds no images: they are (n, height, width, channels), "
            "and one grey image is [image]; vectors (n, d) are for `cluster`."
        )


def _kind_in_words(source: Any) -> str:
    kinds = {"list": "a list", "tuple": "a list", "ndarray": "an array", "Tensor": "a tensor"}
    return kinds.get(type(source).__name__, type(source).__name__)


def _is_local_path(item: Any) -> bool:
    return isinstance(item, Path) or (isinstance(item, str) and not item.startswith(_REMOTE))


# --- paths


def _find_paths(paths: list[Path], name: str) -> FoundImages:
    """Image files by their paths; they are called what they are called below a common folder."""
    # a file may be called "~a.png"
    paths = [path if path.exists() else path.expanduser() for path in paths]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} paths lead nowhere, first {missing[0]}; "
            "leave them out, or correct them."
        )
    folders = [path for path in paths if path.is_dir()]
    if folders:
        raise ValueError(f"{folders[0]} is a folder; give it alone, or paths of images.")

    common = os.path.commonpath([path.absolute().parent for path in paths])
    names = [Path(os.path.relpath(path.absolute(), common)).as_posix() for path in paths]
    about = (f"{name} {file_size(path)}" for name, path in zip(names, paths, strict=True))
    return FoundImages(paths, None, None, name, Entries.of(paths, about))


# --- tables


def _find_in_table(table: Any, options: SourceOptions) -> FoundImages:
    """A `datasets.Dataset`: its image column, undecoded, whatever its format or transforms."""
    table = table.with_format(None)
    name = f"{type(table).__name__} of {len(table)} rows"
    if len(table) == 0:
        raise ValueError("There are no images: the data set has no rows.")

    image_column, label_columns = find_columns(table.features, name, options)
    labels, class_names, stated = labels_of(table, label_columns)
    # whoever holds the object has opened these files, or could
    sources = TableColumn(table, image_column, name, any_path=True)

    if table.data.nbytes > _LARGEST_TABLE:
        entries = Entries.of(["its fingerprint"], [str(table._fingerprint)])
    else:
        places = _in_sight(len(sources))
        entries = Entries.of(range(len(sources)), [_line_about(sources[i]) for i in places])
    return FoundImages(sources, labels, class_names, name, entries, stated)


# --- everything else


def _look_at_all(source: Any, items: Sequence[Any], name: str) -> FoundImages:
    """One pass over all items, for their labels and fingerprints."""
    about = []
    labels: list[Any] = []
    broken: list[str] = []
    floats = _FloatImages()
    for place in _in_sight(len(items)):
        # an item that cannot be read is a broken image, which whoever decodes will say
        try:
            item = items[place]
            labels.append(_label_of(item))
            if _is_remote(item):
                about.append(str(item))
                continue
            image = read_item(item)
            floats.look_at(image)
            about.append(_line_about(image))
        except _LabelError as error:
            raise ValueError(f"Image {place} of {name} {error}") from error
        except Exception as error:
            labels += [None] * (place + 1 - len(labels))
            about.append(f"broken: {type(error).__name__}")
            broken.append(str(error) or type(error).__name__)

    if len(broken) == len(items):
        reason = " ".join(broken[0].split())[:300]
        raise ValueError(f"None of the {len(items)} images can be read, the first: {reason}")
    for line in floats.remarks():
        logger.warning("%s: %s", name, line)
    numbers, class_names = _numbered_labels(labels, getattr(source, "classes", None), name)
    stated = class_names is not None and not any(isinstance(label, str) for label in labels)
    entries = Entries.of(range(len(items)), about)
    return FoundImages(ObjectImages(items, name), numbers, class_names, name, entries, stated)


def _in_sight(count: int) -> Any:
    """The places of items, with a progress bar where they are many."""
    hidden = count < _MANY
    return progress_bar(range(count), hidden=hidden, desc="looking at the images", leave=False)


def _is_remote(item: Any) -> bool:
    return isinstance(item, str) and item.startswith(_REMOTE)


def _line_about(image: Any) -> str:
    """What tells an image from another: kind and size of it, and a digest of its content."""
    if isinstance(image, Path):
        return f"{image} {file_size(image)}"
    if isinstance(image, Image.Image):
        return f"{image.mode} {image.size} {hashlib.sha256(image.tobytes()).hexdigest()}"
    if isinstance(image, bytes):
        return f"{len(image)} {hashlib.sha256(image).hexdigest()}"
    pixels = np.ascontiguousarray(image)
    return f"{pixels.dtype} {pixels.shape} {hashlib.sha256(pixels.data).hexdigest()}"


class _FloatImages:
    """What is remarkable about images that are arrays of floats: each finds its range by itself."""

    def __init__(self) -> None:
        self.lowest = 0.0
        self.highest = 0.0
        self.within_one = 0
        self.beyond_one = 0
        self.without_data = 0

    def look_at(self, image: Any) -> None:
        if not isinstance(image, np.ndarray | Tensor):
            return
        pixels = np.asarray(image)
        if pixels.dtype.kind != "f" or pixels.size == 0:
            return
        has_data = np.isfinite(pixels)
        # of channels that are no picture the range is one of the whole run
        if count_channels(np.where(has_data, pixels, 0)):
            return
        finite = pixels[has_data]
        self.without_data += finite.size < pixels.size
        if finite.size == 0:
            return
        self.lowest = min(self.lowest, float(finite.min()))
        self.highest = max(self.highest, float(finite.max()))
        # as `scale_to_bytes` has it
        dark = float(finite.max()) <= 1.05
        self.within_one += dark
        self.beyond_one += not dark

    def remarks(self) -> list[str]:
        """A line for each thing that those who gave them may not have meant."""
        lines = []
        if self.lowest < 0:
            lines.append(
                f"values down to {self.lowest:.3g}, as after Normalize, are stretched from the "
                "lowest to the highest of each image; give the images before they are normalised"
            )

        if self.without_data:
            lines.append(
                f"{self.without_data} images hold NaN or infinity; these pixels become black"
            )

        if self.within_one and self.beyond_one and self.lowest >= 0:
            lines.append(
                f"of {self.within_one} images of floats 1 is white, for no value is above it, and "
                f"of {self.beyond_one} more is, for values reach {self.highest:.3g}; if all are "
                "meant in one range, give them as uint8, or divided into 0 to 1"
            )
        return lines


class _LabelError(ValueError):
    """A label that is neither a number nor a word."""


def _label_of(item: Any) -> int | str | None:
    """The label of a row; None of an image alone."""
    label = None
    if isinstance(item, tuple) and len(item) > 1:
        label = item[1]
    elif isinstance(item, Mapping):
        label = next((item[column] for column in LABEL_COLUMNS if column in item), None)

    if isinstance(label, np.ndarray | np.generic | Tensor) and label.ndim == 0:
        label = label.item()
    if label is None or isinstance(label, int | float | str):
        try:
            return label_of(label)
        except (ValueError, OverflowError) as error:
            raise _LabelError(str(error)) from error
    raise _LabelError(
        f"has a {kind_of(label)} in the place of its label, which is a whole number, a word or "
        "None; leave it out to give the image alone."
    )


def _numbered_labels(
    labels: Sequence[int | str | None], classes: Any, name: str
) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels as int64 (n,), -1 for none, and the names of the classes where there are any."""
    kinds = {type(label) for label in labels if label is not None}
    if not kinds:
        return None, None
    if len(kinds) > 1:
        raise ValueError(f"The labels of {name} are numbers and words; give one of both.")
    if kinds == {str}:
        return label_values(labels)

    numbers = np.array([-1 if label is None else label for label in labels], dtype=np.int64)
    if not (numbers >= 0).any():
        return None, None
    # torchvision's data sets name their classes
    if isinstance(classes, list | tuple) and len(classes) > numbers.max():
        return numbers, [str(name) for name in classes]
    return numbers, None
