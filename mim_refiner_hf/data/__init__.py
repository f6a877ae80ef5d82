"""Images in, views out.

`open_images` reads folders, tables, Hub data sets and streams; `views` and `order` feed a training.
"""

from typing import TYPE_CHECKING

from ..runtime.lazy import lazy_names

if TYPE_CHECKING:
    from .images import ImageDataset, ImageStream, Sample, hold_out, open_images, open_stream
    from .order import BatchSampler

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "images": [
            "ImageDataset",
            "ImageStream",
            "Sample",
            "hold_out",
            "open_images",
            "open_stream",
        ],
        "order": ["BatchSampler"],
    },
)

__all__ = [
    "BatchSampler",
    "ImageDataset",
    "ImageStream",
    "Sample",
    "hold_out",
    "open_images",
    "open_stream",
]
