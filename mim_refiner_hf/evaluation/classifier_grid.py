"""Many linear classifiers on the same features, one per learning rate, trained at once: one matrix product for all of them.

    grid = ClassifierGrid(num_features=768, num_classes=10, learning_rates=[0.01, 0.1], generator=torch.Generator())
    logits = grid.logits(features)                                             # (B, 2, 10)
    grid.step(features, cross_entropy_gradient(logits, labels), decay=1.0)     # one SGD step of each

Each of the classifiers is trained exactly as it would be alone by `torch.optim.SGD(momentum=0.9)`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MOMENTUM = 0.9
INITIAL_STD = 0.01
PREDICTED_AT_ONCE = 1024  # rows whose logits are held at a time


class ClassifierGrid:
    """C classifiers as one weight (D, C, K) and one bias (C, K), which start alike: weights from N(0, 0.01), biases zero."""

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        learning_rates: Sequence[float],
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        count = len(learning_rates)
        start = INITIAL_STD * torch.randn(num_features, 1, num_classes, generator=generator)
        self.weight = start.expand(-1, count, -1).to(device, copy=True).contiguous()
        self.bias = torch.zeros(count, num_classes, device=device)
        self.rates = torch.tensor(learning_rates, device=device)[:, None]  # (C, 1)
        self.velocities = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def logits(self, features: Tensor) -> Tensor:
        """features (B, D) -> (B, C, K)."""
        return (features @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias

    def predict(self, features: Tensor) -> Tensor:
        """features (B, D) -> each classifier's class for each of them, (C, B)."""
        return torch.cat(
            [self.logits(rows).argmax(dim=2) for rows in features.split(PREDICTED_AT_ONCE)]
        ).T

    def step(self, features: Tensor, gradient: Tensor, decay: float) -> None:
        """One step of SGD with momentum: `gradient` (B, C, K) is the loss's at the logits of `features` (B, D).

        `decay` multiplies every learning rate; it is what the schedule says.
        """
        slopes = (features.T @ gradient.flatten(1)).view_as(self.weight), gradient.sum(dim=0)
        for parameter, velocity, slope in zip(
            (self.weight, self.bias), self.velocities, slopes, strict=True
        ):
            velocity.mul_(MOMENTUM).add_(slope)
            parameter.addcmul_(velocity, self.rates, value=-decay)


def cross_entropy_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient (B, C, K) of each classifier's mean cross-entropy at its logits (B, C, K); labels (B,)."""
    one_hot = F.one_hot(labels, logits.shape[2]).unsqueeze(1)
    return (logits.softmax(dim=2) - one_hot) / len(labels)


__all__ = ["ClassifierGrid", "cross_entropy_gradient"]
