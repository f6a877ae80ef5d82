"""One encoder on one data set, another beside it, and what changed: scores, errors, verdicts.

    data = open_evaluation_data("my_images/")
    before, after = (
        measure_side(name, encoder, data, Added(["low_shot"]), features=folder, seed=0)
        for name, encoder in encoders.items()
    )
    changes_of(before, after)["knn_accuracy"].verdict

A change is judged by a paired bootstrap where a score is made of one number per image
(`evidence.py`). For mIoU, which is not, the errors of both sides are taken as independent: too wide
an interval rather than too narrow a one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from sklearn.metrics import normalized_mutual_info_score, silhouette_samples

from ..data.classes import with_one_class_table
from ..data.found import NO_OPTIONS, SourceOptions
from ..data.images import (
    Broken,
    ImageDataset,
    evenly_spaced,
    evenly_spaced_places,
    fully_labelled,
    hold_out,
    open_images,
)
from ..data.loading import Loading
from ..evaluation.attentive_probe import attentive_probe
from ..evaluation.cluster_scores import cluster_accuracy, matched
from ..evaluation.evidence import Change, change_between, measure, measure_mean
from ..evaluation.feature_cache import (
    evaluation_columns,
    for_altered_images,
    is_one_store,
    read_rows,
)
from ..evaluation.features import own_columns
from ..evaluation.fine_tuning import FineTuneRecipe, fine_tuning
from ..evaluation.label_free import JUDGED_IMAGES, TwoViews, label_free_scores
from ..evaluation.linear_probe import linear_probe
from ..evaluation.low_shot import low_shot
from ..evaluation.neighbour_agreement import NUM_NEIGHBOURS, global_view, neighbour_agreement
from ..evaluation.patch_segmentation import segmentation_knn, segmentation_logistic
from ..evaluation.report import BANK_SIZE, Evaluation, evaluate_encoder
from ..evaluation.robustness import robustness
from ..evaluation.scores import ProtocolResult, Score, as_metrics
from ..evaluation.segmentation import segmentation_probe
from ..evaluation.segmentation_data import SegmentationDataset, open_segmentation
from ..model.modeling_mim_refiner import MimRefinerModel
from ..publishing.run_file import Metrics
from ..runtime.wording import setting
from .choices import ON_MASKS

# of the images, where no evaluation images are named
HELD_OUT = 0.2
# images per pass: the logits of every pixel are in memory
_SEGMENTATION_BATCH = 64
# at most: a silhouette compares all pairs
_SILHOUETTE_IMAGES = 5000

PROTOCOLS: Mapping[str, Callable[..., ProtocolResult]] = {
    "low_shot": low_shot,
    "linear_probe": linear_probe,
    "linear_probe_fast": partial(linear_probe, augment=False),
    "linear_probe_dinov2": partial(linear_probe, variant="dinov2"),
    "attentive_probe": attentive_probe,
    "robustness": robustness,
    "fine_tuning": fine_tuning,
    "segmentation": segmentation_probe,
    "segmentation_slide": partial(segmentation_probe, inference="slide"),
    "segmentation_knn": segmentation_knn,
    "segmentation_logistic": segmentation_logistic,
}
"""By what `--protocols` can add (`choices.AddedProtocol`), the function."""
# it reads patches, and a store keeps pooled features
_WITHOUT_FEATURES = ("attentive_probe",)


@dataclass(frozen=True)
class Added:
    """What `--protocols` adds to what is always measured.

    Attributes:
        protocols: names of `PROTOCOLS`; on masks those of `ON_MASKS` alone.
        recipe: for "fine_tuning".
        split_files: lists of file names, for "low_shot", or one for "fine_tuning".
    """

    protocols: Sequence[str] = ()
    recipe: FineTuneRecipe | None = None
    split_files: Sequence[Path] = ()


class DataFacts(TypedDict):
    """Which images were learnt from and measured on, told so that someone else can take them."""

    name: str
    config: str | None
    split: str | None
    bank_images: int
    train_images: int
    fingerprint: str
    eval_name: str
    eval_images: int
    eval_fingerprint: str
    num_classes: int


@dataclass(frozen=True)
class Data:
    """Images to learn from and to be measured on, and how they were asked for.

    Attributes:
        train: an `ImageDataset`, of which the k-NN bank is taken, or a `SegmentationDataset`.
        evaluated: of the same kind.
        eval_split: of `evaluated`; empty where a data set was named without one, None where a part
            of `train` is held out.
        broken: images that cannot be read, which are left out of both.
        bank_size: images of `train` in the k-NN bank, evenly spaced; None for all.
    """

    name: str
    config: str | None
    split: str | None
    eval_split: str | None
    train: Any
    evaluated: Any
    broken: Sequence[Broken] = ()
    bank_size: int | None = None

    @property
    def labelled(self) -> bool:
        """Whether every image has a label."""
        return all(
            isinstance(images, ImageDataset) and fully_labelled(images)
            for images in (self.train, self.evaluated)
        )

    @property
    def bank(self) -> ImageDataset:
        """The k-NN bank."""
        images: ImageDataset = self.train
        return images if self.bank_size is None else evenly_spaced(images, self.bank_size)

    @property
    def profile_bank(self) -> ImageDataset:
        """The bank of the table of the blocks, which reads many columns."""
        return evenly_spaced(self.train, self.bank_size or BANK_SIZE)

    def describe(self) -> DataFacts:
        """Which images, for a report."""
        if isinstance(self.train, SegmentationDataset):
            bank_images = len(self.train)
            num_classes = len(self.evaluated.class_names)
        else:
            bank_images = len(self.bank)
            num_classes = self.evaluated.num_classes

        return {
            "name": self.name,
            "config": self.config,
            "split": self.split,
            "bank_images": bank_images,
            "train_images": len(self.train),
            "fingerprint": self.train.fingerprint,
            "eval_name": eval_words(self.evaluated.name, self.eval_split),
            "eval_images": len(self.evaluated),
            "eval_fingerprint": self.evaluated.fingerprint,
            "num_classes": num_classes,
        }


@dataclass(frozen=True)
class Side:
    """One model of a comparison.

    Attributes:
        metrics: every number, as `metrics.json` holds it.
        measured: the scores whose change can be judged.
        extra: the results of the added protocols.
        evaluation: by k-NN and clustering; None on masks.
    """

    name: str
    metrics: Metrics
    measured: dict[str, Score] = field(repr=False)
    extra: dict[str, ProtocolResult]
    evaluation: Evaluation | None = field(default=None, repr=False)


def eval_words(name: str, eval_split: str | None) -> str:
    """What was measured on, in words; `eval_split` as of `Data`."""
    if eval_split is None:
        return f"{name} (held out)"
    return f"{name} ({eval_split})" if eval_split else name


# --- data -----------------------------------------------------------------------------------------


def open_evaluation_data(
    dataset: Any,
    *,
    config: str | None = None,
    split: str | None = None,
    eval_dataset: Any = None,
    eval_split: str | None = None,
    num_channels: int = 3,
    seed: int = 0,
    masks: bool = False,
    bank_size: int | None = None,
    options: SourceOptions = NO_OPTIONS,
) -> Data:
    """Images to learn from and to be measured on.

    A fifth is held out where neither data set nor split is named for the latter.

    Raises:
        ValueError: when both are the same images, and, with `masks`, when none are named; otherwise
            as `open_images`.
    """
    named = eval_dataset is not None or eval_split is not None
    other = dataset if eval_dataset is None else eval_dataset
    # a configuration belongs to its data set
    other_config = config if eval_dataset is None else None
    train: Any
    evaluated: Any
    is_named = isinstance(dataset, str | Path)
    if masks:
        if not is_named or not isinstance(other, str | Path):
            raise ValueError(
                f"{setting('protocols')} on masks: they are read from a data set that is "
                "named; give its folder, file or name"
            )
        if not named:
            raise ValueError(
                f"{setting('protocols')} on masks: name the images to measure on, with "
                f"{setting('eval_split')} or {setting('eval_dataset')}"
            )
        train = open_segmentation(str(dataset), config=config, split=split)
        evaluated = open_segmentation(str(other), config=other_config, split=eval_split)
    else:
        train = open_images(
            dataset, config=config, split=split, num_channels=num_channels, options=options
        )
        if not named:
            rest, held_out = with_one_class_table(*hold_out(train, HELD_OUT, seed))
            name = str(dataset) if is_named else train.name
            return Data(name, config, split, None, rest, held_out, bank_size=bank_size)
        evaluated = open_images(
            other,
            config=other_config,
            split=eval_split,
            num_channels=num_channels,
            options=options if eval_dataset is None else options.of_another_data_set(),
        )

    if evaluated.fingerprint == train.fingerprint:
        asked = setting("eval_dataset", eval_dataset)
        if eval_split is not None:
            asked = setting("eval_split", eval_split)
        raise ValueError(
            f"{asked}: these are the images of the k-NN bank; name others, or leave it out"
        )
    if not masks:
        train, evaluated = with_one_class_table(train, evaluated)
    name = str(dataset) if is_named else train.name
    return Data(name, config, split, eval_split or "", train, evaluated, bank_size=bank_size)


def readable_images(
    encoders: Mapping[str, MimRefinerModel],
    images: ImageDataset,
    features: Path,
    loading: Loading,
    *,
    per_block: bool = True,
) -> tuple[ImageDataset, list[Broken]]:
    """Those of the images that can be read, and the others.

    Afterwards the store has the features of all encoders that the protocols need, of all blocks or
    of the last ones.
    """
    broken: list[Broken] = []
    for encoder in encoders.values():
        processor = vars(encoder)["image_processor"]
        columns = evaluation_columns(encoder.config, per_block=per_block)
        if is_one_store(features):
            # nothing is added to it, and a protocol says what it lacks
            columns = own_columns(encoder.config)
        rows = read_rows(encoder, images, processor, columns, features=features, loading=loading)
        images = rows.images
        broken += rows.broken
    return images, broken


# --- one side -------------------------------------------------------------------------------------


def measure_side(
    name: str,
    encoder: MimRefinerModel,
    data: Data,
    added: Added,
    *,
    seed: int,
    features: Path,
    loading: Loading = Loading(),
) -> Side:
    """Every measurement of one encoder.

    Args:
        data: readable images.
        seed: of everything random.
        features: see `read_rows`.
        loading: as in `extract_features`.
    """
    evaluation = None
    measured: dict[str, Score] = {}
    metrics: dict[str, Any] = {}
    if isinstance(data.train, ImageDataset):
        evaluation = evaluate_encoder(
            encoder,
            vars(encoder)["image_processor"],
            data.train,
            data.evaluated,
            seed=seed,
            loading=loading,
            grid=data.labelled,
            bank_size=data.bank_size,
            features=features,
        )
        if data.labelled:
            measured = errors_of(evaluation)
        else:
            measured = label_free(encoder, data.evaluated, evaluation, seed, features, loading)
        metrics = as_metrics(measured) | evaluation.metrics

    extra: dict[str, ProtocolResult] = {}
    for protocol in added.protocols:
        run = partial(PROTOCOLS[protocol], seed=seed, loading=loading)
        if protocol == "fine_tuning":
            split_file = next(iter(added.split_files), None)
            run = partial(run, recipe=added.recipe, split_file=split_file)
        elif protocol in ON_MASKS:
            run = partial(run, loading=replace(loading, batch_size=_SEGMENTATION_BATCH))
        elif protocol not in _WITHOUT_FEATURES:
            run = partial(run, features=features)
        if protocol == "low_shot":
            run = partial(run, split_files=added.split_files)
        elif protocol == "robustness":
            run = partial(run, bank_size=data.bank_size)
        processor = vars(encoder)["image_processor"]
        result = run(encoder, processor, data.train, data.evaluated)

        extra[protocol] = result
        metrics |= result.metrics
        for score_name, score in result.scores.items():
            measured[score_name] = score
            if score.per_image is not None:
                measured[score_name] = measure_mean(score.per_image, spread=score.spread)
    return Side(name, metrics, measured, extra, evaluation)


def errors_of(evaluation: Evaluation) -> dict[str, Score]:
    """k-NN accuracy, cluster accuracy and NMI with their errors over images.

    Those of the latter two are also over the runs of k-means.
    """
    assert evaluation.predicted is not None and evaluation.features.labels is not None
    labels = evaluation.features.labels.numpy()
    groups = evaluation.assignments
    runs = evaluation.groups.all_assignments
    accuracies = [cluster_accuracy(labels, run) for run in runs]
    nmis = [normalized_mutual_info_score(labels, run) for run in runs]

    def nmi(rows: Any) -> float:
        return float(normalized_mutual_info_score(labels[rows], groups[rows]))

    return {
        "knn_accuracy": measure_mean(evaluation.predicted.numpy() == labels),
        "cluster_accuracy": measure_mean(matched(labels, groups), spread=float(np.std(accuracies))),
        "nmi": measure(nmi, len(labels), spread=float(np.std(nmis))),
    }


def label_free(
    encoder: MimRefinerModel,
    images: ImageDataset,
    evaluation: Evaluation,
    seed: int,
    features: Path,
    loading: Loading,
) -> dict[str, Score]:
    """What can be said without labels, with errors over images.

    Of the last block, `separation`, `retrieval` and `cluster_stability` by distorted copies of at
    most 2000 images (label_free.py), as in the verdict on a run; `neighbour_agreement` (see the
    file of that name); and `silhouette` (-1 to 1) of the groups of `evaluation` among at most 5000
    images. A silhouette says how separate the groups are in each model's own space, not how good
    the groups are.
    """
    last = evaluation.features.features
    column = own_columns(encoder.config)[-1]
    view = global_view(vars(encoder)["image_processor"], encoder.config.image_hw[0], 0.5, seed)
    folder = for_altered_images(features)
    seen = read_rows(encoder, images, view, [column], features=folder, loading=loading)
    copies = seen.column(column)

    judging = evenly_spaced_places(len(images), JUDGED_IMAGES)
    views = TwoViews(last[judging], copies[judging])
    measured = dict(label_free_scores(views, seed=seed).scores)
    if len(images) > NUM_NEIGHBOURS:
        measured["neighbour_agreement"] = measure_mean(neighbour_agreement(last, copies).numpy())

    count = min(len(images), _SILHOUETTE_IMAGES)
    rows = np.linspace(0, len(images) - 1, count).astype(int)
    groups = evaluation.assignments[rows]
    if 1 < len(np.unique(groups)) < len(groups):
        separate = silhouette_samples(last.numpy()[rows], groups, metric="cosine")
        measured["silhouette"] = measure_mean(separate)
    return measured


# --- two sides ------------------------------------------------------------------------------------


def changes_of(before: Side, after: Side) -> dict[str, Change]:
    """The change of every score that was measured on both sides.

    Silhouettes live in two spaces and are not compared.
    """
    changes = {}
    for name, score in after.measured.items():
        if name in before.measured and name != "silhouette":
            changes[name] = change_between(before.measured[name], score)
    return changes
