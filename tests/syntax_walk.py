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
SAFE_LOADERS = frozenset(["yaml.SafeLoader", "yaml.CSafeLoader"])


def findings(source: str) -> list[tuple[int, str]]:
    """Every forbidden thing in a module's source, as its line and a few words."""
    tree = ast.parse(source)
    names = dict(imported(tree))
    safe = SAFE_LOADERS | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        if any(dotted(b, names) in SAFE_LOADERS for b in node.bases)
    }
    return sorted(
        (getattr(node, "lineno", 0), what)
        for node in ast.walk(tree)
        for what in wrong(node, names, safe)
    )


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Local name -> what it stands for, of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (
                    (alias.asname, alias.name)
                    if alias.asname
                    else (alias.name.partition(".")[0],) * 2
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (
                (alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names
            )


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """`np.load` as "numpy.load"; "" where it is no plain name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (before := dotted(node.value, names)):
        return f"{before}.{node.attr}"
    return ""


def wrong(
    node: ast.AST, names: dict[str, str], safe_loaders: frozenset[str] | set[str]
) -> Iterator[str]:
    """What is wrong with one node."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        module = getattr(node, "module", None)
        for alias in node.names:
            name = f"{module}.{alias.name}" if module else alias.name
            if (
                name.partition(".")[0] in MODULES
                and name not in HARMLESS
                and not getattr(node, "level", 0)
            ):
                yield f"import of {name}"
    elif isinstance(node, ast.Call):
        called = dotted(node.func, names)
        keywords = {keyword.arg for keyword in node.keywords}
        if called in CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr in METHODS):
            yield f"call of {called or ast.unparse(node.func)}"
        if called == "torch.load" and "weights_only" not in keywords:
            yield "torch.load without weights_only=True"
        if called == "yaml.load":
            given = [
                *node.args[1:2],
                *(keyword.value for keyword in node.keywords if keyword.arg == "Loader"),
            ]
            if not given or dotted(given[0], names) not in safe_loaders:
                yield "yaml.load without a SafeLoader"
        for keyword in node.keywords:
            # a `zip` may be cut short on purpose, a state dict may not
            if keyword.arg in KEYWORDS and (called, keyword.arg) != ("zip", "strict"):
                yield from unless(keyword.value, keyword.arg)
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and key.value in KEYWORDS:
                yield from unless(value, str(key.value))
    elif isinstance(node, ast.arguments):
        positional = [*node.posonlyargs, *node.args]
        defaults = [
            *zip(reversed(positional), reversed(node.defaults), strict=False),
            *zip(node.kwonlyargs, node.kw_defaults, strict=True),
        ]
        for argument, default in defaults:
            if argument.arg in KEYWORDS and default is not None:
                yield from unless(default, argument.arg)


def unless(value: ast.expr, name: str) -> Iterator[str]:
    """A complaint unless the value is the one that is allowed, written out."""
    if not (isinstance(value, ast.Constant) and value.value is KEYWORDS[name]):
        yield f"{name}={ast.unparse(value)}"
