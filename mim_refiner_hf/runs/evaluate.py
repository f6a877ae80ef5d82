"""`evaluate`: how good an encoder is, and whether it got better than another: scores and errors.

    mim-refiner evaluate out/model --dataset photos/ --against facebook/vit-mae-large
    mim-refiner evaluate out/model --dataset photos/ --features features/ --protocols low_shot
    mim-refiner evaluate out/model --dataset photos/ --transfer other_images/ more_images/
    mim-refiner evaluate out/model --dataset photos/ --protocols fine_tuning --recipe short.yaml
    mim-refiner evaluate out/model --dataset camvid/ --eval_split test --protocols segmentation

    report = evaluate("out/model", "photos/", against="facebook/vit-mae-large")
    report = evaluate(result.encoder, images, against=encoder, output_dir="out/evaluation")
    print(report), report["after"]["rankme"], report["changes"]

k-NN for many k, clustering, RankMe and the block profile are always measured; without labels
RankMe, separation d', retrieval and stability under distortion as in the verdict on a run, the
agreement of neighbours under augmentation, and how separate the groups are. `protocols`
adds slower ones, `transfer` the same encoder on other data. No image is encoded twice: features go
through a feature store, which vanishes at the end or stays in `features` for the next command.
Under `accelerate launch training/evaluate.py` the processes share encoding, k-NN and fine-tuning;
the first one writes.

The folder, if one is named, gets `metrics.json`, `report.md` and pictures (report_folder.py); it
appears whole or not at all.
"""

import importlib.metadata
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch

from ..clustering.channels import is_picture
from ..conversion import load_encoder
from ..conversion.channels import extend_channels
from ..data.found import SourceOptions
from ..data.images import Broken, ImageDataset
from ..data.loading import Loading
from ..evaluation import evidence
from ..evaluation.evidence import JudgedChange
from ..evaluation.feature_cache import check_features, evaluation_columns, is_one_store
from ..evaluation.manifest import weights_fingerprint
from ..evaluation.neighbour_agreement import NUM_NEIGHBOURS
from ..evaluation.shard_files import read_manifest
from ..evaluation.tables import report_table
from ..model.modeling_mim_refiner import MimRefinerModel
from ..publishing.run_file import Metrics
from ..runtime.distributed import gather_objects, rank, wait_for_everyone, world_size
from ..runtime.files import check_apart
from ..runtime.lock import scratch_folder
from ..runtime.precision import Precision
from ..runtime.wording import setting
from .choices import ON_MASKS, Protocol
from .comparison import (
    Added,
    Data,
    DataFacts,
    Side,
    changes_of,
    measure_side,
    open_evaluation_data,
    readable_images,
)
from .embed import check_dtype, device_here, in_precision
from .protocol import (
    added_protocols,
    bank_words,
    check_added,
    checked_bank_size,
    shown_as_in_the_paper,
    words_of_images,
)
from .report_folder import check_report_folder, command_line, write_report

logger = logging.getLogger(__name__)

_PACKAGES = ("mim_refiner_hf", "torch", "transformers", "datasets", "pillow", "scikit-learn")
# protocols whose corruptions, augmentations or masks are those of pictures
_OF_PICTURES = ("robustness", "fine_tuning", *ON_MASKS)
# what other data is measured by
_OF_TRANSFER = Added(("linear_probe_fast",))


class Report(dict[str, Any]):
    """What `metrics.json` holds; printed, it is the table of scores."""

    def __str__(self) -> str:
        return report_table(self)

    def __repr__(self) -> str:
        return f"<Report of {self['model']}: {', '.join(self)}>"


