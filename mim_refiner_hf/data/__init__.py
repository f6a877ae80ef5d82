"""Images in, views out.

`open_images` reads folders, tables, Hub data sets and streams; `views` and `order` feed a training.
"""

from typing import TYPE_CHECKING

from ..runtime.lazy import lazy_names

if TYPE_CHECKING:
    from .images import ImageDataset, Sample, hold_out, open_images
    from .order import BatchSampler
    from .stream import ImageStream, open_stream

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "images": ["ImageDataset", "Sample", "hold_out", "open_images"],
        "order": ["BatchSampler"],
        "stream": ["ImageStream", "open_stream"],
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
