"""What waits until somebody needs it, so that a command which only prints its help starts fast.

# in the __init__.py of a folder: its names, each with the file that it is in
__getattr__, __dir__ = lazy_names(__name__, {"images": ["open_images", "ImageDataset"]})

# once somebody has imported that module, or at once where that is done
after_import("transformers.pipelines", register_the_pipeline)
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import HfArgumentParser


def lazy_names(
    package: str, files: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562) whose names are imported on first use.

    Args:
        package: its `__name__`.
        files: module below the package, with dots where it is deeper -> names that it gives.
    """
    home = {name: file for file, names in files.items() for name in names}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{home[name]}"), name)
        # from now on it is found without asking here
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return get, names


def after_import(table: str, action: Callable[[], None], own: Sequence[str] = ()) -> None:
    """Call `action` when the module `table` has been imported: at once, or by who imports it first.

    What `action` raises is raised by that import.

    Args:
        own: modules that `action` imports. Where one of them is just being imported, and has
            itself asked for `table`, the end of that is waited for.
    """
    waiting = _Waiting(table, action, own)
    if not waiting.acted():
        for module in (table, *own):
            _Finder.waiting.setdefault(module, []).append(waiting)
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())


class _Waiting:
    """An action that waits for a module."""

    def __init__(self, table: str, action: Callable[[], None], own: Sequence[str]) -> None:
        self.table = table
        self.action = action
        self.own = own
        self.done = False

    def acted(self) -> bool:
        """Act if it is time; whether that is done."""
        there = self.table in sys.modules and self.table not in _Finder.running
        if not self.done and there and _Finder.running.isdisjoint(self.own):
            # before the action: it imports modules that ask here again
            self.done = True
            self.action()
        return self.done


class _Finder(MetaPathFinder):
    """Finds modules that are waited for as the other finders do, and tells when they have run."""

    waiting: dict[str, list[_Waiting]] = {}
    running: set[str] = set()

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module that somebody waits for; None for every other."""
        waiting = [each for each in cls.waiting.get(fullname, []) if not each.done]
        if not waiting:
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, cls)]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, found), None)
        if spec is None or spec.loader is None:
            return spec

        execute = spec.loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            cls.running.add(fullname)
            try:
                execute(module)
            finally:
                cls.running.discard(fullname)
            for each in waiting:
                each.acted()

        # the loader is this module's own
        spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


def argument_parser(*settings: type, **options: Any) -> "HfArgumentParser":
    """transformers' HfArgumentParser, without the half second that its package takes.

    Its file needs the standard library and PyYAML alone. A version of transformers where it needs
    more is imported as a whole.

    Args:
        settings: dataclasses whose fields become flags.
        options: of `argparse.ArgumentParser`.
    """
    try:
        module = _file_of("transformers", "hf_argparser")
    except ImportError:
        module = import_module("transformers.hf_argparser")
    parser: HfArgumentParser = module.HfArgumentParser(list(settings), **options)
    return parser


def _file_of(package: str, name: str) -> ModuleType:
    """The module `name` of a package, executed without the package's own `__init__.py`.

    Raises:
        ImportError: where there is none, or where it imports its neighbours.
    """
    whole = find_spec(package)
    if whole is None or whole.origin is None:
        raise ImportError(f"{package} is not installed")
    spec = spec_from_file_location(name, Path(whole.origin).with_name(f"{name}.py"))
    if spec is None or spec.loader is None:
        raise ImportError(f"{package} has no file {name}.py")

    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError as error:
        raise ImportError(f"{package} has no file {name}.py") from error
    return module
