"""Foreign checkpoints into our encoder: the outputs of the authors' own code, transformers' folders, our own."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_checkpoints import TINY, save_mae

from mim_refiner_hf.conversion import CheckpointError, LoadReport, load_encoder
from mim_refiner_hf.conversion.layouts import LAYOUTS
from mim_refiner_hf.model.configuration_mim_refiner import MimRefinerConfig
from mim_refiner_hf.model.modeling_mim_refiner import MimRefinerModel

GOLDENS = [  # case, file, prefix of its outputs, heads where the file does not state them, report
    ("mimrefiner-prenorm", "checkpoint.th", "", 3, "mim_refiner_prenorm: 70 of 70 placed"),
    ("mimrefiner-postnorm", "checkpoint.th", "", 4, "mim_refiner_postnorm: 70 of 70 placed"),
    (
        "mimrefiner-training-prenorm",
        "checkpoint.th",
        "raw.",
        None,
        "mim_refiner_prenorm: 70 of 70 placed",
    ),
    (
        "mimrefiner-training-prenorm",
        "checkpoint_ema.th",
        "",
        None,
        "mim_refiner_prenorm: 70 of 70 placed",
    ),
    (
        "mimrefiner-training-postnorm",
        "checkpoint_ema.th",
        "",
        None,
        "mim_refiner_postnorm: 70 of 70 placed",
    ),
    (
        "mimrefiner-training-postnorm",
        "checkpoint_legacy_norm_name.th",
        "",
        None,
        "mim_refiner_postnorm: 70 of 70 placed",
    ),
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
    ("ibot", "checkpoint.pth", "", 3, "ibot: 70 of 70 placed; projection head: 2 dropped"),
    ("ijepa", "checkpoint.pth.tar", "", 3, "ijepa: 69 of 69 placed"),
    (
        "conmim",
        "checkpoint.pth",
        "",
        None,
        "conmim: 74 of 74 placed; pre-training head: 19 dropped; position index: 1 dropped",
    ),
    (
        "conmim",
        "checkpoint_with_ema.pth",
        "",
        None,
        "conmim: 74 of 74 placed; pre-training head: 19 dropped; position index: 1 dropped",
    ),
    (
        "conmim-abs",
        "checkpoint.pth",
        "",
        3,
        "conmim: 74 of 74 placed; pre-training head: 19 dropped",
    ),
    (
        "conmim-perblock-noscale",
        "checkpoint.pth",
        "",
        None,
        "conmim: 70 of 70 placed; pre-training head: 19 dropped; position index: 4 dropped",
    ),
]
ASKED_FOR = [  # family, case, file, prefix of its outputs: formats that carry no sign of their own
    ("conmim_ema", "conmim", "checkpoint_with_ema.pth", "ema."),
    ("dbot", "dbot", "checkpoint_encoder.pth", "zero_cls_pos."),
    ("maect", "mimrefiner-prenorm", "checkpoint.th", ""),
]


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Random values in every parameter, so that no tensor can be swapped or lost unnoticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1) * 0.5)
    return model.eval()


# --- the authors' own outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "file", "prefix", "num_heads", "report"), GOLDENS, ids=lambda value: str(value)[:40]
)
def test_original_files_give_the_outputs_of_the_original_code(
    goldens: Path, case: str, file: str, prefix: str, num_heads: int | None, report: str
) -> None:
    encoder = load_encoder(goldens / case / file, num_heads=num_heads)
    assert str(encoder.load_report) == report
    assert not encoder.training
    assert encoder.config.layer_norm_eps == 1e-6
    assert_outputs(encoder, goldens / case, prefix)


@pytest.mark.parametrize(
    ("family", "case", "file", "prefix"), ASKED_FOR, ids=lambda value: str(value)[:40]
)
def test_families_that_have_to_be_asked_for(
    goldens: Path, family: str, case: str, file: str, prefix: str
) -> None:
    heads = json.loads((goldens / case / "config.json").read_text())["num_heads"]
    encoder = load_encoder(goldens / case / file, family=family, num_heads=heads)
    assert encoder.load_report.family == family
    assert f"family='{family}'" in encoder.load_report.recognised_by
    assert_outputs(encoder, goldens / case, prefix)


def assert_outputs(encoder: MimRefinerModel, folder: Path, prefix: str) -> None:
    """Every token of every block as the authors' code computed it, at the native size and, where given, at a lower one."""
    inputs, expected = (load_file(folder / f"{kind}.safetensors") for kind in ("inputs", "outputs"))
    sizes = [size for size in ("", "lowres.") if f"{prefix}{size}blocks" in expected]
    assert sizes == (["", "lowres."] if "mimrefiner" in folder.name else [""])
    for size in sizes:
        pixels = inputs["pixel_values_lowres" if size else "pixel_values"]
        with torch.no_grad():
            output = encoder(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
        got = {
            "embeddings": output.hidden_states[0],
            "blocks": torch.stack(output.hidden_states[1:]),
            "tokens_prenorm": output.hidden_states[-1],
            "tokens_normed"
            if encoder.config.final_norm
            else "tokens_prenorm": output.last_hidden_state,
        }
        for name, tokens in got.items():
            torch.testing.assert_close(
                tokens, expected[f"{prefix}{size}{name}"], atol=2e-4, rtol=1e-4, msg=f"{size}{name}"
            )


def test_crossmae_with_a_final_norm(goldens: Path, tmp_path: Path) -> None:
    """Trained without weighted feature maps, the file has `norm.*` and neither `wfm` nor `dec_norms`; CLS still has no position."""
    folder = goldens / "crossmae"
    state = torch.load(folder / "checkpoint_full.pth", weights_only=True)["model"]
    state = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(("wfm.", "dec_norms."))
    }
    norm = {"norm.weight": torch.rand(32) + 0.5, "norm.bias": torch.randn(32)}
    encoder = load_encoder(save_mae(tmp_path, state | norm), num_heads=2)
    assert str(encoder.load_report).startswith("crossmae: 70 of 70 placed")
    with torch.no_grad():
        tokens = encoder(load_file(folder / "inputs.safetensors")["pixel_values"]).last_hidden_state
    before = load_file(folder / "outputs.safetensors")["tokens_prenorm"]
    expected = torch.nn.functional.layer_norm(
        before, (32,), norm["norm.weight"], norm["norm.bias"], eps=1e-6
    )
    torch.testing.assert_close(tokens, expected, atol=2e-4, rtol=1e-4)


