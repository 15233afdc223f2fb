"""Where somebody stands who types held-out code: a cursor, and what is missing behind it up to the end of the line.

Three kinds of place, in lines worth asking for (`gaps.candidate_lines`): where a line begins, behind its indentation;
where a word begins inside a line; and inside a word of at least 4 characters, after one or two of them. The suffix
begins with the line break: so stands the text in an editor when a line is typed into a file that goes on below it.

The choice is a pure function of the documents and the seed. What is asked around a place is cut by characters, at whole
lines, so that models with other tokenizers, and servers with other contexts, are shown the same.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from smelter.evaluation.gaps import candidate_lines, spread

PlaceKind = Literal["line_start", "word_start", "in_word"]
PLACE_KINDS: tuple[PlaceKind, ...] = ("line_start", "word_start", "in_word")
WORD = re.compile(r"\w+")
"""Letters, digits and underscores."""
MIN_WORD_CHARACTERS = 4
"""Of a word that a place is chosen in."""
TYPED_CHARACTERS = 2
"""After how many characters of a word a suggestion is still asked for."""
CONTEXT_CHARACTERS = 1_000
"""Characters around a place that are shown: prompts of some 350 tokens, which a context of 512 takes with an answer."""


@dataclass(frozen=True)
class Place:
    """A cursor at character `at` of document `doc`, in a line that ends at `end`, blanks left out."""

    doc: int
    text: str = field(repr=False)
    at: int
    end: int

    @property
    def missing(self) -> str:
        """What would be typed: the rest of the line."""
        return self.text[self.at : self.end]

    @property
    def prefix(self) -> str:
        """The document up to the cursor."""
        return self.text[: self.at]

    @property
    def suffix(self) -> str:
        """The document from the line break on."""
        line_break = self.text.find("\n", self.end)
        if line_break < 0:
            return ""
        return self.text[line_break - (self.text[line_break - 1] == "\r") :]

    def around(self, characters: int = CONTEXT_CHARACTERS) -> tuple[str, str]:
        """Prefix and suffix, the nearest three and one quarters of so many characters, cut at whole lines.

        Only the line of the cursor may be cut inside.
        """
        prefix, suffix = self.prefix, self.suffix
        num_suffix = characters // 4
        cut = len(prefix) - (characters - num_suffix)
        if cut > 0:
            prefix = prefix[prefix.find("\n", cut - 1) + 1 or cut :]
        if len(suffix) > num_suffix:
            suffix = suffix[: suffix.rfind("\n", 0, num_suffix) + 1]
        return prefix, suffix


def places_in(doc: int, text: str, kind: PlaceKind, rng: random.Random) -> list[Place]:
    """Every place of a kind in a document, in no order; where inside a word is drawn from `rng`."""
    chosen = []
    for start, end in candidate_lines(text):
        if kind == "line_start":
            chosen.append(Place(doc, text, start, end))
            continue
        for word in WORD.finditer(text, start, end):
            if kind == "word_start" and word.start() > start:
                chosen.append(Place(doc, text, word.start(), end))
            if kind == "in_word" and len(word[0]) >= MIN_WORD_CHARACTERS:
                chosen.append(Place(doc, text, word.start() + rng.randint(1, TYPED_CHARACTERS), end))
    rng.shuffle(chosen)
    return chosen


def choose_places(
    num_docs: int, text: Callable[[int], str], num_places: int, kind: PlaceKind, seed: int = 0, use: str = "place"
) -> list[Place]:
    """Up to `num_places` places of a kind, spread over the documents; another `use` is another choice."""
    return spread(
        num_docs,
        num_places,
        seed,
        lambda doc: places_in(doc, text(doc), kind, random.Random(f"{seed}/{doc}/{kind}/{use}")),
    )


def stops_of(line: Place) -> list[Place]:
    """Where a suggestion is asked for while a line (a place at its start) is typed.

    At its start, and at each word's start and after one and two of its characters, as long as some of it is missing.
    """
    cursors = {line.at}
    for word in WORD.finditer(line.text, line.at, line.end):
        cursors.update(range(word.start(), min(word.start() + TYPED_CHARACTERS + 1, word.end())))
    return [Place(line.doc, line.text, at, line.end) for at in sorted(cursors)]
