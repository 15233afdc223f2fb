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

from smelter.base import DataError

NGRAM = 13
"""Words in a row that prove contact."""
MIN_FUNCTION = 150
"""Characters of a function's syntax tree, as `ast.dump` prints it, below which it is too common to prove anything."""
_MIN_DISTINCT = 6
_WORDS = re.compile(r"[a-z0-9]+")


class Benchmarks:
    """The tasks of benchmark files: JSONL such as HumanEval's and MBPP's, any string of a line counts.

    `num_tasks` counts them, and `num_short` those of fewer than 13 words, which nothing can find.
    Raises DataError, naming file and line, for a line that is no JSON object with a string in it.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._ngrams: dict[bytes, str] = {}
        self._functions: dict[bytes, str] = {}
        self.num_tasks = self.num_short = 0
        for path in paths:
            num_findable = 0
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        is_findable = self._add(f"{path.name}:{number}", _task(f"{path}:{number}", line))
                        num_findable += is_findable
                        self.num_tasks += 1
                        self.num_short += not is_findable
            if not num_findable:
                raise DataError(f"{path}: no task of {NGRAM} words or more: name a benchmark's JSONL file")

    def __len__(self) -> int:
        return len(self._ngrams) + len(self._functions)

    def _add(self, name: str, task: dict[str, Any]) -> bool:
        """Take in a task; whether anything in it can be found."""
        strings = list(_strings(task))
        # A solution may be the rest of a function that the prompt begins.
        prompt, rest = task.get("prompt"), task.get("canonical_solution")
        whole = [prompt + rest] if isinstance(prompt, str) and isinstance(rest, str) else []
        quotes = [key for text in strings for key in ngrams(text)]
        functions = [key for code in [*strings, *whole] for key in function_keys(code)]
        for key in quotes:
            self._ngrams.setdefault(key, name)
        for key in functions:
            self._functions.setdefault(key, name)
        return bool(quotes or functions)

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
            try:
                key = f"{names}{[ast.dump(statement) for statement in body]}"
            except RecursionError:  # dumps need more of the stack than parsing: a sum of hundreds of terms
                continue
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


def _task(where: str, line: bytes) -> dict[str, Any]:
    try:
        task = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8: a compressed file
        raise DataError(f"{where}: not JSON: {error}: name a benchmark's JSONL file") from None
    if not isinstance(task, dict) or not any(_strings(task)):
        raise DataError(f"{where}: no JSON object with a text in it: name a benchmark's JSONL file")
    return task
