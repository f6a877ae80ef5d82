"""NaN and infinity are stored nowhere: one line says how many, which first, and what to do."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_store import COUNT, SHARD, embed, make_encoder, make_processor, write_photos
from torch import Tensor

from mim_refiner_hf import MimRefinerModel
from mim_refiner_hf.cli import main
from mim_refiner_hf.evaluation.shard_files import shard_is_intact
from mim_refiner_hf.publishing.convert import convert
from mim_refiner_hf.publishing.hub import save_model_folder
from mim_refiner_hf.runs.run_folder import save_start
from mim_refiner_hf.runtime.checkpoint import load_latest, save_checkpoint
from mim_refiner_hf.runtime.files import sha256_of
from mim_refiner_hf.runtime.finite import NotFiniteTensorError

VALUES = [float("nan"), float("inf"), -float("inf")]


def spoilt(value: float) -> MimRefinerModel:
    """An encoder with one bad weight."""
    encoder = make_encoder()
    with torch.no_grad():
        encoder.layers[1].mlp.fc1.weight[3, 4] = value
    return encoder


def as_model(folder: Path, encoder: MimRefinerModel) -> None:
    save_model_folder(folder, encoder, make_processor())


def as_start(folder: Path, encoder: MimRefinerModel) -> None:
    save_start(folder, encoder, make_processor())


def as_checkpoint(folder: Path, encoder: MimRefinerModel) -> None:
    save_checkpoint(folder, step=2, tensors=encoder.state_dict(), state={}, keep=1)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("store", [as_model, as_start, as_checkpoint])
def test_weights_are_refused_by_name(
    store: Callable[[Path, MimRefinerModel], None], value: float, tmp_path: Path
) -> None:
    first = r"1 of \d+ tensors hold NaN or infinity, first layers.1.mlp.fc1.weight \(1 of its 2048"
    with pytest.raises(NotFiniteTensorError, match=first):
        store(tmp_path / "new", spoilt(value))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_checkpoint_before_stays(tmp_path: Path) -> None:
    weights: dict[str, Tensor] = {"weight": torch.ones(3), "count": torch.ones(2, dtype=torch.int)}
    save_checkpoint(tmp_path, step=1, tensors=weights, state={}, keep=1)
    with pytest.raises(NotFiniteTensorError, match="after step 2 is not written: 1 of 2 tensors"):
        weights["weight"] = weights["weight"] / 0
        save_checkpoint(tmp_path, step=2, tensors=weights, state={}, keep=1)
    found = load_latest(tmp_path)
    assert found is not None and found.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_weights_that_overflow_in_half_precision_are_not_converted(tmp_path: Path) -> None:
    encoder = make_encoder()
    with torch.no_grad():
        encoder.layers[0].norm1.weight.fill_(1e6)
    as_model(tmp_path / "source", encoder)
    with pytest.raises(
        NotFiniteTensorError, match=r"first layers.0.norm1.weight .*dtype='float32'"
    ):
        convert(tmp_path / "source", tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """A model of finite weights that gives infinity for every image."""
    encoder = make_encoder()
    with torch.no_grad():
        encoder.layers[3].mlp.fc2.bias.fill_(3e38)
        encoder.layers[2].mlp.fc2.bias.fill_(3e38)
    as_model(tmp_path / "model", encoder)
    return tmp_path / "model"


@pytest.mark.parametrize("command", ["embed", "evaluate", "cluster", "export"])
def test_commands_refuse_a_model_whose_outputs_overflow(
    command: str, overflowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_photos(tmp_path / "data")
    out = tmp_path / "out"
    images = [str(photos), "--model", str(overflowing), "--num_workers", "0"]
    words = {
        "embed": [*images, "--out", str(out)],
        "evaluate": [*images, "--features", str(tmp_path / "kept"), "--output_dir", str(out)],
        "cluster": [*images, "--out", str(out)],
        "export": [str(overflowing), str(out), "--to", "timm"],
    }[command]
    assert main([command, *words]) in (1, 2)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    if command == "export":
        assert "hold NaN or infinity in the source itself" in line
    else:
        assert re.search(r"of (\d+) of \1 images are not finite, first those of .*\.png; ", line)
        assert "check the model" in line
    assert not out.exists() and not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize("value", VALUES)
def test_a_shard_with_one_bad_row_is_not_recorded(value: float, tmp_path: Path) -> None:
    """Those before it are kept, and the next call computes only the others."""
    photos = write_photos(tmp_path)
    encoder = make_encoder()
    seen = []

    def spoil(_module: object, _inputs: object, output: Tensor) -> Tensor:
        for row in output:
            seen.append(1)
            if len(seen) == SHARD + 2:
                row[..., 0] = value
        return output

    hook = encoder.layers[3].mlp.fc2.register_forward_hook(spoil)
    bad = rf"block3.cls of 1 of {SHARD} images are not finite, first those of .*06\.png; check"
    with pytest.raises(ValueError, match=bad):
        embed(photos, tmp_path / "out", encoder)
    assert [path.name for path in (tmp_path / "out/records").iterdir()] == ["00000.json"]
    hook.remove()
    assert len(embed(photos, tmp_path / "out", encoder)) == COUNT


def test_what_earlier_versions_stored_is_not_taken_for_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    embed(write_photos(tmp_path), out)
    shard, record = out / "shards/00002.parquet", out / "records/00002.json"
    for spoil in (False, True):
        table = pq.read_table(shard)
        column = table.column("block3.cls").combine_chunks().flatten().to_pylist()
        if spoil:
            column[5] = VALUES[0]
        field = table.schema.field("block3.cls")
        array = pa.FixedSizeListArray.from_arrays(pa.array(column, pa.float32()), type=field.type)
        place = table.schema.get_field_index("block3.cls")
        pq.write_table(table.set_column(place, field, array), shard)
        about = json.loads(record.read_text()) | {"sha256": sha256_of(shard)}
        about["size"] = shard.stat().st_size
        about.pop("finite", None)
        record.write_text(json.dumps(about))
        assert shard_is_intact(out, 2) is not spoil
    store = embed(tmp_path / "photos", out)
    assert store.features("block3.cls").isfinite().all()
