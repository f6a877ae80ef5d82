"""Random numbers that are a pure function of what they are for: seed, purpose and counters.

random_generator(seed, "views", epoch, index).random()
"""

import zlib

import numpy as np


def random_generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A generator that is a pure function of its arguments, and independent of all others'."""
    key = (zlib.crc32(purpose.encode()), *numbers)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
