"""Sources that cannot become an encoder.

Each is refused in one sentence that says what was found and what to do.
"""

from pathlib import Path

import pytest
import torch
import transformers
from golden_cases import encoder_tensors, facts
from safetensors.torch import load_file, save_file
from small_checkpoints import TINY, save_mae

from mim_refiner_hf.conversion import CheckpointError, load_encoder
from mim_refiner_hf.model.configuration_mim_refiner import MimRefinerConfig
from mim_refiner_hf.model.modeling_mim_refiner import MimRefinerForImageClassification


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist; give a Hub name"):
        load_encoder("nowhere.pth")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no model"):
        load_encoder(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=f"its folder model/ does: give {tmp_path}/model"):
        load_encoder(tmp_path)
    with pytest.raises(
        CheckpointError, match="neither a local path nor a model that the Hub could deliver"
    ):
        load_encoder("nobody/no-such-model")


def test_unknown_files(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {"conv1.weight": torch.zeros(3)}, "epoch": 1}, tmp_path / "resnet.pth"
    )
    with pytest.raises(
        CheckpointError,
        match=r"no known family; top-level keys: state_dict, epoch; tensors: "
        r"state_dict\.conv1\.weight",
    ):
        load_encoder(tmp_path / "resnet.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(CheckpointError, match="holds a Tensor, not a dictionary"):
        load_encoder(tmp_path / "tensor.pth")
    torch.save(
        {"decoder_embed.weight": torch.zeros(3), "mask_token": torch.zeros(1)},
        tmp_path / "decoder.pth",
    )
    with pytest.raises(CheckpointError, match="holds a decoder only"):
        load_encoder(tmp_path / "decoder.pth")
    with pytest.raises(
        CheckpointError, match=r"family='resnet' is unknown; allowed: mim_refiner, vit_mae"
    ):
        load_encoder(tmp_path / "resnet.pth", family="resnet")
    with pytest.raises(CheckpointError, match="nothing under model"):
        load_encoder(tmp_path / "resnet.pth", family="mae")


def test_unknown_folders(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "swin"}')
    with pytest.raises(CheckpointError, match="model_type='swin', not a plain ViT known here"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_encoder(tmp_path)
    transformers.ViTModel(transformers.ViTConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"need the config\.json beside them: give their folder"
    ):
        load_encoder(tmp_path / "model.safetensors")


def test_transformers_decoder_only(tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(**TINY, decoder_hidden_size=16, decoder_num_hidden_layers=1)
    transformers.ViTMAEForPreTraining(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in state.items() if name.startswith("decoder.")},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(
        CheckpointError, match="holds no encoder of transformers' ViTMAE, only decoder: 24 tensors"
    ):
        load_encoder(tmp_path)


@pytest.mark.parametrize("kind", ["mae", "data2vec2", "vit", "beit", "ours"])
def test_fine_tuned_classifiers_are_refused(
    tmp_path: Path, mae_state: dict[str, torch.Tensor], kind: str
) -> None:
    path = tmp_path
    if kind == "mae":
        width = facts("mae")["dim"]
        extra = {
            "fc_norm.weight": torch.ones(width),
            "head.weight": torch.zeros(10, width),
            "head.bias": torch.zeros(10),
        }
        path = save_mae(tmp_path, mae_state | extra)
    elif kind == "data2vec2":
        path = save_mae(
            tmp_path,
            {"model.blocks.0.norm1.weight": torch.ones(8), "head.weight": torch.zeros(10, 8)},
        )
    elif kind == "ours":
        MimRefinerForImageClassification(MimRefinerConfig(**TINY, num_labels=3)).save_pretrained(
            tmp_path
        )
    else:
        config = (
            transformers.ViTConfig(**TINY) if kind == "vit" else transformers.BeitConfig(**TINY)
        )
        transformers.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"is a fine-tuned classifier \(.*\), not a pre-trained encoder: load the checkpoint",
    ):
        load_encoder(path)


def test_missing_tensors_are_counted_and_named(
    tmp_path: Path, mae_state: dict[str, torch.Tensor], mae_heads: int
) -> None:
    count = encoder_tensors(mae_state, "mae")
    del mae_state["blocks.1.attn.qkv.bias"]
    names = r"layers\.1\.attention\.q_proj\.bias, layers\.1\.attention\.k_proj\.bias"
    with pytest.raises(CheckpointError, match=rf"3 of {count} mae tensors are missing: {names}"):
        load_encoder(save_mae(tmp_path, mae_state), num_heads=mae_heads)


def test_every_source_tensor_must_have_a_place(
    tmp_path: Path, mae_state: dict[str, torch.Tensor], mae_heads: int
) -> None:
    mae_state["blocks.0.attn.q_norm.weight"] = torch.ones(16)
    with pytest.raises(
        CheckpointError, match=r"1 tensors have no place in MAE .*: blocks\.0\.attn\.q_norm\.weight"
    ):
        load_encoder(save_mae(tmp_path, mae_state), num_heads=mae_heads)


def test_wrong_shapes(tmp_path: Path, mae_state: dict[str, torch.Tensor], mae_heads: int) -> None:
    width = facts("mae")["dim"]
    hidden = width * facts("mae")["mlp_ratio"]
    patches = mae_state["pos_embed"].shape[1] - 1
    cases = [
        (
            {"blocks.1.mlp.fc1.weight": torch.zeros(hidden + 1, width)},
            rf"layers\.1\.mlp\.fc1\.weight is \[{hidden + 1}, {width}\], "
            rf"expected \[{hidden}, {width}\]",
        ),
        # one patch more than a square
        (
            {"pos_embed": torch.zeros(1, patches + 2, width)},
            rf"position_embeddings is \[1, {patches + 1}, {width}\], "
            rf"expected \[1, {patches}, {width}\]",
        ),
        (
            {"pos_embed": torch.zeros(width)},
            rf"pos_embed has the unexpected shape \[{width}\]",
        ),
    ]
    for damage, message in cases:
        with pytest.raises(CheckpointError, match=message):
            load_encoder(save_mae(tmp_path, mae_state | damage), num_heads=mae_heads)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_weights(
    tmp_path: Path, mae_state: dict[str, torch.Tensor], mae_heads: int, value: float
) -> None:
    last = facts("mae")["depth"] - 1
    mae_state[f"blocks.{last}.norm2.weight"][5] = value
    message = "1 tensors hold NaN, infinite or integer values"
    with pytest.raises(CheckpointError, match=rf"{message}: layers\.{last}\.norm2\.weight"):
        load_encoder(save_mae(tmp_path, mae_state), num_heads=mae_heads)


def test_number_of_heads(goldens: Path) -> None:
    source = goldens / "mae/checkpoint_full.pth"
    width = facts("mae")["dim"]
    message = rf"width {width} is none of the published ones .*; pass num_heads="
    with pytest.raises(CheckpointError, match=message):
        load_encoder(source)

    uneven = next(heads for heads in range(2, width) if width % heads)
    message = f"cannot be built: num_attention_heads={uneven} must divide hidden_size={width}"
    with pytest.raises(CheckpointError, match=message):
        load_encoder(source, num_heads=uneven)

    stated = facts("data2vec2")["num_heads"]
    with pytest.raises(CheckpointError, match=rf"num_heads={stated + 1}, but .* states {stated}"):
        load_encoder(goldens / "data2vec2/checkpoint.pt", num_heads=stated + 1)
