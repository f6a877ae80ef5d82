"""What the pages say: links lead somewhere, command lines parse, snippets compile."""

import ast
import contextlib
import functools
import importlib
import io
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

from mim_refiner_hf.cli import COMMANDS, main
from mim_refiner_hf.conversion.zoo import ZOO

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples" / "README.md",
    ROOT / "examples" / "space" / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "model_cards" / "README.md",
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """The text of a page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in some languages."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [code for language, code in found if language in languages]


# --- links ----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {word.strip().replace(" ", "-") for word in words}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    wrong = []
    for groups in LINK.findall(prose(page)):
        link = "".join(groups)
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page

        if not target.exists() or not target.is_relative_to(ROOT):
            wrong.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target):
            wrong.append(f"{link}: no such heading; there are {sorted(anchors(target))}")
    assert wrong == []


def test_every_page_is_in_the_navigation_and_linked_from_the_index() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"^  - ([\w-]+\.md)$", settings, re.MULTILINE)) == pages

    links = {"".join(groups) for groups in LINK.findall(prose(ROOT / "docs" / "index.md"))}
    assert pages - {"index.md"} <= links


# --- command lines --------------------------------------------------------------------------------


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words of every command in a page's shell blocks, and of those in the running text."""
    for block in blocks(page, "bash", "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                if words := shlex.split(part, comments=True):
                    yield words

    for code in CODE.findall(prose(page)):
        if code.startswith(("mim-refiner ", "accelerate launch ")):
            yield [word for word in shlex.split(code) if word != "..."]


@functools.cache
def known_flags(command: str) -> frozenset[str]:
    """The flags of `mim-refiner COMMAND`, from its --help."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        main([command, "--help"])
    return frozenset(re.findall(r"(?<![\w-])--\w[\w-]*", text.getvalue()))


def launcher_flags(launcher: str) -> frozenset[str]:
    """The flags of `accelerate launch` and of `torchrun`."""
    parser = launch_command_parser() if launcher == "accelerate" else torchrun_parser()
    return frozenset(flag for action in parser._actions for flag in action.option_strings)


def flags_in(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def script_in(words: list[str]) -> int | None:
    """Where in a command line the script stands."""
    places = [place for place, word in enumerate(words) if word.endswith(".py")]
    return places[0] if places else None


def wrong_in(words: list[str]) -> str | None:
    """What is wrong with a command line, as far as flags, commands and files of ours go."""
    if words[0] == "mim-refiner":
        command = words[1]
        if command.startswith("-"):
            return None
        unknown = flags_in(words[2:]) - known_flags(command) if command in COMMANDS else {command}
        return f"mim-refiner {command} knows no {sorted(unknown)}" if unknown else None

    place = script_in(words)
    if place is None:
        return None
    script = ROOT / words[place]
    if not script.is_file():
        return f"there is no {words[place]}"
    if words[0] in ("accelerate", "torchrun"):
        unknown = flags_in(words[1:place]) - launcher_flags(words[0])
        if unknown:
            return f"{words[0]} knows no {sorted(unknown)}"

    given = flags_in(words[place + 1 :])
    if script.parent.name == "training":
        unknown = given - known_flags(script.stem)
    else:
        source = script.read_text(encoding="utf-8")
        unknown = {flag for flag in given if f'"{flag}"' not in source}
    return f"{words[place]} knows no {sorted(unknown)}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_command_lines_parse(page: Path) -> None:
    wrong = [(shlex.join(words), wrong_in(words)) for words in command_lines(page)]
    assert [(line, why) for line, why in wrong if why is not None] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipes_and_benchmarks_that_are_named_exist(page: Path) -> None:
    for words in command_lines(page):
        for flag, value in itertools.pairwise(words):
            if flag in ("--recipe", "--pretrain"):
                names = (value, f"training/recipes/{value}.yaml")
                assert any((ROOT / name).is_file() for name in names), words
        if words[:2] == ["python", "-m"] and words[2].startswith(("benchmarks", "model_cards")):
            module = ROOT / words[2].replace(".", "/")
            assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), words


def test_every_recipe_is_in_the_pages() -> None:
    """By its name, or, of a family such as `ablation-heads-1`, `-2`, by its ending."""
    named = {word for page in PAGES for code in CODE.findall(prose(page)) for word in code.split()}
    named |= {word for page in PAGES for words in command_lines(page) for word in words}

    for path in (ROOT / "training" / "recipes").glob("*.yaml"):
        parts = path.stem.split("-")
        endings = {f"-{'-'.join(parts[place:])}" for place in range(2, len(parts))}
        assert path.stem in named or endings & named, f"no page names the recipe {path.stem}"


def test_a_wrong_command_line_is_found() -> None:
    assert wrong_in(["mim-refiner", "evaluate", "m", "--nonsense", "1"])
    assert wrong_in(["mim-refiner", "nonsense"])
    assert wrong_in(["accelerate", "launch", "--nonsense", "training/refine.py"])
    assert wrong_in(["accelerate", "launch", "training/refine.py", "--nonsense"])
    assert wrong_in(["python", "training/nonsense.py"])
    assert wrong_in(["accelerate", "launch", "training/refine.py", "--seed", "1"]) is None


# --- snippets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_snippets_compile_and_their_imports_resolve(page: Path) -> None:
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name != "fiftyone":  # 2 GB with its own
                        importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                if node.module == "gradio_client":  # of the extra `space`
                    continue
                assert node.module is not None and node.level == 0
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert missing == [], f"{node.module} has no {missing}"


def test_what_the_api_page_documents_exists() -> None:
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    for name in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


# --- README ---------------------------------------------------------------------------------------


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 100] == []


def test_readme_draws_every_folder() -> None:
    tree = blocks(ROOT / "README.md", "text")[-1]
    rooms = {path.parent.name for path in (ROOT / "mim_refiner_hf").glob("*/__init__.py")}
    assert rooms | {"metrics"} <= set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE))


def zoo_numbers() -> dict[str, list[str]]:
    """Name in the zoo -> k-NN, linear probe, 1-shot, cluster accuracy, from the rendered table."""
    rows = re.findall(
        r"^\| \[.*?\| `([\w-]+)` \| [^|]+ \| (.*) \|$",
        (ROOT / "model_cards" / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_numbers_of_models_are_those_of_the_cards() -> None:
    numbers = zoo_numbers()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pairs = re.findall(r"`([\w-]+-refined-\w+)`, k-NN ([\d.]+) -> ([\d.]+) %", readme)
    assert len(pairs) == 2
    for refined, before, after in pairs:
        start = refined.replace("-refined", "")
        assert (before, after) == (numbers[start][0], numbers[refined][0])

    choice = (ROOT / "docs" / "choosing-a-model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \S+/\d+ \| `([\w-]+)` \| [^|]+ \| (.*) \|$", choice, re.MULTILINE)
    assert {name for name, _ in rows} >= numbers.keys()
    for name, cells in rows:
        knn, shot, clusters = (cell.strip() for cell in cells.split("|"))
        if name in numbers:
            assert [knn, shot, clusters] == [numbers[name][place] for place in (0, 2, 3)], name
        else:
            assert {knn, shot, clusters} == {"-"}, name


def test_times_and_licences_of_models_are_those_measured_and_stated() -> None:
    measured = (ROOT / "benchmarks" / "results" / "model-times.md").read_text(encoding="utf-8")
    times = {
        size: (few, many, refining)
        for size, few, many, refining in re.findall(
            r"^\| (\S+) \| [^|]+ \| ([^|]+) \| ([^|]+) \| [^|]+ \| [^|]+ \| ([^|]+) \|$",
            measured,
            re.MULTILINE,
        )
    }
    rows = re.findall(
        r"^\| [^|]+ \| (\w/\d+) `([\w/-]+)`[^|]* \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(rows) == 4
    for size, name, licence, *cells in rows:
        assert tuple(cells) == times[size], size
        stated = ZOO[name].licence if name in ZOO else "apache-2.0"
        assert licence == (stated or "none stated"), name
