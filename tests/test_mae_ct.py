"""MAE-CT's released files, as the names of the zoo load them: the authors' tokens and vectors.

A file of the authors' layout stands in the place of the download.
"""

from pathlib import Path

import pytest
import torch
from golden_cases import GOLDENS, contents, encoder_state, encoder_tensors, facts, tensors
from torch import Tensor

from mim_refiner_hf.conversion import CheckpointError, load_encoder, read
from mim_refiner_hf.conversion.zoo import ZOO, find_entry
from mim_refiner_hf.model.modeling_mim_refiner import MimRefinerModel

CASE = "maect-encoder"
FILES = ("checkpoint.th", "checkpoint_legacy_pos.th")
TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}
# as the authors call them
_SIZES = ("base16", "large16", "huge16", "huge14")
NAMES = [
    *(f"{stem}_{size}" for stem in ("maect", "maectaug") for size in _SIZES),
    *(f"mae_reimpl_{size}" for size in _SIZES[:3]),
]


def by_name(monkeypatch: pytest.MonkeyPatch, name: str, file: str) -> MimRefinerModel:
    """The encoder of a name of the zoo whose download is a file of the case."""
    monkeypatch.setattr(read, "fetch", lambda entry: GOLDENS / CASE / file)
    return load_encoder(name, num_heads=facts(CASE)["num_heads"])


def test_the_names_are_those_of_the_authors() -> None:
    for name in NAMES:
        entry = find_entry(name)
        assert entry is not None
        assert entry.url == f"https://ml.jku.at/research/maect/download/{name}.th"
    ours = [name for name in ZOO if name.startswith(("mae-ct-", "mae-reimpl-"))]
    assert len({find_entry(name) for name in NAMES}) == len(NAMES) == len(ours)


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_zoo_gives_the_authors_outputs(
    monkeypatch: pytest.MonkeyPatch, name: str, file: str
) -> None:
    encoder = by_name(monkeypatch, name, file)
    count = encoder_tensors(encoder_state(contents(CASE, file)), "maect")
    # the legacy file's row for CLS is no tensor of ours
    assert (encoder.load_report.placed, encoder.load_report.dropped) == (count, {})
    is_base = name.endswith("base16")
    assert encoder.config.pooling == ("mean" if is_base else "cls")

    inputs, expected = tensors(CASE)
    for size in ("", "lowres."):
        pixels = inputs["pixel_values_lowres" if size else "pixel_values"]
        with torch.no_grad():
            output = encoder(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
        normed = expected[f"{size}tokens_normed"]
        got: dict[str, tuple[Tensor, Tensor]] = {
            "embeddings": (output.hidden_states[0], expected[f"{size}embeddings"]),
            "blocks": (torch.stack(output.hidden_states[1:]), expected[f"{size}blocks"]),
            "output": (output.last_hidden_state, normed),
            "pooled": (output.pooler_output, normed[:, 1:].mean(1) if is_base else normed[:, 0]),
        }
        for what, (ours, theirs) in got.items():
            torch.testing.assert_close(ours, theirs, **TOLERANCE, msg=f"{size}{what}")


@pytest.mark.usefixtures("goldens")
def test_a_table_that_fits_no_square_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = encoder_state(contents(CASE, FILES[0]))
    state["pos_embed"] = torch.cat([state["pos_embed"]] * 3, dim=1)
    torch.save({"state_dict": state}, tmp_path / "odd.th")
    with pytest.raises(CheckpointError, match=r"position_embeddings"):
        load_encoder(tmp_path / "odd.th", family="maect", num_heads=facts(CASE)["num_heads"])
