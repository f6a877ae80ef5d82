"""Images with masks: what segmentation is trained and measured on, at the encoder's size.

images = open_segmentation("camvid/", split="train")        # parquet with the columns image and mask, classes.json beside it
image, mask = images[0]                                     # PIL images of one size
images.class_names, images.targets(mask)                    # the classes that count, and the class of every pixel, -1 for void
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..clustering.decoding import ImageSource, decode_image
from ..data.sources import find_columns, load_table, stored, undecoded
from ..data.views import draw_crop, flip_horizontally, resized_crop
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..runtime.seeding import random_generator

VOID = -1  # in targets: neither trained on nor counted
VOID_NAME = "void"
MASK_COLUMNS = ("mask", "annotation", "segmentation")
CROP_SCALE = (0.25, 1.0)


class SegmentationDataset(Dataset[tuple[Image.Image, Image.Image]]):
    """Images with their masks; a pixel of a mask is the number of its class, before "void" is taken out.

    `targets` turns masks into what is trained on; `class_names` (K) are those of the classes that count.
    """

    def __init__(
        self, table: Any, image_column: str, mask_column: str, names: Sequence[str], name: str
    ) -> None:
        self.table, self.image_column, self.mask_column, self.name = (
            table,
            image_column,
            mask_column,
            name,
        )
        self.fingerprint: str = (
            table._fingerprint
        )  # tells two data sets apart without reading pixels
        self.class_names = [each for each in names if each != VOID_NAME]
        self.classes = np.full(2**16, VOID, dtype=np.int64)  # of every mask value: a class, or void
        counted = [value for value, each in enumerate(names) if each != VOID_NAME]
        self.classes[counted] = np.arange(len(counted))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> tuple[Image.Image, Image.Image]:
        row = self.table[i]
        image = decode_image(
            stored(row[self.image_column], self.name), name=f"row {i} of {self.name}"
        )
        mask = open_mask(stored(row[self.mask_column], self.name))
        if mask.size != image.size or len(mask.getbands()) != 1:
            raise ValueError(
                f"row {i} of {self.name} has an image of {image.size} pixels and a mask of {mask.size} in {len(mask.getbands())} "
                "channels; a mask is as large as its image and has one channel, of class numbers"
            )
        return image, mask

    def targets(self, mask: Image.Image) -> Tensor:
        """The class of every pixel (H, W), or -1 for void and for values without a name."""
        return torch.from_numpy(self.classes[np.asarray(mask).astype(np.uint16)])


def open_mask(source: ImageSource) -> Image.Image:
    """A mask with its values as they are stored, a palette's numbers included."""
    if isinstance(source, Image.Image):
        return source
    mask = Image.open(io.BytesIO(source if isinstance(source, bytes) else source.read_bytes()))
    mask.load()
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
        class_names: of the masks' values 0, 1, ...; pixels of the class "void", and values beyond the names, do not count. None: the list
            in `classes.json` beside the files.

    Raises:
        ValueError, FileNotFoundError: for missing data, columns or names.
    """
    table = load_table(dataset, config=config, split=split, streaming=False)
    image_column, _ = find_columns(table.features, dataset)
    mask_column = next(
        (column for column in MASK_COLUMNS if column in table.features and column != image_column),
        None,
    )
    if mask_column is None:
        raise ValueError(
            f"No masks in {dataset}: its columns are {list(table.features)}; one must be {', '.join(MASK_COLUMNS)}."
        )
    if class_names is None:
        path = Path(dataset).expanduser()
        beside = (path if path.is_dir() else path.parent) / "classes.json"
        if not beside.is_file():
            raise FileNotFoundError(
                f"No names for the classes of {dataset}: give class_names, or write the list to {beside}."
            )
        class_names = json.loads(beside.read_text(encoding="utf-8"))
    if not class_names or len(set(class_names)) < len(class_names):
        raise ValueError(
            f"class_names={list(class_names)} of {dataset} must be different names, at least one."
        )
    table = table.select_columns([image_column, mask_column])  # no other column is decoded
    for column in (image_column, mask_column):
        table = undecoded(table, column, table.features)
    return SegmentationDataset(table, image_column, mask_column, class_names, dataset)


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Pixels (C, H, W) uint8 and targets (H, W) at the encoder's size: of key (epoch, i) a random crop, of key i the centre."""

    def __init__(self, images: SegmentationDataset, config: MimRefinerConfig, seed: int) -> None:
        self.images, self.seed = images, seed
        self.height, self.width = config.image_hw
        self.mode = "RGB" if config.num_channels == 3 else "L"

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        if isinstance(key, int):
            image, mask = self.images[key]
            size = (self.width, self.height)
            image, mask = (
                ImageOps.fit(image, size, Image.Resampling.BICUBIC),
                ImageOps.fit(mask, size, Image.Resampling.NEAREST),
            )
        else:
            image, mask = self.random_crop(*self.images[key[1]], *key)
        pixels = torch.from_numpy(np.array(image.convert(self.mode))).view(
            self.height, self.width, -1
        )
        return pixels.permute(2, 0, 1), self.images.targets(mask)

    def random_crop(
        self, image: Image.Image, mask: Image.Image, epoch: int, i: int
    ) -> tuple[Image.Image, Image.Image]:
        """The same crop and flip of both, a pure function of seed, epoch and place."""
        rng = random_generator(self.seed, "segmentation", epoch, i)
        box = draw_crop(*image.size, CROP_SCALE, rng)
        top, left, height, width = box
        image = resized_crop(image, box, self.height)
        mask = mask.crop((left, top, left + width, top + height)).resize(
            (self.width, self.height), Image.Resampling.NEAREST
        )
        return (
            (flip_horizontally(image), flip_horizontally(mask))
            if rng.random() < 0.5
            else (image, mask)
        )


__all__ = ["VOID", "Crops", "SegmentationDataset", "open_segmentation"]
