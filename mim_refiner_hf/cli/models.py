"""The commands that carry models in and out: convert, export, push.

Heavy rooms are imported when a command runs, so that `mim-refiner --help` is quick.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .flags import command_parser


def _add_publishing(parser: argparse.ArgumentParser) -> None:
    """What the Hub wants to know."""
    parser.add_argument("--private", action="store_true", help="for a new repository")
    parser.add_argument(
        "--license",
        help="of the weights, where their source states none; the Hub's word: mit, unknown, ...",
    )


def run_push(arguments: Sequence[str]) -> None:
    """`mim-refiner push`."""
    from ..publishing.hub import push_folder

    parser = command_parser("push", "Publish a model folder: weights first, the card last.")
    parser.add_argument("folder", type=Path, help="what a run left as <output_dir>/model")
    parser.add_argument("repository", help="user/name on the Hub")
    _add_publishing(parser)
    options = parser.parse_args(arguments)
    address = push_folder(
        options.folder, options.repository, private=options.private, license=options.license
    )
    print(f"Published: {address}")


def run_convert(arguments: Sequence[str]) -> None:
    """`mim-refiner convert`."""
    from ..publishing.convert import DTYPES, convert
    from ..publishing.hub import check_repo_id, push_folder
    from ..runtime.lock import sole_run

    parser = command_parser(
        "convert",
        "Any masked-image-modeling checkpoint as a model folder for the Hub, verified by loading "
        "it back.",
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
    _add_publishing(parser)
    options = parser.parse_args(arguments)

    if options.push is not None:
        check_repo_id(options.push)
    with sole_run(options.destination, "DESTINATION", beside=True):
        summary = convert(
            options.source,
            options.destination,
            family=options.family,
            dtype=options.dtype,
            num_heads=options.num_heads,
            revision=options.revision,
            license=options.license,
            publish=options.push is not None,
        )
        print(summary, flush=True)
    if options.push is not None:
        address = push_folder(options.destination, options.push, private=options.private)
        print(f"Published: {address}")


def run_export(arguments: Sequence[str]) -> None:
    """`mim-refiner export`."""
    from ..publishing.export import EXPORT_FORMATS, export
    from ..runtime.lock import sole_run

    parser = command_parser(
        "export",
        "An encoder in another library's format, compared with it after loading it back.",
    )
    parser.add_argument("source", help="model folder, Hub name, or an original checkpoint")
    parser.add_argument("destination", type=Path, help="new folder")
    parser.add_argument(
        "--to",
        choices=EXPORT_FORMATS,
        required=True,
        help="native: the class of transformers that it came from; timm; vit: transformers' ViT, "
        "BEiT or data2vec; onnx",
    )
    parser.add_argument(
        "--fp16", action="store_true", help="onnx: half precision too, onnx/model_fp16.onnx"
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="onnx: weights of 8 bits too, onnx/model_quantized.onnx",
    )
    options = parser.parse_args(arguments)

    with sole_run(options.destination, "DESTINATION", beside=True):
        differences = export(
            options.source,
            options.destination,
            options.to,
            fp16=options.fp16,
            int8=options.int8,
        )
    smaller = [name for name in ("fp16", "int8") if name in differences]
    cosines = {name: differences.pop(name) for name in smaller}
    worst = [f"{difference:.1e} in its {output}" for output, difference in differences.items()]
    print(
        f"{options.destination}: loaded back as {options.to}, it differs from {options.source} "
        f"by at most {', '.join(worst)}"
    )
    for precision, cosine in cosines.items():
        print(
            f"In {precision}, its features of random images have a cosine of at least "
            f"{cosine:.5f} with PyTorch's in fp32"
        )


__all__ = ["run_convert", "run_export", "run_push"]
