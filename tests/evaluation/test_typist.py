"""What arrives at the cursor is judged right, and the keys it saves are counted: examples worked out by hand."""

import random
from itertools import product

import pytest

from smelter.evaluation.places import Place, stops_of
from smelter.evaluation.suggestions import Right, Suggestion, first_word, judge, score
from smelter.evaluation.typist import Offer, fewest_keys, offers_of, type_lines

TEXT = "    print(total)  # sum\n"
PLACE = Place(0, TEXT, 4, len(TEXT) - 1)


@pytest.mark.parametrize(
    ("text", "ended", "right"),
    [
        ("print(total)  # sum", True, Right(True, True, True, True)),
        ("print(total)  # sum  ", False, Right(True, True, True, False)),
        ("print(total)  # sum\nnext", False, Right(True, True, True, True)),
        ("print(total)", True, Right(True, True, False, False)),
        ("print", True, Right(True, True, False, False)),
        ("printed(total)", True, Right(True, False, False, False)),
        ("p", True, Right(True, False, False, False)),
        (" print(total)  # sum", True, Right(False, False, False, False)),
        ("\nprint(total)  # sum", True, Right(False, False, False, False)),
        ("", True, Right(False, False, False, False)),
    ],
)
def test_what_is_right(text: str, ended: bool, right: Right) -> None:
    assert judge(Suggestion(text, ended), PLACE) == right


def test_the_first_word() -> None:
    words = {"a_1(b)": "a_1", "): x": "):", '"""Doc': '"""', " x": "", "": "", "größe=1": "größe", "é": "é"}
    assert {text: first_word(text) for text in words} == words


def test_shares() -> None:
    suggestions = [Suggestion(text, True) for text in ("print(total)  # sum", "print", "pr", "x")]
    figures = score(suggestions, [PLACE] * 4)
    assert (figures.first_character, figures.word, figures.line, figures.end) == (0.75, 0.5, 0.25, 0.25)
    assert figures.places == 4
    with pytest.raises(ValueError, match="no places"):
        score([], [])


def test_keys_by_hand() -> None:
    assert fewest_keys(10, {}) == 11, "each character, and the line break"
    assert fewest_keys(10, {0: [Offer(10)]}) == 2
    assert fewest_keys(10, {2: [Offer(8)]}) == 4
    assert fewest_keys(10, {0: [Offer(4)], 5: [Offer(5)]}) == 4, "a word, a blank, a word, the line break"
    assert fewest_keys(10, {3: [Offer(1)], 9: [Offer(1)]}) == 11, "taking one character saves nothing"
    assert fewest_keys(10, {0: [Offer(4, 5)]}) == 11, "more keys than characters"
    assert fewest_keys(10, {0: [Offer(4, 3)], 1: [Offer(3, 1)]}) == 9, "one key later there is less to press"
    assert fewest_keys(10, {0: [Offer(4)], 1: [Offer(9)]}) == 3, "the word is better left"


def test_keys_are_the_fewest_of_all_ways() -> None:
    rng = random.Random(0)
    for _ in range(200):
        length = rng.randint(1, 7)
        offers = {
            at: [Offer(rng.randint(1, length - at), rng.randint(1, 3)) for _ in range(rng.randint(0, 2))]
            for at in range(length)
        }
        fewest = length
        for choices in product(*([None, *offers[at]] for at in range(length))):
            at = keys = 0
            while at < length:
                choice = choices[at] or Offer(1)
                at, keys = at + choice.length, keys + choice.keys
            fewest = min(fewest, keys)
        assert fewest_keys(length, offers) == fewest + 1


def test_a_line_typed_with_suggestions() -> None:
    told = {0: "print(wrong", 6: "total)", 8: "tal)  # sum"}
    suggestions = {stop: Suggestion(told.get(stop.at - 4, ""), True) for stop in stops_of(PLACE)}
    typed = type_lines([PLACE], {stop: offers_of(made, stop) for stop, made in suggestions.items()})
    # `print` by one key, `(`, `t`, `o`, the rest by one, the line break: 6 keys; by words it would be more.
    assert (typed.characters, typed.keys, typed.lines) == (20, 6, 1)
    assert typed.saved == pytest.approx(70.0)


def test_suggestions_at_other_lines_do_not_count() -> None:
    other = Place(1, TEXT, 4, len(TEXT) - 1)
    offers = {stop: [Offer(len(stop.missing))] for stop in stops_of(other)}
    assert type_lines([PLACE], offers).saved == 0.0
