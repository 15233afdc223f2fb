"""How few keys a line takes when suggestions may be accepted: an exact minimum, the same rule for everybody.

The typist knows the line. Where a suggestion was asked for and is right, its whole line or its first word is taken with
one key; everything else is typed, a key for each character and one for the line break. Indentation is the editor's. All
suggestions are asked for with the true text before the cursor, so they do not depend on what was accepted, and the
fewest keys are found from the line's end backwards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smelter.evaluation.places import Place, stops_of
from smelter.evaluation.suggestions import Suggestion, first_word, judge
from smelter.run import Typed


@dataclass(frozen=True)
class Offer:
    """Characters that may be had for so many keys."""

    length: int
    keys: int = 1


def fewest_keys(length: int, offers: Mapping[int, Sequence[Offer]]) -> int:
    """Keys that a line of `length` characters and its line break take at least; offers by where they are made."""
    keys = [0] * (length + 1)
    for at in reversed(range(length)):
        ways = [Offer(1), *offers.get(at, ())]  # the first is to type a character
        keys[at] = min(way.keys + keys[at + way.length] for way in ways)
    return keys[0] + 1


def offers_of(suggestion: Suggestion, place: Place) -> list[Offer]:
    """What of a suggestion can be accepted."""
    right = judge(suggestion, place)
    offers = [Offer(len(place.missing))] if right.line else []
    if right.word:
        offers.append(Offer(len(first_word(place.missing))))
    return offers


def type_lines(lines: Sequence[Place], offers: Mapping[Place, Sequence[Offer]]) -> Typed:
    """Type the lines, each a place at its start; `offers` by the place (`places.stops_of`) where they are made."""
    characters = keys = 0
    for line in lines:
        here = {stop.at - line.at: offers.get(stop, ()) for stop in stops_of(line)}
        characters += len(line.missing) + 1
        keys += fewest_keys(len(line.missing), here)
    return Typed(100 * (1 - keys / characters), characters, keys, len(lines))
