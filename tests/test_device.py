"""What the device can do.

Where bf16 would be slower there is a warning; --compile is refused where it cannot be, and
computes the same.
"""

import importlib.util
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from small_encoder import make_encoder
from test_step_cost import gradients, small_refiner
from torch._dynamo.utils import counters

from mim_refiner_hf import RefineRecipe
from mim_refiner_hf.refinement.trainer import compile_blocks
from mim_refiner_hf.runtime.attention import NAME, attend_in_fp32, fp32_on_cpu
from mim_refiner_hf.runtime.device import (
    check_compile,
    check_int8,
    emulates_bf16,
    feature_precision,
    has_int8,
    uses_bf16,
    warn_of_emulation,
)


@pytest.mark.parametrize("native", [False, True])
def test_bf16_on_a_cpu_that_emulates_it_is_warned_of(
    native: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native}, raising=False
    )
    assert emulates_bf16("cpu") == (not native) and not emulates_bf16("cuda")
    for device in ("cpu", "cuda"):
        warn_of_emulation("--dtype bf16", device)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (not native) and all(
        "--dtype bf16" in line and "fp32 is faster" in line for line in said
    )


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [
        ({}, None),
        ({"avx512_vnni": True, "amx_int8": False}, True),
        ({"avx512_vnni": False, "avx_vnni": False, "amx_int8": True}, True),
        ({"avx512_vnni": False, "avx_vnni": False, "amx_int8": False}, False),
    ],
)
def test_int8_on_a_cpu_without_it_is_warned_of_and_on_a_gpu_refused(
    capabilities: dict[str, bool],
    has: bool | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_int8("cpu") is has and has_int8("cuda") is None
    assert feature_precision("int8", "cpu") == "int8"
    check_int8("--dtype int8", "cpu")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (has is False)
    assert all("--dtype int8: this CPU has neither VNNI nor AMX" in line for line in said)
    with pytest.raises(ValueError, match="--dtype int8: is for a CPU, and this computes on cuda"):
        check_int8("--dtype int8", "cuda")


@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [
        ({"avx512_bf16": True, "avx512_vnni": True}, "bf16"),
        ({"avx512_bf16": False, "avx512_vnni": True}, "int8"),
        ({"avx512_bf16": False, "avx512_vnni": False}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_auto_takes_what_the_processor_says_that_it_has(
    capabilities: dict[str, bool], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert feature_precision("auto", "cpu") == chosen
    assert feature_precision("fp32", "cpu") == "fp32"
    assert feature_precision("bf16", "cpu") == "bf16"
    assert feature_precision("auto", "mps") == "fp32"


def test_a_row_in_emulated_bf16_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.__main__ import main

    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False
    )
    assert main(["step-bf16"]) == 0
    printed = capsys.readouterr()
    assert (
        "step-bf16: left out, this CPU emulates bfloat16" in printed.err
        and "MISSED" not in printed.out
    )


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("gpu", "there is none"),
        ("old", "7.0"),
        ("triton", "pip install triton"),
        ("cc", "gcc"),
        ("", ""),
    ],
)
def test_compile_is_refused_where_it_would_not_work(
    missing: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RefineRecipe(model="a", compile=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: missing != "gpu")
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda: (6, 0) if missing == "old" else (9, 0)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if missing == "triton" else object()
    )
    monkeypatch.setattr(
        shutil, "which", lambda name: None if missing == "cc" else f"/usr/bin/{name}"
    )
    check_compile(False)
    refused = (
        pytest.raises(ValueError, match=f"compile: .*{words}.* leave compile out")
        if missing
        else nullcontext()
    )
    with refused:
        check_compile(recipe.compile)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients() -> None:
    """Without and with a graph, both sizes, a smaller last micro-batch.

    No block falls back for having too many shapes.
    """
    compiled = small_refiner()
    compile_blocks(compiled.encoder, backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    expected, found = (
        gradients(refiner, micro_batch_size=4) for refiner in (small_refiner(), compiled)
    )
    assert (found - expected).norm() <= 2e-6 * expected.norm()
    # torch 2.10 cannot trace the ContextVar that transformers reads around every layer
    breaks = [reason for reason in counters["graph_break"] if "ContextVar" not in reason]
    assert counters["stats"]["unique_graphs"] > 0 and not breaks
    assert counters["frames"]["total"] == counters["frames"]["ok"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("capability", "expected"),
    [({"avx512_bf16": True}, True), ({"avx512_bf16": False}, False), ({}, False)],
)
def test_auto_computes_in_bf16_on_a_cpu_that_says_it_can(
    capability: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capability, raising=False)
    assert uses_bf16("auto") == expected
    assert uses_bf16("bf16") and not uses_bf16("no")


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_fp32_is_the_formula_whatever_autocast_says(masked: bool) -> None:
    query, key, value = torch.randn(3, 2, 3, 17, 8, dtype=torch.bfloat16).requires_grad_()
    mask = torch.randn(1, 3, 17, 17, dtype=torch.bfloat16) if masked else None

    with torch.autocast("cpu", torch.bfloat16):
        output, _ = fp32_on_cpu(torch.nn.Identity(), query, key, value, mask, scaling=0.3)

    logits = 0.3 * query.double() @ key.double().mT
    if mask is not None:
        logits = logits + mask.double()
    expected = (logits.softmax(-1) @ value.double()).transpose(1, 2)
    assert output.dtype == torch.bfloat16
    # half a unit in the last place of bfloat16
    assert torch.allclose(output.double(), expected, rtol=2**-8, atol=1e-6)


def test_only_sdpa_is_replaced_and_nothing_of_it_is_saved(tmp_path: Path) -> None:
    pixels = torch.randn(2, 3, 16, 16)
    for kind, expected in [("sdpa", NAME), ("eager", "eager")]:
        encoder = make_encoder()
        encoder.set_attn_implementation(kind)
        before = encoder(pixels).pooler_output
        attend_in_fp32(torch.nn.ModuleList([encoder]))
        assert encoder.config._attn_implementation == expected
        assert torch.allclose(encoder(pixels).pooler_output, before, atol=1e-6)
        encoder.save_pretrained(tmp_path)
        assert NAME not in (tmp_path / "config.json").read_text()
