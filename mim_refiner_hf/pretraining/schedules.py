"""How rates and momenta run over a pre-training: one schedule serves ConMIM and CAPI.

schedule = WarmupCosine(total=500_000, base=1e-3, warmup=50_000, truncate=0.8)
schedule(0), schedule(49_999), schedule(499_999)    # 0.0, 0.001, 0.0000955
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupCosine:
    """A line from `start` to `base`, then a cosine towards `final`, at any step from 0 on.

    The line has both ends, so `base` is the value of the last step of the warm-up and of the one
    after it. `final` itself comes at `total`, which is one step after the last.

    Attributes:
        total: steps of the training.
        base: value between warm-up and cosine.
        final: where the cosine leads.
        start: value of step 0, if there is a warm-up.
        warmup: steps of the warm-up.
        truncate: the share of its half period at which the cosine is cut off (CAPI: 0.8).
    """

    total: int
    base: float
    final: float = 0.0
    start: float = 0.0
    warmup: int = 0
    truncate: float = 1.0

    def __call__(self, step: int) -> float:
        """The value of a step, 0-based."""
        if step >= self.total:
            return self.final
        if step < self.warmup:
            return self.start + (self.base - self.start) * step / max(self.warmup - 1, 1)
        angle = math.pi * self.truncate * (step - self.warmup) / (self.total - self.warmup)
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(angle))
