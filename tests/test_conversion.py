"""Foreign checkpoints into our encoder: the authors' own outputs, transformers' folders, every way a source can be wrong."""

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mim_refiner_hf.configuration_mim_refiner import MimRefinerConfig
from mim_refiner_hf.conversion import CheckpointError, LoadReport, load_encoder
from mim_refiner_hf.conversion.layouts import LAYOUTS
from mim_refiner_hf.modeling_mim_refiner import MimRefinerForImageClassification, MimRefinerModel

GOLDENS = [  # case, file, prefix of its outputs, heads where the file does not state them, report
    ("mimrefiner-prenorm", "checkpoint.th", "", 3, "mim_refiner_prenorm: 70 of 70 placed"),
    ("mimrefiner-postnorm", "checkpoint.th", "", 4, "mim_refiner_postnorm: 70 of 70 placed"),
    ("mimrefiner-training-prenorm", "checkpoint.th", "raw.", None, "mim_refiner_prenorm: 70 of 70 placed"),
    ("mimrefiner-training-prenorm", "checkpoint_ema.th", "", None, "mim_refiner_prenorm: 70 of 70 placed"),
    ("mimrefiner-training-postnorm", "checkpoint_ema.th", "", None, "mim_refiner_postnorm: 70 of 70 placed"),
    ("mimrefiner-training-postnorm", "checkpoint_legacy_norm_name.th", "", None, "mim_refiner_postnorm: 70 of 70 placed"),
    ("mae", "checkpoint_full.pth", "", 3, "mae: 70 of 70 placed; decoder: 20 dropped"),
    ("mae", "checkpoint_encoder.pth", "zero_cls_pos.", 3, "mae: 70 of 70 placed"),
    ("dbot", "checkpoint_full.pth", "", 4, "dbot: 70 of 70 placed; decoder: 20 dropped"),
    ("crossmae", "checkpoint_full.pth", "", 2, "crossmae: 68 of 68 placed; decoder: 23 dropped"),
    ("maws", "checkpoint.pt", "", 3, "plain_vit: 70 of 70 placed"),
    ("dino", "checkpoint.pth", "", 3, "plain_vit: 70 of 70 placed"),
    (
        "data2vec2",
        "checkpoint.pt",
        "",
        None,
        "data2vec2: 70 of 70 placed; decoder: 8 dropped; moving average of the training: 54 dropped",
    ),
    (
        "data2vec2-prenet",
        "checkpoint.pt",
        "",
        None,
        "data2vec2: 86 of 86 placed; decoder: 8 dropped; moving average of the training: 66 dropped",
    ),
]
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Random values in every parameter, so that no tensor can be swapped or lost unnoticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1) * 0.5)
    return model.eval()


@pytest.fixture
def mae_state(goldens: Path) -> dict[str, torch.Tensor]:
    """The state dict of the official MAE golden, to be damaged."""
    return dict(torch.load(goldens / "mae/checkpoint_full.pth", weights_only=True)["model"])


def save_mae(folder: Path, state: dict[str, Any]) -> Path:
    torch.save({"model": state}, folder / "mae.pth")
    return folder / "mae.pth"


