"""When an answer is right without being run, and when what a program printed is what was asked for.

As SAFIM judges (github.com/gonglinyuan/safim, evaluate.py, and the ExecEval server behind it), with two differences
that only refuse: another function with the same arguments is another call, and a number is read whole, not at 129 bits.
"""

import ast
import re
from collections.abc import Sequence
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal

_WORDS = ("yes", "no", "true", "false")
"""Upper or lower case does not matter in these."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,6})?", re.ASCII)
_PRECISION = Decimal("1e-12")


def is_same_text(written: str, expected: str) -> bool:
    """Equal but for what stands at the end and for how lines are broken."""
    return written.rstrip().replace("\r\n", "\n") == expected.rstrip().replace("\r\n", "\n")


def is_same_code(written: str, expected: str, language: str) -> bool:
    """Equal but for blanks; in Python also if both mean the same call: other quotes, keyword arguments in any order."""
    if "".join(written.split()) == "".join(expected.split()):
        return True
    if language != "python":
        return False
    trees = _tree(written), _tree(expected)
    return trees[0] is not None and trees[0] == trees[1]


def _tree(code: str) -> str | None:
    try:
        tree = ast.parse(code.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            node.keywords.sort(key=lambda keyword: keyword.arg or "")
    return ast.dump(tree)


def is_accepted(printed: str, accepted: Sequence[str]) -> bool:
    """Whether a text is one of those, word by word: yes, no, true and false in any case, numbers within 1e-12."""
    words = printed.split()
    return any(
        len(words) == len(expected) and all(map(_is_same_word, words, expected))
        for expected in (text.split() for text in accepted)
    )


def _is_same_word(first: str, second: str) -> bool:
    if first == second or first.lower() == second.lower() in _WORDS:
        return True
    if not (_NUMBER.fullmatch(first) and _NUMBER.fullmatch(second)):
        return False
    exact = Context(prec=len(first) + len(second) + 40, Emin=MIN_EMIN, Emax=MAX_EMAX)
    return exact.subtract(Decimal(first), Decimal(second)).copy_abs() <= _PRECISION
