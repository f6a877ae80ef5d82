"""Every class of transformers and model of timm, in, refined and out: python -m benchmarks.families

Takes the cases of the tests (tests/test_transformers_encoders.py, tests/test_export_back.py and
tests/test_timm_models.py): each is built tiny and random, loaded, compared with itself at two
sizes, refined for three steps, and exported back to its own library. Writes
benchmarks/results/families.md. Needs the extra `test`. About two minutes on one core.
"""

import argparse
import datetime
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mim_refiner_hf import MimRefinerModel, load_encoder
from mim_refiner_hf.publishing.export import export
from mim_refiner_hf.publishing.hub import save_model_folder

# the cases stand in the tests, which are no package
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import test_export_back as back
import test_timm_models as timms
import test_transformers_encoders as classes

VERSIONS = ("torch", "transformers", "timm")
SIZES = ((32, 32), (48, 24))
TITLES = (
    "source",
    "tokens",
    "vector",
    "tokens, other size",
    "vector, other size",
    "refined",
    "goes out as",
    "difference",
)
NONE = "-"

Outputs = tuple[Tensor, Tensor]
"""Tokens (B, T, D) and the pooled vector (B, D)."""
Source = Callable[[Tensor], Outputs]
"""What a model of another library makes of images (B, 3, H, W)."""


@dataclass(frozen=True)
class Row:
    """One source: what its row of the table says, and whether it came in and went out."""

    cells: tuple[str, ...]
    came_in: bool
    went_out: bool


def shown(difference: float) -> str:
    """One digit is enough; a true zero stands out."""
    return f"{difference:.0e}" if difference else "0"


def shape(size: tuple[int, int]) -> str:
    """Height and width as a reader writes them."""
    return " x ".join(map(str, size))


def differences(encoder: MimRefinerModel, theirs: Source, size: tuple[int, int]) -> tuple[str, str]:
    """Worst absolute differences of the tokens and of the pooled vector on random images."""
    pixels = torch.randn(2, 3, *size)
    ours = encoder(pixels, interpolate_pos_encoding=True)
    tokens, vector = theirs(pixels)
    return (
        shown((ours.last_hidden_state - tokens).abs().max().item()),
        shown((ours.pooler_output - vector).abs().max().item()),
    )


def refined_and_out(
    encoder: MimRefinerModel, folder: Path, to: str
) -> tuple[tuple[str, ...], bool]:
    """The last three cells of a row, and whether the encoder went out."""
    with torch.enable_grad():
        losses = classes.three_steps(encoder)
    encoder.eval()
    refined = "finite loss" if all(map(math.isfinite, losses)) else f"LOSS {losses}"

    save_model_folder(folder / "model", encoder, encoder.image_processor)
    try:
        found = export(folder / "model", folder / to, to)
    except ValueError as error:
        reason = str(error).split(" cannot be exported to ")[-1].split(": ", 1)[-1]
        return (refined, reason.split("; --to")[0], NONE), False

    stated = json.loads((folder / to / "config.json").read_text(encoding="utf-8"))
    name = stated["architectures"][0] if to == "native" else stated["architecture"]
    return (refined, f"`{name}`", shown(max(found.values()))), True


def measured(
    title: str, encoder: MimRefinerModel, theirs: Source, other_size: bool, folder: Path, to: str
) -> Row:
    """The row of a source that was loaded."""
    cells = [title, *differences(encoder, theirs, SIZES[0])]
    cells += differences(encoder, theirs, SIZES[1]) if other_size else (NONE, NONE)
    rest, went_out = refined_and_out(encoder, folder, to)
    return Row((*cells, *rest), came_in=True, went_out=went_out)


def refused(name: str, key: str, folder: Path) -> Row:
    """The row of a source that does not load, with the sentence that it is refused by.

    Args:
        key: of its configuration, which says its name.
    """
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({key: name}), encoding="utf-8")
    try:
        load_encoder(folder)
    except ValueError as error:
        reason = str(error).replace(str(folder), "it")
    else:
        raise AssertionError(f"`{name}` was to be refused")
    # which classes there are says the table itself
    before, bracket, after = reason.partition(" known here (")
    if bracket:
        reason = before + after.partition(")")[2].removesuffix("; give one of these")
    empty = (NONE,) * 5
    return Row((f"`{name}`", *empty, reason, NONE), came_in=False, went_out=False)


