"""A hundred of the damages of `tests/damage.py`.

What cannot be read says so in one line, and nothing else is ever read.
"""

from pathlib import Path

import numpy as np
import pytest
from damage import BYTE_DAMAGES, TARGETS, Target, damage_once, judge


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damage_is_named_in_one_line(target: Target, tmp_path: Path) -> None:
    target.write(tmp_path)
    before = target.read(tmp_path)
    found = [
        damage_once(target, tmp_path, before, np.random.default_rng([1, number]))
        for number in range(9)
    ]
    assert [case for case in found if case.wrong] == []
    assert target.read(tmp_path) == before


def test_the_judge_condemns(tmp_path: Path) -> None:
    """What it is there to find, it finds.

    A silent change, a foreign error, a line without remedy.
    """
    target = TARGETS[0]
    target.write(tmp_path)

    def reading(said: Exception | str) -> Target:
        def read(folder: Path) -> str:
            if isinstance(said, str):
                return said
            raise said

        return Target("t", target.write, read, target.files)

    assert judge(reading("same"), tmp_path, "same", "a.json") is None
    for said, wrong in (
        ("other", "silent"),
        (KeyError("x"), "not ours"),
        (ValueError("remove it"), "not ours"),
    ):
        verdict = judge(reading(said), tmp_path, "same", "a.json")
        assert verdict is not None and verdict[1].startswith(wrong)
    assert all(
        damage(b"0123456789", np.random.default_rng(0)) != b"0123456789"
        for damage in BYTE_DAMAGES.values()
    )
