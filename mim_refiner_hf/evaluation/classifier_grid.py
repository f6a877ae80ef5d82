"""Many linear classifiers on the same features, one per learning rate, trained together.

    generator = torch.Generator()
    grid = ClassifierGrid(768, num_classes=10, learning_rates=[0.01, 0.1], generator=generator)
    logits = grid.logits(features)                                          # (B, 2, 10)
    grid.step(features, cross_entropy_gradient(logits, labels), decay=1.0)  # one SGD step each

Each classifier is trained exactly as it would be alone by `torch.optim.SGD(momentum=0.9)`. All of
them share one matrix product, which is what makes a grid of 13 about as fast as one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MOMENTUM = 0.9
INITIAL_STD = 0.01
# rows whose logits are held at a time
PREDICTED_AT_ONCE = 1024

# Shapes below: B rows, D features, C classifiers, K classes.


class ClassifierGrid:
    """C classifiers as one weight (D, C, K) and one bias (C, K).

    They start alike: weights drawn from N(0, 0.01), biases zero.
    """

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
        self.weight_velocity = torch.zeros_like(self.weight)
        self.bias_velocity = torch.zeros_like(self.bias)

    def logits(self, features: Tensor) -> Tensor:
        """features (B, D) -> (B, C, K)."""
        return (features @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias

    def predict(self, features: Tensor) -> Tensor:
        """features (B, D) -> each classifier's class for each of them, (C, B)."""
        parts = features.split(PREDICTED_AT_ONCE)
        return torch.cat([self.logits(rows).argmax(dim=2) for rows in parts]).T

    def step(self, features: Tensor, gradient: Tensor, decay: float | Tensor) -> None:
        """One step of SGD with momentum for every classifier.

        Args:
            features: what the logits were computed from (B, D).
            gradient: of the loss, at those logits (B, C, K).
            decay: what the schedule multiplies every learning rate by, or each of them (C, 1).
        """
        weight_slope = (features.T @ gradient.flatten(1)).view_as(self.weight)
        self._descend(self.weight, self.weight_velocity, weight_slope, decay)
        self._descend(self.bias, self.bias_velocity, gradient.sum(dim=0), decay)

    def _descend(
        self, parameter: Tensor, velocity: Tensor, slope: Tensor, decay: float | Tensor
    ) -> None:
        velocity.mul_(MOMENTUM).add_(slope)
        parameter.addcmul_(velocity, self.rates * decay, value=-1)


def cross_entropy_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of each classifier's mean cross-entropy at its logits, both (B, C, K); labels (B,).

    It is softmax minus one-hot, over B.
    """
    one_hot = F.one_hot(labels, logits.shape[2]).unsqueeze(1)
    return (logits.softmax(dim=2) - one_hot) / len(labels)
