"""MIM-Refiner for Hugging Face: refine an image encoder until its features group by meaning.

import mim_refiner_hf                       # registers the Auto classes and the pipeline
from transformers import AutoModel, pipeline
model = AutoModel.from_pretrained("outputs/quickstart/model")
pipe = pipeline("image-clustering", model="outputs/quickstart/model")

from mim_refiner_hf import load_encoder, refine, embed, cluster, evaluate
encoder = load_encoder("facebook/vit-mae-base")              # or a file, a folder, a model object
result = refine("photos/", model=encoder, output_dir="out")  # or a list of images, a data set, ...
vectors = embed(result.encoder, "photos/")                   # (n, width)
groups = cluster("photos/", model=result.encoder)            # or cluster(vectors)
report = evaluate(result.encoder, "photos/", against=encoder)
"""

from typing import TYPE_CHECKING

from ._version import __version__
from .runtime.lazy import after_import, lazy_names

if TYPE_CHECKING:
    from .cli import refine_command
    from .clustering.pipeline_image_clustering import ImageClusteringPipeline
    from .conversion import CheckpointError, LoadReport, load_classifier, load_encoder
    from .model.configuration_mim_refiner import MimRefinerConfig
    from .model.image_processing_mim_refiner import (
        MimRefinerImageProcessor,
        MimRefinerImageProcessorPil,
    )
    from .model.modeling_mim_refiner import (
        MimRefinerBackbone,
        MimRefinerForImageClassification,
        MimRefinerModel,
    )
    from .refinement.recipe import RefineRecipe
    from .refinement.recipe_files import read_recipe
    from .runs.cluster import Groups, cluster
    from .runs.embed import embed
    from .runs.evaluate import evaluate
    from .runs.refine import refine

# --- registrations, each when transformers' own table of that kind is there


def _register_configuration() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from .model.configuration_mim_refiner import MimRefinerConfig

    AutoConfig.register("mim_refiner", MimRefinerConfig, exist_ok=True)


def _register_models() -> None:
    from transformers.models.auto.modeling_auto import (
        AutoBackbone,
        AutoModel,
        AutoModelForImageClassification,
    )

    from .model.configuration_mim_refiner import MimRefinerConfig
    from .model.modeling_mim_refiner import (
        MimRefinerBackbone,
        MimRefinerForImageClassification,
        MimRefinerModel,
    )

    AutoModel.register(MimRefinerConfig, MimRefinerModel, exist_ok=True)
    AutoModelForImageClassification.register(
        MimRefinerConfig, MimRefinerForImageClassification, exist_ok=True
    )
    AutoBackbone.register(MimRefinerConfig, MimRefinerBackbone, exist_ok=True)


def _register_image_processors() -> None:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from .model.configuration_mim_refiner import MimRefinerConfig
    from .model.image_processing_mim_refiner import (
        MimRefinerImageProcessor,
        MimRefinerImageProcessorPil,
    )

    AutoImageProcessor.register(
        MimRefinerConfig,
        image_processor_classes={
            "torchvision": MimRefinerImageProcessor,
            "pil": MimRefinerImageProcessorPil,
        },
        exist_ok=True,
    )


def _register_pipelines() -> None:
    from transformers.models.auto.modeling_auto import AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY

    from .clustering.pipeline_image_clustering import TASK, ImageClusteringPipeline
    from .clustering.pipeline_image_features import FEATURES_TASK, ImageRowsPipeline

    PIPELINE_REGISTRY.register_pipeline(
        TASK, pipeline_class=ImageClusteringPipeline, pt_model=AutoModel, type="image"
    )
    # One row per image from our encoders, and nothing else for others than transformers gives.
    PIPELINE_REGISTRY.supported_tasks[FEATURES_TASK]["impl"] = ImageRowsPipeline


def _registered_later() -> None:
    """torch and the rest come with transformers' tables; who prints a help needs neither."""
    auto = "transformers.models.auto"
    configuration = f"{__name__}.model.configuration_mim_refiner"
    models = f"{__name__}.model.modeling_mim_refiner"
    # what our models import asks itself for the table, where a class of transformers comes first
    layers = "transformers.modeling_layers"
    processors = f"{__name__}.model.image_processing_mim_refiner"
    pipelines = [
        f"{__name__}.clustering.pipeline_image_clustering",
        f"{__name__}.clustering.pipeline_image_features",
    ]
    after_import(f"{auto}.configuration_auto", _register_configuration, [configuration])
    after_import(f"{auto}.modeling_auto", _register_models, [configuration, models, layers])
    after_import(
        f"{auto}.image_processing_auto", _register_image_processors, [configuration, processors]
    )
    after_import("transformers.pipelines", _register_pipelines, pipelines)


_registered_later()

# --- names, each imported on first use

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "cli": ["refine_command"],
        "clustering.pipeline_image_clustering": ["ImageClusteringPipeline"],
        "conversion": ["CheckpointError", "LoadReport", "load_classifier", "load_encoder"],
        "model.configuration_mim_refiner": ["MimRefinerConfig"],
        "model.image_processing_mim_refiner": [
            "MimRefinerImageProcessor",
            "MimRefinerImageProcessorPil",
        ],
        "model.modeling_mim_refiner": [
            "MimRefinerBackbone",
            "MimRefinerForImageClassification",
            "MimRefinerModel",
        ],
        "refinement.recipe": ["RefineRecipe"],
        "refinement.recipe_files": ["read_recipe"],
        "runs.cluster": ["Groups", "cluster"],
        "runs.embed": ["embed"],
        "runs.evaluate": ["evaluate"],
        "runs.refine": ["refine"],
    },
)

__all__ = [
    "CheckpointError",
    "Groups",
    "ImageClusteringPipeline",
    "LoadReport",
    "MimRefinerBackbone",
    "MimRefinerConfig",
    "MimRefinerForImageClassification",
    "MimRefinerImageProcessor",
    "MimRefinerImageProcessorPil",
    "MimRefinerModel",
    "RefineRecipe",
    "__version__",
    "cluster",
    "embed",
    "evaluate",
    "load_classifier",
    "load_encoder",
    "read_recipe",
    "refine",
    "refine_command",
]