# --- the authors' own outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "file", "prefix", "num_heads", "report"), GOLDENS, ids=lambda value: str(value)[:40])
def test_original_files_give_the_outputs_of_the_original_code(
    goldens: Path, case: str, file: str, prefix: str, num_heads: int | None, report: str
) -> None:
    encoder = load_encoder(goldens / case / file, num_heads=num_heads)
    assert str(encoder.load_report) == report
    assert not encoder.training
    assert encoder.config.layer_norm_eps == 1e-6
    inputs, expected = (load_file(goldens / case / f"{kind}.safetensors") for kind in ("inputs", "outputs"))
    sizes = [size for size in ("", "lowres.") if f"{prefix}{size}blocks" in expected]
    assert sizes == (["", "lowres."] if "mimrefiner" in case else [""])
    for size in sizes:
        pixels = inputs["pixel_values_lowres" if size else "pixel_values"]
        with torch.no_grad():
            output = encoder(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
        got = {
            "embeddings": output.hidden_states[0],
            "blocks": torch.stack(output.hidden_states[1:]),
            "tokens_prenorm": output.hidden_states[-1],
            "tokens_normed" if encoder.config.final_norm else "tokens_prenorm": output.last_hidden_state,
        }
        for name, tokens in got.items():
            torch.testing.assert_close(tokens, expected[f"{prefix}{size}{name}"], atol=2e-4, rtol=1e-4, msg=f"{size}{name}")


def test_position_of_the_cls_token_is_folded_not_dropped(goldens: Path) -> None:
    """The golden's `pos_embed[:, 0]` is far from zero; CrossMAE's own encoder is the one that never adds it."""
    state = torch.load(goldens / "mae/checkpoint_full.pth", weights_only=True)["model"]
    encoder = load_encoder(goldens / "mae/checkpoint_full.pth", num_heads=3)
    torch.testing.assert_close(encoder.embeddings.cls_token, state["cls_token"] + state["pos_embed"][:, :1])
    assert state["pos_embed"][:, 0].abs().mean() > 0.1
    state = torch.load(goldens / "crossmae/checkpoint_full.pth", weights_only=True)["model"]
    encoder = load_encoder(goldens / "crossmae/checkpoint_full.pth", num_heads=2)
    assert torch.equal(encoder.embeddings.cls_token, state["cls_token"])


def test_legacy_names_are_told_by_what_the_file_states_not_by_their_order(goldens: Path, tmp_path: Path) -> None:
    """Sorted, `norm.*` stands after the blocks as a final norm would; the kind in `ctor_kwargs` still says post-norm."""
    file = goldens / "mimrefiner-training-postnorm/checkpoint_legacy_norm_name.th"
    contents = torch.load(file, weights_only=True)
    contents["state_dict"] = dict(sorted(contents["state_dict"].items()))
    torch.save(contents, tmp_path / "sorted.th")
    encoder, twin = load_encoder(tmp_path / "sorted.th"), load_encoder(file)
    assert encoder.config.norm_placement == twin.config.norm_placement == "post"
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(encoder.parameters(), twin.parameters(), strict=True))


def test_report_names_what_was_dropped(goldens: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mim_refiner_hf"):
        encoder = load_encoder(goldens / "mae/checkpoint_full.pth", num_heads=3)
    report = encoder.load_report
    assert isinstance(report, LoadReport)
    assert (report.family, report.placed, report.total) == ("mae", 70, 70)
    assert {"mask_token", "decoder_pos_embed", "decoder_embed.weight"} < set(report.dropped["decoder"])
    assert "mae: 70 of 70 placed; decoder: 20 dropped" in caplog.text
    assert capsys.readouterr().out == ""


def test_weights_keep_the_dtype_of_the_file(tmp_path: Path, mae_state: dict[str, torch.Tensor]) -> None:
    half = {name: tensor.bfloat16() for name, tensor in mae_state.items()}
    encoder = load_encoder(save_mae(tmp_path, half), num_heads=3)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}


def test_safetensors_of_an_original_state_dict(tmp_path: Path, goldens: Path) -> None:
    state = torch.load(goldens / "maws/checkpoint.pt", weights_only=True)
    save_file(state, tmp_path / "maws.safetensors")
    encoder = load_encoder(tmp_path / "maws.safetensors", num_heads=3)
    twin = load_encoder(goldens / "maws/checkpoint.pt", num_heads=3)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(encoder.parameters(), twin.parameters(), strict=True))


def test_an_explicit_family_needs_no_signature(goldens: Path) -> None:
    encoder = load_encoder(goldens / "dbot/checkpoint_encoder.pth", family="dbot", num_heads=4)
    assert str(encoder.load_report) == "dbot: 70 of 70 placed"


# --- transformers' folders ----------------------------------------------------------------------------------------------------


