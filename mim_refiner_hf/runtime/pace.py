"""How long a stage takes, said once its first steps have been timed.

    pace = Pace()
    for step in range(100):
        ...                                     # do it
        line = pace.after("refinement", left=99 - step)
        if line:
            print(line)       # refinement: 1.9 s a step, by the first 3: 97 left, about 3.1 min

Nothing is guessed beforehand. The first step of a stage is left out: it starts workers, compiles
and fills caches.
"""

import time

_TIMED = 3
"""Steps that are timed, after the first one."""


class Pace:
    """The time of the steps of one stage after another."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._began = 0.0
        self._steps = 0

    def after(self, stage: str, left: int) -> str | None:
        """To be called after every step.

        Args:
            stage: what is done, in words; another stage is timed anew.
            left: how many of its steps are to come.

        Returns:
            The line, after the fourth step of a stage that is not over then; else None.
        """
        if stage != self._stage:
            self._stage = stage
            self._began = time.perf_counter()
            self._steps = 0
            return None

        self._steps += 1
        if self._steps != _TIMED or left == 0:
            return None
        seconds = (time.perf_counter() - self._began) / _TIMED
        return (
            f"{stage}: {seconds:.2g} s a step, by the first {_TIMED}: {left} left, "
            f"about {duration(left * seconds)}"
        )


def duration(seconds: float) -> str:
    """Seconds for readers: "45 s", "12.3 min", "5.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
