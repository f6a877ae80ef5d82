"""`mim-refiner`: the commands, and the job behind `accelerate launch training/refine.py`.

    mim-refiner refine --model facebook/vit-mae-large --dataset my_images/ --output_dir out     (or under `accelerate launch -m`)
    mim-refiner pretrain --recipe pretrain-digits --dataset my_images/ --output_dir out
    mim-refiner convert mae_pretrain_vit_large.pth mae-l16
    mim-refiner evaluate out/model --dataset my_images/ --against facebook/vit-mae-large
    mim-refiner embed facebook/vit-mae-large --dataset photos/ --out features/ --blocks 11 23 --pooling cls mean
    mim-refiner cluster photos/ --model out/model --out groups/                                  (then open groups/index.html)
    mim-refiner push out/model user/name
    mim-refiner export out/model out/timm --to timm                                              (or vit, or onnx)

Exit codes: 0 done, 2 wrong use (one line says which value and what is allowed), 1 something else failed, 130 interrupted.
"""

import argparse
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from accelerate import Accelerator, PartialState
from transformers import HfArgumentParser

from .broken_images import BROKEN, MAX_BAD_FRACTION
from .checkpointing import SaveError
from .configuration_mim_refiner import Pooling
from .conversion.load import image_processor, load_encoder
from .data import open_images, open_stream
from .distributed import launch_processes, launched_short, rank, several_on_the_cpu
from .evaluation.embed import PRECISIONS, embed_images
from .evaluation.evaluate import PROTOCOLS, evaluate
from .evaluation.feature_store import read_manifest
from .evaluation.features import feature_columns
from .evaluation.report_folder import report_table
from .pipeline_image_clustering import METHODS
from .pretraining.mae import PretrainRecipe, pretrain_mae
from .publishing.cluster_folder import cluster_images
from .publishing.convert import DTYPES, convert
from .publishing.evaluated_card import update_card
from .publishing.export import FORMATS, ExportError, export
from .publishing.hub import CARD, PushError, check_model_folder, check_repo_id, push_folder, save_model_folder
from .publishing.model_card import write_card
from .refinement.device import warn_of_emulation
from .refinement.interruption import Ended, Interrupted, ended_by_signals
from .refinement.recipe import RefineRecipe
from .refinement.recipe_files import parse_recipe, read_fields
from .refinement.replay import replay
from .refinement.run import RunResult, run
from .run_lock import sole_run


def _at_least(least: int) -> Callable[[str], int]:
    """What argparse turns a word into: a whole number, `least` or more; argparse puts the flag's name before the message."""

    def number(word: str) -> int:
        if not word.removeprefix("-").isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"{word}: must be a whole number, at least {least}")
        return int(word)

    return number


def refine(recipe: RefineRecipe) -> RunResult | None:
    """Refine a masked-image model as `recipe` says and write the result to `recipe.output_dir`.

    Leaves `model/` (weights, configuration, preprocessing, code, card), `metrics.json`, `clusters.png`, `curves.png`, `log.jsonl`; with
    `push_to_hub` it publishes the folder. Returns None after a dry run or a head warm-up alone.

    Raises:
        ValueError, FileNotFoundError: for wrong settings, or while another run writes to the folder; before any work.
        FloatingPointError: for a loss that is not finite.
        PushError: when the Hub fails; the local result is intact and the message says how to continue.
    """
    if recipe.push_to_hub is not None:
        check_repo_id(recipe.push_to_hub)
    check_model_folder(Path(recipe.output_dir) / "model")
    if recipe.dry_run:
        return run(recipe)
    with sole_run(Path(recipe.output_dir), "--output_dir"):
        result = run(recipe)
        if result is not None and PartialState().is_main_process:
            _save(recipe, result)
    return result


def _save(recipe: RefineRecipe, result: RunResult) -> None:
    """The model folder, its card, and the way to the Hub."""
    folder = result.output_dir / "model"
    save_model_folder(folder, result.encoder, result.processor)
    write_card(result.output_dir)
    shutil.rmtree(result.output_dir / "checkpoints", ignore_errors=True)  # complete: nothing left to resume
    print(f"The refined model: {folder}")
    if recipe.push_to_hub is not None:
        print(f"Published: {push_folder(folder, recipe.push_to_hub)}")


