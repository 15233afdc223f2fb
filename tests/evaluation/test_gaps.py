"""Gaps in held-out code: what is taken out is what it should be, the choice is pure, and nearness is measured right."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelter.evaluation.gaps import (
    BLOCK_LINES,
    MAX_BLOCK_CHARACTERS,
    SPAN_CHARACTERS,
    InfillCase,
    InfillKind,
    candidate_blocks,
    candidate_lines,
    candidate_spans,
    choose_cases,
    edit_similarity,
    exact_match,
)
from tests import tiny

DOCUMENTS = [tiny.CODE[i : i + 2_500] for i in range(0, 15_000, 2_500)] + ["x = 1", ""]
KINDS: tuple[InfillKind, ...] = ("single_line", "multi_line", "random_span")


def test_blocks_are_whole_lines() -> None:
    spans = candidate_blocks(tiny.CODE, random.Random(0))
    lines = tiny.CODE.split("\n")
    counts = set()
    for start, end in spans:
        block = tiny.CODE[start:end]
        first = tiny.CODE[: start + 1].rpartition("\n")[2]
        assert not first[:-1].strip(), "only indentation stands before it"
        assert tiny.CODE[end:].split("\n")[0].strip() == "", "it ends where its last line does"
        assert block.split("\n")[-1].strip()
        assert len(block) <= MAX_BLOCK_CHARACTERS
        counts.add(block.count("\n") + 1)
        assert block.split("\n")[1] in lines or block.count("\n") == 1
    assert counts == set(range(BLOCK_LINES[0], BLOCK_LINES[1] + 1))
    starts = {start for start, _ in candidate_lines(tiny.CODE)}
    assert {start for start, _ in spans} <= starts


@pytest.mark.parametrize("text", ["", "x = function(1)", "x = function(1)\n\n\n", "# comment only\n" * 5])
def test_texts_without_a_block_have_none(text: str) -> None:
    assert candidate_blocks(text, random.Random(0)) == []


def test_a_block_is_shortened_to_fit() -> None:
    text = "\n".join(["value = " + "1 + " * 30 + "1"] * 8)
    spans = candidate_blocks(text, random.Random(1))
    assert spans
    assert {text[start:end].count("\n") + 1 for start, end in spans} == {2, 3}


def test_spans_begin_and_end_anywhere() -> None:
    sizes = [end - start for i in range(200) for start, end in candidate_spans(tiny.CODE, random.Random(i))]
    assert (min(sizes), max(sizes)) == SPAN_CHARACTERS
    cut = [
        tiny.CODE[start - 1 : start + 1].isalnum()
        for i in range(50)
        for start, _ in candidate_spans(tiny.CODE, random.Random(i))
    ]
    assert 0.3 < sum(cut) / len(cut) < 0.9, "many begin inside a word"
    assert candidate_spans(" " * 500, random.Random(0)) == []
    assert candidate_spans("short", random.Random(0)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_cases_are_pieces_of_their_documents_and_the_choice_is_pure(kind: InfillKind) -> None:
    cases = choose_cases(len(DOCUMENTS), DOCUMENTS.__getitem__, 20, seed=3, kind=kind)
    assert len(cases) == 20
    for case in cases:
        assert case.prefix + case.middle + case.suffix == DOCUMENTS[case.doc]
        assert case.middle.strip()
    assert len({case.doc for case in cases[:6]}) == 6, "one of each document first"
    assert cases == choose_cases(len(DOCUMENTS), DOCUMENTS.__getitem__, 20, seed=3, kind=kind)
    assert cases[:7] == choose_cases(len(DOCUMENTS), DOCUMENTS.__getitem__, 7, seed=3, kind=kind)
    assert cases != choose_cases(len(DOCUMENTS), DOCUMENTS.__getitem__, 20, seed=4, kind=kind)


def test_exact_match_ignores_spaces_at_the_end_only() -> None:
    cases = [InfillCase(0, "", middle, "") for middle in ("x = 1", "y = 2  ", "z = 3", "w")]
    assert exact_match(["x = 1  ", "y = 2", " z = 3", "W"], cases) == 0.5
    assert exact_match([], []) is None


def distance(first: str, second: str) -> int:
    """Levenshtein's, by its definition."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b)))
    return row[-1]


@given(st.text("ab \nä😀", max_size=12), st.text("ab \nä😀", max_size=12))
def test_edit_similarity_is_by_levenshtein(first: str, second: str) -> None:
    a, b = first.strip(), second.strip()
    longer = max(len(a), len(b))
    assert edit_similarity(first, second) == pytest.approx(1 - distance(a, b) / longer if longer else 1.0)


def test_edit_similarity_of_known_words() -> None:
    assert edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert edit_similarity("  return x\n", "return x") == 1
    assert edit_similarity("", "return x") == 0
