"""Small feature stores for the tests: pictures, an encoder, and what a store holds."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mim_refiner_hf import MimRefinerConfig, MimRefinerImageProcessor, MimRefinerModel
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.data.loading import Loading
from mim_refiner_hf.evaluation import FeatureStore, embed_images

COUNT, SHARD, BATCH = 23, 5, 3  # 5 shards of 2 batches each


def write_photos(folder: Path) -> Path:
    """23 pictures of two classes, in a new folder there."""
    for i in range(COUNT):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 18, 3), dtype=np.uint8)
        path = folder / "photos" / ("cat" if i < 12 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder / "photos"


def make_encoder(seed: int = 0, **changes: Any) -> MimRefinerModel:
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    encoder = MimRefinerModel(
        MimRefinerConfig(**{**shape, "image_size": 16, "patch_size": 8, **changes})
    ).eval()
    torch.nn.init.normal_(encoder.norm.weight)  # a final norm that shows
    return encoder


def make_processor(size: int = 16) -> MimRefinerImageProcessor:
    return MimRefinerImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": 16, "width": 16}
    )


def embed(
    photos: Path, folder: Path, encoder: MimRefinerModel | None = None, **changes: Any
) -> FeatureStore:
    settings = {"shard_size": SHARD, "loading": Loading(BATCH), **changes}
    return embed_images(
        encoder or make_encoder(), open_images(str(photos)), make_processor(), folder, **settings
    )


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a store but the manifest, which may name another command."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def forward_passes(encoder: MimRefinerModel) -> list[int]:
    """A list that grows by the batch size at each forward pass."""
    passes: list[int] = []
    encoder.embeddings.register_forward_hook(
        lambda _module, inputs, _output: passes.append(len(inputs[0]))
    )
    return passes
