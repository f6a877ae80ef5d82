"""Images in, views out.

`open_images` reads folders, tables, Hub data sets and streams; `views` and `order` feed a training.
"""

from .images import ImageDataset, Sample, hold_out, open_images
from .order import BatchSampler
from .stream import ImageStream, open_stream

__all__ = [
    "BatchSampler",
    "ImageDataset",
    "ImageStream",
    "Sample",
    "hold_out",
    "open_images",
    "open_stream",
]