# --- transformers' classes ------------------------------------------------------------------------


def class_row(name: str, folder: Path) -> Row:
    """The row of a class of transformers."""
    case = back.EVERY[name]
    model = classes.saved(folder / "theirs", case)

    def theirs(pixels: Tensor) -> Outputs:
        output = classes.their_output(model, pixels, case.resize)
        return output.last_hidden_state, case.pooled(output)

    # the class with a table takes no other size
    other_size = not case.name.startswith("Aimv2") or name == "aimv2-native"
    encoder = load_encoder(folder / "theirs")
    title = f"`{type(model).__name__}` ({name})"
    return measured(title, encoder, theirs, other_size, folder, "native")


# --- timm's models --------------------------------------------------------------------------------


def timm_row(name: str, folder: Path) -> Row:
    """The row of a model of timm."""
    architecture, settings = timms.MODELS[name]
    kind = name.split("-")[0]
    # its class for relative positions takes one size
    other_size = kind != "beit" and "distilled" not in name
    if other_size:
        settings = {**settings, "dynamic_img_size": True}
    model = timms.tiny(architecture, **settings)

    def theirs(pixels: Tensor) -> Outputs:
        tokens = model.forward_features(pixels)
        return tokens, model.forward_head(tokens, pre_logits=True)

    encoder = load_encoder(model)
    # timm resizes a table with antialiasing, and the authors of plain ViTs without
    if kind == "vit":
        encoder.config.position_resampling = "bicubic_antialias"
    title = f"`{architecture}` ({name})"
    return measured(title, encoder, theirs, other_size, folder, "timm")


def rows() -> tuple[list[Row], list[Row]]:
    """Those of transformers' classes and those of timm's models, the refused ones last."""
    jobs: list[list[Callable[[Path], Row]]] = [[], []]
    jobs[0] += [partial(class_row, name) for name in back.EVERY]
    jobs[0] += [partial(refused, name, "model_type") for name in classes.REFUSED]
    jobs[1] += [partial(timm_row, name) for name in timms.MODELS]
    jobs[1] += [partial(refused, name, "architecture") for name in timms.REFUSED]

    tables: tuple[list[Row], list[Row]] = ([], [])
    for table, work in zip(tables, jobs, strict=True):
        for job in work:
            torch.manual_seed(0)
            with tempfile.TemporaryDirectory() as folder:
                table.append(job(Path(folder)))
            print(*table[-1].cells, sep=" | ", flush=True)
    return tables


def table_of(found: list[Row]) -> list[str]:
    """The rows as Markdown."""
    lines = [f"| {' | '.join(TITLES)} |", f"|{'---|' * len(TITLES)}"]
    return lines + [f"| {' | '.join(row.cells)} |" for row in found]


@torch.no_grad()
def main(page: Path) -> None:
    """Measure all sources and write the page."""
    of_transformers, of_timm = rows()
    every = of_transformers + of_timm
    came_in = sum(row.came_in for row in every)
    went_out = sum(row.went_out for row in every)
    versions = ", ".join(f"{package} {version(package)}" for package in VERSIONS)

    text = [
        f"# {came_in} of {len(every)} sources come in, {went_out} go out",
        "",
        "Each source is built tiny and random (2 blocks, 32 or 48 wide, random values in every",
        "parameter), loaded, and compared with itself: worst absolute difference of all tokens and",
        f"of the pooled vector at {shape(SIZES[0])} pixels and at {shape(SIZES[1])}, fp32. Then it",
        "is refined for three steps, saved, and exported back to its own library, loaded by that",
        "and compared (tokens and vector; of transformers' classes at two sizes). A sentence says",
        "what is in the way. timm resizes tables of positions with antialiasing: its plain ViTs",
        "are compared at the other size with",
        '`encoder.config.position_resampling = "bicubic_antialias"`. A size that the source does',
        "not take has no figures.",
        "",
        "```bash",
        "python -m benchmarks.families",
        "```",
        "",
        "## transformers",
        "",
        *table_of(of_transformers),
        "",
        "## timm",
        "",
        *table_of(of_timm),
        "",
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), {versions}",
    ]
    page.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "families.md",
        help="page to write",
    )
    main(parser.parse_args().out)
