"""The commands that carry models in and out: convert, export, page, push.

Heavy rooms are imported when a command runs, so that `mim-refiner --help` is quick.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..publishing.choices import DTYPES, EXPORT_FORMATS
from ..runtime.files import refuse_missing_model, refuse_no_model_folder
from .flags import Work, command_parser


def _add_publishing(parser: argparse.ArgumentParser) -> None:
    """What the Hub wants to know."""
    parser.add_argument("--private", action="store_true", help="for a new repository")
    parser.add_argument(
        "--license",
        help="of the weights, where their source states none; the Hub's word: mit, unknown, ...",
    )


def parse_push(arguments: Sequence[str]) -> Work:
    """`mim-refiner push`."""
    parser = command_parser("push", "Publish a model folder: weights first, the card last.")
    parser.add_argument("folder", type=Path, help="what a run left as <output_dir>/model")
    parser.add_argument("repository", help="user/name on the Hub")
    _add_publishing(parser)
    options = parser.parse_args(arguments)
    refuse_no_model_folder(options.folder)

    def work() -> None:
        from ..publishing.hub import push_folder

        address = push_folder(
            options.folder, options.repository, private=options.private, license=options.license
        )
        print(f"Published: {address}")

    return work


def parse_convert(arguments: Sequence[str]) -> Work:
    """`mim-refiner convert`."""
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

    # what a source does not tell
    parser.add_argument("--family", help="family of the file, when detection should be overruled")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the source's")
    parser.add_argument(
        "--num_heads", type=int, help="attention heads, for a file that does not tell"
    )
    parser.add_argument(
        "--image_size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="height and width, or the side of a square, for a file that does not tell",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub name")

    parser.add_argument("--push", metavar="USER/NAME", help="publish the folder under this name")
    _add_publishing(parser)
    options = parser.parse_args(arguments)
    refuse_missing_model(options.source)

    def work() -> None:
        from ..publishing.convert import convert
        from ..publishing.hub import check_repo_id, push_folder
        from ..runtime.lock import sole_run

        if options.push is not None:
            check_repo_id(options.push)
        size = options.image_size
        with sole_run(options.destination, "DESTINATION", beside=True):
            summary = convert(
                options.source,
                options.destination,
                family=options.family,
                dtype=options.dtype,
                num_heads=options.num_heads,
                image_size=size[0] if size is not None and len(size) == 1 else size,
                revision=options.revision,
                license=options.license,
                publish=options.push is not None,
            )
            print(summary, flush=True)
        if options.push is not None:
            address = push_folder(options.destination, options.push, private=options.private)
            print(f"Published: {address}")

    return work


def parse_export(arguments: Sequence[str]) -> Work:
    """`mim-refiner export`."""
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
    refuse_missing_model(options.source)

    def work() -> None:
        from ..publishing.export import export
        from ..runtime.lock import sole_run

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
            f"{options.destination}: loaded back as {options.to}, it differs from "
            f"{options.source} by at most {', '.join(worst)}"
        )
        for precision, cosine in cosines.items():
            print(
                f"In {precision}, its features of random images have a cosine of at least "
                f"{cosine:.5f} with PyTorch's in fp32"
            )

    return work


def parse_page(arguments: Sequence[str]) -> Work:
    """`mim-refiner page`."""
    parser = command_parser(
        "page",
        "A static site that groups images in the browser, by an encoder with weights of 8 bits: "
        "no server, and no image leaves the machine. The folder is a static Space, too.",
    )
    parser.add_argument("source", help="model folder, Hub name, or an original checkpoint")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("site"),
        help="folder to write; an earlier site there is replaced; default: site",
    )
    parser.add_argument(
        "--transformers_js",
        type=Path,
        metavar="FOLDER",
        help="where `npm install @huggingface/transformers` ran; default: the files are "
        "downloaded from npm's registry once (36 MB)",
    )
    options = parser.parse_args(arguments)
    refuse_missing_model(options.source)

    def work() -> None:
        from ..publishing.browser_site import write_site
        from ..runtime.lock import sole_run

        with sole_run(options.out, "out", beside=True):
            site = write_site(options.source, options.out, transformers_js=options.transformers_js)
        print(site)

    return work
