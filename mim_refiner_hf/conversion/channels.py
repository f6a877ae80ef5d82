"""An encoder for another number of channels than its start was trained with.

    encoder = extend_channels(load_encoder("facebook/vit-mae-base"), 13)

The rule is that of timm (`timm.models.adapt_input_conv`): the filters of the patch embedding are
repeated in turn, red, green, blue, red ..., and scaled by 3 / 13, so that an image whose channels
are alike gives what it gave before; it does so exactly where 3 divides the number, and nearly
elsewhere. For one channel the filters are added up, which is exact. All else stays as it is.
"""

import copy

import torch
from torch import Tensor, nn

from ..model.modeling_mim_refiner import MimRefinerModel


def extend_channels(encoder: MimRefinerModel, num_channels: int) -> MimRefinerModel:
    """A copy of the encoder that reads `num_channels` channels; its image processor is not fitted.

    Returns:
        The copy, whose `image_processor` is still that of the start.
    """
    extended = copy.deepcopy(encoder)
    old = extended.embeddings.patch_embeddings
    with torch.no_grad():
        weight = extended_filters(old.weight, num_channels)

    patch = extended.config.patch_size
    # without memory: the weights come from the start
    new = nn.Conv2d(num_channels, len(weight), patch, stride=patch, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
    new.bias = old.bias
    extended.embeddings.patch_embeddings = new
    extended.config.num_channels = num_channels
    return extended


def extended_filters(weight: Tensor, num_channels: int) -> Tensor:
    """Filters (D, C, P, P) of a patch embedding -> (D, `num_channels`, P, P)."""
    channels = weight.shape[1]
    if num_channels == 1:
        return weight.sum(dim=1, keepdim=True)
    in_turn = torch.arange(num_channels, device=weight.device) % channels
    return weight[:, in_turn] * (channels / num_channels)
