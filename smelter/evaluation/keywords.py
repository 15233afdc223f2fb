"""What an editor offers without any model: the words of the buffer, as Vim's insert-mode keyword completion has them.

Ctrl-N lists the words that begin with what is typed as they come after the cursor, and from the beginning on; Ctrl-P as
they come before it, and from the end. Words of one character are not listed, and each is listed once. (Vim's
'complete' at ".", this buffer, without 'ignorecase'.)
"""

from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice

from smelter.evaluation.places import WORD, Place
from smelter.evaluation.suggestions import Suggestion, first_word
from smelter.evaluation.typist import Offer

MENU_KEYS = 10
"""Most times that a key is pressed to come to a word of the list."""


@lru_cache(maxsize=4)
def _words(text: str) -> tuple[list[int], list[str]]:
    """Where the words of a text begin, and the words."""
    matches = list(WORD.finditer(text))
    return [match.start() for match in matches], [match[0] for match in matches]


def _typed(place: Place) -> str:
    """The part of a word that stands before the cursor."""
    start = place.at
    while start and WORD.match(place.text, start - 1, start):
        start -= 1
    return place.text[start : place.at]


def candidates(place: Place, forward: bool) -> Iterator[str]:
    """What Ctrl-N (or, not `forward`, Ctrl-P) offers, in order."""
    typed = _typed(place)
    starts, words = _words(place.text)
    earlier = words[: bisect_left(starts, place.at - len(typed))]
    later = words[bisect_left(starts, place.end) :]
    order = [*later, *earlier] if forward else [*earlier[::-1], *later[::-1]]
    listed: set[str] = set()
    for word in order:
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
