"""Where a gap begins and ends: anywhere, or where a cursor stands and a person would stop.

Two characters drawn uniformly (Bavarian et al., arXiv 2207.14255) give middles of hundreds of characters that end
inside a word. An editor asks otherwise: at the start of a line after its indentation, before a word, inside one after
its first letters; and what is wanted ends with the line, sometimes with the block. A model that is to be asked like
that, by prompts whose parts are encoded each for itself, must have seen such gaps: `return` after eight blanks is other
tokens than ` return` after seven.
"""

import re
from typing import Literal

import numpy as np

LINE = re.compile(r"[^\s][^\n]*")
"""A line from its first character that is no blank to its line break."""
WORD = re.compile(r"\w+")
TYPED = 3
"""Characters of a word that have been typed at most where the cursor stands inside one."""
MIN_WORD_CHARACTERS = 4
"""Of a word that is cut in two."""
EARLY = 0.6
"""Share of words that are cut after one or two characters; the others anywhere."""
BLOCK_LINES = 8
BLOCK_CHARACTERS = 400
SHORT_CHARACTERS = 64
"""Longest gap that ends anywhere."""

Gap = tuple[int, int]
"""First character of a gap, and the first after it."""


def anywhere(text: str, rng: np.random.Generator) -> Gap:
    """Two characters drawn uniformly, the ends included."""
    first, second = sorted(rng.integers(0, len(text) + 1, size=2).tolist())
    return first, second


def at_cursor(text: str, rng: np.random.Generator, line: Literal["any", "near the end"] = "any") -> Gap:
    """A gap in one of the text's lines; `anywhere` in a text of blanks.

    Each line is as likely, or half of the gaps lie near the end: what stands behind those is short as often as long.
    Of the beginnings, 30% are a line's first character, 20% a word's, 25% lie after one to three characters of a word
    and 25% anywhere in the line. Of the ends, 70% are the line's, 15% that of a block, 15% up to 64 characters away.
    """
    lines = [match.span() for match in LINE.finditer(text)]
    if not lines:
        return anywhere(text, rng)
    is_near = line == "near the end" and rng.random() < 0.5
    number = _near_the_end(len(text), lines, rng) if is_near else int(rng.integers(len(lines)))
    start, stop = lines[number][0], _end(text, lines[number])
    first = _beginning(text, start, stop, rng)
    kind = rng.random()
    if kind < 0.7:
        return first, stop
    if kind < 0.85:
        return first, max(first, _block_end(text, lines[number : number + int(rng.integers(2, BLOCK_LINES + 1))]))
    return first, int(rng.integers(first, min(len(text), first + SHORT_CHARACTERS) + 1))


def in_words(text: str, num: int, rng: np.random.Generator) -> list[int]:
    """Up to `num` characters, ascending, inside words of at least 4, most of them after one or two of a word's."""
    words = [match.span() for match in WORD.finditer(text) if match.end() - match.start() >= MIN_WORD_CHARACTERS]
    if not words:
        return []
    chosen = [words[i] for i in rng.integers(len(words), size=num).tolist()]
    return sorted({begin + int(rng.integers(1, 3 if rng.random() < EARLY else end - begin)) for begin, end in chosen})


def log_uniform(most: int, rng: np.random.Generator) -> int:
    """A number from 0 to `most`, as often between 1 and 2 as between 2 and 4, 4 and 8 and so on."""
    return int((most + 2) ** rng.random()) - 1


def _near_the_end(size: int, lines: list[Gap], rng: np.random.Generator) -> int:
    """Number of the last line that begins before a point, whose distance from the text's end is log-uniform."""
    point = size - log_uniform(size, rng)
    return max((number for number, (start, _) in enumerate(lines) if start <= point), default=0)


def _beginning(text: str, start: int, stop: int, rng: np.random.Generator) -> int:
    kind = rng.random()
    if kind < 0.3:
        return start
    words = [match.span() for match in WORD.finditer(text, start, stop)]
    if kind < 0.75 and words:
        begin, end = words[int(rng.integers(len(words)))]
        return begin if kind < 0.5 else min(end, begin + int(rng.integers(1, TYPED + 1)))
    return int(rng.integers(start, stop + 1))


def _block_end(text: str, lines: list[Gap]) -> int:
    """Where the last of `lines` ends before one that is indented less than the first, or that is too far away."""
    begin, last = lines[0][0], lines[0]
    for line in lines[1:]:
        if _indent(text, line[0]) < _indent(text, begin) or line[1] - begin > BLOCK_CHARACTERS:
            break
        last = line
    return _end(text, last)


def _indent(text: str, start: int) -> int:
    return start - text.rfind("\n", 0, start)


def _end(text: str, line: Gap) -> int:
    """Where a line ends, without the blanks at its end."""
    return line[0] + len(text[line[0] : line[1]].rstrip())
