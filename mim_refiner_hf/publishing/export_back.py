"""An encoder as the class of transformers that it came from: `mim-refiner export ... --to native`.

    model = AutoModel.from_pretrained("out/native")               # Dinov2Model, CLIPVisionModel, ..
    processor = AutoImageProcessor.from_pretrained("out/native")  # the same pixels

`native_classes.py` says which class, and what it can express. Which of its weights is which of
ours, the layout of its family says already, for the way in (`conversion/transformers_layouts.py`):
tensors of places take that way here, and come out where the values are to be fetched from.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, CLIPImageProcessor, PreTrainedModel, Siglip2ImageProcessor

from ..conversion.layout import POSITIONS, Layout
from ..conversion.layouts import LAYOUTS
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.image_processing_mim_refiner import MimRefinerImageProcessor
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.quiet import without_bars
from .native_classes import NativeClass, class_named, class_of
from .twins import Twin, native_processor

# of its class alone: it reads patches that its image processor has cut out
_PATCHES_IN = "Siglip2VisionModel"


def refusal(config: MimRefinerConfig) -> str | None:
    """Why no class of transformers is this encoder, or None."""
    kind = class_of(config)
    return kind if isinstance(kind, str) else None


def other_size(config: MimRefinerConfig) -> tuple[int, int] | None:
    """Another size at which the class has to agree with the encoder; None where it takes one."""
    kind = class_of(config)
    if isinstance(kind, str) or not kind.any_size(config):
        return None
    height, width = config.image_hw
    # the class takes its table for a square's
    if height != width and kind.asks_for_sizes:
        return None
    return height + 2 * config.patch_size, width + config.patch_size


def write(folder: Path, encoder: MimRefinerModel, processor: MimRefinerImageProcessor) -> None:
    """Write `config.json`, `model.safetensors` and `preprocessor_config.json` of native classes."""
    kind = class_of(encoder.config)
    assert not isinstance(kind, str)
    model = AutoModel.from_config(kind.configuration(encoder.config))
    layout = next(entry for entry in LAYOUTS if kind.model_type in entry.model_types)

    weights = {name: tensor.detach().float() for name, tensor in encoder.state_dict().items()}
    reversed_weights = reverse_layout(layout, model, weights)
    if hasattr(model, "pooler") and hasattr(model.pooler, "dense"):
        # x I + 0 is the CLS token
        reversed_weights["pooler.dense.weight"] = torch.eye(encoder.config.hidden_size)
    # buffers stay
    model.load_state_dict(model.state_dict() | reversed_weights)
    with without_bars():
        model.save_pretrained(folder)
    _own_processor(kind, encoder.config, processor).save_pretrained(folder)


def reverse_layout(
    layout: Layout, model: PreTrainedModel, ours: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Every parameter of a class of transformers, by its name, from the weights of an encoder.

    What the encoder does not have is zero: biases, and positions of CLS and registers, which are
    added to these tokens. What the class has and the encoder does not read is zero, too.

    Raises:
        KeyError: for a weight of the encoder that has no place in the class.
    """
    theirs = {}
    used = set()
    for name, parameter in model.named_parameters():
        values = torch.zeros(parameter.shape)
        theirs[name] = values
        if layout.reason_to_drop(name) is not None:
            continue
        places = torch.arange(values.numel()).reshape(values.shape)
        for target, part in (layout.place(name, places) or {}).items():
            if target not in ours:
                continue
            tensor = ours[target]
            # rows of a table that stand before those of the patches
            if target == POSITIONS:
                part = part[:, part.shape[1] - tensor.shape[1] :]
            values.view(-1)[part.reshape(-1)] = tensor.reshape(-1)
            used.add(target)

    for name in ours:
        # added to all scores of a query alike, which softmax does not see
        if name not in used and not name.endswith(".attention.k_proj.bias"):
            raise KeyError(f"no place for {name}")
    return theirs


def _own_processor(
    kind: NativeClass, config: MimRefinerConfig, processor: MimRefinerImageProcessor
) -> CLIPImageProcessor | Siglip2ImageProcessor:
    """The preprocessing of transformers' own class; SigLIP 2's keeps the shape of an image."""
    if kind.name != _PATCHES_IN:
        return native_processor(processor)
    rows, columns = config.grid
    return Siglip2ImageProcessor(
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        resample=processor.resample,
        patch_size=config.patch_size,
        max_num_patches=rows * columns,
    )


def load(folder: Path) -> dict[str, Twin]:
    """The folder as `AutoModel` loads it; a ValueError if a tensor is missing or left over."""
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    if any(info.values()):
        raise ValueError(f"transformers does not place every tensor: {info}")
    kind = class_named(type(model).__name__)

    size = getattr(model.config, "image_size", None)
    native = (size, size) if isinstance(size, int) else size and tuple(size)

    def twin(pixels: Tensor) -> dict[str, Tensor]:
        if kind.name == _PATCHES_IN:
            output = model(**_cut_out(pixels, model.config.patch_size))
        elif kind.asks_for_sizes and tuple(pixels.shape[2:]) != native:
            output = model(pixels, interpolate_pos_encoding=True)
        else:
            output = model(pixels)
        outputs = {"tokens": output.last_hidden_state}
        pooled = output.get("pooler_output")
        return outputs if pooled is None else outputs | {"features": pooled}

    return {type(model).__name__: twin}


def _cut_out(pixels: Tensor, patch: int) -> dict[str, Tensor]:
    """Images (B, C, H, W) as SigLIP 2 reads them: rows of pixels, one for each patch."""
    rows = pixels.shape[2] // patch
    columns = pixels.shape[3] // patch
    cut = pixels.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
    cut = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, N, patch * patch * C)
    return {
        "pixel_values": cut,
        "pixel_attention_mask": torch.ones(cut.shape[:2], dtype=torch.long),
        "spatial_shapes": torch.tensor([[rows, columns]] * len(pixels)),
    }
