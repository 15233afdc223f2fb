"""The buffer's words in the order of Vim's Ctrl-N and Ctrl-P.

The lists are Neovim 0.11.4's (`nvim --clean`, 'complete' at "."); for Ctrl-P those of `complete_info()` backwards, as
the key goes up the menu.
"""

import pytest

from smelter.evaluation.keywords import candidates, first_match, menu
from smelter.evaluation.places import Place, stops_of
from smelter.evaluation.typist import Offer, type_lines

BEFORE = "alpha beta a\nab alphabet = x1\n  "
AFTER = "\nalps alpha gamma_1 al\nbeta2 end"
LINE = "alphabet + beta(end)"
TEXT = BEFORE + LINE + AFTER


def place_at(at: int) -> Place:
    return Place(0, TEXT, len(BEFORE) + at, len(BEFORE) + len(LINE))


@pytest.mark.parametrize(
    ("at", "forward", "words"),
    [
        (0, True, "alps alpha gamma_1 al beta2 end beta ab alphabet x1"),
        (0, False, "x1 alphabet ab beta alpha end beta2 al gamma_1 alps"),
        (1, True, "alps alpha al ab alphabet"),
        (1, False, "alphabet ab alpha al alps"),
        (2, True, "alps alpha al alphabet"),
        (2, False, "alphabet alpha al alps"),
        (13, True, "beta2 beta"),
        (18, False, "end"),
    ],
)
def test_the_order_is_vims(at: int, forward: bool, words: str) -> None:
    assert list(candidates(place_at(at), forward)) == words.split()


def test_what_is_offered() -> None:
    assert first_match(place_at(1), forward=False).text == "lphabet"
    assert first_match(place_at(3), forward=True).text == "s"
    assert first_match(place_at(9), forward=True).text == "alps", "between words every word fits"
    assert first_match(Place(0, "zz = only", 3, 9), forward=True).text == "zz"
    assert first_match(Place(0, "q", 0, 1), forward=True).text == ""
    assert menu(place_at(0), forward=True) == [Offer(8, 9)]
    assert menu(place_at(0), forward=False) == [Offer(8, 2)]
    assert menu(place_at(1), forward=False) == [Offer(7, 1)]
    assert menu(place_at(13), forward=True) == [Offer(2, 2)]
    assert menu(place_at(10), forward=True) == [], "not a word"


def test_keys_with_a_menu() -> None:
    line = place_at(0)
    typed = type_lines([line], {stop: menu(stop, forward=False) for stop in stops_of(line)})
    # alphabet by 2 keys (or `a` and 1), ` + `, `beta` by typing `b` and 2 keys (Ctrl-P: beta2 is farther), and so on.
    assert (typed.characters, typed.keys) == (21, 2 + 3 + 2 + 1 + 2 + 1 + 1)
