"""Images that cannot be read: found, shared by all processes, listed, and stopped at if too many.

    broken = BrokenImages(images, max_fraction=0.05, path=Path("out/broken.json"))
    broken.add(batch["broken"])                     # what a loader's worker met on the way
    broken.share(images_read=done * batch_size)     # now and then; ValueError if there are too many

    images, entries = readable(images, num_workers=8)    # for evaluations

A training replaces a broken image by another one (`images.py`); an evaluation takes every image
exactly once, and leaves it out. An entry is {"index": place in the data set, "path", "reason"}.
"""

import itertools
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ..runtime.distributed import gather_objects, progress_bar, rank, world_size
from ..runtime.files import write_json
from ..runtime.wording import setting
from .images import Broken, ImageDataset
from .limits import MAX_BAD_FRACTION
from .stream import ImageStream

logger = logging.getLogger(__name__)

BROKEN = "broken.json"
# images of a stream that are read before a share of them says anything
_ENOUGH = 1000
# broken images named in the log; the list has all
_NAMED = 10


class BrokenImages:
    """The broken images that a run has met, each once.

    Args:
        images: what is read; the share is one of the whole data set, or of what was read of a
            stream.
        max_fraction: the share of broken images that is accepted.
        path: where the main process keeps the list.
    """

    def __init__(
        self,
        images: ImageDataset | ImageStream,
        max_fraction: float = MAX_BAD_FRACTION,
        path: Path | None = None,
    ) -> None:
        self.images = images
        self.max_fraction = max_fraction
        self.path = path
        self._known: dict[int, Broken] = {}
        self._new: dict[int, Broken] = {}

    def __len__(self) -> int:
        return len(self._known)

    @property
    def entries(self) -> list[Broken]:
        """All that `share` knows of, in the order of the data set."""
        return [self._known[index] for index in sorted(self._known)]

    def add(self, reports: Iterable[str | Broken]) -> None:
        """Take note of entries.

        Args:
            reports: entries, or a loader's "broken" column: JSON of a list of entries per sample,
                "" where there were none.
        """
        for report in reports:
            entries = json.loads(report or "[]") if isinstance(report, str) else [report]
            for entry in entries:
                if entry["index"] not in self._known:
                    self._new[entry["index"]] = entry

    def share(self, images_read: int = 0) -> None:
        """Tell all processes what is new, name it, list it; all of them call this at the same step.

        Raises:
            ValueError: on every process, when more than `max_fraction` of the images are broken.
        """
        new: dict[int, Broken] = {}
        for own in gather_objects(self._new):
            new |= own
        self._new = {}
        if not new:
            return

        still_named = max(_NAMED - len(self), 0)
        for index in sorted(new)[:still_named]:
            logger.warning("broken image, skipped and listed: %s", new[index]["reason"])
        self._known |= new
        if rank() == 0 and self.path is not None:
            write_json(self.path, {"images": self.entries})
        self._check(images_read)

    def _check(self, images_read: int) -> None:
        if isinstance(self.images, ImageDataset):
            total = enough = len(self.images.found.sources)
        else:
            total = images_read
            enough = max(images_read, _ENOUGH)
        if len(self) <= self.max_fraction * enough:
            return

        listed = f"; all are listed in {self.path}" if self.path else ""
        raise ValueError(
            f"{len(self)} of {total} images of {self.images.name} are broken, more than the "
            f"{self.max_fraction:.1%} that {setting('max_bad_fraction')} allows, first: "
            f"{self.entries[0]['reason']}{listed}. Raise it and run the same command again to go "
            "on, or repair the data and start anew in another folder"
        )


class _Checked(Dataset["Broken | None"]):
    """The entry of an image that cannot be read, None of one that can."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Broken | None:
        try:
            self.images[i]
        except ValueError as error:
            return self.images.broken(i, error)
        return None


def _as_list(items: list[Any]) -> list[Any]:
    return items


def readable(images: ImageDataset, num_workers: int = 0) -> tuple[ImageDataset, list[Broken]]:
    """The images that can be read, and entries for the others.

    Every image is decoded once; the processes share the work.

    Raises:
        ValueError: when none can be read.
    """
    own = images.subset(range(rank(), len(images), world_size()))
    loader = DataLoader(_Checked(own), batch_size=64, num_workers=num_workers, collate_fn=_as_list)
    own_entries: list[Broken] = []
    for batch in progress_bar(loader, desc="readable images", unit="batch", leave=False):
        own_entries += filter(None, batch)

    entries = list(itertools.chain(*gather_objects(own_entries)))
    entries.sort(key=lambda entry: entry["index"])
    if not entries:
        return images, []
    if len(entries) == len(images):
        raise ValueError(
            f"None of the {len(images)} images of {images.name} can be read, "
            f"first: {entries[0]['reason']}"
        )

    broken = [entry["index"] for entry in entries]
    left = ~np.isin(images.indices, broken)
    return images.subset(np.flatnonzero(left)), entries
