"""Questions made from code: the parts are those of the files, found where the imports say, and nothing held out."""

import ast
import gc
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from foundry.seeds.code import KINDS, code_prompts
from foundry.seeds.functions import Source, functions_of, parses
from foundry.seeds.seed import Seed
from foundry.seeds.uses import UsageIndex
from smelter.base.errors import UserError
from smelter.base.record import Record, write_records

SHAPES = '''\
"""Areas."""

import math
import os
from functools import (
    lru_cache,
)


# Seen from above.
@lru_cache
def circle(radius: float) -> float:
    """Area of a circle.

    Raises ValueError for a negative radius.
    """
    # Not squared by hand: pow says what it is.
    if radius < 0:
        raise ValueError(radius)
    return math.pi * pow(radius, 2)


def ring(inner, outer):
    larger = circle(outer)
    return larger - circle(inner)


class Box(object):
    def volume(self, height):
        """Volume of the box at the given height."""
        base = self.width * self.depth
        return base * height

    def abstract(self):
        """Left to those who inherit from this class."""
        raise NotImplementedError


def _hidden(value):
    """Nobody else is meant to call this one."""
    value += 1
    return value


def one_line(): return 1
'''

APP = """\
import geo.shapes
from geo import shapes as s
from geo.shapes import circle as disc, ring
from other import circle


def main(sizes):
    for size in sizes:
        print(disc(size))
    print(circle("not ours"))
    total = geo.shapes.circle(
        2.0,
    )
    if s.ring(1, 2):
        return ring(3, 4)
    return total
"""

TESTS = """\
import math
import unittest

from geo.shapes import circle

UNIT = 1.0


def near(a, b):
    return math.isclose(a, b)


class CircleTest(unittest.TestCase):
    scale = 2

    def setUp(self):
        self.unit = UNIT

    def check(self, radius, area):
        self.assertTrue(near(circle(radius), area))

    def test_unit(self):
        self.assertTrue(near(circle(self.unit), math.pi))

    def test_negative(self):
        # Below zero there is no circle.
        with self.assertRaises(ValueError):
            circle(-1)

    def test_nothing_of_ours(self):
        self.assertEqual(1, 1)
"""

FILES = {"lib/geo/shapes.py": SHAPES, "lib/app.py": APP, "lib/test/test_shapes.py": TESTS}


def write_corpus(path: Path, files: Mapping[str, str] = FILES, *more: Record) -> str:
    records = [
        Record(kind="text", text=text, language="python", source=name, license="Apache-2.0", split="train")
        for name, text in files.items()
    ]
    write_records(path, [*records, *more])
    return str(path)


def prompts(corpus: str, kind: str, seed: int = 0) -> list[Seed]:
    (stream,) = code_prompts([corpus], [kind], seed)
    return list(stream)


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_corpus(tmp_path / "code.jsonl")


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_keeps_source_licence_and_place(corpus: str, kind: str) -> None:
    items = prompts(corpus, kind)
    assert items
    for item in items:
        assert item.kind == kind == item.material["task"]
        assert item.license == "Apache-2.0"
        assert item.source == item.material["file"]
        assert item.source in FILES
        assert not item.source.startswith("lib/test/"), "tests are answers, not questions"
        text = FILES[item.source].split("\n")
        first = item.material["line"] - 1
        if kind == "oss_instruct":
            shown = item.material["snippet"].split("\n")
            assert text[first : first + len(shown)] == shown
        else:
            assert any(f"def {item.material['name']}(" in line for line in text[first : first + 3])
        assert len(blocks(item.prompt)) == 1
        assert not re.search(r"\{(name|module|place)\}", item.prompt)


def test_docstring_to_body_shows_signature_and_docstring_and_knows_the_function(corpus: str) -> None:
    items = {item.material["name"]: item for item in prompts(corpus, "docstring_to_body")}
    assert sorted(items) == ["_hidden", "circle", "volume"], "main and ring have no docstring, abstract does nothing"
    circle = items["circle"]
    (shown,) = blocks(circle.prompt)
    assert shown.startswith("import math\nfrom functools import (\n    lru_cache,\n)\n\n\n@lru_cache\ndef circle(")
    assert "import os" not in shown
    assert "Raises ValueError for a negative radius." in shown
    assert "math.pi" not in shown
    assert circle.material["answer"] in SHAPES
    assert circle.material["answer"].startswith("@lru_cache\n")
    assert "# Not squared by hand" in circle.material["answer"]
    volume = items["volume"]
    assert "It is a method of `class Box(object)`." in volume.prompt
    assert volume.material["answer"].startswith("def volume(self, height):\n    ")