def evaluate(
    model: Any,
    images: Any,
    *,
    output_dir: str | Path | None = None,
    against: Any = None,
    dataset_config: str | None = None,
    split: str | None = None,
    eval_dataset: Any = None,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    follow_links: bool = False,
    protocol: Protocol | None = None,
    bank_size: int | None = None,
    protocols: Sequence[str] = (),
    recipe: str | None = None,
    split_file: Sequence[str | Path] = (),
    transfer: Sequence[Any] = (),
    features: str | Path | None = None,
    seed: int = 0,
    dtype: Precision | None = None,
    num_workers: int = 0,
) -> Report:
    """Measure an encoder, and a second one beside it, and write the evidence.

    Args:
        model, against: anything `load_encoder` takes; `against` is the one to be better than.
        images, dataset_config, split, image_column, label_column, follow_links: images of the k-NN
            bank, as `open_images` takes them.
        eval_dataset, eval_split: what is classified and clustered; neither: a fifth of `images` is
            held out.
        protocol: "paper": images as in the paper, the shorter side at 8/7 of the crop (256, then
            224), whatever the model's preprocessing says; "quick": a bank of 10 000 images. None:
            images as the model's preprocessing says, and the whole bank.
        bank_size: so many evenly spaced images are the k-NN bank; None for all of them.
        protocols: names of `PROTOCOLS`; those of `ON_MASKS`, which need masks in place of labels,
            stand alone.
        recipe: of "fine_tuning": name in training/recipes/ or path of a YAML file; None: defaults.
        split_file: lists of file names: the splits of "low_shot", or the one list of images that
            "fine_tuning" trains on; none: they are drawn from the seed.
        transfer: other data sets, opened with the same splits: k-NN, clustering and the fast linear
            probe on each.
        features: a folder that keeps the features for the next command, or a store made by
            `mim-refiner embed`; None to keep none.
        seed: of k-means, the held-out part and the protocols.
        dtype: of the computation of features, as of `embed`, for both models.
        output_dir: folder of the result, None for none; an earlier result in it is replaced.

    Returns:
        What `metrics.json` holds: `after` (the model), `before` (`against`), `changes` with
        verdicts, how it was measured, and the `broken` images, which are left out.

    Raises:
        ValueError, FileNotFoundError: before any measurement, for wrong input.
    """
    began = time.perf_counter()
    loading = Loading(num_workers=num_workers, device=device_here())
    check_dtype(dtype, loading)
    added = added_protocols(protocols, recipe, split_file, transfer, seed, dtype)
    bank_size = checked_bank_size(protocol, bank_size, protocols)
    output_dir, features = checked_folders(output_dir, features, [images, eval_dataset, *transfer])
    encoders = load_encoders(model, against, protocol)
    *others, name_of_model = encoders
    channels = checked_channels(encoders[name_of_model], protocols)
    opened = partial(open_evaluation_data, split=split, eval_split=eval_split, seed=seed)
    opened = partial(opened, num_channels=channels, bank_size=bank_size)
    opened = partial(opened, masks=any(name in ON_MASKS for name in protocols))
    own = {"config": dataset_config, "eval_dataset": eval_dataset}
    data = [opened(images, options=SourceOptions(image_column, label_column, follow_links), **own)]
    data += [opened(name) for name in transfer]
    check_data(data, added)
    check_added(encoders.values(), data[0], added)
    given, encoders = encoders, as_asked(encoders, dtype, data[0], features, loading)
    with feature_folder(features, output_dir) as folder:
        data = [without_broken(encoders, each, folder, loading) for each in data]
        measured = partial(measure_side, seed=seed, features=folder, loading=loading)
        sides = [[measured(*m, data[0], added) for m in encoders.items()]]
        for other in data[1:]:
            sides.append([measured(*m, other, _OF_TRANSFER) for m in encoders.items()])

    first, *more = map(compared, data, sides)
    report = Report(
        model=name_of_model,
        against=next(iter(others), None),
        **first,
        transfer={each.name: part for each, part in zip(data[1:], more, strict=True)},
        **how_measured(given, protocols, bank_size, seed, began, dtype),
    )
    if rank() == 0 and output_dir is not None:
        write_report(output_dir, report, sides[0], data[0])
    return report


