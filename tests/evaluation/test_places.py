"""Where somebody stands who types: places are what they should be, the choice is pure, and cuts are at lines."""

import pytest

from smelter.evaluation.gaps import candidate_lines
from smelter.evaluation.places import PLACE_KINDS, WORD, Place, PlaceKind, choose_places, stops_of
from tests import tiny

DOCUMENTS = [tiny.CODE[i : i + 2_500] for i in range(0, 15_000, 2_500)] + ["x = 1", ""]


@pytest.mark.parametrize("kind", PLACE_KINDS)
def test_the_choice_is_pure_and_spread_over_the_documents(kind: PlaceKind) -> None:
    places = choose_places(len(DOCUMENTS), DOCUMENTS.__getitem__, 20, kind, seed=3)
    assert len(places) == len({(place.doc, place.at) for place in places}) == 20
    assert len({place.doc for place in places[:6]}) == 6
    assert places == choose_places(len(DOCUMENTS), DOCUMENTS.__getitem__, 20, kind, seed=3)
    assert places[:7] == choose_places(len(DOCUMENTS), DOCUMENTS.__getitem__, 7, kind, seed=3)
    assert places != choose_places(len(DOCUMENTS), DOCUMENTS.__getitem__, 20, kind, seed=4)
    assert places != choose_places(len(DOCUMENTS), DOCUMENTS.__getitem__, 20, kind, seed=3, use="typed")


@pytest.mark.parametrize("kind", PLACE_KINDS)
def test_places_of_each_kind(kind: PlaceKind) -> None:
    places = choose_places(len(DOCUMENTS), DOCUMENTS.__getitem__, 200, kind)
    typed = set()
    for place in places:
        text = DOCUMENTS[place.doc]
        line = text[text.rfind("\n", 0, place.at) + 1 : place.at]
        start = next(start for start, end in candidate_lines(text) if start <= place.at < end == place.end)
        assert place.missing == place.missing.strip() != ""
        assert place.prefix + place.missing == text[: place.end]
        assert place.suffix[:1] in ("\n", "")
        assert text.endswith(place.suffix)
        assert text[place.end : len(text) - len(place.suffix)].strip() == ""
        if kind == "line_start":
            assert line.strip() == ""
            continue
        (word,) = (word for word in WORD.finditer(text) if word.start() <= place.at < word.end())
        assert word.start() > start or kind == "in_word"
        typed.add(place.at - word.start())
        if kind == "in_word":
            assert len(word[0]) >= 4
    assert typed == {"line_start": set(), "word_start": {0}, "in_word": {1, 2}}[kind]


def test_a_line_break_of_two_characters_stays_whole() -> None:
    text = "one = first(1)  \r\ntwo = second(2)\r\n"
    places = {place.missing: place for place in choose_places(1, lambda _: text, 2, "line_start")}
    assert places["one = first(1)"].suffix == "\r\ntwo = second(2)\r\n"
    assert places["two = second(2)"].suffix == "\r\n"
    assert choose_places(1, lambda _: "last = line(1)", 1, "line_start")[0].suffix == ""


def test_what_is_shown_is_cut_at_whole_lines() -> None:
    text = "".join(f"line {i:02d}\n" for i in range(40))  # 8 characters each
    place = Place(0, text, 20 * 8 + 3, 20 * 8 + 7)
    prefix, suffix = place.around(100)
    assert prefix == "".join(f"line {i:02d}\n" for i in range(11, 20)) + "lin"
    assert place.around(98)[0] == prefix.partition("\n")[2]
    assert suffix == "\nline 21\nline 22\nline 23\n"
    assert place.around(10_000) == (place.prefix, place.suffix)
    long = Place(0, "x" * 500, 400, 500)
    assert long.around(100) == ("x" * 75, "")


def test_stops_are_a_lines_words_and_their_first_characters() -> None:
    text = "  @a.beta(12, gamma)"
    line = Place(0, text, 2, len(text))
    assert [(stop.at - 2, text[2 : stop.at][-3:]) for stop in stops_of(line)] == [
        (0, ""),
        (1, "@"),
        (3, "@a."),
        (4, "a.b"),
        (5, ".be"),
        (8, "ta("),
        (9, "a(1"),
        (12, "2, "),
        (13, ", g"),
        (14, " ga"),
    ]
