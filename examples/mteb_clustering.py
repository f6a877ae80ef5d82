"""MTEB's image-clustering tasks on a saved model folder, through sentence-transformers.

    pip install mteb
    # MTEB's own tasks, from the Hub
    python examples/mteb_clustering.py out/model --tasks CIFAR10Clustering TinyImageNetClustering
    # the same protocol on labelled images of yours, with no download
    python examples/mteb_clustering.py out/model --dataset photos.parquet --split test

The protocol is MTEB's: k-means with as many groups as there are classes, NMI as the main score. A
small MAE (`../shared/models/mae-tiny-cifar10`, converted) on 4 000 images of CIFAR-10
(`../shared/data/cifar10/test.parquet`; 40 s on 2 cores, November 2026):

    OwnImages: v_measure 0.136  nmi 0.136  ari 0.067  cluster_accuracy 0.241

`mim-refiner evaluate` measures the same with errors over images and restarts.
"""

import argparse
import sys
from typing import Any

import datasets
from mteb import evaluate, get_tasks
from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer

from mim_refiner_hf.data.images import ImageDataset, open_images

# the image-clustering tasks of MTEB's benchmark of images
TASKS = (
    "CIFAR10Clustering",
    "CIFAR100Clustering",
    "ImageNetDog15Clustering",
    "ImageNet10Clustering",
    "TinyImageNetClustering",
)


class OwnImages(AbsTaskClusteringLegacy):
    """A task of labelled images that are here."""

    input_column_name = "image"
    label_column_name = "label"
    metadata = TaskMetadata(
        name="OwnImages",
        description="Groups of one's own images.",
        dataset={"path": "local", "revision": "none"},
        type="ImageClustering",
        category="i2c",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="nmi",
        modalities=["image"],
    )

    def __init__(self, images: ImageDataset) -> None:
        super().__init__()
        assert images.labels is not None
        column = [images[place].image for place in range(len(images))]
        rows = {"image": column, "label": images.labels.tolist()}
        self.dataset = {"test": datasets.Dataset.from_dict(rows)}
        self.data_loaded = True

    def load_data(self, **_: Any) -> None:
        """They are loaded."""


def scores_of(folder: str, tasks: list[Any]) -> list[dict[str, float]]:
    """MTEB's scores of a model folder, by name, for each task."""
    # this package is imported, so that the folder needs no code of its own
    model = SentenceTransformer(folder)
    wrapped = SentenceTransformerEncoderWrapper(model)
    # MTEB takes a model for one of text where nothing says otherwise
    about = {"modalities": ["image"], "name": "local/model", "revision": "none"}
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update=about)
    results = evaluate(wrapped, tasks, cache=None, encode_kwargs={"batch_size": 64})
    return [result.scores["test"][0] for result in results.task_results]


def main() -> int:
    """Measure, and print a line for each task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a saved model, or its Hub name")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="names of MTEB's tasks")
    parser.add_argument("--dataset", help="labelled images of yours instead")
    parser.add_argument("--split", help="of that data set")
    options = parser.parse_args()

    if options.dataset is None:
        tasks = list(get_tasks(tasks=list(options.tasks)))
    else:
        images = open_images(options.dataset, split=options.split)
        if images.labels is None:
            print(f"error: {options.dataset} has no labels to compare groups with", file=sys.stderr)
            return 2
        tasks = [OwnImages(images)]
    for task, scores in zip(tasks, scores_of(options.model, tasks), strict=True):
        names = ("v_measure", "nmi", "ari", "cluster_accuracy")
        shown = [f"{name} {scores[name]:.3f}" for name in names]
        print(f"{task.metadata.name}: {'  '.join(shown)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
