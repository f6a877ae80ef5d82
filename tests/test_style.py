"""The code keeps the rules of style that ruff has not: `style_walk.py` says which.

One room alone: `pytest tests/test_style.py -k refinement`.
"""

from pathlib import Path

import pytest
from style_walk import FILE_LINES, findings, walk

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "mim_refiner_hf"
ROOMS = [
    *sorted(folder.name for folder in PACKAGE.iterdir() if any(folder.rglob("*.py"))),
    "training",
]

BREACHES = {
    "a ternary within a ternary": "x = 1 if a else 2 if b else 3",
    "a truth value times a list": "def f(flag: bool):\n    return ['x'] * flag",
    "a truth value times a list, string": "x = 'part ' * (count > 1)",
    "a truth value times a list, string or number": "x = 0.5 * (not settings.on)",
    "a walrus within a comprehension": "x = [y for z in a if (y := f(z))]",
    "a function of 61 lines: f": "def f():\n" + 60 * "    x = 1\n",
    "a line of 101 columns": "x = '" + 95 * "." + "'",
    "a file of 451 lines": FILE_LINES * "x = 1\n",
    "a comment behind code": "x = 1  # as there is one image, and no other, in each row",
}
KEPT = [
    "x = 1 if a else 2\ny = 1 if b else x",
    "def f(count: int):\n    return ['x'] * count + [False] * len(a)",
    "x = 2 * (a + b) * y",
    "disc = 120.0 * (rows**2 + columns**2 < 400)",
    "x = [y for z in a if (y == z)]\nif w := f(x):\n    pass",
    "def f():\n" + 59 * "    x = 1\n",
    "x = '" + 94 * "." + "'",
    '"""Words.\n\nThis file is long\nbecause of a table."""\n' + FILE_LINES * "x = 1\n",
    "x = f(y)  # (heads, views * batch, width), views of one image side by side",
    "import y  # noqa: F401, imported for those who import it from here",
    "# as there is one image, and no other, in each row\nx = 1  # (H, V)",
]


@pytest.mark.parametrize("words", BREACHES)
def test_the_walk_finds(words: str) -> None:
    found = [what for _, what in findings(f"{BREACHES[words]}\n")]
    assert len(found) == 1 and found[0].startswith(words)


@pytest.mark.parametrize("source", KEPT)
def test_the_walk_spares(source: str) -> None:
    assert findings(f"{source}\n") == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_keeps_the_rules(room: str) -> None:
    folder = REPOSITORY / room if room == "training" else PACKAGE / room
    assert [found.removeprefix(f"{REPOSITORY}/") for found in walk(folder)] == []


def test_the_files_beside_the_rooms_keep_them() -> None:
    files = sorted(PACKAGE.glob("*.py"))
    assert files and [found for file in files for found in walk(file)] == []
