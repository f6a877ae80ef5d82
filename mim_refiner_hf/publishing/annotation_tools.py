"""Groups for the tools in which people look at images and label them: FiftyOne, Label Studio.

    mim-refiner cluster photos/ --also fiftyone label-studio

    kind = fiftyone.types.FiftyOneImageClassificationDataset
    fiftyone.Dataset.from_dir("groups/fiftyone", kind, data_path="data.json")

In Label Studio: set up a project with `label-studio.xml`, import `label-studio.json`; the groups
are its predictions. It serves local images where it is started with
LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true and LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT=/.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from ..runtime.files import write_json, write_text
from ..runtime.text import ODD_BYTES, UNSEEN, spelt_out
from ..runtime.wording import setting
from .choices import TOOLS

logger = logging.getLogger(__name__)


class GroupedImage(NamedTuple):
    """One image: its file, the name of its group, and the confidence of that in (0, 1]."""

    path: Path
    group: str
    confidence: float


def check_tools(tools: Sequence[str]) -> None:
    """ValueError for a tool that is not one of `TOOLS`."""
    for tool in tools:
        if tool not in TOOLS:
            raise ValueError(
                f"{setting('also', tool)}: is no tool that groups are written for; allowed: "
                f"{', '.join(TOOLS)}"
            )


def write_for_tools(
    folder: Path, images: Sequence[GroupedImage], groups: Sequence[str], tools: Sequence[str]
) -> None:
    """Write the files of each tool into the folder of the groups.

    Images whose names are no valid Unicode are left out of them, with a warning: JSON, and the
    tools' data bases, have no word for these.

    Args:
        groups: all names, in order.
    """
    # two groups of one name are one to both, and XML has no control characters
    groups = list(dict.fromkeys(spelt_out(group, UNSEEN) for group in groups))
    images = [image._replace(group=spelt_out(image.group, UNSEEN)) for image in images]
    named = [image for image in images if not ODD_BYTES.search(str(image.path))]
    if tools and len(named) < len(images):
        logger.warning(
            "%d images are not among those for %s: their names are no valid Unicode",
            len(images) - len(named),
            " and ".join(tools),
        )
    if "fiftyone" in tools:
        _write_fiftyone(folder / "fiftyone", named, groups)
    if "label-studio" in tools:
        _write_label_studio(folder, named, groups)


def _write_fiftyone(folder: Path, images: Sequence[GroupedImage], groups: Sequence[str]) -> None:
    """Its FiftyOneImageClassificationDataset: files by key, and a label with confidence by key."""
    digits = len(str(len(images)))
    files = {}
    labels = {}
    for place, image in enumerate(images):
        key = f"{place:0{digits}d}"
        files[key] = str(image.path)
        labels[key] = {"label": image.group, "confidence": round(image.confidence, 4)}

    folder.mkdir()
    write_json(folder / "data.json", files)
    write_json(folder / "labels.json", {"classes": list(groups), "labels": labels})


def _write_label_studio(
    folder: Path, images: Sequence[GroupedImage], groups: Sequence[str]
) -> None:
    """Its tasks, each with the group as a prediction, and the interface that these belong to."""
    tasks = []
    for image in images:
        # a name is shown; the place of the file is what its own server asks for
        place = quote(os.fspath(image.path).removeprefix("/"))
        result = {
            "from_name": "group",
            "to_name": "image",
            "type": "choices",
            "value": {"choices": [image.group]},
        }
        prediction = {
            "model_version": "mim-refiner cluster",
            "score": round(image.confidence, 4),
            "result": [result],
        }
        data = {"image": f"/data/local-files/?d={place}"}
        tasks.append({"data": data, "predictions": [prediction]})

    write_text(folder / "label-studio.json", json.dumps(tasks, indent=2, ensure_ascii=False) + "\n")
    choices = "\n".join(f"    <Choice value={quoteattr(group)}/>" for group in groups)
    interface = (
        '<View>\n  <Image name="image" value="$image"/>\n'
        f'  <Choices name="group" toName="image">\n{choices}\n  </Choices>\n</View>\n'
    )
    write_text(folder / "label-studio.xml", interface)