def transformers_models() -> dict[str, Any]:
    beit = {**TINY, "layer_norm_eps": 1e-5}
    return {
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**TINY)),
        "vit-mim": lambda: transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**TINY, encoder_stride=8)),
        "vit_mae": lambda: transformers.ViTMAEModel(transformers.ViTMAEConfig(**TINY, mask_ratio=0.0)),
        "vit_mae-pretraining": lambda: transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(**TINY, mask_ratio=0.0, decoder_hidden_size=16, decoder_num_hidden_layers=1)
        ),
        "beit": lambda: transformers.BeitModel(
            transformers.BeitConfig(**beit, use_relative_position_bias=True, use_absolute_position_embeddings=True)
        ),
        "beit-mim": lambda: transformers.BeitForMaskedImageModeling(
            transformers.BeitConfig(**beit, use_shared_relative_position_bias=True, use_mask_token=True, vocab_size=20)
        ),
        "beit-final_norm": lambda: transformers.BeitModel(
            transformers.BeitConfig(**beit, use_mean_pooling=False, use_shared_relative_position_bias=True)
        ),
        "data2vec_vision": lambda: transformers.Data2VecVisionModel(
            transformers.Data2VecVisionConfig(**beit, use_shared_relative_position_bias=True)
        ),
    }


REPORTS = {
    "vit": "vit: 38 of 38 placed; pooler: 2 dropped",
    "vit-mim": "vit: 38 of 38 placed; decoder: 3 dropped",
    "vit_mae": "vit_mae: 38 of 38 placed",
    "vit_mae-pretraining": "vit_mae: 38 of 38 placed; decoder: 24 dropped",
    "beit": "beit: 40 of 40 placed; pooler: 2 dropped",
    "beit-mim": "beit: 40 of 40 placed; decoder: 3 dropped",
    "beit-final_norm": "beit: 40 of 40 placed",
    "data2vec_vision": "data2vec_vision: 38 of 38 placed",
}


