"""`mim-refiner convert`.

Verified before it is kept, in shards, in any dtype, one copy of the weights in memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from mim_refiner_hf import CheckpointError, MimRefinerConfig, MimRefinerModel, load_encoder
from mim_refiner_hf.cli import main
from mim_refiner_hf.publishing import convert as convert_module
from mim_refiner_hf.publishing import hub
from mim_refiner_hf.publishing.convert import convert


def mae_file(path: Path, seed: int = 1) -> Path:
    """A tiny MAE in the original layout, with a decoder."""
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    config = MimRefinerConfig(**shape, image_size=32, patch_size=8)
    torch.manual_seed(seed)
    model = {
        f"{name}": tensor.clone() for name, tensor in MimRefinerModel(config).state_dict().items()
    }
    state = {
        "cls_token": model["embeddings.cls_token"],
        "pos_embed": torch.cat(
            [torch.zeros(1, 1, 32), model["embeddings.position_embeddings"]], dim=1
        ),
        "norm.weight": model["norm.weight"],
        "norm.bias": model["norm.bias"],
        "decoder_pred.weight": torch.zeros(192, 32),
    }
    for part in ("weight", "bias"):
        state[f"patch_embed.proj.{part}"] = model[f"embeddings.patch_embeddings.{part}"]
        for layer in range(2):
            ours, theirs = f"layers.{layer}", f"blocks.{layer}"
            qkv = [model[f"{ours}.attention.{name}_proj.{part}"] for name in "qkv"]
            state[f"{theirs}.attn.qkv.{part}"] = torch.cat(qkv)
            state[f"{theirs}.attn.proj.{part}"] = model[f"{ours}.attention.o_proj.{part}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{theirs}.{name}.{part}"] = model[f"{ours}.{name}.{part}"]
    torch.save({"model": state}, path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return mae_file(tmp_path / "mae.pth")


def convert_command(source: Path, destination: Path, *flags: str) -> int:
    return main(["convert", str(source), str(destination), "--num_heads", "2", *flags])


@pytest.mark.parametrize(
    "case",
    [
        "mae",
        "dbot",
        "crossmae",
        "maws",
        "dino",
        "data2vec2",
        "mimrefiner-prenorm",
        "mimrefiner-postnorm",
    ],
)
def test_a_converted_golden_gives_the_authors_outputs(
    goldens: Path, tmp_path: Path, case: str
) -> None:
    facts = json.loads((goldens / case / "config.json").read_text())
    file = next(
        path for path in sorted((goldens / case).glob("checkpoint*")) if "encoder" not in path.name
    )
    done = convert(file, tmp_path / "model", num_heads=facts["num_heads"])
    model = AutoModel.from_pretrained(tmp_path / "model")
    pixels = load_file(goldens / case / "inputs.safetensors")["pixel_values"]
    expected = load_file(goldens / case / "outputs.safetensors")
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state
    wanted = expected["tokens_normed" if "tokens_normed" in expected else "tokens_prenorm"]
    torch.testing.assert_close(tokens, wanted, atol=2e-4, rtol=1e-4)
    assert done.difference == 0.0 and done.parameters == model.num_parameters()


def test_the_command_writes_a_complete_folder_and_says_what_it_checked(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert_command(source, tmp_path / "model") == 0
    said = capsys.readouterr().out
    assert "mae: 38 of 38 placed; decoder: 1 dropped" in said and "read back and compared" in said
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
        "modeling_mim_refiner.py",
    } <= names
    card = (tmp_path / "model" / "README.md").read_text()
    assert "sha256" in card and "MAE (facebookresearch/mae)" in card.replace("&#45;", "-")
    assert AutoImageProcessor.from_pretrained(tmp_path / "model").crop_size["height"] == 32


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.05), ("float16", 0.005)])
def test_dtype_is_written_and_its_rounding_is_measured(
    source: Path, tmp_path: Path, dtype: str, bound: float
) -> None:
    done = convert(source, tmp_path / "model", dtype=dtype, num_heads=2)
    assert {str(t.dtype) for t in load_file(tmp_path / "model" / "model.safetensors").values()} == {
        f"torch.{dtype}"
    }
    assert AutoModel.from_pretrained(tmp_path / "model").dtype == getattr(torch, dtype)
    assert 0 < done.rounding < bound and done.difference == 0
    assert f"{done.rounding:.1e}" in (tmp_path / "model" / "README.md").read_text()


def test_shards_load_everywhere(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "MAX_SHARD_SIZE", "30KB")
    convert(source, tmp_path / "model", num_heads=2)
    shards = list((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "model" / "model.safetensors.index.json").is_file()
    original = load_encoder(source, num_heads=2).state_dict()
    for loaded in (AutoModel.from_pretrained(tmp_path / "model"), load_encoder(tmp_path / "model")):
        assert all(
            torch.equal(tensor, original[name]) for name, tensor in loaded.state_dict().items()
        )


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_result_that_differs_is_not_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    encode, calls = convert_module.encode_fixed_input, []

    def unfaithful(encoder: Any) -> torch.Tensor:
        calls.append(encoder)
        return encode(encoder) + (error if len(calls) == 2 else 0)

    monkeypatch.setattr(convert_module, "encode_fixed_input", unfaithful)
    with pytest.raises(CheckpointError, match="read back"):
        convert(source, tmp_path / "out" / "model", num_heads=2)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_earlier_model_stays_until_the_new_one_is_verified(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "model", num_heads=2)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    torch.save({"model": {"cls_token": torch.zeros(1)}}, tmp_path / "broken.pth")
    assert convert_command(tmp_path / "broken.pth", tmp_path / "model") == 2
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    convert(mae_file(tmp_path / "other.pth", seed=2), tmp_path / "model", num_heads=2)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--push", "no-user"], "no-user"),
        (["--family", "mea"], "mea"),
        (["--num_heads", "5"], "5"),
    ],
)
def test_wrong_use_exits_2_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["convert", str(source), str(tmp_path / "model"), "--num_heads", "2", *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".tmp*"))


def test_a_folder_that_is_no_model_is_not_overwritten(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("mine")
    assert convert_command(source, tmp_path / "photos") == 2
    assert "will not be overwritten" in capsys.readouterr().err
    assert (tmp_path / "photos" / "cat.txt").read_text() == "mine"


def test_a_missing_source_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_command(tmp_path / "nowhere.pth", tmp_path / "model") == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_the_push_goes_through_the_stub_hub(stub_hub: Any, source: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        **stub_hub.env(),
        "HF_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }
    flags = ["--num_heads", "2", "--push", "tester/converted", "--license", "cc-by-nc-4.0"]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "mim_refiner_hf.cli",
            "convert",
            str(source),
            str(tmp_path / "model"),
            *flags,
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    pushed = stub_hub.repos["tester/converted"]["files"]
    assert pushed["model.safetensors"] == (tmp_path / "model" / "model.safetensors").read_bytes()
    assert b"tester/converted" in pushed["README.md"]
    assert b"\nlicense: cc-by-nc-4.0\n" in pushed["README.md"]


def test_a_model_of_the_zoo_brings_its_reported_numbers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mim_refiner_hf.conversion.read.fetch", lambda entry: source)
    assert convert_command(Path("mae-l16"), tmp_path / "mae-l16") == 0
    card = ModelCard.load(tmp_path / "mae-l16" / "README.md")
    assert {result.metric_type for result in card.data.eval_results} >= {"accuracy", "nmi"}
    assert "reported by the paper" in card.text or "Reported by the paper" in card.text
    assert "38 of 38 placed" in card.text and "](../" not in card.text
    assert (tmp_path / "mae-l16" / ".eval_results" / "imagenet-1k.yaml").is_file()
