"""The ways from tokens to one vector per image, by name.

This file travels with every saved model. It imports nothing: command lines show the names before
torch is there.
"""

from typing import Literal

Pooling = Literal["cls", "mean", "register", "prefix", "attention", "global_repr"]
"""How tokens become one vector per image; see `MimRefinerConfig.pooling`."""

LEARNED_POOLINGS = ("attention", "global_repr")
"""Those with weights, which were trained to read the encoder's output and nothing else."""
