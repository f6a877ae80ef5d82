"""What the package may not do, found in its syntax trees.

`findings(source)` lists (line, what) of every forbidden import and call.

It is a guard against slips, not against an author who hides what he does (`getattr(builtins, "ev" +
"al")`).
"""

import ast
from collections.abc import Iterator

# modules that execute what they read; of pickle only the name of its error
MODULES = frozenset(
    [
        "pickle",
        "_pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "joblib",
        "marshal",
        "shelve",
        "jsonpickle",
        "runpy",
    ]
)
HARMLESS = frozenset(["pickle.UnpicklingError"])
CALLS = frozenset(
    [
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
        "asyncio.create_subprocess_shell",
        "tempfile.mktemp",
        "shutil.unpack_archive",
        "ssl._create_unverified_context",
        "yaml.unsafe_load",
        "yaml.full_load",
        "yaml.load_all",
        "yaml.unsafe_load_all",
        "yaml.full_load_all",
        "pandas.read_pickle",
        "torch.jit.load",
        "torch.export.load",
        "torch.hub.load",
        "torch.distributed.checkpoint.load",
        "torch.serialization.add_safe_globals",
        "evaluate.load",
        "onnx.hub.load",
        "accelerate.load_checkpoint_in_model",
        "accelerate.load_checkpoint_and_dispatch",
    ]
)
# methods, whatever they are called on: unpacking archives, and accelerate's checkpoints, which are
# pickles
METHODS = frozenset(["extractall", "extract_all", "load_state", "read_pickle"])
# keyword -> the only value it may have
KEYWORDS = {
    "shell": False,
    "trust_remote_code": False,
    "allow_pickle": False,
    "weights_only": True,
    "verify": True,
    "strict": True,
}
# BaseLoader knows no tags at all: it makes text, lists and dictionaries, and nothing else
SAFE_LOADERS = frozenset(["yaml.SafeLoader", "yaml.CSafeLoader", "yaml.BaseLoader"])


def findings(source: str) -> list[tuple[int, str]]:
    """Every forbidden thing in a module's source, as its line and a few words."""
    tree = ast.parse(source)
    names = imported(tree)
    safe_loaders = set(SAFE_LOADERS)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = {dotted(base, names) for base in node.bases}
            if bases & SAFE_LOADERS:
                safe_loaders.add(node.name)

    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            words = wrong_imports(node)
        elif isinstance(node, ast.Call):
            words = wrong_call(node, names, safe_loaders)
        elif isinstance(node, ast.Dict):
            words = wrong_items(node)
        elif isinstance(node, ast.arguments):
            words = wrong_defaults(node)
        else:
            continue
        found += [(getattr(node, "lineno", 0), what) for what in words]
    return sorted(found)


def imported(tree: ast.Module) -> dict[str, str]:
    """Local name -> what it stands for, of every import."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package = alias.name.partition(".")[0]
                names[alias.asname or package] = alias.name if alias.asname else package
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """`np.load` as "numpy.load"; "" where it is no plain name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    before = dotted(node.value, names) if isinstance(node, ast.Attribute) else ""
    return f"{before}.{node.attr}" if before else ""


def wrong_imports(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Modules that execute what they read; a module of our own of that name is another."""
    if isinstance(node, ast.ImportFrom) and node.level:
        return
    module = getattr(node, "module", None)
    for alias in node.names:
        name = f"{module}.{alias.name}" if module else alias.name
        if name.partition(".")[0] in MODULES and name not in HARMLESS:
            yield f"import of {name}"


def wrong_call(node: ast.Call, names: dict[str, str], safe_loaders: set[str]) -> Iterator[str]:
    """What is wrong with the function that is called, and with its arguments."""
    called = dotted(node.func, names)
    given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    is_method = isinstance(node.func, ast.Attribute) and node.func.attr in METHODS
    if called in CALLS or is_method:
        yield f"call of {called or ast.unparse(node.func)}"
    if called == "torch.load" and "weights_only" not in given:
        yield "torch.load without weights_only=True"
    if called == "yaml.load":
        loader = given.get("Loader", node.args[1] if len(node.args) > 1 else None)
        if loader is None or dotted(loader, names) not in safe_loaders:
            yield "yaml.load without a SafeLoader"

    for name, value in given.items():
        # a `zip` may be cut short on purpose, a state dict may not
        if not (called == "zip" and name == "strict"):
            yield from unless(value, name)


def wrong_items(node: ast.Dict) -> Iterator[str]:
    """Keywords in a dictionary, which may be passed on with two stars."""
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant):
            yield from unless(value, key.value)


def wrong_defaults(node: ast.arguments) -> Iterator[str]:
    """Keywords of a function of ours, whose default is as good as a call with it."""
    positional = [*node.posonlyargs, *node.args]
    defaults = [
        *zip(reversed(positional), reversed(node.defaults), strict=False),
        *zip(node.kwonlyargs, node.kw_defaults, strict=True),
    ]
    for argument, default in defaults:
        if default is not None:
            yield from unless(default, argument.arg)


def unless(value: ast.expr, name: object) -> Iterator[str]:
    """A complaint about a keyword that has one allowed value, unless that is written out."""
    if name not in KEYWORDS:
        return
    if not (isinstance(value, ast.Constant) and value.value is KEYWORDS[str(name)]):
        yield f"{name}={ast.unparse(value)}"
