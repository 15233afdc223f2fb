"""What an editor offers without any model: the words of the buffer, as Vim's insert-mode keyword completion has them.

Ctrl-N lists the words that begin with what is typed as they come after the cursor, and from the beginning on; Ctrl-P as
they come before it, and from the end. Words of one character are not listed, and each is listed once. (Vim's
'complete' at ".", this buffer, without 'ignorecase'.)
"""

from collections.abc import Iterator
from itertools import islice

from smelter.evaluation.places import WORD, Place
from smelter.evaluation.suggestions import Suggestion, first_word
from smelter.evaluation.typist import Offer

MENU_KEYS = 10
"""Most times that a key is pressed to come to a word of the list."""


def _typed(place: Place) -> str:
    """The part of a word that stands before the cursor."""
    start = place.at
    while start and WORD.match(place.text, start - 1, start):
        start -= 1
    return place.text[start : place.at]


def candidates(place: Place, forward: bool) -> Iterator[str]:
    """What Ctrl-N (or, not `forward`, Ctrl-P) offers, in order."""
    typed, before, after = _typed(place), place.prefix, place.suffix
    earlier = [match[0] for match in WORD.finditer(before, 0, len(before) - len(typed))]
    later = WORD.findall(after)
    words = [*later, *earlier] if forward else [*earlier[::-1], *later[::-1]]
    listed: set[str] = set()
    for word in words:
        if word.startswith(typed) and len(word) >= 2 and word not in listed:
            listed.add(word)
            yield word


def first_match(place: Place, forward: bool) -> Suggestion:
    """The first of the list, as a suggestion; it ends with the word."""
    return Suggestion(next(candidates(place, forward), "")[len(_typed(place)) :], ended=True)


def menu(place: Place, forward: bool) -> list[Offer]:
    """The missing word for as many keys as it takes to come to it, if it is in the list's first ten."""
    missing = first_word(place.missing)
    for keys, word in enumerate(islice(candidates(place, forward), MENU_KEYS), 1):
        if word == _typed(place) + missing:
            return [Offer(len(missing), keys)]
    return []
