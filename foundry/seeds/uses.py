"""Where a function is called and tested, found in the sources themselves.

Whether a call means this function or another of the same name is decided by the imports of the calling file; where
that cannot be told (methods, star imports) the call is left out: fewer, but right. Test methods are copied as they
stand; only the frame around them (the imports, class line and helpers that they use) is put together from their file.

A first look at all names that are followed by a parenthesis, and at import lines, says which files to parse at all.
"""

import ast
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from foundry.seeds.functions import (
    FENCE,
    Function,
    FunctionNode,
    Source,
    class_line,
    cut,
    first_line,
    import_bindings,
    parse,
    parses,
    split_lines,
)

MAX_CALLS = 5
MAX_CALL_LINES = 8
MAX_TEST_LINES = 120
MAX_HELPER_LINES = 40
"""A helper that is longer leaves its tests without it, and them out."""
MAX_FILES = 40
"""Files parsed for one function: names such as `get` are called everywhere."""

FIXTURES = ("setUpClass", "tearDownClass", "setUp", "tearDown", "asyncSetUp", "asyncTearDown")

_CALLED = re.compile(r"\b([A-Za-z_]\w*)\(")
_IMPORTED = re.compile(r"\b(?:from|import)[ \t]+([\w., \t]+)")


@dataclass(frozen=True)
class Call:
    """One call of a function, as the whole statement that holds it."""

    file: str
    line: int
    code: str


@dataclass(frozen=True)
class _Site:
    module: str
    """Module that the called name comes from, as the calling file names it; "" for its own."""
    name: str
    first: int
    last: int
    tests: tuple[str, ...]
    """Class and name of the test function around it."""
    columns: tuple[int, int] | None
    """Where the call begins and ends (UTF-8 bytes) if only it is meant, and not the whole compound statement."""

    def cut(self, lines: list[str]) -> str:
        """The code at this place."""
        part = lines[self.first - 1 : self.last]
        if self.columns:
            part[-1] = part[-1].encode()[: self.columns[1]].decode()
            part[0] = part[0].encode()[self.columns[0] :].decode()
        return textwrap.dedent("".join(part)).rstrip("\n")


