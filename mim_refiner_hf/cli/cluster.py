"""The command that puts images into groups: cluster."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..clustering.pipeline_image_clustering import METHODS
from ..publishing.cluster_folder import cluster_images
from ..runtime.lock import sole_run
from .flags import at_least


def run_cluster(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mim-refiner cluster",
        description="A pile of images as groups of alike ones: a web page, a CSV file, and a folder of links per group.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "images", help="folder, read at any depth; or parquet, Hub name, 'digits' (bundled)"
    )
    parser.add_argument(
        "--model",
        required=True,
        help="model folder, Hub name, original checkpoint, or a name of the zoo",
    )
    parser.add_argument(
        "--num_clusters", type=int, help="number of groups; default: proposed from the images"
    )
    parser.add_argument(
        "--method", choices=METHODS, default="kmeans", help="k-means, or cluster heads: slower"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("groups"),
        help="folder to write; earlier groups there are replaced",
    )
    parser.add_argument(
        "--batch_size", type=at_least(1), default=32, help="images per forward pass"
    )
    parser.add_argument(
        "--num_workers",
        type=at_least(0),
        default=0,
        help="processes that decode images beside this one",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of everything random")
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    with sole_run(out, "--out", beside=True):
        summary = cluster_images(options.pop("images"), options.pop("model"), out, **options)
    print(f"{summary['note']}\nThe page: {out / 'index.html'}")
