"""Flags that several commands have, and the types that turn their words into values."""

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """What argparse turns a word into: a whole number, `least` or more; argparse puts the flag's name before the message."""

    def number(word: str) -> int:
        if not word.removeprefix("-").isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"{word}: must be a whole number, at least {least}")
        return int(word)

    return number
