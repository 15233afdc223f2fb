"""Peeks: the text is all there in its order, and what is shown ahead really comes later."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelter.tokens import alignment
from smelter.tokens.peeks import MAX_LATER_CHARACTERS, with_peeks
from tests import tiny

TOKENS = tiny.tokenizer()
SUFFIX, MIDDLE, EOS = TOKENS.fim_suffix_id, TOKENS.fim_middle_id, TOKENS.eos_id


def parts(arranged: list[int]) -> tuple[list[list[int]], list[tuple[int, list[int]]]]:
    """The running text's parts, and what is shown ahead, each with the number of text bytes before it."""
    text: list[list[int]] = [[]]
    peeks: list[tuple[int, list[int]]] = []
    is_later = False
    for token in arranged:
        if token == SUFFIX:
            assert not is_later
            is_later = True
            peeks.append((sum(len(TOKENS.decode_bytes(part)) for part in text), []))
        elif token == MIDDLE:
            assert is_later
            is_later = False
            text.append([])
        else:
            (peeks[-1][1] if is_later else text[-1]).append(token)
    return text, peeks


@given(
    text=st.one_of(st.text(max_size=120), st.just(tiny.CODE[:900])),
    seed=st.integers(0, 2**32),
    tokens_each=st.sampled_from([1, 4, 30]),
    has_eos=st.booleans(),
)
@settings(max_examples=200)
def test_every_byte_stands_in_its_place_and_what_is_shown_comes_later(
    text: str, seed: int, tokens_each: int, has_eos: bool
) -> None:
    ids = np.array(TOKENS.encode(text) + [EOS] * has_eos, dtype=np.int64)
    arranged = with_peeks(TOKENS, ids, 100_000, np.random.default_rng(seed), tokens_each)
    running, peeks = parts(arranged)
    raw = text.encode("utf-8", "surrogateescape")
    assert b"".join(map(TOKENS.decode_bytes, running)) == raw
    assert (arranged.count(EOS), arranged[-1:] == [EOS]) == (has_eos, has_eos)
    for before, later in peeks:
        assert TOKENS.decode_bytes(later) in raw[before:]
        assert len(TOKENS.decode_bytes(later)) <= 4 * MAX_LATER_CHARACTERS
    assert [part for part in running if EOS not in part] == [
        TOKENS.encode(TOKENS.decode(part)) for part in running if EOS not in part
    ]


def test_how_many_there_are_and_how_much_they_show() -> None:
    ids = np.array(TOKENS.encode(tiny.CODE[:6_000]), dtype=np.int64)
    shown: list[int] = []
    for seed in range(40):
        _, peeks = parts(with_peeks(TOKENS, ids, 100_000, np.random.default_rng(seed), 20))
        shown += [len(TOKENS.decode_bytes(later)) for _, later in peeks]
    assert len(shown) / 40 == pytest.approx(len(ids) / 20, rel=0.15)
    assert np.mean([size == 0 for size in shown]) == pytest.approx(0.35, abs=0.1)  # those at the end show nothing, too
    assert 8 <= np.median([size for size in shown if size]) <= 22
    assert max(shown) > 200


def test_half_of_them_stand_inside_words_after_what_has_been_typed() -> None:
    text = tiny.CODE[:6_000]
    raw = text.encode()
    ids = np.array(TOKENS.encode(text), dtype=np.int64)
    kinds = {"inside": 0, "after 1 or 2": 0, "all": 0}
    for seed in range(20):
        _, peeks = parts(with_peeks(TOKENS, ids, 100_000, np.random.default_rng(seed), 20))
        for before, _ in peeks:
            typed = re.search(rb"\w*$", raw[:before])
            assert typed
            kinds["all"] += 1
            if typed[0] and re.match(rb"\w", raw[before:]):
                kinds["inside"] += 1
                kinds["after 1 or 2"] += len(typed[0]) <= 2
    assert 0.5 < kinds["inside"] / kinds["all"] < 0.9
    assert kinds["after 1 or 2"] / kinds["inside"] > 0.4


def test_words_are_cut_without_a_peek() -> None:
    text = tiny.CODE[:4_000]
    ids = np.array(TOKENS.encode(text), dtype=np.int64)
    cut = with_peeks(TOKENS, ids, 100_000, np.random.default_rng(1), 0, 0.125)
    assert SUFFIX not in cut
    assert TOKENS.decode(cut) == text
    assert 0.06 * len(ids) < len(cut) - len(ids) < 0.25 * len(ids)
    assert with_peeks(TOKENS, ids, 100_000, np.random.default_rng(1), 0) == ids.tolist()


@given(room=st.integers(0, 60), seed=st.integers(0, 2**32))
def test_at_most_the_room_is_taken(room: int, seed: int) -> None:
    ids = np.array(TOKENS.encode(tiny.CODE[:500]), dtype=np.int64)
    assert len(with_peeks(TOKENS, ids, room, np.random.default_rng(seed), 3)) == room


def test_a_teacher_has_read_what_comes_before_the_first() -> None:
    ids = np.array(TOKENS.encode(tiny.CODE[:3_000]), dtype=np.int64)
    arranged = with_peeks(TOKENS, ids, 100_000, np.random.default_rng(5), 200)
    first = arranged.index(SUFFIX)
    shift, size = alignment.read_as_written(ids, arranged, TOKENS)
    assert shift == 0
    assert first - 2 <= size <= first  # a word that the peek cuts is encoded anew
    assert arranged[:size] == ids[:size].tolist()
