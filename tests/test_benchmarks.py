"""The benchmark command: what it refuses, its table, and one cheap row from end to end."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import embed_large, families, growth, views_quality
from benchmarks.rows import LeftOut, Row, Seconds, interleaved


def a_row(peer: float, wall: tuple[float, float] | None = None, at_most: bool = False) -> Row:
    measured, theirs = Seconds(2.0), Seconds(peer)
    if wall is not None:
        measured.wall, theirs.wall = wall
    return Row("a-row", 1.5, measured, theirs, None, "sizes; peer", at_most)


def test_an_unknown_row_and_a_missing_folder_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arguments, words in (
        (["queues"], "no row queues; there are heads-queue-loss"),
        (["--markdown", str(tmp_path / "absent" / "speed.md")], "there is no folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main(arguments)
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_ratios_and_targets() -> None:
    assert (
        a_row(3.0).ratio == 1.5
        and a_row(3.0).holds
        and not a_row(2.9).holds
        and a_row(3.0).wall_ratio is None
    )
    assert a_row(3.0, (1.0, 4.0)).wall_ratio == 4.0
    assert (
        a_row(1.0, (1.0, 4.0), at_most=True).wall_ratio == 0.25
        and not a_row(1.0, at_most=True).holds
    )


def test_ways_take_turns_and_the_first_call_is_not_timed() -> None:
    calls: list[str] = []
    found = interleaved(lambda: calls.append("a"), lambda: calls.append("b"), rounds=3)
    assert (
        calls[:8] == ["a", "b"] * 4 and len(found) == 2 and all(seconds >= 0 for seconds in found)
    )


def test_rows_that_miss_or_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def absent() -> Row:
        raise LeftOut("there are no pictures")

    monkeypatch.setattr(
        command,
        "ROWS",
        {"good": lambda: a_row(4.0, (1.0, 3.0)), "bad": lambda: a_row(1.0), "absent": absent},
    )
    assert command.main(["good", "absent"]) == 0 and command.main(["bad", "--json"]) == 1
    shown = capsys.readouterr()
    assert "absent: left out, there are no pictures" in shown.err
    assert json.loads(shown.out.splitlines()[-1])["holds"] is False
    assert command.main(["--markdown", str(tmp_path / "speed.md")]) == 1
    page = (tmp_path / "speed.md").read_text()
    assert (
        "| a-row | >= 1.50x | 2.0000s | 4.0000s | 2.00x | 3.00x | - | yes | sizes; peer |" in page
    )
    assert "**no**" in page and "`absent`: left out, there are no pictures" in page


def test_a_cheap_row(capsys: pytest.CaptureFixture[str]) -> None:
    """Whether it meets its target depends on what else the machine does."""
    assert command.main(["loss", "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert (
        found["name"] == "loss"
        and found["floor"] > 0
        and found["ratio"] == pytest.approx(found["peer"] / found["measured"])
    )


def test_exponents_and_their_verdict() -> None:
    axis = growth.Axis(
        lambda size: lambda: None, (2, 3, 7), (0.9, 1.1), "so", "rows", lambda size: size**2
    )
    cost = [5 * axis.work(size) ** 1.5 for size in axis.sizes]
    assert growth.exponent(axis, cost) == pytest.approx(1.5)
    page = "\n".join(growth.table("rows", axis, cost))
    assert "**1.50**, NOT as expected: more" in page and "| rows | 4 | 9 | 49 |" in page
    assert "as expected." in growth.table("rows", axis, [axis.work(size) for size in axis.sizes])[2]


def test_verdicts_on_the_quality_of_views() -> None:
    """A difference of 2 points on every seed, give or take 0.1, is one.

    Of 2 on one seed only it is none.
    """
    for apart, verdict in (
        ((0.02, 0.021, 0.019), "better"),
        ((-0.02, -0.021, -0.019), "worse"),
        ((0, 0.02, 0), "no difference"),
    ):
        exact, fast = 3 * (0.5,), [0.5 + each for each in apart]
        scores = {
            (way, seed): dict.fromkeys(views_quality.METRICS, values[seed])
            for way, values in (("exact", exact), ("fast", fast))
            for seed in range(3)
        } | {("start", 0): dict.fromkeys(views_quality.METRICS, 0.25)}
        found = views_quality.lines("digits", scores)
        assert len(found) == 3 and all(verdict in line and "| 25.0 |" in line for line in found)


def test_the_rows_of_families(tmp_path: Path) -> None:
    """One of each kind; the page itself runs all cases."""
    row = families.timm_row("eva-02-base", tmp_path / "timm")
    assert row.came_in and row.went_out
    assert row.cells[0] == "`eva02_base_patch14_224` (eva-02-base)"
    assert row.cells[5:7] == ("finite loss", "`eva02_base_patch14_224`")
    assert all(float(cell) < 1e-5 for cell in (*row.cells[1:5], row.cells[7]))

    row = families.class_row("ijepa", tmp_path / "class")
    assert row.came_in and row.went_out and row.cells[6] == "`IJepaModel`"

    (tmp_path / "other").mkdir()
    row = families.refused("swin", "model_type", tmp_path / "other")
    assert not row.came_in and not row.went_out
    assert row.cells[6].endswith("its tokens change in width and number from stage to stage")
    assert len(families.table_of([row])) == 3


def test_a_large_embedding_is_watched_to_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The file that is finished after the last look counts, and a failure is said."""
    counts = iter([0, 5, 10, 15, 20])
    monkeypatch.setattr(embed_large, "images_in", lambda folder: next(counts))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    looks = iter([None] * 4 + [0])
    monkeypatch.setattr("subprocess.Popen.poll", lambda process: next(looks))
    script = [sys.executable, "-c", "import time; time.sleep(0.5)"]
    moments = embed_large.watch(script, tmp_path, None)
    assert [moment.images for moment in moments] == [0, 5, 10, 15, 20]
    assert embed_large.rate(moments) > 0
    assert embed_large.row("all", moments).startswith("| all | 0 to 20 |")

    monkeypatch.undo()
    with pytest.raises(SystemExit, match=r"ended with 2: error: no$"):
        embed_large.watch([sys.executable, "-c", "print('error: no'); exit(2)"], tmp_path, None)
