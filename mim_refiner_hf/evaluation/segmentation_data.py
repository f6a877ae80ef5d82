"""Images with masks: what segmentation is trained and measured on, at the encoder's size.

# parquet with the columns image and mask, classes.json beside it
images = open_segmentation("camvid/", split="train")
image, mask = images[0]          # PIL images of one size
images.class_names               # the classes that count
images.targets(mask)             # the class of every pixel, -1 for void
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..clustering.channels import as_picture
from ..clustering.decoding import FORMATS, decode_image, read_file
from ..data.columns import find_columns, stored, undecoded
from ..data.loading import Loading
from ..data.sources import load_table
from ..data.views import draw_crop, flip_horizontally, resized_crop
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..runtime.seeding import random_generator
from ..runtime.strangers import parse_json
from ..runtime.text import one_line

# in targets: neither trained on nor counted
VOID = -1
VOID_NAME = "void"
MASK_COLUMNS = ("mask", "annotation", "segmentation")
# share of the image's area that a random crop shows
MASKED_CROP_SCALE = (0.25, 1.0)


class SegmentationDataset(Dataset[tuple[Image.Image, Image.Image]]):
    """Images with their masks; a pixel of a mask is the number of its class, "void" included.

    Attributes:
        class_names: of the K classes that count.
        classes: the number, among those, of every mask value; -1 where it does not count.
        fingerprint: tells two data sets apart without reading pixels.
    """

    def __init__(
        self, table: Any, image_column: str, mask_column: str, names: Sequence[str], name: str
    ) -> None:
        self.table = table
        self.image_column = image_column
        self.mask_column = mask_column
        self.name = name
        self.fingerprint: str = table._fingerprint

        counted = [value for value, label in enumerate(names) if label != VOID_NAME]
        self.class_names = [names[value] for value in counted]
        self.classes = np.full(2**16, VOID, dtype=np.int64)
        self.classes[counted] = np.arange(len(counted))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> tuple[Image.Image, Image.Image]:
        row = self.table[i]
        source = stored(row[self.image_column], self.name)
        image = as_picture(decode_image(source, name=f"row {i} of {self.name}"))
        source = stored(row[self.mask_column], self.name)
        mask = open_mask(source, name=f"the mask in row {i} of {self.name}")

        bands = len(mask.getbands())
        if mask.size != image.size or bands != 1:
            raise ValueError(
                f"row {i} of {self.name} has an image of {image.size} pixels and a mask of "
                f"{mask.size} in {bands} channels; a mask is as large as its image and has one "
                "channel, of class numbers"
            )
        return image, mask

    def targets(self, mask: Image.Image) -> Tensor:
        """The class of every pixel (H, W), or -1 for void and for values without a name."""
        return torch.from_numpy(self.classes[np.asarray(mask).astype(np.uint16)])


def open_mask(source: bytes | Path | np.ndarray, name: str) -> Image.Image:
    """A mask with its values as they are stored, a palette's numbers included.

    `decode_image` gives colours. The same files are read here, and no others.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    try:
        encoded = read_file(source) if isinstance(source, Path) else source
        mask = Image.open(io.BytesIO(encoded), formats=FORMATS)
        mask.load()
    # for broken files Pillow raises OSError, SyntaxError, struct.error, zlib.error and others
    except Exception as error:
        reason = one_line(error)[:200]
        raise ValueError(f"Cannot decode {name}: {reason}; replace or remove it.") from error
    return mask


def open_segmentation(
    dataset: str,
    *,
    config: str | None = None,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
) -> SegmentationDataset:
    """Images and masks of a parquet file or folder, or of a data set on the Hub.

    Args:
        dataset, config, split: as in `open_images`.
        class_names: of the masks' values 0, 1, ...; pixels of the class "void", and values beyond
            the names, do not count. None: the list in `classes.json` beside the files.

    Raises:
        ValueError, FileNotFoundError: for missing data, columns or names.
    """
    table = load_table(dataset, config=config, split=split, streaming=False)
    image_column, _ = find_columns(table.features, dataset)
    mask_column = find_mask_column(table.features, image_column, dataset)

    if class_names is None:
        class_names = names_beside(dataset)
    if not class_names or len(set(class_names)) < len(class_names):
        raise ValueError(
            f"class_names={list(class_names)} of {dataset} must be different names, at least one."
        )

    # no other column is decoded
    table = table.select_columns([image_column, mask_column])
    for column in (image_column, mask_column):
        table = undecoded(table, column, table.features)
    return SegmentationDataset(table, image_column, mask_column, class_names, dataset)