def checked_folders(
    output_dir: str | Path | None, features: str | Path | None, images: Sequence[Any]
) -> tuple[Path | None, Path | None]:
    """The folders as paths.

    Raises:
        ValueError: for one that holds something else, and for a report among the images, whose
            pictures would be some of the next measurement's.
    """
    report = None if output_dir is None else Path(output_dir)
    if report is not None:
        check_report_folder(report)
        for source in images:
            check_apart(report, source)
    kept = None if features is None else Path(features)
    if kept is not None:
        check_features(kept)
    return report, kept


def load_encoders(
    model: Any, against: Any, protocol: Protocol | None = None
) -> dict[str, MimRefinerModel]:
    """The encoders by name, the one to be better than first; with "paper", as that shows images.

    ValueError where they do not take the same images.
    """
    if model is against or (isinstance(model, str | Path) and model == against):
        raise ValueError(
            f"{setting('against', against)}: this is the model itself; name another one, or "
            "leave it out"
        )
    encoders: dict[str, MimRefinerModel] = {}
    for source in (against, model):
        if source is not None:
            encoder = load_encoder(source)
            name = name_of(source, encoder)
            # a refined encoder object goes on bearing the name of its start
            encoders[f"{name} (2)" if name in encoders else name] = encoder
    count = encoder.config.num_channels
    for name, other in encoders.items():
        # the start of a refined model, extended in the same way
        if other.config.num_channels != count and not is_picture(count):
            encoders[name] = extend_channels(other, count)
            vars(encoders[name])["image_processor"] = vars(encoder)["image_processor"]
            logger.warning("%s: its filters are extended to %d channels", name, count)
    if len({encoder.config.num_channels for encoder in encoders.values()}) > 1:
        raise ValueError(
            f"{setting('against', against)}: it has another number of input channels than the "
            "model; they cannot be compared"
        )
    if protocol == "paper":
        return {name: shown_as_in_the_paper(each) for name, each in encoders.items()}
    return encoders


def as_asked(
    encoders: dict[str, MimRefinerModel],
    dtype: Precision | None,
    data: Data,
    features: Path | None,
    loading: Loading,
) -> dict[str, MimRefinerModel]:
    """The encoders in the numbers asked for; arguments and errors as of `in_precision`."""
    if dtype is None:
        return encoders
    begun = None
    if features is not None and is_one_store(features):
        begun = read_manifest(features)
    made = {}
    for name, encoder in encoders.items():
        columns = evaluation_columns(encoder.config)
        made[name] = in_precision(encoder, data.train, dtype, columns, loading, begun)
    return made


def checked_channels(encoder: MimRefinerModel, protocols: Sequence[str]) -> int:
    """How many channels a model reads.

    ValueError for a protocol that alters pictures, of a model of other channels.
    """
    count = encoder.config.num_channels
    for protocol in protocols:
        if protocol in _OF_PICTURES and not is_picture(count):
            raise ValueError(
                f"{setting('protocols', protocol)}: is for images of 3 channels or 1, and the "
                f"model reads {count}; leave it out"
            )
    return count


def name_of(source: Any, encoder: MimRefinerModel) -> str:
    """What an encoder is called: as it was named, or by the name that the object was loaded by."""
    if isinstance(source, str | Path):
        return str(source)
    return encoder.config.name_or_path or type(source).__name__


def check_data(data: Sequence[Data], added: Added) -> None:
    """ValueError for missing labels where a protocol needs them, and for too few images."""
    for place, images in enumerate(data):
        if not isinstance(images.train, ImageDataset):
            continue
        name = images.name
        count = len(images.train)
        asked = setting("protocols", list(added.protocols))
        if place:
            asked = setting("transfer", name)

        if not images.labelled and (place or added.protocols):
            lacking = name if images.train.labels is None else images.evaluated.name
            raise ValueError(
                f"{asked}: needs a label for every image, and {lacking} has images without"
            )
        if images.labelled and count < NUM_NEIGHBOURS:
            raise ValueError(
                f"{name} has {count} images for the k-NN bank, but k-NN looks at "
                f"{NUM_NEIGHBOURS} neighbours; give more"
            )
        count = len(images.evaluated)
        if count < 2:
            raise ValueError(f"{name} has {count} image to be measured on; errors take at least 2")


