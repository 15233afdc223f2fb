"""The house rules, held: who imports whom, through which faces, what stays light, what is explained.

The table is that of docs/design.md: a place may import those named beside it, which all stand above it, and of a wing
(a folder) only what its face, `__init__`, hands out. Tests and benchmarks look inside.
"""

import ast
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import PACKAGES, ROOT, all_imports, between_places, circles, modules, place_of

LONG = 450
"""Lines from which on a file probably has two ideas: a hint, printed as a warning."""
TOO_LONG = 600


def table() -> dict[str, list[str]]:
    """What each place may import, from the two tables of docs/design.md, from the bottom up."""
    house, package = {}, ""
    for line in (ROOT / "docs" / "design.md").read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\| (smelter|foundry)/ \| its one idea \| may import \|", line):
            package = match[1]
        elif match := re.fullmatch(r"\| `(\w+)(?:/|\.py)` \| .+ \| (.+) \|", line):
            house[f"{package}.{match[1]}"] = [f"{package}.{name}" for name in re.findall(r"\w+", match[2])]
    house["smelter.train"] = [name for name in house if name.startswith("smelter.") and name != "smelter.train"]
    return house


HOUSE = table()

WITHOUT_TORCH = ["smelter.base", "smelter.config", "smelter.tokens", "smelter.__main__", "foundry.__main__"]

MODULES = modules(ROOT)
IMPORTS = all_imports(ROOT)
WINGS = {name for name, path in MODULES.items() if path.name == "__init__.py"} - set(PACKAGES)
FILES = sorted(ROOT.glob("tests/**/*.py")) + sorted(MODULES.values())


def where(path: Path) -> str:
    return str(path.relative_to(ROOT))


def handed_out(wing: str) -> set[str]:
    """The names that a face imports, which is all that it does."""
    docstring, *imports = ast.parse(MODULES[wing].read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)
    names = set()
    for node in imports:
        assert isinstance(node, ast.ImportFrom), f"{where(MODULES[wing])}:{node.lineno}: a face only hands out names"
        names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_the_table_reads_from_the_bottom_up() -> None:
    above: set[str] = set()
    for place, allowed in HOUSE.items():
        assert set(allowed) <= above, f"{place}: {set(allowed) - above} must stand above it"
        above.add(place)
    assert above == {place_of(name) for name in MODULES} - set(PACKAGES) - {f"{name}.__main__" for name in PACKAGES}


def test_imports_follow_the_table() -> None:
    for importer, place in sorted(between_places(IMPORTS)):
        assert place in [*HOUSE[importer], "smelter.base"], f"{importer} imports {place}: not allowed by the table"


def test_the_table_allows_nothing_that_is_not_used() -> None:
    used = between_places(IMPORTS)
    allowed = {(place, name) for place, names in HOUSE.items() for name in names if place != "smelter.train"}
    assert allowed - used == set()


def test_nobody_imports_past_a_face() -> None:
    for each in IMPORTS:
        wing = place_of(each.module)
        if wing in WINGS and place_of(each.importer) != wing:
            place = f"{where(MODULES[each.importer])}:{each.line}"
            assert each.module == wing, f"{place} imports {each.module}: import from {wing} what it hands out"
            assert each.name in handed_out(wing), f"{place}: {wing} does not hand out {each.name}"


@pytest.mark.parametrize("wing", sorted(WINGS))
def test_a_face_hands_out_what_others_use(wing: str) -> None:
    path = MODULES[wing]
    assert (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0].endswith(".")
    used = {each.name for each in IMPORTS if each.module == wing and place_of(each.importer) != wing}
    assert handed_out(wing) == used, f"{where(path)}: hands out what nobody uses"


def test_no_circle_inside_a_wing() -> None:
    inside = set()
    for each in IMPORTS:
        module = f"{each.module}.{each.name}" if f"{each.module}.{each.name}" in MODULES else each.module
        if place_of(each.importer) == place_of(module) and each.importer not in WINGS:
            inside.add((each.importer, module))
    assert circles(inside) == []


@pytest.mark.parametrize("path", FILES, ids=where)
def test_a_file_fits_a_head(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    if lines > LONG:
        warnings.warn(f"{where(path)} has {lines} lines: has it two ideas?", LongFile, stacklevel=1)
    assert lines <= TOO_LONG, f"{where(path)} has {lines} lines, more than {TOO_LONG}: it has two ideas"


class LongFile(UserWarning):
    """A hint, not an error."""


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_light_modules_do_without_torch(name: str) -> None:
    code = f"import sys, {name}; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


@pytest.mark.parametrize("package", PACKAGES)
def test_help_answers_in_a_blink(package: str) -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run = subprocess.run([sys.executable, "-m", package, "--help"], cwd=ROOT, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
        assert b"usage: " + package.encode() in run.stdout
    assert min(times) < 0.5, f"{package} --help takes {min(times):.2f} s"


def undocumented(node: ast.AST, prefix: str = "") -> Iterator[str]:
    """Public functions, classes and methods without a docstring; a module's `forward` is its class's."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or child.name.startswith("_"):
            continue
        explained = child.name == "forward" or any(
            isinstance(d, ast.Name) and d.id in ("override", "overload") for d in child.decorator_list
        )
        if ast.get_docstring(child) is None and not explained:
            yield f"{prefix}{child.name}"
        if isinstance(child, ast.ClassDef):
            yield from undocumented(child, f"{child.name}.")


@pytest.mark.parametrize("path", MODULES.values(), ids=where)
def test_public_things_are_explained(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{where(path)} has no docstring"
    assert list(undocumented(tree)) == []


def test_the_docstring_check_can_fail() -> None:
    tree = ast.parse('def f(): ...\nclass A:\n    "doc"\n    def g(self): ...\n    def _h(self): ...\ndef _i(): ...\n')
    assert list(undocumented(tree)) == ["f", "A.g"]


def test_both_packages_have_one_version() -> None:
    versions = {
        package: re.search(r'^__version__ = "(.+)"$', (ROOT / package / "__init__.py").read_text(), re.MULTILINE)
        for package in ("smelter", "foundry")
    }
    found = {match[1] for match in versions.values() if match}
    assert len(found) == 1
    assert all(versions.values())
    assert found.pop() in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
