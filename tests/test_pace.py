"""How long a stage takes, as it is told, against a clock that the test sets."""

import pytest

from mim_refiner_hf.runtime import pace
from mim_refiner_hf.runtime.pace import duration


def test_the_pace_is_said_once_a_stage_after_its_first_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now)
    asked = pace.Pace()
    said = {}
    # the first step of each stage is slow
    costs = [100.0, *[2.0] * 9, 50.0, *[30.0] * 199]
    for step, cost in enumerate(costs):
        now += cost
        stage, ends = ("warm-up", 10) if step < 10 else ("refinement", 210)
        line = asked.after(stage, ends - step - 1)
        if line:
            said[step] = line
    assert said == {
        3: "warm-up: 2 s a step, by the first 3: 6 left, about 12 s",
        13: "refinement: 30 s a step, by the first 3: 196 left, about 1.6 h",
    }


def test_of_a_stage_that_is_over_nothing_is_said() -> None:
    asked = pace.Pace()
    assert [asked.after("short", left) for left in (3, 2, 1, 0)] == [None] * 4


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "1.5 min"), (5399, "90.0 min"), (7200, "2.0 h")],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text
