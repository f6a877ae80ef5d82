"""Foreign checkpoints into our encoder.

The outputs of the authors' own code, transformers' folders, our own.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from golden_cases import (
    GOLDENS,
    contents,
    dropped_names,
    encoder_state,
    encoder_tensors,
    facts,
    heads_to_pass,
    tensors,
)
from random_weights import randomise
from safetensors.torch import load_file, save_file
from small_checkpoints import TINY, save_mae

from mim_refiner_hf.conversion import CheckpointError, LoadReport, load_encoder
from mim_refiner_hf.conversion.layouts import LAYOUTS
from mim_refiner_hf.model.configuration_mim_refiner import MimRefinerConfig
from mim_refiner_hf.model.modeling_mim_refiner import MimRefinerModel

# case, file, prefix of its outputs, family
CASES = [
    ("mimrefiner-prenorm", "checkpoint.th", "", "mim_refiner_prenorm"),
    ("mimrefiner-postnorm", "checkpoint.th", "", "mim_refiner_postnorm"),
    ("mimrefiner-training-prenorm", "checkpoint.th", "raw.", "mim_refiner_prenorm"),
    ("mimrefiner-training-prenorm", "checkpoint_ema.th", "", "mim_refiner_prenorm"),
    ("mimrefiner-training-postnorm", "checkpoint_ema.th", "", "mim_refiner_postnorm"),
    ("mimrefiner-training-postnorm", "checkpoint_legacy_norm_name.th", "", "mim_refiner_postnorm"),
    ("mae", "checkpoint_full.pth", "", "mae"),
    ("mae", "checkpoint_encoder.pth", "zero_cls_pos.", "mae"),
    ("dbot", "checkpoint_full.pth", "", "dbot"),
    ("crossmae", "checkpoint_full.pth", "", "crossmae"),
    ("maws", "checkpoint.pt", "", "plain_vit"),
    ("maect-encoder", "checkpoint_legacy_pos.th", "", "plain_vit"),
    ("dino", "checkpoint.pth", "", "plain_vit"),
    ("data2vec2", "checkpoint.pt", "", "data2vec2"),
    ("data2vec2-prenet", "checkpoint.pt", "", "data2vec2"),
    ("ibot", "checkpoint.pth", "", "ibot"),
    ("ijepa", "checkpoint.pth.tar", "", "ijepa"),
    ("conmim", "checkpoint.pth", "", "conmim"),
    ("conmim", "checkpoint_with_ema.pth", "", "conmim"),
    ("conmim-abs", "checkpoint.pth", "", "conmim"),
    ("conmim-perblock-noscale", "checkpoint.pth", "", "conmim"),
]
# family, case, file, prefix of its outputs: formats that carry no sign of their own
ASKED_FOR = [
    ("conmim_ema", "conmim", "checkpoint_with_ema.pth", "ema."),
    ("dbot", "dbot", "checkpoint_encoder.pth", "zero_cls_pos."),
    ("maect", "mimrefiner-prenorm", "checkpoint.th", ""),
]


# --- the authors' own outputs ---------------------------------------------------------------------


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize(("case", "file", "prefix", "family"), CASES)
def test_original_files_give_the_outputs_of_the_original_code(
    case: str, file: str, prefix: str, family: str
) -> None:
    encoder = load_encoder(GOLDENS / case / file, num_heads=heads_to_pass(case, file))
    assert not encoder.training
    assert_dimensions(encoder.config, case)
    assert_outputs(encoder, case, prefix)

    # every tensor of the file has its place or is dropped by name
    state = encoder_state(contents(case, file))
    count = encoder_tensors(state, family)
    report = encoder.load_report
    assert str(report).startswith(f"{family}: {count} of {count} placed")
    dropped = {reason: set(names) for reason, names in report.dropped.items()}
    assert dropped == dropped_names(state, family)
    # the names that the case itself states, where it does; "_ema" stands for all nested in it
    stated = set(facts(case).get("non_encoder_keys", []))
    assert stated - {"_ema"} <= set().union(*dropped.values())


def assert_dimensions(config: MimRefinerConfig, case: str) -> None:
    """The encoder's shape is the one that the case states."""
    stated = facts(case)
    assert config.hidden_size == stated["dim"]
    assert config.num_hidden_layers == stated["depth"]
    assert config.num_attention_heads == stated["num_heads"]
    assert config.intermediate_size == stated["dim"] * stated["mlp_ratio"]
    assert config.patch_size == stated["patch_size"]
    assert config.layer_norm_eps == stated["eps"]
    assert f"{config.norm_placement}norm" == stated["block_kind"]
    assert config.final_norm == stated["final_norm"]


