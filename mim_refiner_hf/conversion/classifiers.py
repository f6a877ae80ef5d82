"""`load_classifier`: a trained classifier as `MimRefinerForImageClassification`, with its classes.

    classifier = load_classifier("rope_vit_reg4_b14_capi-places365")
    classifier.config.id2label[0]                           # "airfield"
    classifier(pixel_values).logits                         # (B, 365)
    classifier.encoder.image_processor                      # and what `load_encoder` attaches

Files of birder are read; of any other, `load_encoder` gives the encoder or says what is in the way.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model.modeling_mim_refiner import MimRefinerForImageClassification
from ..runtime.files import CheckpointError
from .birder_models import class_names, is_birder
from .load import encoder_from
from .read import read_source


def load_classifier(
    source: str | Path,
    *,
    family: str | None = None,
    num_heads: int | None = None,
) -> MimRefinerForImageClassification:
    """Load a classifier of birder, in eval mode and in the dtype it was saved in.

    Args:
        source: a name of `zoo.ZOO`, or a file.
        family, num_heads: as of `load_encoder`.

    Returns:
        The encoder with its classifier; the names of the classes are in `config.id2label` and
        `config.label2id`. The encoder carries what `load_encoder` attaches.

    Raises:
        CheckpointError: where the source is no classifier of birder, its classes and its weights
            do not fit each other, and as of `load_encoder`.
    """
    found = read_source(source, None)
    state = dict(found.contents["state"]) if is_birder(found.contents) else {}
    if "classifier.weight" not in state:
        raise CheckpointError(
            f"{found.name} is no classifier that is known here, which are birder's files with "
            "classifier.weight; load_encoder reads an encoder alone"
        )
    encoder = encoder_from(found, family=family, num_heads=num_heads)
    names = class_names(found)

    width = encoder.config.hidden_size
    dtype = encoder.embeddings.patch_embeddings.weight.dtype
    shapes = {"weight": (len(names), width), "bias": (len(names),)}
    weights = {}
    for key, shape in shapes.items():
        tensor = _checked(found.name, key, state.get(f"classifier.{key}"), shape)
        weights[key] = tensor.to(dtype, copy=True).contiguous()

    config = copy.deepcopy(encoder.config)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    # shapes only: every weight comes from the source
    with torch.device("meta"):
        model = MimRefinerForImageClassification(config)
    model.encoder = encoder
    encoder.config = config
    # a classifier of no classes would be an identity
    assert isinstance(model.classifier, nn.Linear)
    model.classifier.load_state_dict(weights, assign=True)
    return model.train(False)


def _checked(name: str, key: str, tensor: object, shape: tuple[int, ...]) -> Tensor:
    """A tensor of the classifier; CheckpointError for one that does not fit the classes."""
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
        has = list(tensor.shape) if isinstance(tensor, Tensor) else "missing"
        raise CheckpointError(
            f"{name}: classifier.{key} is {has}, but {shape[0]} classes need {list(shape)}; get "
            "the file again"
        )
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise CheckpointError(
            f"{name}: classifier.{key} holds NaN, infinite or integer values; get the file again"
        )
    return tensor
