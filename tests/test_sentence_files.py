"""Saved models in sentence-transformers: the vector is `pooler_output`, whatever is pooled."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_weights import randomise
from small_checkpoints import TINY
from test_transformers_encoders import CASES
from test_transformers_encoders import saved as saved_by_transformers

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel, load_encoder
from mim_refiner_hf.publishing import save_model_folder
from mim_refiner_hf.publishing.convert import convert
from mim_refiner_hf.publishing.export import export
from mim_refiner_hf.publishing.sentence_files import SENTENCE_FILES

INSTALL = "needs sentence-transformers, of the extra test"
CAPI: dict[str, Any] = {
    "position_encoding": "rope",
    "use_cls_token": False,
    "num_register_tokens": 4,
    "predictor_layers": 1,
}
POOLINGS: dict[str, dict[str, Any]] = {
    "cls": {},
    "mean": {"pooling": "mean"},
    "register": {"num_register_tokens": 2, "pooling": "register"},
    "prefix": {"num_register_tokens": 2, "pooling": "prefix"},
    "attention": {"pooling_head": "attention_mlp", "use_cls_token": False},
    "global_repr": {**CAPI, "pooling": "global_repr"},
    "pooled-norm": {"pooled_norm": True, "final_norm": False},
    "last-block": {"features": "last_block"},
}
WITHOUT_PACKAGE = """
import sys
sys.modules["mim_refiner_hf"] = None  # as if it were not installed, also where it is
import numpy
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu", trust_remote_code=True)
print(abs(model.encode([sys.argv[2]]) - numpy.load(sys.argv[3])).max())
"""


def saved(folder: Path, **settings: Any) -> MimRefinerModel:
    """A tiny encoder with random values in every tensor, saved as a model folder."""
    encoder = randomise(MimRefinerModel(MimRefinerConfig(**{**TINY, **settings})))
    side = encoder.config.image_hw[0]
    processor = MimRefinerImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    save_model_folder(folder, encoder, processor)
    vars(encoder)["image_processor"] = processor
    return encoder


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 52, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in noise]


def vectors_of(encoder: MimRefinerModel, images: list[Image.Image]) -> np.ndarray:
    pixels = vars(encoder)["image_processor"](images, return_tensors="pt").pixel_values
    with torch.no_grad():
        return encoder(pixels).pooler_output.numpy()


def test_every_saved_folder_has_the_files(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "converted")
    for folder in (tmp_path / "model", tmp_path / "converted"):
        read = {name: json.loads((folder / name).read_text()) for name in SENTENCE_FILES}
        assert read == SENTENCE_FILES

        # what they name is there: an output of the model, in the folder itself
        (module,) = read["modules.json"]
        assert module["path"] == "" and module["type"].endswith(".Transformer")
        reads = read["sentence_bert_config.json"]["modality_config"]
        assert list(reads) == ["image"]
        encoder = load_encoder(folder)
        output = getattr(encoder, reads["image"]["method"])(torch.zeros(1, 3, 32, 32))
        assert output[reads["image"]["method_output_name"]].shape == (1, 32)


@pytest.mark.parametrize("name", POOLINGS)
def test_the_vector_is_the_models_own(tmp_path: Path, name: str) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers", reason=INSTALL)
    encoder = saved(tmp_path / "model", **POOLINGS[name])
    images = pictures()
    images[0].save(tmp_path / "0.png")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    expected = vectors_of(encoder, images)
    found = model.encode([str(tmp_path / "0.png"), *images[1:]])
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    # not the same for every image
    assert expected.std(axis=0).mean() > 1e-3
    assert model.get_embedding_dimension() == encoder.config.hidden_size


@pytest.mark.slow
def test_without_the_package(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason=INSTALL)
    encoder = saved(tmp_path / "model", pooling="mean")
    image = pictures()[0]
    image.save(tmp_path / "0.png")
    np.save(tmp_path / "expected.npy", vectors_of(encoder, [image]))
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, "model", "0.png", "expected.npy"],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[-1]) < 1e-5


@pytest.mark.parametrize("name", ["dinov3", "siglip", "clip", "pixio", "aimv2"])
def test_an_exported_class_gives_the_same(tmp_path: Path, name: str) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers", reason=INSTALL)
    saved_by_transformers(tmp_path / "theirs", CASES[name])
    export(tmp_path / "theirs", tmp_path / "native", "native")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "native"), device="cpu")
    expected = vectors_of(load_encoder(tmp_path / "theirs"), pictures())
    np.testing.assert_allclose(model.encode(pictures()), expected, atol=1e-5, rtol=0)
