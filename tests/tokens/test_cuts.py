"""Gaps where a cursor stands: in a line, at the places named, and ending where a person would stop."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelter.tokens.cuts import BLOCK_CHARACTERS, LINE, SHORT_CHARACTERS, anywhere, at_cursor, log_uniform
from tests import tiny

TEXT = (
    "def area(width, height):\n    total = width * height\n    if total:\n        return total\n\nvalue = area(3, 4)\n"
)


@given(text=st.text("ab_(. \n\t", max_size=60), seed=st.integers(0, 2**32))
@settings(max_examples=300)
def test_a_gap_lies_in_the_text(text: str, seed: int) -> None:
    for line in ("any", "near the end"):
        first, second = at_cursor(text, np.random.default_rng(seed), line)  # type: ignore[arg-type]
        assert 0 <= first <= second <= len(text)
        if text.strip():
            assert second - first <= max(BLOCK_CHARACTERS, SHORT_CHARACTERS)
            assert any(match.start() <= first <= match.end() for match in LINE.finditer(text))


def test_shares_of_beginnings_and_ends() -> None:
    rng, counts = np.random.default_rng(0), Counter[str]()
    starts = {match.start() for match in LINE.finditer(TEXT)}
    ends = {match.end() for match in LINE.finditer(TEXT)}
    for _ in range(4_000):
        first, second = at_cursor(TEXT, rng)
        counts["line start"] += first in starts
        inside = 0 < first < len(TEXT) and TEXT[first - 1].isidentifier() and TEXT[first].isidentifier()
        counts["inside a word"] += inside
        counts["line end"] += second in ends
        counts["several lines"] += "\n" in TEXT[first:second]
    shares = {name: count / 4_000 for name, count in counts.items()}
    assert shares["line start"] == pytest.approx(0.38, abs=0.05)  # 30% and words that begin there
    assert shares["inside a word"] == pytest.approx(0.35, abs=0.08)
    assert shares["line end"] > 0.8
    assert 0.03 < shares["several lines"] < 0.25


def test_a_block_ends_before_a_line_indented_less() -> None:
    rng = np.random.default_rng(1)
    gaps = [at_cursor(TEXT, rng) for _ in range(3_000)]
    inner = {second for first, second in gaps if TEXT.startswith("total = ", first)}
    assert TEXT.index("total\n\n") + len("total") in inner  # the function's last line
    body = range(TEXT.index("total = "), TEXT.index("\n    if"))
    blocks = [TEXT[first:second] for first, second in gaps if first in body and second - first > SHORT_CHARACTERS]
    assert not any("value" in block for block in blocks)


def test_half_of_what_stands_near_the_end_has_as_often_little_as_much_behind_it() -> None:
    text, rng = tiny.CODE[:4_000], np.random.default_rng(2)
    near = np.array([len(text) - at_cursor(text, rng, "near the end")[1] for _ in range(2_000)])
    uniform = np.array([len(text) - at_cursor(text, rng)[1] for _ in range(2_000)])
    assert np.mean(uniform < 100) < 0.06
    assert 0.25 < np.mean(near < 100) < 0.4  # half of log(100) / log(4,000), and a few of the others
    assert 0.3 < np.mean(near > 1_000) < 0.6


def test_log_uniform() -> None:
    rng = np.random.default_rng(3)
    numbers = [log_uniform(255, rng) for _ in range(8_000)]
    assert (min(numbers), max(numbers)) == (0, 255)
    octaves = Counter(int(np.log2(number + 1)) for number in numbers)
    assert all(abs(octaves[k] / 8_000 - 1 / 8) < 0.02 for k in range(8))


def test_anywhere_reaches_both_ends() -> None:
    rng = np.random.default_rng(4)
    gaps = {anywhere("abc", rng) for _ in range(300)}
    assert gaps == {(i, j) for i in range(4) for j in range(i, 4)}
