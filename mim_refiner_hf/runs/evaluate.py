"""`evaluate`: how good an encoder is, and whether it got better than another: scores and errors.

    mim-refiner evaluate out/model --dataset photos/ --against facebook/vit-mae-large
    mim-refiner evaluate out/model --dataset photos/ --features features/ --protocols low_shot
    mim-refiner evaluate out/model --dataset photos/ --transfer other_images/ more_images/
    mim-refiner evaluate out/model --dataset photos/ --protocols fine_tuning --recipe short.yaml
    mim-refiner evaluate out/model --dataset camvid/ --eval_split test --protocols segmentation

    report = evaluate("out/model", "photos/", against="facebook/vit-mae-large", output_dir=folder)

k-NN for many k, clustering, RankMe and the block profile are always measured; without labels
RankMe, the agreement of neighbours under augmentation, and how separate the groups are. `protocols`
adds slower ones, `transfer` the same encoder on other data. No image is encoded twice: features go
through a feature store, which vanishes at the end or stays in `features` for the next command.
Under `accelerate launch training/evaluate.py` the processes share encoding, k-NN and fine-tuning;
the first one writes.

The folder gets `metrics.json`, `report.md` and pictures (report_folder.py); it appears whole or not
at all.
"""

import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..conversion import load_encoder
from ..data.images import ImageDataset
from ..data.loading import Loading
from ..evaluation import evidence
from ..evaluation.feature_cache import check_features
from ..evaluation.fine_tuning import FineTuneRecipe
from ..evaluation.manifest import weights_fingerprint
from ..evaluation.neighbour_agreement import NUM_NEIGHBOURS
from ..evaluation.report import BANK_SIZE
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import gather_objects, rank, wait_for_everyone, world_size
from ..runtime.settings import read_fields
from .comparison import (
    PROTOCOLS,
    Data,
    Side,
    changes_of,
    describe_change,
    measure_side,
    open_evaluation_data,
    readable_images,
)
from .report_folder import check_report_folder, command_line, write_report

_PACKAGES = ("mim_refiner_hf", "torch", "transformers", "datasets", "pillow", "scikit-learn")
_TRANSFER_PROTOCOLS = ("linear_probe_fast",)


def evaluate(
    model: str,
    dataset: str,
    *,
    output_dir: Path,
    against: str | None = None,
    dataset_config: str | None = None,
    split: str | None = None,
    eval_dataset: str | None = None,
    eval_split: str | None = None,
    protocols: Sequence[str] = (),
    recipe: str | None = None,
    transfer: Sequence[str] = (),
    features: Path | None = None,
    seed: int = 0,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Measure an encoder, and a second one beside it, and write the evidence.

    Args:
        model, against: anything `load_encoder` takes; `against` is the one to be better than.
        dataset, dataset_config, split: images of the k-NN bank, as `open_images` takes them.
        eval_dataset, eval_split: what is classified and clustered; neither: a fifth of `dataset` is
            held out.
        protocols: names of `PROTOCOLS`; "segmentation", which needs masks in place of labels,
            stands alone.
        recipe: of "fine_tuning": a name in training/recipes/ or the path of a YAML file; None for
            the fields' defaults.
        transfer: other data sets, opened with the same splits: k-NN, clustering and the fast linear
            probe on each.
        features: a folder that keeps the features for the next command, or a store made by
            `mim-refiner embed`; None to keep none.
        seed: of k-means, the held-out part and the protocols.
        output_dir: folder of the result; an earlier result in it is replaced.

    Returns:
        What `metrics.json` holds: `after` (the model), `before` (`against`), `changes` with
        verdicts, how it was measured, and the `broken` images, which are left out.

    Raises:
        ValueError, FileNotFoundError: before any measurement, for wrong input.
    """
    began = time.perf_counter()
    fine_tune = check_protocols(protocols, recipe, transfer, seed)
    check_report_folder(output_dir)
    if features is not None:
        check_features(features)
    encoders = load_encoders(model, against)

    # the first data set and those of the transfer, with the same splits
    opened = partial(
        open_evaluation_data,
        split=split,
        eval_split=eval_split,
        seed=seed,
        num_channels=encoders[model].config.num_channels,
        masks="segmentation" in protocols,
    )
    data = [opened(dataset, config=dataset_config, eval_dataset=eval_dataset)]
    data += [opened(name) for name in transfer]
    check_data(data, protocols)

    sides: list[list[Side]] = []
    with feature_folder(features, output_dir) as folder:
        loading = Loading(num_workers=num_workers, device=device_here())
        data = [without_broken(encoders, each, folder, loading) for each in data]
        for place, each in enumerate(data):
            measured = partial(measure_side, seed=seed, features=folder, loading=loading)
            added = _TRANSFER_PROTOCOLS if place else protocols
            of_models = encoders.items()
            sides.append([measured(*model, each, added, recipe=fine_tune) for model in of_models])

    first, *others = [compared(each, found) for each, found in zip(data, sides, strict=True)]
    report = {
        "model": model,
        "against": against,
        **first,
        "transfer": dict(zip(transfer, others, strict=True)),
        **how_measured(encoders, protocols, seed, began),
    }
    if rank() == 0:
        write_report(output_dir, report, sides[0], data[0])
    return report


def device_here() -> str:
    """Where to compute."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_protocols(
    protocols: Sequence[str], recipe: str | None, transfer: Sequence[str], seed: int
) -> FineTuneRecipe | None:
    """The recipe of "fine_tuning", if that is asked for.

    ValueError for names that do not exist or do not go together.
    """
    unknown = [name for name in protocols if name not in PROTOCOLS]
    if unknown:
        raise ValueError(f"--protocols {unknown[0]}: must be one of {', '.join(PROTOCOLS)}")
    if "segmentation" in protocols and (len(protocols) > 1 or transfer):
        raise ValueError(
            "--protocols segmentation: it needs masks and all else needs labels; give it a command "
            "of its own"
        )
    if recipe is not None and "fine_tuning" not in protocols:
        raise ValueError(f"--recipe {recipe}: it is for fine-tuning; add --protocols fine_tuning")

    if "fine_tuning" not in protocols:
        return None
    named = read_fields(recipe, FineTuneRecipe) if recipe else {}
    return FineTuneRecipe(**{"seed": seed, **named})


