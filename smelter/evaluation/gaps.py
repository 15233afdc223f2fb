"""What is blanked out of held-out code, what belongs around it, and how near an answer comes.

Three kinds of gap, as in Bavarian et al. (arXiv 2207.14255), after Fried et al. (2204.05999): one line, a block of
2 to 8 lines, and a span of characters that begins and ends anywhere, inside words too. The model sees what stands
before and after and writes the rest again. The choice is a pure function of the documents and the seed, so two
models, or one model at two times, are asked the same.

Exact match is strict (an equally good line counts as wrong) but needs no code to be run; edit similarity tells how
much of an answer would have to be typed anew.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from rapidfuzz.distance import Levenshtein

from smelter.decoding import FimOrder, Prompt, complete_many
from smelter.model import Model
from smelter.run import GapCase, GapsFilled, Sample
from smelter.tokens import Tokenizer

T = TypeVar("T")
InfillKind = Literal["single_line", "multi_line", "random_span"]

GAP_TOKENS: dict[InfillKind, int] = {"single_line": 64, "multi_line": 128, "random_span": 48}
"""Most tokens that a gap is filled with."""
MIN_LINE_CHARACTERS = 8
BLOCK_LINES = (2, 8)
MAX_BLOCK_CHARACTERS = 400
SPAN_CHARACTERS = (8, 128)
SPANS_PER_DOCUMENT = 16
SAMPLE_CHARACTERS = 400
COMMENT_STARTS = ("#", "//", "/*", "*", "--", "<!--", ";", "%")


@dataclass(frozen=True)
class InfillCase:
    """A piece taken out of document `doc`: `prefix + middle + suffix` is the whole document.

    Of a line or a block of lines, the prefix ends with the first line's indentation and the suffix begins with the
    last one's line break.
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


def candidate_blocks(text: str, rng: random.Random) -> list[tuple[int, int]]:
    """Start and end (characters) of a block of 2 to 8 lines from every line worth asking for.

    The number of lines is drawn from `rng`; a block of more than 400 characters, or one that would end in a blank
    line, is shortened from below, and left out where that leaves a single line.
    """
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    number_of = {start: number for number, start in enumerate(starts)}
    spans = []
    for begin, _ in candidate_lines(text):
        first = number_of[text.rfind("\n", 0, begin) + 1]
        for last in range(min(first + rng.randint(*BLOCK_LINES), len(lines)) - 1, first, -1):
            end = starts[last] + len(lines[last].rstrip())
            if lines[last].strip() and end - begin <= MAX_BLOCK_CHARACTERS:
                spans.append((begin, end))
                break
    return spans


def candidate_spans(text: str, rng: random.Random) -> list[tuple[int, int]]:
    """Start and end of up to 16 spans of 8 to 128 characters anywhere in the text, blank ones left out."""
    spans = []
    for _ in range(SPANS_PER_DOCUMENT):
        size = rng.randint(*SPAN_CHARACTERS)
        if size < len(text):
            begin = rng.randrange(len(text) - size)
            if text[begin : begin + size].strip():
                spans.append((begin, begin + size))
    return spans


def _candidates(text: str, kind: InfillKind, seed: int, doc: int) -> list[tuple[int, int]]:
    if kind == "single_line":
        spans = candidate_lines(text)
        random.Random(f"{seed}/{doc}").shuffle(spans)
        return spans
    rng = random.Random(f"{seed}/{doc}/{kind}")
    spans = candidate_blocks(text, rng) if kind == "multi_line" else candidate_spans(text, rng)
    rng.shuffle(spans)
    return spans


def spread(num_docs: int, num: int, seed: int, candidates: Callable[[int], list[T]]) -> list[T]:
    """Up to `num` candidates, one per document in shuffled order, then a second one of each, and so on.

    `candidates(i)` are document i's, taken from the end; only the documents that are needed are asked. Fewer come back
    where there are no more.
    """
    order = list(range(num_docs))
    random.Random(seed).shuffle(order)
    left: dict[int, list[T]] = {}
    chosen: list[T] = []
    while order and len(chosen) < num:
        for doc in order:
            if len(chosen) == num:
                break
            if doc not in left:
                left[doc] = candidates(doc)
            if left[doc]:
                chosen.append(left[doc].pop())
        order = [doc for doc in order if doc not in left or left[doc]]
    return chosen


