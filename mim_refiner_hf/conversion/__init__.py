"""Foreign checkpoints in: `load_encoder` reads any known file, folder or name.

`layouts` holds one table for every family of checkpoints.
"""

from ..runtime.files import CheckpointError
from .classifiers import load_classifier
from .load import LoadReport, load_encoder

__all__ = ["CheckpointError", "LoadReport", "load_classifier", "load_encoder"]
