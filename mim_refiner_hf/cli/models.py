"""The commands that carry models in and out: convert, export, push."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..publishing.convert import DTYPES, convert
from ..publishing.export import EXPORT_FORMATS, export
from ..publishing.hub import check_repo_id, push_folder
from ..runtime.lock import sole_run


def run_push(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mim-refiner push", description="Publish a model folder: weights first, the card last."
    )
    parser.add_argument("folder", type=Path, help="what a run left as <output_dir>/model")
    parser.add_argument("repository", help="user/name on the Hub")
    parser.add_argument("--private", action="store_true", help="for a new repository")
    options = parser.parse_args(arguments)
    print(f"Published: {push_folder(options.folder, options.repository, private=options.private)}")


def run_convert(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mim-refiner convert",
        description="Any masked-image-modeling checkpoint as a model folder for the Hub, verified by loading it back.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        help="checkpoint file, model folder, Hub name, or a name of the zoo (model_cards/)",
    )
    parser.add_argument("destination", type=Path, help="new folder for the model")
    parser.add_argument("--family", help="family of the file, when detection should be overruled")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the source's")
    parser.add_argument(
        "--num_heads", type=int, help="attention heads, for a file that does not tell"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub name")
    parser.add_argument("--push", metavar="USER/NAME", help="publish the folder under this name")
    parser.add_argument("--private", action="store_true", help="for a new repository")
    options = parser.parse_args(arguments)
    if options.push is not None:
        check_repo_id(options.push)
    settings = {
        name: getattr(options, name) for name in ("family", "dtype", "num_heads", "revision")
    }
    with sole_run(options.destination, "DESTINATION", beside=True):
        print(convert(options.source, options.destination, **settings), flush=True)
    if options.push is not None:
        print(
            f"Published: {push_folder(options.destination, options.push, private=options.private)}"
        )


def run_export(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mim-refiner export",
        description="An encoder in another library's format, compared with it after loading it back.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="model folder, Hub name, or an original checkpoint")
    parser.add_argument("destination", type=Path, help="new folder")
    parser.add_argument(
        "--to",
        choices=EXPORT_FORMATS,
        required=True,
        help="timm, transformers' own classes, or ONNX",
    )
    options = parser.parse_args(arguments)
    with sole_run(options.destination, "DESTINATION", beside=True):
        differences = export(options.source, options.destination, options.to)
    worst = ", ".join(
        f"{difference:.1e} in its {output}" for output, difference in differences.items()
    )
    print(
        f"{options.destination}: loaded back as {options.to}, it differs from {options.source} by at most {worst}"
    )
