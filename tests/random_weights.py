"""Random values for every tensor of a model, so that none can be lost or swapped unnoticed."""

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def randomise(model: Model, *, vectors: float = 0.7) -> Model:
    """The model itself, in eval mode, with random values in every parameter and eraser.

    Args:
        vectors: the mean of norms, layer scales and biases: so that the tokens stay of order one.
            Matrices and tokens have mean 0.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            mean = vectors if parameter.ndim == 1 else 0.0
            parameter.copy_(0.2 * torch.randn_like(parameter) + mean)
        for name, buffer in model.named_buffers():
            if ".eraser." in name:
                buffer.copy_(0.2 * torch.randn_like(buffer))
    return model.eval()
