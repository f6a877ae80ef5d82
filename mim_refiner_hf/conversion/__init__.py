"""Foreign checkpoints in: `load_encoder` reads any known file, folder or Hub name; `layouts` holds one table per family."""

from .load import LoadReport, load_encoder
from .read import CheckpointError

__all__ = ["CheckpointError", "LoadReport", "load_encoder"]
