"""Images in passing: read in the order that a stream gives them, nothing downloaded first.

from mim_refiner_hf.data import open_stream
stream = open_stream("uoft-cs/cifar10")           # or a folder, a table, tar shards
for place, example in stream.iterate(seed=0, epoch=0):
    image, label = stream.decode(example)
"""

import logging
from collections.abc import Iterator
from typing import Any

from torch.utils.data import get_worker_info

from ..clustering.channels import Picture, check_channels
from ..clustering.decoding import decode_image
from ..runtime.distributed import rank
from ..runtime.seeding import random_generator
from ..runtime.text import one_line
from ..runtime.wording import setting
from .columns import find_columns, label_of, stored, undecoded
from .found import NO_OPTIONS, SourceOptions, digest
from .images import Broken, Candidate, Example, Sample
from .sources import find_stream, say_if_misstated, stated_rows

logger = logging.getLogger(__name__)

# Undecoded examples in the shuffle of a stream: about 0.4 GB of ImageNet's JPEGs.
_SHUFFLE_BUFFER = 4096


class ImageStream:
    """Images in the order that a stream gives them.

    Args:
        stream: a `datasets.IterableDataset`.
        name: what it is called in messages.
        class_names: of labels that are words, where they could be looked up beforehand.
        fingerprint: tells two streams apart; None for its configuration and split.

    Attributes:
        class_names: a name per label, or None. Of words that could not be looked up they are known
            once the stream has been read, by `in_order`.
    """

    def __init__(
        self,
        stream: Any,
        *,
        name: str,
        num_channels: int = 3,
        options: SourceOptions = NO_OPTIONS,
        class_names: list[str] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        check_channels(num_channels)
        self.name = name
        self.num_channels = num_channels
        if fingerprint is None:
            parts = (name, stream.info.config_name, stream.split)
            fingerprint = digest(list(map(str, parts)))
        self.fingerprint = fingerprint
        self._stated = stated_rows(stream, stream.split)
        features = stream.features or stream._resolve_features().features
        self.image_column, label_columns = find_columns(features, name, options)
        self.label_column = next(iter(label_columns), None)
        self._other_label_columns = label_columns[1:]
        stated_names = getattr(features.get(self.label_column), "names", None)
        self.class_names: list[str] | None = class_names or stated_names
        words = () if stated_names else class_names or ()
        self._numbers = {word: number for number, word in enumerate(words)}
        self._looked_up = bool(words)
        self._told_of_labels = False

        # no other column is read; the key is that of a tar shard
        read = (self.image_column, self.label_column, "__key__")
        selected = stream.select_columns([column for column in read if column in features])
        self.stream = undecoded(selected, self.image_column, features)

    def iterate(self, seed: int, epoch: int) -> Iterator[tuple[int, Example]]:
        """(place in this epoch, example), shuffled by shards and a buffer."""
        shuffle_seed = int(random_generator(seed, "stream", epoch).integers(2**31))
        shuffled = self.stream.shuffle(seed=shuffle_seed, buffer_size=_SHUFFLE_BUFFER)
        return enumerate(self._whole(shuffled))

    def _whole(self, stream: Any) -> Iterator[Example]:
        """All examples; at the end of the first pass their number is compared with the stated one.

        Raises:
            ValueError: where the stream cannot be read on; OSError for disk and network.
        """
        read = 0
        try:
            for example in stream:
                read += 1
                yield example
        # tables of strangers make `datasets` and Arrow raise anything
        except Exception as error:
            # disk and network are not the data's fault; Arrow's own has no number
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno):
                raise
            cause = one_line(error.__cause__ or error)[:300]
            raise ValueError(
                f"{one_line(self.name)} cannot be read beyond {read} images: {cause}"
            ) from error
        say_if_misstated(self.name, self._stated, read)
        self._stated = None

    def in_order(self) -> Iterator[Example]:
        """All examples from the beginning, unshuffled, each labelled by a number or None.

        Words that could not be looked up are numbered as they are met, which `class_names` then
        names: whoever reads the stream, however often, gives them the same numbers.
        """
        met: dict[str, int] = dict(self._numbers)
        labelled = 0
        for example in self._whole(self.stream):
            if self.label_column is None:
                yield example
                continue
            label = self._label(example)
            if isinstance(label, str):
                label = met.setdefault(label, len(met))
            labelled += label is not None
            yield example | {self.label_column: label}

        if met:
            self.class_names = list(met)
        if labelled == 0 and self._other_label_columns and rank() == 0:
            logger.warning(
                "%s labels no image in its column %s; it also has %s: name one by %s",
                one_line(self.name),
                one_line(self.label_column),
                ", ".join(map(one_line, self._other_label_columns)),
                setting("label_column"),
            )

    def decode(self, example: Example) -> tuple[Picture, int]:
        """The image of an example, and its label or -1; ValueError if it is broken.

        A word that could not be looked up, and that `in_order` has not numbered, gives 52 bits of
        its digest: enough to tell whether two images are of one class.
        """
        source = stored(example[self.image_column], self.name)
        label = self._label(example)
        image = decode_image(source, self.num_channels, self.describe(example))
        if isinstance(label, str) and self._looked_up:
            label = self._numbers.get(label)
        elif isinstance(label, str):
            label = int(digest([label])[:13], 16)
        if label is None:
            label = -1
        return image, label

    def _label(self, example: Example) -> int | str | None:
        """What labels an example; None, which is said once, where that is no label."""
        if self.label_column is None:
            return None

        try:
            return label_of(example[self.label_column])
        except ValueError as error:
            worker = get_worker_info()
            said_here = rank() == 0 and (worker is None or worker.id == 0)
            if said_here and not self._told_of_labels:
                column = one_line(self.label_column)
                logger.warning("column %s %s: such images count as unlabelled", column, error)
            self._told_of_labels = True
            return None

    def describe(self, example: Example) -> str:
        """What an example is called: its key in a tar shard, or its path; else, the stream."""
        cell = example[self.image_column]
        path = cell.get("path") if isinstance(cell, dict) else None
        return str(example.get("__key__") or path or f"an image of {self.name}")

    def __getitem__(self, candidate: tuple[int, Example]) -> Sample:
        """The sample of an (index, example) of `iterate`."""
        index, example = candidate
        return Sample(*self.decode(example), index)

    def place(self, candidate: Candidate) -> int:
        """`Sample.index` of a candidate."""
        assert isinstance(candidate, tuple)
        return candidate[0]

    def broken(self, candidate: Candidate, error: ValueError) -> Broken:
        """The entry of an image that cannot be read; its index is the place in that epoch."""
        assert isinstance(candidate, tuple)
        index, example = candidate
        return {"index": index, "path": self.describe(example), "reason": str(error)}


def open_stream(
    dataset: str,
    *,
    config: str | None = None,
    split: str | None = None,
    num_channels: int = 3,
    options: SourceOptions = NO_OPTIONS,
) -> ImageStream:
    """As `open_images`, read in passing: nothing is downloaded first. Not the digits."""
    if dataset == "digits":
        raise ValueError(
            "The digits are 1797 images in memory and are not streamed; "
            "open them without streaming."
        )

    stream, class_names, fingerprint = find_stream(
        dataset, config=config, split=split, options=options
    )
    return ImageStream(
        stream,
        name=dataset,
        num_channels=num_channels,
        options=options,
        class_names=class_names,
        fingerprint=fingerprint,
    )
