"""Which lines of held-out code are blanked out, and what belongs around them.

Single-line infilling (Bavarian et al., arXiv 2207.14255, after Fried et al., 2204.05999): one line of a
document is removed, the model sees what stands before and after and writes it again. The choice is a
pure function of the documents and the seed, so two models, or one model at two times, are asked the same.
Exact match is strict (an equally good line counts as wrong) but needs no code to be run.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

MIN_LINE_CHARACTERS = 8
COMMENT_STARTS = ("#", "//", "/*", "*", "--", "<!--", ";", "%")


@dataclass(frozen=True)
class InfillCase:
    """A line taken out of document `doc`: `prefix + middle + suffix` is the whole document.

    The prefix ends with the line's indentation, the suffix begins with its line break.
    """

    doc: int
    prefix: str
    middle: str
    suffix: str


def candidate_lines(text: str) -> list[tuple[int, int]]:
    """Start and end (characters) of every line worth asking for, without indentation and line break.

    Blank lines, lines that begin like a comment, and lines with fewer than 8 characters that are not spaces
    are left out: a lone `return` or `else:` says little about a model.
    """
    spans, start = [], 0
    for line in text.split("\n"):
        content = line.strip()
        solid = sum(not character.isspace() for character in content)
        if solid >= MIN_LINE_CHARACTERS and not content.startswith(COMMENT_STARTS):
            begin = start + line.index(content)
            spans.append((begin, begin + len(content)))
        start += len(line) + 1
    return spans


def choose_cases(num_docs: int, text: Callable[[int], str], num_cases: int, seed: int = 0) -> list[InfillCase]:
    """Up to `num_cases` lines, one per document in shuffled order, then a second one of each, and so on.

    `text(i)` is document i; only the documents that are needed are read. Fewer cases come back where the
    documents have no more candidate lines.
    """
    order = list(range(num_docs))
    random.Random(seed).shuffle(order)
    texts: dict[int, str] = {}
    spans: dict[int, list[tuple[int, int]]] = {}
    cases: list[InfillCase] = []
    while order and len(cases) < num_cases:
        for doc in order:
            if len(cases) == num_cases:
                break
            if doc not in texts:
                texts[doc] = text(doc)
                spans[doc] = candidate_lines(texts[doc])
                random.Random(f"{seed}/{doc}").shuffle(spans[doc])
            if spans[doc]:
                start, end = spans[doc].pop()
                whole = texts[doc]
                cases.append(InfillCase(doc, whole[:start], whole[start:end], whole[end:]))
        order = [doc for doc in order if doc not in spans or spans[doc]]
    return cases


def fit_context(prefix: list[int], suffix: list[int], budget: int) -> tuple[list[int], list[int]]:
    """The tokens nearest to the cursor that fit `budget`: the prefix's end and the suffix's beginning.

    A quarter of the room is the suffix's; what one side does not need goes to the other.
    """
    budget = max(budget, 0)
    num_suffix = min(len(suffix), max(budget // 4, budget - len(prefix)))
    num_prefix = min(len(prefix), budget - num_suffix)
    return prefix[len(prefix) - num_prefix :], suffix[:num_suffix]
