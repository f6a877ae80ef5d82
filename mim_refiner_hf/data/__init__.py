"""Images in, views out.

`open_images` reads folders, tables, Hub data sets and streams; `views` and `order` feed a training.
"""

from .images import ImageDataset, ImageStream, Sample, hold_out, open_images, open_stream
from .order import BatchSampler

__all__ = [
    "BatchSampler",
    "ImageDataset",
    "ImageStream",
    "Sample",
    "hold_out",
    "open_images",
    "open_stream",
]
