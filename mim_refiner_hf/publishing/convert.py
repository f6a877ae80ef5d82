"""`convert`: any known checkpoint as a model folder for the Hub, verified by loading it back.

    mim-refiner convert mae_pretrain_vit_large.pth mae-l16     # a file, a folder, a Hub name,
    mim-refiner convert d2v2-refined-h14 out/model      # or a name of the zoo
    mim-refiner convert d2v2-h14 out/model --dtype bfloat16 --push user/name

One copy of the weights is in memory at a time: load, encode a fixed input, write in shards, let
go, load what was written, encode again, compare. Only then does the folder get its name; whatever
fails before leaves nothing behind.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from torch import Tensor

from ..conversion import CheckpointError, LoadReport, load_encoder
from ..conversion.layouts import LAYOUTS
from ..conversion.licence import CARD, UNKNOWN, Licence, agreed_licence
from ..conversion.zoo import find_entry
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.image_processing_mim_refiner import MimRefinerImageProcessor
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.files import sha256_of, shipped_folder, staged_folder, write_text
from ..runtime.text import plain
from ..runtime.wording import setting
from .choices import DTYPES
from .hub import check_model_folder, write_model
from .model_card import conversion_card
from .ways_to_use import family_config, ways_to_use

# largest difference of the outputs, written and read back, relative to the largest output
READ_BACK_TOLERANCE = 1e-5

# a line in every card of the zoo, by which `convert` finds the card of a name
COPY_MARK = "<!-- a converted copy says here how it was made -->"


@dataclass(frozen=True)
class Conversion:
    """What `convert` did; all of it is in the card.

    Args:
        folder: where the model is.
        source: as the caller named it, and `sha256` of it where it is one file.
        report: the load report: family, tensors placed, tensors dropped on purpose.
        parameters: number of weights.
        dtype: of the weights as written.
        difference: largest relative difference of the outputs, written and read back.
        rounding: the same between the source's own dtype and `dtype`; 0 where they are equal.
        seconds: in all.
        licence: of the source, else as the user stated it.
    """

    folder: Path
    source: str
    sha256: str | None
    report: str
    parameters: int
    dtype: str
    difference: float
    rounding: float
    seconds: float
    licence: Licence = UNKNOWN

    def __str__(self) -> str:
        return (
            f"{self.report}\n"
            f"{self.parameters / 1e6:.1f} M parameters in {self.dtype}, read back and compared: "
            f"largest relative difference {self.difference:.1e} ({self.seconds:.0f} s)\n"
            f"The model: {self.folder}"
        )


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    family: str | None = None,
    dtype: str | None = None,
    num_heads: int | None = None,
    image_size: int | Sequence[int] | None = None,
    revision: str | None = None,
    license: str | None = None,
    publish: bool = False,
) -> Conversion:
    """Write any checkpoint that `load_encoder` knows as a model folder, card included.

    Args:
        source, family, num_heads, image_size, revision: as for `load_encoder`.
        destination: a new or empty folder, or an earlier model folder, which is replaced once the
            new one is verified.
        dtype: "float32", "bfloat16" or "float16"; None keeps the source's.
        license: of the weights, where the source states none.
        publish: whether the folder is meant for the Hub, where its licence must be known.

    Raises:
        ValueError: for a destination that holds something else, or an unknown dtype; before
            anything is read. For another licence than the source's, or for none where it is
            needed; before anything is written.
        FileNotFoundError, CheckpointError: as `load_encoder`, or when what was written does not
            give the same outputs.
        NotFiniteTensorError: for weights that overflow in `dtype`; the folder stays as it was.
    """
    began = time.perf_counter()
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"{setting('dtype', dtype)}: must be one of {', '.join(DTYPES)}")

    with staged_folder(Path(destination), check_model_folder) as new:
        encoder = load_encoder(
            source, family=family, revision=revision, num_heads=num_heads, image_size=image_size
        )
        report: LoadReport = vars(encoder)["load_report"]
        licence = agreed_licence(vars(encoder)["licence"], license, source, publish)
        processor: MimRefinerImageProcessor = vars(encoder)["image_processor"]
        config = encoder.config
        parameters = encoder.num_parameters()

        rounding = 0.0
        if dtype is not None:
            rounding = _cast(encoder, getattr(torch, dtype))
        written_dtype = encoder.dtype
        expected = encode_fixed_input(encoder)
        # which tensor it is says more, so that comes first
        write_model(new, encoder, processor, written_dtype)
        _refuse_not_finite(source, expected)

        # its memory is wanted for the one that is read back
        del encoder
        difference = _read_back(new, source, expected)

        done = Conversion(
            folder=Path(destination),
            source=str(source),
            sha256=_digest(Path(source)),
            report=str(report),
            parameters=parameters,
            dtype=str(written_dtype).removeprefix("torch."),
            difference=difference,
            rounding=rounding,
            seconds=time.perf_counter() - began,
            licence=licence,
        )
        facts = encoder_facts(report.family, config, processor)
        name = Path(destination).resolve().name
        for file, text in card_files(name, done, facts, config).items():
            (new / file).parent.mkdir(exist_ok=True)
            write_text(new / file, text)
    return done


def _digest(source: Path) -> str | None:
    """sha256 of a source that is one file."""
    if not source.is_file():
        return None
    return sha256_of(source)


def _cast(encoder: MimRefinerModel, dtype: torch.dtype) -> float:
    """Cast the encoder in place; returns by how much, relatively, its outputs change."""
    if dtype == encoder.dtype:
        return 0.0
    exact = encode_fixed_input(encoder)
    encoder.to(dtype)  # type: ignore[arg-type]
    return relative_difference(exact, encode_fixed_input(encoder))


def _refuse_not_finite(source: str | Path, outputs: Tensor) -> None:
    """CheckpointError where a model encodes random pixels as NaN or infinity."""
    if not outputs.isfinite().all():
        raise CheckpointError(
            f"{source} encodes an image of random pixels as NaN or infinity, so that nothing can "
            "be compared: its weights are too large, perhaps only for half precision, or its "
            "config.json has another layer_norm_eps or hidden_act than they need; get it again"
        )


def _read_back(folder: Path, source: str | Path, expected: Tensor) -> float:
    """By how much, relatively, the outputs of the written model differ; an error for too much."""
    difference = relative_difference(expected, encode_fixed_input(load_encoder(folder)))
    # not `>`, as NaN is too much
    if not difference <= READ_BACK_TOLERANCE:
        raise CheckpointError(
            f"{source}: the model read back from {folder} differs by {difference:.1e} (at most "
            f"{READ_BACK_TOLERANCE} is allowed), so it was not kept; is the disk or the memory "
            "of this machine faulty?"
        )
    return difference


def encode_fixed_input(encoder: MimRefinerModel) -> Tensor:
    """The tokens (1, T, D), fp32, of standard normal pixels (seed 0) of the native size."""
    config = encoder.config
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, config.num_channels, *config.image_hw, generator=generator)
    with torch.inference_mode():
        return encoder(pixels).last_hidden_state.float()


def relative_difference(expected: Tensor, got: Tensor) -> float:
    """max |expected - got| / max |expected|, 0 where they are equal; NaN where either holds one."""
    difference = (expected - got).abs().max()
    # of weights that are all 0 the outputs are, too
    return float(difference / expected.abs().max()) if difference != 0 else 0.0


# The card


def encoder_facts(
    family: str, config: MimRefinerConfig, processor: MimRefinerImageProcessor
) -> dict[str, str]:
    """What a reader of the card wants to know of the encoder: family, shape, input, feature."""
    title = next(layout.title for layout in LAYOUTS if layout.family == family)
    height, width = config.image_hw
    pixels = f"{height} x {width} pixels"
    mean = f"mean {processor.image_mean}"
    deviation = f"standard deviation {processor.image_std}"
    blocks = f"{config.num_hidden_layers} blocks of width {config.hidden_size}"
    heads = f"{config.num_attention_heads} heads"
    return {
        "Family": title,
        "Shape": f"{blocks}, {heads}, patch {config.patch_size}",
        "Input": f"{pixels}, {mean}, {deviation}",
        "Feature": f"pooler_output: {config.pooling} of the {config.features.replace('_', ' ')}",
    }


def card_files(
    name: str, done: Conversion, facts: dict[str, str], config: MimRefinerConfig
) -> dict[str, str]:
    """File -> text: the card of a folder called `name`, and what the Hub reads beside it.

    A model of the zoo brings the numbers that the paper reports; others claim none.
    """
    copy = _copy_facts(done, facts)
    shipped = find_zoo_card(done.source)
    if shipped is None:
        return {CARD: conversion_card(done.source, name, copy, done.licence, config)}

    files = {CARD: _zoo_copy(shipped, done, plain(name), copy, config)}
    for path in shipped.glob(".eval_results/*.yaml"):
        files[f".eval_results/{path.name}"] = path.read_text(encoding="utf-8")
    return files


def _copy_facts(done: Conversion, facts: dict[str, str]) -> str:
    """The facts of the encoder, and how the copy was made and checked, as a Markdown list."""
    weights = f"{done.parameters} in {done.dtype}"
    if done.rounding:
        weights += (
            "; rounding them from the source's type changes the outputs by "
            f"{done.rounding:.1e} (relative to the largest)"
        )

    lines = [f"- **{fact}:** {plain(value)}" for fact, value in facts.items()]
    lines += [
        f"- **Weights:** {weights}",
        f"- **Placed:** {plain(done.report)}",
        "- **Checked:** written, read back, and a fixed input encoded before and after: "
        f"largest relative difference {done.difference:.1e}",
    ]
    if done.sha256:
        lines.append(f"- **sha256 of the source file:** `{done.sha256}`")
    return "\n".join(lines)


def find_zoo_card(source: str) -> Path | None:
    """The folder in `model_cards/` of an official checkpoint; None for any other source."""
    # as in `load_encoder`, what exists here comes before the zoo
    entry = find_entry(source)
    if entry is None or Path(source).exists():
        return None
    folder = shipped_folder("model_cards", in_repository="model_cards") / entry.name
    return folder if (folder / CARD).is_file() else None


def _zoo_copy(
    shipped: Path, done: Conversion, name: str, copy: str, config: MimRefinerConfig
) -> str:
    """The card of the zoo for a folder called `name`: with the facts, without its neighbours."""
    card = ModelCard.load(shipped / CARD)
    if done.licence != UNKNOWN:
        card.data.license = done.licence.identifier
    if card.data.eval_results:
        card.data.model_name = name

    # links lead to other models of the zoo, which do not lie beside the copy
    text = re.sub(r"\[([^]]*)\]\(\.\./[^)]*\)", r"\1", card.text)
    entry = find_entry(shipped.name)
    assert entry is not None
    theirs = ways_to_use(f"out/{shipped.name}", family_config(entry.family), local=True)
    text = text.replace(theirs, ways_to_use(name, config, local=True))
    text = text.replace(f" out/{shipped.name} ", f" {name} ")
    text = text.replace(COPY_MARK, f"## This copy\n\n{copy}")
    return f"---\n{card.data.to_yaml()}\n---\n{text}"
