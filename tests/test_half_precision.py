"""Files in half precision: the encoder in fp32 computes what the source computes in fp32."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from test_export_back import EVERY
from test_timm_models import MODELS, tiny
from test_transformers_encoders import TOLERANCE, saved, their_output
from transformers import AutoModel

from mim_refiner_hf import load_encoder
from mim_refiner_hf.conversion.positions import exact_sum

HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", EVERY)
def test_a_class_of_transformers(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    case = EVERY[name]
    half = saved(tmp_path, case).to(dtype)
    half.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for encoder in (load_encoder(tmp_path), load_encoder(half)):
        encoder.float()
        pixels = torch.randn(2, 3, 32, 32)
        theirs = their_output(model, pixels, case.resize)
        with torch.no_grad():
            ours = encoder(pixels)
        expected = {"atol": TOLERANCE, "rtol": TOLERANCE}
        torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, **expected)
        torch.testing.assert_close(ours.pooler_output, case.pooled(theirs), **expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "name", ["vit", "vit-attention", "vit-distilled", "eva-02-base", "eva-dinov3", "beit-absolute"]
)
def test_a_model_of_timm(name: str, dtype: torch.dtype) -> None:
    architecture, settings = MODELS[name]
    model = tiny(architecture, **settings)
    half = copy.deepcopy(model).to(dtype)
    model.load_state_dict(half.state_dict())
    encoder = load_encoder(half).float()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = encoder(pixels)
        tokens = model.forward_features(pixels)
        vector = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(ours.last_hidden_state, tokens, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(ours.pooler_output, vector, atol=TOLERANCE, rtol=TOLERANCE)


def test_only_a_sum_that_would_be_rounded_is_kept_in_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A masked autoencoder's CLS has a position of zeros: such a file stays in its dtype."""
    one, third = torch.ones(4).half(), torch.full((4,), 1 / 3).half()
    assert exact_sum(one, one).dtype == torch.float16
    assert exact_sum(one, third).dtype == torch.float32
    assert exact_sum(one.float(), third.float()).dtype == torch.float32

    caplog.set_level(logging.WARNING, "mim_refiner_hf")
    half = saved(tmp_path, EVERY["vit_mae"]).half()
    assert load_encoder(half).dtype == torch.float32
    line = "in float16, the sums of its tokens and their positions would be rounded; read as float"
    assert [record.getMessage() for record in caplog.records if line in record.getMessage()]

    with torch.no_grad():
        half.embeddings.position_embeddings[:, 0] = 0
    assert load_encoder(half).dtype == torch.float16
