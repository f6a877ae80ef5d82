"""How the code reads, as far as its syntax trees tell: the rules of style that ruff has not.

    python -m tests.style_walk mim_refiner_hf/refinement        # what is to be mended there

- no ternary within a ternary;
- no truth value times a list, a string or a number: `["x"] * flag`;
- no walrus within a comprehension;
- no function over 60 lines without its docstring;
- no line over 100 columns, no file over 450 lines, unless its docstring says "long because";
- no comment behind code, unless it begins with a shape, `# (heads, views, batch)`, or is as short
  as one.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

FUNCTION_LINES = 60
FILE_LINES = 450
COLUMNS = 100
SHAPE_LENGTH = 30
"""The longest comment that may stand behind code without being a shape."""
REASON = "long because"
"""How the docstring of a long file begins to say why it is."""

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# comments that are read by tools, and so have to stand where they do
FOR_TOOLS = re.compile(r"# *(type:|noqa|fmt:|pragma:|ruff:)")
SHAPE = re.compile(r"# *[(\[]")
TRUTH_CALLS = frozenset(["bool", "isinstance", "issubclass", "callable", "hasattr", "any", "all"])


def findings(source: str) -> list[tuple[int, str]]:
    """Every breach of a rule in a module's source, as its line and a few words."""
    tree = ast.parse(source)
    found = [*of_size(tree, source), *of_comments(source)]
    truths = names_of_truth(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp) and holds(node, ast.IfExp):
            found.append((node.lineno, "a ternary within a ternary"))
        if isinstance(node, COMPREHENSIONS) and holds(node, ast.NamedExpr):
            found.append((node.lineno, "a walrus within a comprehension"))
        if isinstance(node, ast.BinOp) and is_choice(node, truths):
            found.append((node.lineno, "a truth value times a list, string or number"))
    return sorted(found)


def holds(node: ast.AST, kind: type[ast.AST]) -> bool:
    """Whether there is a node of that kind below `node`."""
    return any(isinstance(below, kind) for below in ast.walk(node) if below is not node)


def of_size(tree: ast.Module, source: str) -> Iterator[tuple[int, str]]:
    """Functions, lines and files that are too long."""
    lines = source.splitlines()
    docstring = ast.get_docstring(tree) or ""
    if len(lines) > FILE_LINES and REASON not in " ".join(docstring.split()):
        yield 1, f'a file of {len(lines)} lines whose docstring does not say "{REASON}"'
    for number, line in enumerate(lines, start=1):
        # a comment for a tool has to stand where it does, and an address cannot be broken
        columns = len(FOR_TOOLS.split(line)[0].rstrip())
        if columns > COLUMNS and "://" not in line.split()[-1]:
            yield number, f"a line of {columns} columns"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                length -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if length > FUNCTION_LINES:
                yield node.lineno, f"a function of {length} lines: {node.name}"


def of_comments(source: str) -> Iterator[tuple[int, str]]:
    """Comments behind code that are longer than a shape."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line.lstrip().startswith("#"):
            continue
        words = token.string
        if FOR_TOOLS.match(words) or SHAPE.match(words) or len(words) <= SHAPE_LENGTH:
            continue
        yield token.start[0], f"a comment behind code: {words}"


def names_of_truth(tree: ast.Module) -> set[str]:
    """Names that the module annotates with `bool`: arguments, fields and variables."""
    names = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.arg | ast.AnnAssign) or node.annotation is None:
            continue
        if ast.unparse(node.annotation) == "bool":
            names.add(node.arg if isinstance(node, ast.arg) else ast.unparse(node.target))
    return names


def is_choice(product: ast.BinOp, truths: set[str]) -> bool:
    """Whether a product takes a literal or nothing, as an `if` would say.

    A number times a comparison may as well be an array times a mask, and is left alone.
    """
    if not isinstance(product.op, ast.Mult):
        return False
    for literal, factor in ((product.left, product.right), (product.right, product.left)):
        is_number = isinstance(literal, ast.Constant) and isinstance(literal.value, int | float)
        may_be_mask = is_number and isinstance(factor, ast.Compare)
        if is_literal(literal) and is_truth(factor, truths) and not may_be_mask:
            return True
    return False


def is_literal(node: ast.expr) -> bool:
    """A list, tuple, string or number, written out."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return is_literal(node.operand)
    return isinstance(node, ast.List | ast.Tuple | ast.Constant | ast.JoinedStr)


def is_truth(node: ast.expr, names: set[str]) -> bool:
    """Whether an expression can be seen to be true or false."""
    if isinstance(node, ast.Compare | ast.BoolOp):
        return True
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in TRUTH_CALLS
    if isinstance(node, ast.Attribute):
        return node.attr in names
    return isinstance(node, ast.Name) and node.id in names


def walk(folder: Path) -> Iterator[str]:
    """The findings of a file, or of all files below a folder, as `file:line: words`."""
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]
    for file in files:
        for line, words in findings(file.read_text(encoding="utf-8")):
            yield f"{file}:{line}: {words}"


if __name__ == "__main__":
    places = [found for argument in sys.argv[1:] for found in walk(Path(argument))]
    print("\n".join([*places, f"{len(places)} findings"]))
    sys.exit(bool(places))
