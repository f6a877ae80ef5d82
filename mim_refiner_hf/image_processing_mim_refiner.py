"""Image to `pixel_values`: shortest edge to the native size, centre crop (paper, C.7), rescale to [0, 1], normalise; torchvision and Pillow backends.

    from transformers import AutoImageProcessor
    processor = AutoImageProcessor.from_pretrained("outputs/quickstart/model")          # use_fast/backend as in transformers
    pixel_values = processor(image, return_tensors="pt").pixel_values                   # (1, channels, height, width)

The defaults are ImageNet's, as every supported MIM family was trained with. This file travels with every saved model.
"""

from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling


class MimRefinerImageProcessor(TorchvisionBackend):
    """Batched preprocessing on tensors (torchvision)."""

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 224}
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True


class MimRefinerImageProcessorPil(PilBackend):
    """The same with Pillow and NumPy only, for machines without torchvision."""

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 224}
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True


__all__ = ["MimRefinerImageProcessor", "MimRefinerImageProcessorPil"]
