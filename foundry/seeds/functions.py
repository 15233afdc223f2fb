"""Functions in Python sources, taken apart: signature, docstring, body.

They are found by parsing (`ast`) and cut from the text as it stands there, comments and all, so what is mined is code
that somebody wrote. A method is dedented; its class line goes along, so that it can be shown where it belongs.
"""

import ast
import functools
import gc
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

MIN_BODY_LINES = 2
MAX_LINES = 60
MAX_CHARACTERS = 4_000
"""Size of functions that are worth asking about: a small model's context holds them several times over."""
MIN_DOCSTRING = 25
"""Characters of a docstring that says more than the name."""
FENCE = "```"
"""Code that holds this itself would end the block in which it is shown, and is left out."""

_WORD = re.compile(r"\w+")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One Python file."""

    name: str
    """As in records: "stdlib/asyncio/tasks.py"."""
    text: str
    license: str

    @functools.cached_property
    def module(self) -> str:
        """Dotted name as far as the path tells: "asyncio.tasks"."""
        parts = PurePosixPath(self.name).with_suffix("").parts[1:] or (PurePosixPath(self.name).stem,)
        return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)

    @functools.cached_property
    def is_test(self) -> bool:
        """Whether the path is that of tests."""
        parts = PurePosixPath(self.name).with_suffix("").parts
        return bool({"test", "tests"} & set(parts[:-1])) or parts[-1].startswith("test_") or parts[-1].endswith("_test")


@dataclass(frozen=True)
class Function:
    """One function or method with its parts, each as it stands in the file, dedented."""

    source: Source
    name: str
    owner: str
    """Class line ("class Lock(Base):") of a method; empty for a function of the module."""
    line: int
    text: str
    """All of it, with decorators."""
    header: str
    """Decorators and signature, to the colon."""
    docstring: str
    """Its literal with quotes, still indented; "" if there is none."""
    body: str
    """All after the docstring, still indented."""
    imports: str
    """Import lines of the file that bind names which the function uses."""

    @property
    def is_public(self) -> bool:
        """Whether others are meant to call it."""
        return not self.name.startswith("_")


@functools.lru_cache(maxsize=8)  # a test file is looked at for its calls, then for its tests
def parse(text: str) -> ast.Module | None:
    """The syntax tree of a file, not to be changed; None where this Python does not read it (Python 2)."""
    is_collecting = gc.isenabled()
    gc.disable()  # a tree is all new objects and no garbage: looking for some takes a third of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    finally:
        if is_collecting:
            gc.enable()


def parses(text: str) -> bool:
    """Whether a piece of code stands on its own; unlike `parse` it drives no file out of the cache."""
    return parse.__wrapped__(text) is not None


def functions_of(source: Source) -> list[Function]:
    """Functions and methods of a file that are of a size to ask about, in order; nested ones belong to their outer."""
    tree = parse(source.text)
    if tree is None:
        return []
    lines = split_lines(source.text)
    bindings = import_bindings(tree, lines)
    parts = (_function(source, node, owner, lines, bindings) for node, owner in _definitions(tree))
    return [function for function in parts if function is not None]


def split_lines(text: str) -> list[str]:
    """Lines with their ends, as the syntax tree counts them: a form feed ends none."""
    return [f"{line}\n" for line in text.split("\n")]


def _definitions(tree: ast.Module) -> Iterator[tuple[FunctionNode, ast.ClassDef | None]]:
    for node in tree.body:
        if isinstance(node, FunctionNode):
            yield node, None
        elif isinstance(node, ast.ClassDef):
            yield from ((child, node) for child in node.body if isinstance(child, FunctionNode))


def _function(
    source: Source, node: FunctionNode, owner: ast.ClassDef | None, lines: Sequence[str], bindings: Mapping[str, str]
) -> Function | None:
    first, last = first_line(node), node.end_lineno or node.lineno
    text = textwrap.dedent("".join(lines[first - 1 : last]))
    # What does not parse once dedented holds a string that reaches the margin.
    is_fit = last - first < MAX_LINES and len(text) <= MAX_CHARACTERS and FENCE not in text
    if not is_fit or (node.col_offset and not parses(text)):
        return None
    head = node.body[0]
    has_docstring = (
        isinstance(head, ast.Expr) and isinstance(head.value, ast.Constant) and type(head.value.value) is str
    )
    statements = node.body[1:] if has_docstring else node.body
    start, end = first_line(head), head.end_lineno or head.lineno
    before = lines[start - 1].encode()[: head.col_offset]
    after = lines[end - 1].encode()[head.end_col_offset :]
    if not statements or _is_abstract(statements) or before.strip() or (has_docstring and after.strip()):
        return None
    own = text.split("\n")[: last - first + 1]
    header, body_start = own[: start - first], (end - first + 1 if has_docstring else start - first)
    body = own[body_start:]
    if sum(bool(line.strip()) for line in body) < MIN_BODY_LINES:
        return None
    used = set()
    if not bindings.keys().isdisjoint(_WORD.findall(text)):  # most functions use none, and the walk takes long
        used = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
    return Function(
        source=source,
        name=node.name,
        owner=class_line(owner) if owner else "",
        line=first,
        text="\n".join(own),
        header="\n".join(header),
        docstring="\n".join(own[start - first : body_start]) if has_docstring else "",
        body="\n".join(body).strip("\n"),
        imports="\n".join(dict.fromkeys(text for name, text in bindings.items() if name in used)),
    )


def first_line(node: ast.stmt) -> int:
    """Number of a statement's first line, decorators included."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def cut(node: ast.stmt, lines: Sequence[str]) -> str:
    """A statement as it stands in the file, decorators included."""
    return "".join(lines[first_line(node) - 1 : node.end_lineno]).rstrip("\n")


def class_line(node: ast.ClassDef) -> str:
    """ "class Name(Base):" without decorators."""
    arguments = ", ".join(ast.unparse(part) for part in [*node.bases, *node.keywords])
    return f"class {node.name}({arguments}):" if arguments else f"class {node.name}:"


def _is_abstract(statements: Sequence[ast.stmt]) -> bool:
    """Whether a body does nothing but say that others are to write it."""
    only = statements[0]
    if len(statements) > 1:
        return False
    return isinstance(only, ast.Pass | ast.Raise) or (
        isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant)
    )


def import_bindings(tree: ast.Module, lines: Sequence[str]) -> dict[str, str]:
    """Name -> the import statement of the module's top level that binds it, as it stands in the file."""
    bindings = {}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            text = cut(node, lines)
            for alias in node.names:
                bindings[alias.asname or alias.name.partition(".")[0]] = text
    return bindings
