"""Batch norm whose statistics are those of the whole batch, whatever the number of processes.

norm = GroupedBatchNorm(heads=8, channels=2048)
normed = norm(columns)    # (8, 2048, columns of this process)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arithmetic import full_precision
from .distributed import all_gather_with_gradient, world_size

# Shapes below: H heads, C channels of a head, N columns of this process, P processes.


class GroupedBatchNorm(nn.Module):
    """Batch norm of (H, C, N), every head on its own, with statistics over all processes.

    Args:
        heads: number of heads H.
        channels: number of channels C of a head.
        affine: whether there are a weight and a bias (H, C).
    """

    eps = 1e-5
    momentum = 0.1
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, heads: int, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(heads, channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(heads, channels))
        self.register_buffer("running_var", torch.ones(heads, channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and world_size() > 1:
            return self._synchronised(x)

        # torch's batch norm knows no heads, so every (head, channel) is a channel of its own
        normed = F.batch_norm(
            x.reshape(1, -1, x.shape[2]),
            self.running_mean.view(-1),
            self.running_var.view(-1),
            None if self.weight is None else self.weight.view(-1),
            None if self.bias is None else self.bias.view(-1),
            self.training,
            self.momentum,
            self.eps,
        )
        return normed.view_as(x)

    def _synchronised(self, x: Tensor) -> Tensor:
        """The same over the columns of all processes, in one collective.

        Every process has as many columns, so the variance of all is the mean of the processes'
        variances plus the variance of their means: E[var_r + (mean_r - mean)^2].
        """
        full = full_precision(x)
        own = torch.stack([full.mean(dim=2), full.var(dim=2, unbiased=False)])
        means, variances = all_gather_with_gradient(own.unsqueeze(0)).unbind(1)  # (P, H, C)
        mean = means.mean(dim=0)
        variance = (variances + (means - mean).square()).mean(dim=0)

        # running statistics take the unbiased variance, as torch's batch norm does
        count = x.shape[2] * world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)

        scale = (variance + self.eps).rsqrt()
        if self.weight is None or self.bias is None:
            return ((full - mean[..., None]) * scale[..., None]).to(x.dtype)
        scale = self.weight * scale
        return ((full - mean[..., None]) * scale[..., None] + self.bias[..., None]).to(x.dtype)