def test_the_report_says_what_told_the_family(goldens: Path) -> None:
    report = load_encoder(goldens / "conmim/checkpoint_with_ema.pth").load_report
    assert report.recognised_by == (
        "patch_embed.proj.weight [36, 3, 8, 8], blocks.0.attn.qkv.weight [108, 36], blocks.0.attn.q_bias [36] under 'model'"
    )
    report = load_encoder(goldens / "mimrefiner-training-prenorm/checkpoint.th").load_report
    assert report.recognised_by == "model_type='vit.vit' under 'state_dict'"


def test_position_of_the_cls_token_is_folded_not_dropped(goldens: Path) -> None:
    """The golden's `pos_embed[:, 0]` is far from zero; CrossMAE's own encoder is the one that never adds it."""
    state = torch.load(goldens / "mae/checkpoint_full.pth", weights_only=True)["model"]
    encoder = load_encoder(goldens / "mae/checkpoint_full.pth", num_heads=3)
    torch.testing.assert_close(
        encoder.embeddings.cls_token, state["cls_token"] + state["pos_embed"][:, :1]
    )
    assert state["pos_embed"][:, 0].abs().mean() > 0.1
    state = torch.load(goldens / "crossmae/checkpoint_full.pth", weights_only=True)["model"]
    encoder = load_encoder(goldens / "crossmae/checkpoint_full.pth", num_heads=2)
    assert torch.equal(encoder.embeddings.cls_token, state["cls_token"])


def test_legacy_names_are_told_by_what_the_file_states_not_by_their_order(
    goldens: Path, tmp_path: Path
) -> None:
    """Sorted, `norm.*` stands after the blocks as a final norm would; the kind in `ctor_kwargs` still says post-norm."""
    file = goldens / "mimrefiner-training-postnorm/checkpoint_legacy_norm_name.th"
    contents = torch.load(file, weights_only=True)
    contents["state_dict"] = dict(sorted(contents["state_dict"].items()))
    torch.save(contents, tmp_path / "sorted.th")
    encoder, twin = load_encoder(tmp_path / "sorted.th"), load_encoder(file)
    assert encoder.config.norm_placement == twin.config.norm_placement == "post"
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(encoder.parameters(), twin.parameters(), strict=True)
    )


def test_report_names_what_was_dropped(
    goldens: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="mim_refiner_hf"):
        encoder = load_encoder(goldens / "mae/checkpoint_full.pth", num_heads=3)
    report = encoder.load_report
    assert isinstance(report, LoadReport)
    assert (report.family, report.placed, report.total) == ("mae", 70, 70)
    assert {"mask_token", "decoder_pos_embed", "decoder_embed.weight"} < set(
        report.dropped["decoder"]
    )
    assert "mae: 70 of 70 placed; decoder: 20 dropped" in caplog.text
    assert capsys.readouterr().out == ""


def test_weights_keep_the_dtype_of_the_file(
    tmp_path: Path, mae_state: dict[str, torch.Tensor]
) -> None:
    half = {name: tensor.bfloat16() for name, tensor in mae_state.items()}
    encoder = load_encoder(save_mae(tmp_path, half), num_heads=3)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}


