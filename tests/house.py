"""The structure of the code as its imports tell it: places, floors, imports between them, circles.

    python tests/house.py [CHECKOUT]

A place is what a reader meets when opening a package: a file that stands there by itself, or a folder (a wing). A
place stands one floor above the highest place that it imports; the ground floor is 1. A package's `__main__`, which
imports its commands by name, and its `__init__` are the entrance and no places.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("smelter", "foundry")


class Import(NamedTuple):
    """One name that a file imports from one of our packages."""

    importer: str
    """Dotted name of the file that imports, a wing's `__init__` as the wing."""
    module: str
    """Dotted name of the file or wing that it imports from."""
    name: str
    """What it imports of it; "" for `import module`."""
    line: int


def modules(root: Path) -> dict[str, Path]:
    """Every file of both packages by its dotted name; a wing's `__init__` has the wing's."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, importer: str) -> Iterator[Import]:
    """What a file imports from our packages, also inside functions. Relative imports are refused by an assertion."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PACKAGES:
                    yield Import(importer, alias.name, "", node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import: name the package"
            module = node.module or ""
            if module.split(".")[0] in PACKAGES:
                for alias in node.names:
                    yield Import(importer, module, alias.name, node.lineno)


def all_imports(root: Path) -> list[Import]:
    """The imports of every file of both packages."""
    return [each for name, path in modules(root).items() for each in imports_of(path, name)]


def place_of(module: str) -> str:
    """The place that a module belongs to: "smelter.tokens" for "smelter.tokens.shards"."""
    return ".".join(module.split(".")[:2])


def is_entrance(place: str) -> bool:
    """Whether this is a package itself or its command line."""
    return place in PACKAGES or place.endswith(".__main__")


def between_places(imports: list[Import]) -> set[tuple[str, str]]:
    """Pairs of places of which the first imports the second."""
    # `from smelter import train` names a place by its package.
    pairs = {
        (place_of(each.importer), place_of(f"{each.module}.{each.name}" if each.module in PACKAGES else each.module))
        for each in imports
        if not each.name.startswith("__")
    }
    return {(a, b) for a, b in pairs if a != b and not is_entrance(a) and not is_entrance(b)}


def circles(edges: set[tuple[str, str]]) -> list[list[str]]:
    """Groups that import each other in a loop (strongly connected components of more than one)."""
    reach = {a: {b for x, b in edges if x == a} for a in {node for edge in edges for node in edge}}
    for middle in reach:
        for targets in reach.values():
            if middle in targets:
                targets |= reach[middle]
    groups = {frozenset(b for b in targets if a in reach[b]) for a, targets in reach.items() if a in targets}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def floors(edges: set[tuple[str, str]], places: set[str]) -> dict[str, int]:
    """The floor of each place; those of a circle share one."""
    floor = dict.fromkeys(places, 1)
    in_circle = {node: index for index, group in enumerate(circles(edges)) for node in group}
    for _ in places:
        for a, b in edges:
            if in_circle.get(a, -1) != in_circle.get(b, -2):
                floor[a] = max(floor[a], floor[b] + 1)
    return floor


def report(root: Path) -> str:
    """The figures of a checkout, a line for each package and one for both."""
    imports, known = all_imports(root), modules(root)
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in known.items()}
    rows = []
    edges = between_places(imports)
    for packages in (*((package,) for package in PACKAGES), PACKAGES):
        places = {place_of(name) for name in known if name.split(".")[0] in packages}
        places = {place for place in places if not is_entrance(place)}
        inner = {(a, b) for a, b in edges if a in places and b in places}
        high = max(floors(inner, places).values())
        total = sum(count for name, count in lines.items() if name.split(".")[0] in packages)
        files = sum(name.split(".")[0] in packages for name in known)
        rows.append(
            f"{' + '.join(packages):18} {len(places):3} places, {high:2} floors, {len(inner):3} imports between "
            f"places, {len(circles(inner))} circles, {files:3} files, {total:,} lines"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(report(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