def load_encoders(model: str, against: str | None) -> dict[str, MimRefinerModel]:
    """The encoders by name, the one to be better than first.

    ValueError where they do not take the same images.
    """
    if model == against:
        raise ValueError(
            f"--against {against}: this is the model itself; name another one, or leave it out"
        )
    names = [model] if against is None else [against, model]
    encoders = {name: load_encoder(name) for name in names}
    if len({encoder.config.num_channels for encoder in encoders.values()}) > 1:
        raise ValueError(
            f"--against {against}: it has another number of input channels than {model}; they "
            "cannot be compared"
        )
    return encoders


def check_data(data: Sequence[Data], protocols: Sequence[str]) -> None:
    """ValueError for missing labels where a protocol needs them, and for too few images."""
    for place, each in enumerate(data):
        if not isinstance(each.train, ImageDataset):
            continue
        flag = f"--transfer {each.name}" if place else f"--protocols {' '.join(protocols)}"
        if not each.labelled and (place or protocols):
            raise ValueError(
                f"{flag}: needs a label for every image, and {each.name} has images without"
            )
        if each.labelled and len(each.train) < NUM_NEIGHBOURS:
            raise ValueError(
                f"{each.name} has {len(each.train)} images for the k-NN bank, but k-NN looks at "
                f"{NUM_NEIGHBOURS} neighbours; give more"
            )
        if len(each.evaluated) < 2:
            raise ValueError(
                f"{each.name} has {len(each.evaluated)} image to be measured on; errors take at "
                "least 2"
            )


@contextmanager
def feature_folder(features: Path | None, output_dir: Path) -> Iterator[Path]:
    """Where the features go: the folder that was named, or one beside the output that vanishes.

    It is the same for all processes.
    """
    if features is not None:
        yield features
        return
    beside = output_dir.resolve().parent
    beside.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = None
        if rank() == 0:
            temporary = tempfile.TemporaryDirectory(prefix=".features-", dir=beside)
            folder = stack.enter_context(temporary)
        yield Path(gather_objects(folder)[0])
        wait_for_everyone()  # nobody reads it any more


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

    _, more = readable_images(encoders, data.bank, features, loading)
    train = data.train
    if more:
        lost = [image["index"] for image in more]
        train = train.subset(np.flatnonzero(~np.isin(train.indices, lost)))
    return replace(data, train=train, evaluated=evaluated, broken=[*broken, *more])


def compared(data: Data, sides: Sequence[Side]) -> dict[str, Any]:
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
        "changes": {name: describe_change(change) for name, change in changes.items()},
    }


def how_measured(
    encoders: Mapping[str, MimRefinerModel], protocols: Sequence[str], seed: int, began: float
) -> dict[str, Any]:
    """Everything needed to get the same numbers again."""
    hardware = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    hardware = f"{hardware}, {torch.get_num_threads()} in use"
    if device_here() == "cuda":
        hardware = torch.cuda.get_device_name()
    if world_size() > 1:
        hardware = f"{world_size()} x {hardware}"
    return {
        "fingerprints": {name: weights_fingerprint(encoder) for name, encoder in encoders.items()},
        "protocol": {
            "bank": f"at most {BANK_SIZE} images, evenly spaced",
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


__all__ = ["PROTOCOLS", "evaluate"]
