"""The command that puts images into groups: cluster.

Heavy rooms are imported when the command runs, so that `mim-refiner --help` is quick.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from ..data.missing import refuse_more_groups
from ..publishing.choices import TOOLS
from .flags import (
    Work,
    add_batch_size,
    add_dtype,
    add_follow_links,
    add_image_column,
    add_model_and_images,
    add_seed,
    add_workers,
    at_least,
    command_parser,
    parse_model_and_images,
)

# the names in `clustering.pipeline_image_clustering.METHODS`
_METHODS = ("kmeans", "heads")


def _cluster_parser() -> ArgumentParser:
    parser = command_parser(
        "cluster",
        "A pile of images as groups of alike ones: a web page, a CSV file, and a folder of links "
        "per group.",
    )
    add_model_and_images(
        parser,
        "folder, read at any depth; or parquet, Hub name, 'digits'; or features of "
        "mim-refiner embed, which need no model",
    )

    # the groups
    parser.add_argument(
        "--num_clusters",
        type=at_least(1),
        help="number of groups; default: proposed from the images",
    )
    parser.add_argument(
        "--method", choices=_METHODS, default="kmeans", help="k-means, or cluster heads: slower"
    )
    parser.add_argument(
        "--start",
        type=Path,
        metavar="CORRECTED.CSV",
        help="groups as corrected on the page: they are kept, and new images go to the nearest",
    )

    parser.add_argument(
        "--out",
        type=Path,
        default=Path("groups"),
        help="folder to write; earlier groups there are replaced",
    )
    parser.add_argument(
        "--also",
        nargs="+",
        default=(),
        choices=TOOLS,
        help="tools to write the groups for too",
    )

    add_image_column(parser)
    add_follow_links(parser)
    add_dtype(parser, None)
    add_batch_size(parser, 32)
    add_workers(parser, 0)
    add_seed(parser)
    return parser


def parse_cluster(arguments: Sequence[str]) -> Work:
    """`mim-refiner cluster`."""
    options = parse_model_and_images(_cluster_parser(), arguments, needs_model=False)
    refuse_more_groups(options.dataset, options.num_clusters, options.method)

    def work() -> None:
        from ..runs.cluster import cluster
        from ..runtime.lock import sole_run

        with sole_run(options.out, "out", beside=True):
            groups = cluster(
                options.dataset,
                options.model,
                num_clusters=options.num_clusters,
                method=options.method,
                start=options.start,
                out=options.out,
                also=options.also,
                image_column=options.image_column,
                follow_links=options.follow_links,
                dtype=options.dtype,
                batch_size=options.batch_size,
                seed=options.seed,
                num_workers=options.num_workers,
            )

        print(groups)
        page = options.out / "index.html"
        if page.is_file():
            print(f"The page: {page}")
        else:
            print(f"None of the images is there any more, so there is no page: {options.out}")

    return work