def test_safetensors_of_an_original_state_dict(tmp_path: Path, goldens: Path) -> None:
    state = torch.load(goldens / "maws/checkpoint.pt", weights_only=True)
    save_file(state, tmp_path / "maws.safetensors")
    encoder = load_encoder(tmp_path / "maws.safetensors", num_heads=3)
    twin = load_encoder(goldens / "maws/checkpoint.pt", num_heads=3)
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(encoder.parameters(), twin.parameters(), strict=True)
    )


def test_an_explicit_family_needs_no_signature(goldens: Path) -> None:
    encoder = load_encoder(goldens / "dbot/checkpoint_encoder.pth", family="dbot", num_heads=4)
    assert str(encoder.load_report) == "dbot: 70 of 70 placed"


# --- transformers' folders ----------------------------------------------------------------------------------------------------


def transformers_models() -> dict[str, Any]:
    beit = {**TINY, "layer_norm_eps": 1e-5}
    return {
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**TINY)),
        "vit-mim": lambda: transformers.ViTForMaskedImageModeling(
            transformers.ViTConfig(**TINY, encoder_stride=8)
        ),
        "vit_mae": lambda: transformers.ViTMAEModel(
            transformers.ViTMAEConfig(**TINY, mask_ratio=0.0)
        ),
        "vit_mae-pretraining": lambda: transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(
                **TINY, mask_ratio=0.0, decoder_hidden_size=16, decoder_num_hidden_layers=1
            )
        ),
        "beit": lambda: transformers.BeitModel(
            transformers.BeitConfig(
                **beit, use_relative_position_bias=True, use_absolute_position_embeddings=True
            )
        ),
        "beit-mim": lambda: transformers.BeitForMaskedImageModeling(
            transformers.BeitConfig(
                **beit, use_shared_relative_position_bias=True, use_mask_token=True, vocab_size=20
            )
        ),
        "beit-final_norm": lambda: transformers.BeitModel(
            transformers.BeitConfig(
                **beit, use_mean_pooling=False, use_shared_relative_position_bias=True
            )
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
    if (
        "ViTMAE" in type(model).__name__
    ):  # ViTMAE shuffles by noise even at ratio 0: increasing noise keeps the order
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
    torch.testing.assert_close(
        ours.last_hidden_state, reference_tokens(model, pixels), atol=1e-5, rtol=0
    )
    assert torch.equal(ours.pooler_output, ours.last_hidden_state[:, 0])


def test_beit_without_layer_scale_and_with_a_lost_bias_table(tmp_path: Path) -> None:
    settings = {
        "use_relative_position_bias": True,
        "use_absolute_position_embeddings": True,
        "layer_scale_init_value": 0.0,
    }
    model = randomise(transformers.BeitModel(transformers.BeitConfig(**TINY, **settings)))
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert encoder.config.layer_scale_init is None
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(pixels)[0], reference_tokens(model, pixels), atol=1e-5, rtol=0
        )
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in state.items() if "bias_table" not in name},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(
        CheckpointError,
        match=r"2 of 36 beit tensors are missing: layers\.0\.attention\.relative_position_bias\.table",
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
    config = MimRefinerConfig(
        **TINY, features="last_block", num_register_tokens=2, norm_placement="pre"
    )
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
def test_hub_names_fetch_weights_and_json_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
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


# --- the table -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1280, 16), (2560, 32)])
def test_heads_of_the_published_widths(tmp_path: Path, width: int, heads: int) -> None:
    """Head dim 64 for B and L, 80 for H and 2B (METHOD.md, Encoders)."""
    config = MimRefinerConfig(
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=1,
        image_size=16,
    )
    state = {
        name: torch.zeros(tensor.shape, dtype=torch.float16)
        for name, tensor in MimRefinerModel(config).state_dict().items()
    }
    rename = [
        ("layers.0", "blocks.0"),
        ("embeddings.patch_embeddings", "patch_embed.proj"),
        ("attention.o_proj", "attn.proj"),
    ]
    original = {
        "cls_token": state.pop("embeddings.cls_token"),
        "pos_embed": torch.zeros(1, 2, width).half(),
    }
    for name, tensor in state.items():
        for new, old in rename:
            name = name.replace(new, old)
        if "q_proj" in name:
            original[name.replace("attention.q_proj", "attn.qkv")] = tensor.repeat(
                3, *[1] * (tensor.ndim - 1)
            )
        elif "_proj" not in name and "position_embeddings" not in name:
            original[name] = tensor
    assert load_encoder(save_mae(tmp_path, original)).config.num_attention_heads == heads


def test_family_names_are_unique() -> None:
    families = [layout.family for layout in LAYOUTS]
    assert len(set(families)) == len(families)
