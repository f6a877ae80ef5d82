"""An encoder as `model.onnx`: native resolution, any batch size, `last_hidden_state` and `pooler_output`.

    session = onnxruntime.InferenceSession("out/onnx/model.onnx")
    tokens, features = session.run(None, {"pixel_values": pixels})              # (B, C, H, W) float32 -> (B, T, D), (B, D)
    AutoImageProcessor.from_pretrained("out/onnx")(image, return_tensors="np")  # transformers' own class, no custom code

Takes every encoder. Needs `pip install "mim_refiner_hf[onnx]"` (about 110 MB). Beyond protobuf's limit of 2 GB the weights lie
in `model.onnx.data` beside the graph; the two files belong together.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.image_processing_mim_refiner import MimRefinerImageProcessor
from ..model.modeling_mim_refiner import MimRefinerModel
from .twins import Twin, native_processor

EXTRA = ("onnx", "onnxruntime", "onnxscript")
OUTPUTS = ("last_hidden_state", "pooler_output")
ONE_FILE = 1_800_000_000
"""Bytes of weights up to which they go into `model.onnx` itself: below protobuf's 2^31, with room for the graph."""


def refusal(_: MimRefinerConfig) -> str | None:
    """What is not installed, or None: there is no encoder that ONNX cannot express."""
    if missing := [name for name in EXTRA if find_spec(name) is None]:
        return f'{" and ".join(missing)} missing; pip install "mim_refiner_hf[onnx]"'
    return None


def write(folder: Path, encoder: MimRefinerModel, processor: MimRefinerImageProcessor) -> None:
    """Write `model.onnx`, `config.json` (ours, for the record) and `preprocessor_config.json` (a native class)."""
    config = encoder.config
    size = sum(parameter.numel() * parameter.element_size() for parameter in encoder.parameters())
    kernel = encoder.config._attn_implementation
    encoder.set_attn_implementation(
        "eager"
    )  # plain matmuls: torch 2.15 cannot decompose SDPA with an additive bias
    torch.onnx.export(
        encoder,
        (
            torch.zeros(2, config.num_channels, *config.image_hw),
        ),  # 2: a batch of one would be taken for a constant
        folder / "model.onnx",
        dynamo=True,
        verbose=False,
        input_names=["pixel_values"],
        output_names=OUTPUTS,
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        external_data=size > ONE_FILE,
    )
    encoder.set_attn_implementation(kernel)
    config.save_pretrained(folder)
    native_processor(processor).save_pretrained(folder)


def load(folder: Path) -> dict[str, Twin]:
    """The graph in onnxruntime, on the CPU."""
    import onnxruntime  # of the extra `onnx`

    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )

    def twin(pixels: Tensor) -> dict[str, Tensor]:
        tokens, features = session.run(list(OUTPUTS), {"pixel_values": pixels.numpy()})
        return {"tokens": torch.from_numpy(tokens), "features": torch.from_numpy(features)}

    return {"onnxruntime": twin}


__all__ = ["load", "refusal", "write"]
