"""Whether a data set is still the one that a run began with.

    write_data_record(Path("out/data.json"), images)     # when a run begins
    check_data_record(Path("out/data.json"), images)     # when it is continued: ValueError if not

What counts are names and sizes of its files, or its revision on the Hub; pixels are not read. The
order of training and the held-out images are functions of the data set as a whole: with one file
more, a continued run would train on what it evaluates. 4 bytes are kept per file, so that the first
one that differs can be named.
"""

import base64
from pathlib import Path

import numpy as np

from ..runtime.files import write_json
from ..runtime.strangers import parse_json
from ..runtime.wording import setting
from .images import ImageDataset

RECORD = "data.json"


def write_data_record(path: Path, images: ImageDataset) -> None:
    """Note what the data set that `images` are of consists of."""
    entries = images.found.entries
    record = {
        "name": images.name,
        "images": len(images.found.sources),
        "fingerprint": entries.digest,
        "entries": base64.b64encode(entries.checks.astype("<u4").tobytes()).decode(),
    }
    write_json(path, record)


def check_data_record(path: Path, images: ImageDataset) -> None:
    """Compare the data set that `images` are of with the one noted in `path`.

    Raises:
        ValueError: when it changed: how many images there were and are, the first name that
            differs, and what to do; or when `path` cannot be read.
    """
    try:
        record = parse_json(path.read_text())
        count_before = int(record["images"])
        fingerprint = str(record["fingerprint"])
        before = np.frombuffer(base64.b64decode(record["entries"], validate=True), dtype="<u4")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path} cannot be read ({reason}); remove it, and the data set is taken to be "
            "unchanged"
        ) from error

    entries = images.found.entries
    if fingerprint == entries.digest:
        return
    common = min(len(before), len(entries.checks))
    differing = np.flatnonzero(before[:common] != entries.checks[:common])
    first = int(differing[0]) if len(differing) else common
    if first < len(entries.checks):
        which = f"the first entry that is new or changed: {entries.names[first]}"
    else:
        which = f"what came after {entries.names[-1]} is missing"
    raise ValueError(
        f"{images.name} is not the data set that this run began with: {count_before} images then, "
        f"{len(images.found.sources)} now; {which}. Put it back as it was, or start a new run in "
        f"another {setting('output_dir')}"
    )
