"""The commands that look at images with a frozen encoder: evaluate, embed.

Heavy rooms are imported when a command runs, so that `mim-refiner --help` is quick.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from ..model.poolings_mim_refiner import Pooling
from ..runs.choices import AddedProtocol, Protocol
from ..runtime.files import refuse_missing_model
from .flags import (
    Work,
    add_batch_size,
    add_columns,
    add_dtype,
    add_model_and_images,
    add_seed,
    add_splits,
    add_workers,
    at_least,
    command_parser,
    parse_model_and_images,
)

if TYPE_CHECKING:
    from accelerate import Accelerator


def _evaluate_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "evaluate",
        "How good an encoder is, and whether it got better than another: scores with errors, "
        "verdicts, pictures; under accelerate launch the processes share the work.",
    )
    add_model_and_images(parser, "image folder, parquet, Hub name, or 'digits': the k-NN bank")
    add_splits(parser)
    add_columns(parser)

    parser.add_argument(
        "--eval_dataset", help="images to evaluate on, if they are another data set"
    )
    parser.add_argument(
        "--eval_split", help="split to evaluate on; neither: a fifth of the images is held out"
    )
    _add_protocols(parser)
    parser.add_argument(
        "--transfer",
        nargs="+",
        default=[],
        metavar="DATASET",
        help="other data to measure the models on too",
    )

    parser.add_argument(
        "--features",
        type=Path,
        help="folder that keeps the features for the next command, or one that "
        "'mim-refiner embed' made; default: none are kept",
    )
    add_seed(parser, "k-means, the held-out part and the protocols")
    add_dtype(parser, None)
    add_workers(parser, 2)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/evaluation"),
        help="folder for numbers and pictures",
    )
    return parser


def _add_protocols(parser: argparse.ArgumentParser) -> None:
    """What is measured, and how."""
    parser.add_argument("--against", help="the model to compare with, such as the starting weights")
    parser.add_argument(
        "--protocol",
        choices=get_args(Protocol),
        help="paper: images of 256 pixels, then 224, whatever the model says; quick: a bank of "
        "10000 images; default: images as the model says, and the whole bank",
    )
    parser.add_argument(
        "--bank_size",
        type=at_least(1),
        help="images of the k-NN bank, evenly spaced; default: all",
    )
    parser.add_argument(
        "--protocols",
        nargs="+",
        default=[],
        choices=get_args(AddedProtocol),
        help="slower protocols to add",
    )
    parser.add_argument(
        "--recipe",
        help="of fine_tuning: name in training/recipes/ (fine-tune-...) or path of a YAML file",
    )
    parser.add_argument(
        "--split_file",
        nargs="+",
        default=[],
        metavar="FILE",
        help="lists of file names, one a line: the splits of low_shot, or the images of "
        "fine_tuning; default: drawn from the seed",
    )


def parse_evaluate(arguments: Sequence[str]) -> Work:
    """`mim-refiner evaluate`."""
    options = vars(parse_model_and_images(_evaluate_parser(), arguments))
    refuse_missing_model(options["against"])
    model = options.pop("model")
    dataset = options.pop("dataset")

    def work() -> None:
        from ..conversion.licence import CARD
        from ..evaluation.tables import report_table
        from ..publishing.model_card import update_card
        from ..runs.evaluate import evaluate
        from ..runtime.launch import job_of_processes
        from ..runtime.lock import sole_run

        accelerator = job_of_processes()
        with sole_run(options["output_dir"], "output_dir", beside=True):
            report = evaluate(model, dataset, **options)
        if not accelerator.is_main_process:
            return

        print(report_table(report))
        print(f"The report: {options['output_dir']}/report.md")
        folder = Path(report["model"])
        if (folder / CARD).is_file():
            print(f"The card: {update_card(folder, report)}")

    return work


def _block(word: str) -> int | Literal["output"]:
    """For argparse's `type`: the number of a block, or "output"."""
    if word == "output":
        return "output"
    if not word.removeprefix("-").isdigit():
        raise argparse.ArgumentTypeError(f"{word!r} is neither the number of a block nor 'output'")
    return int(word)


def _embed_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "embed",
        "Features of every image, once, as parquet shards: the same command resumes; under "
        "accelerate launch, shared.",
    )
    add_model_and_images(parser, "image folder, parquet, tar shards, Hub name, or 'digits'")
    add_splits(parser)
    add_columns(parser)
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
    parser.add_argument(
        "--shard_size",
        type=at_least(1),
        help="images per file; default: 8192, or what the folder has",
    )

    # which features
    parser.add_argument(
        "--blocks",
        nargs="+",
        type=_block,
        default=[],
        metavar="BLOCK",
        help="raw outputs of these blocks, counted from 0; 'output': after the final norm; "
        "default: the last block",
    )
    parser.add_argument(
        "--pooling",
        nargs="+",
        choices=get_args(Pooling),
        default=[],
        help="default: what the model's configuration says",
    )
    parser.add_argument("--last4", action="store_true", help="also the last 4 blocks side by side")

    add_dtype(parser, "fp32", auto=", or what the folder has")
    add_batch_size(parser, 256)
    add_workers(parser, None)
    return parser


def parse_embed(arguments: Sequence[str]) -> Work:
    """`mim-refiner embed`."""
    options = parse_model_and_images(_embed_parser(), arguments)

    def work() -> None:
        from ..runtime.launch import job_of_processes, workers_per_process

        accelerator = job_of_processes()
        if options.num_workers is None:
            options.num_workers = workers_per_process(accelerator.num_processes)
        _embed(options, shlex.join(["mim-refiner", "embed", *arguments]), accelerator)

    return work


def _embed(options: argparse.Namespace, command: str, accelerator: "Accelerator") -> None:
    """What was asked for, in the job of all processes; the first says what there is."""
    from ..data.broken import BROKEN
    from ..data.found import Part, SourceOptions
    from ..data.loading import Loading
    from ..evaluation.features import FeatureChoice
    from ..runs.embed import store_features
    from ..runtime.text import one_line

    source = SourceOptions(options.image_column, options.label_column, options.follow_links)
    store = store_features(
        options.model,
        options.dataset,
        options.out,
        part=Part(options.dataset_config, options.split, options.streaming, source),
        choice=FeatureChoice(options.blocks, options.pooling, options.last4),
        dtype=options.dtype,
        loading=Loading(options.batch_size, options.num_workers, accelerator.device),
        shard_size=options.shard_size,
        command=command,
    )

    if accelerator.is_main_process:
        widths = ", ".join(f"{name} ({width})" for name, width in store.columns.items())
        print(f"The features: {len(store)} images, {widths}: {options.out}")
        if store.broken:
            listed = options.out / BROKEN
            print(f"Images that could not be read: {len(store.broken)}, listed in {listed}, first:")
            print(f"  {one_line(store.broken[0]['reason'])}")
