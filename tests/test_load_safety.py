"""Nothing in a checkpoint is executed, and no damaged tensor passes.

Planted pickles, and every tensor damaged in every way.
"""

import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import TENSOR_DAMAGES, State, tiny_encoder
from golden_cases import GOLDENS, contents, facts
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

from mim_refiner_hf.conversion import CheckpointError, load_encoder
from mim_refiner_hf.conversion.digests import DIGESTS
from mim_refiner_hf.conversion.layouts import LAYOUTS
from mim_refiner_hf.model.image_processing_mim_refiner import MimRefinerImageProcessor
from mim_refiner_hf.publishing import save_model_folder

# --- nothing is executed --------------------------------------------------------------------------


class Malicious:
    """Unpickling this runs a shell command."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that the attack would create; it is tried out first, and must be absent at the end."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Malicious(path)))
    assert path.exists()
    path.unlink()
    yield path
    assert not path.exists()


REFUSED = r"more than plain tensors.* would execute code while being read, which was refused"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".bin", ".pth.tar", ".safetensors"])
@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_no_pickle_is_executed(tmp_path: Path, canary: Path, suffix: str, form: str) -> None:
    path = tmp_path / f"evil{suffix}"
    evil = {"model": {"cls_token": torch.zeros(1, 1, 8), "extra": Malicious(canary)}}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(evil["model"]["extra"]))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(
        CheckpointError, match="unreadable" if suffix == ".safetensors" else REFUSED
    ) as error:
        load_encoder(path)
    # torch's own message advises weights_only=False
    assert "likely succeed" not in str(error.value)


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize("place", ["optimizer", "args", "state_dict"])
def test_no_pickle_inside_a_training_file_is_executed(
    tmp_path: Path, canary: Path, place: str
) -> None:
    evil = contents("mimrefiner-training-prenorm", "checkpoint.th")
    if place == "state_dict":
        evil["state_dict"]["norm.weight"] = Malicious(canary)
    else:
        evil[place] = Malicious(canary)
    torch.save(evil, tmp_path / "checkpoint.th")
    with pytest.raises(CheckpointError, match=REFUSED):
        load_encoder(tmp_path / "checkpoint.th")


def test_a_malicious_weight_file_of_a_folder_is_refused(tmp_path: Path, canary: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    torch.save({"cls_token": Malicious(canary)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=REFUSED):
        load_encoder(tmp_path)


def test_malicious_extra_files_are_not_touched(tmp_path: Path, canary: Path) -> None:
    """Beside good weights.

    Pickles under every usual name, and code that `config.json` asks to run.
    """
    folder, encoder = tmp_path / "model", tiny_encoder()
    save_model_folder(folder, encoder, MimRefinerImageProcessor())
    names = (
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "extra.th",
        "custom.pkl",
    )
    for name in names:
        torch.save(Malicious(canary), folder / name)
    for code in folder.glob("*.py"):
        code.write_text(f"open({str(canary)!r}, 'w')\n")
    loaded = load_encoder(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in encoder.state_dict().items())


# --- every tensor, damaged in every way -----------------------------------------------------------


# golden, file, key of its state dict
FAMILIES = [
    ("mae", "checkpoint_encoder.pth", "model"),
    ("dino", "checkpoint.pth", ""),
    ("ijepa", "checkpoint.pth.tar", "target_encoder"),
    ("conmim", "checkpoint.pth", "model"),
    ("mimrefiner-training-postnorm", "checkpoint_ema.th", "state_dict"),
    ("data2vec2", "checkpoint.pt", "model"),
]


def names_in(message: str, family: str, name: str) -> bool:
    """Whether an error names this tensor, by its name in the file or by one of ours it fills."""
    layout = next(layout for layout in LAYOUTS if layout.family == family)
    ours = layout.place(name, torch.zeros(3, 18, 3))
    assert isinstance(ours, dict)
    return any(candidate.replace("prenet.", "layers.") in message for candidate in (name, *ours))


def between_first_and_last_block(name: str, depth: int) -> bool:
    block = re.search(r"blocks\.(\d+)\.", name)
    return block is not None and 0 < int(block[1]) < depth - 1


@pytest.mark.slow
@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize(("case", "file", "path"), FAMILIES)
def test_damage_to_any_tensor_of_a_file_is_named(
    tmp_path: Path, case: str, file: str, path: str
) -> None:
    """In the first block, the last, and what is around them."""
    whole = contents(case, file)
    heads = facts(case)["num_heads"]
    report = load_encoder(GOLDENS / case / file, num_heads=heads).load_report
    lost = {name for names in report.dropped.values() for name in names}
    held = whole[path] if path else whole
    state: State = {
        name: tensor
        for name, tensor in held.items()
        if isinstance(tensor, Tensor) and name not in lost
    }
    depth = facts(case)["depth"]
    damaged = [name for name in state if not between_first_and_last_block(name, depth)]

    cases = 0
    missed = []
    for name in damaged:
        for damage in TENSOR_DAMAGES:
            broken = damage(state, name)
            if broken is None:
                continue
            cases += 1
            torch.save({**whole, path: broken} if path else broken, tmp_path / "broken.pth")
            try:
                load_encoder(tmp_path / "broken.pth", num_heads=heads)
                missed.append(f"{damage.__name__} {name}: accepted")
            except CheckpointError as error:
                if not names_in(str(error), report.family, name):
                    missed.append(f"{damage.__name__} {name}: {error}")
    # a vector cannot be transposed, and not every tensor has one of another shape beside it
    assert cases >= (len(TENSOR_DAMAGES) - 2) * len(damaged)
    assert not missed, f"{len(missed)} of {cases}: " + "\n".join(missed)


# --- our own folders: digests ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "model"
    save_model_folder(folder, tiny_encoder(), MimRefinerImageProcessor())
    return folder


def square_transposed(state: State, name: str) -> State | None:
    tensor = state[name]
    square = tensor.ndim > 1 and tensor.shape[-1] == tensor.shape[-2]
    return state | {name: tensor.transpose(-1, -2).contiguous()} if square else None


def same_shape_swapped(state: State, name: str) -> State | None:
    others = [key for key in state if key != name and state[key].shape == state[name].shape]
    return state | {name: state[others[0]], others[0]: state[name]} if others else None


def one_bit_flipped(state: State, name: str) -> State:
    tensor = state[name].clone()
    tensor.view(torch.int32).view(-1)[0] ^= 1
    return state | {name: tensor}


def test_any_change_to_any_tensor_of_our_folder_is_named(own_folder: Path, tmp_path: Path) -> None:
    """Also what no shape tells.

    Two tensors of one shape exchanged, a square matrix transposed, one bit.
    """
    state = load_file(own_folder / "model.safetensors")
    for file in ("config.json", "preprocessor_config.json", DIGESTS):
        (tmp_path / file).write_bytes((own_folder / file).read_bytes())
    cases = 0
    for name in state:
        for damage in (*TENSOR_DAMAGES, square_transposed, same_shape_swapped, one_bit_flipped):
            if (broken := damage(state, name)) is None:
                continue
            cases += 1
            save_file(broken, tmp_path / "model.safetensors")
            with pytest.raises(
                CheckpointError, match=rf"not the ones that {DIGESTS} describes: .*{name}"
            ):
                load_encoder(tmp_path)
    assert cases >= 270


def test_a_truncated_safetensors_file_names_what_it_lost(own_folder: Path, tmp_path: Path) -> None:
    whole = (own_folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    for name, entry in header.items():
        if name != "__metadata__":
            middle = start + sum(entry["data_offsets"]) // 2
            (tmp_path / "cut.safetensors").write_bytes(whole[:middle])
            with pytest.raises(
                CheckpointError, match=rf"cut\.safetensors is unreadable: truncated, without {name}"
            ):
                load_encoder(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("keep", [0, 10, 2000, -100])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files(tmp_path: Path, goldens: Path, keep: int, suffix: str) -> None:
    torch_file = goldens / "maws/checkpoint.pt"
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".safetensors":
        save_file(torch.load(torch_file, weights_only=True), whole)
    else:
        whole.write_bytes(torch_file.read_bytes())
    (tmp_path / f"cut{suffix}").write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"cut\{suffix} is unreadable: truncated"):
        load_encoder(tmp_path / f"cut{suffix}")


def copied(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_a_model_saved_into_its_own_folder_is_still_the_same_model(
    own_folder: Path, tmp_path: Path
) -> None:
    """By transformers, by ourselves, by another version of transformers, in another order.

    The bytes of the files change.
    """
    expected = load_encoder(own_folder)
    for save in (lambda: AutoModel.from_pretrained(tmp_path), lambda: load_encoder(tmp_path)):
        copied(own_folder, tmp_path)
        save().save_pretrained(tmp_path)
        AutoImageProcessor.from_pretrained(tmp_path).save_pretrained(tmp_path)
        assert (tmp_path / "preprocessor_config.json").read_bytes() != (
            own_folder / "preprocessor_config.json"
        ).read_bytes()
        config = json.loads((tmp_path / "config.json").read_text())
        reordered = dict(reversed((config | {"transformers_version": "6.0.0"}).items()))
        (tmp_path / "config.json").write_text(json.dumps(reordered, indent=7))
        again = load_encoder(tmp_path)
        place = {"_name_or_path": ""}
        assert again.config.to_dict() | place == expected.config.to_dict() | place
        assert all(
            torch.equal(tensor, expected.state_dict()[name])
            for name, tensor in again.state_dict().items()
        )


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_every_changed_field_is_refused(file: str, own_folder: Path, tmp_path: Path) -> None:
    fields = json.loads((copied(own_folder, tmp_path) / file).read_text())
    # the version of the format has a check of its own: test_versions.py
    written_by = ("transformers_version", "auto_map", "custom_pipelines", "format_version")
    used = [name for name in fields if name not in written_by]
    assert len(used) >= 11
    for name in used:
        for changed in (
            {**fields, name: [fields[name], 1]},
            {key: fields[key] for key in fields if key != name},
        ):
            (tmp_path / file).write_text(json.dumps(changed))
            with pytest.raises(
                CheckpointError,
                match=rf"{file} has not the fields that .* describes; .* remove its line from "
                rf"{DIGESTS}",
            ):
                load_encoder(tmp_path)
    (tmp_path / file).write_text(json.dumps({**fields, "rope_theta": 1}))
    with pytest.raises(CheckpointError, match="has not the fields"):
        load_encoder(tmp_path)


def test_digests_of_the_bytes_as_earlier_versions_wrote_them(
    own_folder: Path, tmp_path: Path
) -> None:
    copied(own_folder, tmp_path)
    digests = json.loads((tmp_path / DIGESTS).read_text())
    for name in ("config.json", "preprocessor_config.json"):
        digests[name] = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    (tmp_path / DIGESTS).write_text(json.dumps(digests))
    load_encoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 1}))
    with pytest.raises(CheckpointError, match="has not the fields"):
        load_encoder(tmp_path)


def test_digests_follow_the_folder_they_describe(own_folder: Path, tmp_path: Path) -> None:
    """A folder without digests loads.

    Other weights saved over ours are refused until the stale digests are gone.
    """
    encoder = load_encoder(own_folder)
    with torch.no_grad():
        encoder.norm.weight += 1
    copied(own_folder, tmp_path)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=rf"1 of {len(encoder.state_dict())} tensors .*: norm\.weight; .* delete its "
        rf"{DIGESTS}",
    ):
        load_encoder(tmp_path)
    (tmp_path / DIGESTS).unlink()
    assert torch.equal(load_encoder(tmp_path).norm.weight, encoder.norm.weight)
