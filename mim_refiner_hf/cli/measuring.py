"""The commands that look at images with a frozen encoder: evaluate, embed."""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from accelerate import Accelerator

from ..conversion.load import load_encoder
from ..data.broken import BROKEN
from ..data.images import open_images, open_stream
from ..data.loading import Loading
from ..evaluation.embed import PRECISIONS, embed_images
from ..evaluation.feature_store import read_manifest
from ..evaluation.features import feature_columns
from ..evaluation.tables import report_table
from ..model.configuration_mim_refiner import Pooling
from ..publishing.model_card import CARD, update_card
from ..runs.evaluate import PROTOCOLS, evaluate
from ..runtime.device import warn_of_emulation
from ..runtime.launch import several_on_the_cpu
from ..runtime.lock import sole_run
from .flags import at_least


def run_evaluate(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mim-refiner evaluate",
        description="How good an encoder is, and whether it got better than another: scores with errors, verdicts, pictures; "
        "under accelerate launch the processes share the work.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", help="Hub name, model folder, checkpoint file, or a name of the zoo"
    )
    parser.add_argument(
        "--dataset",
        required=True,
        help="image folder, parquet, Hub name, or 'digits': the k-NN bank",
    )
    parser.add_argument("--dataset_config", help="configuration of a Hub data set")
    parser.add_argument("--split", help="split for the k-NN bank")
    parser.add_argument(
        "--eval_dataset", help="images to evaluate on, if they are another data set"
    )
    parser.add_argument(
        "--eval_split", help="split to evaluate on; neither: a fifth of the images is held out"
    )
    parser.add_argument("--against", help="the model to compare with, such as the starting weights")
    parser.add_argument(
        "--protocols", nargs="+", default=[], choices=PROTOCOLS, help="slower protocols to add"
    )
    parser.add_argument(
        "--recipe",
        help="of fine_tuning: name in training/recipes/ (fine-tune-...) or path of a YAML file",
    )
    parser.add_argument(
        "--transfer",
        nargs="+",
        default=[],
        metavar="DATASET",
        help="other data to measure the models on too",
    )
    kept = "folder that keeps the features for the next command, or one that 'mim-refiner embed' made; default: none are kept"
    parser.add_argument("--features", type=Path, help=kept)
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        help="of k-means, the held-out part and the protocols",
    )
    parser.add_argument("--num_workers", type=at_least(0), default=2, help="data-loading workers")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/evaluation"),
        help="folder for numbers and pictures",
    )
    options = vars(parser.parse_args(arguments))
    accelerator = Accelerator(cpu=several_on_the_cpu())
    with sole_run(options["output_dir"], "--output_dir", beside=True):
        report = evaluate(options.pop("model"), options.pop("dataset"), **options)
    if not accelerator.is_main_process:
        return
    print(report_table(report))
    print(f"The report: {options['output_dir']}/report.md")
    if (Path(report["model"]) / CARD).is_file():
        print(f"The card: {update_card(Path(report['model']), report)}")


def _place(word: str) -> int | Literal["output"]:
    if word == "output":
        return "output"
    if not word.removeprefix("-").isdigit():
        raise argparse.ArgumentTypeError(f"{word!r} is neither the number of a block nor 'output'")
    return int(word)


def run_embed(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mim-refiner embed",
        description="Features of every image, once, as parquet shards: the same command resumes; under accelerate launch, shared.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        help="model folder, Hub name, original checkpoint, or a name of the zoo (model_cards/)",
    )
    parser.add_argument(
        "--dataset",
        required=True,
        help="image folder, parquet, tar shards, Hub name, or 'digits' (bundled)",
    )
    parser.add_argument("--dataset_config", help="configuration of a Hub data set")
    parser.add_argument("--split", help="split of the data set; default: train")
    parser.add_argument(
        "--streaming",
        action="store_true",
        help="read the images in passing, without a download first",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for the features; one that was begun is continued",
    )
    where = "raw outputs of these blocks, counted from 0; 'output': after the final norm; default: the last block"
    parser.add_argument("--blocks", nargs="+", type=_place, default=[], metavar="BLOCK", help=where)
    poolings = get_args(Pooling)
    parser.add_argument(
        "--pooling",
        nargs="+",
        choices=poolings,
        default=[],
        help="default: what the model's configuration says",
    )
    parser.add_argument("--last4", action="store_true", help="also the last 4 blocks side by side")
    parser.add_argument(
        "--dtype", choices=PRECISIONS, default="fp32", help="of the computation; float32 is stored"
    )
    parser.add_argument(
        "--batch_size", type=int, default=256, help="images per forward pass and process"
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        help="processes that decode images; default: one per core, at most 16",
    )
    parser.add_argument(
        "--shard_size", type=int, help="images per file; default: 8192, or what the folder has"
    )
    options = parser.parse_args(arguments)
    read_manifest(options.out)  # says so now if it is something else
    accelerator = Accelerator(cpu=several_on_the_cpu())
    if options.dtype == "bf16" and accelerator.is_main_process:
        warn_of_emulation("--dtype bf16", accelerator.device.type)
    encoder: Any = load_encoder(options.model)
    encoder.to(PRECISIONS[options.dtype])
    opened = open_stream if options.streaming else open_images
    channels = encoder.config.num_channels
    images = opened(
        options.dataset, config=options.dataset_config, split=options.split, num_channels=channels
    )
    workers = options.num_workers
    if workers is None:
        workers = min(16, (os.cpu_count() or 1) // accelerator.num_processes)
    store = embed_images(
        encoder,
        images,
        encoder.image_processor,
        options.out,
        columns=feature_columns(
            encoder.config, options.blocks, options.pooling, last4=options.last4
        ),
        loading=Loading(options.batch_size, workers, accelerator.device),
        shard_size=options.shard_size,
        command=shlex.join(["mim-refiner", "embed", *arguments]),
    )
    if accelerator.is_main_process:
        columns = ", ".join(f"{name} ({width})" for name, width in store.columns.items())
        print(f"The features: {len(store)} images, {columns}: {options.out}")
        if store.broken:
            print(
                f"Images that could not be read: {len(store.broken)}, listed in {options.out / BROKEN}"
            )