def reference_tokens(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What transformers itself computes, with no patch masked."""
    kwargs = {}
    if "ViTMAE" in type(model).__name__:  # ViTMAE shuffles by noise even at ratio 0: increasing noise keeps the order
        kwargs["noise"] = torch.arange(16.0).expand(len(pixels), -1)
    inner = getattr(model, model.base_model_prefix, model)
    with torch.no_grad():
        tokens = inner(pixels, **kwargs).last_hidden_state
        return model.layernorm(tokens) if "BeitForMasked" in type(model).__name__ else tokens


@pytest.mark.parametrize("spelling", ["on_disk", "in_memory"])
@pytest.mark.parametrize("name", list(REPORTS))
def test_transformers_folders(tmp_path: Path, name: str, spelling: str) -> None:
    model = randomise(transformers_models()[name]())
    model.save_pretrained(tmp_path)
    if spelling == "in_memory":  # transformers 5 names its modules differently from its files
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    encoder = load_encoder(tmp_path)
    assert str(encoder.load_report) == REPORTS[name]
    assert encoder.config.layer_norm_eps == model.config.layer_norm_eps
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = encoder(pixels)
    torch.testing.assert_close(ours.last_hidden_state, reference_tokens(model, pixels), atol=1e-5, rtol=0)
    assert torch.equal(ours.pooler_output, ours.last_hidden_state[:, 0])


def test_beit_without_layer_scale_and_with_a_lost_bias_table(tmp_path: Path) -> None:
    settings = {"use_relative_position_bias": True, "use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0}
    model = randomise(transformers.BeitModel(transformers.BeitConfig(**TINY, **settings)))
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert encoder.config.layer_scale_init is None
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels)[0], reference_tokens(model, pixels), atol=1e-5, rtol=0)
    state = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in state.items() if "bias_table" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"2 of 36 beit tensors are missing: layers\.0\.attention\.relative_position_bias\.table"
    ):
        load_encoder(tmp_path)


def test_sharded_folder_and_missing_shard(tmp_path: Path) -> None:
    model = randomise(transformers_models()["vit_mae"]())
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert load_encoder(tmp_path).load_report.placed == 38
    shards[-1].unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_encoder(tmp_path)


def test_real_mae_of_the_shared_folder(shared: Path) -> None:
    folder = shared / "models/mae-tiny-cifar10"
    encoder = load_encoder(folder)
    assert str(encoder.load_report) == "vit_mae: 198 of 198 placed; decoder: 40 dropped"
    reference = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels)[0], reference(pixels)[0], atol=1e-5, rtol=0)


def test_own_folder_round_trip(tmp_path: Path) -> None:
    config = MimRefinerConfig(**TINY, features="last_block", num_register_tokens=2, norm_placement="pre")
    model = randomise(MimRefinerModel(config))
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert str(encoder.load_report) == "mim_refiner: 39 of 39 placed"
    assert encoder.config.features == "last_block"
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder(pixels).pooler_output, model(pixels).pooler_output)
    before = encoder.state_dict()
    encoder.save_pretrained(tmp_path)  # over the very file it came from
    again = load_encoder(tmp_path).state_dict()
    assert all(torch.equal(before[name], again[name]) for name in before)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_hub_names_fetch_weights_and_json_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """A stand-in Hub that delivers what was asked for: safetensors where there are any, else pytorch_model.bin."""
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    model = randomise(transformers_models()["vit_mae-pretraining"]())
    model.save_pretrained(hub)
    torch.save(load_file(hub / "model.safetensors"), hub / "pytorch_model.bin")
    for other in ("tf_model.h5", "training_args.bin", "optimizer.pt"):
        (hub / other).touch()
    if file == "pytorch_model.bin":
        (hub / "model.safetensors").unlink()

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("someone/mae", "v1")
        cache.mkdir(exist_ok=True)
        for path in hub.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                (cache / path.name).write_bytes(path.read_bytes())
        return str(cache)

    monkeypatch.setattr("mim_refiner_hf.conversion.read.snapshot_download", snapshot)
    encoder = load_encoder("someone/mae", revision="v1")
    assert str(encoder.load_report) == "vit_mae: 38 of 38 placed; decoder: 24 dropped"
    assert encoder.config.name_or_path == "someone/mae"
    assert {path.name for path in cache.iterdir()} == {"config.json", file}


# --- preprocessing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "size", "crop"),
    [
        ({"size": {"height": 36, "width": 36}}, 36, {"height": 36, "width": 36}),
        ({"size": 36}, 36, {"height": 36, "width": 36}),
        ({"size": {"height": 36, "width": 36}, "crop_size": 32, "do_center_crop": True}, 36, {"height": 32, "width": 32}),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 24, "width": 32}}, 40, {"height": 24, "width": 32}),
        ({}, 32, {"height": 32, "width": 32}),
    ],
)
def test_processor_is_the_sources_own(tmp_path: Path, settings: dict[str, Any], size: int, crop: dict[str, int]) -> None:
    MimRefinerModel(MimRefinerConfig(**TINY)).save_pretrained(tmp_path)
    settings = settings | {"image_mean": [0.5] * 3, "image_std": [0.4] * 3, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = load_encoder(tmp_path).image_processor
    assert (list(processor.image_mean), list(processor.image_std), processor.resample) == ([0.5] * 3, [0.4] * 3, 2)
    assert (dict(processor.size), dict(processor.crop_size)) == ({"shortest_edge": size}, crop)


def test_processor_defaults_to_imagenet_at_native_size(goldens: Path, tmp_path: Path) -> None:
    processor = load_encoder(goldens / "mae/checkpoint_encoder.pth", num_heads=3).image_processor
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert (dict(processor.size), dict(processor.crop_size)) == ({"shortest_edge": 32}, {"height": 32, "width": 32})
    assert processor.do_convert_rgb
    MimRefinerModel(MimRefinerConfig(**{**TINY, "image_size": [16, 32]}, num_channels=1)).save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert not encoder.image_processor.do_convert_rgb
    pixels = encoder.image_processor(torch.zeros(1, 40, 60, dtype=torch.uint8), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 1, 16, 32)
    torch.testing.assert_close(pixels[0, 0, 0, 0], torch.tensor(-(0.485 + 0.456 + 0.406) / (0.229 + 0.224 + 0.225)))
    encoder(pixels)


# --- wrong sources ------------------------------------------------------------------------------------------------------------


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist; give a Hub name"):
        load_encoder("nowhere.pth")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no model"):
        load_encoder(tmp_path)
    with pytest.raises(CheckpointError, match="neither a local path nor a model that the Hub could deliver"):
        load_encoder("nobody/no-such-model")


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


class Malicious:
    """Unpickling this runs a shell command."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("place", ["file", "pickle", "folder"])
def test_no_pickle_is_executed(tmp_path: Path, place: str) -> None:
    canary = tmp_path / "canary"
    evil = {"model": {"cls_token": torch.zeros(1, 1, 8), "extra": Malicious(canary)}}
    pickle.loads(pickle.dumps(Malicious(canary)))
    assert canary.exists()  # the attack is real
    canary.unlink()
    path = tmp_path / ("pytorch_model.bin" if place == "folder" else "evil.pth")
    if place == "pickle":
        path.write_bytes(pickle.dumps(evil["model"]["extra"]))
    else:
        torch.save(evil, path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(
        CheckpointError, match=r"more than plain tensors.* would execute code while being read, which was refused"
    ) as error:
        load_encoder(tmp_path if place == "folder" else path)
    assert not canary.exists()
    assert "likely succeed" not in str(error.value)  # torch's own message advises weights_only=False


def test_unknown_files(tmp_path: Path) -> None:
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}, "epoch": 1}, tmp_path / "resnet.pth")
    with pytest.raises(
        CheckpointError, match=r"no known family; top-level keys: state_dict, epoch; tensors: state_dict\.conv1\.weight"
    ):
        load_encoder(tmp_path / "resnet.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(CheckpointError, match="holds a Tensor, not a dictionary"):
        load_encoder(tmp_path / "tensor.pth")
    torch.save({"decoder_embed.weight": torch.zeros(3), "mask_token": torch.zeros(1)}, tmp_path / "decoder.pth")
    with pytest.raises(CheckpointError, match="holds a decoder only"):
        load_encoder(tmp_path / "decoder.pth")
    with pytest.raises(CheckpointError, match=r"family='resnet' is unknown; allowed: mim_refiner, vit_mae"):
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
    transformers_models()["vit"]().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"need the config\.json beside them: give their folder"):
        load_encoder(tmp_path / "model.safetensors")


