"""`export`: an encoder in the format of timm, of transformers' own classes, or of ONNX, reloaded and compared before it counts.

    mim-refiner export out/model out/timm --to timm                  # a folder that timm.create_model loads
    mim-refiner export out/model out/vit --to vit                    # a transformers folder without custom code
    mim-refiner export facebook/vit-mae-large out/onnx --to onnx     # model.onnx with its preprocessing

What each folder holds, and which encoders the format has no words for: `export_timm.py`, `export_native.py`, `export_onnx.py`.
"""

from importlib import import_module
from pathlib import Path

import torch

from ..conversion import load_encoder
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.files import staged_folder
from .hub import check_model_folder
from .twins import Twin

FORMATS = {"timm": "export_timm", "vit": "export_native", "onnx": "export_onnx"}
"""Name after `--to` -> module, imported when it is asked for: timm takes seconds to import, and onnx is an extra."""
TOLERANCE = 1e-4
"""Largest difference allowed, in units of the largest value of that output, or of 1 where all are smaller."""
BATCHES = (1, 3)


class ExportError(RuntimeError):
    """What was written does not compute what it should; it was removed again."""


def export(source: str | Path, destination: str | Path, to: str) -> dict[str, float]:
    """Write an encoder in another format, all or nothing, after the reloaded files gave the same outputs.

    Args:
        source: anything `load_encoder` takes: a Hub name, a model folder, an original checkpoint.
        destination: folder to write, in fp32; an earlier model there is replaced.
        to: "timm", "vit" (transformers' own classes) or "onnx".

    Returns:
        Worst absolute difference between the encoder and its reloaded twin on random images in batches of 1 and 3, for "tokens"
        (`last_hidden_state`) and, where the format pools, "features" (`pooler_output`); at most `TOLERANCE` of their scale.

    Raises:
        ValueError: for an unknown `to`, a destination that holds something else or the source, an encoder that the format
            cannot express (the message says which setting), or a source that `load_encoder` refuses.
        FileNotFoundError: when `source` is a path that does not exist.
        ExportError: when the reloaded twin computes something else.
    """
    if to not in FORMATS:
        raise ValueError(f"to={to!r} is not a format; allowed: {', '.join(FORMATS)}")
    folder, origin = check_model_folder(Path(destination)), Path(source).expanduser().resolve()
    if folder == origin or folder in origin.parents:
        raise ValueError(f"{destination} would overwrite the source {source}; name another folder")
    encoder = load_encoder(source)
    processor = encoder.image_processor
    format_ = import_module(f".{FORMATS[to]}", __package__)
    if reason := format_.refusal(encoder.config):
        raise ValueError(f"{source} cannot be exported to {to}: {reason}")
    encoder.float()
    with staged_folder(folder, check_model_folder) as new:
        format_.write(new, encoder, processor)
        return compare(encoder, format_.load(new))


@torch.no_grad()
def compare(encoder: MimRefinerModel, twins: dict[str, Twin]) -> dict[str, float]:
    """Worst absolute difference per output over all twins and batch sizes; an ExportError beyond the tolerance."""
    size = (max(BATCHES), encoder.config.num_channels, *encoder.config.image_hw)
    images = torch.randn(size, generator=torch.Generator().manual_seed(0))
    worst: dict[str, float] = {}
    for batch in BATCHES:
        output = encoder(images[:batch])
        expected = {"tokens": output.last_hidden_state, "features": output.pooler_output}
        for way, twin in twins.items():
            for name, found in twin(images[:batch]).items():
                wanted = expected[name]
                if found.shape != wanted.shape:
                    raise ExportError(
                        f"{way}: {name} come back as {list(found.shape)}, not {list(wanted.shape)}"
                    )
                difference = (found - wanted).abs().max().item()
                allowed = TOLERANCE * max(1.0, wanted.abs().max().item())
                if not difference <= allowed:  # not `>`: NaN must fail too
                    raise ExportError(
                        f"{way}: {name} differ by {difference:.1e}, more than {allowed:.1e}; nothing was written"
                    )
                worst[name] = max(worst.get(name, 0.0), difference)
    return worst


__all__ = ["FORMATS", "TOLERANCE", "ExportError", "compare", "export"]
