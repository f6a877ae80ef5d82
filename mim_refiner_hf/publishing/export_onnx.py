"""An encoder as `onnx/model.onnx`: native resolution, any batch size, two outputs.

    session = onnxruntime.InferenceSession("out/web/onnx/model.onnx")
    # (B, C, H, W) float32 -> last_hidden_state (B, T, D), pooler_output (B, D)
    tokens, features = session.run(None, {"pixel_values": pixels})
    # transformers' own class, no custom code
    AutoImageProcessor.from_pretrained("out/web")(image, return_tensors="np")

That is where transformers.js and optimum look for it, beside `config.json` and
`preprocessor_config.json`: `pipeline("image-feature-extraction", folder)` there. Half precision, if
it is asked for, is `onnx/model_fp16.onnx`, which transformers.js takes for `dtype: "fp16"`.

Takes every encoder. Needs `pip install "mim_refiner_hf[onnx]"` (about 110 MB). Beyond protobuf's
limit of 2 GB the weights lie in `model.onnx.data` beside the graph; the files belong together.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.image_processing_mim_refiner import MimRefinerImageProcessor
from ..model.modeling_mim_refiner import MimRefinerModel
from .twins import Twin, native_processor

_EXTRA = ("onnx", "onnxruntime", "onnxscript")
_OUTPUTS = ("last_hidden_state", "pooler_output")
# bytes of weights that `model.onnx` itself can hold: below protobuf's 2^31, with room for the graph
ONE_FILE = 1_800_000_000


def _graph(folder: Path, half: bool = False) -> Path:
    """Where the graph lies in a folder, in the names of transformers.js."""
    return folder / "onnx" / ("model_fp16.onnx" if half else "model.onnx")


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


def write_half(folder: Path, num_channels: int, image_hw: tuple[int, int]) -> float:
    """Write the graph of a folder in fp16 too, whose inputs and outputs stay fp32.

    Returns:
        The least cosine of its pooled vector with that in fp32, of 4 random images.
    """
    import onnx
    import onnxruntime
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half = convert_float_to_float16(onnx.load(_graph(folder)), keep_io_types=True)
    size = sum(len(tensor.raw_data) for tensor in half.graph.initializer)
    onnx.save(half, _graph(folder, half=True), save_as_external_data=size > ONE_FILE)

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, num_channels, *image_hw, generator=generator).numpy()
    vectors = []
    for path in (_graph(folder), _graph(folder, half=True)):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        _, pooled = session.run(list(_OUTPUTS), {"pixel_values": pixels})
        vectors.append(torch.from_numpy(pooled).double())
    exact, rounded = vectors
    return torch.cosine_similarity(exact, rounded, dim=1).min().item()


__all__ = ["load", "refusal", "write", "write_half"]
