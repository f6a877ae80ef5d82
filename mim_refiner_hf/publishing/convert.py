"""`convert`: any known checkpoint as a model folder for the Hub, verified by loading it back.

    mim-refiner convert mae_pretrain_vit_large.pth mae-l16                   # a file, a folder, a Hub name, or a name of the zoo
    mim-refiner convert d2v2_refined_h14 d2v2-refined-h14 --dtype bfloat16 --push user/d2v2-refined-h14

The order keeps one copy of the weights in memory: load, encode a fixed input, write in shards, let go, load what was written,
encode again, compare. Only then does the folder get its name; whatever fails before leaves nothing behind.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from ..conversion import CheckpointError, LoadReport, load_encoder
from ..conversion.layouts import LAYOUTS
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.image_processing_mim_refiner import MimRefinerImageProcessor
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.files import sha256_of, staged_folder
from ..runtime.text import fenced, plain
from .hub import CARD, check_model_folder, write_model
from .model_card import REPO_PLACEHOLDER, TAGS, is_hub_name
from .zoo_card import eval_files, render_card
from .zoo_results import find_results, starting_point

TEMPLATE, COPY = (
    Path(__file__).with_name(name)
    for name in ("conversion_card.md.jinja", "conversion_facts.md.jinja")
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = 1e-5
"""Largest difference between the outputs before writing and after reading back, relative to the largest output."""


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

    def __str__(self) -> str:
        return (
            f"{self.report}\n{self.parameters / 1e6:.1f} M parameters in {self.dtype}, read back and compared: largest relative "
            f"difference {self.difference:.1e} ({self.seconds:.0f} s)\nThe model: {self.folder}"
        )


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    family: str | None = None,
    dtype: str | None = None,
    num_heads: int | None = None,
    revision: str | None = None,
) -> Conversion:
    """Write any checkpoint that `load_encoder` knows as a model folder: safetensors, configuration, preprocessing, code, card.

    Args:
        source, family, num_heads, revision: as for `load_encoder`.
        destination: a new or empty folder, or an earlier model folder, which is replaced once the new one is verified.
        dtype: "float32", "bfloat16" or "float16"; None keeps the source's.

    Raises:
        ValueError: for a destination that holds something else, or an unknown dtype; before anything is read.
        FileNotFoundError, CheckpointError: as `load_encoder`, or when what was written does not give the same outputs.
    """
    began = time.perf_counter()
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    with staged_folder(Path(destination), check_model_folder) as new:
        encoder = load_encoder(source, family=family, revision=revision, num_heads=num_heads)
        report: LoadReport = vars(encoder)["load_report"]
        processor: MimRefinerImageProcessor = vars(encoder)["image_processor"]
        parameters, rounding = encoder.num_parameters(), 0.0
        if dtype is not None and DTYPES[dtype] != encoder.dtype:
            exact = encode(encoder)
            encoder.to(DTYPES[dtype])  # type: ignore[arg-type]
            rounding = relative_difference(exact, encode(encoder))
        expected, written = encode(encoder), encoder.dtype
        write_model(new, encoder, processor, written)
        config = encoder.config
        del encoder  # its memory is wanted for the one read back
        difference = relative_difference(expected, encode(load_encoder(new)))
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"{source}: the model read back from {new} differs by {difference:.1e} (at most {TOLERANCE} is allowed), so it was "
                "not kept; is the disk or the memory of this machine faulty?"
            )
        digest = sha256_of(Path(source)) if Path(source).is_file() else None
        name = Path(destination).resolve().name
        done = Conversion(
            Path(destination), str(source), digest, str(report), parameters, str(written).removeprefix("torch."),
            difference, rounding, time.perf_counter() - began,
        )  # fmt: skip
        facts = describe(report.family, config, processor)
        for file, text in render(name, done, facts).items():
            (new / file).parent.mkdir(exist_ok=True)
            (new / file).write_text(text, encoding="utf-8")
    return done


def describe(
    family: str, config: MimRefinerConfig, processor: MimRefinerImageProcessor
) -> dict[str, str]:
    """What a reader of the card wants to know of the encoder: family, shape, input, feature."""
    height, width = config.image_hw
    blocks, heads = config.num_hidden_layers, config.num_attention_heads
    return {
        "Family": next(layout.title for layout in LAYOUTS if layout.family == family),
        "Shape": f"{blocks} blocks of width {config.hidden_size}, {heads} heads, patch {config.patch_size}",
        "Input": f"{height} x {width} pixels, mean {processor.image_mean}, standard deviation {processor.image_std}",
        "Feature": f"pooler_output: {config.pooling} of the {config.features.replace('_', ' ')}",
    }


def encode(encoder: MimRefinerModel) -> Tensor:
    """The tokens (1, T, D), fp32, that an encoder gives for a fixed input of its native size: standard normal pixels, seed 0."""
    config = encoder.config
    pixels = torch.randn(
        1, config.num_channels, *config.image_hw, generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        return encoder(pixels).last_hidden_state.float()


def relative_difference(expected: Tensor, got: Tensor) -> float:
    """max |expected - got| / max |expected|; NaN where either holds one."""
    return float((expected - got).abs().max() / expected.abs().max())


def render(name: str, done: Conversion, facts: dict[str, str]) -> dict[str, str]:
    """File -> text: the card, and what the Hub reads beside it. A model of the zoo brings its reported numbers; others claim none."""
    copy = jinja2.Template(COPY.read_text(encoding="utf-8")).render(
        facts={key: plain(value) for key, value in facts.items()},
        done=done,
        report=plain(done.report),
    )
    if (released := find_results(done.source)) is not None:
        files = {f".eval_results/{file}": text for file, text in eval_files(released).items()}
        return {CARD: render_card(plain(name), released, starting_point(released), copy), **files}
    optional: dict[str, Any] = (
        {"base_model": done.source, "base_model_relation": "finetune"}
        if is_hub_name(done.source)
        else {}
    )
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="image-feature-extraction",
            tags=TAGS,
            **optional,
        ),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=plain(name),
        repo_id=REPO_PLACEHOLDER,
        source=plain(done.source if is_hub_name(done.source) else Path(done.source).name),
        copy=copy,
        command=fenced(f"mim-refiner convert {done.source} {name}", "bash"),
    )
    return {CARD: str(card)}


__all__ = ["Conversion", "convert"]