def find_mask_column(features: Mapping[str, Any], image_column: str, dataset: str) -> str:
    """The first of `MASK_COLUMNS` that the data set has; ValueError where it has none."""
    for column in MASK_COLUMNS:
        if column in features and column != image_column:
            return column
    raise ValueError(
        f"No masks in {dataset}: its columns are {list(features)}; one must be "
        f"{', '.join(MASK_COLUMNS)}."
    )


def names_beside(dataset: str) -> list[str]:
    """The list in `classes.json`, in the folder of the data set's files."""
    path = Path(dataset).expanduser()
    folder = path if path.is_dir() else path.parent
    file = folder / "classes.json"

    if not file.is_file():
        raise FileNotFoundError(
            f"No names for the classes of {dataset}: give class_names, or write the list to {file}."
        )
    try:
        names = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        reason = one_line(error)[:200]
        raise ValueError(f"{file} is no list of names in JSON: {reason}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{file} is no list of names in JSON, such as ["sky", "road"]')
    return names


def as_pixels(image: Image.Image, config: MimRefinerConfig) -> Tensor:
    """An image as (C, H, W) uint8, in as many channels as the encoder reads."""
    mode = "RGB" if config.num_channels == 3 else "L"
    pixels = torch.from_numpy(np.array(image.convert(mode)))
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1)


class OwnSize(Dataset[tuple[Tensor, Tensor]]):
    """Pixels (C, H, W) uint8 and targets (H, W) of images at the size that they have."""

    def __init__(self, images: SegmentationDataset, config: MimRefinerConfig) -> None:
        self.images = images
        self.config = config

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, mask = self.images[i]
        return as_pixels(image, self.config), self.images.targets(mask)


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Pixels (C, H, W) uint8 and targets (H, W) at the encoder's size.

    Key (epoch, i) gives a random crop of image i, key i its centre, or all of it if `squash`.
    """

    def __init__(
        self,
        images: SegmentationDataset,
        config: MimRefinerConfig,
        seed: int,
        *,
        squash: bool = False,
    ) -> None:
        self.images = images
        self.seed = seed
        self.squash = squash
        self.config = config
        self.height, self.width = config.image_hw

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        if isinstance(key, int):
            image, mask = self.whole(*self.images[key])
        else:
            epoch, i = key
            image, mask = self.random_crop(*self.images[i], epoch, i)

        return as_pixels(image, self.config), self.images.targets(mask)

    def whole(self, image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
        """The largest centre of the encoder's shape, resized to it, or the squashed image."""
        size = (self.width, self.height)
        if self.squash:
            image = image.resize(size, Image.Resampling.BICUBIC)
            return image, mask.resize(size, Image.Resampling.NEAREST)
        image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
        return image, ImageOps.fit(mask, size, Image.Resampling.NEAREST)

    def random_crop(
        self, image: Image.Image, mask: Image.Image, epoch: int, i: int
    ) -> tuple[Image.Image, Image.Image]:
        """The same crop and flip of both, a pure function of seed, epoch and place."""
        rng = random_generator(self.seed, "segmentation", epoch, i)
        box = draw_crop(*image.size, MASKED_CROP_SCALE, rng)
        image = resized_crop(image, box, self.height)

        # numbers of classes cannot be interpolated
        top, left, height, width = box
        mask = mask.crop((left, top, left + width, top + height))
        mask = mask.resize((self.width, self.height), Image.Resampling.NEAREST)

        if rng.random() < 0.5:
            return flip_horizontally(image), flip_horizontally(mask)
        return image, mask


def masked_batches(
    images: SegmentationDataset,
    config: MimRefinerConfig,
    loading: Loading,
    *,
    squash: bool = False,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """All images batch by batch: their centres, or all of each if `squash`."""
    return DataLoader(
        Crops(images, config, seed=0, squash=squash),
        sampler=range(len(images)),
        batch_size=loading.batch_size,
        num_workers=loading.num_workers,
    )
