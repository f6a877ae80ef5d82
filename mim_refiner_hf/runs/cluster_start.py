"""`cluster(..., start="corrected.csv")`: the groups that people have corrected, and new images.

corrections = open_corrections("corrected.csv", num_clusters=None, method="kmeans")
start = match_corrections(corrections, opened_images)
pipe, entries, corrected = grouped_as_corrected(known, start, seed=0)
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from ..clustering.cluster_count import Proposal
from ..clustering.given_groups import group_as_given
from ..clustering.pipeline_image_clustering import ImageInGroup, largest_first, refuse_infinite
from ..publishing.cluster_folder import Corrected
from ..publishing.corrections import Corrections, StartingGroups, read_corrections
from ..runtime.text import one_line
from ..runtime.wording import setting
from .cluster_features import FeaturePipeline, KnownFeatures

logger = logging.getLogger(__name__)


def open_corrections(start: str | Path, num_clusters: int | None, method: str) -> Corrections:
    """The corrections in a file, read before any other work.

    Raises:
        ValueError, FileNotFoundError: for a file that will not do, and for what does not go with
            one: a number of groups, cluster heads.
    """
    named = setting("start", start)
    if num_clusters is not None:
        raise ValueError(
            f"{setting('num_clusters', num_clusters)}: the groups of {named} say how many; leave "
            "one of them out"
        )
    if method != "kmeans":
        raise ValueError(
            f"{setting('method', method)}: new images go to the nearest centroid of the groups of "
            f"{named}; leave {setting('method')} out"
        )
    return read_corrections(Path(start).expanduser())


def grouped_as_corrected(
    known: KnownFeatures, start: StartingGroups, seed: int
) -> tuple[FeaturePipeline, list[ImageInGroup], Corrected]:
    """The groups of the images that are not left out, the largest first.

    Returns:
        The pipeline as after a call, what the call would return, and the names of the groups.

    Raises:
        ValueError: when no image of any group can be read, or features are not finite.
    """
    places = [row for row, index in enumerate(known.kept) if index not in start.left_out]
    kept = [known.kept[row] for row in places]
    known = replace(known, features=known.features[places], kept=kept)
    refuse_infinite(known.features, [known.images.describe(index) for index in kept])

    # groups without an image that can be read have no centroid
    given = [start.group_of.get(index, -1) for index in kept]
    filled = sorted(set(given) - {-1})
    if not filled:
        raise ValueError(
            f"{setting('start', start.file)}: none of its images in groups can be read; name "
            "images that can"
        )
    number_of = {group: number for number, group in enumerate(filled)}
    numbers = torch.tensor([number_of.get(group, -1) for group in given])
    _say_what_is_gone(start, filled)

    clustering = group_as_given(known.features, numbers, len(filled), seed=seed)
    order = clustering.counts.argsort(descending=True, stable=True).tolist()
    pipe = FeaturePipeline(known)
    why = Proposal(len(filled), None, True, f"as corrected in {start.file.name}", [])
    entries = pipe.grouped_as(largest_first(clustering), why)

    left_out = sorted(start.left_out)
    names = [start.names[filled[number]] for number in order]
    corrected = Corrected(names, start.moved, left_out, given.count(-1), start.file)
    return pipe, entries, corrected


def _say_what_is_gone(start: StartingGroups, filled: list[int]) -> None:
    """A line each for images that are not there any more, and for groups that are left empty."""
    named = setting("start", start.file)
    if start.gone:
        logger.warning(
            "%s: %d of its images are not among these and count for nothing, first: %s",
            named,
            len(start.gone),
            one_line(start.gone[0]),
        )

    empty = [name for group, name in enumerate(start.names) if group not in set(filled)]
    if empty:
        logger.warning(
            "%s: %d groups have no image that can be read and are dropped: %s",
            named,
            len(empty),
            one_line(", ".join(empty[:8])),
        )
