"""Each check of one text: what it must find, what it must leave alone, and what holds for any text."""

import ast
import json
import re
import textwrap
from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundry.cleaning.filter import (
    code_blocks,
    has_parser,
    is_session,
    parse_error,
    repetition,
    unfinished,
    wrong_length,
)
from smelter.base.record import Response

ANSWER = """Two ways:

```python
x = 1
```

which prints

```
one
```

~~~js
let x = 1
~~~

1. in a list

   ```py title="a.py"
   if x:
       print("```")
   ```
"""


def test_blocks_are_those_of_the_language() -> None:
    blocks = code_blocks(ANSWER)
    assert [language for language, _ in blocks] == ["python", "", "javascript", "python"]
    assert code_blocks(ANSWER, "python") == [("python", "x = 1\n"), ("python", 'if x:\n    print("```")\n')]
    assert code_blocks(ANSWER, "javascript") == [("javascript", "let x = 1\n")]
    assert code_blocks(ANSWER, "rust") == [("rust", "one\n")]  # no tag says otherwise
    assert code_blocks("No code, only `x`.", "python") == []


@given(st.text(st.sampled_from("ab \n=(é"), max_size=60))
def test_a_block_gives_back_its_code(code: str) -> None:
    code = textwrap.dedent(code + "\n")
    assert code_blocks(f"So:\n\n````python\n{code}````\nDone.", "python") == [("python", code)]


@given(st.text(max_size=200) | st.text(st.sampled_from("`~\n py"), max_size=60))
def test_any_text_can_be_looked_at(text: str) -> None:
    for language, code in code_blocks(text, "python"):
        assert language == "python"
        assert parse_error(code, language) is not None
    assert isinstance(unfinished(Response(teacher="a", text=text)), str)
    assert isinstance(repetition(text, 0.5, 0.06), str)


@pytest.mark.parametrize(
    ("text", "finish", "detail"),
    [
        (ANSWER, "stop", ""),
        (ANSWER, "", ""),
        ("Done", "length", "finish = length"),
        ("Done", "MAX_TOKENS", "finish = MAX_TOKENS"),
        ("Done", "content_filter", "finish = content_filter"),
        ("So:\n\n```python\nx = 1\n", "stop", "a block of code is open at its end"),
        ("Use ``` for code.", "stop", ""),
    ],
)
def test_cut_answers_are_seen(text: str, finish: str, detail: str) -> None:
    assert unfinished(Response(teacher="a", text=text, finish=finish)) == detail


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("x = 1", ""),
        ("s = '\\d'", ""),
        ("def f(:\n    pass", "line 1: invalid syntax"),
        ("x = 1\n  y = 2", "line 2: unexpected indent"),
        ("x = '\0'", "line 1: source code string cannot contain null bytes"),
        ("x = " + "(" * 300 + ")" * 300, "line 1: too many nested parentheses"),
        ("x = " + "-" * 100_000 + "1", "nested too deeply"),
    ],
    ids=["good", "odd escape", "bad", "indent", "nul", "parentheses", "deep"],
)
def test_python_is_parsed_by_python(code: str, error: str) -> None:
    assert parse_error(code, "python") == error


SOURCES = {
    "c": ("int main(void) { return 0; }\n", "int main(void { retrun 0;;; ]\n"),
    "c#": ("class A { int F() { return 1; } }\n", "class A { int F( { return } ]\n"),
    "c++": ("template <class T> T f(T x) { return x; }\n", "template <class T T f(T x { return x; ]\n"),
    "go": ("package a\n\nfunc F() int { return 1 }\n", "package a\n\nfunc F( int { return 1 ]\n"),
    "java": ("class A { int f() { return 1; } }\n", "class A { int f( { return } ]\n"),
    "javascript": ("const f = (x) => x?.y ?? 1;\n", "const f = (x => { x?.y ?? ]\n"),
    "php": ("<?php\nfunction f($x) { return $x; }\n", "<?php\nfunction f($x { return $x; ]\n"),
    "ruby": ("def f(x)\n  x + 1\nend\n", "def f(x\n  x + ]\n"),
    "rust": ("fn f(x: u8) -> u8 { x }\n", "fn f(x: u8 -> u8 { x ]\n"),
    "shell": ("if true; then echo 1; fi\n", "if true; then echo $( ; \n"),
    "typescript": ("function f(x: number): number { return x }\n", "function f(x: number: { return x ]\n"),
}


@pytest.mark.parametrize("language", SOURCES)
def test_other_languages_are_parsed_by_tree_sitter(language: str) -> None:
    if not has_parser(language):
        pytest.skip(f"the grammar of {language} is not installed")
    good, bad = SOURCES[language]
    assert parse_error(good, language) == ""
    assert re.fullmatch(r"line \d+: [\d,]+ of [\d,]+ bytes not understood", parse_error(bad, language) or "")


@pytest.mark.parametrize("language", ["", "cobol", "../c"])
def test_without_a_grammar_there_is_no_verdict(language: str) -> None:
    assert not has_parser(language)
    assert parse_error("?", language) is None
    assert has_parser("c") == bool(find_spec("tree_sitter") and find_spec("tree_sitter_c"))


def test_sessions_are_no_programs() -> None:
    assert is_session("\n>>> 1 + 1\n2\n")
    assert not is_session("x = 1\n# >>> x\n")


@given(st.text(max_size=50), st.integers(0, 40), st.integers(0, 40))
def test_lengths_are_inclusive(text: str, shortest: int, longest: int) -> None:
    assert (wrong_length(text, shortest, longest) == "") == (shortest <= len(text) <= longest)


def test_repetition_is_seen_and_code_is_not() -> None:
    for good in (ast.__file__, json.__file__, textwrap.__file__):
        with open(good, encoding="utf-8") as file:
            assert repetition(file.read(), 0.5, 0.06) == ""
    head = "def f(x):\n    return x\n"
    assert repetition(head + "    print(x, 'again')\n" * 50, 0.5, 0.06).endswith("of it in repeated lines")
    assert repetition(head + "again and " * 500, 0.5, 0.06).startswith("compresses to")
    assert repetition(head + "    print(x, 'again')\n" * 50, 1, 0) == ""
    assert repetition("    print(x)\n" * 10, 0, 1) == ""  # too short to tell
