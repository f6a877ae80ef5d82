"""Foreign checkpoints in: `load_encoder` reads any known file, folder or Hub name; `layouts` holds one table per family."""

from ..runtime.files import CheckpointError
from .load import LoadReport, load_encoder

__all__ = ["CheckpointError", "LoadReport", "load_encoder"]
