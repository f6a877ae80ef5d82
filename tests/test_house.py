"""The house: what a file may import is where it stands (docs/architecture.md), read from the syntax
trees, nothing imported.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mim_refiner_hf"

# From the top to the ground: a room imports itself and rooms below it in this list.
ROOMS = (
    "cli",
    "runs",
    "publishing",
    "metrics",
    "evaluation",
    "refinement",
    "pretraining",
    "data",
    "conversion",
    "model",
    "clustering",
    "runtime",
)
FLOORS = {
    "cli": 6,
    "runs": 5,
    "publishing": 5,
    "metrics": 5,
    "evaluation": 4,
    "refinement": 3,
    "pretraining": 3,
    "data": 2,
    "conversion": 2,
    "model": 1,
    "clustering": 1,
    "runtime": 1,
}
GROUND = ("model", "clustering", "runtime")
# `auto_map` of published models names these; they can never be called otherwise.
TRAVELLING = (
    "model/configuration_mim_refiner.py",
    "model/modeling_mim_refiner.py",
    "model/image_processing_mim_refiner.py",
    "clustering/pipeline_image_clustering.py",
)
# Names with one meaning that several files give because each is a variant of the same thing.
SAME_MEANING = {
    "logger",  # of each module
    # the three functions of every export format
    "refusal",
    "write",
    "load",
    # what `evaluate` asks of every metric module
    "CITATION",
    "DESCRIPTION",
    "INPUTS",
}

FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def module_of(path: Path) -> str:
    """`mim_refiner_hf/data/views.py` -> "data.views"; a folder's face is the folder."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, also inside functions and under
    TYPE_CHECKING.
    """
    folder = [PACKAGE, *path.relative_to(ROOT / PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else []
            base = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            # a name of a folder can be one of its files
            found = [f"{base}.{alias.name}" for alias in node.names] + [base]
        else:
            continue
        inside = [name.partition(".")[2] for name in found if name.partition(".")[0] == PACKAGE]
        submodules = [
            name for name in inside if name in MODULES and MODULES[name].name != "__init__.py"
        ]
        yield from submodules or [name for name in inside if name in MODULES]


IMPORTS = {module: sorted(set(imports_of(path))) for module, path in MODULES.items()}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def top_level_names(path: Path) -> Iterator[str]:
    """Functions, classes and constants of a file, without those that begin with an underscore."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [
                part.id
                for target in targets
                for part in ast.walk(target)
                if isinstance(part, ast.Name)
            ]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Every set of two or more nodes that reach each other (strongly connected)."""
    reach = {node: set(after) for node, after in arrows.items()}
    for middle in arrows:
        for node in arrows:
            if middle in reach[node]:
                reach[node] |= reach[middle]
    together = {
        frozenset(other for other in arrows if other in reach[node] and node in reach[other])
        for node in arrows
    }
    return [sorted(group) for group in together if len(group) > 1]


def test_every_folder_is_a_room_with_a_floor() -> None:
    folders = {path.name for path in (ROOT / PACKAGE).iterdir() if any(path.glob("**/*.py"))}
    assert folders == set(ROOMS) == set(FLOORS)
    floors = [FLOORS[room] for room in ROOMS]
    assert floors == sorted(floors, reverse=True)


def test_only_the_face_and_the_version_lie_at_the_root() -> None:
    assert {path.name for path in (ROOT / PACKAGE).glob("*.py")} == {"__init__.py", "_version.py"}


@pytest.mark.parametrize(
    "module", sorted(module for module in MODULES if module and module != "_version")
)
def test_imports_run_down(module: str) -> None:
    room = room_of(module)
    allowed = {room, *ROOMS[ROOMS.index(room) + 1 :]}
    if room in GROUND:
        allowed = {room}
    wrong = [name for name in IMPORTS[module] if room_of(name) not in allowed]
    assert not wrong, (
        f"{module} imports {', '.join(wrong)}: a room imports itself and what lies below it"
    )


def test_no_circle_between_files() -> None:
    files = {
        module: set(names) - {module}
        for module, names in IMPORTS.items()
        if MODULES[module].name != "__init__.py"
    }
    assert circles({module: names & files.keys() for module, names in files.items()}) == []


def test_no_circle_between_folders() -> None:
    folders: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, names in IMPORTS.items():
        if room_of(module) in folders:
            folders[room_of(module)] |= {room_of(name) for name in names} - {room_of(module)}
    assert circles(folders) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_a_name_lives_in_one_file() -> None:
    homes: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        if path.name != "__init__.py":
            for name in set(top_level_names(path)) - SAME_MEANING:
                homes.setdefault(name, []).append(module)
    shared = {name: sorted(modules) for name, modules in homes.items() if len(modules) > 1}
    assert shared == {}


def test_files_that_published_models_name() -> None:
    for name in TRAVELLING:
        assert (ROOT / PACKAGE / name).is_file()


@pytest.mark.parametrize("name", TRAVELLING)
def test_what_travels_imports_only_flat_neighbours(name: str) -> None:
    """transformers copies a file and what it imports as `from .name import x` into one flat folder;
    nothing else is found there.
    """
    waiting, seen = [ROOT / PACKAGE / name], set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith(PACKAGE) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith(PACKAGE)
                if node.level:
                    assert node.level == 1 and node.module and "." not in node.module, (
                        f"{path.name}: {ast.unparse(node)}"
                    )
                    neighbour = path.with_name(f"{node.module}.py")
                    assert neighbour.is_file()
                    if neighbour not in seen:
                        waiting.append(neighbour)