@contextmanager
def feature_folder(features: Path | None, output_dir: Path | None) -> Iterator[Path]:
    """Where the features go: the folder that was named, or one that vanishes, beside the output.

    It is the same for all processes.
    """
    if features is not None:
        yield features
        return
    beside = None
    if output_dir is not None:
        beside = output_dir.resolve().parent
        beside.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = None
        if rank() == 0:
            folder = stack.enter_context(scratch_folder(beside, "features"))
        yield Path(gather_objects(folder)[0])
        # until nobody reads it any more
        wait_for_everyone()


def without_broken(
    encoders: Mapping[str, MimRefinerModel], data: Data, features: Path, loading: Loading
) -> Data:
    """The data without the images that cannot be read: both sides see the same ones."""
    if not isinstance(data.train, ImageDataset):
        return data
    evaluated, broken = readable_images(encoders, data.evaluated, features, loading)
    # without labels nothing is learnt from, or compared with, other images
    if not data.labelled:
        return replace(data, evaluated=evaluated, broken=broken)

    _, more = readable_images(encoders, data.profile_bank, features, loading)
    if len(data.bank) > len(data.profile_bank):
        # the blocks before the last ones are not needed of all
        _, more = readable_images(encoders, data.bank, features, loading, per_block=False)
    train = data.train
    if more:
        lost = [image["index"] for image in more]
        train = train.subset(np.flatnonzero(~np.isin(train.indices, lost)))
    return replace(data, train=train, evaluated=evaluated, broken=[*broken, *more])


class Compared(TypedDict):
    """What was measured on one data set: `before` only where two encoders were."""

    dataset: DataFacts
    broken: list[Broken]
    before: Metrics | None
    after: Metrics
    changes: dict[str, JudgedChange]


def compared(data: Data, sides: Sequence[Side]) -> Compared:
    """Which images, those left out, and what was measured on them: the part of a report."""
    before = None
    changes = {}
    if len(sides) == 2:
        before = sides[0].metrics
        changes = changes_of(*sides)
    return {
        "dataset": data.describe(),
        "broken": list(data.broken),
        "before": before,
        "after": sides[-1].metrics,
        "changes": {name: change.as_json() for name, change in changes.items()},
    }


class HowMeasured(TypedDict):
    """Everything needed to get the same numbers again."""

    fingerprints: dict[str, str]
    protocol: dict[str, object]
    seed: int
    command: str
    seconds: float
    versions: dict[str, str]
    hardware: str


def how_measured(
    encoders: Mapping[str, MimRefinerModel],
    protocols: Sequence[str],
    bank_size: int | None,
    seed: int,
    began: float,
    dtype: Precision | None,
) -> HowMeasured:
    """How the encoders were measured, since the time `began`."""
    hardware = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    hardware = f"{hardware}, {torch.get_num_threads()} in use"
    if device_here() == "cuda":
        hardware = torch.cuda.get_device_name()
    if world_size() > 1:
        hardware = f"{world_size()} x {hardware}"

    return {
        "fingerprints": {name: weights_fingerprint(encoder) for name, encoder in encoders.items()},
        "protocol": {
            "images": {name: words_of_images(encoder) for name, encoder in encoders.items()},
            "bank": bank_words(bank_size),
            **({} if dtype is None else {"dtype": dtype}),
            "knn": "last block, standardised by the bank, k = 10, temperature 0.07",
            "clustering": "mini-batch k-means on L2-normalised features, 100 runs, the one with "
            "the lowest inertia",
            "added": list(protocols),
            "errors": f"bootstrap over images, {evidence.RESAMPLES} resamples, paired",
        },
        "seed": seed,
        "command": command_line(),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "hardware": hardware,
    }
