"""An encoder to go on with CAPI from: of the authors' files with the whole predictor and the head.

    encoder = load_for_capi("capi_vitl14_in22k14.pth")
    objective = CapiObjective(recipe, steps, encoder)

No released file holds the clustering layer: its prototypes begin anew, and the head has to learn
their names. A folder of ours has the first block of the predictor only.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..conversion import load_encoder
from ..conversion.containers import named_tensors
from ..conversion.layouts import CAPI, CAPI_WHOLE
from ..conversion.read import read_source
from ..model.modeling_mim_refiner import MimRefinerModel

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


__all__ = ["head_beside", "load_for_capi"]
