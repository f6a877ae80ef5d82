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

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
)
from transformers.pipelines import PIPELINE_REGISTRY

from ._version import __version__
from .clustering.pipeline_image_clustering import TASK, ImageClusteringPipeline
from .clustering.pipeline_image_features import FEATURES_TASK, ImageRowsPipeline
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

if TYPE_CHECKING:
    from .cli import refine_command
    from .conversion import CheckpointError, LoadReport, load_classifier, load_encoder
    from .refinement.recipe import RefineRecipe
    from .refinement.recipe_files import read_recipe
    from .runs.cluster import Groups, cluster
    from .runs.embed import embed
    from .runs.evaluate import evaluate
    from .runs.refine import refine


AutoConfig.register("mim_refiner", MimRefinerConfig, exist_ok=True)
AutoModel.register(MimRefinerConfig, MimRefinerModel, exist_ok=True)
AutoModelForImageClassification.register(
    MimRefinerConfig, MimRefinerForImageClassification, exist_ok=True
)
AutoBackbone.register(MimRefinerConfig, MimRefinerBackbone, exist_ok=True)
AutoImageProcessor.register(
    MimRefinerConfig,
    image_processor_classes={
        "torchvision": MimRefinerImageProcessor,
        "pil": MimRefinerImageProcessorPil,
    },
    exist_ok=True,
)
PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=ImageClusteringPipeline, pt_model=AutoModel, type="image"
)

# One row per image from our encoders, and nothing else for others than transformers gives.
PIPELINE_REGISTRY.supported_tasks[FEATURES_TASK]["impl"] = ImageRowsPipeline

# Loaded on first use: whoever only wants features need not import accelerate, datasets,
# matplotlib and scikit-learn.
_LAZY = {
    "CheckpointError": ".conversion",
    "LoadReport": ".conversion",
    "load_classifier": ".conversion",
    "load_encoder": ".conversion",
    "RefineRecipe": ".refinement.recipe",
    "read_recipe": ".refinement.recipe_files",
    "Groups": ".runs.cluster",
    "cluster": ".runs.cluster",
    "embed": ".runs.embed",
    "evaluate": ".runs.evaluate",
    "refine": ".runs.refine",
    "refine_command": ".cli",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
