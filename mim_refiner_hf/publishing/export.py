"""`export`: an encoder in the format of timm, of transformers' own classes, or of ONNX.

    mim-refiner export out/model out/timm --to timm      # a folder that timm.create_model loads
    mim-refiner export out/model out/native --to native  # the class that it came from
    mim-refiner export out/model out/vit --to vit        # transformers' ViT, whatever it came from
    mim-refiner export facebook/vit-mae-large out/onnx --to onnx      # onnx/model.onnx, for
                                                        # transformers.js and optimum

What was written is reloaded by that library and compared before it counts. What each folder holds,
and which encoders a format cannot express: `export_timm.py`, `export_back.py` (native),
`export_native.py` (vit), `export_onnx.py`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import ModelCardData

from ..conversion import load_encoder
from ..conversion.licence import CARD, Licence
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.ending import CommandFailure
from ..runtime.files import staged_folder, write_text
from ..runtime.finite import check_finite
from ..runtime.text import ODD_BYTES, fenced, plain
from ..runtime.wording import setting
from .card_licence import licence_line
from .choices import EXPORT_FORMATS
from .hub import check_model_folder
from .model_card import is_hub_name
from .sentence_files import write_sentence_files
from .twins import Twin, module_of, why_not_exported

# of each format, as the Hub calls it
_LIBRARIES = {"native": "transformers", "timm": "timm", "vit": "transformers", "onnx": "onnx"}

# largest difference allowed, in units of the output's largest value, or of 1 where all are smaller
_TOLERANCE = 1e-4
_TOLERANCE_OF_A_CLASS = 1e-5
_BATCHES = (1, 3)
# of vectors in lower precision with those in fp32
_LEAST_COSINE = 0.999


class ExportError(CommandFailure):
    """What was written does not compute what it should; it was removed again."""


def export(
    source: str | Path,
    destination: str | Path,
    to: str,
    *,
    fp16: bool = False,
    int8: bool = False,
) -> dict[str, float]:
    """Write an encoder in another format, all or nothing, once the reloaded files compute the same.

    Args:
        source: anything `load_encoder` takes: a Hub name, a model folder, an original checkpoint.
        destination: folder to write, in fp32, with a card that states the source's licence; an
            earlier model there is replaced.
        to: "native" (the class of transformers that the encoder came from), "timm", "vit" (its
            ViT, BEiT or data2vec, whatever it came from) or "onnx".
        fp16, int8: of "onnx" write half precision, and weights of 8 bits, too; the pooled vector
            has to keep its direction, at a cosine of 0.999.

    Returns:
        Worst absolute difference between the encoder and its reloaded twin on random images in
        batches of 1 and 3, for "tokens" (`last_hidden_state`) and, where the format pools,
        "features" (`pooler_output`); at most 1e-4 of their scale. Of "native" at most 1e-5, and at
        another size too, where the class takes one. With `fp16`, `int8` also, under these names,
        the least cosine of a pooled vector of that file with PyTorch's in fp32.

    Raises:
        ValueError: for an unknown `to`, a destination that holds something else or the source, an
            encoder that the format cannot express (the message says which setting), or a source
            that `load_encoder` refuses.
        FileNotFoundError: when `source` is a path that does not exist.
        ExportError: when the reloaded twin computes something else, or the encoder NaN.
        NotFiniteTensorError: for weights that hold NaN or infinity in fp32.
    """
    if to not in EXPORT_FORMATS:
        raise ValueError(f"to={to!r} is not a format; allowed: {', '.join(EXPORT_FORMATS)}")
    smaller = [name for name, asked in (("fp16", fp16), ("int8", int8)) if asked]
    if smaller and to != "onnx":
        raise ValueError(f"{setting(smaller[0])} is for {setting('to', 'onnx')}; leave it out")
    folder = check_model_folder(Path(destination))
    origin = Path(source).expanduser().resolve()
    if folder == origin or folder in origin.parents:
        raise ValueError(f"{destination} would overwrite the source {source}; name another folder")

    if ODD_BYTES.search(str(folder)):
        raise ValueError(
            f"{destination}: {_LIBRARIES[to]} opens no path that is no valid Unicode; name another "
            "folder"
        )

    encoder = load_encoder(source)
    reason = why_not_exported(encoder.config, to)
    if reason:
        raise ValueError(f"{source} cannot be exported to {to}: {reason}")

    encoder.float()
    check_finite(encoder.state_dict(), str(destination), f"get {source} again")
    with staged_folder(folder, check_model_folder) as new:
        differences = write_twin(new, encoder, to, smaller)
        text = _card(folder.name, str(source), to, vars(encoder)["licence"])
        write_text(new / CARD, text)
    return differences


def write_twin(
    folder: Path, encoder: MimRefinerModel, to: str, smaller: Sequence[str] = ()
) -> dict[str, float]:
    """Write an encoder that a format can express into an empty folder, and compare.

    Args:
        encoder: in fp32, with its image processor attached.
        smaller: of "onnx" the precisions to write too, "fp16" and "int8".

    Returns:
        As `export`.

    Raises:
        ExportError: as `export`.
    """
    format_ = module_of(to)
    format_.write(folder, encoder, encoder.image_processor)
    twins = format_.load(folder)
    sizes = [encoder.config.image_hw]
    tolerance = _TOLERANCE
    if to == "native":
        sizes += filter(None, [format_.other_size(encoder.config)])
        tolerance = _TOLERANCE_OF_A_CLASS
    differences = _compare_twins(encoder, twins, sizes, tolerance)

    # without a word it would take the mean of all tokens
    if _LIBRARIES[to] == "transformers" and "features" in differences:
        write_sentence_files(folder)
    for precision in smaller:
        images = _random_images(encoder.config, 4, encoder.config.image_hw)
        theirs = format_.write_smaller(folder, precision, images)
        differences[precision] = _least_cosine(encoder, images, theirs, precision)
    return differences


def _card(name: str, source: str, to: str, licence: Licence) -> str:
    """The card of a twin: whose weights these are, in which format, and under which licence."""
    shown = source
    base_model = None
    if is_hub_name(source):
        base_model = source
    else:
        shown = Path(source).name
    metadata = ModelCardData(
        library_name=_LIBRARIES[to],
        pipeline_tag="image-feature-extraction",
        base_model=base_model,
        **licence.metadata(),  # type: ignore[arg-type]
    )

    command = f"mim-refiner export {source} {name} --to {to}"
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {plain(name)}",
        f"The encoder of {plain(shown)} in the format of {_LIBRARIES[to]}: the same weights, "
        "loaded back by that library and compared.",
        licence_line(licence, "its source"),
        fenced(command, "bash"),
    ]
    return "\n\n".join(parts) + "\n"


def _random_images(config: MimRefinerConfig, count: int, size: tuple[int, int]) -> torch.Tensor:
    shape = (count, config.num_channels, *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _compare_twins(
    encoder: MimRefinerModel,
    twins: dict[str, Twin],
    sizes: Sequence[tuple[int, int]],
    tolerance: float,
) -> dict[str, float]:
    """Worst absolute difference of each output over all twins, sizes of images and batch sizes.

    Raises:
        ExportError: beyond the tolerance, or for outputs of another shape.
    """
    worst: dict[str, float] = {}
    for size in sizes:
        images = _random_images(encoder.config, max(_BATCHES), size)
        for batch in _BATCHES:
            output = encoder(images[:batch], interpolate_pos_encoding=True)
            ours = {"tokens": output.last_hidden_state, "features": output.pooler_output}
            for way, twin in twins.items():
                for name, theirs in twin(images[:batch]).items():
                    what = f"{way}: {name}"
                    difference = _difference(what, ours[name], theirs, tolerance)
                    worst[name] = max(worst.get(name, 0.0), difference)
    return worst


@torch.no_grad()
def _least_cosine(
    encoder: MimRefinerModel, images: torch.Tensor, theirs: torch.Tensor, precision: str
) -> float:
    """The least cosine of our pooled vectors with theirs; ExportError if it is too small."""
    ours = encoder(images).pooler_output
    cosine = torch.cosine_similarity(ours.double(), theirs.double(), dim=1).min().item()
    # not `<`: NaN must fail too
    if not cosine >= _LEAST_COSINE:
        raise ExportError(
            f"in {precision} the pooled vector has a cosine of {cosine:.5f} with PyTorch's in "
            f"fp32, less than {_LEAST_COSINE}; nothing was written; leave {setting(precision)} out"
        )
    return cosine


def _difference(what: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> float:
    """The largest absolute difference of two outputs; ExportError if it is too large."""
    if theirs.shape != ours.shape:
        raise ExportError(f"{what} come back as {list(theirs.shape)}, not {list(ours.shape)}")
    if not bool(ours.isfinite().all()):
        raise ExportError(
            f"{what} of random images hold NaN or infinity in the source itself, so that nothing "
            "can be compared; nothing was written"
        )
    difference = (theirs - ours).abs().max().item()
    allowed = tolerance * max(1.0, ours.abs().max().item())
    # not `>`: NaN must fail too
    if not difference <= allowed:
        raise ExportError(
            f"{what} differ by {difference:.1e}, more than {allowed:.1e}; nothing was written"
        )
    return difference
