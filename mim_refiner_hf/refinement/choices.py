"""The words that settings of heads and loss can be; nothing is imported here, as `--help` shows
them.
"""

from typing import Literal

Activation = Literal["gelu", "relu"]
HeadInit = Literal["xavier", "kaiming"]
NormViews = Literal["together", "apart"]
Pairs = Literal["intended", "released"]
Swap = Literal["positive", "all", "none"]
LossSchedule = Literal["constant", "uniform_decay", "staggered_decay", "staggered_step", "one_hot"]
