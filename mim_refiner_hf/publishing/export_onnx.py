"""An encoder as `onnx/model.onnx`: native resolution, any batch size, two outputs.

    session = onnxruntime.InferenceSession("out/web/onnx/model.onnx")
    # (B, C, H, W) float32 -> last_hidden_state (B, T, D), pooler_output (B, D)
    tokens, features = session.run(None, {"pixel_values": pixels})
    # transformers' own class, no custom code
    AutoImageProcessor.from_pretrained("out/web")(image, return_tensors="np")

That is where transformers.js and optimum look for it, beside `config.json` and
`preprocessor_config.json`: `pipeline("image-feature-extraction", folder)` there. Smaller ones lie
beside it, where they are asked for: `onnx/model_fp16.onnx`, half the size, is `dtype: "fp16"` of
transformers.js; `onnx/model_quantized.onnx`, with weights of 8 bits, is "q8".

Takes every encoder. Needs `pip install "mim_refiner_hf[onnx]"` (about 110 MB). Beyond protobuf's
limit of 2 GB the weights lie in `model.onnx.data` beside the graph; the files belong together.
"""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.image_processing_mim_refiner import MimRefinerImageProcessor
from ..model.modeling_mim_refiner import MimRefinerModel
from .twins import Twin, native_processor

_EXTRA = ("onnx", "onnxruntime", "onnxscript")
_OUTPUTS = ("last_hidden_state", "pooler_output")
# in the names of transformers.js
_FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_quantized.onnx"}
# bytes of weights that `model.onnx` itself can hold: below protobuf's 2^31, with room for the graph
ONE_FILE = 1_800_000_000


def _graph(folder: Path, precision: str = "fp32") -> Path:
    return folder / "onnx" / _FILES[precision]


def refusal(_: MimRefinerConfig) -> str | None:
    """What is not installed, or None: there is no encoder that ONNX cannot express."""
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        return f'{" and ".join(missing)} missing; pip install "mim_refiner_hf[onnx]"'
    return None


def write(folder: Path, encoder: MimRefinerModel, processor: MimRefinerImageProcessor) -> None:
    """Write `onnx/model.onnx`, `config.json` (ours, for the record), `preprocessor_config.json`."""
    config = encoder.config
    size = sum(parameter.numel() * parameter.element_size() for parameter in encoder.parameters())
    # a batch of one would be taken for a constant
    pixels = torch.zeros(2, config.num_channels, *config.image_hw)

    _graph(folder).parent.mkdir()
    # plain matmuls: torch 2.15 cannot decompose SDPA with an additive bias
    kernel = encoder.config._attn_implementation
    encoder.set_attn_implementation("eager")
    torch.onnx.export(
        encoder,
        (pixels,),
        _graph(folder),
        dynamo=True,
        verbose=False,
        input_names=["pixel_values"],
        output_names=_OUTPUTS,
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        external_data=size > ONE_FILE,
    )
    encoder.set_attn_implementation(kernel)

    config.save_pretrained(folder)
    native_processor(processor).save_pretrained(folder)


def load(folder: Path) -> dict[str, Twin]:
    """The graph in onnxruntime, of the extra `onnx`, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(_graph(folder), providers=["CPUExecutionProvider"])

    def twin(pixels: Tensor) -> dict[str, Tensor]:
        tokens, features = session.run(list(_OUTPUTS), {"pixel_values": pixels.numpy()})
        return {"tokens": torch.from_numpy(tokens), "features": torch.from_numpy(features)}

    return {"onnxruntime": twin}


def write_smaller(folder: Path, precision: Literal["fp16", "int8"], images: Tensor) -> Tensor:
    """Write the graph of a folder in another precision too; inputs and outputs stay fp32.

    Args:
        precision: "int8" rounds the weights of matrix products to 8 bits, in blocks of 32 with a
            scale each; what is computed with them stays fp32.
        images: pixels to compare with (B, C, H, W).

    Returns:
        What the new graph's pooled vectors are of these images (B, D).
    """
    import onnx
    import onnxruntime

    exact = onnx.load(_graph(folder))
    smaller = _in_half(exact) if precision == "fp16" else _in_eight_bits(exact)
    size = sum(len(tensor.raw_data) for tensor in smaller.graph.initializer)
    path = _graph(folder, precision)
    data = f"{path.name}.data" if size > ONE_FILE else None
    onnx.save(smaller, path, save_as_external_data=data is not None, location=data)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    _, pooled = session.run(list(_OUTPUTS), {"pixel_values": images.numpy()})
    return torch.from_numpy(pooled)


def _in_half(exact: Any) -> Any:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(exact, keep_io_types=True)


def _in_eight_bits(exact: Any) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    # it tells of every node
    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)
    quantizer = MatMulNBitsQuantizer(exact, bits=8, block_size=32, is_symmetric=True)
    quantizer.process()
    return quantizer.model.model
