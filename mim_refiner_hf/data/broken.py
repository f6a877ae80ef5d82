"""Images that cannot be read: found, shared by all processes, listed in `broken.json`, and stopped at when there are too many.

    broken = BrokenImages(images, max_fraction=0.05, path=Path("out/broken.json"))
    broken.add(batch["broken"])                                # what a loader's worker met on the way
    broken.share(images_read=done * batch_size)                # now and then; ValueError if there are too many
    images, entries = readable(images, num_workers=8)          # for evaluations, which take every image exactly once

An entry is {"index": place in the data set, "path", "reason"}. What stands in for a broken image: `mim_refiner_hf.data`.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ..runtime.distributed import gather_objects, progress_bar, rank, world_size
from ..runtime.files import write_json
from .images import Broken, ImageDataset, ImageStream

logger = logging.getLogger(__name__)

BROKEN = "broken.json"
MAX_BAD_FRACTION = 0.05
"""A crawl of the web has a percent or two of broken images; what is wrong as a whole (a half-finished copy) has far more."""
ENOUGH = 1000  # images of a stream read before a share of them says anything
SAID = 10  # broken images named in the log; the list has all


class BrokenImages:
    """The broken images that a run has met, each once, in the order of the data set."""

    def __init__(
        self,
        images: ImageDataset | ImageStream,
        max_fraction: float = MAX_BAD_FRACTION,
        path: Path | None = None,
    ) -> None:
        """Args:
        images: what is read; the share is one of the whole data set, or of what was read of a stream.
        max_fraction: the share of broken images that is accepted.
        path: where the list is kept, by the main process.
        """
        self.images, self.max_fraction, self.path = images, max_fraction, path
        self._found: dict[int, Broken] = {}
        self._new: dict[int, Broken] = {}

    def __len__(self) -> int:
        return len(self._found)

    @property
    def entries(self) -> list[Broken]:
        """All that `share` knows of, by place."""
        return [self._found[index] for index in sorted(self._found)]

    def add(self, reports: Iterable[str | Broken]) -> None:
        """Entries, or a loader's "broken" column: JSON of a list of entries per sample, "" where there were none."""
        for report in reports:
            entries = [report] if isinstance(report, dict) else json.loads(report or "[]")
            self._new |= {
                entry["index"]: entry for entry in entries if entry["index"] not in self._found
            }

    def share(self, images_read: int = 0) -> None:
        """Tell all processes what is new, name it, list it; all of them call this at the same step.

        Raises:
            ValueError: on every process, when more than `max_fraction` of the images are broken.
        """
        new: dict[int, Broken] = {}
        for found in gather_objects(self._new):
            new |= found
        self._new = {}
        if not new:
            return
        for entry in [new[index] for index in sorted(new)][: max(SAID - len(self), 0)]:
            logger.warning("broken image, skipped and listed: %s", entry["reason"])
        self._found |= new
        if rank() == 0 and self.path is not None:
            write_json(self.path, {"images": self.entries})
        self._check(images_read)

    def _check(self, images_read: int) -> None:
        is_set = isinstance(self.images, ImageDataset)
        total = (
            len(self.images.found.sources)
            if isinstance(self.images, ImageDataset)
            else max(images_read, ENOUGH)
        )
        if len(self) <= self.max_fraction * total:
            return
        listed = f"; all are listed in {self.path}" if self.path else ""
        raise ValueError(
            f"{len(self)} of {total if is_set else images_read} images of {self.images.name} are broken, more than the "
            f"{self.max_fraction:.1%} that --max_bad_fraction allows, first: {self.entries[0]['reason']}{listed}. Raise it and run the "
            "same command again to go on, or repair the data and start anew in another folder"
        )


class _Checked(Dataset["Broken | None"]):
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


def _first(items: list[Any]) -> Any:
    return items


def readable(images: ImageDataset, num_workers: int = 0) -> tuple[ImageDataset, list[Broken]]:
    """The images that can be read, and entries for the others: every image is decoded once, the processes share the work.

    Raises:
        ValueError: when none can be read.
    """
    own = images.subset(range(rank(), len(images), world_size()))
    loader = DataLoader(_Checked(own), batch_size=64, num_workers=num_workers, collate_fn=_first)

    def found() -> Iterator[Broken]:
        for batch in progress_bar(
            loader, hidden=rank() > 0, desc="readable images", unit="batch", leave=False
        ):
            yield from filter(None, batch)

    entries = sorted(
        (entry for part in gather_objects(list(found())) for entry in part),
        key=lambda entry: entry["index"],
    )
    if not entries:
        return images, []
    if len(entries) == len(images):
        raise ValueError(
            f"None of the {len(images)} images of {images.name} can be read, first: {entries[0]['reason']}"
        )
    broken = {entry["index"] for entry in entries}
    return images.subset(
        [i for i, index in enumerate(images.indices.tolist()) if index not in broken]
    ), entries


__all__ = ["BROKEN", "MAX_BAD_FRACTION", "BrokenImages", "readable"]
