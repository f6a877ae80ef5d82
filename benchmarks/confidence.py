"""Does the confidence of a group mean what it says? Expected calibration error on five image sets.

    python -m benchmarks.confidence ../shared/data [--work outputs/confidence]

Embeds up to 1000 images of each set with a small MAE, and a slightly altered copy of each (a crop
of 80 to 100 % of the area); features and finished lines stay in --work. Then it groups them by
three seeds, and asks how many images of a confidence stay in their group in second clusterings that
had no part in the fit: eight by other seeds, eight of bootstrap resamples, eight of the altered
copies. Groups are matched by the Hungarian method. Writes the table of
benchmarks/results/confidence.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from mim_refiner_hf import load_encoder
from mim_refiner_hf.clustering import Clustering, kmeans, propose_num_clusters, train_heads
from mim_refiner_hf.clustering.prototype_heads import best_match
from mim_refiner_hf.data.images import evenly_spaced, open_images
from mim_refiner_hf.data.views import ViewSpec
from mim_refiner_hf.evaluation import FeatureStore, embed_images
from mim_refiner_hf.evaluation.neighbour_agreement import RandomView

SETS = ("cifar10", "tiny-imagenet-100", "imagenette", "gtsrb", "sign-digits")
MOST = 1000
METHODS: dict[str, Callable[..., Clustering]] = {"kmeans": kmeans, "heads": train_heads}
# of the clusterings that are judged, and of those that judge them
SEEDS = (0, 1, 2)
SECOND_SEEDS = range(1000, 1008)
# fewer for cluster heads, which take 10 to 40 times as long
FEW_SECOND_SEEDS = range(1000, 1004)
BINS = 10
GOAL = 0.05
KINDS = ("another seed", "resample", "altered copy")
RESULTS = Path(__file__).parent / "results" / "confidence.md"
MARK = "<!-- from here on written by benchmarks/confidence.py -->"


def features(model: Any, dataset: Path, folder: Path) -> tuple[Tensor, Tensor, int]:
    """Features (N, D) of the images and of their altered copies, and the number of classes."""
    images = evenly_spaced(open_images(str(dataset), split="train"), MOST)
    side = model.config.image_size
    crop = ViewSpec(side, (0.8, 1.0), blur_p=0.0, solarize_p=0.0, colour=False, flip=0.0)
    altered = RandomView(model.image_processor, crop, seed=0)

    rows = []
    for name, processor in (("plain", model.image_processor), ("altered", altered)):
        if not (folder / name / "broken.json").is_file():
            embed_images(model, images, processor, folder / name)
        store = FeatureStore(folder / name)
        found = store.features(next(iter(store.columns)))
        rows.append(F.normalize(found, dim=1))
    return rows[0], rows[1], images.num_classes


def seconds_of(
    method: str, rows: Tensor, altered: Tensor, number: int, seeds: Sequence[int]
) -> dict[str, list[Tensor]]:
    """The groups (N,) of the images in second clusterings of every kind."""
    group = METHODS[method]
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for seed in seeds:
        found[KINDS[0]].append(group(rows, number, seed=seed, refits=0).assignments)

        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(rows), (len(rows),), generator=generator)
        # two copies of a row would be each other's neighbours
        if method == "heads":
            picks = picks.unique()
        found[KINDS[1]].append(group(rows[picks], number, seed=seed, refits=0).assign(rows)[0])

        found[KINDS[2]].append(group(altered, number, seed=seed, refits=0).assignments)
    return found


def stay(first: Tensor, second: Tensor, number: int) -> Tensor:
    """Whether each row (N,) stays in its group, groups matched by the Hungarian method."""
    table = torch.zeros(number, number)
    table.index_put_((first, second), torch.ones(len(first)), accumulate=True)
    return (best_match(table)[first] == second).float()


def calibration_error(confidence: Tensor, shares: Tensor) -> float:
    """Expected calibration error (Guo et al. 2017) in `BINS` bins of equal width."""
    places = (confidence * BINS).long().clamp(max=BINS - 1)
    error = 0.0
    for place in places.unique():
        here = places == place
        gap = abs(float(confidence[here].mean() - shares[here].mean()))
        error += float(here.float().mean()) * gap
    return error


@dataclass(frozen=True)
class Judged:
    """What one clustering showed.

    Attributes:
        posterior, confidence: medians before and after the calibration.
        error_before: calibration error of the posterior against another seed.
        agreement, error: by kind of second clustering.
        ratio: time with second clusterings over that without.
    """

    posterior: float
    confidence: float
    error_before: float
    agreement: dict[str, float]
    error: dict[str, float]
    ratio: float


def judge(
    method: str, rows: Tensor, number: int, seed: int, seconds: dict[str, list[Tensor]]
) -> Judged:
    """One clustering against all second ones."""
    begin = time.process_time()
    plain = METHODS[method](rows, number, seed=seed, refits=0)
    middle = time.process_time()
    groups = METHODS[method](rows, number, seed=seed)
    end = time.process_time()

    shares = {}
    for kind, found in seconds.items():
        stays = [stay(groups.assignments, second, number) for second in found]
        shares[kind] = torch.stack(stays).mean(0)
    return Judged(
        float(plain.confidence.median()),
        float(groups.confidence.median()),
        calibration_error(plain.confidence, shares[KINDS[0]]),
        {kind: float(share.mean()) for kind, share in shares.items()},
        {kind: calibration_error(groups.confidence, share) for kind, share in shares.items()},
        (end - middle) / max(middle - begin, 1e-9),
    )


def cell(name: str, method: str, rows: Tensor, altered: Tensor, number: int) -> str:
    """One line of the table."""
    second_seeds = SECOND_SEEDS if method == "kmeans" else FEW_SECOND_SEEDS
    seeds = SEEDS if method == "kmeans" else SEEDS[:1]
    seconds = seconds_of(method, rows, altered, number, second_seeds)
    runs = [judge(method, rows, number, seed, seconds) for seed in seeds]

    def mean(pick: Callable[[Judged], float]) -> float:
        return statistics.mean(pick(run) for run in runs)

    cells = [f"{name}, {method}", str(number)]
    cells.append(f"{mean(lambda run: run.posterior):.2f}")
    cells.append(f"{mean(lambda run: run.error_before):.3f}")
    cells.append(f"{mean(lambda run: run.confidence):.2f}")
    for kind in KINDS:
        error = statistics.mean(run.error[kind] for run in runs)
        shown = f"{error:.3f}" if error <= GOAL else f"**{error:.3f}**"
        share = statistics.mean(run.agreement[kind] for run in runs)
        cells.append(f"{share:.2f}")
        cells.append(shown)
    cells.append(f"{mean(lambda run: run.ratio):.1f}")
    return f"| {' | '.join(cells)} |"


def main(options: argparse.Namespace) -> None:
    """Measure every set and write the table."""
    torch.set_num_threads(1)
    disable_progress_bar()
    model = load_encoder(str(options.model))
    lines = []
    for name in SETS:
        rows, altered, classes = features(model, options.data / name, options.work / name)
        proposal = propose_num_clusters(rows).num_clusters
        numbers = sorted({classes, 20} | ({proposal} if proposal else set()))
        cells = [("kmeans", number) for number in numbers] + [("heads", classes)]
        for method, number in cells:
            file = options.work / f"{name}-{method}-{number}.txt"
            if not file.is_file():
                file.write_text(cell(name, method, rows, altered, number), encoding="utf-8")
            lines.append(file.read_text(encoding="utf-8"))
            print(lines[-1], flush=True)

    head = "| images | groups | posterior | its error | confidence |"
    rule = "|---|---:|---:|---:|---:|"
    for kind in KINDS:
        head += f" {kind}: stay | error |"
        rule += "---:|---:|"
    table = [f"{head} time |", f"{rule}---:|", *lines]
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else "# Confidence\n\n"
    kept = text.partition(MARK)[0]
    RESULTS.write_text("\n".join([kept + MARK, "", *table, ""]), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the data sets (parquet)")
    parser.add_argument(
        "--model", type=Path, default=Path("../shared/models/mae-tiny-cifar10"), help="the encoder"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/confidence"), help="where the features stay"
    )
    main(parser.parse_args())