def _refine(arguments: Sequence[str]) -> None:
    refine(parse_recipe(arguments))


@dataclass
class _PretrainCommand:
    """What `pretrain` asks for beside the fields of PretrainRecipe."""

    recipe: str | None = field(default=None, metadata={"help": "Name in training/recipes/ or path of a YAML file."})
    dataset: str = field(default="digits", metadata={"help": "Image folder, parquet, Hub name, or 'digits' (bundled)."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    split: str | None = field(default=None, metadata={"help": "Split to train on."})
    output_dir: str = field(default="outputs/pretrained", metadata={"help": "Folder for the model."})
    num_workers: int = field(default=2, metadata={"help": "Data-loading workers."})
    max_bad_fraction: float = field(
        default=MAX_BAD_FRACTION, metadata={"help": "Stop when more than this share of the images is broken."}
    )

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ValueError(f"--num_workers {self.num_workers}: must be at least 0")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max_bad_fraction {self.max_bad_fraction}: must be between 0 and 1")


def _pretrain(arguments: Sequence[str]) -> None:
    parser = HfArgumentParser(
        (PretrainRecipe, _PretrainCommand),  # type: ignore[arg-type]
        description="Pre-train an encoder by masked autoencoding.",
        allow_abbrev=False,
    )
    name = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    name.add_argument("--recipe")
    chosen = name.parse_known_args(arguments)[0].recipe
    if chosen is not None:
        parser.set_defaults(**read_fields(chosen, PretrainRecipe))
    recipe, command = parser.parse_args_into_dataclasses(list(arguments))
    check_model_folder(Path(command.output_dir))
    where = {"config": command.dataset_config, "split": command.split}
    images = open_images(command.dataset, **where, num_channels=recipe.num_channels)
    folder = Path(command.output_dir)
    with sole_run(folder, "--output_dir", beside=True):
        accelerator = Accelerator(cpu=several_on_the_cpu())
        encoder = pretrain_mae(recipe, images, accelerator, command.num_workers, command.max_bad_fraction)
        if accelerator.is_main_process:
            save_model_folder(folder, encoder, image_processor(encoder.config, {}))
            print(f"The pre-trained model: {folder}")


def _push(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mim-refiner push", description="Publish a model folder: weights first, the card last."
    )
    parser.add_argument("folder", type=Path, help="what a run left as <output_dir>/model")
    parser.add_argument("repository", help="user/name on the Hub")
    parser.add_argument("--private", action="store_true", help="for a new repository")
    options = parser.parse_args(arguments)
    print(f"Published: {push_folder(options.folder, options.repository, private=options.private)}")


def _convert(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mim-refiner convert",
        description="Any masked-image-modeling checkpoint as a model folder for the Hub, verified by loading it back.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="checkpoint file, model folder, Hub name, or a name of the zoo (model_cards/)")
    parser.add_argument("destination", type=Path, help="new folder for the model")
    parser.add_argument("--family", help="family of the file, when detection should be overruled")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the source's")
    parser.add_argument("--num_heads", type=int, help="attention heads, for a file that does not tell")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub name")
    parser.add_argument("--push", metavar="USER/NAME", help="publish the folder under this name")
    parser.add_argument("--private", action="store_true", help="for a new repository")
    options = parser.parse_args(arguments)
    if options.push is not None:
        check_repo_id(options.push)
    settings = {name: getattr(options, name) for name in ("family", "dtype", "num_heads", "revision")}
    with sole_run(options.destination, "DESTINATION", beside=True):
        print(convert(options.source, options.destination, **settings), flush=True)
    if options.push is not None:
        print(f"Published: {push_folder(options.destination, options.push, private=options.private)}")


def _export(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mim-refiner export",
        description="An encoder in another library's format, compared with it after loading it back.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="model folder, Hub name, or an original checkpoint")
    parser.add_argument("destination", type=Path, help="new folder")
    parser.add_argument("--to", choices=FORMATS, required=True, help="timm, transformers' own classes, or ONNX")
    options = parser.parse_args(arguments)
    with sole_run(options.destination, "DESTINATION", beside=True):
        differences = export(options.source, options.destination, options.to)
    worst = ", ".join(f"{difference:.1e} in its {output}" for output, difference in differences.items())
    print(f"{options.destination}: loaded back as {options.to}, it differs from {options.source} by at most {worst}")


def _evaluate(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mim-refiner evaluate",
        description="How good an encoder is, and whether it got better than another: scores with errors, verdicts, pictures; "
        "under accelerate launch the processes share the work.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="Hub name, model folder, checkpoint file, or a name of the zoo")
    parser.add_argument("--dataset", required=True, help="image folder, parquet, Hub name, or 'digits': the k-NN bank")
    parser.add_argument("--dataset_config", help="configuration of a Hub data set")
    parser.add_argument("--split", help="split for the k-NN bank")
    parser.add_argument("--eval_dataset", help="images to evaluate on, if they are another data set")
    parser.add_argument("--eval_split", help="split to evaluate on; neither: a fifth of the images is held out")
    parser.add_argument("--against", help="the model to compare with, such as the starting weights")
    parser.add_argument("--protocols", nargs="+", default=[], choices=PROTOCOLS, help="slower protocols to add")
    parser.add_argument("--recipe", help="of fine_tuning: name in training/recipes/ (fine-tune-...) or path of a YAML file")
    parser.add_argument("--transfer", nargs="+", default=[], metavar="DATASET", help="other data to measure the models on too")
    kept = "folder that keeps the features for the next command, or one that 'mim-refiner embed' made; default: none are kept"
    parser.add_argument("--features", type=Path, help=kept)
    parser.add_argument("--seed", type=_at_least(0), default=0, help="of k-means, the held-out part and the protocols")
    parser.add_argument("--num_workers", type=_at_least(0), default=2, help="data-loading workers")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/evaluation"), help="folder for numbers and pictures")
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


def _embed(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mim-refiner embed",
        description="Features of every image, once, as parquet shards: the same command resumes; under accelerate launch, shared.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="model folder, Hub name, original checkpoint, or a name of the zoo (model_cards/)")
    parser.add_argument("--dataset", required=True, help="image folder, parquet, tar shards, Hub name, or 'digits' (bundled)")
    parser.add_argument("--dataset_config", help="configuration of a Hub data set")
    parser.add_argument("--split", help="split of the data set; default: train")
    parser.add_argument("--streaming", action="store_true", help="read the images in passing, without a download first")
    parser.add_argument("--out", type=Path, required=True, help="folder for the features; one that was begun is continued")
    where = "raw outputs of these blocks, counted from 0; 'output': after the final norm; default: the last block"
    parser.add_argument("--blocks", nargs="+", type=_place, default=[], metavar="BLOCK", help=where)
    poolings = get_args(Pooling)
    parser.add_argument(
        "--pooling", nargs="+", choices=poolings, default=[], help="default: what the model's configuration says"
    )
    parser.add_argument("--last4", action="store_true", help="also the last 4 blocks side by side")
    parser.add_argument("--dtype", choices=PRECISIONS, default="fp32", help="of the computation; float32 is stored")
    parser.add_argument("--batch_size", type=int, default=256, help="images per forward pass and process")
    parser.add_argument("--num_workers", type=int, help="processes that decode images; default: one per core, at most 16")
    parser.add_argument("--shard_size", type=int, help="images per file; default: 8192, or what the folder has")
    options = parser.parse_args(arguments)
    read_manifest(options.out)  # says so now if it is something else
    accelerator = Accelerator(cpu=several_on_the_cpu())
    if options.dtype == "bf16" and accelerator.is_main_process:
        warn_of_emulation("--dtype bf16", accelerator.device.type)
    encoder: Any = load_encoder(options.model)
    encoder.to(PRECISIONS[options.dtype])
    opened = open_stream if options.streaming else open_images
    channels = encoder.config.num_channels
    images = opened(options.dataset, config=options.dataset_config, split=options.split, num_channels=channels)
    workers = options.num_workers
    store = embed_images(
        encoder,
        images,
        encoder.image_processor,
        options.out,
        columns=feature_columns(encoder.config, options.blocks, options.pooling, last4=options.last4),
        batch_size=options.batch_size,
        num_workers=min(16, (os.cpu_count() or 1) // accelerator.num_processes) if workers is None else workers,
        shard_size=options.shard_size,
        device=accelerator.device,
        command=shlex.join(["mim-refiner", "embed", *arguments]),
    )
    if accelerator.is_main_process:
        columns = ", ".join(f"{name} ({width})" for name, width in store.columns.items())
        print(f"The features: {len(store)} images, {columns}: {options.out}")
        if store.broken:
            print(f"Images that could not be read: {len(store.broken)}, listed in {options.out / BROKEN}")


def _cluster(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mim-refiner cluster",
        description="A pile of images as groups of alike ones: a web page, a CSV file, and a folder of links per group.",
        allow_abbrev=False,
    )
    parser.add_argument("images", help="folder, read at any depth; or parquet, Hub name, 'digits' (bundled)")
    parser.add_argument("--model", required=True, help="model folder, Hub name, original checkpoint, or a name of the zoo")
    parser.add_argument("--num_clusters", type=int, help="number of groups; default: proposed from the images")
    parser.add_argument("--method", choices=METHODS, default="kmeans", help="k-means, or cluster heads: slower")
    parser.add_argument("--out", type=Path, default=Path("groups"), help="folder to write; earlier groups there are replaced")
    parser.add_argument("--batch_size", type=_at_least(1), default=32, help="images per forward pass")
    parser.add_argument("--num_workers", type=_at_least(0), default=0, help="processes that decode images beside this one")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="of everything random")
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    with sole_run(out, "--out", beside=True):
        summary = cluster_images(options.pop("images"), options.pop("model"), out, **options)
    print(f"{summary['note']}\nThe page: {out / 'index.html'}")


def _replay(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mim-refiner replay",
        description="Run the step again at which a refinement stopped, watch its parts, and say where it goes wrong.",
        allow_abbrev=False,
    )
    parser.add_argument("output_dir", type=Path, help="the run's folder")
    parser.add_argument("--step", type=int, help="default: the last one of failures/")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), help="default: as the run had it")
    options = vars(parser.parse_args(arguments))
    print(replay(options.pop("output_dir"), **options))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "refine": _refine,
    "pretrain": _pretrain,
    "convert": _convert,
    "cluster": _cluster,
    "push": _push,
    "evaluate": _evaluate,
    "export": _export,
    "embed": _embed,
    "replay": _replay,
}

SHARED = ("refine", "pretrain", "evaluate", "embed")
"""The commands that several processes do together."""


def check_alone(name: str) -> None:
    """ValueError for a command that one process does, in a job of several: each would do it all, and write the same files."""
    if name not in SHARED and (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"{name}: runs in one process, not {processes}; start it without the launcher")


def command(name: str, arguments: Sequence[str] | None = None) -> int:
    """Run one command and translate what it raises into an exit code and one line on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if arguments is None and (processes := launched_short()):
        return launch_processes(processes)
    try:
        check_alone(name)
        with ended_by_signals():
            COMMANDS[name](sys.argv[1:] if arguments is None else arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        if rank() == 0:
            print(interruption, file=sys.stderr)
        return interruption.exit_code
    except (PushError, ExportError, FloatingPointError, OSError) as error:  # OSError: disk full, read-only, the network
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, SaveError) and arguments is None:
            print(f"the command that continues: {shlex.join(sys.argv)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interruption:
        print("interrupted; the same command starts again, from the last checkpoint where there is one", file=sys.stderr)
        return 143 if isinstance(interruption, Ended) else 130
    return 0


def refine_command() -> int:
    """What `training/refine.py` and `python -m mim_refiner_hf.refinement.trainer` run."""
    return command("refine")


def main(arguments: Sequence[str] | None = None) -> int:
    """The console command `mim-refiner`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="mim-refiner", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help=", ".join(COMMANDS))
    chosen = parser.parse_args(arguments[:1]).command
    return command(chosen, arguments[1:])


__all__ = ["command", "main", "refine", "refine_command"]

if __name__ == "__main__":
    raise SystemExit(main())