def choose_cases(
    num_docs: int, text: Callable[[int], str], num_cases: int, seed: int = 0, kind: InfillKind = "single_line"
) -> list[InfillCase]:
    """Up to `num_cases` gaps, spread over the documents; `text(i)` is document i."""

    def cases_of(doc: int) -> list[InfillCase]:
        whole = text(doc)
        spans = _candidates(whole, kind, seed, doc)
        return [InfillCase(doc, whole[:start], whole[start:end], whole[end:]) for start, end in spans]

    return spread(num_docs, num_cases, seed, cases_of)


def is_exact(written: str, expected: str) -> bool:
    """Equal but for spaces and line breaks at the end."""
    return written.rstrip() == expected.rstrip()


def edit_similarity(written: str, expected: str) -> float:
    """1 - Levenshtein distance / length of the longer (RepoCoder, arXiv 2303.12570), of texts stripped at their ends.

    CrossCodeEval and CodeXGLUE print `fuzz.ratio`, which counts a replaced character as one taken out and one put
    in: a little other, and only to be compared with its like.
    """
    return Levenshtein.normalized_similarity(written.strip(), expected.strip())


def exact_match(written: Sequence[str], cases: Sequence[InfillCase]) -> float | None:
    """Share of texts that are exactly the case's; None without cases."""
    if not cases:
        return None
    return sum(is_exact(a, case.middle) for a, case in zip(written, cases, strict=True)) / len(cases)


def fill_in(
    model: Model,
    tokenizer: Tokenizer,
    cases: Sequence[InfillCase],
    kind: InfillKind = "single_line",
    *,
    order: FimOrder = "spm",
    max_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """What the model writes into every gap, greedily: up to its end of text, of a line to the first line break."""
    stops = ["\n"] if kind == "single_line" else []
    prompts = [Prompt(case.prefix, case.suffix, stops) for case in cases]
    max_tokens = max_tokens or GAP_TOKENS[kind]
    return complete_many(model, tokenizer, prompts, max_tokens=max_tokens, order=order, progress=progress)


def judged(kind: InfillKind, name: str, case: InfillCase, written: str) -> GapCase:
    """What was written into a gap of the document `name`, for the result file."""
    return GapCase(
        measure=f"infill/{kind}",
        case=f"{name}/{len(case.prefix)}+{len(case.middle)}",
        exact=is_exact(written, case.middle),
        edit_similarity=edit_similarity(written, case.middle),
        completion=written,
        expected=case.middle,
    )


def filled(kind: InfillKind, cases: Sequence[GapCase]) -> GapsFilled:
    """The figures of all gaps of a kind."""
    return GapsFilled(
        exact_match=sum(case.exact for case in cases) / len(cases),
        edit_similarity=sum(case.edit_similarity for case in cases) / len(cases),
        cases=len(cases),
        max_tokens=GAP_TOKENS[kind],
    )


def sample_of(case: InfillCase, written: str) -> Sample:
    """What was written, with `SAMPLE_CHARACTERS` of the code on either side."""
    return Sample(case.prefix[-SAMPLE_CHARACTERS:], case.suffix[:SAMPLE_CHARACTERS], written, case.middle)


def samples(
    model: Model,
    tokenizer: Tokenizer,
    num_docs: int,
    doc: Callable[[int], Sequence[int]],
    *,
    num_samples: int = 4,
    max_tokens: int = 48,
    seed: int = 0,
) -> list[Sample]:
    """What the model writes into the same few held-out lines.

    `doc(i)` is held-out document i as token ids. Prefix and suffix are short in the prompt, too, so that samples stay
    cheap.
    """
    cases = [
        InfillCase(case.doc, case.prefix[-SAMPLE_CHARACTERS:], case.middle, case.suffix[:SAMPLE_CHARACTERS])
        for case in choose_cases(num_docs, lambda i: tokenizer.decode([int(t) for t in doc(i)]), num_samples, seed)
    ]
    return list(map(sample_of, cases, fill_in(model, tokenizer, cases, max_tokens=max_tokens)))