def test_body_to_docstring_hides_the_docstring(corpus: str) -> None:
    items = {item.material["name"]: item for item in prompts(corpus, "body_to_docstring")}
    circle = items["circle"]
    assert "Area of a circle" not in circle.prompt
    assert "return math.pi * pow(radius, 2)" in circle.prompt
    assert circle.material["answer"] == ('"""Area of a circle.\n\nRaises ValueError for a negative radius.\n"""')
    assert ast.literal_eval(circle.material["answer"]).startswith("Area of a circle.")


def test_body_to_tests_copies_tests_with_what_they_need(corpus: str) -> None:
    items = prompts(corpus, "body_to_tests")
    assert items[0].material["name"] == "circle", "functions whose tests are known come first"
    answer = items[0].material["answer"]
    assert items[0].material["tests_file"] == "lib/test/test_shapes.py"
    tree = ast.parse(answer)
    (group,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    names = [node.name for node in group.body if isinstance(node, ast.FunctionDef)]
    assert {"setUp", "test_unit", "test_negative"} <= set(names)
    assert "test_nothing_of_ours" not in names
    assert "import math\nimport unittest\nfrom geo.shapes import circle\n" in answer
    assert "UNIT = 1.0" in answer
    assert "def near(a, b):" in answer
    assert "# Below zero there is no circle." in answer
    untested = {item.material["name"] for item in items[1:]}
    assert untested == {"ring", "main"}
    assert all("answer" not in item.material for item in items[1:])


def test_mined_tests_run_against_the_code_and_can_fail(corpus: str) -> None:
    from smelter.base import sandbox

    answer = prompts(corpus, "body_to_tests")[0].material["answer"]
    module = "import sys, types\ngeo = types.ModuleType('geo')\nshapes = types.ModuleType('geo.shapes')\n"
    module += "exec({code!r}, vars(shapes))\nsys.modules |= {{'geo': geo, 'geo.shapes': shapes}}\n"
    run = "\nif __name__ == '__main__':\n    unittest.main()\n"
    limits = sandbox.Limits(wall_seconds=120.0, cpu_seconds=60)
    good = sandbox.run_python(module.format(code=SHAPES) + answer + run, limits=limits)
    assert good.reason == "ok", good.stderr
    assert "Ran 2 tests" in good.stderr
    bad = sandbox.run_python(module.format(code=SHAPES.replace("math.pi", "3.0")) + answer + run, limits=limits)
    assert bad.reason == "error"
    assert "test_unit" in bad.stderr


def test_body_to_calls_gives_the_calls_that_mean_this_function(corpus: str) -> None:
    items = {item.material["name"]: item.material["answer"] for item in prompts(corpus, "body_to_calls")}
    assert sorted(items) == ["circle", "ring"]
    circle = items["circle"].split("\n\n")
    assert "# lib/app.py:9\nprint(disc(size))" not in circle, "renamed on import: the call does not show the name"
    assert circle == [
        "# lib/app.py:11\ntotal = geo.shapes.circle(\n    2.0,\n)",
        "# lib/geo/shapes.py:24\nlarger = circle(outer)",
        "# lib/geo/shapes.py:25\nreturn larger - circle(inner)",
    ]
    assert "not ours" not in items["circle"]
    assert items["ring"] == "# lib/app.py:14\ns.ring(1, 2)\n\n# lib/app.py:15\nreturn ring(3, 4)"


@pytest.mark.parametrize(
    ("package", "caller", "num_calls"),
    [
        ("", "from geo.shapes import ring\nring(1, 2)\n", 1),  # the tree has a folder more than the import
        ("from .shapes import *\n", "from geo import ring\nring(1, 2)\n", 1),  # passed on by the package
        ("def ring(a, b):\n    return 0\n", "from geo import ring\nring(1, 2)\n", 0),  # the package has its own
        ("", "from elsewhere.shapes import ring\nring(1, 2)\n", 0),
        ("", "from geo.shapes import *\nring(1, 2)\n", 0),  # may come from anywhere
        ("", "from geo.shapes import circle\ncircle.ring(1, 2)\n", 0),
    ],
)
def test_the_imports_decide_whose_function_is_called(package: str, caller: str, num_calls: int) -> None:
    root = "lib/geo" if package or "elsewhere" in caller else "lib/src/geo"
    texts = {f"{root}/__init__.py": package, f"{root}/shapes.py": SHAPES, "lib/caller.py": caller}
    sources = [Source(name, text, "MIT") for name, text in texts.items()]
    ring = next(function for function in functions_of(sources[1]) if function.name == "ring")
    assert len(UsageIndex(sources).calls(ring)) == num_calls


def test_held_out_and_foreign_records_are_not_read(tmp_path: Path) -> None:
    secret = SHAPES.replace("circle", "secret")
    val = Record(kind="text", text=secret, language="python", source="lib/secret.py", license="MIT", split="val")
    go = Record(kind="text", text="package main // secret\n" * 20, language="go", source="lib/main.go", license="MIT")
    corpus = write_corpus(tmp_path / "code.jsonl", FILES, val, go)
    plain = write_corpus(tmp_path / "plain.jsonl", FILES)
    for kind in KINDS:
        assert prompts(corpus, kind) == prompts(plain, kind)
    only = write_corpus(tmp_path / "val.jsonl", {}, val, go)
    with pytest.raises(UserError, match=r"val\.jsonl: no Python text in the training split: make records with"):
        list(code_prompts([only], ["oss_instruct"], 0))


def test_prompts_follow_the_seed_and_not_the_other_kinds(corpus: str) -> None:
    for stream, kind in zip(code_prompts([corpus], [], 3), KINDS, strict=True):
        alone = prompts(corpus, kind, 3)
        assert list(stream) == alone
        assert {item.material["task"] for item in alone} == {kind}
    assert prompts(corpus, "oss_instruct", 3) != prompts(corpus, "oss_instruct", 4)
    with pytest.raises(UserError, match=r"^\[seeds\]: kinds = 'body_to_test': unknown: did you mean '?body_to_tests"):
        code_prompts([corpus], ["body_to_test"], 0)


def test_records_that_share_a_source_are_both_read(tmp_path: Path) -> None:
    twins = [
        Record(kind="text", text=SHAPES.replace("circle", name), language="python", source="lib/a.py", license="MIT")
        for name in ("first", "second")
    ]
    found = {item.material["name"] for item in prompts(write_corpus(tmp_path / "c.jsonl", {}, *twins), "body_to_tests")}
    assert {"first", "second"} <= found


def test_code_that_would_end_its_own_block_is_left_out(tmp_path: Path) -> None:
    fenced = SHAPES.replace("Area of a circle.", "Area of a circle.\n\n    ```\n    circle(1)\n    ```")
    corpus = write_corpus(tmp_path / "code.jsonl", FILES | {"lib/geo/shapes.py": fenced})
    for kind in KINDS:
        for item in prompts(corpus, kind):
            assert item.prompt.count("```") == 2
            assert item.material.get("name") != "circle"


@pytest.mark.parametrize("text", ["print 'Python 2'\n", "def f(:\n", "x = 1\n", "(" * 5_000 + ")" * 5_000])
def test_files_without_usable_functions_break_nothing(tmp_path: Path, text: str) -> None:
    corpus = write_corpus(tmp_path / "code.jsonl", FILES | {"lib/odd.py": text, "lib/test/test_odd.py": text})
    assert functions_of(Source("lib/odd.py", text, "MIT")) == []
    assert gc.isenabled()
    assert {item.material["name"] for item in prompts(corpus, "body_to_calls")} == {"circle", "ring"}


def test_code_nested_more_deeply_than_python_calls_breaks_nothing() -> None:
    deep = f"from geo.shapes import ring\nx = ring(1, {'+'.join(['1'] * 1_500)})\nring(3, 4)\n"
    if not parses(deep):
        pytest.skip("this Python does not parse it either")
    sources = [Source("lib/geo/shapes.py", SHAPES, "MIT"), Source("lib/deep.py", deep, "MIT")]
    ring = next(function for function in functions_of(sources[0]) if function.name == "ring")
    assert [call.line for call in UsageIndex(sources).calls(ring)] == [2, 3]


@pytest.mark.parametrize(
    ("name", "module", "is_test"),
    [
        ("stdlib/asyncio/tasks.py", "asyncio.tasks", False),
        ("stdlib/json/__init__.py", "json", False),
        ("alone.py", "alone", False),
        ("stdlib/test/test_json/test_dump.py", "test.test_json.test_dump", True),
        ("lib/tests/helper.py", "tests.helper", True),
        ("lib/latest.py", "latest", False),
        ("lib/shapes_test.py", "shapes_test", True),
    ],
)
def test_a_path_says_module_and_whether_it_holds_tests(name: str, module: str, is_test: bool) -> None:
    source = Source(name, "", "MIT")
    assert (source.module, source.is_test) == (module, is_test)
