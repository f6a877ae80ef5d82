"""What training reads: a sample of a data set or a stream, and another one for a broken image.

A broken image met in training is replaced by the sample that comes one batch later in the epoch's
order; if that is broken too, by the one after it, and so on (`read_sample`). So the replacement is
a pure function of (seed, epoch, batch size), whatever the number of workers and processes, and it
is not in the batch already (but for an epoch's end, where the order begins again, and neighbours
that are broken both). It brings its own index and label, by which the nearest-neighbour queue keeps
it from finding itself, and the views are drawn for the image it stands in for. It does occur twice
in that epoch, which is why every broken image is named and listed (`broken.py`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from .images import Broken, ImageDataset, Key, Sample
from .stream import ImageStream


class Reading(NamedTuple):
    """What `read_sample` gives.

    Attributes:
        sample: the first readable candidate.
        asked: the index of the one that was asked for.
        broken: entries of those that were passed over.
    """

    sample: Sample
    asked: int
    broken: list[Broken]


class NoneReadableError(ValueError):
    """An image, and all that could stand in for it, are broken.

    From a worker torch raises it again with the worker's whole traceback as its text, of which the
    last line is this message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


def read_sample(
    source: ImageDataset | ImageStream,
    key: Key,
    read: Callable[[Any], Sample] | None = None,
) -> Reading:
    """The first readable candidate of a key.

    Args:
        key: of a `BatchSampler`; one without replacements, (epoch, candidate), will do.
        read: candidate to sample, ValueError if it is broken; None for `source[candidate]`.

    Raises:
        NoneReadableError: when all candidates are broken.
    """
    read = read or source.__getitem__
    broken: list[Broken] = []
    for candidate in key[1:]:
        try:
            return Reading(read(candidate), source.place(key[1]), broken)
        except ValueError as error:
            broken.append(source.broken(candidate, error))
    raise NoneReadableError(
        f"{len(broken)} images of {source.name} in a row are broken, "
        f"first: {broken[0]['reason']} Check the data."
    )