def test_transformers_decoder_only(tmp_path: Path) -> None:
    model = transformers_models()["vit_mae-pretraining"]()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in state.items() if name.startswith("decoder.")}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no encoder of transformers' ViTMAE, only decoder: 24 tensors"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("kind", ["mae", "data2vec2", "vit", "beit", "ours"])
def test_fine_tuned_classifiers_are_refused(tmp_path: Path, mae_state: dict[str, torch.Tensor], kind: str) -> None:
    path = tmp_path
    if kind == "mae":
        extra = {"fc_norm.weight": torch.ones(48), "head.weight": torch.zeros(10, 48), "head.bias": torch.zeros(10)}
        path = save_mae(tmp_path, mae_state | extra)
    elif kind == "data2vec2":
        path = save_mae(tmp_path, {"model.blocks.0.norm1.weight": torch.ones(8), "head.weight": torch.zeros(10, 8)})
    elif kind == "ours":
        MimRefinerForImageClassification(MimRefinerConfig(**TINY, num_labels=3)).save_pretrained(tmp_path)
    else:
        config = transformers.ViTConfig(**TINY) if kind == "vit" else transformers.BeitConfig(**TINY)
        transformers.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"is a fine-tuned classifier \(.*\), not a pre-trained encoder: load the checkpoint"
    ):
        load_encoder(path)