@dataclass
class UsageIndex:
    """Calls and tests of functions in a set of sources."""

    sources: Sequence[Source]
    _by_name: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    _packages: dict[str, str] = field(default_factory=dict)
    _sites: dict[int, list[_Site]] = field(default_factory=dict)
    _imported: dict[int, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, source in enumerate(self.sources):
            for name in set(_CALLED.findall(source.text)):
                self._by_name[name].append(number)
            if source.name.endswith("/__init__.py"):
                self._packages[source.module] = source.text

    def calls(self, function: Function) -> list[Call]:
        """Call sites outside tests, at most MAX_CALLS, no two alike; those of other files first."""
        if function.owner:
            return []
        calls: dict[str, Call] = {}
        for number in self._candidates(function, tests=False):
            source = self.sources[number]
            lines = split_lines(source.text)
            for site in self._sites_of(number):
                if self._means(site, source, function) and site.last - site.first < MAX_CALL_LINES:
                    code = site.cut(lines)
                    # Under another name (`import ... as`) it would not show whose call it is.
                    if re.search(rf"\b{function.name}\(", code) and FENCE not in code and parses(code):
                        calls.setdefault(code, Call(source.name, site.first, code))
            if len(calls) >= MAX_CALLS:
                break
        return list(calls.values())[:MAX_CALLS]

    def tests(self, function: Function) -> Call | None:
        """Tests of the function from one test file, with what they need of that file; None if there are none."""
        if function.owner:
            return None
        for number in self._candidates(function, tests=True):
            source = self.sources[number]
            wanted = [s.tests for s in self._sites_of(number) if s.tests and self._means(s, source, function)]
            code = _assemble(source, list(dict.fromkeys(wanted)))
            if code:
                return Call(source.name, 1, code)
        return None

    def _candidates(self, function: Function, *, tests: bool) -> list[int]:
        parts = function.source.module.split(".")
        test_names = {name for part in parts for name in (f"test_{part}", f"{part}_test")}
        numbers = []
        for number in self._by_name.get(function.name, []):
            source = self.sources[number]
            names = PurePosixPath(source.name).with_suffix("").parts
            if source.is_test != tests or (tests and not test_names & set(names)):
                continue
            if source is function.source or not self._words_imported_by(number).isdisjoint(parts):
                numbers.append(number)
        # A function's own module calls it without saying why; test files come in order of how near they are.
        numbers.sort(key=lambda n: (self.sources[n].name == function.source.name, n))
        return numbers[:MAX_FILES]

    def _means(self, site: _Site, source: Source, function: Function) -> bool:
        if site.name != function.name:
            return False
        if not site.module:
            return source.name == function.source.name
        own = function.source.module
        if own == site.module or own.endswith(f".{site.module}"):
            return True
        # `asyncio.gather` for asyncio/tasks.py: right unless the package defines a function of that name itself.
        package = self._packages.get(site.module)
        return (
            own.startswith(f"{site.module}.")
            and package is not None
            and re.search(rf"^def {function.name}\b", package, re.MULTILINE) is None
        )

    def _words_imported_by(self, number: int) -> set[str]:
        """Words of import lines, a few too many; the first part of a module that is imported is always among them."""
        if number not in self._imported:
            lines = _IMPORTED.findall(self.sources[number].text)
            self._imported[number] = set(re.findall(r"\w+", " ".join(lines)))
        return self._imported[number]

    def _sites_of(self, number: int) -> list[_Site]:
        if number not in self._sites:
            tree = parse(self.sources[number].text)
            self._sites[number] = list(_find_sites(tree)) if tree else []
        return self._sites[number]


def _find_sites(tree: ast.Module) -> Iterator[_Site]:
    """Every call of a name that the file imports or defines, in order."""
    origins: dict[str, tuple[str, str]] = {}
    calls: list[tuple[ast.Call, ast.stmt, tuple[str, ...]]] = []
    # A stack of our own: code may be nested more deeply than Python calls, and this is half of the whole work.
    stack: list[tuple[ast.AST, ast.stmt | None, tuple[str, ...], str]] = [(tree, None, (), "")]
    while stack:
        node, statement, test, owner = stack.pop()
        if isinstance(node, ast.stmt):
            if isinstance(node, ast.ClassDef):
                owner = node.name
            elif isinstance(node, FunctionNode) and node.name.startswith("test") and not test:
                test = (owner, node.name)
            else:
                _add_origins(node, origins)
            statement = node
        elif isinstance(node, ast.Call) and statement is not None:
            calls.append((node, statement, test))
        children: list[ast.AST] = []
        for name in node._fields:
            value = getattr(node, name, None)
            if isinstance(value, list):
                children += [item for item in value if isinstance(item, ast.AST) and item._fields]
            elif isinstance(value, ast.AST) and value._fields:  # `Load()` and operators have none
                children.append(value)
        stack += [(child, statement, test, owner) for child in reversed(children)]
    defined = {node.name for node in tree.body if isinstance(node, FunctionNode)}
    for call, statement, test in calls:
        origin = _origin(call.func, origins, defined)
        if origin:
            is_compound = hasattr(statement, "body")
            place = call if is_compound else statement
            last = place.end_lineno or place.lineno
            columns = (call.col_offset, call.end_col_offset or 0) if is_compound else None
            yield _Site(*origin, place.lineno, last, test, columns)


def _add_origins(node: ast.stmt, origins: dict[str, tuple[str, str]]) -> None:
    """Name -> module, and name in it, of an absolute import."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            name = alias.name if alias.asname else alias.name.partition(".")[0]
            origins[alias.asname or name] = (name, "")
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        for alias in node.names:
            origins[alias.asname or alias.name] = (node.module, alias.name)


def _origin(function: ast.expr, origins: Mapping[str, tuple[str, str]], defined: set[str]) -> tuple[str, str] | None:
    """Module and name of what is called, as far as the imports tell."""
    if isinstance(function, ast.Name):
        module, name = origins.get(function.id, ("", ""))
        if name:
            return module, name
        return ("", function.id) if function.id in defined else None
    rest: list[str] = []
    part = function
    while isinstance(part, ast.Attribute):
        rest.append(part.attr)
        part = part.value
    if rest and isinstance(part, ast.Name) and part.id in origins:
        return ".".join(filter(None, (*origins[part.id], *rest[:0:-1]))), rest[0]
    return None


def _assemble(source: Source, wanted: Sequence[tuple[str, ...]]) -> str:
    """The wanted test functions of one class (or of none) with imports and helpers; "" where that gets too long."""
    tree = parse(source.text)
    if tree is None or not wanted:
        return ""
    owner = wanted[0][0]
    top = _top_level(tree)
    group = top.get(owner)
    body = group.body if isinstance(group, ast.ClassDef) else tree.body
    members = {node.name: node for node in body if isinstance(node, FunctionNode)}
    chosen: list[ast.stmt] = []
    for name in (name for of, name in wanted if of == owner and name in members):
        if sum(map(_length, chosen)) + _length(members[name]) <= MAX_TEST_LINES:
            chosen.append(members[name])
    if not chosen:
        return ""
    roots: list[ast.AST] = list(chosen)
    if isinstance(group, ast.ClassDef):
        constants = [node for node in body if isinstance(node, ast.Assign)]
        fixtures = [members[name] for name in FIXTURES if name in members]
        roots += [*constants, *fixtures, *_closure([*fixtures, *chosen], members, _members)]
        chosen = sorted({node for node in roots if isinstance(node, ast.stmt)}, key=first_line)
        roots = [*chosen, *group.bases]
    outer = [node for node in _closure(roots, top, _names) if node is not group and node not in chosen]
    lines = split_lines(source.text)
    used = {name for node in [*roots, *outer] for name in _names(node)}
    imports = dict.fromkeys(text for name, text in import_bindings(tree, lines).items() if name in used)
    if any(_length(node) > MAX_HELPER_LINES for node in outer) or any(text.startswith("from .") for text in imports):
        return ""
    tests = [cut(node, lines) for node in chosen]
    if isinstance(group, ast.ClassDef):
        tests = [class_line(group) + "\n" + "\n\n".join(tests)]
    parts = ["\n".join(imports), *(cut(node, lines) for node in sorted(outer, key=first_line)), *tests]
    code = "\n\n\n".join(part for part in parts if part) + "\n"
    is_fit = code.count("\n") <= 2 * MAX_TEST_LINES and FENCE not in code
    return code if is_fit and parses(code) else ""


def _top_level(tree: ast.Module) -> dict[str, ast.stmt]:
    """Functions, classes and constants of a module by name."""
    statements: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, FunctionNode | ast.ClassDef):
            statements[node.name] = node
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            statements[node.targets[0].id] = node
    return statements


def _closure(
    roots: Iterable[ast.AST], known: Mapping[str, ast.stmt], uses: Callable[[ast.AST], set[str]]
) -> list[ast.stmt]:
    """The known statements that the roots use, directly or through each other."""
    used: dict[str, ast.stmt] = {}
    queue = list(roots)
    while queue:
        for name in uses(queue.pop()):
            if name in known and name not in used:
                used[name] = known[name]
                queue.append(known[name])
    return list(used.values())


def _names(node: ast.AST) -> set[str]:
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def _members(node: ast.AST) -> set[str]:
    """Attributes of `self` and `cls`."""
    return {
        child.attr
        for child in ast.walk(node)
        if isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name) and child.value.id in ("self", "cls")
    }


def _length(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - first_line(node) + 1