@pytest.mark.usefixtures("goldens")
@pytest.mark.parametrize(("family", "case", "file", "prefix"), ASKED_FOR)
def test_families_that_have_to_be_asked_for(family: str, case: str, file: str, prefix: str) -> None:
    heads = facts(case)["num_heads"]
    encoder = load_encoder(GOLDENS / case / file, family=family, num_heads=heads)
    assert encoder.load_report.family == family
    assert f"family='{family}'" in encoder.load_report.recognised_by
    assert_outputs(encoder, case, prefix)


def assert_outputs(encoder: MimRefinerModel, case: str, prefix: str) -> None:
    """Every token of every block as the authors' code computed it.

    At the native size and, where the case has one, at a lower one.
    """
    inputs, expected = tensors(case)
    sizes = [size for size in ("", "lowres.") if f"{prefix}{size}blocks" in expected]
    assert sizes[0] == "" and ("lowres." in sizes) == ("lowres_image_size" in facts(case))
    output_name = "tokens_normed" if encoder.config.final_norm else "tokens_prenorm"

    for size in sizes:
        pixels = inputs["pixel_values_lowres" if size else "pixel_values"]
        with torch.no_grad():
            output = encoder(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
        got = {
            "embeddings": output.hidden_states[0],
            "blocks": torch.stack(output.hidden_states[1:]),
            "tokens_prenorm": output.hidden_states[-1],
            output_name: output.last_hidden_state,
        }
        for name, tokens in got.items():
            torch.testing.assert_close(
                tokens, expected[f"{prefix}{size}{name}"], atol=2e-4, rtol=1e-4, msg=f"{size}{name}"
            )


@pytest.mark.usefixtures("goldens")
def test_crossmae_with_a_final_norm(tmp_path: Path) -> None:
    """Trained without weighted feature maps, the file has `norm.*`, no `wfm`, no `dec_norms`.

    CLS still has no position.
    """
    width = facts("crossmae")["dim"]
    state = {
        name: tensor
        for name, tensor in encoder_state(contents("crossmae", "checkpoint_full.pth")).items()
        if not name.startswith(("wfm.", "dec_norms."))
    }
    state["norm.weight"] = torch.rand(width) + 0.5
    state["norm.bias"] = torch.randn(width)

    source = save_mae(tmp_path, state)
    encoder = load_encoder(source, num_heads=facts("crossmae")["num_heads"])
    count = encoder_tensors(state, "crossmae")
    assert str(encoder.load_report).startswith(f"crossmae: {count} of {count} placed")

    inputs, outputs = tensors("crossmae")
    with torch.no_grad():
        tokens = encoder(inputs["pixel_values"]).last_hidden_state
    expected = torch.nn.functional.layer_norm(
        outputs["tokens_prenorm"], (width,), state["norm.weight"], state["norm.bias"], eps=1e-6
    )
    torch.testing.assert_close(tokens, expected, atol=2e-4, rtol=1e-4)


def test_the_report_says_what_told_the_family(goldens: Path) -> None:
    stated = facts("conmim")
    width, patch, channels = stated["dim"], stated["patch_size"], stated["in_chans"]
    report = load_encoder(goldens / "conmim/checkpoint_with_ema.pth").load_report
    assert report.recognised_by == (
        f"patch_embed.proj.weight [{width}, {channels}, {patch}, {patch}], "
        f"blocks.0.attn.qkv.weight [{3 * width}, {width}], "
        f"blocks.0.attn.q_bias [{width}] under 'model'"
    )
    report = load_encoder(goldens / "mimrefiner-training-prenorm/checkpoint.th").load_report
    assert report.recognised_by == "model_type='vit.vit' under 'state_dict'"


def test_position_of_the_cls_token_is_folded_not_dropped(
    goldens: Path, mae_state: dict[str, torch.Tensor], mae_heads: int
) -> None:
    """The golden's `pos_embed[:, 0]` is far from zero.

    Only CrossMAE's own encoder never adds it.
    """
    encoder = load_encoder(goldens / "mae/checkpoint_full.pth", num_heads=mae_heads)
    folded = mae_state["cls_token"] + mae_state["pos_embed"][:, :1]
    torch.testing.assert_close(encoder.embeddings.cls_token, folded)
    assert mae_state["pos_embed"][:, 0].abs().mean() > 0.1

    state = encoder_state(contents("crossmae", "checkpoint_full.pth"))
    source = goldens / "crossmae/checkpoint_full.pth"
    encoder = load_encoder(source, num_heads=facts("crossmae")["num_heads"])
    assert torch.equal(encoder.embeddings.cls_token, state["cls_token"])


def test_legacy_names_are_told_by_what_the_file_states_not_by_their_order(
    goldens: Path, tmp_path: Path
) -> None:
    """Sorted, `norm.*` stands after the blocks as a final norm would.

    The kind in `ctor_kwargs` still says post-norm.
    """
    file = goldens / "mimrefiner-training-postnorm/checkpoint_legacy_norm_name.th"
    legacy = torch.load(file, weights_only=True)
    legacy["state_dict"] = dict(sorted(legacy["state_dict"].items()))
    torch.save(legacy, tmp_path / "sorted.th")

    encoder = load_encoder(tmp_path / "sorted.th")
    twin = load_encoder(file)
    assert encoder.config.norm_placement == twin.config.norm_placement == "post"
    assert_equal_parameters(encoder, twin)


def assert_equal_parameters(encoder: MimRefinerModel, twin: MimRefinerModel) -> None:
    for ours, theirs in zip(encoder.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_report_names_what_was_dropped(
    goldens: Path,
    mae_state: dict[str, torch.Tensor],
    mae_heads: int,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="mim_refiner_hf"):
        encoder = load_encoder(goldens / "mae/checkpoint_full.pth", num_heads=mae_heads)
    count = encoder_tensors(mae_state, "mae")
    decoder = dropped_names(mae_state, "mae")["decoder"]
    report = encoder.load_report
    assert isinstance(report, LoadReport)
    assert (report.family, report.placed, report.total) == ("mae", count, count)
    assert {"mask_token", "decoder_pos_embed", "decoder_embed.weight"} < decoder
    assert set(report.dropped["decoder"]) == decoder
    assert f"mae: {count} of {count} placed; decoder: {len(decoder)} dropped" in caplog.text
    assert capsys.readouterr().out == ""


def test_weights_keep_the_dtype_of_the_file(
    tmp_path: Path, mae_state: dict[str, torch.Tensor], mae_heads: int
) -> None:
    half = {name: tensor.bfloat16() for name, tensor in mae_state.items()}
    # as in what MAE releases; with another one see test_half_precision.py
    half["pos_embed"][:, 0] = 0
    encoder = load_encoder(save_mae(tmp_path, half), num_heads=mae_heads)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}


def test_safetensors_of_an_original_state_dict(tmp_path: Path, goldens: Path) -> None:
    heads = facts("maws")["num_heads"]
    save_file(contents("maws", "checkpoint.pt"), tmp_path / "maws.safetensors")
    encoder = load_encoder(tmp_path / "maws.safetensors", num_heads=heads)
    assert_equal_parameters(encoder, load_encoder(goldens / "maws/checkpoint.pt", num_heads=heads))


def test_an_explicit_family_needs_no_signature(goldens: Path) -> None:
    source = goldens / "dbot/checkpoint_encoder.pth"
    heads = facts("dbot")["num_heads"]
    encoder = load_encoder(source, family="dbot", num_heads=heads)
    count = encoder_tensors(encoder_state(contents("dbot", source.name)), "dbot")
    assert str(encoder.load_report) == f"dbot: {count} of {count} placed"


# --- transformers' folders ------------------------------------------------------------------------


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
    "beit": "beit: 42 of 42 placed",
    "beit-mim": "beit: 40 of 40 placed; decoder: 3 dropped",
    "beit-final_norm": "beit: 40 of 40 placed",
    "data2vec_vision": "data2vec_vision: 38 of 38 placed",
}


