"""Keep, or drop with a reason: what one text tells about itself, without a look at any other.

Each check is a pure function that returns what is wrong, or "" if nothing is. `clean` decides which are asked and
in which order, and counts. Limits were set so that of the standard library's own files almost none is lost; what a
teacher writes when it loops, stops short or recites a key lies far beyond them.

Python is parsed by the running Python, other languages by tree-sitter where the grammar's package is installed
(the extra "grammars").
"""

import ast
import functools
import importlib
import re
import textwrap
import warnings
import zlib
from collections import Counter
from typing import Any

from smelter.base import Response

_FENCE = re.compile(
    r"^[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL
)
_FENCE_LINE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
_NAMES = {
    "bash": "shell",
    "cpp": "c++",
    "cs": "c#",
    "js": "javascript",
    "py": "python",
    "python3": "python",
    "sh": "shell",
    "ts": "typescript",
    "zsh": "shell",
}
"""What a fence may be tagged with -> language."""
_GRAMMARS = {
    "c": "c",
    "c#": "c_sharp",
    "c++": "cpp",
    "go": "go",
    "java": "java",
    "javascript": "javascript",
    "php": "php",
    "ruby": "ruby",
    "rust": "rust",
    "shell": "bash",
    "typescript": "typescript",
}
"""Language -> name of its grammar's package, tree_sitter_NAME."""
_CUT_OFF = ("content_filter", "length", "max_tokens")
"""How providers call it when an answer is not whole."""
_MAX_BROKEN = 0.05
"""Share of a file that tree-sitter may fail to understand: C's macros are beyond any grammar."""
_MIN_LOOK = 400
"""Characters below which a text is too short to be called repetitive."""


def code_blocks(answer: str, language: str = "") -> list[tuple[str, str]]:
    """(language, code) of the fenced blocks of an answer that are in `language`, or in any if that is empty.

    Blocks without a tag are taken to be in `language` if no block is tagged with it: beside one that is, they hold
    what a program prints. An answer without fences has none.
    """
    blocks = []
    for match in _FENCE.finditer(answer):
        tag = match[2].lower()
        blocks.append((_NAMES.get(tag, tag), textwrap.dedent(match[3])))
    if not language:
        return blocks
    tagged = [block for block in blocks if block[0] == language]
    return tagged or [(language, code) for tag, code in blocks if not tag]


def is_session(code: str) -> bool:
    """Whether it is what an interpreter shows, which is no program."""
    return code.lstrip().startswith(">>>")


def has_parser(language: str) -> bool:
    """Whether `parse_error` can judge a language."""
    return language == "python" or _parser(language) is not None


def unfinished(response: Response) -> str:
    """Whether the teacher was cut off: it says so, or a block of code is open at the end."""
    if response.finish.lower() in _CUT_OFF:
        return f"finish = {response.finish}"
    return "a block of code is open at its end" if len(_FENCE_LINE.findall(response.text)) % 2 else ""


def parse_error(code: str, language: str) -> str | None:
    """Why code is not of its language; "" if it is, None if no grammar is installed."""
    if language == "python":
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an odd escape in a string is no reason
                ast.parse(code)
        except (SyntaxError, ValueError) as error:
            return f"line {getattr(error, 'lineno', None) or 1}: {getattr(error, 'msg', None) or error}"
        except (RecursionError, MemoryError):
            return "nested too deeply"
        return ""
    parser = _parser(language)
    if parser is None:
        return None
    data = code.encode()
    broken, nodes, line = 0, [parser.parse(data).root_node], 0
    while nodes:
        node = nodes.pop()
        if node.is_error or node.is_missing:
            broken += max(1, node.end_byte - node.start_byte)
            line = line or node.start_point[0] + 1
        elif node.has_error:
            nodes += reversed(node.children)
    return f"line {line}: {broken:,} of {len(data):,} bytes not understood" if broken > _MAX_BROKEN * len(data) else ""


@functools.cache
def _parser(language: str) -> Any:
    """A tree-sitter parser, or None where there is none for this language."""
    if language not in _GRAMMARS:
        return None
    try:
        tree_sitter = importlib.import_module("tree_sitter")
        grammar = importlib.import_module(f"tree_sitter_{_GRAMMARS[language]}")
    except ModuleNotFoundError:
        return None
    pointer = {"php": "language_php", "typescript": "language_tsx"}.get(language, "language")
    return tree_sitter.Parser(tree_sitter.Language(getattr(grammar, pointer)()))


def wrong_length(text: str, shortest: int, longest: int) -> str:
    """Whether a text has too few or too many characters."""
    return "" if shortest <= len(text) <= longest else f"{len(text):,} characters"


def repetition(text: str, max_repeated_lines: float, min_compressed: float) -> str:
    """Whether a text says the same over and over.

    `max_repeated_lines`: largest share of its characters in lines that stand there more than twice.
    `min_compressed`: smallest size after zlib, as a share; catches loops that are not whole lines.
    """
    if len(text) < _MIN_LOOK:
        return ""
    lines = Counter(line for line in map(str.strip, text.splitlines()) if len(line) >= 8)
    total = sum(len(line) * count for line, count in lines.items())
    repeated = sum(len(line) * (count - 1) for line, count in lines.items() if count > 2)
    if total and repeated > max_repeated_lines * total:
        return f"{repeated / total:.0%} of it in repeated lines"
    data = text.encode()
    share = len(zlib.compress(data[:100_000], 1)) / min(len(data), 100_000)
    return f"compresses to {share:.1%}" if share < min_compressed else ""
