"""`cluster`: images, or their vectors, as groups of alike ones.

    groups = cluster("photos/", model="facebook/vit-mae-base")     # the number is proposed
    groups = cluster(images, model=encoder, num_clusters=12)       # what `open_images` takes
    groups = cluster(vectors)                                      # an array (n, d) of anything
    groups = cluster("features/")                       # a feature store of `mim-refiner embed`
    print(groups)                                       # 287 images in 9 groups (...)
    groups.labels, groups.confidence                    # (n,) each, in the order of the input
    groups.clustering.assign(new_vectors)               # later ones, into the same groups

    cluster("photos/", model=encoder, out="groups/")    # also a page, a table, folders of links
    cluster("photos/", start="corrected.csv")           # groups as corrected on that page

`mim-refiner cluster` runs it with `out`.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..clustering.cluster_count import Proposal
from ..clustering.k_means import Clustering
from ..clustering.pipeline_image_clustering import (
    ImageClusteringPipeline,
    ImageInGroup,
    UnreadImage,
    check_num_clusters,
    find_groups,
)
from ..data.found import SourceOptions
from ..data.images import ImageDataset, open_images
from ..data.loading import Loading
from ..evaluation.feature_store import FeatureStore
from ..evaluation.features import feature_columns
from ..evaluation.shard_files import STORE_MANIFEST
from ..publishing.annotation_tools import check_tools
from ..publishing.cluster_folder import (
    GROUPS_TABLE,
    GroupsSummary,
    begin_summary,
    check_groups_folder,
    describe_groups,
    write_groups,
)
from ..publishing.corrections import match_corrections
from ..runtime.files import check_apart, staged_folder
from ..runtime.precision import Precision
from ..runtime.text import one_line
from ..runtime.wording import kind_of, setting, written
from .channels import fit_and_tell
from .cluster_features import FeaturePipeline, KnownFeatures, encoded, features_folder, from_store
from .cluster_model import choose_encoder, warn_of_misfit
from .cluster_start import grouped_as_corrected, open_corrections
from .embed import check_dtype, device_here, in_precision

logger = logging.getLogger(__name__)

# the squares of smaller numbers are lost in float32
_LEAST = 1e-10


@dataclass(frozen=True, eq=False)
class Groups:
    """What `cluster` found about n images or vectors.

    Attributes:
        labels: the group of each (n,) int64, 0 being the largest group; -1 for an image that cannot
            be read or is left out.
        confidence: in (0, 1] (n,) float32; 0 for an image that cannot be read.
        exemplars: of each group up to 9 places in the input, most typical first.
        proposal: how many groups and why, with the evidence; `proposal.clear` is False where there
            was no clear answer.
        features: (m, d) float32, a row per image that could be read.
        broken: {"index", "image", "error"} of each image that could not be read.
        clustering: the groups themselves; `assign` sorts further vectors into them.
        summary: everything that the folder's `summary.json` says.
    """

    labels: NDArray[np.int64]
    confidence: NDArray[np.float32]
    exemplars: list[list[int]]
    proposal: Proposal
    features: NDArray[np.float32]
    broken: list[UnreadImage]
    clustering: Clustering
    summary: GroupsSummary

    @property
    def num_clusters(self) -> int:
        """How many groups."""
        return len(self.exemplars)

    def __str__(self) -> str:
        return str(self.summary["note"])

    def __repr__(self) -> str:
        return f"<Groups: {self}>"


def cluster(
    images: Any,
    model: Any = None,
    *,
    num_clusters: int | None = None,
    method: str = "kmeans",
    start: str | Path | None = None,
    out: str | Path | None = None,
    also: Sequence[str] = (),
    image_column: str | None = None,
    follow_links: bool = False,
    seed: int = 0,
    dtype: Precision | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
) -> Groups:
    """Put every image, or every vector, into a group.

    Args:
        images: what `open_images` takes: a folder, a list of paths, PIL images or arrays, a data
            set of `datasets` or torch; or an array, tensor or list (n, d) of vectors, such as
            `embed` gives; or a feature store, or its folder.
        model: of images, what `load_encoder` takes; None for a small one for photos of all kinds,
            which the Hub has. Vectors and features need none.
        num_clusters: number of groups; None to have it proposed, with its evidence.
        method: "kmeans", or "heads": cluster heads, slower.
        start: a CSV file of corrected groups, as the page saves it (`publishing/corrections.py`):
            its images stay in their groups, those left out stay out, and new images go to the
            nearest of these groups.
        out: a folder to write: a page, a table, links by group; of images only. Earlier groups
            there are replaced. A call that was interrupted goes on where it was.
        also: tools to write the groups for too, into `out`: "fiftyone", "label-studio"
            (`publishing/annotation_tools.py`).
        image_column: of a table of images; None to find it.
        follow_links: of a folder, enter links to folders, wherever they lead.
        seed: of everything random.
        dtype: of the computation of features, as of `embed`; of images only.
        batch_size, num_workers: images per forward pass, and processes that decode.

    Raises:
        ValueError, FileNotFoundError: for images, vectors, a model, a number or a folder that will
            not do; nothing is written.
    """
    also = _tools(also, out)
    images = _listed_vectors(images)
    if _holds_numbers(images) and images.ndim < 3:
        _refuse_for_vectors(model=model, out=out, start=start, dtype=dtype)
        return _of_vectors(images, num_clusters, method, seed)
    corrections = None if start is None else open_corrections(start, num_clusters, method)
    folder = None if out is None else _folder_apart(Path(out), images)

    places = None
    if _is_store(images):
        known = _stored(images, model=model, dtype=dtype)
        if corrections is not None:
            places = match_corrections(corrections, known.images)
    else:
        opened = open_images(images, options=SourceOptions(image_column, follow_links=follow_links))
        check_num_clusters(num_clusters, len(opened), method, setting("num_clusters"))
        if corrections is not None:
            places = match_corrections(corrections, opened)
        known = _encode(opened, model, dtype, folder, batch_size, num_workers)

    corrected = None
    try:
        if places is not None:
            pipe, entries, corrected = grouped_as_corrected(known, places, seed)
        else:
            pipe = FeaturePipeline(known)
            entries = pipe(known.images, num_clusters=num_clusters, method=method, seed=seed)
    # what will not do now will not do when it is run again
    except ValueError:
        _forget(folder)
        raise
    summary = begin_summary(pipe.summary)
    if corrected is not None:
        corrected.tell(summary, known.images)
    summary["note"] = describe_groups(summary)
    if folder is not None:
        if (folder / GROUPS_TABLE).is_file():
            logger.warning("the earlier groups in %s are replaced", one_line(str(out)))
        with staged_folder(folder, check_groups_folder) as new:
            summary = write_groups(new, known.images, entries, pipe, corrected, also, folder)
        _forget(folder)
    return _of_images(known.images, entries, pipe, summary)


def _stored(store: Any, **settings: Any) -> KnownFeatures:
    """The features of a store; ValueError where a setting that only images have is given too."""
    for name, value in settings.items():
        if value is not None:
            raise ValueError(
                f"{setting(name, value)}: is for images; {written(_store_name(store))} holds "
                "features already"
            )
    return from_store(store if isinstance(store, FeatureStore) else FeatureStore(store))


def _folder_apart(out: Path, images: Any) -> Path:
    """The folder to write, if it can be, and does not hold the images."""
    folder = check_groups_folder(out)
    check_apart(out, images)
    return folder


def _tools(also: str | Sequence[str], out: str | Path | None) -> Sequence[str]:
    """The tools to write for; ValueError for one that is unknown, or without a place."""
    tools = [also] if isinstance(also, str) else also
    check_tools(tools)
    if tools and out is None:
        raise ValueError(f"{setting('also', tools[0])}: needs {setting('out')}, a folder to write")
    return tools


def _encode(
    images: ImageDataset,
    model: Any,
    dtype: Precision | None,
    folder: Path | None,
    batch_size: int,
    num_workers: int,
) -> KnownFeatures:
    """The features of images by the model asked for, or the default."""
    loading = Loading(batch_size, num_workers, device_here())
    check_dtype(dtype, loading)
    encoder, images = fit_and_tell(choose_encoder(model), images)
    warn_of_misfit(encoder, images)
    encoder = in_precision(encoder, images, dtype, feature_columns(encoder.config), loading)
    return encoded(encoder, images, loading, folder)


def _forget(folder: Path | None) -> None:
    """Remove the features that were kept in case of an interruption."""
    if folder is not None:
        shutil.rmtree(features_folder(folder), ignore_errors=True)


def _is_store(images: Any) -> bool:
    """Whether it is a feature store, or the folder of one."""
    if isinstance(images, str | Path):
        return (Path(images).expanduser() / STORE_MANIFEST).is_file()
    return isinstance(images, FeatureStore)


def _store_name(images: Any) -> str:
    return str(images.folder if isinstance(images, FeatureStore) else images)


def _holds_numbers(images: Any) -> bool:
    """Whether it is an array or a tensor, and not an array of paths or objects."""
    is_array = isinstance(images, np.ndarray) and images.dtype.kind in "biuf"
    return is_array or isinstance(images, torch.Tensor)


def _listed_vectors(images: Any) -> Any:
    """A list of vectors as an array (n, d); anything else as it is."""
    if not isinstance(images, list | tuple) or not images:
        return images
    first = images[0]
    listed = isinstance(first, list | tuple) and all(isinstance(v, int | float) for v in first)
    if not listed and not (_holds_numbers(first) and first.ndim == 1):
        return images
    try:
        return np.stack([np.asarray(vector, dtype=np.float32) for vector in images])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The {type(images).__name__} begins with a vector of {len(first)} numbers, but not "
            "all of its items are such ones; give an array (n, d)."
        ) from error


def _of_images(
    images: ImageDataset,
    entries: list[ImageInGroup],
    pipe: ImageClusteringPipeline,
    summary: GroupsSummary,
) -> Groups:
    """The result for images; warns of those that could not be read."""
    labels = np.full(len(images), -1, dtype=np.int64)
    confidence = np.zeros(len(images), dtype=np.float32)
    kept = [entry["index"] for entry in entries]
    labels[kept] = [entry["cluster"] for entry in entries]
    confidence[kept] = [entry["score"] for entry in entries]

    broken = pipe.summary["broken"]
    if broken:
        logger.warning(
            "%d of %d images cannot be read and are in no group (label -1), first: %s",
            len(broken),
            len(images),
            one_line(broken[0]["error"]),
        )
    return Groups(
        labels,
        confidence,
        [[kept[place] for place in group] for group in pipe.summary["exemplars"]],
        _proposal_of(pipe.summary),
        pipe.features.numpy(),
        broken,
        pipe.clustering,
        summary,
    )


def _refuse_for_vectors(**settings: Any) -> None:
    """ValueError for a setting that only images have."""
    for name, value in settings.items():
        if value is not None:
            raise ValueError(f"{setting(name, value)}: is for images; vectors (n, d) need none")


def _of_vectors(given: Any, num_clusters: int | None, method: str, seed: int) -> Groups:
    """The groups of vectors (n, d)."""
    if isinstance(given, np.ma.MaskedArray):
        # what is masked is missing
        given = np.ma.filled(given.astype(float), np.nan)
    vectors = torch.as_tensor(given).detach().cpu().float()
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise ValueError(
            f"This {kind_of(given)} holds no vectors: they are (n, d), one row per image; labels "
            "are not asked for."
        )
    check_num_clusters(num_clusters, len(vectors), method, setting("num_clusters"))
    wrong = (~vectors.norm(dim=1).isfinite()).nonzero().flatten().tolist()
    largest = float(vectors.abs().max())
    if largest < _LEAST and torch.as_tensor(given).any():
        raise ValueError(
            f"{len(vectors)} of {len(vectors)} vectors are too short for float32, their largest "
            f"number is {largest:.1e}; multiply all vectors by one number."
        )
    if wrong:
        is_finite = bool(torch.as_tensor(given)[wrong].isfinite().all())
        fault = "are too long for float32" if is_finite else "hold NaN or infinity"
        remedy = "divide all vectors by one number" if is_finite else "leave them out"
        raise ValueError(
            f"{len(wrong)} of {len(vectors)} vectors {fault}, first row {wrong[0]}; {remedy}."
        )

    clustering, why = find_groups(vectors, num_clusters, seed, method)
    exemplars = clustering.exemplars(vectors)
    summary: GroupsSummary = {
        "num_images": len(vectors),
        "sizes": clustering.counts.tolist(),
        "exemplars": exemplars,
        "broken": [],
        "num_clusters": why.num_clusters,
        "interval": why.interval,
        "clear": why.clear,
        "reason": why.reason,
        "evidence": why.evidence,
    }
    summary["note"] = describe_groups(summary).replace(" images in ", " vectors in ", 1)
    return Groups(
        clustering.assignments.numpy(),
        clustering.confidence.numpy(),
        exemplars,
        why,
        vectors.numpy(),
        [],
        clustering,
        summary,
    )


def _proposal_of(summary: Mapping[str, Any]) -> Proposal:
    return Proposal(**{field.name: summary[field.name] for field in fields(Proposal)})
