"""50 steps of a small refinement tell the losses that were kept, bit by bit where this kind of
machine is listed.
"""

from pathlib import Path

import pytest
from golden_losses import STEPS, TOLERANCE, difference, kept, machine, measured


def test_the_losses_are_the_kept_ones(tmp_path: Path) -> None:
    """After a change that is meant to alter them: `python -m tests.golden_losses --write`."""
    found, expected = measured(tmp_path), kept()
    if machine() in expected:
        own = expected[machine()]
        differing = [step for step in range(STEPS) if found[step] != own[step]]
        assert differing == [], (
            f"other losses from step {differing[0]} on, by up to {difference(found, own):.1e}"
        )
    else:
        print(f"{machine()} is not listed: compared up to {TOLERANCE}")
        assert min(difference(found, own) for own in expected.values()) <= TOLERANCE


def test_the_comparison_sees_the_last_bit() -> None:
    (losses,) = kept().values()
    assert len(losses) == STEPS and len(set(losses)) == STEPS
    spoiled = [*losses[:-1], losses[-1] * (1 + 2**-23)]
    assert spoiled != losses and 0 < difference(spoiled, losses) == pytest.approx(2**-23)
