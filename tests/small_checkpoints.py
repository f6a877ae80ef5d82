"""What the tests of loading share.

The shape of a tiny encoder, and a file in the original layout of MAE.
"""

from pathlib import Path
from typing import Any

import torch

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def save_mae(folder: Path, state: dict[str, Any]) -> Path:
    """A file in MAE's original layout; its path."""
    torch.save({"model": state}, folder / "mae.pth")
    return folder / "mae.pth"
