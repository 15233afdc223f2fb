"""Records that hold a benchmark's task: found by 13 words in a row, and by functions that are equal.

Thirteen words in a row (letters and digits, any case; GPT-3's rule) find a task's text and tests wherever they are
quoted. A row with fewer than six different words that are not numbers does not count: `1 2 3 4 ...` is in many a
test. Functions are compared by their syntax trees without name, docstring, comments and formatting, which finds a
solution that was laid out anew. Functions shorter than `MIN_FUNCTION` prove nothing: `return x + y` is nobody's.

Trade-off: both are exact, so a paraphrase or renamed variables pass.
"""

import ast
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from foundry.errors import FoundryError

NGRAM = 13
"""Words in a row that prove contact."""
MIN_FUNCTION = 150
"""Characters of a function's syntax tree, as `ast.dump` prints it, below which it is too common to prove anything."""
_MIN_DISTINCT = 6
_WORDS = re.compile(r"[a-z0-9]+")


class Benchmarks:
    """The tasks of benchmark files: JSONL such as HumanEval's and MBPP's, any string of a line counts.

    Raises FoundryError, naming file and line, for a line that is no JSON object with a string in it.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._ngrams: dict[bytes, str] = {}
        self._functions: dict[bytes, str] = {}
        for path in paths:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        self._add(f"{path.name}:{number}", _task(f"{path}:{number}", line))

    def __len__(self) -> int:
        return len(self._ngrams) + len(self._functions)

    def _add(self, name: str, task: dict[str, Any]) -> None:
        strings = list(_strings(task))
        for text in strings:
            for ngram in ngrams(text):
                self._ngrams.setdefault(ngram, name)
        # A solution may be the rest of a function that the prompt begins.
        prompt = task.get("prompt")
        rest = task.get("canonical_solution")
        whole = [prompt + rest] if isinstance(prompt, str) and isinstance(rest, str) else []
        for code in [*strings, *whole]:
            for function in function_keys(code):
                self._functions.setdefault(function, name)

    def find(self, text: str, code: str) -> str:
        """The task that a text or its code holds, and how it was found; "" if none."""
        for ngram in ngrams(text):
            if name := self._ngrams.get(ngram):
                return f"{NGRAM} words of {name}"
        for function in function_keys(code):
            if name := self._functions.get(function):
                return f"a function of {name}"
        return ""


def ngrams(text: str) -> Iterator[bytes]:
    """8-byte hashes of the text's 13 words in a row that are not mere numbers."""
    words = _WORDS.findall(text.lower())
    for start in range(len(words) - NGRAM + 1):
        part = words[start : start + NGRAM]
        if len({word for word in part if not word.isdigit()}) >= _MIN_DISTINCT:
            yield hashlib.blake2b(" ".join(part).encode(), digest_size=8).digest()


def function_keys(code: str) -> Iterator[bytes]:
    """8-byte hashes of the functions in source, without name, docstring and layout; none if it is not Python."""
    if "def " not in code:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            key = f"{names}{[ast.dump(statement) for statement in body]}"
            if len(key) >= MIN_FUNCTION:
                yield hashlib.blake2b(key.encode(), digest_size=8).digest()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _task(where: str, line: str) -> dict[str, Any]:
    try:
        task = json.loads(line)
    except json.JSONDecodeError as error:
        raise FoundryError(f"{where}: not JSON: {error.msg}: name a benchmark's JSONL file") from None
    if not isinstance(task, dict) or not any(_strings(task)):
        raise FoundryError(f"{where}: no JSON object with a text in it: name a benchmark's JSONL file")
    return task