def test_every_tensor_must_be_there(tmp_path: Path, mae_state: dict[str, torch.Tensor]) -> None:
    """Without any single one of the encoder's tensors: an error that names it, never a model with a random tensor."""
    for name in mae_state:
        if name.startswith(("decoder", "mask_token")):
            continue
        path = save_mae(tmp_path, {key: tensor for key, tensor in mae_state.items() if key != name})
        with pytest.raises(CheckpointError):
            load_encoder(path, family="mae", num_heads=3)
    del mae_state["blocks.1.attn.qkv.bias"]
    wanted = r"3 of 70 mae tensors are missing: layers\.1\.attention\.q_proj\.bias, layers\.1\.attention\.k_proj\.bias"
    with pytest.raises(CheckpointError, match=wanted):
        load_encoder(save_mae(tmp_path, mae_state), num_heads=3)


def test_every_source_tensor_must_have_a_place(tmp_path: Path, mae_state: dict[str, torch.Tensor]) -> None:
    mae_state["blocks.0.attn.q_norm.weight"] = torch.ones(16)
    with pytest.raises(CheckpointError, match=r"1 tensors have no place in MAE .*: blocks\.0\.attn\.q_norm\.weight"):
        load_encoder(save_mae(tmp_path, mae_state), num_heads=3)


def test_wrong_shapes(tmp_path: Path, mae_state: dict[str, torch.Tensor]) -> None:
    damaged = mae_state | {"blocks.2.mlp.fc1.weight": torch.zeros(100, 48)}
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.fc1\.weight is \[100, 48\], expected \[192, 48\]"):
        load_encoder(save_mae(tmp_path, damaged), num_heads=3)
    damaged = mae_state | {"pos_embed": torch.zeros(1, 18, 48)}  # 17 patches are no square
    with pytest.raises(CheckpointError, match=r"position_embeddings is \[1, 17, 48\], expected \[1, 16, 48\]"):
        load_encoder(save_mae(tmp_path, damaged), num_heads=3)
    damaged = mae_state | {"pos_embed": torch.zeros(48)}
    with pytest.raises(CheckpointError, match=r"pos_embed has the unexpected shape \[48\]"):
        load_encoder(save_mae(tmp_path, damaged), num_heads=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_weights(tmp_path: Path, mae_state: dict[str, torch.Tensor], value: float) -> None:
    mae_state["blocks.3.norm2.weight"][5] = value
    with pytest.raises(CheckpointError, match=r"1 tensors hold NaN, infinite or integer values: layers\.3\.norm2\.weight"):
        load_encoder(save_mae(tmp_path, mae_state), num_heads=3)


def test_number_of_heads(goldens: Path, tmp_path: Path, mae_state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"width 48 is none of the published ones .*; pass num_heads="):
        load_encoder(goldens / "mae/checkpoint_full.pth")
    with pytest.raises(CheckpointError, match="cannot be built: num_attention_heads=5 must divide hidden_size=48"):
        load_encoder(goldens / "mae/checkpoint_full.pth", num_heads=5)
    with pytest.raises(CheckpointError, match=r"num_heads=4, but .* states 3"):
        load_encoder(goldens / "data2vec2/checkpoint.pt", num_heads=4)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1280, 16), (2560, 32)])
def test_heads_of_the_published_widths(tmp_path: Path, width: int, heads: int) -> None:
    """Head dim 64 for B and L, 80 for H and 2B (METHOD.md, Encoders)."""
    config = MimRefinerConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=1, intermediate_size=1, image_size=16)
    state = {
        name: torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in MimRefinerModel(config).state_dict().items()
    }
    rename = [("layers.0", "blocks.0"), ("embeddings.patch_embeddings", "patch_embed.proj"), ("attention.o_proj", "attn.proj")]
    original = {"cls_token": state.pop("embeddings.cls_token"), "pos_embed": torch.zeros(1, 2, width)}
    for name, tensor in state.items():
        for new, old in rename:
            name = name.replace(new, old)
        if "q_proj" in name:
            original[name.replace("attention.q_proj", "attn.qkv")] = tensor.repeat(3, *[1] * (tensor.ndim - 1))
        elif "_proj" not in name and "position_embeddings" not in name:
            original[name] = tensor
    assert load_encoder(save_mae(tmp_path, original)).config.num_attention_heads == heads


def test_family_names_are_unique() -> None:
    families = [layout.family for layout in LAYOUTS]
    assert len(set(families)) == len(families)
