"""What CAPI starts from: an encoder with predictor and head, and how many prototypes there are.

    encoder = load_for_capi("capi_vitl14_in22k14.pth")     # whole predictor, and the head
    objective = CapiObjective(recipe, steps, encoder)

No released file holds the clustering layer: its prototypes begin anew, and the head has to learn
their names. A folder of ours has the first block of the predictor only.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..conversion import load_encoder
from ..conversion.containers import named_tensors
from ..conversion.layouts import CAPI, CAPI_WHOLE
from ..conversion.read import read_source
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.wording import setting
from .capi_student import PrototypeHead, start_weights
from .recipe import PretrainRecipe

logger = logging.getLogger(__name__)

MOST_PROTOTYPES = 16384
_HEAD = "head.last_layer."


def load_for_capi(source: str) -> MimRefinerModel:
    """The encoder of `source`, as `load_encoder` takes it.

    Of a file of CAPI's authors it has all blocks of the predictor, and the weights of the head, if
    they are in the file, attached for `head_beside`.

    Raises:
        CheckpointError: as of `load_encoder`.
    """
    encoder = load_encoder(source)
    report: Any = encoder.load_report
    if report.family != CAPI.family:
        return encoder

    encoder = load_encoder(source, family=CAPI_WHOLE.family)
    head = {
        name.removeprefix(_HEAD): tensor.float()
        for name, tensor in named_tensors(read_source(source, None).contents)
        if name.startswith(_HEAD)
    }
    vars(encoder)["capi_head"] = head
    return encoder


def head_beside(encoder: MimRefinerModel) -> Mapping[str, Tensor]:
    """The weights of the student's head that came with the encoder; empty where there are none."""
    head: Mapping[str, Tensor] = vars(encoder).get("capi_head", {})
    return head


def start_head(encoder: MimRefinerModel, prototypes: int) -> PrototypeHead:
    """The head that came with the encoder, if it names as many prototypes, else a fresh one."""
    head = PrototypeHead(encoder.config.hidden_size, prototypes)
    weights = head_beside(encoder)
    if weights and weights["weight_v"].shape == head.weight_v.shape:
        head.load_state_dict(weights)
    elif weights:
        logger.warning(
            "the head that came with the encoder names %d prototypes, not %d: it starts anew",
            len(weights["weight_v"]),
            prototypes,
        )
    return head


def with_predictor(encoder: MimRefinerModel, blocks: int) -> MimRefinerModel:
    """The encoder itself, trainable, with a predictor of so many blocks; a fresh one if need be."""
    if encoder.config.predictor_layers != blocks:
        encoder.config.predictor_layers = blocks
        fresh = MimRefinerModel(encoder.config)
        start_weights(fresh)
        encoder.predictor = fresh.predictor
        logger.info("the predictor of %d blocks starts from fresh weights", blocks)
    return encoder.requires_grad_(True)


def check_positions(config: MimRefinerConfig) -> None:
    """Refuse an encoder that cannot be asked for a place in the image.

    Raises:
        ValueError: for positions other than rope with stored frequencies.
    """
    if config.position_encoding != "rope" or config.rope_theta is not None:
        raise ValueError(
            f"position_encoding={config.position_encoding}: CAPI needs rope with frequencies that "
            "are stored (rope_theta=None), as its own encoders have them"
        )


def prototypes_of(recipe: PretrainRecipe, positions: int) -> int:
    """How many prototypes there are: the recipe's, or as many as the batch can be shared among.

    Args:
        positions: patches of an image.

    Raises:
        ValueError: for more than there are patches to share out, and for a batch of one image.
    """
    batch = recipe.batch_size
    if batch < 2:
        raise ValueError(
            f"{setting('batch_size', batch)}: CAPI shares patches out among the images of a batch; "
            "give 2 or more"
        )
    patches = batch if recipe.positionwise else batch * positions
    asked = recipe.prototypes or MOST_PROTOTYPES
    if asked <= patches:
        return asked

    noise = (
        f"of {asked} the targets would be noise with {setting('batch_size', batch)}, an entropy of "
        f"at least {math.log(asked / patches):.2f} of {math.log(asked):.2f} nats"
    )
    if recipe.prototypes is None:
        logger.warning("CAPI takes %d prototypes: %s", patches, noise)
        return patches
    remedy = "or take a larger batch"
    if recipe.positionwise:
        remedy = f"set {setting('positionwise')} to false, or take a larger batch"
    raise ValueError(f"{setting('prototypes', asked)}: {noise}; give {patches} or fewer, {remedy}")