def reference_tokens(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What transformers itself computes, with no patch masked."""
    kwargs = {}
    # ViTMAE shuffles by noise even at ratio 0: increasing noise keeps the order
    if "ViTMAE" in type(model).__name__:
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
    # transformers 5 names its modules differently from its files
    if spelling == "in_memory":
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
    expected = ours.last_hidden_state[:, 0]
    # BEiT's own pooler: a norm of the mean of the patches
    if getattr(getattr(model, "pooler", None), "layernorm", None) is not None:
        with torch.no_grad():
            expected = model(pixels).pooler_output
    torch.testing.assert_close(ours.pooler_output, expected, atol=1e-5, rtol=0)


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
        match=r"states use_relative_position_bias=True, but its weights have no relative positions",
    ):
        load_encoder(tmp_path)


def test_sharded_folder_and_missing_shard(tmp_path: Path) -> None:
    model = randomise(transformers_models()["vit_mae"]())
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert load_encoder(tmp_path).load_report.placed == load_encoder(model).load_report.placed
    shards[-1].unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_encoder(tmp_path)


def test_real_mae_of_the_shared_folder(shared: Path) -> None:
    folder = shared / "models/mae-tiny-cifar10"
    encoder = load_encoder(folder)
    names = set(load_file(folder / "model.safetensors"))
    decoder = {name for name in names if name.startswith("decoder.") or "mask_token" in name}
    count = len(names - decoder)
    expected = f"vit_mae: {count} of {count} placed; decoder: {len(decoder)} dropped"
    assert str(encoder.load_report) == expected
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
    # over the very file it came from
    encoder.save_pretrained(tmp_path)
    again = load_encoder(tmp_path).state_dict()
    assert all(torch.equal(before[name], again[name]) for name in before)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_hub_names_fetch_weights_and_json_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """A stand-in Hub that delivers what was asked for.

    The safetensors where there are any, else pytorch_model.bin.
    """
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


# --- the table ------------------------------------------------------------------------------------


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
