"""transformers' `config.json` in full: the tower that reads images, and what the file leaves out.

    found = stated_in_full(read_source("google/siglip-base-patch16-224", None))
    found.config["model_type"]         # "siglip_vision_model"
    why_not("videomae")                # "it reads videos"

A `config.json` states what differs from the defaults of its class, and inside a model of two towers
nothing else. The defaults are read off the class; nothing is built from a stranger's numbers.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import CONFIG_MAPPING

from ..model.configuration_mim_refiner import brief
from ..runtime.files import CheckpointError
from .layout import Source

# models of text and images, with the `model_type` of their vision tower
_TOWERS = {
    "aimv2": "aimv2_vision_model",
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip2": "siglip2_vision_model",
}
_WITH_DEFAULTS = (
    *_TOWERS.values(),
    "beit",
    "data2vec-vision",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "ijepa",
    "pixio",
    "vit",
    "vit_mae",
    "vit_msn",
)
_STAGES = (
    "convnext",
    "convnextv2",
    "dinov3_convnext",
    "focalnet",
    "hiera",
    "levit",
    "mobilevit",
    "pvt",
    "pvt_v2",
    "resnet",
    "segformer",
    "swin",
    "swinv2",
)


def stated_in_full(found: Source) -> Source:
    """A source with the configuration of its vision tower, defaults included; others as they are.

    Raises:
        CheckpointError: for a tower that is no object.
    """
    config: Mapping[str, Any] = found.config
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in _TOWERS:
        tower = config.get("vision_config") or {}
        if not isinstance(tower, Mapping):
            raise CheckpointError(
                f"{found.name} has vision_config {brief(tower)}; it must be an object, {{..}}: "
                "get its config.json again"
            )
        model_type = _TOWERS[model_type]
        config = {**tower, "model_type": model_type}
    if model_type not in _WITH_DEFAULTS:
        return found

    kind = CONFIG_MAPPING[model_type]
    defaults = {name: getattr(kind, name, None) for name in kind.__annotations__}
    config = {**defaults, **config}
    # a pair of equal sides, where we have a number
    patch = config.get("patch_size")
    if isinstance(patch, list | tuple) and len(patch) == 2 and patch[0] == patch[1]:
        config["patch_size"] = patch[0]
    return replace(found, config=config)


def why_not(model_type: str) -> str:
    """Why a model of transformers is no start, in a few words; empty where that is not known."""
    from transformers.models.auto import modeling_auto

    if model_type in modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES:
        return "it reads videos"
    if model_type in _STAGES:
        return "its tokens change in width and number from stage to stage"
    if model_type in modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
        return "it detects objects"
    of_text = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    if model_type.endswith("_text_model") or any(model_type in names for names in of_text):
        return "it reads text"
    return ""
