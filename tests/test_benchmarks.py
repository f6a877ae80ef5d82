"""The benchmark command: what it refuses, its table, and one cheap row from end to end."""

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.rows import LeftOut, Row, Seconds, interleaved


def a_row(peer: float, wall: tuple[float, float] | None = None, at_most: bool = False) -> Row:
    measured, theirs = Seconds(2.0), Seconds(peer)
    if wall is not None:
        measured.wall, theirs.wall = wall
    return Row("a-row", 1.5, measured, theirs, None, "sizes; peer", at_most)


def test_an_unknown_row_and_a_missing_folder_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, words in (
        (["queues"], "no row queues; there are heads-queue-loss"),
        (["--markdown", str(tmp_path / "absent" / "speed.md")], "there is no folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main(arguments)
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_ratios_and_targets() -> None:
    assert a_row(3.0).ratio == 1.5 and a_row(3.0).holds and not a_row(2.9).holds and a_row(3.0).wall_ratio is None
    assert a_row(3.0, (1.0, 4.0)).wall_ratio == 4.0
    assert a_row(1.0, (1.0, 4.0), at_most=True).wall_ratio == 0.25 and not a_row(1.0, at_most=True).holds


def test_ways_take_turns_and_the_first_call_is_not_timed() -> None:
    calls: list[str] = []
    found = interleaved(lambda: calls.append("a"), lambda: calls.append("b"), rounds=3)
    assert calls[:8] == ["a", "b"] * 4 and len(found) == 2 and all(seconds >= 0 for seconds in found)


def test_rows_that_miss_or_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def absent() -> Row:
        raise LeftOut("there are no pictures")

    monkeypatch.setattr(command, "ROWS", {"good": lambda: a_row(4.0, (1.0, 3.0)), "bad": lambda: a_row(1.0), "absent": absent})
    assert command.main(["good", "absent"]) == 0 and command.main(["bad", "--json"]) == 1
    shown = capsys.readouterr()
    assert "absent: left out, there are no pictures" in shown.err
    assert json.loads(shown.out.splitlines()[-1])["holds"] is False
    assert command.main(["--markdown", str(tmp_path / "speed.md")]) == 1
    page = (tmp_path / "speed.md").read_text()
    assert "| a-row | >= 1.50x | 2.0000s | 4.0000s | 2.00x | 3.00x | - | yes | sizes; peer |" in page
    assert "**no**" in page and "`absent`: left out, there are no pictures" in page


def test_a_cheap_row(capsys: pytest.CaptureFixture[str]) -> None:
    """Whether it meets its target depends on what else the machine does."""
    assert command.main(["loss", "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["name"] == "loss" and found["floor"] > 0 and found["ratio"] == pytest.approx(found["peer"] / found["measured"])
